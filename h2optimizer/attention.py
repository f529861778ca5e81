"""Attention that also reports mass: the probability that each slot received from this forward's queries.

Every backend takes `Inputs` and returns the output [B, Hq, columns, D] and, on scored steps, the mass [B, Hkv, width]
float32: column sums of softmax(QK^T * scaling) over queries and a group's query heads. The mass is None on other steps.
If kernels decode, `kernel_decode_step` replaces the backend and works on the slots in place.

After a shared prefix, `Inputs` has its keys and values apart: one copy for all rows. Torch's backends join them to each
row's own, a layer at a time; the kernels do not.
"""

import functools
import importlib
import importlib.util
import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from transformers.models.llama.modeling_llama import rotate_half

from h2optimizer.utils.cache import HHLayer, kernels_take
from h2optimizer.utils.prefix import followed_by
from h2optimizer.utils.step import Step

BLOCK_BYTES = 512 * 2**20  # float32 logits that the sdpa backend holds at once on a GPU
CACHE_BYTES = 2 * 2**20  # the same for each thread of a CPU: about its share of the caches
CPU_QUERIES = 64  # query columns of a block on a CPU: fewer cost speed in products, more compute what the mask hides

Rope = tuple[torch.Tensor, torch.Tensor]
Attended = tuple[torch.Tensor, torch.Tensor | None]  # output and mass


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on states [B, H, n, D] with broadcastable tables, in the same arithmetic as apply_rotary_pos_emb."""
    return (states * cos) + (rotate_half(states) * sin)


class Inputs(NamedTuple):
    """The inputs of a backend."""

    query: torch.Tensor  # [B, Hq, columns, D]
    key: torch.Tensor  # [B, Hkv, width, D], as `HHCache.update` returns it
    value: torch.Tensor  # [B, Hkv, width, D]
    step: Step  # says which slots each query sees
    scaling: float  # of q·k
    group_reduce: str = "sum"  # H2OConfig's
    layer: HHLayer | None = None  # the cache layer of key and value
    rope: Rope | None = None  # cosines and sines [width, D] by slot index, if keys are cached unrotated
    # Keys and values [1, Hkv, P, D] of a prefix; key and value are then those of the `columns` new tokens alone.
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def states(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value

    def rotated(self) -> "Inputs":
        """The same inputs with rotated keys, in a copy."""
        if self.rope is None:
            return self
        shared, prefix = self.step.shared, self.prefix
        if prefix is not None:
            prefix = rotate(prefix[0], *(table[:shared] for table in self.rope)), prefix[1]
        key = rotate(self.key, *(table[shared:] for table in self.rope))
        return self._replace(key=key, rope=None, prefix=prefix)

    def joined(self) -> "Inputs":
        """The same inputs with the prefix in front of each row's own keys and values, in a copy."""
        if self.prefix is None:
            return self
        key, value = map(followed_by, self.prefix, (self.key, self.value))
        return self._replace(key=key, value=value, prefix=None)


def eager_attention(inputs: Inputs) -> Attended:
    """The reference: the whole attention matrix at once."""
    inputs = inputs.rotated().joined()
    return blocked_attention(inputs, heads=inputs.key.shape[:2].numel(), queries=inputs.step.columns)


def sdpa_attention(inputs: Inputs) -> Attended:
    """Torch's fused attention; mass is computed in blocks of queries, in memory linear in the prompt.

    SDPA runs only where it needs no mask, because a mask would expand the KV heads and rule out the flash kernel. That
    is prefill (tokens come before padding, so causal is enough) and unscored decode steps of rows of equal length. All
    other forwards compute output and mass in the same blocks. So does a scored prefill on a CPU, where SDPA takes as
    long as the blocks and would need them again for the mass.
    """
    inputs = inputs.rotated().joined()
    (query, key, value), step = inputs.states, inputs.step
    prefill = step.max_start == 0
    without_mask = prefill or (step.decode and not step.scored and step.min_start == step.max_start)
    if not without_mask or _in_one_pass(inputs):
        return _in_blocks(inputs)
    gqa = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=step.columns > 1, scale=inputs.scaling, enable_gqa=gqa
    )
    if not step.scored:
        return output, None
    with torch.no_grad():
        _, mass = _in_blocks(inputs, with_output=False)
    return output, mass


def triton_attention(inputs: Inputs) -> Attended:
    """Triton kernels: one pass for a decode step; for several tokens, one more pass of tiles for the mass.

    The sdpa backend takes what the kernels do not support (gradients, float64, head_dim above 256). It also takes
    several tokens in float32 on a GPU: without tensor cores, torch's products are faster.
    """
    query, step = inputs.query, inputs.step
    if not _kernels_apply(inputs) or (query.dtype == torch.float32 and query.is_cuda and not step.decode):
        return sdpa_attention(inputs)
    if step.decode:
        return _kernel_decode(inputs)
    inputs = inputs.rotated()
    if inputs.prefix is not None:
        return attention_after_prefix(inputs)
    if step.max_start == 0 and not step.scored:
        return sdpa_attention(inputs)
    output, lse = _attention_with_lse(inputs)
    return output, _kernel_mass(inputs, lse) if step.scored else None


