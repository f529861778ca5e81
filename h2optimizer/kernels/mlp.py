"""The gated activation of an MLP in one launch, from the merged output of gate and up."""

import functools

import torch
import triton
import triton.language as tl

from h2optimizer.kernels.common import Launch

TILE, WARPS = 1024, 4  # elements and warps of a program


@triton.jit(do_not_specialize=["rows"])
def _silu_and_multiply_kernel(gate_up, output, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    source = gate_up + row[:, None] * 2 * size + column[None, :]
    gate = tl.load(source, mask=inside, other=0.0)
    up = tl.load(source + size, mask=inside, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    active = (x / (1.0 + tl.exp(-x))).to(gate.dtype).to(tl.float32)  # rounded here, as torch's silu is
    tl.store(output + row[:, None] * size + column[None, :], (active * up).to(gate.dtype), mask=inside)


@functools.lru_cache
def _activation(rows: int, size: int) -> Launch:
    block = min(TILE, triton.next_power_of_2(size))
    tile = TILE // block
    programs = triton.cdiv(rows, tile) * triton.cdiv(size, block)  # in one dimension: the others end at 65,535
    return Launch(
        _silu_and_multiply_kernel, programs, rows, size, ROWS=tile, BLOCK=block, options=dict(num_warps=WARPS)
    )


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [..., n] of [..., 2 n], contiguous, float32 or half precision (SwiGLU, arXiv 2002.05202)."""
    size = gate_up.shape[-1] // 2
    output = gate_up.new_empty(*gate_up.shape[:-1], size)
    assert gate_up.is_contiguous()
    _activation(gate_up.numel() // (2 * size), size)(gate_up, output)
    return output
