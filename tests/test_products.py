"""Products of a few rows against float64, and the layers whose decode steps take them. The interpreter computes bf16
wrongly, so a CPU tests float32 and float16 only."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import kernel_cases
from kernel_cases import cases, on_each_device

pytest.importorskip("triton")
from h2optimizer.kernels import products
from h2optimizer.kernels.products import Tile, product

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
placed = kernel_cases.placed  # autouse
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")

EPS = 1e-5
AROUND = {
    "alone": (),
    "norm, bias": ("norm", "bias"),
    "norm, gate": ("norm", "gated"),
    "bias, residual": ("bias", "residual"),
    "all": ("norm", "bias", "gated", "residual"),
}


def make(rows, outputs, size, around, dtype, device):
    """Inputs, weight, and the other arguments."""

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    generator = torch.Generator().manual_seed(0)
    of_weight = 2 * outputs if "gated" in around else outputs
    given = {}
    if "norm" in around:
        given |= {"norm": 1 + random(size) / 4, "eps": EPS}
    if "bias" in around:
        given["bias"] = random(of_weight)
    if "gated" in around:
        given["gated"] = True
    if "residual" in around:
        given["residual"] = random(rows, 1, outputs)
    return 3 * random(rows, 1, size), random(of_weight, size) / size**0.5, given


def by_torch(inputs, weight, norm=None, eps=0.0, bias=None, gated=False, residual=None):
    """One operation after the other, each rounded to the dtype."""
    if norm is not None:
        states = inputs if inputs.dtype == torch.float64 else inputs.float()
        states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)
        inputs = norm * states.to(inputs.dtype)
    outputs = F.linear(inputs, weight, bias)
    if gated:
        gate, up = outputs.chunk(2, dim=-1)
        outputs = F.silu(gate) * up
    return outputs if residual is None else residual + outputs


def as_double(given):
    return {name: each.double() if isinstance(each, torch.Tensor) else each for name, each in given.items()}


def assert_as_good_as_torch(inputs, weight, given, tile=None):
    output = product(inputs, weight, **given, tile=tile)
    eager = by_torch(inputs, weight, **given)
    exact = by_torch(inputs.double(), weight.double(), **as_double(given))
    assert output.dtype == inputs.dtype and output.shape == eager.shape
    # in float32 the GPU's exponential and division are approximate, to a few units of the last place
    allowed = (4 if inputs.dtype == FP32 else 2) * (eager.double() - exact).abs().max() + 1e-6
    assert (output.double() - exact).abs().max() <= allowed


@cases(
    "rows, outputs, size, around, dtype",
    [(rows, 21, 100, around, dtype) for (rows, dtype), around in itertools.product([(1, FP32), (3, FP16)], AROUND)]
    + [(rows, 9, 600, "all", FP16) for rows in (1, 2, 8)],
    [
        (rows, outputs, size, around, BF16)
        for rows, (outputs, size), around in itertools.product(
            [1, 2, 8], [(1000, 576), (4096, 5000)], ["norm, gate", "bias, residual", "all"]
        )
    ]
    + [(rows, 1000, 576, "all", dtype) for rows, dtype in itertools.product([1, 8], [FP16, FP32])],
)
def test_a_product_and_what_is_around_it(device, rows, outputs, size, around, dtype):
    """A tail of outputs or inputs left out, a row's scale used for another, gate and up exchanged, a bias of one half
    for both, or half precision where stock Llama is closer to float64."""
    assert_as_good_as_torch(*make(rows, outputs, size, AROUND[around], dtype, device))


@cases(
    "tile, rows, dtype",
    [(Tile(16, 32, 1, 1, dot=True), 3, FP32), (Tile(2, 64, 1, 1, dot=False), 1, FP16)],
    [(Tile(n, 128, warps, 3, dot=rows > 1, ahead=4), rows, BF16)
     for (n, warps), rows in itertools.product([(16, 1), (64, 4)], [1, 8])],
)  # fmt: skip
def test_any_division(device, tile, rows, dtype):
    """What the tiles that are chosen now do not show: an output or an input that two programs or iterations take."""
    assert_as_good_as_torch(*make(rows, 50, 130, AROUND["all"], dtype, device), tile)


@on_each_device
@pytest.mark.parametrize("rows", [1, 2])
def test_large_inputs_of_a_norm(device, rows):
    """Infinity where float16 cannot hold an input times the norm's weight, although it holds their norm."""
    inputs, weight, given = make(rows, 20, 64, ("norm",), FP16, device)
    inputs, given["norm"] = 20000 * inputs.sign(), 4 * given["norm"]
    assert_as_good_as_torch(inputs, weight, given)


@on_each_device
def test_rows_that_are_not_there(device):
    """What lies behind the last row, which a tile holds as well, in the output of another or past its end."""
    weight, room = torch.randn(20, 64, device=device), torch.full((8, 64), torch.nan, device=device)
    room[:3] = torch.randn(3, 64, device=device)
    output = product(room[:3], weight, norm=torch.ones(64, device=device), eps=EPS)
    assert output.shape == (3, 20) and output.isfinite().all()


def test_more_rows_than_a_tile_has():
    with pytest.raises(AssertionError):
        product(torch.zeros(products.MOST_ROWS + 1, 1, 64), torch.zeros(4, 64))
