"""Fused decode steps: projections, norms and activations in one launch each, where stock Llama needs several."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from utils.cache import KERNEL_DTYPES

SILU = type(ACT2FN["silu"])  # torch's class, or transformers' own


class MergedLinear:
    """One product for several linear layers of the same input in decode steps, where separate small reads are slow.

    `merge` concatenates the weights, and the layers' parameters become views of the result. Checkpoints, training and
    in-place changes see no difference. Layers that cannot be merged, or were replaced, moved, hooked or wrapped since,
    run separately.
    """

    def __init__(self):
        self.weight: torch.Tensor | None = None

    def product(self, inputs: torch.Tensor, *layers: torch.nn.Module) -> torch.Tensor | None:
        """The layers' concatenated outputs for [B, 1, n], [B, 1, outputs]; None if they must run separately."""
        if self.weight is None or inputs.shape[1] != 1:
            return None
        if not (torch.compiler.is_compiling() or self.is_current(*layers)):
            return None
        if torch.is_grad_enabled() and (inputs.requires_grad or any(layer.weight.requires_grad for layer in layers)):
            return None  # gradients belong to the layers' own weights, and the kernels that follow have none
        return F.linear(inputs, self.weight)

    def is_current(self, *layers: torch.nn.Module) -> bool:
        """Whether the layers still consist of views of the merged weight and nothing else."""
        at = self.weight.data_ptr()
        for layer in layers:
            if not _is_plain(layer) or layer.weight.data_ptr() != at or layer.weight.dtype != self.weight.dtype:
                return False
            at += layer.weight.nbytes
        return True

    @torch.no_grad()
    @torch.inference_mode(False)  # weights outlive the caller's inference mode
    def merge(self, *layers: torch.nn.Module) -> None:
        if self.weight is not None and self.is_current(*layers):
            return
        self.weight = None
        if all(map(_is_plain, layers)):
            weights = [layer.weight.data for layer in layers]
            if len({(weight.dtype, weight.device) for weight in weights}) == 1:
                self.weight = torch.cat(weights)
                for layer, rows in zip(layers, self.weight.split([len(weight) for weight in weights]), strict=True):
                    layer.weight.data = rows


def _is_plain(layer: torch.nn.Module) -> bool:
    """Whether a linear layer is its weight and nothing else: no bias, hooks, adapter, sharding or quantisation."""
    if type(layer) is not torch.nn.Linear or layer.bias is not None or "forward" in vars(layer):
        return False
    if layer.weight.dtype not in KERNEL_DTYPES:
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return not hooked and type(layer.weight) is torch.nn.Parameter and type(layer.weight.data) is torch.Tensor


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
        self.merged = MergedLinear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        by_silu = isinstance(self.act_fn, SILU)
        gate_up = self.merged.product(x, self.gate_proj, self.up_proj) if by_silu else None
        if gate_up is None:
            return super().forward(x)
        from h2optimizer.kernels import mlp

        compiling = torch.compiler.is_compiling()
        activate = mlp.silu_and_multiply if compiling else mlp.run_silu_and_multiply
        return self.down_proj(activate(gate_up))
