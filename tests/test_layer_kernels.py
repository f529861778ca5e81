"""The kernels between a layer's matrix products against the torch code that they stand for, bit by bit where both
round in the same places. The interpreter computes bf16 wrongly, so a CPU tests float32 and float16 only."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import kernel_cases
from kernel_cases import cases

pytest.importorskip("triton")
from h2optimizer.kernels import layer, logits, mlp

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
placed = kernel_cases.placed  # autouse
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


def random(*shape, device="cpu", dtype=FP32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_within_a_bit(actual, expected):
    """A sum in another order rounds the last bit the other way now and then."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    apart, bit = (actual.double() - expected.double()).abs(), max(2 * torch.finfo(actual.dtype).eps, 1e-6)
    assert (apart <= bit * expected.double().abs() + 1e-7).all(), apart.max()


# Residual sum and norm


@cases(
    "shape, dtype",
    itertools.product([(1, 1, 64), (3, 7, 64), (2, 5, 48), (70, 1, 96), (2, 2, 5000)], [FP32, FP16]),
    itertools.product([(1, 1, 4096), (3, 700, 4096), (2, 5, 2304), (70, 3, 576), (2, 2, 8192)], [FP32, FP16, BF16]),
)
def test_residual_sum_and_norm(device, shape, dtype):
    """A sum that is normalised before it is rounded, a row's scale used for another, or a tail left out of the mean."""
    residual, branch = (random(*shape, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    norm = LlamaRMSNorm(shape[-1], eps=1e-3)
    norm.weight.data = torch.linspace(0.1, 2, shape[-1]).to(device, dtype)
    given = residual.clone(), branch.clone()
    summed, normed = layer.add_and_normalise(residual, branch, norm.weight, norm.variance_epsilon)
    assert torch.equal(residual, given[0]) and torch.equal(branch, given[1]), "what was given is not written"
    assert torch.equal(summed, residual + branch)
    assert_within_a_bit(normed, norm(residual + branch).detach())


# The log-probability of a token


@cases(
    "rows, size, dtype",
    [(3, 21, FP32), (2, 70, FP16)],
    itertools.product([1, 9], [1000, 128256], [FP32, FP16, BF16]),
)
def test_log_probabilities_of_tokens(monkeypatch, device, rows, size, dtype):
    """A tail that counts as logits of zero, blocks that forget the greatest logit before them or hold nothing but -inf,
    a row's length taken for its distance to the next, or a NaN that is lost."""
    if device == "cpu":
        monkeypatch.setattr(logits, "BLOCK", 16)
    given = random(rows, size + 8, device=device, dtype=dtype)[:, :size] * 8
    given[0, :19], given[-1, 3] = -torch.inf, 30
    tokens = torch.arange(rows, device=device) % 2 + 19
    expected = given.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    found = logits.token_logprobs(given, tokens)
    assert found.dtype == FP32
    assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    given[-1, size - 1] = torch.nan
    found = logits.token_logprobs(given, tokens)
    assert found.isnan().tolist() == [False] * (rows - 1) + [True]


@pytest.mark.parametrize("device", ["cpu"])
def test_sum_of_a_part(device):
    """Columns of a longer input taken for rows that follow each other."""
    whole, weight = random(2, 9, 64), torch.ones(64)
    summed, _ = layer.add_and_normalise(whole[:, 2:5], whole[:, 5:8], weight, 1e-6)
    assert summed.is_contiguous() and torch.equal(summed, whole[:, 2:5] + whole[:, 5:8])


@pytest.mark.parametrize("device", ["cpu"])
def test_a_sum_counts_its_changes_in_inference_mode(device):
    """Changes that the norm of the sum cannot notice."""
    with torch.inference_mode():
        summed, _ = layer.add_and_normalise(random(2, 3, 64), random(2, 3, 64), torch.ones(64), 1e-6)
        before = summed._version
        summed.mul_(2)
    assert summed._version > before


# Rotation


def tables(batch, columns, dim, device, dtype):
    """Cosines and sines of other angles in every row and column."""
    angles = 3 * random(batch, columns, dim // 2, seed=5).repeat(1, 1, 2)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


@cases(
    "heads, dim, dtype, rows",
    [*itertools.product([(4, 2), (3, 1)], [16, 80], [FP32, FP16], [1]), ((4, 4), 128, FP16, 3), ((32, 8), 64, FP32, 3)],
    itertools.product([(4, 2), (32, 8), (9, 3)], [16, 64, 80, 96, 128, 256], [FP32, FP16, BF16], [1, 3]),
)
def test_rotation(device, heads, dim, dtype, rows):
    """Halves exchanged, another row's or column's angle, or a rounding that torch does not do: where the merged product
    is, which leaves the values alone, and in a copy, which leaves all alone."""
    columns = 37
    product = random(3, columns, (heads[0] + 2 * heads[1]) * dim, device=device, dtype=dtype)
    cos, sin = tables(rows, columns, dim, device, dtype)

    def split(product):
        widths = [heads[0] * dim, heads[1] * dim, heads[1] * dim]
        return [part.view(3, columns, -1, dim).transpose(1, 2) for part in product.split(widths, dim=-1)]

    query, key, value = split(product.clone())
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    for states, turned in zip((query, key), expected, strict=True):
        before = states.clone()
        output = layer.rotate(states, cos, sin, in_place=False)
        assert torch.equal(output, turned) and torch.equal(states, before)
        assert output.transpose(1, 2).is_contiguous()
    in_place = product.clone()
    for states, turned in zip(split(in_place), expected, strict=False):
        output = layer.rotate(states, cos, sin, in_place=True)
        assert output is states and torch.equal(output, turned)
    assert torch.equal(split(in_place)[2], value)


@cases("dtype", [(FP32,), (FP16,)], [(FP32,), (FP16,), (BF16,)])
def test_rotation_by_the_slots_of_each_row(device, dtype):
    """Strides of tables or states that are taken for those of a merged product: keys of slots, a slice of a table."""
    states, (cos, sin) = random(2, 3, 9, 32, device=device, dtype=dtype), tables(2, 40, 32, device, dtype)
    cos, sin = cos[:, 11:20], sin[:, 11:20]
    expected, _ = apply_rotary_pos_emb(states, states, cos, sin)
    assert torch.equal(layer.rotate(states, cos, sin, in_place=False), expected)


# Gated activation


@cases(
    "shape, dtype",
    itertools.product([(3, 1, 5), (2, 9, 128), (1, 2, 1024), (1, 3, 2050), (1300, 1, 3)], [FP32, FP16]),
    itertools.product([(1, 1, 14336), (2, 1500, 1536), (1, 3, 2050), (70000, 1, 1024), (9, 4, 48)], [FP32, FP16, BF16]),
)
def test_activation_of_many_rows(device, shape, dtype):
    """Gate and up exchanged, a row's up with another's gate, a tail left out, or more rows than a grid's second
    dimension takes."""
    gate_up = 3 * random(*shape[:-1], 2 * shape[-1], device=device, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_within_a_bit(mlp.silu_and_multiply(gate_up), F.silu(gate) * up)