def flash_attention(inputs: Inputs) -> Attended:
    """The flash-attn package, directly on the slots. Triton computes mass, and decode steps whose keys need rotation.

    In a later forward of several tokens the causal mask is aligned to the bottom right: query column i of row b sees
    start[b] + i + 1 slots if the row's end is given as start[b] + `columns`.
    """
    step, scaling = inputs.step, inputs.scaling
    if not _kernels_apply(inputs) or inputs.query.dtype == torch.float32 or inputs.prefix is not None:
        return triton_attention(inputs)
    if step.decode and (step.scored or inputs.rope is not None):
        return _kernel_decode(inputs)
    inputs = inputs.rotated()
    query, key, value = inputs.states
    if step.decode and inputs.layer is not None:  # all slots: shapes recorded in a graph must not change between steps
        key, value = inputs.layer.slots.read()
    flash, (q, k, v) = find_flash_attn(), (states.transpose(1, 2) for states in (query, key, value))
    lse = None
    if step.max_start == 0:
        wanted = _lse_argument(flash.flash_attn_func) if step.scored else {}
        output = flash.flash_attn_func(q, k, v, softmax_scale=scaling, causal=True, **wanted)
    else:
        ends = step.attended(q.device) if step.decode else step.spans(q.device)[0] + step.columns
        output = flash.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=ends, softmax_scale=scaling, causal=True, return_softmax_lse=step.scored
        )
    if isinstance(output, tuple):
        output, lse = output[:2]
    output = output.transpose(1, 2)
    return output, _kernel_mass(inputs, lse) if step.scored else None


def blocked_attention(inputs: Inputs, heads: int, queries: int, with_output: bool = True) -> Attended:
    """Softmax attention over blocks of `heads` of the B * Hkv KV heads and `queries` query columns.

    The query heads of a group are in the same block, so that K is read once. Keys must be rotated already. Without the
    output, only the mass is computed, from the first scored query on.
    """
    query, key, value = inputs.states
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(0, 1)  # [B * Hkv, G, columns, D]
    if inputs.group_reduce == "first" and not with_output:
        grouped = grouped[:, :1]
    flat = grouped, key.flatten(0, 1), value.flatten(0, 1)
    parts = [slice(begin, begin + heads) for begin in range(0, len(grouped), heads)]
    outputs, masses = zip(*(_attend_heads(inputs, *flat, part, queries, with_output) for part in parts), strict=True)
    output = _joined(outputs, dim=0).view(*query.shape[:-1], -1) if with_output else None
    return output, _joined(masses, dim=0).view(key.shape[:3]) if inputs.step.scored else None


def _attend_heads(inputs: Inputs, grouped, key, value, part: slice, queries: int, with_output: bool) -> Attended:
    """`blocked_attention` of the KV heads in `part`: output [heads, G, columns, D], mass [heads, width]."""
    step, device, kv_heads = inputs.step, key.device, inputs.key.shape[1]
    grouped, key, value = grouped[part], key[part], value[part]
    mass, outputs, first = None, [], min(step.first_scored)
    # from the last block, which is the longest: memory that it leaves holds every other block
    for begin in reversed(range(0 if with_output else first, step.columns, queries)):
        end = min(begin + queries, step.columns)
        visible = step.max_start + end
        probs = scaled_logits(grouped[None, :, :, begin:end], key[None, :, :visible], inputs.scaling)[0]
        open_slots = step.min_start + begin + 1  # every query of the block sees these
        if open_slots < visible:
            starts = step.starts(device).repeat_interleave(kv_heads)[part]
            last_seen = starts[:, None] + torch.arange(begin, end, device=device)
            hidden = torch.arange(open_slots, visible, device=device) > last_seen[:, None, :, None]
            probs[..., open_slots:].masked_fill_(hidden, -torch.inf)
        probs = probs.softmax(dim=-1)  # [heads, G, end - begin, visible]
        if with_output:
            weights = probs.to(value.dtype).flatten(1, 2)
            outputs.append((weights @ value[:, :visible]).view(*probs.shape[:-1], -1))
        if step.scored and (mass is None or end > first):
            counted = (probs[:, :1] if inputs.group_reduce == "first" else probs).detach()
            if not step.all_scored(begin, end):
                scored = step.scored_columns(device)[:, begin:end].repeat_interleave(kv_heads, dim=0)[part]
                counted = counted * scored[:, None, :, None]
            received = counted.sum(dim=(1, 2), dtype=torch.float32)
            if mass is None:
                mass = received
            else:
                mass[:, :visible].add_(received)
    return _joined(outputs[::-1], dim=2) if with_output else None, mass


