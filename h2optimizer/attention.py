"""Attention that also reports probability mass: what each slot received from this forward's queries.

Every backend takes query [B, Hq, columns, D], key and value [B, Hkv, width, D] as `HHCache.update` returns them, the
`Step` that says which slots each query sees, `scaling` of q·k, and `group_reduce`. Of the keyword arguments, `slots` is
the `HHLayer` that key and value belong to, and `rope` the cosines and sines [width, D] by slot index to rotate the keys
with, where they are cached unrotated. They return the output [B, Hq, columns, D] and, on scored steps, the mass
[B, Hkv, width] float32: column sums of softmax(QK^T * scaling) over queries and a group's query heads. The mass is None
on other steps. Where kernels decode, `kernel_decode_step` does all that in the slots themselves.
"""

import functools
import importlib
import importlib.util
import inspect
import os

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from transformers.models.llama.modeling_llama import rotate_half

from utils.cache import HHLayer, kernels_take
from utils.step import Step

BLOCK_BYTES = 512 * 2**20  # float32 logits that the sdpa backend holds at once on a GPU, a 16th of it on a CPU

KERNEL_BACKENDS = ("triton", "flash_attn")  # of which Triton kernels decode and slim

Rope = tuple[torch.Tensor, torch.Tensor]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on states [B, H, n, D] with tables that broadcast to it, the same arithmetic as apply_rotary_pos_emb."""
    return (states * cos) + (rotate_half(states) * sin)


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    scaling: float,
    group_reduce: str,
    *,
    slots: HHLayer | None = None,
    rope: Rope | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reference: the whole attention matrix at once."""
    key = key if rope is None else rotate(key, *rope)
    return blocked_attention(query, key, value, step, scaling, group_reduce, block=step.columns)


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    scaling: float,
    group_reduce: str,
    *,
    slots: HHLayer | None = None,
    rope: Rope | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Torch's fused attention; mass in blocks of queries, in memory linear in the prompt.

    SDPA runs where it needs no mask, which would expand the KV heads and miss its flash kernel: prefill (tokens stand
    before padding, so causal is enough) and decode steps of rows of one length. Decode steps that want mass, or rows of
    different lengths, and later forwards of several tokens take output and mass from the same blocks.
    """
    key = key if rope is None else rotate(key, *rope)
    budget = BLOCK_BYTES if query.is_cuda else BLOCK_BYTES // 16
    block = max(1, budget // (4 * query.shape[0] * query.shape[1] * key.shape[2]))
    prefill = step.max_start == 0
    if prefill or (step.decode and not step.scored and step.min_start == step.max_start):
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=step.columns > 1, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        if not step.scored:
            return output, None
        with torch.no_grad():
            _, mass = blocked_attention(query, key, None, step, scaling, group_reduce, block)
        return output, mass
    return blocked_attention(query, key, value, step, scaling, group_reduce, block)


def triton_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    scaling: float,
    group_reduce: str,
    *,
    slots: HHLayer | None = None,
    rope: Rope | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Triton kernels: decode steps in one pass, the mass of several tokens in one pass of tiles after the attention.

    What they cannot do (gradients, float64, heads of more than 256) goes to the sdpa backend, and several tokens in
    float32 too: without tensor cores torch's products are the faster ones.
    """
    if not _kernels_apply(query, key, value) or (query.dtype == torch.float32 and query.is_cuda and not step.decode):
        return sdpa_attention(query, key, value, step, scaling, group_reduce, rope=rope)
    if step.decode:
        return _kernel_decode(query, key, value, step, scaling, group_reduce, rope)
    key = key if rope is None else rotate(key, *rope)
    if step.max_start == 0 and not step.scored:
        return sdpa_attention(query, key, value, step, scaling, group_reduce)
    from h2optimizer.kernels.prefill import attention_with_lse

    if step.max_start == 0 and _cudnn_applies(query, key, value):
        # SDPA would choose it as well; called by name because SDPA keeps the log-sum-exp to itself
        output, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, True, False, scale=scaling
        )[:2]
    else:
        output, lse = attention_with_lse(query, key, value, step.spans(query.device), scaling)
    return output, _kernel_mass(query, key, lse, step, scaling, group_reduce) if step.scored else None


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    scaling: float,
    group_reduce: str,
    *,
    slots: HHLayer | None = None,
    rope: Rope | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The flash-attn package, on the slots as they are; mass, and keys to be rotated in a decode step, by the kernels.

    A later forward of several tokens is causal from the bottom right: query column i of row b sees start[b] + i + 1
    slots when the row is said to end `columns` after its start.
    """
    if not _kernels_apply(query, key, value) or query.dtype == torch.float32:
        return triton_attention(query, key, value, step, scaling, group_reduce, rope=rope)
    if step.decode and (step.scored or rope is not None):
        return _kernel_decode(query, key, value, step, scaling, group_reduce, rope)
    key = key if rope is None else rotate(key, *rope)
    if step.decode and slots is not None:  # all slots: what a graph records must not change from step to step
        key, value = slots.slots.read()
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
    return output, _kernel_mass(query, key, lse, step, scaling, group_reduce) if step.scored else None


ATTENTION_BACKENDS = {
    "eager": eager_attention,
    "sdpa": sdpa_attention,
    "triton": triton_attention,
    "flash_attn": flash_attention,
}


@functools.cache
def resolve_backend(name: str, device: str) -> str:
    """The backend that `name` means on a device type.

    "auto" is triton where all visible GPUs are NVIDIA's of compute capability 8 or more, else sdpa.

    Raises: ValueError, with the way out, for one that cannot run there.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "auto":
        return "triton" if device == "cuda" and has_triton and _least_capability() >= 8 else "sdpa"
    if name in KERNEL_BACKENDS:
        if not has_triton:
            raise ValueError(f"backend={name!r}: triton is not installed: pip install triton, or choose backend='sdpa'")
        if device != "cuda" and not (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError(f"backend={name!r} needs a CUDA device, this is {device!r}: choose backend='auto'")
        if device == "cuda" and _least_capability() < 8:
            raise ValueError(f"backend={name!r} needs NVIDIA GPUs of compute capability 8: choose backend='sdpa'")
    if name == "flash_attn":
        find_flash_attn()
    return name


def has_kernels(h2o, device: torch.device) -> bool:
    """Whether, with these settings, Triton kernels decode and slim on a device."""
    return resolve_backend(h2o.backend, device.type) in KERNEL_BACKENDS


def blocked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    step: Step,
    scaling: float,
    group_reduce: str,
    block: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Softmax attention over `block` query columns at a time, the heads of a group together so that K is read once.

    Without `value` only the mass is computed, from the first scored query on.
    """
    kv_heads, device = key.shape[1], query.device
    grouped = query.unflatten(1, (kv_heads, -1))  # [B, Hkv, G, columns, D]
    if value is None and group_reduce == "first":
        grouped = grouped[:, :, :1]
    mass, outputs = None, []
    for begin in range(0 if value is not None else min(step.first_scored), step.columns, block):
        end = min(begin + block, step.columns)
        visible = step.max_start + end
        probs = _logits(grouped[:, :, :, begin:end], key[:, :, :visible], scaling)  # [B, Hkv, G, end - begin, visible]
        open_slots = step.min_start + begin + 1  # every query of the block sees these
        if open_slots < visible:
            last_seen = step.starts(device)[:, None] + torch.arange(begin, end, device=device)
            hidden = torch.arange(open_slots, visible, device=device) > last_seen[:, None, None, :, None]
            probs[..., open_slots:].masked_fill_(hidden, -torch.inf)
        probs = probs.softmax(dim=-1)
        if value is not None:
            weights = probs.to(value.dtype).flatten(2, 3)
            outputs.append((weights @ value[:, :, :visible]).view(*probs.shape[:-1], -1))
        if step.scored:
            counted = probs[:, :, :1] if group_reduce == "first" else probs
            if not step.all_scored(begin, end):
                counted = counted * step.scored_columns(device)[:, None, None, begin:end, None]
            received = counted.sum(dim=(2, 3), dtype=torch.float32)
            if visible == step.width and mass is None:
                mass = received
            else:
                mass = query.new_zeros(*key.shape[:3], dtype=torch.float32) if mass is None else mass
                mass[:, :, :visible].add_(received)
    if value is None:
        return None, mass
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)
    return output.flatten(1, 2), mass


def _logits(grouped: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """q·k * scaling [B, Hkv, G, m, n] of [B, Hkv, G, m, D], [B, Hkv, n, D]; float32 or float64, but under autocast."""
    q, k = grouped.flatten(0, 1).flatten(1, 2), key.flatten(0, 1).transpose(1, 2)
    exact = {}
    if q.dtype in (torch.float16, torch.bfloat16):
        if q.is_cuda:
            exact = {"out_dtype": torch.float32}
        else:
            q, k = q.float(), k.float()
    unused = q.new_empty(1, 1, 1, dtype=exact.get("out_dtype"))  # beta = 0: never read
    return torch.baddbmm(unused, q, k, beta=0, alpha=scaling, **exact).view(*grouped.shape[:4], -1)


def _kernels_apply(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the Triton kernels can take these states."""
    return (
        kernels_take(query)
        and key.dtype == value.dtype == query.dtype
        and not (torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)))
    )


