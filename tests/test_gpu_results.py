"""The CPU's tokens, mass, fidelity and scores on a CUDA device, and its precision in half."""

import pytest
import torch

import gpu_models
from conftest import (
    GROUPS,
    SCALING,
    Llamas,
    assert_close,
    assert_invariants,
    assert_same_cache,
    by_head,
    forward,
    generate,
    make_llamas,
    make_states,
    make_step,
    new_cache,
    of_llamas,
    own_columns,
    prompt,
    uneven,
)
from gpu_models import CUDA_BACKENDS, HALF, HALF_CONFIG, assert_as_good_as_eager, assert_as_good_as_stock
from h2optimizer import H2OConfig, float8
from h2optimizer.attention import Inputs
from h2optimizer.backends import ATTENTION_BACKENDS, resolve_backend
from h2optimizer.fidelity import compare
from h2optimizer.likelihood import log_likelihoods_in_batches
from utils.cache import HHCache

pytestmark = gpu_models.MARKS
on_gpu = gpu_models.on_gpu
gqa_on_gpu = gpu_models.gqa_on_gpu
half_on_gpu = gpu_models.half_on_gpu


def test_auto_is_triton():
    """The slow path taken in silence on the device that the kernels are for."""
    assert resolve_backend("auto", "cuda") == "triton"


# Tokens and slots


@pytest.mark.parametrize("flags", [
    {"update_interval": 1},
    {"update_interval": 4, "position_rolling": True},
    {"update_interval": 4, "slimming": "mask", "score_norm": "mean", "score_decay": 0.5},
    {"update_interval": 3, "score_every_step": False, "score_queries": 4, "group_reduce": "first"},
    {"update_interval": 3, "score": "random"},
    {"update_interval": 3, "num_heavy_hitters": 0},
    {"update_interval": 4, "prefill_chunk": 5, "position_rolling": True, "score_decay": 0.5},
    {"update_interval": 4, "prefill_chunk": 4, "score_queries": 3, "score_norm": "mean"},
    {"update_interval": 4, "score": "value_mass", "num_heavy_hitters": "3/4"},
    {"update_interval": 3, "head_budgets": uneven, "score": "value_mass", "score_norm": "mean"},
    {"update_interval": 4, "head_budgets": uneven, "prefill_chunk": 5, "position_rolling": True},
], ids=lambda flags: str({name: getattr(value, "__name__", value) for name, value in flags.items()}))  # fmt: skip
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("lengths", [(13,), (13, 3, 8)], ids=["one row", "left-padded"])
def test_float32_is_the_cpus(on_gpu, llamas, lengths, backend, flags):
    """A kernel, a sort or a hash that the device does in another way: other slots are kept, other tokens come out."""
    rows, results, caches, flags = [prompt(length) for length in lengths], [], [], of_llamas(flags, llamas)
    for pair, chosen in ((llamas, "eager"), (on_gpu, backend)):
        pair.h2o.h2o = H2OConfig(window_length=8, backend=chosen, **flags)
        caches.append(HHCache(pair.h2o.h2o))
        results.append(generate(pair.h2o, rows, 15, past_key_values=caches[-1]))
    assert results[1].sequences.tolist() == results[0].sequences.tolist()
    assert_close(torch.stack(results[1].logits), torch.stack(results[0].logits), 1e-4)
    cpu, gpu = caches
    assert (gpu.lengths, gpu.seen, gpu.evictions) == (cpu.lengths, cpu.seen, cpu.evictions)
    assert_invariants(gpu)
    for layer_idx in range(len(gpu.layers)):
        assert gpu.positions(layer_idx).tolist() == cpu.positions(layer_idx).tolist()
        if gpu.h2o.needs_mass:
            assert_close(by_head(gpu, layer_idx, "mass"), by_head(cpu, layer_idx, "mass"), 1e-4)


