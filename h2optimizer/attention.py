"""Attention that also reports probability mass: what each slot received from this forward's queries.

Both backends take query [B, Hq, columns, D], key and value [B, Hkv, width, D] as `HHCache.update` returns them, and the
`Step` that says which slots each query sees. They return the output [B, Hq, columns, D] and, on scored steps, the mass
[B, Hkv, width] float32 (else None): column sums of softmax(QK^T * scaling) over queries and a group's query heads.
"""

import torch
import torch.nn.functional as F

from utils.cache import Step

BLOCK_BYTES = 512 * 2**20  # float32 logits that the sdpa backend holds at once on a GPU, a 16th of it on a CPU


def eager_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, scaling: float, group_reduce: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reference: the whole attention matrix at once."""
    return blocked_attention(query, key, value, step, scaling, group_reduce, block=step.columns)


def sdpa_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step, scaling: float, group_reduce: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Torch's fused attention; mass in blocks of queries, in memory linear in the prompt.

    SDPA runs where it needs no mask, which would expand the KV heads and miss its flash kernel: prefill (tokens stand
    before padding, so causal is enough) and decode steps of rows of one length. Decode steps that want mass, or rows of
    different lengths, and later forwards of several tokens take output and mass from the same blocks.
    """
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


ATTENTION_BACKENDS = {"eager": eager_attention, "sdpa": sdpa_attention}


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