def _kernel_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: Step,
    scaling: float,
    group_reduce: str,
    rope: Rope | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One decode step's attention by kernel, and its mass."""
    from h2optimizer.kernels.decode import decode_attention

    mass = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device) if step.scored else None
    lengths = step.attended(key.device)
    first_head = group_reduce == "first"
    return decode_attention(query, key, value, lengths, scaling, mass=mass, rope=rope, first_head=first_head), mass


def kernel_decode_step(
    projected: list[torch.Tensor], rope: Rope, slots: HHLayer, step: Step, scaling: float
) -> torch.Tensor:
    """A whole decode step in `slots` by kernels: rotate, append, attend, add mass where the step is scored.

    Args: projected: query, key and value [B, 1, heads * D], not rotated, or one tensor of all; rope: cosines and sines
    [1 or B, n, D], at the rows' positions (n = 1), or of all slots when rolling. Returns: [B, 1, Hq * D].
    """
    from h2optimizer.kernels import decode

    h2o, stored = slots.h2o, slots.slots
    lengths = step.attended(slots.device) if step.partial else slots.lengths
    # as an operator only where torch.compile looks on: its dispatch costs the host 20 us
    run = decode.decode_step if torch.compiler.is_compiling() else decode.run_decode_step
    return run(
        projected, *rope, *stored.read(), stored.mass if step.scored else None,
        stored.count if step.scored else None, lengths, scaling, float(h2o.score_decay),
        h2o.group_reduce == "first", h2o.position_rolling,
    )  # fmt: skip


def _kernel_mass(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, step: Step, scaling: float, group_reduce: str
) -> torch.Tensor:
    """The mass of several tokens by kernel, from the log-sum-exps of their attention."""
    from h2optimizer.kernels.prefill import attention_mass

    lse = lse.reshape(query.shape[:3]).contiguous()
    return attention_mass(query, key, lse, step.spans(query.device), scaling, group_reduce == "first")


def _cudnn_applies(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether cuDNN's attention is what SDPA chooses for these states, by its versions, the GPU and the user's word."""
    if not query.is_cuda:
        return False
    choice = torch._fused_sdp_choice(
        query, key, value, None, 0.0, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )
    return choice == SDPBackend.CUDNN_ATTENTION.value


def _least_capability() -> int:
    """Major compute capability of the least of the visible GPUs; 0 where they are not NVIDIA's or there is none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return 0
    return min(torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count()))


@functools.cache
def find_flash_attn():
    """flash-attn 3's module, or else 2's. Raises: ValueError, with the way out, when neither can be used."""
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
    """What asks for the log-sum-exp; the first versions of flash-attn 3 always give it."""
    name = "return_attn_probs"
    return {name: True} if name in inspect.signature(flash_attn_func).parameters else {}
