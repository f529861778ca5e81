"""Shared prefixes on a CUDA device: the CPU's slots in float32, precision in half, and nothing copied for each row."""

import pytest
import torch

import gpu_models
from conftest import (
    assert_close,
    assert_invariants,
    forward,
    left_pad,
    make_llamas,
    new_cache,
    of_llamas,
    prompt,
    uneven,
)
from gpu_models import CUDA_BACKENDS, HALF_CONFIG
from h2optimizer import H2OConfig
from h2optimizer.utils.cache import HHCache

pytestmark = gpu_models.MARKS
on_gpu = gpu_models.on_gpu
gqa_on_gpu = gpu_models.gqa_on_gpu
half_on_gpu = gpu_models.half_on_gpu

SHARED = prompt(70)
OWN = [prompt(33, 1), prompt(5, 2), prompt(17, 3)]


@pytest.mark.parametrize("flags", [
    {"score_norm": "mean"},
    {"score": "value_mass", "position_rolling": True},
    {"score": "random", "slimming": "mask"},
    {"score_queries": 4, "group_reduce": "first"},
    {"head_budgets": uneven, "score": "value_mass", "score_norm": "mean"},
], ids=lambda flags: str({name: getattr(value, "__name__", value) for name, value in flags.items()}))  # fmt: skip
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_float32_is_the_cpus_without_a_prefix(on_gpu, llamas, backend, flags):
    """Slots, mass or logits that the device would give to other tokens than a whole prompt does on the CPU."""
    flags = of_llamas({"window_length": 8, "update_interval": 3, **flags}, llamas)
    whole = HHCache(H2OConfig(backend="eager", **flags))
    on_gpu.h2o.h2o = H2OConfig(backend=backend, **flags)
    prefix = on_gpu.h2o.prefill_prefix(SHARED[50:], prefix=on_gpu.h2o.prefill_prefix(SHARED[:50]))
    after = HHCache(on_gpu.h2o.h2o, prefix=prefix)
    for step, block in enumerate([OWN, *([[token]] * 3 for token in prompt(7))]):
        logits = forward(on_gpu.h2o, block, after)
        expected = forward(llamas.h2o, block if step else [SHARED + row for row in block], whole)
        for b in range(3):
            assert_close(logits[b], expected[b][-len(logits[b]) :], 1e-4)
    for name in ("lengths", "seen", "evictions", "clock"):
        assert getattr(after, name) == getattr(whole, name)
    for layer_idx in range(len(whole.layers)):
        assert after.positions(layer_idx).tolist() == whole.positions(layer_idx).tolist()
    assert_invariants(after)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("rolling", [False, True])
def test_bf16_is_as_precise_as_without_a_prefix(half_on_gpu, backend, rolling):
    """Outputs merged in half precision, or a prefix rounded twice: at most twice the error of whole prompts."""
    exact = make_llamas(**HALF_CONFIG).stock.to("cuda")
    exact.load_state_dict(half_on_gpu.stock.state_dict())
    exact.double()
    flags = {"window_length": 256, "update_interval": 4, "backend": backend, "position_rolling": rolling}
    half_on_gpu.h2o.h2o = H2OConfig(**flags)
    whole = forward(half_on_gpu.h2o, [SHARED + row for row in OWN], new_cache(**flags))
    prefix = half_on_gpu.h2o.prefill_prefix(SHARED)
    after = forward(half_on_gpu.h2o, OWN, cache := HHCache(half_on_gpu.h2o.h2o, prefix=prefix))
    assert cache.lengths == [len(SHARED) + len(row) for row in OWN]
    errors = {"whole": [], "after": []}
    for b, row in enumerate(OWN):
        with torch.no_grad():
            expected = exact(torch.tensor([SHARED + row], device="cuda")).logits[0, len(SHARED) :]
        for name, logits in (("whole", whole[b][-len(row) :]), ("after", after[b])):
            errors[name].append((logits.double() - expected).square().flatten())
    whole, after = (torch.cat(errors[name]).mean().sqrt().item() for name in ("whole", "after"))
    assert after <= 2 * whole


@pytest.mark.parametrize("flags", [{}, {"head_budgets": uneven, "score": "value_mass"}], ids=["even", "uneven"])
def test_recorded_steps_go_on_from_a_prefix(gqa_on_gpu, flags):
    """A graph of an earlier call that is replayed over other slots, or positions that do not count the prefix."""
    model = gqa_on_gpu.h2o
    model.h2o = H2OConfig(window_length=8, update_interval=4, **of_llamas(flags, gqa_on_gpu))
    prefix = model.prefill_prefix(SHARED)
    inputs = left_pad([SHARED + row for row in OWN], "cuda")
    texts = [
        model.generate(**inputs, max_new_tokens=40, do_sample=False, **options).tolist()
        for options in ({}, {"prefix": prefix}, {}, {"prefix": prefix})
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]


def test_nothing_of_a_prefix_is_copied_for_each_row(half_on_gpu):
    """Memory of a forward after a prefix that grows with rows times its tokens."""
    model = half_on_gpu.h2o
    model.h2o = H2OConfig(window_length=64, update_interval=4)
    prefix = model.prefill_prefix(torch.randint(1, 100, (8192,)))
    rows = torch.randint(1, 100, (32, 16), device="cuda")
    cache = HHCache(model.h2o, prefix=prefix)
    with torch.no_grad():
        model(rows, past_key_values=cache, logits_to_keep=1)  # compiles, and allocates the slots
        cache.reset()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(rows, past_key_values=cache, logits_to_keep=1)
        peak = torch.cuda.max_memory_allocated() - before
    keys = prefix.layers[0].keys
    assert peak < len(rows) * keys.nbytes
    assert_invariants(cache)
