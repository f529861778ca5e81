"""What only a CUDA device can show: the CPU's tokens, decode steps that never wait for it, memory that stays flat, and
flash-attn where it is installed."""

import contextlib
import copy
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints import make_checkpoint, make_requests, write_requests
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
from h2optimizer import H2OConfig, attention, generation
from h2optimizer.attention import Inputs, find_flash_attn
from h2optimizer.backends import ATTENTION_BACKENDS, resolve_backend
from h2optimizer.batching import Batcher, Sequence
from h2optimizer.decoder import Decoder
from h2optimizer.fidelity import compare
from h2optimizer.likelihood import log_likelihoods_in_batches
from h2optimizer.streaming import Stream
from utils.cache import HHCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).resolve().parents[1]
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
        return find_flash_attn()
    except ValueError as error:
        pytest.skip(str(error))


def test_auto_is_triton():
    """The slow path taken in silence on the device that the kernels are for."""
    assert resolve_backend("auto", "cuda") == "triton"


# The CPU's results


@pytest.mark.parametrize("flags", [
    {"update_interval": 1},
    {"update_interval": 4, "position_rolling": True},
    {"update_interval": 4, "slimming": "mask", "score_norm": "mean", "score_decay": 0.5},
    {"update_interval": 3, "score_every_step": False, "score_queries": 4, "group_reduce": "first"},
    {"update_interval": 3, "score": "random"},
    {"update_interval": 3, "num_heavy_hitters": 0},
    {"update_interval": 4, "prefill_chunk": 5, "position_rolling": True, "score_decay": 0.5},
    {"update_interval": 4, "prefill_chunk": 4, "score_queries": 3, "score_norm": "mean"},
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
            assert_close(layer.slots.mass, expected.slots.mass, 1e-4)


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
    assert cache.evictions == [0, 0] and cache.layers[0].slots.mass.dtype == torch.float32
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
    backends = dict.fromkeys(resolve_backend(name, "cuda") for name in CUDA_BACKENDS)
    assert_as_good_as_eager(backends, make_step(**case), kv_heads, dtype, head_dim, group_reduce)


def assert_as_good_as_eager(backends, step, kv_heads, dtype, head_dim, group_reduce):
    """An output at most twice as far from float64 as the eager reference's, and the exact mass of the states."""
    states = make_states(step, kv_heads, dtype, head_dim, device="cuda")
    exact_output, exact_mass = plain_attention(*states, step, group_reduce)
    errors = {}
    for backend in ("eager", *backends):
        output, mass = ATTENTION_BACKENDS[backend](Inputs(*states, step, SCALING, group_reduce))
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


# Decode from graphs


GRAPH_FLAGS = SYNC_FLAGS | {
    "rolling, pure attention between": {"update_interval": 4, "score_every_step": False, "position_rolling": True},
    "local": {"update_interval": 16, "num_heavy_hitters": 0},
}


@pytest.fixture
def fresh(gqa_on_gpu, half_on_gpu):
    """Models that keep no caches of earlier tests."""
    for model in (gqa_on_gpu.h2o, half_on_gpu.h2o):
        model.kept_caches.clear()
    yield
    for model in (gqa_on_gpu.h2o, half_on_gpu.h2o):
        model.kept_caches.clear()


@pytest.fixture
def captured(monkeypatch, fresh):
    """A list that grows by one with each generate that decodes from graphs."""
    taken, original = [], generation.sample
    monkeypatch.setattr(generation, "sample", lambda *args, **kwargs: taken.append(1) or original(*args, **kwargs))
    return taken


def kept_decoder(model):
    """The decoder of the cache that generate used last."""
    cache = next(reversed(model.kept_caches._caches.values()))
    return next(reversed(model.kept_caches.decoders[cache].values()))


def tokens_of(model, rows, capture, new_tokens, flags, **settings):
    model.h2o = H2OConfig(**{"window_length": 8, "capture": capture, **flags})
    torch.manual_seed(3)
    settings = {"do_sample": False, "max_new_tokens": new_tokens, **settings}
    return model.generate(**left_pad(rows, "cuda"), **settings).tolist()


def graphs_of(h2o) -> set[str]:
    """The names of the graphs that steps under these flags are recorded as."""
    if not h2o.needs_mass:
        return {"unscored", "slimming"}
    between = set() if h2o.score_every_step or h2o.update_interval == 1 else {"unscored"}
    return {"scored", "slimming"} | between


@pytest.mark.parametrize("flags", GRAPH_FLAGS.values(), ids=GRAPH_FLAGS)
@pytest.mark.parametrize("lengths", [(13,), (13, 3, 8), (40, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replayed_tokens_are_the_stock_loops(gqa_on_gpu, half_on_gpu, captured, dtype, lengths, flags):
    """Anything that a graph holds fixed and that changes from step to step, bit for bit; or graphs that are recorded
    and never replayed."""
    model = (gqa_on_gpu if dtype == "float32" else half_on_gpu).h2o
    rows, new_tokens = [prompt(length) for length in lengths], 3 * flags["update_interval"] + 33
    tokens = tokens_of(model, rows, True, new_tokens, flags)
    decoder = kept_decoder(model)
    assert decoder.static and set(decoder._graphs) == graphs_of(model.h2o)
    again = tokens_of(model, rows, True, new_tokens, flags)
    assert kept_decoder(model) is decoder and len(captured) == 2
    assert tokens == again == tokens_of(model, rows, False, new_tokens, flags)
    assert len(captured) == 2


def assert_same_slots(cache, expected):
    """What the device holds is what the host counts and, bit for bit, what the other cache holds."""
    assert cache._rows.mirror(cache.layers[0].device).tolist() == [cache.lengths, cache.seen]
    assert_invariants(cache)
    for layer_idx, (layer, other) in enumerate(zip(cache.layers, expected.layers, strict=True)):
        assert torch.equal(cache.positions(layer_idx), expected.positions(layer_idx))
        for b, length in enumerate(cache.lengths):
            ours, theirs = layer.slots.tensors(), other.slots.tensors()
            for name in ours:
                assert torch.equal(ours[name][b, :, :length], theirs[name][b, :, :length]), name


@pytest.mark.parametrize("flags", GRAPH_FLAGS.values(), ids=GRAPH_FLAGS)
def test_replayed_caches_are_the_stock_loops(gqa_on_gpu, captured, flags):
    """Slots, mass or counts on the device that part from what the host counts, or a second turn that begins wrong."""
    model, rows, caches = gqa_on_gpu.h2o, [prompt(13), prompt(3), prompt(8)], []
    for capture in (True, False):
        cache = new_cache(window_length=8, capture=capture, **flags)
        tokens = tokens_of(model, rows, capture, 3 * flags["update_interval"] + 7, flags, past_key_values=cache)
        forward(model, [prompt(4), prompt(7), prompt(2)], cache)
        forward(model, [[3], [4], [5]], cache)
        caches.append((tokens, cache))
    (tokens, cache), (expected_tokens, expected) = caches
    assert len(captured) == 1 and tokens == expected_tokens
    for name in ("lengths", "seen", "evictions", "clock"):
        assert getattr(cache, name) == getattr(expected, name), name
    assert_same_slots(cache, expected)


@pytest.mark.parametrize("flags", GRAPH_FLAGS.values(), ids=GRAPH_FLAGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_end_bring_nothing_to_a_graph(gqa_on_gpu, half_on_gpu, captured, dtype, flags):
    """Kernels that append, count or add mass for a row that has ended, in replayed steps and in those between."""
    model = (gqa_on_gpu if dtype == "float32" else half_on_gpu).h2o
    rows, caches = [prompt(13), prompt(3), prompt(8)], []
    unsaid = min(set(range(1, 128)).difference(*tokens_of(model, rows, False, 40, flags)))
    last = torch.tensor([13 + 5, 13 + 17, 1000], device="cuda")  # columns

    def ends(input_ids, scores, **kwargs):
        return input_ids.shape[1] >= last

    asked = {"eos_token_id": unsaid, "pad_token_id": 0, "stopping_criteria": [ends]}
    for capture in (True, False):
        cache = new_cache(window_length=8, capture=capture, **flags)
        tokens = tokens_of(model, rows, capture, 40, flags, past_key_values=cache, **asked)
        caches.append((tokens, cache))
    (tokens, cache), (expected_tokens, expected) = caches
    assert len(captured) == 1 and tokens == expected_tokens
    assert cache.seen == expected.seen == [13 + 5, 3 + 17, 8 + 39]
    assert_same_slots(cache, expected)
    decoder = next(iter(model.kept_caches.decoders[cache].values()))
    assert any("partial" in name for name in decoder._graphs)


def test_end_of_sequence_in_a_graph(gqa_on_gpu, captured):
    """Tokens after a row's end, or a row that ended in the call before and stays ended."""
    model, rows, flags = gqa_on_gpu.h2o, [prompt(13), prompt(3), prompt(8)], {"update_interval": 4}
    base = tokens_of(model, rows, False, 60, flags)
    ends = {"eos_token_id": [base[0][13 + 5], base[1][13 + 21], base[2][13 + 40]], "pad_token_id": 0}
    many = {"eos_token_id": [*ends["eos_token_id"], *range(10_000, 10_020)], "pad_token_id": 0}  # torch.isin would sort
    for settings in (ends, {}, ends, many):
        expected = tokens_of(model, rows, False, 60, flags, **settings)
        assert tokens_of(model, rows, True, 60, flags, **settings) == expected
    assert len(captured) == 4


def test_graphs_are_used_again(gqa_on_gpu, captured, monkeypatch):
    """A recording for each call: seconds where a replay takes milliseconds."""
    model, flags, recorded, original = gqa_on_gpu.h2o, {"update_interval": 4}, [], torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda *args: recorded.append(1) or original(*args))
    for rows in ([prompt(9)], [prompt(9), prompt(4)], [prompt(20)], [prompt(1), prompt(30)]):
        before = len(recorded)
        tokens_of(model, rows, True, 20, flags)
        seen = len(captured) > 2
        assert len(recorded) - before == (0 if seen else 2)
    graphs = dict(kept_decoder(model)._graphs)
    tokens_of(model, [prompt(5), prompt(6)], True, 40, flags)
    assert kept_decoder(model)._graphs == graphs and len(recorded) == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_model_on_the_second_gpu(captured):
    """A graph that records another GPU's stream, and is empty."""
    model, flags = make_llamas().h2o, {"update_interval": 4}
    expected = tokens_of(model.to("cuda:0"), [prompt(9)], True, 40, flags)
    model.kept_caches.clear()
    model.to("cuda:1")
    inputs = {name: tensor.to("cuda:1") for name, tensor in left_pad([prompt(9)], "cuda").items()}
    assert torch.cuda.current_device() == 0
    for _ in range(2):
        assert model.generate(**inputs, max_new_tokens=40, do_sample=False).tolist() == expected
    assert len(captured) == 3 and kept_decoder(model)._graphs


def test_moved_weights_are_recorded_anew(gqa_on_gpu, fresh):
    """Graphs that read the memory where the weights were."""
    model, rows, flags = copy.deepcopy(gqa_on_gpu.h2o), [prompt(9)], {"update_interval": 4}
    tokens_of(model, rows, True, 20, flags)
    before = kept_decoder(model)
    model.load_state_dict({name: -1.1 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    tokens = tokens_of(model, rows, True, 20, flags)
    assert kept_decoder(model) is not before
    assert tokens == tokens_of(model, rows, False, 20, flags)
    model.to("cpu").to("cuda")
    assert tokens_of(model, rows, True, 20, flags) == tokens
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1 / 1.1)  # in place: the graphs follow
    assert tokens_of(model, rows, True, 20, flags) == tokens_of(model, rows, False, 20, flags)


def test_hooks_are_called_on_every_step(gqa_on_gpu, captured):
    """A hook on a layer that a replayed graph passes by."""
    model, calls = gqa_on_gpu.h2o, []
    tokens_of(model, [prompt(9)], True, 20, {"update_interval": 4})
    hook = model.model.layers[1].register_forward_hook(lambda *args: calls.append(1))
    try:
        tokens_of(model, [prompt(9)], True, 20, {"update_interval": 4})
    finally:
        hook.remove()
    assert len(calls) == 20 and len(captured) == 1


def test_frequencies_that_follow_the_length(fresh):
    """A step that asks the host about its positions while it is recorded: an error of CUDA's, and a lost context."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = make_llamas(max_position_embeddings=16, rope_parameters=rope).h2o.to("cuda")
    tokens = [tokens_of(model, [prompt(9)], capture, 24, {"update_interval": 4}) for capture in (True, False)]
    assert tokens[0] == tokens[1]


def test_a_used_cache_can_be_copied(gqa_on_gpu, fresh):
    """Graphs, which cannot be copied, or the model, which should not be, in a copy of a cache."""
    model, flags = gqa_on_gpu.h2o, {"update_interval": 4}
    cache = new_cache(window_length=8, **flags)
    tokens_of(model, [prompt(9), prompt(3)], True, 20, flags, past_key_values=cache)
    (decoder,) = model.kept_caches.decoders[cache].values()
    other = copy.deepcopy(cache)
    assert decoder._graphs and other not in model.kept_caches.decoders
    results = [forward(model, [[3], [4]], each) for each in (cache, other)]
    assert all(torch.equal(logits, expected) for logits, expected in zip(*results, strict=True))
    assert cache.lengths == other.lengths
    assert torch.equal(*(each._rows.mirror(each.layers[0].device) for each in (cache, other)))


def test_a_graph_draws_anew_on_every_replay(gqa_on_gpu, captured):
    """Random numbers that are recorded: the same seed has to give the same tokens, and another seed others."""
    model, rows, flags = gqa_on_gpu.h2o, [prompt(9)] * 4, {"update_interval": 4}
    settings = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    first, again = (tokens_of(model, rows, True, 40, flags, **settings) for _ in range(2))
    assert first == again and len({tuple(row) for row in first}) == 4
    torch.manual_seed(4)
    inputs = left_pad(rows, "cuda")
    assert model.generate(**inputs, max_new_tokens=40, **settings).tolist() != first
    assert len(captured) == 3 and set(kept_decoder(model)._graphs) == {"scored", "slimming"}
    for row in first:
        assert len(set(row[9:])) > 10, "a replay that draws what the last one drew"


def test_a_first_replay_waits_for_its_recording(gqa_on_gpu, fresh, monkeypatch):
    """A busy GPU: the generator's offset, which a recording sets to 0 on a stream of its own, so late that the first
    replay, which has set it to what it is, draws by it."""
    model, settings = gqa_on_gpu.h2o, {"do_sample": True, "temperature": 5.0, "top_k": 0}
    request = (model, [prompt(9)] * 4, True, 4, {"update_interval": 4})  # the second step is recorded and replayed
    begin, step = torch.cuda.CUDAGraph.capture_begin, Decoder._step

    def late(self, *args, **kwargs):
        torch.cuda._sleep(200_000_000)  # cycles, longer than recording takes
        begin(self, *args, **kwargs)

    def slow(self):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda._sleep(600_000_000)  # in the graph, before it draws
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "capture_begin", late)
        patch.setattr(Decoder, "_step", slow)
        recorded = tokens_of(*request, **settings)
    model.kept_caches.clear()
    assert tokens_of(*request, **settings) == recorded


@pytest.mark.parametrize("settings", [
    {"top_k": 0}, {"top_k": 3, "temperature": 2.0}, {"top_k": 0, "top_p": 0.7, "temperature": 2.0},
], ids=str)  # fmt: skip
def test_sampled_tokens_follow_the_logits(fresh, settings):
    """Another temperature or nucleus in a graph: a replayed step's tokens against the distribution that its logits
    give, over 4,096 samples (the step after the first graph was recorded)."""
    config = {"vocab_size": 12, "initializer_range": 0.05}
    model, n, ids = make_llamas(**config).h2o.to("cuda"), 1024, [[5, 3, 7, 1, 2]]
    settings = {"do_sample": True, "num_return_sequences": n, "max_new_tokens": 5, **settings}
    model.h2o = H2OConfig(window_length=16, update_interval=1)
    torch.manual_seed(0)
    drawn = torch.cat([model.generate(torch.tensor(ids, device="cuda"), **settings)[:, 5:] for _ in range(4)])
    assert kept_decoder(model)._graphs
    model.h2o = H2OConfig(window_length=16, update_interval=1, capture=False)
    wanted = {name: value for name, value in settings.items() if name not in ("num_return_sequences", "max_new_tokens")}
    more = {"output_scores": True, "return_dict_in_generate": True}
    for column in (1, 4):  # of the tokens drawn; the text before it is each row's own
        prefixes = torch.cat([torch.tensor(ids, device="cuda").expand(len(drawn), -1), drawn[:, :column]], dim=1)
        mask = torch.ones_like(prefixes)  # the padding token may have been drawn
        scores = model.generate(prefixes, attention_mask=mask, max_new_tokens=1, **wanted, **more).scores[0]
        probs = scores.softmax(-1)
        expected, variance = probs.sum(0), (probs * (1 - probs)).sum(0)
        counts = torch.bincount(drawn[:, column], minlength=12)
        assert (probs.gather(1, drawn[:, column, None]) > 0).all(), "a token that the warpers exclude"
        assert ((counts - expected).abs() <= 5 * variance.sqrt() + 3).all()


@pytest.mark.parametrize("flags", [{}, {"position_rolling": True, "score_norm": "mean"}], ids=str)
def test_compiled_steps_give_the_same_tokens(fresh, flags):
    """A compiled step that computes something else: float32, where rounding decides nothing."""
    model = make_llamas(num_hidden_layers=1).h2o.to("cuda")
    rows, flags, tokens = [prompt(13), prompt(3)], {"update_interval": 4, **flags}, []
    for how in ({"compile": True}, {"compile": False}):
        tokens.append(tokens_of(model, rows, True, 40, {**flags, **how}))
        assert set(kept_decoder(model)._graphs) == {"scored", "slimming"}
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("flags", [
    {"update_interval": 4}, {"update_interval": 1}, {"update_interval": 4, "position_rolling": True},
    {"update_interval": 4, "backend": "sdpa"}, None,
], ids=str)  # fmt: skip
def test_sequences_do_not_depend_on_the_batch(gqa_on_gpu, fresh, flags):
    """Rows that join from a graph's point of view: lengths, ends or random numbers that are another row's."""
    model = gqa_on_gpu.stock if flags is None else gqa_on_gpu.h2o
    if flags is not None:
        model.h2o = H2OConfig(window_length=8, **flags)
    results = []
    for rows in (1, 3, 7):
        wanted = [Sequence(prompt(n), 3 + 11 * (i % 4), 0.7 * (i % 2), 0.8, (1, i))
                  for i, n in enumerate((13, 3, 8, 20, 1, 9, 7))]  # fmt: skip
        batcher = Batcher(model, rows, set(range(5, 128, 16)), 0, sampling=True, nucleus=True)
        assert len(list(batcher.run(wanted))) == len(wanted)
        results.append([(sequence.tokens, sequence.finish_reason, sequence.cache) for sequence in wanted])
        for sequence in wanted:
            assert 0 < sequence.seconds_to_first_token <= sequence.seconds
        if flags is not None and flags.get("backend") != "sdpa":
            assert set(batcher.decoding.decoder._graphs) == {"scored", "slimming"}
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("flags", [{}, {"position_rolling": True}, {"update_interval": 1}, None], ids=str)
def test_streams_are_the_cpus_and_hold_no_more(gqa, gqa_on_gpu, flags):
    """Graphs that go on from where the last reply ended instead of from the turn fed, or memory turn by turn."""
    said, losses, held = [], [], []
    for pair in (gqa, gqa_on_gpu):
        model = pair.stock
        if flags is not None:
            model, pair.h2o.h2o = pair.h2o, H2OConfig(**{"window_length": 24, "update_interval": 4, **flags})
        stream = Stream(model, set())
        said.append([])
        for turn in range(12):
            nll, _ = stream.feed(prompt((23, 4, 1, 9)[turn % 4], turn))
            said[-1].append([token for token, _ in stream.say(9)])
            losses.append(nll)
            held.append(torch.cuda.memory_allocated())
    assert said[0] == said[1] and losses[12:] == pytest.approx(losses[:12], rel=1e-3, abs=1e-3)
    if flags is not None:
        assert len(set(held[-6:])) == 1 and set(stream.decoding.decoder._graphs) == {"scored", "slimming"}


def test_memory_is_flat_over_30_generates(fresh):
    """Caches, graphs or decoders that pile up, with changing batch sizes and temperatures."""
    model, held = make_llamas().h2o.to("cuda"), []
    for i in range(30):
        rows = [prompt(4 + j) for j in range(1 + i % 3)]
        settings = {"do_sample": True, "temperature": 1.0 + i} if i % 5 == 4 else {}
        tokens_of(model, rows, True, 20, {"update_interval": 4}, **settings)
        if i % 15 == 14:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    (allocated, reserved), (later, reserved_later) = held
    assert len(model.kept_caches._caches) <= generation.KEPT_CACHES
    assert later <= allocated + 2**20 and reserved_later <= reserved + 2**25


def test_an_interrupted_call_leaves_nothing(gqa_on_gpu, captured):
    """A step or an end that a graph was left with."""
    model, rows, flags = gqa_on_gpu.h2o, [prompt(13), prompt(3)], {"update_interval": 4}
    expected = tokens_of(model, rows, True, 30, flags)

    def interrupts(input_ids, scores, **kwargs):
        if input_ids.shape[1] > 13 + 20:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool, device="cuda")

    with pytest.raises(KeyboardInterrupt):
        tokens_of(model, rows, True, 30, flags, stopping_criteria=[interrupts])
    assert tokens_of(model, rows, True, 30, flags) == expected and len(captured) == 3


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


# The command line on one GPU and on several


@pytest.fixture(scope="module")
def requests_and_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    make_checkpoint(folder / "model", hidden_size=128, intermediate_size=256)
    sampled = make_requests(6, max_tokens=40, temperature=0.8, top_p=0.9)
    write_requests(folder / "in.jsonl", make_requests(6, max_tokens=40) + sampled)
    return folder


LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ON_H2O = ["--enable_h2o_generation", "--num_window_length", "16", "--update_interval", "4"]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")


@pytest.fixture
def summarize(requests_and_model, tmp_path):
    """summarize(*flags, launch=[]): results of the program, in float32, without times and memory."""

    def summarize(*flags, launch=(), code=0):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        argv = [sys.executable, *launch, "run_summarization.py", "--input-path", requests_and_model / "in.jsonl"]
        argv += ["--model-name", requests_and_model / "model", "--output-path", output]
        dtype = [] if "--dtype" in flags else ["--dtype", "float32"]
        ended = subprocess.run([*map(str, argv), *dtype, *flags], cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert (ended.returncode == 0) == (code == 0), ended.stderr
        if code:
            return ended.stderr
        results = [json.loads(line) for line in output.read_text().splitlines()]
        for result in results:
            del result["result"]["request_time"], result["peak_memory_bytes"]
            for choice in result["result"]["choices"]:
                choice["logprobs"].pop("token_logprobs")
        return results

    return summarize


@two_gpus
@pytest.mark.parametrize("flags", [ON_H2O, []], ids=["h2o", "full"])
def test_parts_of_a_model_on_two_gpus(summarize, flags):
    """Kernels that take the model's heads for their own, processes that choose different tokens, one that hangs; a
    recorded step without the sums over the parts, or whose communicator never ends."""
    flags = [*flags, "--batch_size", "4"]
    expected = summarize(*flags)
    assert summarize(*flags, "--tensor_parallel", launch=[*LAUNCH, "2"]) == expected
    if "--enable_h2o_generation" in flags:
        assert summarize(*flags, "--no-capture", "--tensor_parallel", launch=[*LAUNCH, "2"]) == expected
    auto = summarize(*flags[:-1], "auto", "--tensor_parallel", launch=[*LAUNCH, "2"])
    assert [result["result"]["choices"] for result in auto] == [result["result"]["choices"] for result in expected]


@pytest.mark.parametrize("flags", [ON_H2O, []], ids=["h2o", "full"])
def test_requests_shared_out_to_all_gpus(summarize, flags):
    """All processes on the first GPU, or one whose kernels run on another's."""
    count = torch.cuda.device_count()
    assert summarize(*flags, launch=[*LAUNCH, str(count)]) == summarize(*flags)
    said = summarize(launch=[*LAUNCH, str(count + 1)], code=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"{count} CUDA devices are visible" in line


@pytest.mark.parametrize("flags", [ON_H2O, []], ids=["h2o", "full"])
def test_layers_spread_over_all_gpus(summarize, flags):
    """A slot, a sampler's number or a mask on another device than the layer; --batch_size auto that asks one GPU."""
    expected = summarize(*flags, "--batch_size", "4")
    assert summarize(*flags, "--device_map", "auto", "--batch_size", "4") == expected
    auto = summarize(*flags, "--device_map", "auto", "--batch_size", "auto")
    assert [result["result"]["choices"] for result in auto] == [result["result"]["choices"] for result in expected]


@pytest.mark.parametrize("choice", ["torchao-int8", "torchao-int4", "bitsandbytes-int8", "bitsandbytes-int4"])
def test_quantised_weights_on_a_gpu(summarize, choice):
    """A graph recorded over layers that ask the device; weights that are merged, or moved, as if they were plain."""
    pytest.importorskip(choice.split("-")[0])
    flags = [*ON_H2O, "--quantize", choice, "--dtype", "bfloat16"]
    assert summarize(*flags) == summarize(*flags, "--no-capture")
    assert len(summarize("--quantize", choice, "--dtype", "bfloat16")) == 12
