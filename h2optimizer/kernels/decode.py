"""A decode step over the slots: one kernel rotates and appends, the next computes attention and mass in one pass.

The query heads of a KV head are processed together, so keys and values are read once. Normally one program handles a
row's KV head and keeps its logits in registers. If that would leave the device idle, or there are too many slots,
several programs split the slots and write logits and partial sums to memory, and a second kernel combines them (as in
FlashDecoding: Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The launches are graph-safe:
lengths are read on the device, and grids depend on shapes alone.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from h2optimizer.kernels.common import (
    LOG2_E,
    on_its_device,
    overlaps,
    padded,
    precision,
    rotated_halves,
)

MOST_KEPT = 136  # most logits that a thread can keep in registers beside half-precision tiles without spilling
COMBINED = 2048  # logits that each program of the second kernel turns into mass


@triton.jit
def _load_halves(head, offset, inside, HALF: tl.constexpr):
    low = tl.load(head + offset, mask=inside, other=0.0)
    return low, tl.load(head + HALF + offset, mask=inside, other=0.0)


@triton.jit
def _store_halves(head, low, high, offset, inside, HALF: tl.constexpr):
    tl.store(head + offset, low, mask=inside)
    tl.store(head + HALF + offset, high, mask=inside)


@triton.jit
def _append_halves(slots, scales, at, slot, low, high, offset, inside, HALF: tl.constexpr, INT8: tl.constexpr):
    """Store a key or value in its slot; as int8, with its scale, as `utils.int8_slots.quantize` does."""
    if INT8:
        low, high = low.to(tl.float32), high.to(tl.float32)
        scale = tl.div_rn(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 0), 127.0)
        scale += 0.0 * tl.sum(low + high, 0)  # a maximum passes over NaN
        tl.store(scales + slot, scale)
        divisor = tl.where(scale == 0.0, 1.0, scale)
        low, high = _as_int8(tl.div_rn(low, divisor)), _as_int8(tl.div_rn(high, divisor))
    _store_halves(slots + at, low, high, offset, inside, HALF)


@triton.jit
def _rounded(number):
    """The nearest whole number, of ties the even one: a sum this large has no bits for a fraction."""
    return (number + 12582912.0) - 12582912.0  # 1.5 * 2**23


@triton.jit
def _as_int8(number):
    return tl.minimum(tl.maximum(_rounded(number), -127.0), 127.0).to(tl.int8)


@triton.jit
def _find_head(lengths, offsets, b, h, stride_lb, stride_lh, stride_b, stride_h, stride_n, slots, HEADS: tl.constexpr,
               RAGGED: tl.constexpr):  # fmt: skip
    """A row's KV head: its length, where its keys and values begin, and the index of its first slot."""
    length = tl.load(lengths + b * stride_lb + h * stride_lh)
    b, h = b.to(tl.int64), h.to(tl.int64)
    if RAGGED:
        first = tl.load(offsets + h)
        at = b * stride_b + first.to(tl.int64) * stride_n
        first = b * slots + first
    else:
        at = b * stride_b + h * stride_h
        first = (b * HEADS + h) * slots
    return length, at, first


