"""What only a CUDA device can show: the CPU's tokens, decode steps that never wait for it, memory that stays flat, and
flash-attn where it is installed."""

import contextlib
import copy
import gc

import pytest
import torch

from conftest import (
    GROUPS,
    HEADS,
    SCALING,
    Llamas,
    addresses,
    assert_close,
    assert_invariants,
    forward,
    generate,
    left_pad,
    make_llamas,
    make_states,
    make_step,
    new_cache,
    own_columns,
    plain_attention,
    prompt,
    slot_tensors,
)
from h2optimizer import H2OConfig, attention
from utils.cache import HHCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA_BACKENDS = ("eager", "sdpa", "triton", "auto")


@pytest.fixture(scope="module")
def on_gpu(llamas):
    return Llamas(*(copy.deepcopy(model).to("cuda") for model in llamas))


@pytest.fixture(scope="module")
def gqa_on_gpu(gqa):
    return Llamas(*(copy.deepcopy(model).to("cuda") for model in gqa))


HALF_CONFIG = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.06}
FLASH_CONFIG = {"hidden_size": 512, "intermediate_size": 1024, "initializer_range": 0.04}  # a head_dim of 128


@pytest.fixture(scope="module")
def half_on_gpu():
    """A bf16 model with a head_dim of real Llamas, and logits that are no coin toss in bf16."""
    return Llamas(*(model.to("cuda") for model in make_llamas(**HALF_CONFIG, dtype=torch.bfloat16)))


@pytest.fixture(scope="module")
def flash_on_gpu():
    return Llamas(*(model.to("cuda") for model in make_llamas(**FLASH_CONFIG, dtype=torch.bfloat16)))


@pytest.fixture
def flash():
    """The flash-attn module."""
    try:
        return attention.find_flash_attn()
    except ValueError as error:
        pytest.skip(str(error))


def test_auto_is_triton():
    """The slow path taken in silence on the device that the kernels are for."""
    assert attention.resolve_backend("auto", "cuda") == "triton"


# The CPU's results


