"""Decode from CUDA graphs: the stock loop's tokens and caches, and graphs that are used again and let go of."""

import copy
import gc

import pytest
import torch

import gpu_models
from conftest import (
    assert_invariants,
    by_head,
    count_captured,
    forward,
    left_pad,
    make_llamas,
    new_cache,
    of_llamas,
    prompt,
)
from gpu_models import SYNC_FLAGS
from h2optimizer import H2OConfig, generation
from h2optimizer.batching import Batcher, Sequence
from h2optimizer.decoder import Decoder
from h2optimizer.streaming import Stream

pytestmark = gpu_models.MARKS
gqa_on_gpu = gpu_models.gqa_on_gpu
half_on_gpu = gpu_models.half_on_gpu

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
    return count_captured(monkeypatch)


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


# The stock loop's tokens and caches


@pytest.mark.parametrize("flags", GRAPH_FLAGS.values(), ids=GRAPH_FLAGS)
@pytest.mark.parametrize("lengths", [(13,), (13, 3, 8), (40, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replayed_tokens_are_the_stock_loops(gqa_on_gpu, half_on_gpu, captured, dtype, lengths, flags):
    """Anything that a graph holds fixed and that changes from step to step, bit for bit; or graphs that are recorded
    and never replayed."""
    llamas = gqa_on_gpu if dtype == "float32" else half_on_gpu
    model, flags = llamas.h2o, of_llamas(flags, llamas)
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
    for layer_idx, layer in enumerate(cache.layers):
        assert torch.equal(cache.positions(layer_idx), expected.positions(layer_idx))
        lengths = layer.lengths.tolist()
        assert lengths == expected.layers[layer_idx].lengths.tolist()
        for name in layer.slots.stored():
            ours, theirs = (by_head(of, layer_idx, name) for of in (cache, expected))
            for b, row in enumerate(lengths):
                for h, length in enumerate(row):
                    assert torch.equal(ours[b, h, :length], theirs[b, h, :length]), name


@pytest.mark.parametrize("flags", GRAPH_FLAGS.values(), ids=GRAPH_FLAGS)
def test_replayed_caches_are_the_stock_loops(gqa_on_gpu, captured, flags):
    """Slots, mass or counts on the device that part from what the host counts, or a second turn that begins wrong."""
    model, rows, caches = gqa_on_gpu.h2o, [prompt(13), prompt(3), prompt(8)], []
    flags = of_llamas(flags, gqa_on_gpu)
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
    llamas = gqa_on_gpu if dtype == "float32" else half_on_gpu
    model, flags = llamas.h2o, of_llamas(flags, llamas)
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


def test_frequencies_that_follow_the_length(fresh):
    """A step that asks the host about its positions while it is recorded: an error of CUDA's, and a lost context."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = make_llamas(max_position_embeddings=16, rope_parameters=rope).h2o.to("cuda")
    tokens = [tokens_of(model, [prompt(9)], capture, 24, {"update_interval": 4}) for capture in (True, False)]
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


# Sampling


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


# Graphs from call to call


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