@triton.jit
def _append_kernel(query, key, value, cos, sin, rotated, keys, values, key_scales, value_scales, norms, lengths,
                   offsets, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_lb, stride_lh,
                   stride_b, stride_h, stride_n, stride_rope, slots, HEADS: tl.constexpr, GROUP: tl.constexpr,
                   D: tl.constexpr, BD: tl.constexpr, ROLLING: tl.constexpr, NORMS: tl.constexpr, RAGGED: tl.constexpr,
                   ROTATES: tl.constexpr, INT8: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One row's KV head: its query heads are rotated, its key (rotated, but for ROLLING) and value appended."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length, at, first = _find_head(lengths, offsets, b, h, stride_lb, stride_lh, stride_b, stride_h, stride_n, slots,
                                   HEADS, RAGGED)  # fmt: skip
    slot = length - 1
    if slot < 0:  # a row without a token of its own
        return
    offset = tl.arange(0, BD // 2)
    inside = offset < D // 2
    if ROTATES:
        turn = (slot if ROLLING else b) * stride_rope
        c = tl.load(cos + turn + offset, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + turn + offset, mask=inside, other=0.0).to(tl.float32)
    else:
        c, s = tl.full([BD // 2], 1.0, tl.float32), tl.zeros([BD // 2], tl.float32)
    for head in range(h * GROUP, (h + 1) * GROUP):
        low, high = _load_halves(query + b * stride_qb + head * stride_qh, offset, inside, D // 2)
        low, high = rotated_halves(low, high, c, s)
        _store_halves(rotated + (b * HEADS * GROUP + head) * D, low, high, offset, inside, D // 2)
    at += slot * stride_n
    first += slot
    low, high = _load_halves(key + b * stride_kb + h * stride_kh, offset, inside, D // 2)
    if not ROLLING:
        low, high = rotated_halves(low, high, c, s)
    _append_halves(keys, key_scales, at, first, low, high, offset, inside, D // 2, INT8)
    low, high = _load_halves(value + b * stride_vb + h * stride_vh, offset, inside, D // 2)
    _append_halves(values, value_scales, at, first, low, high, offset, inside, D // 2, INT8)
    if NORMS:
        low, high = low.to(tl.float32), high.to(tl.float32)
        tl.store(norms + first, tl.sqrt(tl.sum(low * low + high * high)))


@triton.jit
def _load_rows(states, stride, slot, end, offset_d, width: tl.constexpr):
    inside = (slot < end)[:, None] & (offset_d < width)[None, :]
    return tl.load(states + slot[:, None] * stride + offset_d[None, :], mask=inside, other=0.0)


@triton.jit
def _pairs(words, dtype: tl.constexpr, PACKED: tl.constexpr):
    """The low and high bytes of int16 [BN, n], two int8 each, as tiles of their own.

    A tile of words reaches the tensor cores like one of half precision; no instruction transposes bytes.
    """
    if PACKED:  # two words a register, to float16: 1024 + the byte with its sign bit exchanged, minus 1024 + 128
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 number, minus;
            mov.b32 minus, 0xe480e480;
            lop3.b32 number, $2, 0x00ff00ff, 0x64806480, 0x6a;
            add.rn.f16x2 $0, number, minus;
            shr.u32 number, $2, 8;
            lop3.b32 number, number, 0x00ff00ff, 0x64806480, 0x6a;
            add.rn.f16x2 $1, number, minus;
            }
            """,
            "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return ((words << 8) >> 8).to(dtype), (words >> 8).to(dtype)


@triton.jit
def _in_two_bytes(query, parts, inside):
    """Queries [D, columns] as int8, and the steps [columns]: query = (256 * high + low) * step, in 16 bits.

    `parts` [columns] is 0 where a column holds the high bytes, 1 where it holds the low ones.
    """
    q = tl.load(query, mask=inside, other=0.0).to(tl.float32)
    step = tl.max(tl.abs(q), 0) / 32512.0  # 127 * 256
    step += 0.0 * tl.sum(q, 0)  # a maximum passes over NaN
    q = _rounded(q / tl.where(step == 0.0, 1.0, step)[None, :])
    high = tl.floor((q + 128.0) / 256.0)
    return tl.where((parts == 0)[None, :], high, q - 256.0 * high).to(tl.int8), step


@triton.jit
def _power_of_two(scale):
    """scale = mantissa * 2**power, both float32, with a mantissa in [1, 2). Scales below 2**-64 are taken for that."""
    scale = tl.where(scale < 5.421010862427522e-20, 5.421010862427522e-20, scale)
    power = (scale.to(tl.int32, bitcast=True) >> 23) - 127
    return scale * ((127 - power) << 23).to(tl.float32, bitcast=True), power.to(tl.float32)


@triton.jit
def _one_of_each(repeated, N: tl.constexpr, G: tl.constexpr, REPEATS: tl.constexpr):
    """[N, G * REPEATS], whose neighbouring columns are alike, -> [N, G]."""
    if REPEATS == 1:
        return repeated
    return tl.max(tl.reshape(repeated, [N, G, REPEATS]), 2)


@triton.jit
def _repeated(heads, N: tl.constexpr, G: tl.constexpr, REPEATS: tl.constexpr):
    """[N, G] -> [N, G * REPEATS]."""
    return tl.reshape(tl.broadcast_to(heads[:, :, None], [N, G, REPEATS]), [N, G * REPEATS])


@triton.jit
def _weights(logits, top):
    """Exponentials of logits [BN, G] relative to the greatest so far, this, and the factor by which older ones shrink.

    A step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867).
    """
    higher = tl.maximum(top, tl.max(logits, 0))
    return tl.exp2(logits - higher[None, :]), higher, tl.exp2(top - higher)


@triton.jit
def _rotated_logits(query, inside, key, cos, sin, stride, stride_rope, slot, end, D: tl.constexpr, BH: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """q·k [BN, heads] in float32, with keys rotated here by slot index, both halves of a head at once.

    Keys in 8 bits are rotated without their scales.
    """
    half = tl.arange(0, BH)
    low = _load_rows(key, stride, slot, end, half, D // 2)
    high = _load_rows(key + D // 2, stride, slot, end, half, D // 2)
    c = _load_rows(cos, stride_rope, slot, end, half, D // 2).to(tl.float32)
    s = _load_rows(sin, stride_rope, slot, end, half, D // 2).to(tl.float32)
    dtype = query.dtype.element_ty
    turned_low = (low.to(tl.float32) * c - high.to(tl.float32) * s).to(dtype)
    turned_high = (high.to(tl.float32) * c + low.to(tl.float32) * s).to(dtype)
    inside = inside[None, :] & (half < D // 2)[:, None]
    q_low = tl.load(query[None, :] + half[:, None], mask=inside, other=0.0)
    q_high = tl.load(query[None, :] + D // 2 + half[:, None], mask=inside, other=0.0)
    logits = tl.dot(turned_low, q_low, input_precision=PRECISION)
    return tl.dot(turned_high, q_high, logits, input_precision=PRECISION)


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
    """Add the mass of logits kept in registers, [TILES, BN, G], given the heads' log-sum-exps [G]."""
    p = tl.exp2(logits - lse[None, None, :])
    p = tl.where((tl.arange(0, G) < COUNTED)[None, None, :], p, 0.0)
    slot = first_slot + tl.arange(0, TILES)[:, None] * BN + offset_n[None, :]
    _add_received(mass, count, tl.sum(p, 2), slot, length, decay, COUNT)


@triton.jit
def _decode_kernel(query, key, value, key_scales, value_scales, lengths, cos, sin, output, mass, count, logits, sums,
                   partial, offsets, shares, stride_qb, stride_qh, stride_lb, stride_lh, stride_b, stride_h, stride_n,
                   stride_rope, batch, slots, scale_log2, decay, HEADS: tl.constexpr, GROUP: tl.constexpr,
                   COUNTED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
                   BN: tl.constexpr, SPLIT: tl.constexpr, TILES: tl.constexpr, MORE_TILES: tl.constexpr,
                   MASS: tl.constexpr, COUNT: tl.constexpr, ROPE: tl.constexpr, RAGGED: tl.constexpr,
                   INT8: tl.constexpr, BYTES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
                   OVERLAP: tl.constexpr):  # fmt: skip
    """One row's KV head, or one of SPLIT shares of its slots; with RAGGED the share that a line of `shares` names.

    Logits have slots for rows and query heads for columns. Tensor cores take eight columns, so heads are repeated.

    With INT8, keys come as int8, and values as int16, two numbers each, with strides to match these. With BYTES too,
    logits are products of whole numbers.
    """
    if OVERLAP:
        gdc_launch_dependents()  # the next kernel may take its place and wait there
        gdc_wait()
    if RAGGED:
        line, b = tl.program_id(0) // batch, tl.program_id(0) % batch
        h, share = tl.load(shares + line * 3), tl.load(shares + line * 3 + 1)
        split = tl.load(shares + line * 3 + 2)
        part = b * (tl.num_programs(0) // batch) + line
    else:
        head, share, split = tl.program_id(0), tl.program_id(1), SPLIT
        b, h = head // HEADS, head % HEADS
        part = head * SPLIT + share
    length, at, first = _find_head(lengths, offsets, b, h, stride_lb, stride_lh, stride_b, stride_h, stride_n, slots,
                                   HEADS, RAGGED)  # fmt: skip
    if RAGGED:
        slots = tl.load(offsets + h + 1) - tl.load(offsets + h)
    per_share = tl.cdiv(tl.cdiv(length, split), BN) * BN
    begin = share * per_share
    end = tl.minimum(length, begin + per_share)

    WORD: tl.constexpr = 2 if INT8 else 1  # numbers of an element of values
    REPEATS: tl.constexpr = GP // G  # columns of a head
    offset_c, offset_d, offset_n = tl.arange(0, GP), tl.arange(0, BD), tl.arange(0, BN)
    offset_w, offset_g = tl.arange(0, BD // WORD), tl.arange(0, G)
    own, real = offset_c // REPEATS, offset_g < GROUP
    query += b.to(tl.int64) * stride_qb + h * GROUP * stride_qh
    if BYTES:  # pairs of columns hold the high and low bytes of a head's query
        PAIRS: tl.constexpr = GP // 2 if GP // 2 > G else G
        column = tl.arange(0, 2 * PAIRS)
        pair = column // 2 // (PAIRS // G)
        inside = (pair < GROUP)[None, :] & (offset_d < D)[:, None]
        q, step = _in_two_bytes(query + (pair * stride_qh)[None, :] + offset_d[:, None], column % 2, inside)
        step = tl.max(tl.reshape(step, [G, 2 * (PAIRS // G)]), 1)
    else:
        inside = (own < GROUP)[None, :] & (offset_d < D)[:, None]
        q = tl.load(query + (own * stride_qh)[None, :] + offset_d[:, None], mask=inside, other=0.0)
    value += at
    if INT8:
        key += 2 * at
        stride_key = 2 * stride_n
        key_scales += first
        value_scales += first
    else:
        key += at
        stride_key = stride_n
    mass += first
    count += first
    at_logits = logits + (first * GROUP + offset_g.to(tl.int64) * slots)[None, :]

    top = tl.full([G], -float("inf"), tl.float32)
    totals = tl.zeros([BN, G], tl.float32)  # summed over the slots of a tile at the end
    acc = tl.zeros([BD // WORD, GP], tl.float32)
    if INT8:
        acc_odd = acc
    if TILES > 0:
        kept = tl.full([TILES, BN, G], -float("inf"), tl.float32)
    if MORE_TILES > 0:
        more = tl.full([MORE_TILES, BN, G], -float("inf"), tl.float32)
    for i in range(begin, end, BN):
        slot = i + offset_n
        if BYTES:
            s = tl.dot(_load_rows(key, stride_key, slot, end, offset_d, D), q)
            high, low = tl.split(tl.reshape(s, [BN, PAIRS, 2]))
            s = _one_of_each((256 * high + low).to(tl.float32), BN, G, PAIRS // G) * step[None, :]
        elif ROPE:
            s = _rotated_logits(query + own * stride_qh, own < GROUP, key, cos, sin, stride_key, stride_rope, slot, end,
                                D, BD // 2, PRECISION)  # fmt: skip
            s = _one_of_each(s, BN, G, REPEATS)
        else:
            k = _load_rows(key, stride_key, slot, end, offset_d, D).to(q.dtype)
            s = _one_of_each(tl.dot(k, q, input_precision=PRECISION), BN, G, REPEATS)
        if INT8:
            s *= (tl.load(key_scales + slot, mask=slot < end, other=0.0) * scale_log2)[:, None]
        else:
            s *= scale_log2
        s = tl.where((slot < end)[:, None], s, -float("inf"))
        seen = (slot < end)[None, :] & (offset_w < D // WORD)[:, None]
        v = tl.load(value + slot[None, :] * stride_n + offset_w[:, None], mask=seen, other=0)
        if INT8:  # probabilities times the values' scales: relative to the greatest product, or float16 has no room
            mantissa, power = _power_of_two(tl.load(value_scales + slot, mask=slot < end, other=0.0))
            p, top, shrink = _weights(s + power[:, None], top)
            totals = totals * shrink[None, :] + tl.exp2(s - top[None, :])
            p *= mantissa[:, None]
        else:
            p, top, shrink = _weights(s, top)
            totals = totals * shrink[None, :] + p
        p, shrink = _repeated(p, BN, G, REPEATS), _repeated(shrink[None, :], 1, G, REPEATS)
        if INT8:
            even, odd = _pairs(v, tl.float16 if PACKED else query.dtype.element_ty, PACKED)
            p = p.to(even.dtype)
            acc = tl.dot(even, p, acc * shrink, input_precision=PRECISION)
            acc_odd = tl.dot(odd, p, acc_odd * shrink, input_precision=PRECISION)
        else:
            acc = tl.dot(v, p.to(v.dtype), acc * shrink, input_precision=PRECISION)
        if MASS and (RAGGED or TILES == 0):
            shown = real[None, :] & (slot < end)[:, None]
            if TILES > 0:
                shown = shown & (split > 1)
            tl.store(at_logits + slot[:, None], s, mask=shown)
        if TILES > 0:
            tile = i // BN
            kept = tl.where((tl.arange(0, TILES) == tile)[:, None, None], s[None, :, :], kept)
            if MORE_TILES > 0:
                more = tl.where((tl.arange(0, MORE_TILES) + TILES == tile)[:, None, None], s[None, :, :], more)

    total = tl.sum(totals, 0)
    inside = ((offset_c % REPEATS == 0) & (own < GROUP))[None, :] & (WORD * offset_w < D)[:, None]
    finishes: tl.constexpr = TILES > 0 or not MASS  # a program that has a head to itself
    if RAGGED and finishes:
        alone = split == 1
    else:
        alone = SPLIT == 1 and finishes
    if alone:
        at_output = output + ((b * HEADS + h) * GROUP + own)[None, :] * D + WORD * offset_w[:, None]
        divisor = tl.where(total == 0.0, 1.0, total)  # a row without a token sees nothing: zero, not NaN
        divisor = _repeated(divisor[None, :], 1, G, REPEATS)
        if INT8:
            tl.store(at_output + 1, (acc_odd / divisor).to(output.dtype.element_ty), mask=inside)
        tl.store(at_output, (acc / divisor).to(output.dtype.element_ty), mask=inside)
        if TILES > 0:
            lse = tl.where(real, top + tl.log2(total), 0.0)
            _add_kept(mass, count, kept, lse, 0, offset_n, length, decay, COUNTED, COUNT, TILES, G, BN)
            if MORE_TILES > 0:
                _add_kept(
                    mass, count, more, lse, TILES * BN, offset_n, length, decay, COUNTED, COUNT, MORE_TILES, G, BN
                )
    else:
        of_group = part * GROUP + offset_g
        tl.store(sums + of_group * 2, top, mask=real)
        tl.store(sums + of_group * 2 + 1, total, mask=real)
        at_partial = partial + (part * GROUP + own)[None, :] * BD + WORD * offset_w[:, None]
        if INT8:
            tl.store(at_partial + 1, acc_odd, mask=inside)
        tl.store(at_partial, acc, mask=inside)


@triton.jit
def _combine_kernel(lengths, output, mass, count, logits, sums, partial, offsets, blocks, stride_lb, stride_lh, batch,
                    lines, slots, decay, HEADS: tl.constexpr, GROUP: tl.constexpr, COUNTED: tl.constexpr,
                    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, SPLIT: tl.constexpr, BR: tl.constexpr,
                    COUNT: tl.constexpr, RAGGED: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """The first GROUP programs of a KV head combine one query head's output each, the others BR slots' mass each.

    With RAGGED a line of `blocks` says which: head, block, first of its shares, and how many these are.
    """
    share = tl.arange(0, SPLIT)
    if RAGGED:
        line, b = tl.program_id(0) // batch, tl.program_id(0) % batch
        h, block = tl.load(blocks + line * 4), tl.load(blocks + line * 4 + 1)
        split = tl.load(blocks + line * 4 + 3)
        share += b * lines + tl.load(blocks + line * 4 + 2)
        there = tl.arange(0, SPLIT) < split
    else:
        head, block = tl.program_id(0), tl.program_id(1)
        b, h = head // HEADS, head % HEADS
        share += head * SPLIT
        there = share >= 0
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()  # for all that the other kernel writes
    if block < GROUP:
        part = share * GROUP + block
        top = tl.load(sums + part * 2, mask=there, other=-float("inf"))
        total = tl.load(sums + part * 2 + 1, mask=there, other=0.0)
        weight = tl.where(total > 0.0, tl.exp2(top - tl.max(top, 0)), 0.0)
        offset_d = tl.arange(0, BD)
        acc = tl.load(partial + part[:, None] * BD + offset_d[None, :], mask=there[:, None], other=0.0)
        divisor = tl.sum(total * weight, 0)
        acc = tl.sum(acc * weight[:, None], 0) / tl.where(divisor == 0.0, 1.0, divisor)
        at_output = output + ((b * HEADS + h) * GROUP + block) * D + offset_d
        tl.store(at_output, acc.to(output.dtype.element_ty), mask=offset_d < D)
    else:
        length, _, first = _find_head(lengths, offsets, b, h, stride_lb, stride_lh, 0, 0, 0, slots, HEADS, RAGGED)
        if RAGGED:
            slots = tl.load(offsets + h + 1) - tl.load(offsets + h)
        offset_g = tl.arange(0, G)
        real = (offset_g < COUNTED)[:, None]
        slot = (block - GROUP) * BR + tl.arange(0, BR)
        at = logits + (first * GROUP + offset_g.to(tl.int64) * slots)[:, None] + slot[None, :]
        s = tl.load(at, mask=real & (slot < length)[None, :], other=-float("inf"))
        parts = share[None, :] * GROUP + offset_g[:, None]
        tops = tl.load(sums + parts * 2, mask=real & there[None, :], other=-float("inf"))
        totals = tl.load(sums + parts * 2 + 1, mask=real & there[None, :], other=0.0)
        highest = tl.max(tops, 1)
        weights = tl.where(totals > 0.0, tl.exp2(tops - highest[:, None]), 0.0)
        lse = highest + tl.log2(tl.sum(totals * weights, 1))
        received = tl.sum(tl.where(real, tl.exp2(s - lse[:, None]), 0.0), 0)
        _add_received(mass + first, count + first, received, slot, length, decay, COUNT)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@on_its_device
def append(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    rolling: bool,
    norms: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    scales: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor:
    """Rotate a decode step's queries and keys, the same arithmetic as apply_rotary_pos_emb, and append to the slots.

    Args:
        query, key, value: [B, Hq or Hkv, 1, D], not rotated; D contiguous and even.
        cos, sin: [1 or B, D] at the rows' positions, the same in both halves of D; with `rolling` [slots, D] by slot.
            None: nothing is rotated.
        keys, values: [B, Hkv, slots, D], or [B, slots of all heads, D] with `offsets`; same dtype and strides. Slot
            lengths[b, h] - 1 of a head is written. With `scales` they are int8.
        lengths: int32 [B] or [B, Hkv], the new slot included; 0 where a row has no token to append.
        rolling: append the keys unrotated, and rotate the queries by their slot.
        norms: float32, as keys without D: takes the L2 norm of the values.
        offsets: int32 [Hkv + 1], where each head's slots begin, if heads have capacities of their own.
        scales: of keys and of values, float32, as these without D, contiguous, if they are quantised.

    Returns: the queries, rotated, [B, Hq, 1, D].
    """
    batch, q_heads, _, dim = query.shape
    heads, ragged, overlap = key.shape[1], offsets is not None, overlaps(query.device)
    rotated = query.new_empty(batch, q_heads, 1, dim)
    stride_rope = 0
    if cos is not None:
        stride_rope = cos.stride(0) if len(cos) > 1 else 0
        assert cos.stride() == sin.stride() and cos.stride(-1) == 1
    assert keys.stride() == values.stride()
    assert all(states.stride(-1) == 1 for states in (query, key, value, keys))
    _append_kernel[batch, heads](
        query, key, value, cos, sin, rotated, keys, values, *(scales or (None, None)), norms, lengths, offsets,
        *query.stride()[:2],
        *key.stride()[:2], *value.stride()[:2], *_of_heads(lengths), *_slot_strides(keys), stride_rope, keys.shape[-2],
        HEADS=heads, GROUP=q_heads // heads, D=dim, BD=2 * triton.next_power_of_2(dim // 2), ROLLING=rolling,
        NORMS=norms is not None, RAGGED=ragged, ROTATES=cos is not None, INT8=bool(scales), OVERLAP=overlap,
        num_warps=1 if dim <= 128 else 2,
        enable_fp_fusion=False,  # a product and a sum as one would round once where torch rounds twice
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return rotated


def _of_heads(lengths: torch.Tensor) -> tuple[int, int]:
    """Strides of lengths [B] or [B, Hkv] over rows and heads."""
    return (lengths.stride(0), lengths.stride(1) if lengths.ndim > 1 else 0)


def _slot_strides(keys: torch.Tensor) -> tuple[int, int, int]:
    """Strides of slots over rows, heads (0 if they lie one after the other in a row) and slots."""
    return keys.stride()[:3] if keys.ndim == 4 else (keys.stride(0), 0, keys.stride(1))


class Shares(NamedTuple):
    """How programs divide the heads of a layer, whose capacities differ. Tables on the device, int32."""

    longest: int  # slots of a share
    shares: torch.Tensor  # [n, 3]: head, its share, and how many it has; the longest first
    most: int  # shares of a head
    blocks: torch.Tensor  # [m, 4]: what `_combine_kernel` needs


@functools.cache
def _divide(
    capacities: tuple[int, ...], batch: int, group: int, block: int, all_combined: bool, mass: bool, device
) -> Shares:
    """Shares of about equal length that fill the device, none longer than the mean head; a short head has one."""
    total = sum(capacities)
    longest = triton.cdiv(total * batch, 2 * _processors(device) * 64) * 64
    longest = min(max(longest, 64), triton.cdiv(total, len(capacities) * 64) * 64)
    longest = max(longest, triton.cdiv(max(capacities), 64 * 64) * 64)  # 64 shares of a head at most
    heads = sorted(range(len(capacities)), key=lambda h: -capacities[h])
    split = {h: triton.cdiv(capacities[h], longest) for h in heads}
    heads.sort(key=lambda h: -capacities[h] / split[h])
    shares = [(h, share, split[h]) for h in heads for share in range(split[h])]
    first = {h: line for line, (h, share, _) in enumerate(shares) if share == 0}
    blocks = [
        (h, i, first[h], split[h])
        for h in heads
        if split[h] > 1 or all_combined
        for i in range(group + (triton.cdiv(capacities[h], block) if mass else 0))
    ]
    tables = (torch.tensor(table, dtype=torch.int32).to(device) for table in (shares, blocks))
    shares, blocks = tables
    return Shares(longest, shares, max(split.values()), blocks)


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
    offsets: torch.Tensor | None = None,
    capacities: tuple[int, ...] = (),
    scales: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor:
    """Softmax attention of one query per row over the row's slots; adds to the slots' mass in place.

    Args:
        query: [B, Hq, 1, D], float32, float16 or bfloat16, rotated; D at most 256.
        keys, values: [B, Hkv, slots, D], or [B, slots of all heads, D] with `offsets`; same dtype and strides, D
            contiguous; nothing past a row's length is used.
        lengths: int32 [B] or [B, Hkv]: filled slots, the query's own included; 0 where a row has no query: its mass
            stays as it is, its output is zero.
        scaling: of q·k.
        mass: float32, as keys without D, contiguous: mass = mass * decay + probability, summed over a group's query
            heads.
        count: as mass: count = count * decay + 1.
        first_head: take mass from the first query head of each group only.
        rope: cos and sin [longest row or more, D] by slot index, the same in both halves of D, to rotate the keys with.
        offsets, capacities: where the slots of each KV head begin, int32 [Hkv + 1], and how many they are, if heads
            have capacities of their own.
        scales: of keys and of values, float32, as these without D, contiguous, if they are int8.

    Returns: [B, Hq, 1, D]. Where two kernels are needed, what passes between them is allocated at each call.
    """
    batch, q_heads, _, dim = query.shape
    ragged = offsets is not None
    heads = len(capacities) if ragged else keys.shape[1]
    slots = keys.shape[-2]  # of a head, or of all heads of a row
    group = q_heads // heads
    width = padded(dim) if rope is None and not scales else 2 * padded(dim // 2)
    group_width, programs = triton.next_power_of_2(group), batch * heads
    block = max(16, COMBINED // group_width)
    halves = query.element_size() == 2
    plan, split = None, 1
    if ragged:
        plan = _divide(capacities, batch, group, block, mass is not None and not halves, mass is not None, query.device)
        longest, split = plan.longest, triton.next_power_of_2(plan.most)
    else:
        split = min(triton.next_power_of_2(triton.cdiv(_processors(query.device), programs)), 64)
        split = min(split, triton.next_power_of_2(triton.cdiv(slots, 64) + 1) // 2)
        longest = slots
    of_a_thread = triton.cdiv(longest * group_width, 32 * 4)  # logits, when four warps keep them
    keeping = (ragged or split == 1) and mass is not None and of_a_thread <= MOST_KEPT and halves
    alone = len(plan.blocks) == 0 if ragged else split == 1 and (mass is None or keeping)
    small = keeping and 2 * of_a_thread <= MOST_KEPT  # two warps: more programs at once
    tile = 32 if rope is not None or (small and not scales) else 64  # cosines and sines take shared memory too
    tile = max(16, min(tile, 16384 // (width * query.element_size())))
    tiles = triton.cdiv(longest, tile)
    kept = triton.next_power_of_2(tiles + 1) // 2 if keeping else 0
    more = triton.next_power_of_2(tiles - kept) if keeping and tiles > kept else 0
    overlap = overlaps(query.device)
    assert keys.stride() == values.stride() and keys.stride(-1) == 1 and query.stride(3) == 1

    output = query.new_empty(batch, q_heads, 1, dim)
    logits = sums = partial = output  # not used
    lines = len(plan.shares) if ragged else heads * split
    if not alone:
        parts = (batch, lines, group)
        sums = torch.empty(*parts, 2, dtype=torch.float32, device=query.device)
        partial = torch.empty(*parts, width, dtype=torch.float32, device=query.device)
        if mass is not None:
            logits = torch.empty(mass.numel() * group, dtype=torch.float32, device=query.device)
    added = (output if mass is None else mass, output if count is None else count)
    cos, sin = (output, output) if rope is None else rope
    if scales:
        values = values.view(torch.int16)
    shape = dict(HEADS=heads, GROUP=group, COUNTED=1 if first_head else group, D=dim, BD=width,
                 G=group_width, SPLIT=split, COUNT=count is not None, RAGGED=ragged)  # fmt: skip
    _decode_kernel[(batch * lines,) if ragged else (programs, split)](
        query, keys, values, *(scales or (None, None)), lengths, cos, sin, output, *added, logits, sums, partial,
        offsets, plan.shares if ragged else None, *query.stride()[:2], *_of_heads(lengths), *_slot_strides(values),
        cos.stride(0), batch, slots, scaling * LOG2_E.value, float(decay),
        **shape, GP=max(8, group_width), BN=tile, TILES=kept, MORE_TILES=more, MASS=mass is not None,
        ROPE=rope is not None, INT8=bool(scales), BYTES=bool(scales) and rope is None and halves,
        PACKED=query.is_cuda and halves, PRECISION=precision(query.dtype), OVERLAP=overlap,
        num_warps=2 if small else 4, num_stages=3,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    if not alone:
        blocks = group + (triton.cdiv(slots, block) if mass is not None else 0)
        _combine_kernel[(batch * len(plan.blocks),) if ragged else (programs, blocks)](
            lengths, output, *added, logits, sums, partial, offsets, plan.blocks if ragged else None,
            *_of_heads(lengths), batch, lines, slots, float(decay), **shape, BR=block, OVERLAP=overlap,
            num_warps=4, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return output


def decode_step(
    projected: list[torch.Tensor],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    mass: torch.Tensor | None,
    count: torch.Tensor | None,
    norms: torch.Tensor | None,
    lengths: torch.Tensor,
    offsets: torch.Tensor | None,
    capacities: list[int],
    scaling: float,
    decay: float,
    first_head: bool,
    rolling: bool,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> torch.Tensor:
    """`append`, then `decode_attention`, on what the projections give.

    Args:
        projected: query, key and value [B, 1, heads * D], or one [B, 1, all of them].
        cos, sin: [1 or B, 1, D] at the rows' positions, or [1, slots, D] when rolling; None for a layer without RoPE.
        mass, count: added to where they are given.
        norms: written where they are given.
        key_scales, value_scales: written and read where they are given; keys and values are then int8.
        lengths: [B, Hkv].
        The others are those of the two.

    Returns: [B, 1, Hq * D].
    """
    batch, heads = lengths.shape
    dim = keys.shape[-1]
    if len(projected) == 1:
        size = heads * dim
        projected = projected[0].split([projected[0].shape[-1] - 2 * size, size, size], dim=-1)
    query, key, value = (states.view(batch, 1, -1, dim).transpose(1, 2) for states in projected)
    if cos is not None:
        cos, sin = (table[0] if rolling else table[:, 0] for table in (cos, sin))
    scales = () if key_scales is None else (key_scales, value_scales)
    rotated = append(query, key, value, cos, sin, keys, values, lengths, rolling, norms, offsets, scales)
    added = {} if mass is None else dict(mass=mass, count=count, decay=decay)
    output = decode_attention(
        rotated, keys, values, lengths, scaling, rope=(cos, sin) if rolling else None, first_head=first_head,
        offsets=offsets, capacities=tuple(capacities), scales=scales, **added,
    )  # fmt: skip
    return output.view(batch, 1, -1)
