"""Attention of many queries over slots and new tokens, and the mass that each receives, in memory linear in both.

Query column i of row b sits at slot starts[b] + i and sees all slots up to it; the first new[b] columns of a row are
real. Output and log-sum-exp come from the fastest kernel available. The mass, column sums of exp(q·k * scaling - lse),
takes one more pass over tiles, as in the backward pass of FlashAttention-2 (Dao, arXiv 2307.08691). It needs no atomics
because each program keeps its tile of keys and walks over the queries.

Keys and values of batch 1 serve all rows: those of a shared prefix, with starts at its end.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from h2optimizer.kernels.common import LOG2_E, Launch, online_softmax_update, padded, precision


@triton.jit
def _mass_tile(query, keys_t, lse, qb, qh, i, offset_n, start, end, scale_log2, MASKED: tl.constexpr, BM: tl.constexpr,
               BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Probabilities of queries [i, i + BM) and a tile of keys, adding rows r and r + 8 of a thread: [BM/16, 8, BN]."""
    columns = i + tl.arange(0, BM)
    q = query.load([qb, qh, i, 0]).reshape(BM, BD)
    if MASKED:
        row_lse = tl.load(lse + columns, mask=columns < end, other=float("inf"))
    else:
        row_lse = tl.load(lse + columns)
    logits = tl.dot(q, keys_t, input_precision=PRECISION) * scale_log2
    p = tl.exp2(logits - (row_lse * LOG2_E)[:, None])
    if MASKED:
        p = tl.where((columns < end)[:, None] & (columns[:, None] + start >= offset_n[None, :]), p, 0.0)
    return tl.sum(tl.reshape(p, [BM // 16, 2, 8, BN]), 1)


@triton.jit(do_not_specialize=["batch", "columns", "width", "blocks"])
def _mass_kernel(query, key, lse, spans, mass, batch, columns, width, blocks, scale_log2, HEADS: tl.constexpr,
                 GROUP: tl.constexpr, COUNTED: tl.constexpr, SHARED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of keys and one query head: mass [B, Hkv, COUNTED, width] from the queries in [first, new)."""
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = head // (HEADS * COUNTED), head // COUNTED % HEADS
    q_head = h * GROUP + head % COUNTED
    start, new, first = tl.load(spans + b), tl.load(spans + batch + b), tl.load(spans + 2 * batch + b)
    lse += (b * HEADS * GROUP + q_head).to(tl.int64) * columns
    offset_n = block * BN + tl.arange(0, BN)
    keys_t = tl.trans(key.load([0 if SHARED else b, h, block * BN, 0]).reshape(BN, BD))
    # Queries before `begin` see none of the keys; queries from `whole` on see all. Masked tiles also take the
    # remainder, so that all unmasked tiles are full.
    begin = tl.maximum(first, block * BN - start)
    whole = tl.minimum(new, tl.maximum(begin, block * BN + BN - 1 - start))
    middle = whole + tl.maximum(new - whole, 0) % BM
    total = tl.zeros([BM // 16, 8, BN], tl.float32)
    for i in tl.range(begin, middle, BM, num_stages=1):
        total += _mass_tile(query, keys_t, lse, b, q_head, i, offset_n, start, middle, scale_log2, True, BM, BN, BD,
                            PRECISION)  # fmt: skip
    for i in range(middle, new, BM):
        total += _mass_tile(query, keys_t, lse, b, q_head, i, offset_n, start, new, scale_log2, False, BM, BN, BD,
                            PRECISION)  # fmt: skip
    mass += head.to(tl.int64) * width
    tl.store(mass + offset_n, tl.sum(tl.reshape(total, [BM // 2, BN]), 0), mask=offset_n < width)


@triton.jit(do_not_specialize=["batch", "columns", "blocks"])
def _attention_kernel(query, key, value, spans, output, lse, batch, columns, blocks, stride_b, stride_n, scale_log2,
                      HEADS: tl.constexpr, GROUP: tl.constexpr, PREFIX: tl.constexpr, D: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of queries of one head, the latest first: output [B, columns, Hq, D], lse [B, Hq, columns].

    With PREFIX, keys and values are those of the first row, and the new tokens are not among them.
    """
    block, head = blocks - 1 - tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, q_head = head // (HEADS * GROUP), head % (HEADS * GROUP)
    h = q_head // GROUP
    start, new = tl.load(spans + b), tl.load(spans + batch + b)
    kv_row = b
    if PREFIX:
        new = 0
        kv_row = 0
    column = block * BM + tl.arange(0, BM)
    offset_d, offset_n = tl.arange(0, BD), tl.arange(0, BN)
    q = query.load([b, q_head, block * BM, 0]).reshape(BM, BD)
    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    seen_by_all = (start + tl.minimum(block * BM + 1, new)) // BN * BN  # slots of full tiles that every query sees
    visible = start + tl.minimum(new, block * BM + BM)
    for j in range(0, seen_by_all, BN):
        k = key.load([kv_row, h, j, 0]).reshape(BN, BD)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        v = value.load([kv_row, h, j, 0]).reshape(BN, BD)
        top, total, acc = online_softmax_update(logits, v, top, total, acc, PRECISION)
    for j in tl.range(seen_by_all, visible, BN, num_stages=1):
        k = key.load([kv_row, h, j, 0]).reshape(BN, BD)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        slot = j + offset_n
        sees = (slot[None, :] <= start + column[:, None]) & (slot < start + new)[None, :]
        logits = tl.where(sees, logits, -float("inf"))
        v = value.load([kv_row, h, j, 0]).reshape(BN, BD)
        v = tl.where((slot < start + new)[:, None], v, 0.0)  # values past the row's end may be NaN
        top, total, acc = online_softmax_update(logits, v, top, total, acc, PRECISION)
    output += b.to(tl.int64) * stride_b + q_head * D
    at = output + column[:, None].to(tl.int64) * stride_n + offset_d[None, :]
    inside = (column < columns)[:, None] & (offset_d < D)[None, :]
    divisor = tl.where(total == 0.0, 1.0, total)  # padding of a row without slots sees nothing: zero, not NaN
    tl.store(at, (acc / divisor[:, None]).to(output.dtype.element_ty), mask=inside)
    lse += head.to(tl.int64) * columns
    tl.store(lse + column, (top + tl.log2(total)) / LOG2_E, mask=column < columns)


@triton.jit(do_not_specialize=["columns", "blocks"])
def _merge_kernel(output, lse, first, first_lse, second, second_lse, columns, blocks, stride_b, stride_n, first_b,
                  first_h, first_n, second_b, second_h, second_n, first_lse_b, first_lse_h, second_lse_b, second_lse_h,
                  HEADS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """A tile of queries of one head: output [B, columns, Hq, D], lse [B, Hq, columns]."""
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (head // HEADS).to(tl.int64), head % HEADS
    column, d = block * BM + tl.arange(0, BM), tl.arange(0, BD)
    there = column < columns
    inside = there[:, None] & (d < D)[None, :]
    lse_1 = tl.load(first_lse + b * first_lse_b + h * first_lse_h + column, mask=there, other=0.0)
    lse_2 = tl.load(second_lse + b * second_lse_b + h * second_lse_h + column, mask=there, other=0.0)
    top = tl.maximum(lse_1, lse_2)
    weight_1, weight_2 = tl.exp2((lse_1 - top) * LOG2_E), tl.exp2((lse_2 - top) * LOG2_E)
    total = weight_1 + weight_2
    at = column.to(tl.int64)[:, None]
    first += b * first_b + h * first_h
    second += b * second_b + h * second_h
    o_1 = tl.load(first + at * first_n + d[None, :], mask=inside, other=0.0).to(tl.float32)
    o_2 = tl.load(second + at * second_n + d[None, :], mask=inside, other=0.0).to(tl.float32)
    merged = o_1 * (weight_1 / total)[:, None] + o_2 * (weight_2 / total)[:, None]
    output += b * stride_b + h * D
    tl.store(output + at * stride_n + d[None, :], merged.to(output.dtype.element_ty), mask=inside)
    tl.store(lse + head.to(tl.int64) * columns + column, top + tl.log2(total) / LOG2_E, mask=there)


def _tiles(states: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """A descriptor of states [B, H, n, D] for loads of [rows, width], zero past n and past D."""
    (b, h, n, d), size = states.stride(), states.itemsize
    if d != 1 or b * size % 16 or h * size % 16 or n * size % 16 or states.data_ptr() % 16:
        states = states.clone(memory_format=torch.contiguous_format)  # contiguous() would not fix misalignment
    return TensorDescriptor(states, list(states.shape), list(states.stride()), [1, 1, rows, width])


@functools.lru_cache
def _blocks(dim: int, dtype: torch.dtype, device: torch.device, mass: bool) -> tuple[int, int, dict]:
    """Queries and slots per tile, and launch options: the fastest on an H200; elsewhere, those that spill least."""
    if dtype == torch.float32:  # no tensor cores, so operands are in registers
        return 16, 16, dict(num_warps=4, num_stages=2)
    if dim > 128:
        return (64, 64, dict(num_warps=4, num_stages=3)) if mass else (64, 32, dict(num_warps=4, num_stages=2))
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return (64, 128, dict(num_warps=8, num_stages=2)) if mass else (64, 32, dict(num_warps=4, num_stages=2))
    # Mass: three programs per multiprocessor, at 168 registers a thread, hide each other's latency.
    return (
        (64, 128, dict(num_warps=4, num_stages=3, maxnreg=168)) if mass else (64, 64, dict(num_warps=4, num_stages=3))
    )


class Plan(NamedTuple):
    """How queries [B, Hq, columns, D] and keys [B or 1, Hkv, width, D] are loaded, and the launch."""

    rows: int  # queries of a tile
    slots: int  # keys of a tile
    width: int  # of both: D up to a power of two
    launch: Launch


@functools.lru_cache
def _attention_plan(queries: tuple, keys: tuple, strides: tuple, scaling: float, prefix: bool, dtype, device) -> Plan:
    """strides: the output's over rows and columns."""
    (batch, heads, columns, dim), kv_heads = queries, keys[1]
    rows, slots, options = _blocks(dim, dtype, device, mass=False)
    blocks = triton.cdiv(columns, rows)
    launch = Launch(
        _attention_kernel, blocks * batch * heads, batch, columns, blocks, *strides, scaling * LOG2_E.value,
        HEADS=kv_heads, GROUP=heads // kv_heads, PREFIX=prefix, D=dim, BM=rows, BN=slots, BD=padded(dim),
        PRECISION=precision(dtype), options=options,
    )  # fmt: skip
    return Plan(rows, slots, padded(dim), launch)


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    scaling: float,
    prefix: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention and the log-sum-exp of each query's logits.

    Args:
        query: [B, Hq, columns, D], float32, float16 or bfloat16, D at most 256 and a multiple of 16 bytes.
        key, value: [B, Hkv, width, D], same dtype.
        spans: int32 [2 or more, B]: each row's slots before its new tokens, and its number of new tokens.
        scaling: of q·k.
        prefix: attend to a shared prefix only: key and value are [1, Hkv, width, D], and all starts are the width.

    Returns: output [B, Hq, columns, D] and lse [B, Hq, columns] float32. Past a row's new tokens both are meaningless,
    but the output is finite if the states are.
    """
    batch, q_heads, columns, dim = query.shape
    output = query.new_empty(batch, columns, q_heads, dim)
    lse = query.new_empty(batch, q_heads, columns, dtype=torch.float32)
    strides = output.stride()[:2]
    rows, slots, width, launch = _attention_plan(
        query.shape, key.shape, strides, scaling, prefix, query.dtype, query.device
    )
    tiles = _tiles(query, rows, width), _tiles(key, slots, width), _tiles(value, slots, width)
    launch(*tiles, spans, output, lse)
    return output.transpose(1, 2), lse


@functools.lru_cache
def _merging(shape: tuple, *strides: tuple) -> Launch:
    batch, heads, columns, dim = shape
    blocks = triton.cdiv(columns, 32)
    numbers = [stride for of in strides for stride in of]
    return Launch(
        _merge_kernel, blocks * batch * heads, columns, blocks, *numbers, HEADS=heads, D=dim, BM=32, BD=padded(dim),
        options=dict(num_warps=4),
    )  # fmt: skip


def merge_attention(
    first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of slots from that over each: the mean of the outputs, weighted by exp(lse).

    Args:
        first, second: [B, Hq, columns, D], with contiguous D.
        first_lse, second_lse: float32 [B, Hq, columns], with contiguous columns.

    Returns: as `attention_with_lse`.
    """
    batch, heads, columns, dim = first.shape
    output = first.new_empty(batch, columns, heads, dim)
    lse = first_lse.new_empty(batch, heads, columns)
    strides = output.stride()[:2], first.stride()[:3], second.stride()[:3]
    launch = _merging(first.shape, *strides, first_lse.stride()[:2], second_lse.stride()[:2])
    launch(output, lse, first, first_lse, second, second_lse)
    return output.transpose(1, 2), lse


@functools.lru_cache
def _mass_plan(queries: tuple, keys: tuple, scaling: float, counted: int, dtype, device) -> Plan:
    """counted: query heads of a group that add mass."""
    (batch, heads, columns, dim), (key_rows, kv_heads, width, _) = queries, keys
    rows, slots, options = _blocks(dim, dtype, device, mass=True)
    blocks = triton.cdiv(width, slots)
    launch = Launch(
        _mass_kernel, blocks * batch * kv_heads * counted, batch, columns, width, blocks, scaling * LOG2_E.value,
        HEADS=kv_heads, GROUP=heads // kv_heads, COUNTED=counted, SHARED=key_rows < batch, BM=rows, BN=slots,
        BD=padded(dim), PRECISION=precision(dtype), options=options,
    )  # fmt: skip
    return Plan(rows, slots, padded(dim), launch)


def attention_mass(
    query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, spans: torch.Tensor, scaling: float, first_head: bool
) -> torch.Tensor:
    """The mass of each slot: its probability summed over a forward's queries and a group's query heads.

    Args:
        query: [B, Hq, columns, D], float32, float16 or bfloat16, D at most 256 and a multiple of 16 bytes.
        key: [B, Hkv, width, D], same dtype; or [1, Hkv, width, D], those of a prefix that ends at each row's start.
        lse: [B, Hq, columns] float32, contiguous: natural log-sum-exp of each query's scaled logits.
        spans: int32 [3, B]: each row's slots before its new tokens, their number, and the first one counted.
        scaling: of q·k.
        first_head: count the first query head of each group only.

    Returns: float32 [B, Hkv, width], zero past a row's slots.
    """
    queries, keys = query.shape, key.shape
    counted = 1 if first_head else queries[1] // keys[1]
    mass = key.new_empty(queries[0], keys[1], counted, keys[2], dtype=torch.float32)
    rows, slots, width, launch = _mass_plan(queries, keys, scaling, counted, query.dtype, query.device)
    launch(_tiles(query, rows, width), _tiles(key, slots, width), lse, spans, mass)
    return mass.sum(2) if counted > 1 else mass[:, :, 0]
