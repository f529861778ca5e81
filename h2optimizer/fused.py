"""Fused layers: products that are merged, and one launch between two of them where stock models need several."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN

from h2optimizer import attention, float8, shards
from h2optimizer.backends import has_kernels
from h2optimizer.utils.cache import CACHE_ARGUMENT, KERNEL_DTYPES, HHCache, kernels_take

SILU = type(ACT2FN["silu"])  # torch's class, or transformers' own


class MergedLinear:
    """One product for several linear layers of the same input.

    `merge` concatenates the weights, and the layers' parameters become views of the result. Checkpoints, training and
    in-place changes see no difference. Layers that cannot be merged, or were replaced, moved, hooked or wrapped since,
    run separately. In float8, a single layer is worth it too: its inputs are quantised in one pass.
    """

    def __init__(self):
        self.weight: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None  # of a float8 weight, [outputs, 1]
        self.bias: torch.Tensor | None = None  # [outputs]
        self.widths: list[int] = []  # each layer's outputs, here those of this process

    def product(self, inputs: torch.Tensor, *layers: torch.nn.Module) -> torch.Tensor | None:
        """The layers' concatenated outputs for [..., n], [..., outputs]; None if they must run separately."""
        if not self._stands_for(inputs, layers):
            return None
        if self.scale is not None:
            return float8.linear(inputs, self.weight, self.scale, self.bias)
        return F.linear(inputs, self.weight, self.bias)

    def of_norm(
        self, inputs: torch.Tensor, norm: FusedRMSNorm, *layers: torch.nn.Module, gated: bool = False
    ) -> torch.Tensor | None:
        """The layers' concatenated outputs for norm(inputs) of a few rows, in one launch; None if there is no kernel.

        gated: silu(gate) * up of the two layers' outputs.
        """
        if self.scale is not None or not self._stands_for(inputs, layers) or self.weight.dtype != inputs.dtype:
            return None
        from h2optimizer.kernels import products

        return products.product(
            inputs, self.weight, bias=self.bias, norm=norm.weight, eps=norm.variance_epsilon, gated=gated
        )

    def added(self, residual: torch.Tensor, inputs: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        """residual + layer(inputs) of a few rows, in one launch if there is a kernel."""
        own = stored(layer)
        if own is None or own.scale is not None or own.weight.dtype != inputs.dtype or not own.weight.is_contiguous():
            return residual + self(inputs, layer)
        from h2optimizer.kernels import products

        return products.product(inputs, own.weight, bias=own.bias, residual=residual)

    def _stands_for(self, inputs: torch.Tensor, layers: tuple[torch.nn.Module, ...]) -> bool:
        """Whether the product of these inputs is the layers' own."""
        if self.weight is None:
            return False
        if not self.is_current(*layers):
            return False
        if not torch.is_grad_enabled():  # asked first: parameters() is slow
            return True
        # gradients belong to the layers' own weights, and the kernels that follow have none
        return not _needs_gradients(inputs, *(own for layer in layers for own in layer.parameters()))

    def __call__(self, inputs: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        """The output of a single layer."""
        product = self.product(inputs, layer)
        return layer(inputs) if product is None else product

    def is_current(self, *layers: torch.nn.Module) -> bool:
        """Whether the layers still consist of views of the merged weight, and bias, and nothing else."""
        if self._is_made_of(layers):
            return True
        merged = Stored(self.weight, self.scale, self.bias)
        at = merged.addresses
        for layer in layers:
            parts = stored(layer)
            if parts is None or parts.addresses != at or parts.weight.dtype != self.weight.dtype:
                return False
            at = tuple(None if part is None else address + part.nbytes for address, part in zip(at, parts, strict=True))
        return True

    def _is_made_of(self, layers: tuple[torch.nn.Module, ...]) -> bool:
        """`is_current` where all parameters are plain: each forward asks, and addresses alone answer at once."""
        at, bias_at = self.weight.data_ptr(), None if self.bias is None else self.bias.data_ptr()
        for layer in layers:
            held = vars(layer)
            if type(layer) is not torch.nn.Linear or "forward" in held or _has_own_hooks(layer):
                return False
            weight, bias = held["_parameters"].get("weight"), held["_parameters"].get("bias")
            if type(weight) is not torch.nn.Parameter or weight.data_ptr() != at or weight.dtype != self.weight.dtype:
                return False
            at += weight.nbytes
            if (None if bias is None else bias.data_ptr()) != bias_at:
                return False
            if bias is not None:
                bias_at += bias.nbytes
        return not _has_any_global_hook()

    def merge(self, *layers: torch.nn.Module) -> None:
        """Merge the layers' weights, if they can be merged and are not yet."""
        if self.weight is None and len(layers) == 1 and type(getattr(layers[0], "weight", None)) is torch.nn.Parameter:
            return  # asked at each `generate`, and nothing to gain
        if self.weight is None or not self.is_current(*layers):
            self._merge(layers)

    @torch.no_grad()
    @torch.inference_mode(False)  # weights outlive the caller's inference mode
    def _merge(self, layers: tuple[torch.nn.Module, ...]) -> None:
        self.weight = self.scale = self.bias = None
        parts = [stored(layer) for layer in layers]
        if any(part is None for part in parts) or len({part.kinds for part in parts}) != 1:
            return
        if len(layers) == 1 and parts[0].scale is None:
            return
        self.widths = [len(part.weight) for part in parts]
        for name in Stored._fields:
            same = [getattr(part, name) for part in parts]
            if same[0] is None:
                continue
            merged = torch.cat([part.data for part in same])
            for layer, part, rows in zip(layers, same, merged.split(self.widths), strict=True):
                if shards.is_divided(layer):
                    shards.set_local_rows(layer, name, rows)
                else:
                    part.data = rows
            setattr(self, name, merged)


class Stored(NamedTuple):
    """What the product of a linear layer reads, by outputs. Under tensor parallelism, this process's rows of it."""

    weight: torch.Tensor  # in float8 its numbers
    scale: torch.Tensor | None = None  # of float8 numbers
    bias: torch.Tensor | None = None

    @property
    def kinds(self) -> tuple:
        return tuple(None if part is None else (part.dtype, part.device) for part in self)

    @property
    def addresses(self) -> tuple[int | None, ...]:
        return tuple(None if part is None else part.data_ptr() for part in self)


def stored(layer: torch.nn.Module) -> Stored | None:
    """The tensors of a linear layer; None for a layer that is more than their product and sum (a hook, an adapter, a
    sum over processes), or is quantised otherwise.
    """
    if type(layer) is not torch.nn.Linear or is_hooked(layer):
        return None
    weight, bias = layer.weight, layer.bias
    if "forward" in vars(layer):
        if (rows := shards.local_rows(layer)) is None:
            return None
        weight, bias = rows
    elif bias is not None and not _is_plain(bias):
        return None
    elif not _is_plain(weight):
        numbers = float8.stored(weight)
        return None if numbers is None else Stored(*numbers, bias)
    return Stored(weight, None, bias) if weight.dtype in KERNEL_DTYPES else None


def _is_plain(parameter: torch.Tensor) -> bool:
    return type(parameter) is torch.nn.Parameter and type(parameter.data) is torch.Tensor


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether a call runs more than the module's forward: hooks of its own, or such as run for all modules."""
    return _has_own_hooks(module) or bool(_has_any_global_hook())


def _has_own_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_foreign_hooks(module: torch.nn.Module) -> bool:
    """Whether a forward has hooks besides those that transformers leaves after a request for outputs or gradient
    checkpointing, which are idle without one."""
    if _has_any_global_hook():
        return True
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return bool(hooks) and not all(str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def is_watched(module: torch.nn.Module) -> bool:
    """Whether a module's outputs or their gradients are seen by something of the user's, or its forward is not its
    own."""
    if has_foreign_hooks(module) or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in vars(module) and not shards.is_divided(module)


def _needs_gradients(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def rotate(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, by_kernel: bool, in_place: bool = False
) -> torch.Tensor:
    """RoPE on [B, H, n, D] with tables [1 or B, n, D]: in one pass `by_kernel` if the kernel takes them, else in torch.

    in_place: the kernel may write over the states.
    """
    dtype, head_dim = states.dtype, states.shape[-1]
    suited = by_kernel and kernels_take(dtype, head_dim) and (dtype, head_dim) == (cos.dtype, cos.shape[-1])
    if not suited or _needs_gradients(states):
        return attention.rotate(states, cos[:, None], sin[:, None])
    from h2optimizer.kernels import layer

    return layer.rotate(states, cos, sin, in_place)


def normalise_heads(
    projected: list[torch.Tensor], query_norm: torch.nn.Module, key_norm: torch.nn.Module, widths: list[int]
) -> list[torch.Tensor]:
    """Norms over the heads of query and key, of what `H2OAttention.project` returns and in its form.

    A merged product is normalised where it is, in one launch, if nothing has replaced the norms. `widths` are its
    parts. Otherwise the norms are called.
    """
    norms = query_norm, key_norm
    if len(projected) == 1 and all(_normalises(norm, projected[0]) for norm in norms):
        from h2optimizer.kernels import layer

        weights = query_norm.weight, key_norm.weight
        return [layer.normalise_heads(projected[0], *weights, *widths[:2], query_norm.variance_epsilon)]
    query, key, value = projected[0].split(widths, dim=-1) if len(projected) == 1 else projected
    heads = (states.unflatten(-1, (-1, len(norm.weight))) for states, norm in zip((query, key), norms, strict=True))
    return [*(norm(of).flatten(-2) for norm, of in zip(norms, heads, strict=True)), value]


def _normalises(norm: torch.nn.Module, states: torch.Tensor) -> bool:
    """Whether a norm is no more than a FusedRMSNorm with a weight for these states."""
    if not isinstance(norm, FusedRMSNorm) or is_hooked(norm):
        return False
    if "forward" in vars(norm) and not shards.is_divided(norm):
        return False
    weight = norm.weight
    alike = _is_plain(weight) and (weight.dtype, weight.device) == (states.dtype, states.device)
    return alike and weight.dtype in KERNEL_DTYPES and not _needs_gradients(states, weight)


class FusedRMSNorm:
    """A family's RMSNorm in one kernel: with the residual sum before it, or alone on a GPU and in decode steps.

    `add` normalises the sum in the same pass, and `forward` returns that when it is asked for the norm of this very
    sum. So the modules are still called one after the other, and hooks see what they see in the family's own code.
    """

    _ready: tuple[torch.Tensor, int, torch.Tensor] | None = None  # a sum, its version, its norm

    def add(self, residual: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """residual + branch, [..., n]."""
        weight = self.weight
        plain = type(residual) is type(branch) is torch.Tensor and type(weight) in (torch.nn.Parameter, torch.Tensor)
        alike = residual.dtype == branch.dtype == weight.dtype and residual.device == branch.device == weight.device
        if not (plain and alike) or residual.shape != branch.shape or weight.dtype not in KERNEL_DTYPES:
            return residual + branch
        if _needs_gradients(residual, branch, weight):
            return residual + branch
        from h2optimizer.kernels import layer

        summed, normed = layer.add_and_normalise(residual, branch, weight, self.variance_epsilon)
        self._keep((summed, summed._version, normed))
        return summed

    def _keep(self, ready: tuple[torch.Tensor, int, torch.Tensor] | None) -> None:
        vars(self)["_ready"] = ready  # a module's attributes are slow to set

    def forget(self) -> None:
        """Drop the norm of a sum that another product normalises itself."""
        self._keep(None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._ready is not None:
            summed, version, normed = self._ready
            self._keep(None)
            if summed is hidden_states and version == summed._version:
                return normed
        several_on_cpu = hidden_states.shape[1] != 1 and not hidden_states.is_cuda
        if several_on_cpu or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def takes_norm(forward):
    """Mark a module's forward that takes `norm`: its inputs are then a residual stream, and it returns their sum with
    what it computes of norm(inputs). An override without the mark is called with normalised inputs."""
    forward.takes_norm = True
    return forward


class FusedDecoderLayer:
    """A family's decoder layer whose residual sums are one pass each with the norm that follows.

    In decode steps of a few rows, the norms and sums are parts of the products beside them.
    """

    next_norm: FusedRMSNorm  # of the next layer, or the model's last one

    def precede(self, norm: FusedRMSNorm) -> None:
        """Say which norm follows this layer. It stays a part of the module that has it."""
        object.__setattr__(self, "next_norm", norm)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        cache = kwargs.get(CACHE_ARGUMENT)
        if args or not isinstance(cache, HHCache):
            return super().forward(hidden_states, *args, **kwargs)
        if not has_kernels(cache.h2o, hidden_states.device):
            return super().forward(hidden_states, **kwargs)
        if self._takes_few(hidden_states):
            self.input_layernorm.forget()
            hidden_states, _ = self.self_attn(hidden_states=hidden_states, norm=self.input_layernorm, **kwargs)
            return self.mlp(hidden_states, norm=self.post_attention_layernorm)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        step, layer_idx, norm = cache.step, self.self_attn.layer_idx, self.post_attention_layernorm
        hidden_states, attended = step.wanted(hidden_states, layer_idx), step.wanted(attended, layer_idx)
        hidden_states = _add(hidden_states, attended, norm)
        return _add(hidden_states, self.mlp(norm(hidden_states)), self.next_norm)

    def _takes_few(self, states: torch.Tensor) -> bool:
        """Whether the states [B, columns, n] are those of a decode step of a few rows, whose norms nobody looks at."""
        if states.shape[1] != 1 or states.dtype not in (torch.float16, torch.bfloat16):
            return False
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (states, *self.parameters())):
            return False
        if type(states) is not torch.Tensor or torch.is_autocast_enabled(states.device.type):
            return False
        from h2optimizer.kernels import products

        if len(states) > products.MOST_ROWS or not products.runs_on(states.device):
            return False
        norms, branches = (self.input_layernorm, self.post_attention_layernorm), (self.self_attn, self.mlp)
        if not all(getattr(type(branch).forward, "takes_norm", False) for branch in branches):
            return False
        if not all(isinstance(norm, FusedRMSNorm) and norm.weight.dtype == states.dtype for norm in norms):
            return False
        return not any(has_foreign_hooks(module) or "forward" in vars(module) for module in (*norms, *branches))


def _add(residual: torch.Tensor, branch: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    """The residual sum before a norm, which may have been replaced by one that does not add."""
    return norm.add(residual, branch) if isinstance(norm, FusedRMSNorm) else residual + branch


def _is_silu(activation: torch.nn.Module) -> bool:
    """Whether an activation is no more than SiLU."""
    return type(activation) is SILU and not (is_hooked(activation) or "forward" in vars(activation))


class FusedMLP:
    """A family's gated MLP that merges gate and up into one product, and activates in one pass."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.merged, self.down = MergedLinear(), MergedLinear()

    @takes_norm
    def forward(self, x: torch.Tensor, norm: FusedRMSNorm | None = None) -> torch.Tensor:
        by_silu = _is_silu(self.act_fn)
        if norm is not None:
            active = self.merged.of_norm(x, norm, self.gate_proj, self.up_proj, gated=True) if by_silu else None
            return x + self(norm(x)) if active is None else self.down.added(x, active, self.down_proj)
        gate_up = self.merged.product(x, self.gate_proj, self.up_proj) if by_silu else None
        if gate_up is None:
            return super().forward(x)
        from h2optimizer.kernels import mlp

        return self.down(mlp.silu_and_multiply(gate_up), self.down_proj)


def is_familys_own(layer: torch.nn.Module, norm: torch.nn.Module) -> bool:
    """Whether a decoder layer, its MLP and norms, and the norm that follows are those that the model was built with.

    Others may mix tokens, or keep what they see.
    """
    if not isinstance(layer, FusedDecoderLayer) or not isinstance(layer.mlp, FusedMLP):
        return False
    return isinstance(layer.post_attention_layernorm, FusedRMSNorm) and isinstance(norm, FusedRMSNorm)
