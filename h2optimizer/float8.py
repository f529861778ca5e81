"""Products with float8 weights, as torchao stores them: dynamic activations, one scale per row of each."""

from __future__ import annotations

import torch

LARGEST = torch.finfo(torch.float8_e4m3fn).max
LEAST = 1e-12  # a row's least maximum: a row of zeros, such as padding, would otherwise be divided by zero


def config():
    """torchao's configuration of such products. Raises: ImportError if torchao is missing."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    # torchao's settings for inductor would also change the precision of all float32 products
    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), activation_value_lb=LEAST, set_inductor_config=False
    )


def stored(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Numbers [outputs, inputs] and scales [outputs, 1] of such a weight of torchao's; None for any other tensor."""
    if type(weight).__name__ != "Float8Tensor" or not type(weight).__module__.startswith("torchao."):
        return None
    activations = weight.act_quant_kwargs
    by_row = weight.ndim == 2 and list(weight.block_size) == [1, weight.shape[1]]
    formats = weight.qdata.dtype, activations and activations.float8_dtype
    if not by_row or formats != (torch.float8_e4m3fn,) * 2 or not weight.mm_config.use_fast_accum:
        return None
    return weight.qdata, weight.scale


def linear(
    inputs: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Inputs [..., n] times a float8 weight [outputs, n] with scales [outputs, 1], and a bias [outputs] in their dtype:
    [..., outputs], likewise.
    """
    rows, of_rows = quantize_rows(inputs.reshape(-1, inputs.shape[-1]).contiguous())
    product = torch._scaled_mm(
        rows, numbers.t(), scale_a=of_rows, scale_b=scales.t(), bias=bias, out_dtype=inputs.dtype, use_fast_accum=True
    )
    return product.view(*inputs.shape[:-1], -1)


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n, size] as float8 e4m3 and scales float32 [n, 1]."""
    from h2optimizer.kernels import float8

    return float8.quantize_rows(rows, LARGEST, LEAST)
