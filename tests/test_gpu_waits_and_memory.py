"""Decode steps that never wait for the CUDA device, and memory that stays flat."""

import gc

import pytest
import torch

import gpu_models
from conftest import HEADS, addresses, forward, generate, left_pad, new_cache, of_llamas, prompt, slot_tensors
from gpu_models import CUDA_BACKENDS, SYNC_FLAGS, assert_no_step_waits, no_host_waits
from h2optimizer import H2OConfig, attention
from h2optimizer.utils.cache import HHCache

pytestmark = gpu_models.MARKS
gqa_on_gpu = gpu_models.gqa_on_gpu
half_on_gpu = gpu_models.half_on_gpu


def test_host_waits_are_noticed():
    """The guard of the tests below: a debug mode that notices nothing."""
    count = torch.ones(1, device="cuda")
    with no_host_waits(), pytest.raises(RuntimeError, match="synchronizing"):
        count.item()


@pytest.mark.parametrize("flags", SYNC_FLAGS.values(), ids=SYNC_FLAGS)
@pytest.mark.parametrize("lengths", [(13, 13), (13, 3)], ids=["alike", "ragged"])
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_a_decode_step_never_waits_for_the_device(gqa_on_gpu, backend, lengths, flags):
    """A length, a mask or a position fetched from the device, or copied to it from pageable memory and waited for, on
    due or skipped steps: every layer of every step would stall the queue."""
    assert_no_step_waits(gqa_on_gpu.h2o, lengths, {**of_llamas(flags, gqa_on_gpu), "backend": backend})


def test_reordering_beams_of_one_length_does_not_wait(gqa_on_gpu):
    """A beam order fetched from the device between steps."""
    cache = new_cache(window_length=8, update_interval=2)
    forward(gqa_on_gpu.h2o, [prompt(12), prompt(12, 1)], cache)
    order, token = torch.tensor([1, 1], device="cuda"), torch.tensor([[5], [6]], device="cuda")
    with torch.no_grad(), no_host_waits():
        for _ in range(5):
            gqa_on_gpu.h2o(token, past_key_values=cache)
            cache.reorder_cache(order)
    for tensor in slot_tensors(cache).values():
        assert torch.equal(tensor[0], tensor[1])


# Memory


@pytest.mark.parametrize("slimming", ["H", "mask"])
def test_addresses_never_change(gqa_on_gpu, slimming):
    """Slots that are allocated anew on the way: no captured graph would survive it."""
    gqa_on_gpu.h2o.h2o = H2OConfig(window_length=8, update_interval=3, slimming=slimming, score_norm="mean")
    cache = HHCache(gqa_on_gpu.h2o.h2o)
    forward(gqa_on_gpu.h2o, [prompt(12), prompt(5)], cache)
    at = addresses(cache)
    for rows in ([prompt(20), prompt(1)], [prompt(3), prompt(4)]):
        cache.reset()
        generate(gqa_on_gpu.h2o, rows, 12, past_key_values=cache)
        cache.evict_for_space(2)
        forward(gqa_on_gpu.h2o, [prompt(2), prompt(9)], cache)
        cache.reorder_cache(torch.tensor([1, 0], device="cuda"))
        assert addresses(cache) == at
    assert all(tensor.is_cuda for tensor in slot_tensors(cache).values())


@pytest.mark.parametrize("lengths", [(40, 40), (40, 9)], ids=["alike", "ragged"])
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_memory_is_flat_over_200_decode_steps(gqa_on_gpu, backend, lengths):
    """Anything that grows with the tokens: positions, plans, masks, a block that is kept."""
    gc.collect()  # nothing of an earlier test may be let go of on the way
    cache = new_cache(window_length=32, update_interval=8, backend=backend)
    forward(gqa_on_gpu.h2o, [prompt(length) for length in lengths], cache)
    token = torch.tensor([[5], [6]], device="cuda")
    held, peaks = [], []
    with torch.no_grad():
        for step in range(200):
            if step % 40 == 0:  # a multiple of the interval: every stretch holds the same steps
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            gqa_on_gpu.h2o(token, past_key_values=cache)
            held.append(torch.cuda.memory_allocated())
            if step % 40 == 39:
                peaks.append(torch.cuda.max_memory_allocated())
    assert cache.seen == [length + 200 for length in lengths] and min(cache.evictions) >= 20
    assert len(set(held[40:])) == 1, "memory held between steps"
    assert len(set(peaks[1:])) == 1, "memory used at once"


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_prefill_memory_is_linear_in_the_prompt(monkeypatch, half_on_gpu, backend):
    """An n x n tensor at 8k tokens: 20.7 GiB at Llama-2-7B's size in the predecessor, out of memory at 32k."""
    n = 8192
    monkeypatch.setattr(attention, "BLOCK_BYTES", 2 * 4 * HEADS * 32 * n)
    inputs = left_pad([prompt(n)], "cuda")
    del inputs["attention_mask"]
    cache = new_cache(window_length=64, update_interval=8, backend=backend)
    with torch.no_grad():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        half_on_gpu.h2o(**inputs, past_key_values=cache, logits_to_keep=1)
        peak = torch.cuda.max_memory_allocated() - before
    assert cache.lengths == [64]
    assert peak < 4 * n * n, "one head's logits in float32 would not fit"


def test_prefill_memory_in_chunks_is_the_chunks(half_on_gpu):
    """Keys, values or states of a whole prompt that are kept while its chunks are computed."""
    peaks, (short, long) = [], (4096, 65536)
    for n in (short, long, short, long):  # the first compiles
        inputs = torch.tensor([prompt(n)], device="cuda")
        cache = new_cache(window_length=64, update_interval=8, prefill_chunk=1024, position_rolling=True)
        with torch.no_grad():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            half_on_gpu.h2o(inputs, past_key_values=cache, logits_to_keep=1)
            peaks.append(torch.cuda.max_memory_allocated() - before)
        assert (cache.seen, cache.lengths) == ([n], [64])
    assert peaks[3] - peaks[2] < 32 * (long - short), "more than a token's number and column"