def _joined(parts, dim: int) -> torch.Tensor:
    """The parts along a dimension; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def block_sizes(inputs: Inputs) -> tuple[int, int]:
    """How many KV heads and query columns a block has, so that a GPU's memory or a CPU's caches hold its logits."""
    query, key = inputs.query, inputs.key
    heads, column_bytes = key.shape[:2].numel(), 4 * query.shape[1] // key.shape[1] * key.shape[2]
    if query.is_cuda:
        return heads, max(1, BLOCK_BYTES // (column_bytes * heads))
    queries = min(CPU_QUERIES, query.shape[2])
    return max(1, torch.get_num_threads() * CACHE_BYTES // (column_bytes * queries)), queries


def _in_blocks(inputs: Inputs, with_output: bool = True) -> Attended:
    """`blocked_attention` in blocks of the right size; several tokens on a CPU in float32 or float64."""
    if inputs.query.is_cuda or inputs.step.decode:  # one query is too little work for converting V
        return blocked_attention(inputs, *block_sizes(inputs), with_output)
    # most CPUs have no fast products in half precision, and none that leave the logits in float32
    states = [of.to(torch.promote_types(of.dtype, torch.float32)) for of in inputs.states]
    with torch.autocast("cpu", enabled=False):
        output, mass = blocked_attention(Inputs(*states, *inputs[3:]), *block_sizes(inputs), with_output)
    return output.to(inputs.query.dtype) if with_output else None, mass


def _in_one_pass(inputs: Inputs) -> bool:
    """Whether blocks of a scored prefill also compute the output: on a CPU, unless few queries are scored.

    Gradients need SDPA, whose backward pass keeps no probabilities.
    """
    step = inputs.step
    if inputs.query.is_cuda or not step.scored or 8 * (step.columns - min(step.first_scored)) < step.columns:
        return False
    return not (torch.is_grad_enabled() and any(states.requires_grad for states in inputs.states))


def scaled_logits(grouped: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """q·k * scaling [B, Hkv, G, m, n] of [B, Hkv, G, m, D], [B, Hkv, n, D]: float32 or float64 except in autocast."""
    q, k = grouped.flatten(0, 1).flatten(1, 2), key.flatten(0, 1).transpose(1, 2)
    exact = {}
    if q.dtype in (torch.float16, torch.bfloat16):
        if q.is_cuda:
            exact = {"out_dtype": torch.float32}
        else:
            q, k = q.float(), k.float()
    unused = q.new_empty(1, 1, 1, dtype=exact.get("out_dtype"))  # beta = 0: never read
    return torch.baddbmm(unused, q, k, beta=0, alpha=scaling, **exact).view(*grouped.shape[:4], -1)


def _kernels_apply(inputs: Inputs) -> bool:
    """Whether the Triton kernels support these states."""
    query, key, value = inputs.states
    return (
        kernels_take(query.dtype, query.shape[-1])
        and key.dtype == value.dtype == query.dtype
        and not (torch.is_grad_enabled() and any(states.requires_grad for states in inputs.states))
    )


def _kernel_decode(inputs: Inputs) -> Attended:
    """Attention and mass of one decode step by the kernel."""
    from h2optimizer.kernels.decode import decode_attention

    key, step, first_head = inputs.key, inputs.step, inputs.group_reduce == "first"
    mass = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device) if step.scored else None
    lengths = step.attended(key.device)
    output = decode_attention(
        *inputs.states, lengths, inputs.scaling, mass=mass, rope=inputs.rope, first_head=first_head
    )
    return output, mass


def decodes_by_kernel(layer: HHLayer, step: Step) -> bool:
    """Whether `kernel_decode_step` replaces `HHCache.update` and a backend in this forward."""
    by_flash_attn = layer.h2o.backend == "flash_attn" and layer.slots.plain
    needed = step.scored or step.partial or layer.h2o.position_rolling or not by_flash_attn
    return step.decode and layer.by_kernel and needed


def kernel_decode_step(
    projected: list[torch.Tensor], rope: Rope | None, layer: HHLayer, step: Step, scaling: float
) -> torch.Tensor:
    """A whole decode step on a layer's slots by kernels: rotate, append, attend and, on scored steps, add mass.

    Args: projected: query, key and value [B, 1, heads * D], unrotated, or one merged tensor; rope: cosines and sines
    [1 or B, n, D], at the rows' positions (n = 1), or for all slots when rolling; None for a layer without RoPE.
    Returns: [B, 1, Hq * D].
    """
    from h2optimizer.kernels import decode

    h2o, slots, lengths = layer.h2o, layer.slots, layer.lengths
    if step.partial:
        lengths = layer.seen_by(step).attended(layer.device).view(len(lengths), -1).expand_as(lengths)
    return decode.decode_step(
        projected, *(rope or (None, None)), slots.keys, slots.values, slots.mass if step.scored else None,
        slots.count if step.scored else None, slots.norms, lengths, slots.offsets, slots.capacities, scaling,
        float(h2o.score_decay), h2o.group_reduce == "first", h2o.position_rolling and rope is not None,
        *(slots.scales or (None, None)),
    )  # fmt: skip


def attention_after_prefix(inputs: Inputs) -> Attended:
    """Attention over a shared prefix and, causally, over each row's own tokens, merged by their log-sum-exps.

    The prefix is read once for the queries of all rows, as in Hydragen (Juravsky et al., arXiv 2402.05099).
    """
    from h2optimizer.kernels.prefill import merge_attention

    step = inputs.step
    key, value = inputs.prefix
    shared, own = inputs._replace(key=key, value=value, prefix=None), inputs._replace(prefix=None, step=step.alone)
    output, lse = merge_attention(*_attention_over_prefix(shared), *_attention_with_lse(own))
    if not step.scored:
        return output, None
    return output, torch.cat([_kernel_mass(shared, lse), _kernel_mass(own, lse)], dim=2)


def _attention_over_prefix(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all queries over a prefix, key and value [1, Hkv, P, D], and its log-sum-exps."""
    from h2optimizer.kernels.prefill import attention_with_lse

    query, key, value = inputs.states
    rows, heads, columns = query.shape[:3]
    in_one_row = query.transpose(1, 2).reshape(1, rows * columns, heads, -1).transpose(1, 2)
    if not _cudnn_applies(in_one_row, key, value, is_causal=False):
        return attention_with_lse(*inputs.states, inputs.step.spans(query.device), inputs.scaling, prefix=True)
    output, lse = _cudnn_attention(in_one_row, key, value, inputs.scaling, is_causal=False)
    output = output.transpose(1, 2).reshape(rows, columns, heads, -1).transpose(1, 2)
    return output, lse.view(heads, rows, columns).transpose(0, 1)