def test_both_slimmings_leave_the_same_cache(gqa_on_gpu):
    """update_slimming and update_slimmingH that part ways on the device."""
    caches = []
    for slimming in ("H", "mask"):
        cache = new_cache(window_length=8, update_interval=3, slimming=slimming, backend="sdpa")
        forward(gqa_on_gpu.h2o, [prompt(13), prompt(3), prompt(8)], cache)
        for token in range(1, 12):
            forward(gqa_on_gpu.h2o, [[token]] * 3, cache)
        forward(gqa_on_gpu.h2o, [prompt(4), prompt(7), prompt(2)], cache)
        caches.append(cache)
    assert_same_cache(*caches)


def test_half_precision_generates_ragged_batches(half_on_gpu):
    """bf16 slots moved, padded and slimmed: a padded row's slots are, but for rounding, what it has alone."""
    flags = {"window_length": 24, "update_interval": 4}
    rows, steps = [prompt(60), prompt(9), prompt(31)], prompt(13, 1)
    together = new_cache(**flags)
    for block in (rows, *([[token]] * 3 for token in steps)):
        logits = forward(half_on_gpu.h2o, block, together)
        assert not any(row.isnan().any() for row in logits)
    assert_invariants(together)
    for b, row in enumerate(rows):
        alone = new_cache(**flags)
        for block in ([row], *([[token]] for token in steps)):
            forward(half_on_gpu.h2o, block, alone)
        assert (together.lengths[b], together.seen[b]) == (alone.lengths[0], alone.seen[0])
        assert together.evictions[b] == alone.evictions[0]
        length = alone.lengths[0]
        # Layer 0 sees the same inputs up to its own rounding; a slot or two may fall to another token.
        same = together.positions(0)[b, :, :length] == alone.positions(0)[0]
        assert same.float().mean() > 0.8
        assert_close(together.layers[0].slots.mass[b].sum(), alone.layers[0].slots.mass[0].sum(), 0.05)


# Half precision


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_bf16_with_a_wide_window_is_as_good_as_stock(half_on_gpu, backend, rolling):
    """Precision lost where stock Llama keeps it: at most twice stock's own error against float64."""
    assert_as_good_as_stock(half_on_gpu, HALF_CONFIG, backend=backend, position_rolling=rolling)


