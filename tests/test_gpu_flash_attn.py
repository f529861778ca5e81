"""flash-attn, where it is installed."""

import pytest
import torch

import gpu_models
from conftest import GROUPS, assert_close, assert_invariants, forward, make_step, new_cache, prompt
from gpu_models import FLASH_CONFIG, HALF, assert_as_good_as_eager, assert_as_good_as_stock, assert_no_step_waits

pytestmark = gpu_models.MARKS
flash_on_gpu = gpu_models.flash_on_gpu
flash = gpu_models.flash


@pytest.mark.parametrize("group_reduce", ["sum", "first"])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("kv_heads", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", HALF.values(), ids=HALF)
def test_flash_attn_against_float64(flash, case, dtype, kv_heads, scored, group_reduce):
    """Another causal alignment, scale, length or layout of the log-sum-exp than flash-attn has."""
    step = make_step(**case, scored=scored)
    assert_as_good_as_eager(["flash_attn"], step, kv_heads, dtype, 128, group_reduce)


@pytest.mark.parametrize("rolling", [False, True])
def test_flash_attn_under_the_model_is_as_good_as_stock(flash, flash_on_gpu, rolling):
    """Precision lost in what the model hands to flash-attn, or slots that it should not see."""
    flags = {"backend": "flash_attn", "score_every_step": False, "position_rolling": rolling}
    assert_as_good_as_stock(flash_on_gpu, FLASH_CONFIG, **flags)


@pytest.mark.parametrize("rolling", [False, True])
def test_flash_attn_keeps_what_eager_keeps(flash, flash_on_gpu, rolling):
    """Scores that go wrong beside flash-attn: ragged prompts, decode steps and a ragged turn, up to rounding."""
    flags = {"window_length": 24, "update_interval": 4, "score_every_step": False, "position_rolling": rolling}
    eager, ours = (new_cache(**flags, backend=backend) for backend in ("eager", "flash_attn"))
    steps = [[[token] for token in tokens] for tokens in zip(*(prompt(9, seed) for seed in (1, 2, 3)), strict=True)]
    for block in ([prompt(60), prompt(9), prompt(31)], *steps, [prompt(7), prompt(20), prompt(1)], *steps):
        for cache in (eager, ours):
            assert not any(logits.isnan().any() for logits in forward(flash_on_gpu.h2o, block, cache))
        assert_invariants(ours)
        assert (ours.lengths, ours.seen, ours.evictions) == (eager.lengths, eager.seen, eager.evictions)
        # Layer 0 sees the same inputs up to its own rounding; a slot or two may fall to another token.
        assert (ours.positions(0) == eager.positions(0)).float().mean() > 0.8
        assert_close(ours.layers[0].slots.mass.sum(-1), eager.layers[0].slots.mass.sum(-1), 0.05)


@pytest.mark.parametrize("flags", [
    {"score_every_step": False}, {"score": "sink"}, {"num_heavy_hitters": 0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("lengths", [(13, 13), (13, 3)], ids=["alike", "ragged"])
def test_unscored_steps_run_flash_attn_on_the_slots(monkeypatch, flash, flash_on_gpu, lengths, flags):
    """A copy of the cache, repeated KV heads, or another kernel where flash-attn was asked for."""
    calls, original = [], flash.flash_attn_with_kvcache

    def spy(q, k, v, **settings):
        calls.append((k.data_ptr(), v.data_ptr(), k.shape, k.stride(3)))
        return original(q, k, v, **settings)

    monkeypatch.setattr(flash, "flash_attn_with_kvcache", spy)
    cache = new_cache(window_length=8, update_interval=4, backend="flash_attn", **flags)
    forward(flash_on_gpu.h2o, [prompt(length) for length in lengths], cache)
    for token in range(1, 9):
        calls.clear()
        forward(flash_on_gpu.h2o, [[token], [token]], cache)
        if cache.h2o.needs_mass and (cache.clock - 1) % 4 == 0:  # scored: by our own kernel
            assert not calls
            continue
        assert [call[:2] for call in calls] == [(la.keys.data_ptr(), la.values.data_ptr()) for la in cache.layers]
        for _, _, (batch_size, width, kv_heads, head_dim), stride in calls:
            assert (batch_size, kv_heads, head_dim, stride) == (2, 2, 128, 1) and width <= cache.h2o.capacity


@pytest.mark.parametrize("flags", [
    {"score_every_step": False}, {"score": "random"}, {"score_every_step": False, "position_rolling": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("lengths", [(13, 13), (13, 3)], ids=["alike", "ragged"])
def test_a_step_with_flash_attn_never_waits(flash, flash_on_gpu, lengths, flags):
    """Lengths that are fetched for flash-attn or copied to it from pageable memory."""
    assert_no_step_waits(flash_on_gpu.h2o, lengths, {"update_interval": 4, "backend": "flash_attn", **flags})
