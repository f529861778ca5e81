"""Linear layers that transformers has divided among processes (tensor parallelism)."""

from __future__ import annotations

import torch


def is_divided(module: torch.nn.Module) -> bool:
    """Whether transformers has replaced the module's forward with one over its shards."""
    return str(getattr(vars(module).get("forward"), "__module__", "")).startswith("transformers.distributed.")


def local_rows(layer: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """This process's rows of weight [outputs, inputs] and bias [outputs] of a layer whose outputs are divided and stay
    so; None for any other layer.

    Its product needs no other process: inputs are whole, and outputs belong to this process's heads or columns.
    """
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    forward = vars(layer).get("forward")
    own = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    if not is_divided(layer) or not all(map(_is_divided_by_outputs, own)):
        return None
    held = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    if "self" not in held or held["self"].cell_contents is not ALL_PARALLEL_STYLES["colwise"]:
        return None
    with torch.no_grad():  # otherwise a new tensor for autograd
        return layer.weight.to_local(), None if layer.bias is None else layer.bias.to_local()


def _is_divided_by_outputs(parameter: torch.Tensor) -> bool:
    placements = getattr(parameter, "placements", ())
    return len(placements) == 1 and placements[0].is_shard(0)


def set_local_rows(layer: torch.nn.Linear, name: str, rows: torch.Tensor) -> None:
    """Let the layer's weight, or bias, hold these rows, equal to `local_rows`, in their memory."""
    from torch.distributed.tensor import DTensor

    old = getattr(layer, name)
    whole = {"shape": old.shape, "stride": old.stride()}
    shard = DTensor.from_local(rows, old.device_mesh, old.placements, run_check=False, **whole)
    setattr(layer, name, torch.nn.Parameter(shard, requires_grad=old.requires_grad))
