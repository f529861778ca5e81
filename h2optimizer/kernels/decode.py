"""A decode step over the slots: one kernel rotates and appends, the next computes attention and mass in one pass.

The query heads of a KV head are processed together, so keys and values are read once. Normally one program handles a
row's KV head and keeps its logits in registers. If that would leave the device idle, or there are too many slots,
several programs split the slots and write logits and partial sums to memory, and a second kernel combines them (as in
FlashDecoding: Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The launches are graph-safe:
lengths are read on the device, and grids depend on shapes alone.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from h2optimizer.kernels.common import LOG2_E, on_its_device, online_softmax_update, padded, precision

MOST_KEPT = 136  # most logits that a thread can keep in registers beside half-precision tiles without spilling
COMBINED = 2048  # logits that each program of the second kernel turns into mass


@triton.jit
def _rotate_head(head, target, offset, inside, cos, sin, HALF: tl.constexpr):
    """RoPE on one head, rounded where torch rounds: after each product and after the sum."""
    low = tl.load(head + offset, mask=inside, other=0.0)
    high = tl.load(head + HALF + offset, mask=inside, other=0.0)
    dtype = low.dtype
    low_cos, low_sin = (low.to(tl.float32) * cos).to(dtype), (low.to(tl.float32) * sin).to(dtype)
    high_cos, high_sin = (high.to(tl.float32) * cos).to(dtype), (high.to(tl.float32) * sin).to(dtype)
    turned_low = (low_cos.to(tl.float32) - high_sin.to(tl.float32)).to(dtype)
    turned_high = (high_cos.to(tl.float32) + low_sin.to(tl.float32)).to(dtype)
    tl.store(target + offset, turned_low, mask=inside)
    tl.store(target + HALF + offset, turned_high, mask=inside)


@triton.jit
def _append_kernel(query, key, value, cos, sin, rotated, keys, values, lengths, stride_qb, stride_qh, stride_kb,
                   stride_kh, stride_vb, stride_vh, stride_b, stride_h, stride_n, stride_rope, HEADS: tl.constexpr,
                   GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROLLING: tl.constexpr):  # fmt: skip
    """One row's KV head: rotate its query heads, then append its value and its key (rotated unless ROLLING)."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(lengths + b) - 1
    if slot < 0:  # the row brings no token
        return
    offset = tl.arange(0, BD // 2)
    inside = offset < D // 2
    turn = (slot if ROLLING else b) * stride_rope
    c = tl.load(cos + turn + offset, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + turn + offset, mask=inside, other=0.0).to(tl.float32)
    for head in range(h * GROUP, (h + 1) * GROUP):
        at = query + b * stride_qb + head * stride_qh
        _rotate_head(at, rotated + (b * HEADS * GROUP + head) * D, offset, inside, c, s, D // 2)
    key += b * stride_kb + h * stride_kh
    value += b * stride_vb + h * stride_vh
    at_slot = b * stride_b + h.to(tl.int64) * stride_h + slot * stride_n
    whole = tl.arange(0, BD)
    if ROLLING:
        tl.store(keys + at_slot + whole, tl.load(key + whole, mask=whole < D), mask=whole < D)
    else:
        _rotate_head(key, keys + at_slot, offset, inside, c, s, D // 2)
    tl.store(values + at_slot + whole, tl.load(value + whole, mask=whole < D), mask=whole < D)


@triton.jit
def _load_rows(states, stride, slot, end, offset_d, width: tl.constexpr):
    inside = (slot < end)[:, None] & (offset_d < width)[None, :]
    return tl.load(states + slot[:, None] * stride + offset_d[None, :], mask=inside, other=0.0)


@triton.jit
def _rotated_logits(query, inside, key, cos, sin, stride, stride_rope, slot, end, D: tl.constexpr, BH: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """q·k [heads, BN] in float32, with keys rotated here by slot index, both halves of a head at once."""
    half = tl.arange(0, BH)
    low = _load_rows(key, stride, slot, end, half, D // 2)
    high = _load_rows(key + D // 2, stride, slot, end, half, D // 2)
    c = _load_rows(cos, stride_rope, slot, end, half, D // 2).to(tl.float32)
    s = _load_rows(sin, stride_rope, slot, end, half, D // 2).to(tl.float32)
    turned_low = (low.to(tl.float32) * c - high.to(tl.float32) * s).to(low.dtype)
    turned_high = (high.to(tl.float32) * c + low.to(tl.float32) * s).to(low.dtype)
    inside = inside[:, None] & (half < D // 2)[None, :]
    q_low = tl.load(query[:, None] + half[None, :], mask=inside, other=0.0)
    q_high = tl.load(query[:, None] + D // 2 + half[None, :], mask=inside, other=0.0)
    logits = tl.dot(q_low, tl.trans(turned_low), input_precision=PRECISION)
    return tl.dot(q_high, tl.trans(turned_high), logits, input_precision=PRECISION)


@triton.jit
def _add_received(mass, count, received, slot, length, decay, COUNT: tl.constexpr):
    """In place: mass = mass * decay + received, and count = count * decay + 1 for the query that sees the slot."""
    filled = slot < length
    old = tl.load(mass + slot, mask=filled, other=0.0)
    tl.store(mass + slot, old * decay + received, mask=filled)
    if COUNT:
        old = tl.load(count + slot, mask=filled, other=0.0)
        tl.store(count + slot, old * decay + 1.0, mask=filled)


@triton.jit
def _add_kept(mass, count, logits, lse, first_slot, offset_n, length, decay, COUNTED: tl.constexpr,
              COUNT: tl.constexpr, TILES: tl.constexpr, G: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Add the mass of logits kept in registers, [TILES, G, BN], given the heads' log-sum-exps [G]."""
    p = tl.exp2(logits - lse[None, :, None])
    p = tl.where((tl.arange(0, G) < COUNTED)[None, :, None], p, 0.0)
    slot = first_slot + tl.arange(0, TILES)[:, None] * BN + offset_n[None, :]
    _add_received(mass, count, tl.sum(p, 1), slot, length, decay, COUNT)


@triton.jit
def _decode_kernel(query, key, value, lengths, cos, sin, output, mass, count, logits, sums, partial, stride_qb,
                   stride_qh, stride_b, stride_h, stride_n, stride_rope, slots, scale_log2, decay,
                   HEADS: tl.constexpr, GROUP: tl.constexpr, COUNTED: tl.constexpr, D: tl.constexpr,
                   BD: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
                   TILES: tl.constexpr, MORE_TILES: tl.constexpr, MASS: tl.constexpr, COUNT: tl.constexpr,
                   ROPE: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One row's KV head, or one of SPLIT shares of its slots."""
    if OVERLAP:
        gdc_launch_dependents()  # the next kernel may start now and wait in gdc_wait
    head, share = tl.program_id(0), tl.program_id(1)
    b, h = head // HEADS, head % HEADS
    length = tl.load(lengths + b)
    per_share = tl.cdiv(tl.cdiv(length, SPLIT), BN) * BN
    begin = share * per_share
    end = tl.minimum(length, begin + per_share)

    offset_g, offset_d, offset_n = tl.arange(0, GP), tl.arange(0, BD), tl.arange(0, BN)
    real = offset_g < GROUP
    query += b.to(tl.int64) * stride_qb + (h * GROUP + offset_g) * stride_qh
    q = tl.load(query[:, None] + offset_d[None, :], mask=real[:, None] & (offset_d < D)[None, :], other=0.0)
    key += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    value += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    mass += head.to(tl.int64) * slots
    count += head.to(tl.int64) * slots
    at_logits = logits + (head * GROUP + offset_g).to(tl.int64)[:, None] * slots

    top = tl.full([GP], -float("inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, BD], tl.float32)
    if TILES > 0:
        kept = tl.full([TILES, G, BN], -float("inf"), tl.float32)
    if MORE_TILES > 0:
        more = tl.full([MORE_TILES, G, BN], -float("inf"), tl.float32)
    for i in range(begin, end, BN):
        slot = i + offset_n
        if ROPE:
            s = _rotated_logits(query, real, key, cos, sin, stride_n, stride_rope, slot, end, D, BD // 2, PRECISION)
        else:
            s = tl.dot(q, tl.trans(_load_rows(key, stride_n, slot, end, offset_d, D)), input_precision=PRECISION)
        s = tl.where((slot < end)[None, :], s * scale_log2, -float("inf"))
        v = _load_rows(value, stride_n, slot, end, offset_d, D)
        top, total, acc = online_softmax_update(s, v, top, total, acc, PRECISION)
        if TILES > 0:
            tile = i // BN
            s = tl.sum(tl.reshape(tl.where(real[:, None], s, 0.0), [GP // G, G, BN]), 0)  # padding heads are zero
            kept = tl.where((tl.arange(0, TILES) == tile)[:, None, None], s[None, :, :], kept)
            if MORE_TILES > 0:
                more = tl.where((tl.arange(0, MORE_TILES) + TILES == tile)[:, None, None], s[None, :, :], more)
        elif MASS:
            tl.store(at_logits + slot[None, :], s, mask=real[:, None] & (slot < end)[None, :])

    if SPLIT == 1 and (TILES > 0 or not MASS):
        inside = real[:, None] & (offset_d < D)[None, :]
        at_output = output + (head * GROUP + offset_g)[:, None] * D + offset_d[None, :]
        divisor = tl.where(total == 0.0, 1.0, total)  # a row without a token sees nothing: zero, not NaN
        tl.store(at_output, (acc / divisor[:, None]).to(output.dtype.element_ty), mask=inside)
        if TILES > 0:
            lse = tl.sum(tl.reshape(tl.where(real, top + tl.log2(total), 0.0), [GP // G, G]), 0)
            _add_kept(mass, count, kept, lse, 0, offset_n, length, decay, COUNTED, COUNT, TILES, G, BN)
            if MORE_TILES > 0:
                _add_kept(
                    mass, count, more, lse, TILES * BN, offset_n, length, decay, COUNTED, COUNT, MORE_TILES, G, BN
                )
    else:
        part = (head * SPLIT + share) * GROUP + offset_g
        tl.store(sums + part * 2, top, mask=real)
        tl.store(sums + part * 2 + 1, total, mask=real)
        tl.store(partial + part[:, None] * BD + offset_d[None, :], acc, mask=real[:, None])


@triton.jit
def _combine_kernel(lengths, output, mass, count, logits, sums, partial, slots, decay, HEADS: tl.constexpr,
                    GROUP: tl.constexpr, COUNTED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr,
                    SPLIT: tl.constexpr, BR: tl.constexpr, COUNT: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Per KV head, the first GROUP programs combine one query head's output each, the others the mass of BR slots."""
    head, block = tl.program_id(0), tl.program_id(1)
    share = tl.arange(0, SPLIT)
    if OVERLAP:
        gdc_wait()  # until everything the first kernel writes is visible
    if block < GROUP:
        part = (head * SPLIT + share) * GROUP + block
        top, total = tl.load(sums + part * 2), tl.load(sums + part * 2 + 1)
        weight = tl.where(total > 0.0, tl.exp2(top - tl.max(top, 0)), 0.0)
        offset_d = tl.arange(0, BD)
        acc = tl.load(partial + part[:, None] * BD + offset_d[None, :])
        divisor = tl.sum(total * weight, 0)
        acc = tl.sum(acc * weight[:, None], 0) / tl.where(divisor == 0.0, 1.0, divisor)
        tl.store(output + (head * GROUP + block) * D + offset_d, acc.to(output.dtype.element_ty), mask=offset_d < D)
    else:
        length = tl.load(lengths + head // HEADS)
        offset_g = tl.arange(0, G)
        real = (offset_g < COUNTED)[:, None]
        slot = (block - GROUP) * BR + tl.arange(0, BR)
        at = logits + (head * GROUP + offset_g).to(tl.int64)[:, None] * slots + slot[None, :]
        s = tl.load(at, mask=real & (slot < length)[None, :], other=-float("inf"))
        parts = (head * SPLIT + share[None, :]) * GROUP + offset_g[:, None]
        tops = tl.load(sums + parts * 2, mask=real, other=0.0)
        totals = tl.load(sums + parts * 2 + 1, mask=real, other=1.0)
        highest = tl.max(tops, 1)
        lse = highest + tl.log2(tl.sum(totals * tl.exp2(tops - highest[:, None]), 1))
        received = tl.sum(tl.where(real, tl.exp2(s - lse[:, None]), 0.0), 0)
        row = head.to(tl.int64) * slots
        _add_received(mass + row, count + row, received, slot, length, decay, COUNT)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether the second kernel can launch while the first one runs (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@on_its_device
def append(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    rolling: bool,
) -> torch.Tensor:
    """Rotate a decode step's queries and keys in the arithmetic of apply_rotary_pos_emb, and append to the slots.

    Args:
        query, key, value: [B, Hq or Hkv, 1, D], unrotated; D contiguous and even.
        cos, sin: [1 or B, D] at the rows' positions, the same in both halves of D; with `rolling` [slots, D] by slot.
        keys, values: [B, Hkv, slots, D], same dtype and strides; slot lengths[b] - 1 of row b is written.
        lengths: int32 [B], including the new slot; 0 for a row with no token to append.
        rolling: append the keys unrotated, and rotate the queries by their slot.

    Returns: the queries, rotated, [B, Hq, 1, D].
    """
    batch, q_heads, _, dim = query.shape
    heads = keys.shape[1]
    rotated = query.new_empty(batch, q_heads, 1, dim)
    stride_rope = cos.stride(0) if len(cos) > 1 else 0
    assert keys.stride() == values.stride() and cos.stride() == sin.stride()
    assert all(states.stride(-1) == 1 for states in (query, key, value, keys, cos))
    _append_kernel[batch, heads](
        query, key, value, cos, sin, rotated, keys, values, lengths, *query.stride()[:2], *key.stride()[:2],
        *value.stride()[:2], *keys.stride()[:3], stride_rope, HEADS=heads, GROUP=q_heads // heads, D=dim,
        BD=2 * triton.next_power_of_2(dim // 2), ROLLING=rolling, num_warps=1 if dim <= 128 else 2,
        enable_fp_fusion=False,  # a fused multiply-add would round once where torch rounds twice
    )  # fmt: skip
    return rotated


@on_its_device
def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    *,
    mass: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    decay: float = 1.0,
    first_head: bool = False,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Softmax attention of one query per row over the row's slots; adds to the slots' mass in place.

    Args:
        query: [B, Hq, 1, D], float32, float16 or bfloat16, rotated; D at most 256.
        keys, values: [B, Hkv, slots, D], same dtype and strides, D contiguous; nothing past a row's length is used.
        lengths: int32 [B], filled slots of each row including the query's own; 0 for a row without a query, whose mass
            is unchanged and whose output is zero.
        scaling: of q·k.
        mass: float32 [B, Hkv, slots], contiguous: mass = mass * decay + probability, summed over a group's query heads.
        count: shaped like mass: count = count * decay + 1.
        first_head: take mass from the first query head of each group only.
        rope: cos and sin [longest row or more, D] by slot index, the same in both halves of D, to rotate the keys.

    Returns: [B, Hq, 1, D]. If two kernels are needed, the buffers between them are allocated in each call.
    """
    batch, q_heads, _, dim = query.shape
    heads, slots = keys.shape[1:3]
    group = q_heads // heads
    width = padded(dim) if rope is None else 2 * padded(dim // 2)
    group_width, programs = triton.next_power_of_2(group), batch * heads
    split = min(triton.next_power_of_2(triton.cdiv(_processors(query.device), programs)), 64)
    split = min(split, triton.next_power_of_2(triton.cdiv(slots, 64) + 1) // 2)
    of_a_thread = triton.cdiv(slots * group_width, 32 * 4)  # logits per thread with four warps
    keeping = split == 1 and mass is not None and of_a_thread <= MOST_KEPT and query.element_size() == 2
    alone = split == 1 and (mass is None or keeping)
    small = keeping and 2 * of_a_thread <= MOST_KEPT  # two warps suffice, so more programs run at once
    tile = 32 if small or rope is not None else 64  # tiles of cosines and sines take shared memory too
    tile = max(16, min(tile, 16384 // (width * query.element_size())))
    tiles = triton.cdiv(slots, tile)
    kept = triton.next_power_of_2(tiles + 1) // 2 if keeping else 0
    more = triton.next_power_of_2(tiles - kept) if keeping and tiles > kept else 0
    overlap = not alone and _overlaps(query.device)
    assert keys.stride() == values.stride() and keys.stride(3) == 1 and query.stride(3) == 1

    output = query.new_empty(batch, q_heads, 1, dim)
    logits = sums = partial = output  # unused unless replaced below
    if not alone:
        parts = (batch, heads, split, group)
        sums = torch.empty(*parts, 2, dtype=torch.float32, device=query.device)
        partial = torch.empty(*parts, width, dtype=torch.float32, device=query.device)
        if mass is not None:
            logits = torch.empty(batch, q_heads, slots, dtype=torch.float32, device=query.device)
    added = (output if mass is None else mass, output if count is None else count)
    cos, sin = (output, output) if rope is None else rope
    shape = dict(HEADS=heads, GROUP=group, COUNTED=1 if first_head else group, D=dim, BD=width,
                 G=group_width, SPLIT=split, COUNT=count is not None)  # fmt: skip
    _decode_kernel[programs, split](
        query, keys, values, lengths, cos, sin, output, *added, logits, sums, partial, query.stride(0), query.stride(1),
        *keys.stride()[:3], cos.stride(0), slots, scaling * LOG2_E.value, float(decay),
        **shape, GP=max(16, group_width), BN=tile, TILES=kept, MORE_TILES=more, MASS=mass is not None,
        ROPE=rope is not None, PRECISION=precision(query.dtype),
        OVERLAP=overlap, num_warps=2 if small else 4, num_stages=3,
    )  # fmt: skip
    if not alone:
        block = max(16, COMBINED // group_width)
        blocks = group + (triton.cdiv(slots, block) if mass is not None else 0)
        _combine_kernel[programs, blocks](
            lengths, output, *added, logits, sums, partial, slots, float(decay), **shape, BR=block, OVERLAP=overlap,
            num_warps=4, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return output


def run_decode_step(
    projected: list[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mass: torch.Tensor | None,
    count: torch.Tensor | None,
    lengths: torch.Tensor,
    scaling: float,
    decay: float,
    first_head: bool,
    rolling: bool,
) -> torch.Tensor:
    """`append`, then `decode_attention`, on the outputs of the projections.

    Args:
        projected: query, key and value [B, 1, heads * D], or one merged [B, 1, all heads * D].
        cos, sin: [1 or B, 1, D] at the rows' positions, or [1, slots, D] when rolling.
        mass, count: updated in place if given.
        The others are as in these two functions.

    Returns: [B, 1, Hq * D].
    """
    batch, heads, _, dim = keys.shape
    if len(projected) == 1:
        size = heads * dim
        projected = projected[0].split([projected[0].shape[-1] - 2 * size, size, size], dim=-1)
    query, key, value = (states.view(batch, 1, -1, dim).transpose(1, 2) for states in projected)
    cos, sin = (table[0] if rolling else table[:, 0] for table in (cos, sin))
    rotated = append(query, key, value, cos, sin, keys, values, lengths, rolling)
    added = {} if mass is None else dict(mass=mass, count=count, decay=decay)
    rope = (cos, sin) if rolling else None
    output = decode_attention(rotated, keys, values, lengths, scaling, rope=rope, first_head=first_head, **added)
    return output.view(batch, 1, -1)


# The same as a custom operator, which torch.compile does not look into.
decode_step = torch.library.custom_op(
    "h2optimizer::decode_step", run_decode_step, mutates_args=("keys", "values", "mass", "count")
)


@decode_step.register_fake
def _(projected, cos, sin, keys, *args):
    size = projected[0].shape[-1]
    return projected[0].new_empty(len(keys), 1, size if len(projected) > 1 else size - 2 * keys[0, :, 0].numel())
