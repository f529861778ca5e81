"""The gated activation of a decode step's MLP in one launch, from the merged output of gate and up."""

import torch
import triton
import triton.language as tl

from h2optimizer.kernels.common import on_its_device


@triton.jit
def _silu_and_multiply_kernel(gate_up, output, size, BLOCK: tl.constexpr):
    row, offset = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * size + offset, mask=offset < size, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + offset, mask=offset < size, other=0.0)
    x = gate.to(tl.float32)
    active = (x / (1.0 + tl.exp(-x))).to(gate.dtype)  # rounded here, as torch's silu is
    tl.store(output + row * size + offset, (active.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), offset < size)


@on_its_device
def run_silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up [..., n] of [..., 2 n], contiguous, float32 or half precision (SwiGLU, arXiv 2002.05202)."""
    size = gate_up.shape[-1] // 2
    output = gate_up.new_empty(*gate_up.shape[:-1], size)
    rows, block = gate_up.numel() // (2 * size), 1024
    assert gate_up.is_contiguous()
    _silu_and_multiply_kernel[rows, triton.cdiv(size, block)](gate_up, output, size, BLOCK=block, num_warps=4)
    return output


# A custom operator keeps torch.compile from fusing it into the next product, where it would run for every weight.
silu_and_multiply = torch.library.custom_op("h2optimizer::silu_and_multiply", run_silu_and_multiply, mutates_args=())


@silu_and_multiply.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
