"""Linear layers that transformers has divided among processes (tensor parallelism)."""

from __future__ import annotations

import torch


def is_divided(module: torch.nn.Module) -> bool:
    """Whether transformers has replaced the module's forward with one over its shards."""
    return str(getattr(vars(module).get("forward"), "__module__", "")).startswith("transformers.distributed.")


def local_rows(layer: torch.nn.Linear) -> torch.Tensor | None:
    """This process's rows [outputs, inputs] of a layer whose outputs are divided and stay so; None for any other.

    Its product needs no other process: inputs are whole, and outputs belong to this process's heads or columns.
    """
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    forward, placements = vars(layer).get("forward"), getattr(layer.weight, "placements", ())
    if not is_divided(layer) or len(placements) != 1 or not placements[0].is_shard(0):
        return None
    held = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    if "self" not in held or held["self"].cell_contents is not ALL_PARALLEL_STYLES["colwise"]:
        return None
    with torch.no_grad():  # otherwise a new tensor for autograd
        return layer.weight.to_local()


def set_local_rows(layer: torch.nn.Linear, rows: torch.Tensor) -> None:
    """Let the layer's weight hold these rows, equal to `local_rows`, in their memory."""
    from torch.distributed.tensor import DTensor

    weight = layer.weight
    whole = {"shape": weight.shape, "stride": weight.stride()}
    shard = DTensor.from_local(rows, weight.device_mesh, weight.placements, run_check=False, **whole)
    layer.weight = torch.nn.Parameter(shard, requires_grad=weight.requires_grad)