def _attention_with_lse(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of several tokens and its log-sum-exps [B, Hq, columns] by the fastest kernel."""
    from h2optimizer.kernels.prefill import attention_with_lse

    step = inputs.step
    if step.max_start == 0 and _cudnn_applies(*inputs.states, is_causal=True):
        output, lse = _cudnn_attention(*inputs.states, inputs.scaling, is_causal=True)
        return output, lse.view(output.shape[:3])
    return attention_with_lse(*inputs.states, step.spans(inputs.query.device), inputs.scaling)


def _cudnn_attention(query, key, value, scaling: float, is_causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's kernel, as SDPA would choose it, with the log-sum-exps that SDPA does not return."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, False, scale=scaling
    )[:2]


def _kernel_mass(inputs: Inputs, lse: torch.Tensor) -> torch.Tensor:
    """The mass of several tokens by the kernel, from the log-sum-exps of their attention."""
    from h2optimizer.kernels.prefill import attention_mass

    query, key, _ = inputs.states
    lse = lse.reshape(query.shape[:3]).contiguous()
    spans, first_head = inputs.step.spans(query.device), inputs.group_reduce == "first"
    return attention_mass(query, key, lse, spans, inputs.scaling, first_head)


def _cudnn_applies(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> bool:
    """Whether SDPA would choose cuDNN's attention for these states, given the versions, GPU and user settings."""
    if not query.is_cuda:
        return False
    gqa = query.shape[1] != key.shape[1]
    choice = torch._fused_sdp_choice(query, key, value, None, 0.0, is_causal=is_causal, enable_gqa=gqa)
    return choice == SDPBackend.CUDNN_ATTENTION.value


@functools.cache
def find_flash_attn():
    """flash-attn 3's module, or else 2's. Raises: ValueError, with a remedy, if neither can be used."""
    fault = "flash-attn is not installed: pip install flash-attn --no-build-isolation"
    for name in ("flash_attn_interface", "flash_attn"):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            module = importlib.import_module(name)
        except ImportError as error:  # built for another torch or Python
            fault = f"{name} does not import ({' '.join(str(error).split())[:200]}): reinstall it"
            continue
        if hasattr(module, "flash_attn_func") and hasattr(module, "flash_attn_with_kvcache"):
            return module
        fault = f"this {name} has no flash_attn_func and flash_attn_with_kvcache: install flash-attn 2 or 3"
    raise ValueError(f"backend='flash_attn': {fault}, or choose backend='triton'")


@functools.cache
def _lse_argument(flash_attn_func) -> dict[str, bool]:
    """The argument that requests the log-sum-exp; the first versions of flash-attn 3 always return it."""
    name = "return_attn_probs"
    return {name: True} if name in inspect.signature(flash_attn_func).parameters else {}