@pytest.mark.parametrize("flags", [
    {"update_interval": 1},
    {"update_interval": 4, "position_rolling": True},
    {"update_interval": 4, "slimming": "mask", "score_norm": "mean", "score_decay": 0.5},
    {"update_interval": 3, "score_every_step": False, "score_queries": 4, "group_reduce": "first"},
    {"update_interval": 3, "score": "random"},
    {"update_interval": 3, "num_heavy_hitters": 0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("lengths", [(13,), (13, 3, 8)], ids=["one row", "left-padded"])
def test_float32_is_the_cpus(on_gpu, llamas, lengths, backend, flags):
    """A kernel, a sort or a hash that the device does in another way: other slots are kept, other tokens come out."""
    rows, results, caches = [prompt(length) for length in lengths], [], []
    for pair, chosen in ((llamas, "eager"), (on_gpu, backend)):
        pair.h2o.h2o = H2OConfig(window_length=8, backend=chosen, **flags)
        caches.append(HHCache(pair.h2o.h2o))
        results.append(generate(pair.h2o, rows, 15, past_key_values=caches[-1]))
    assert results[1].sequences.tolist() == results[0].sequences.tolist()
    assert_close(torch.stack(results[1].logits), torch.stack(results[0].logits), 1e-4)
    cpu, gpu = caches
    assert (gpu.lengths, gpu.seen, gpu.evictions) == (cpu.lengths, cpu.seen, cpu.evictions)
    assert_invariants(gpu)
    for layer_idx, (layer, expected) in enumerate(zip(gpu.layers, cpu.layers, strict=True)):
        assert gpu.positions(layer_idx).tolist() == cpu.positions(layer_idx).tolist()
        if gpu.h2o.needs_mass:
            assert_close(layer.mass, expected.mass, 1e-4)


def test_both_slimmings_leave_the_same_bits(gqa_on_gpu):
    """update_slimming and update_slimmingH that part ways on the device."""
    tensors = []
    for slimming in ("H", "mask"):
        cache = new_cache(window_length=8, update_interval=3, slimming=slimming, backend="sdpa")
        forward(gqa_on_gpu.h2o, [prompt(13), prompt(3), prompt(8)], cache)
        for token in range(1, 12):
            forward(gqa_on_gpu.h2o, [[token]] * 3, cache)
        forward(gqa_on_gpu.h2o, [prompt(4), prompt(7), prompt(2)], cache)
        tensors.append(slot_tensors(cache))
    for where, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][where]), where


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_bf16_with_a_wide_window_is_as_good_as_stock(half_on_gpu, backend, rolling):
    """Precision lost where stock Llama keeps it: at most twice stock's own error against float64."""
    assert_as_good_as_stock(half_on_gpu, HALF_CONFIG, backend=backend, position_rolling=rolling)


def assert_as_good_as_stock(llamas, config, **flags):
    """The logits of two rows over 12 decode steps, nothing evicted, by their error against float64."""
    rows, steps = [prompt(90), prompt(41)], prompt(12, 1)
    exact = make_llamas(**config).stock.to("cuda")
    exact.load_state_dict(llamas.stock.state_dict())
    exact.double()

    def errors(run):
        """The root mean square error of a model's logits, over both rows and all steps."""
        squares = []
        for b, row in enumerate(rows):
            with torch.no_grad():
                expected = exact(torch.tensor([row + steps], device="cuda")).logits[0, len(row) - 1 :]
            squares.append((run[b].double() - expected).square().flatten())
        return torch.cat(squares).mean().sqrt().item()

    stock = []
    for row in rows:
        with torch.no_grad():
            stock.append(llamas.stock(torch.tensor([row + steps], device="cuda")).logits[0, len(row) - 1 :])
    cache = new_cache(window_length=128, update_interval=4, **flags)
    ours = [[logits[-1]] for logits in forward(llamas.h2o, rows, cache)]
    for token in steps:
        for kept, logits in zip(ours, forward(llamas.h2o, [[token]] * 2, cache), strict=True):
            kept.append(logits[-1])
    assert cache.evictions == [0, 0] and cache.layers[0].mass.dtype == torch.float32
    assert errors([torch.stack(kept) for kept in ours]) <= 2 * errors(stock)


HALF = {
    "prefill": dict(start=[0, 0], new=[300, 171]),
    "prefill, last queries": dict(start=[0, 0], new=[300, 171], score_queries=32),
    "decode": dict(start=[260, 260], new=[1, 1], decode=True),
    "ragged decode": dict(start=[260, 77], new=[1, 1], decode=True),
    "ragged turn": dict(start=[130, 64], new=[20, 33]),
}


@pytest.mark.parametrize("group_reduce", ["sum", "first"])
@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("kv_heads", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", HALF.values(), ids=HALF)
def test_output_and_mass_against_float64(case, dtype, kv_heads, head_dim, group_reduce):
    """Logits or sums rounded to half on the way to the mass, or an output worse than twice the eager reference's."""
    backends = dict.fromkeys(attention.resolve_backend(name, "cuda") for name in CUDA_BACKENDS)
    assert_as_good_as_eager(backends, make_step(**case), kv_heads, dtype, head_dim, group_reduce)


def assert_as_good_as_eager(backends, step, kv_heads, dtype, head_dim, group_reduce):
    """An output at most twice as far from float64 as the eager reference's, and the exact mass of the states."""
    states = make_states(step, kv_heads, dtype, head_dim, device="cuda")
    exact_output, exact_mass = plain_attention(*states, step, group_reduce)
    errors = {}
    for backend in ("eager", *backends):
        output, mass = attention.ATTENTION_BACKENDS[backend](*states, step, SCALING, group_reduce)
        assert output.dtype == dtype
        if step.scored:
            assert mass.dtype == torch.float32
            assert_close(mass, exact_mass, 1e-4, what=backend)
            for b, (start, new) in enumerate(zip(step.start, step.new, strict=True)):
                assert not mass[b, :, start + new :].any(), "mass where the row has no slot"
        else:
            assert mass is None
        error = own_columns(output, step).double().cpu() - own_columns(exact_output, step)
        errors[backend] = error.abs().max().item()
    for backend, error in errors.items():
        assert error <= 2 * errors["eager"] + 1e-5, backend


# No wait for the device, no new memory


@contextlib.contextmanager
def no_host_waits():
    """Any operation that makes the host wait for the device raises in here."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_host_waits_are_noticed():
    """The guard of the tests below: a debug mode that notices nothing."""
    count = torch.ones(1, device="cuda")
    with no_host_waits(), pytest.raises(RuntimeError, match="synchronizing"):
        count.item()


SYNC_FLAGS = {
    "H2O": {"update_interval": 1},
    "rotation": {"update_interval": 4},
    "rolling": {"update_interval": 4, "position_rolling": True},
    "mean": {"update_interval": 4, "score_norm": "mean", "score_decay": 0.5},
    "pure attention between": {"update_interval": 4, "score_every_step": False},
    "first head": {"update_interval": 4, "group_reduce": "first"},
    "sink": {"update_interval": 4, "score": "sink"},
    "random": {"update_interval": 4, "score": "random"},
    "local": {"update_interval": 4, "num_heavy_hitters": 0},
}


@pytest.mark.parametrize("flags", SYNC_FLAGS.values(), ids=SYNC_FLAGS)
@pytest.mark.parametrize("lengths", [(13, 13), (13, 3)], ids=["alike", "ragged"])
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_a_decode_step_never_waits_for_the_device(gqa_on_gpu, backend, lengths, flags):
    """A length, a mask or a position fetched from the device, or copied to it from pageable memory and waited for, on
    due or skipped steps: every layer of every step would stall the queue."""
    assert_no_step_waits(gqa_on_gpu.h2o, lengths, {**flags, "backend": backend})


def assert_no_step_waits(model, lengths, flags):
    """Three rotations of decode steps under the guard, after as many without."""
    cache = new_cache(window_length=8, slimming="H", **flags)
    for guard in (contextlib.nullcontext, no_host_waits):  # what is set up or compiled at first use may wait
        cache.reset()
        forward(model, [prompt(length) for length in lengths], cache)
        token = torch.tensor([[5], [6]], device="cuda")
        with torch.no_grad(), guard():
            for _ in range(3 * flags["update_interval"] + 2):
                outputs = model(token, past_key_values=cache)
                token = outputs.logits[:, -1:].argmax(-1)
    assert cache.clock == 3 * flags["update_interval"] + 3
    assert_invariants(cache)


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
        assert_close(together.layers[0].mass[b].sum(), alone.layers[0].mass[0].sum(), 0.05)


# flash-attn


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
        assert_close(ours.layers[0].mass.sum(-1), eager.layers[0].mass.sum(-1), 0.05)


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