@pytest.mark.parametrize("flags", [{}, {"position_rolling": True}, {"prefill_chunk": 33}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_layers_are_as_good_as_stock(dtype, flags):
    """Precision lost between the merged products of a prompt, with padding and in chunks."""
    llamas = Llamas(*(model.to("cuda") for model in make_llamas(**HALF_CONFIG, dtype=dtype)))
    llamas.h2o.merge_projections()
    assert all(layer.mlp.merged.weight is not None for layer in llamas.h2o.model.layers)
    assert_as_good_as_stock(llamas, HALF_CONFIG, backend="triton", **flags)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", ["prefill", "prefill, last queries"])
def test_a_merged_product_is_attended_where_it_is(case, dim):
    """Strides that a kernel does not take or takes wrongly, or an output that the next product would have to copy."""
    step = make_step(**HALF[case])
    states = make_states(step, 2, torch.bfloat16, dim, device="cuda")
    product = torch.cat([of.transpose(1, 2).flatten(2) for of in states], dim=-1)
    parts = product.split([of.shape[1] * dim for of in states], dim=-1)
    views = [part.view(*part.shape[:2], -1, dim).transpose(1, 2) for part in parts]
    results = [ATTENTION_BACKENDS["triton"](Inputs(*of, step, SCALING, "sum")) for of in (views, states)]
    (output, mass), (expected, expected_mass) = results
    assert output.transpose(1, 2).is_contiguous()
    assert_close(own_columns(output, step), own_columns(expected, step), 1e-2)
    assert_close(mass, expected_mass, 1e-4)


@pytest.mark.parametrize("group_reduce", ["sum", "first"])
@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("kv_heads", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", HALF.values(), ids=HALF)
def test_output_and_mass_against_float64(case, dtype, kv_heads, head_dim, group_reduce):
    """Logits or sums rounded to half on the way to the mass, or an output worse than twice the eager reference's."""
    backends = dict.fromkeys(resolve_backend(name, "cuda") for name in CUDA_BACKENDS)
    assert_as_good_as_eager(backends, make_step(**case), kv_heads, dtype, head_dim, group_reduce)


# Fidelity and scores through the cache


@pytest.mark.parametrize("flags", [{}, {"position_rolling": True}, {"score": "random"}], ids=str)
def test_fidelity_is_the_cpus(gqa, gqa_on_gpu, flags):
    """Kernels that keep other tokens than torch does, or figures and positions that mix up devices."""
    rows, texts = [prompt(40), prompt(23, 1)], [prompt(9, 3), prompt(24, 4)]
    found = []
    for llamas in (gqa, gqa_on_gpu):
        llamas.h2o.h2o = H2OConfig(window_length=12, update_interval=4, **flags)
        found.append(compare(llamas.stock, llamas.h2o, rows, texts, follow=1))
    (cpu, kept), (gpu, kept_there) = found
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert vars(ours) == pytest.approx(vars(theirs), rel=1e-3, abs=1e-3)
    assert torch.equal(kept_there.last_held, kept.last_held)


def test_half_precision_fidelity_is_near_exact_at_a_wide_window(half_on_gpu):
    """A full cache and a cache that evicts nothing that differ by more than rounding."""
    half_on_gpu.h2o.h2o = H2OConfig(window_length=128, update_interval=4)
    fidelity, _ = compare(half_on_gpu.stock, half_on_gpu.h2o, [prompt(40), prompt(23, 1)], [prompt(24, 4)] * 2)
    for row in fidelity:
        assert row.kl / row.tokens < 0.01 and row.mass_lost / row.tokens < 1e-2


@pytest.mark.parametrize("batch", [1, 4])
def test_scores_are_the_cpus(gqa, gqa_on_gpu, batch):
    """Log-likelihoods of rows that share a context, through kernels."""
    pairs = [(prompt(30), prompt(n, n)) for n in (1, 6, 9)] + [(prompt(17, 1), prompt(5, 2))]
    found = []
    for llamas in (gqa, gqa_on_gpu):
        llamas.h2o.h2o = H2OConfig(window_length=12, update_interval=2)
        found.append(dict(log_likelihoods_in_batches(llamas.h2o, pairs, batch, dtype=torch.float32)))
    for i in range(len(pairs)):
        assert found[1][i].logprob == pytest.approx(found[0][i].logprob, rel=1e-3, abs=1e-3)
        assert found[1][i][1:] == found[0][i][1:]


# Float8


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no float8 products"
)
@pytest.mark.parametrize("rows, size", [(1, 4096), (7, 14336), (300, 512), (70_000, 64)])
def test_float8_products(rows, size):
    """Numbers cut off where torch rounds, a tail that is read from the next row, scales of other rows, more rows than
    a grid's second axis has, or zeros divided by zero."""
    chance = torch.Generator("cuda").manual_seed(0)
    inputs, weight = (
        torch.randn(n, size, generator=chance, device="cuda").mul(2.0 ** (n % 5)).bfloat16() for n in (rows, 128)
    )
    inputs[rows // 2, 1:] = 0
    inputs[-1:] *= rows == 1
    numbers, scales = float8.quantize_rows(inputs)
    top = inputs.float().abs().amax(-1, keepdim=True).clamp(min=float8.LEAST)
    largest = torch.full_like(top, float8.LARGEST)  # torch divides by a number through its reciprocal
    assert torch.equal(scales, top / largest)
    assert torch.equal(numbers.float(), (inputs.float() * (largest / top)).to(torch.float8_e4m3fn).float())
    of_weight = float8.quantize_rows(weight)
    expected = (numbers.double() * scales.double()) @ (of_weight[0].double() * of_weight[1].double()).T
    product = float8.linear(inputs[None], *of_weight)[0]
    assert product.dtype == torch.bfloat16 and product.isfinite().all()
    assert (product.double() - expected).norm() < 0.01 * expected.norm()
