"""Products of a few rows with a weight, bound by reading it: a decode step of a small batch.

Each program reads some rows of the weight once, from end to end. What stock Llama computes around a product in launches
of its own is part of it: the RMSNorm before, and after it a bias, the gated activation or the residual sum. These
intermediates stay float32, where stock Llama rounds them.

On devices that can, a product is launched while the kernel before it still runs (programmatic dependent launch), and
brings the beginning of its weight into the L2 cache before it waits for that kernel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from h2optimizer.kernels.common import on_its_device, overlaps, precision

MOST_ROWS = 8  # inputs of a matrix product's smallest tile


class Tile(NamedTuple):
    """How a product is divided."""

    outputs: int  # of a program; with a gate, as many of each half
    inputs: int  # of one iteration
    warps: int
    stages: int  # iterations whose loads are in flight
    dot: bool = True  # by tensor cores; otherwise, for one row, in registers
    ahead: int = 0  # cache lines of each output's weights that are fetched before waiting
    after: bool = True  # the norm's scale multiplies the product, not the inputs
    evict: str = "evict_first"


@triton.jit
def _fetch(weight, n, size, LINES: tl.constexpr):
    """Bring the beginnings of the rows n into L2, LINES cache lines of each."""
    line = tl.arange(0, LINES) * (1024 // weight.dtype.element_ty.primitive_bitwidth)
    at = weight + n.to(tl.int64)[:, None] * size + tl.minimum(line, size - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _load_weights(at, inside, WHOLE: tl.constexpr, EVICT: tl.constexpr):
    if WHOLE:
        return tl.load(at, eviction_policy=EVICT)
    return tl.load(at, mask=inside, other=0.0, eviction_policy=EVICT)


@triton.jit
def _sum_of_products(weights, inputs, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    if DOT:
        acc = tl.dot(weights, inputs, acc, input_precision=PRECISION)
    else:
        acc += weights.to(tl.float32) * inputs.to(tl.float32)
    return acc


@triton.jit
def _finished(acc, scale, bias, n, NORM: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr):
    """Outputs [BN, M] in float32."""
    if not DOT:
        acc = tl.sum(acc, 1)[:, None]
    if NORM:
        acc *= scale[None, :]
    if BIAS:
        acc += tl.load(bias + n).to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(inputs, weight, bias, factor, residual, output, rows, outputs, size, eps, NORM: tl.constexpr,
                    AFTER: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
                    DOT: tl.constexpr, WHOLE: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    STAGES: tl.constexpr, AHEAD: tl.constexpr, EVICT: tl.constexpr, PRECISION: tl.constexpr,
                    OVERLAP: tl.constexpr):  # fmt: skip
    """BN outputs of all rows. Inputs are [BK, M] for tensor cores and [1, BK] otherwise."""
    own, k, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, M)
    n = tl.minimum(own, outputs - 1)
    if OVERLAP:
        gdc_launch_dependents()
        if AHEAD > 0:
            _fetch(weight, n, size, AHEAD)
            if GATED:
                _fetch(weight, n + outputs, size, AHEAD)
        gdc_wait()
    first = weight + n.to(tl.int64)[:, None] * size + k[None, :]
    second = first + outputs.to(tl.int64) * size
    axis: tl.constexpr = 0 if DOT else 1  # of the inputs' tile
    if DOT:
        along, of_row, row = k[:, None], m[None, :] * size, m[None, :]
        acc = tl.zeros([BN, M], tl.float32)
        squares = tl.zeros([BK, M], tl.float32)
    else:
        along, of_row, row = k[None, :], 0, tl.zeros([1, 1], tl.int32)
        acc = tl.zeros([BN, BK], tl.float32)
        squares = tl.zeros([1, BK], tl.float32)
    up, scale = acc, tl.sum(squares, axis)
    if NORM and not AFTER:
        for i in range(0, size, BK):
            x = tl.load(inputs + of_row + along + i, mask=(row < rows) & (along + i < size), other=0.0).to(tl.float32)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, axis) / size + eps)
    for i in tl.range(0, size, BK, num_stages=STAGES):
        w = _load_weights(first + i, (k + i < size)[None, :], WHOLE, EVICT)
        x = tl.load(inputs + of_row + along + i, mask=(row < rows) & (along + i < size), other=0.0)
        if NORM:
            exact = x.to(tl.float32)
            if AFTER:
                squares += exact * exact
            else:
                exact *= tl.expand_dims(scale, axis)
            exact *= tl.load(factor + along + i, mask=along + i < size, other=0.0).to(tl.float32)
            x = exact.to(w.dtype) if DOT else exact
        acc = _sum_of_products(w, x, acc, DOT, PRECISION)
        if GATED:
            w = _load_weights(second + i, (k + i < size)[None, :], WHOLE, EVICT)
            up = _sum_of_products(w, x, up, DOT, PRECISION)
    if NORM and AFTER:
        scale = tl.rsqrt(tl.sum(squares, axis) / size + eps)

    scaled: tl.constexpr = NORM and AFTER
    result = _finished(acc, scale, bias, n, scaled, BIAS, DOT)
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * _finished(up, scale, bias, n + outputs, scaled, BIAS, DOT)
    at, inside = m[None, :] * outputs + own[:, None], (m < rows)[None, :] & (own < outputs)[:, None]
    if RESIDUAL:
        result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)


@on_its_device
def product(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Rows times a weight: norm(inputs) @ weight.T + bias, then silu(gate) * up if `gated`, then + residual.

    Args:
        inputs: [..., size], contiguous, at most MOST_ROWS rows; float32 or half precision, like the others.
        weight: [outputs, size], contiguous; with `gated` [2 outputs, size], the gates' rows before those of up.
        bias: as many as the weight's rows.
        norm: [size], the weight of an RMSNorm (arXiv 1910.07467) with `eps`.
        residual: [..., outputs], contiguous.

    Returns: [..., outputs].
    """
    size, rows = inputs.shape[-1], inputs.numel() // inputs.shape[-1]
    outputs = len(weight) // 2 if gated else len(weight)
    tile = tile or choose_tile(rows, outputs, gated)
    assert rows <= MOST_ROWS and all(given is None or given.is_contiguous() for given in (inputs, weight, residual))
    block = min(tile.inputs, max(16, triton.next_power_of_2(size)))
    output, overlap = inputs.new_empty(*inputs.shape[:-1], outputs), overlaps(inputs.device)
    after = (tile.after and inputs.dtype != torch.float16) or not tile.dot  # in float16 an unscaled input may overflow
    _product_kernel[(triton.cdiv(outputs, tile.outputs),)](
        inputs, weight, bias, norm, residual, output, rows, outputs, size, eps, NORM=norm is not None, AFTER=after,
        BIAS=bias is not None, GATED=gated, RESIDUAL=residual is not None, DOT=tile.dot,
        WHOLE=size % block == 0, M=MOST_ROWS if tile.dot else 1, BN=tile.outputs, BK=block,
        STAGES=tile.stages, AHEAD=tile.ahead if overlap else 0, EVICT=tile.evict, PRECISION=precision(inputs.dtype),
        OVERLAP=overlap, num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return output


def choose_tile(rows: int, outputs: int, gated: bool) -> Tile:
    """The fastest of those tried on an H200, whose programs are enough to fill it."""
    if rows > 1:
        return Tile(64, 256, 4, 3) if gated else Tile(16, 256, 2, 6)
    if gated:
        return Tile(4, 1024, 4, 3, dot=False)
    return Tile(4, 1024, 4, 5, dot=False) if outputs > 4096 else Tile(4, 2048, 4, 1, dot=False, ahead=16)
