"""Quantises activations to float8 in one pass, where torchao takes six."""

import torch
import triton
import triton.language as tl

from h2optimizer.kernels.common import on_its_device


@triton.jit
def _quantize_rows_kernel(rows, numbers, scales, size, LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    row, offset = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(rows + row * size + offset, mask=offset < size, other=0.0).to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(x), 0), LEAST)
    tl.store(scales + row, tl.div_rn(top, LARGEST))
    x *= tl.div_rn(LARGEST, top)  # one division per row; Triton's own are not exact
    tl.store(numbers + row * size + offset, x.to(numbers.dtype.element_ty), mask=offset < size)


@on_its_device
def quantize_rows(rows: torch.Tensor, largest: float, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n, size], contiguous, as float8 e4m3 [n, size] times scales float32 [n, 1].

    A row's scale maps its greatest absolute value, or `least` if that is greater, to `largest`.
    """
    n, size = rows.shape
    assert rows.is_contiguous()
    numbers = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    scales = rows.new_empty(n, 1, dtype=torch.float32)
    block = triton.next_power_of_2(size)
    warps = min(16, max(1, block // 1024))  # a row stays in registers between its maximum and its division
    _quantize_rows_kernel[(n,)](rows, numbers, scales, size, largest, least, BLOCK=block, num_warps=warps)
    return numbers, scales
