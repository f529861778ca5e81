"""Fused decode steps: projections, norms and activations in one launch each, where stock Llama needs several."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from h2optimizer import float8, shards
from utils.cache import KERNEL_DTYPES

SILU = type(ACT2FN["silu"])  # torch's class, or transformers' own


class MergedLinear:
    """One product for several linear layers of the same input in decode steps, where separate small reads are slow.

    `merge` concatenates the weights, and the layers' parameters become views of the result. Checkpoints, training and
    in-place changes see no difference. Layers that cannot be merged, or were replaced, moved, hooked or wrapped since,
    run separately. In float8, a single layer is worth it too: its inputs are quantised in one pass.
    """

    def __init__(self):
        self.weight: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None  # of a float8 weight, [outputs, 1]
        self.widths: list[int] = []  # each layer's outputs, here those of this process

    def product(self, inputs: torch.Tensor, *layers: torch.nn.Module) -> torch.Tensor | None:
        """The layers' concatenated outputs for [B, 1, n], [B, 1, outputs]; None if they must run separately."""
        if self.weight is None or (inputs.shape[1] != 1 and self.scale is None):
            return None
        if not (torch.compiler.is_compiling() or self.is_current(*layers)):
            return None
        if torch.is_grad_enabled() and (inputs.requires_grad or any(layer.weight.requires_grad for layer in layers)):
            return None  # gradients belong to the layers' own weights, and the kernels that follow have none
        if self.scale is not None:
            return float8.linear(inputs, self.weight, self.scale)
        return F.linear(inputs, self.weight)

    def __call__(self, inputs: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        """The output of a single layer."""
        product = self.product(inputs, layer)
        return layer(inputs) if product is None else product

    def is_current(self, *layers: torch.nn.Module) -> bool:
        """Whether the layers still consist of views of the merged weight and nothing else."""
        merged = [self.weight] if self.scale is None else [self.weight, self.scale]
        at = [tensor.data_ptr() for tensor in merged]
        for layer in layers:
            parts = stored(layer)
            if parts is None or [part.data_ptr() for part in parts] != at or parts[0].dtype != self.weight.dtype:
                return False
            at = [address + part.nbytes for address, part in zip(at, parts, strict=True)]
        return True

    @torch.no_grad()
    @torch.inference_mode(False)  # weights outlive the caller's inference mode
    def merge(self, *layers: torch.nn.Module) -> None:
        if self.weight is not None and self.is_current(*layers):
            return
        self.weight = self.scale = None
        parts = [stored(layer) for layer in layers]
        if None in parts or len({tuple((part.dtype, part.device) for part in each) for each in parts}) != 1:
            return
        if len(layers) == 1 and len(parts[0]) == 1:
            return
        self.widths, merged = [len(numbers) for numbers, *_ in parts], []
        for same in zip(*parts, strict=True):
            merged.append(torch.cat([part.data for part in same]))
            for layer, part, rows in zip(layers, same, merged[-1].split(self.widths), strict=True):
                if shards.is_divided(layer):
                    shards.set_local_rows(layer, rows)
                else:
                    part.data = rows
        self.weight, self.scale = (*merged, None)[:2]


def stored(layer: torch.nn.Module) -> tuple[torch.Tensor, ...] | None:
    """What the product of a linear layer reads, by outputs: its weight, or numbers and scales in float8.

    Under tensor parallelism, this process's rows of them. None for a layer that is more than that product (a bias, a
    hook, an adapter, a sum over processes), or is quantised otherwise.
    """
    if type(layer) is not torch.nn.Linear or layer.bias is not None:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    weight = layer.weight
    if "forward" in vars(layer):
        weight = shards.local_rows(layer)
    elif type(weight) is not torch.nn.Parameter or type(weight.data) is not torch.Tensor:
        return float8.stored(weight)
    return None if weight is None or weight.dtype not in KERNEL_DTYPES else (weight,)


class FusedRMSNorm:
    """A family's RMSNorm in one kernel for decode steps, where its own six cost more to launch than to run."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[1] != 1 or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class FusedMLP:
    """A family's gated MLP that merges gate and up into one product in decode steps."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.merged, self.down = MergedLinear(), MergedLinear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        by_silu = isinstance(self.act_fn, SILU)
        gate_up = self.merged.product(x, self.gate_proj, self.up_proj) if by_silu else None
        if gate_up is None:
            return super().forward(x)
        from h2optimizer.kernels import mlp

        compiling = torch.compiler.is_compiling()
        activate = mlp.silu_and_multiply if compiling else mlp.run_silu_and_multiply
        return self.down(activate(gate_up), self.down_proj)
