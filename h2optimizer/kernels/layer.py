"""What a decoder layer computes between its matrix products, one launch each: residual sum with norm, norms of heads,
and rotation.

All are bound by memory, so each reads its inputs once and writes its results where the next reader wants them.
"""

import functools

import torch
import triton
import triton.language as tl

from h2optimizer.kernels.common import Launch, rotated_halves

NORM_TILE, NORM_WARPS = 4096, 8  # elements and warps of a program
HEADS_TILE, HEADS_WARPS = 1024, 4  # the same of heads: few rows should still fill the device
ROTATION_TILE, ROTATION_WARPS = 2048, 4  # elements of half a head


@triton.jit(do_not_specialize=["rows"])
def _add_and_normalise_kernel(residual, branch, weight, summed, normed, rows, eps, SIZE: tl.constexpr,
                              ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Whole rows, rounded where torch rounds: after the sum, after the division and after the weight."""
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < SIZE)[None, :]
    at = row[:, None] * SIZE + column[None, :]
    own = tl.load(residual + at, mask=inside, other=0.0)
    added = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    total = (own.to(tl.float32) + added).to(own.dtype)
    tl.store(summed + at, total, mask=inside)
    exact = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 1) / SIZE + eps)
    rounded = (exact * scale[:, None]).to(own.dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=column < SIZE, other=0.0).to(tl.float32)
    tl.store(normed + at, (rounded * factor[None, :]).to(own.dtype), mask=inside)


@functools.lru_cache
def _addition(rows: int, size: int, eps: float) -> Launch:
    block = triton.next_power_of_2(size)
    tile, options = max(1, NORM_TILE // block), dict(num_warps=NORM_WARPS)
    programs = triton.cdiv(rows, tile)
    return Launch(_add_and_normalise_kernel, programs, rows, eps, SIZE=size, ROWS=tile, BLOCK=block, options=options)


def add_and_normalise(
    residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of two [..., n], and its RMSNorm (arXiv 1910.07467), both contiguous.

    weight [n] has the same dtype, float32 or half precision. The sum counts in-place changes even in inference mode.
    """
    residual, branch, size = residual.contiguous(), branch.contiguous(), weight.numel()
    with torch.inference_mode(False):
        summed = torch.empty_like(residual)
    normed = torch.empty_like(residual)
    _addition(residual.numel() // size, size, eps)(residual, branch, weight, summed, normed)
    return summed, normed


@triton.jit(do_not_specialize=["rows"])
def _normalise_heads_kernel(states, query_weight, key_weight, rows, stride, eps, QUERIES: tl.constexpr,
                            HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """ROWS heads of queries or keys, in the order of memory, in place; rounded as `_add_and_normalise_kernel`."""
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at = states + (row // HEADS * stride + row % HEADS * D)[:, None] + column[None, :]
    own = tl.load(at, mask=inside, other=0.0)
    exact = own.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 1) / D + eps)
    rounded = (exact * scale[:, None]).to(own.dtype).to(tl.float32)
    of_query = tl.load(query_weight + column, mask=column < D, other=0.0).to(tl.float32)
    of_key = tl.load(key_weight + column, mask=column < D, other=0.0).to(tl.float32)
    factor = tl.where((row % HEADS < QUERIES)[:, None], of_query[None, :], of_key[None, :])
    tl.store(at, (rounded * factor).to(own.dtype), mask=inside)


@functools.lru_cache
def _head_norms(tokens: int, width: int, dim: int, queries: int, heads: int, eps: float) -> Launch:
    rows, block = tokens * heads, triton.next_power_of_2(dim)
    tile, options = max(1, HEADS_TILE // block), dict(num_warps=HEADS_WARPS)
    return Launch(
        _normalise_heads_kernel, triton.cdiv(rows, tile), rows, width, eps, QUERIES=queries, HEADS=heads, D=dim,
        ROWS=tile, BLOCK=block, options=options,
    )  # fmt: skip


def normalise_heads(
    states: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    query_width: int,
    key_width: int,
    eps: float,
) -> torch.Tensor:
    """RMSNorm (arXiv 1910.07467) over each query and key head of a merged product, in place.

    Args:
        states: [..., query_width + key_width + …], contiguous: the heads of queries, of keys, and what stays as it is.
        query_weight, key_weight: [D], of the same dtype, float32 or half precision.

    Returns: states.
    """
    dim, width = query_weight.shape[0], states.shape[-1]
    assert states.is_contiguous() and key_weight.shape[0] == dim
    heads = query_width // dim, (query_width + key_width) // dim
    _head_norms(states.numel() // width, width, dim, *heads, eps)(states, query_weight, key_weight)
    return states


@triton.jit(do_not_specialize=["rows", "columns"])
def _rotate_kernel(states, output, cos, sin, rows, columns, stride_b, stride_h, stride_n, output_b, output_h, output_n,
                   turn_b, turn_n, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """ROWS heads, in the order of memory: all heads of a token, then those of the next. Safe in place."""
    row, offset = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (offset < D // 2)[None, :]
    token, head = row // HEADS, (row % HEADS).to(tl.int64)
    b, column = (token // columns).to(tl.int64), (token % columns).to(tl.int64)
    turn = (b * turn_b + column * turn_n)[:, None] + offset[None, :]
    c = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
    source = states + (b * stride_b + head * stride_h + column * stride_n)[:, None] + offset[None, :]
    low, high = tl.load(source, mask=inside, other=0.0), tl.load(source + D // 2, mask=inside, other=0.0)
    low, high = rotated_halves(low, high, c, s)
    target = output + (b * output_b + head * output_h + column * output_n)[:, None] + offset[None, :]
    tl.store(target, low, mask=inside)
    tl.store(target + D // 2, high, mask=inside)


@functools.lru_cache
def _rotation(shape: tuple, strides: tuple, output_strides: tuple, turn_b: int, turn_n: int) -> Launch:
    batch, heads, columns, dim = shape
    rows, block = batch * columns * heads, triton.next_power_of_2(dim // 2)
    tile = max(1, ROTATION_TILE // block)
    options = dict(num_warps=ROTATION_WARPS, enable_fp_fusion=False)  # rounds after the product and after the sum
    return Launch(
        _rotate_kernel, triton.cdiv(rows, tile), rows, columns, *strides[:3], *output_strides[:3], turn_b, turn_n,
        HEADS=heads, D=dim, ROWS=tile, BLOCK=block, options=options,
    )  # fmt: skip


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, in_place: bool) -> torch.Tensor:
    """RoPE on [B, H, n, D], rounded as transformers' apply_rotary_pos_emb rounds.

    Args:
        states: D contiguous and even, the other strides any; float32 or half precision.
        cos, sin: [1 or B, n, D], D contiguous and the same in both halves.
        in_place: write the result over the states; otherwise to a new tensor, contiguous as [B, n, H, D].

    Returns: [B, H, n, D].
    """
    batch, heads, columns, dim = states.shape
    output = states if in_place else states.new_empty(batch, columns, heads, dim).transpose(1, 2)
    strides, (turn_b, turn_n, turn_d) = states.stride(), cos.stride()
    assert sin.stride() == cos.stride() and turn_d == strides[3] == 1
    launch = _rotation(states.shape, strides, output.stride(), turn_b if cos.shape[0] > 1 else 0, turn_n)
    launch(states, output, cos, sin)
    return output
