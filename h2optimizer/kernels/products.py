"""Products of a few rows with a weight, bound by reading it: the decode steps of a small batch.

Each program reads some rows of the weight once, from end to end. What stock Llama computes around a product in launches
of its own is part of it: the RMSNorm before, and after it a bias, the gated activation or the residual sum. These
intermediates stay float32, where stock Llama rounds them.

One row's products are summed in registers. Several rows take tensor cores; their norm is a launch of its own, because
each program would otherwise repeat it for all rows.

A product is launched while the kernel before it still runs (programmatic dependent launch). Before it waits for that
kernel, it may bring the beginning of its weight into the L2 cache.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from h2optimizer.kernels.common import on_its_device, overlaps, precision

MOST_ROWS = 8  # columns of a tensor core's smallest tile; more rows are not bound by reading the weight alone
SHARED = 160 * 2**10  # bytes of shared memory that the largest tile fits into


class Tile(NamedTuple):
    """How programs divide a product."""

    outputs: int  # of a program; of a gated product, as many of each half
    inputs: int  # of one iteration, in half precision; half as many in float32
    warps: int
    stages: int  # iterations whose loads are in flight, and one more
    dot: bool  # by tensor cores
    ahead: int = 0  # cache lines of each output's weights that are fetched before waiting


def choose_tile(rows: int, outputs: int, gated: bool) -> Tile:
    """The fastest of some forty on an H200 for the shapes of Llama-3-8B, in a graph of 32 layers."""
    if rows > 1:
        return Tile(64, 256, 4, 3, dot=True) if gated else Tile(16, 256, 1, 6, dot=True)
    if gated:
        return Tile(4, 1024, 4, 3, dot=False)
    return Tile(4, 1024, 4, 5, dot=False) if outputs > 4096 else Tile(4, 2048, 4, 1, dot=False, ahead=16)


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the device is like that on which the tiles were chosen, a Hopper or later GPU, or an interpreter."""
    if device.type != "cuda":
        return True
    return overlaps(device) and torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= SHARED


@triton.jit
def _fetch(weight, n, size, LINES: tl.constexpr):
    """Bring the beginnings of the rows n into L2, LINES cache lines of each."""
    line = tl.arange(0, LINES) * (1024 // weight.dtype.element_ty.primitive_bitwidth)
    at = weight + n.to(tl.int64)[:, None] * size + tl.minimum(line, size - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _load_weights(at, inside, WHOLE: tl.constexpr):
    """Weights that nothing else will read in this step."""
    if WHOLE:
        return tl.load(at, eviction_policy="evict_first")
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _sum_of_products(weights, inputs, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    if DOT:
        acc = tl.dot(weights, inputs, acc, input_precision=PRECISION)
    else:
        acc += weights.to(tl.float32) * inputs
    return acc


@triton.jit
def _finished(acc, scale, bias, n, BIAS: tl.constexpr, DOT: tl.constexpr):
    """Outputs [BN, M] in float32."""
    if not DOT:
        acc = tl.sum(acc, 1)[:, None] * scale
    if BIAS:
        acc += tl.load(bias + n).to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(inputs, weight, bias, factor, residual, output, rows, outputs, size, eps, NORM: tl.constexpr,
                    BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr,
                    WHOLE: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
                    AHEAD: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """BN outputs of all rows. Inputs are [BK, M] for tensor cores and [1, BK] otherwise, where M = 1.

    The scale of a norm is the same for all inputs of a row, so it multiplies the sum.
    """
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
    if DOT:
        acc = tl.zeros([BN, M], tl.float32)
    else:
        acc = tl.zeros([BN, BK], tl.float32)
    up, squares, scale = acc, tl.zeros([1, BK], tl.float32), 1.0
    for i in tl.range(0, size, BK, num_stages=STAGES):
        inside = i + k < size
        w = _load_weights(first + i, inside[None, :], WHOLE)
        if DOT:
            at = inputs + m[None, :] * size + (i + k)[:, None]
            x = tl.load(at, mask=(m < rows)[None, :] & inside[:, None], other=0.0)
        else:
            x = tl.load(inputs + (i + k)[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            if NORM:
                squares += x * x
                x *= tl.load(factor + (i + k)[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
        acc = _sum_of_products(w, x, acc, DOT, PRECISION)
        if GATED:
            w = _load_weights(second + i, inside[None, :], WHOLE)
            up = _sum_of_products(w, x, up, DOT, PRECISION)
    if NORM:
        scale = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / size + eps)

    result = _finished(acc, scale, bias, n, BIAS, DOT)
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * _finished(up, scale, bias, n + outputs, BIAS, DOT)
    at, inside = m[None, :] * outputs + own[:, None], (m < rows)[None, :] & (own < outputs)[:, None]
    if RESIDUAL:
        result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _normalise_kernel(inputs, factor, output, size, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One row."""
    offset = tl.arange(0, BLOCK)
    g = tl.load(factor + offset, mask=offset < size, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * size + offset
    x = tl.load(inputs + at, mask=offset < size, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x) / size + eps) * g
    tl.store(output + at, x.to(output.dtype.element_ty), mask=offset < size)


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
    """norm(inputs) @ weight.T + bias, then silu(gate) * up if `gated` (arXiv 2002.05202), then + residual.

    Args:
        inputs: [..., size], contiguous, at most MOST_ROWS rows; float32 or half precision, as all that is given.
        weight: [outputs, size], contiguous; with `gated` [2 outputs, size], the rows of gate before those of up.
        bias: as many as the weight has rows.
        norm: [size], the weight of an RMSNorm (arXiv 1910.07467) with `eps`.
        residual: [..., outputs], contiguous.
        tile: default: `choose_tile`. One without `dot` takes one row.

    Returns: [..., outputs].
    """
    size, rows, overlap = inputs.shape[-1], inputs.numel() // inputs.shape[-1], overlaps(inputs.device)
    outputs = len(weight) // 2 if gated else len(weight)
    tile = tile or choose_tile(rows, outputs, gated)
    assert rows <= (MOST_ROWS if tile.dot else 1)
    assert all(given is None or given.is_contiguous() for given in (inputs, weight, residual))
    launch = {"launch_pdl": True} if overlap else {}
    if norm is not None and tile.dot:
        normed = torch.empty_like(inputs)
        block = triton.next_power_of_2(size)
        _normalise_kernel[(rows,)](inputs, norm, normed, size, eps, BLOCK=block, OVERLAP=overlap, num_warps=8, **launch)
        inputs, norm = normed, None
    output = inputs.new_empty(*inputs.shape[:-1], outputs)
    block = max(16, min(tile.inputs * 2 // inputs.itemsize, triton.next_power_of_2(size)))
    _product_kernel[(triton.cdiv(outputs, tile.outputs),)](
        inputs, weight, bias, norm, residual, output, rows, outputs, size, eps, NORM=norm is not None,
        BIAS=bias is not None, GATED=gated, RESIDUAL=residual is not None, DOT=tile.dot, WHOLE=size % block == 0,
        M=MOST_ROWS if tile.dot else 1, BN=tile.outputs, BK=block, STAGES=tile.stages,
        AHEAD=tile.ahead if overlap else 0, PRECISION=precision(inputs.dtype), OVERLAP=overlap, num_warps=tile.warps,
        **launch,
    )  # fmt: skip
    return output
