"""Rows of one cache in another, the Batcher and its sampling: each text against what it is alone."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers.generation import TopPLogitsWarper

import recorded_steps
from conftest import (
    VOCAB,
    assert_close,
    forward,
    prompt,
)
from h2optimizer import batching, decoding, sharing
from h2optimizer.batching import Batcher, Sequence
from h2optimizer.kernels import logits as kernels
from h2optimizer.sampling import choose_greedily, sample_rows
from h2optimizer.utils.cache import HHCache
from recorded_steps import settings

pytestmark = recorded_steps.MARKS
captured = recorded_steps.captured  # autouse
gqa = recorded_steps.gqa
model = recorded_steps.model


# Rows of one cache in another


def alone(model, row, tokens, h2o):
    """A cache that saw a prompt and these tokens one by one."""
    cache = HHCache(h2o)
    for block in ([row], *([[token]] for token in tokens)):
        forward(model, block, cache)
    return cache


JOINS = {
    "H2O": {"update_interval": 1},
    "rotation": {},
    "rolling": {"position_rolling": True},
    "mean": {"score_norm": "mean", "score_decay": 0.75},
    "random": {"score": "random"},
    "sdpa": {"backend": "sdpa", "score_every_step": False},
}


IN_PLACE = [JOINS["mean"], JOINS["sdpa"], {"slots": "int8"}]


@pytest.mark.parametrize(
    "flags, in_place", [(flags, False) for flags in JOINS.values()] + [(flags, True) for flags in IN_PLACE], ids=str
)
def test_rows_that_join_go_on_as_alone(model, flags, in_place):
    """A row whose slimmings fall on other steps than alone, or that keeps something of the row before it, a NaN say; a
    prompt computed where it will be that spoils the rows beside it, or is copied over itself."""
    h2o = settings(**flags)
    if flags.get("score") == "random":
        h2o = dataclasses.replace(h2o, backend="sdpa")
    n = h2o.update_interval
    first = HHCache(h2o)
    forward(model, [prompt(13), prompt(2)], first)
    big = first.with_rows(4)
    assert big.lengths == [0] * 4 and big.can_join
    big.take_rows([2, 0, 3], first, [1, 0, 1])  # one source row twice, one row left empty
    held = {0: [prompt(13)], 2: [prompt(2)], 3: [prompt(2)]}
    fed = {row: [] for row in held}
    stream = iter(prompt(200, 3))

    def feed(steps):
        for _ in range(steps):
            tokens = [next(stream) for _ in range(4)]
            logits = forward(model, [[token] for token in tokens], big)
            for row in held:
                fed[row].append(tokens[row])
                held_logits[row] = logits[row]

    held_logits = {}
    feed(2 * n)
    assert big.can_join
    if in_place:
        for layer in big.layers:
            for name in layer.slots.states:
                # kernels do not read past a row's length, but the torch code that stands for them here multiplies by 0
                getattr(layer.slots, name)[1:3] = torch.nan if flags.get("backend") == "sdpa" else 9
        second = big.within(1, 2)
        assert second.lengths == [0, 0] and big.seen[0] == 13 + 2 * n
        forward(model, [prompt(20, 5), prompt(9, 4)], second)
        big.take_rows([1, 2], second, [0, 1])
        assert all(
            mine.keys[1].data_ptr() == theirs.keys.data_ptr()
            for mine, theirs in zip(big.layers, second.layers, strict=True)
        )
    else:
        second = HHCache(h2o)
        forward(model, [prompt(9, 4), prompt(20, 5)], second)
        big.take_rows([1, 2], second, [1, 0])
    held |= {1: [prompt(20, 5)], 2: [prompt(9, 4)]}
    fed |= {1: [], 2: []}
    feed(2 * n + 1)
    for row, (text,) in held.items():
        expected = alone(model, text, fed[row], h2o)
        counts = (big.lengths[row], big.seen[row], big.evictions[row])
        assert counts == (expected.lengths[0], expected.seen[0], expected.evictions[0])
        assert big._rows.mirror(torch.device("cpu"))[:, row].tolist() == list(counts[:2])
        for layer_idx, layer in enumerate(big.layers):
            length = counts[0]
            assert torch.equal(big.positions(layer_idx)[row, :, :length], expected.positions(layer_idx)[0])
            theirs = expected.layers[layer_idx].slots
            assert torch.equal(layer.slots.positions[row, :, :length], theirs.positions[0, :, :length])
            if h2o.needs_mass:
                assert_close(layer.slots.mass[row, :, :length], theirs.mass[0, :, :length])
                assert not layer.slots.mass[row, :, length:].any()


def test_rows_join_where_both_have_slimmed_only(model):
    """A row that joins between two slimmings, or comes from there; caches that rank or hold slots differently."""
    h2o = settings(backend="sdpa")
    source, big = HHCache(h2o), HHCache(h2o)
    forward(model, [prompt(5), prompt(9)], big)
    forward(model, [prompt(5)], source)
    big.take_rows([1], source, [0])
    for joins in (False, False, True):
        forward(model, [[3], [4]], big)
        assert big.can_join == joins
        if not joins:
            with pytest.raises(ValueError, match="right after a slimming only"):
                big.take_rows([1], source, [0])
    forward(model, [[3]], source)
    with pytest.raises(ValueError, match="right after a slimming only"):
        big.take_rows([1], source, [0])
    for flags in ({"update_interval": 2}, {"score": "sink"}, {"window_length": 9}):
        other = HHCache(settings(**{"backend": "sdpa", **flags}))
        forward(model, [prompt(5)], other)
        with pytest.raises(ValueError, match="settings or layers differ"):
            big.take_rows([1], other, [0])


# Many sequences

EOS = {*range(5, VOCAB, 12)}
PROMPTS = [prompt(n) for n in (13, 3, 8, 20, 1, 9, 7)]


def make_sequences(sampled=True, **more) -> list[Sequence]:
    return [
        Sequence(text, 3 + 7 * (i % 4), 0.7 * (i % 2) * sampled + 1.5 * (i % 4 == 3), 0.8, (1, i), **more)
        for i, text in enumerate(PROMPTS)
    ]


def batch(model, rows, wanted, order=None, eos=EOS) -> list[Sequence]:
    """The sequences, ended, in the order in which they were made."""
    batcher = Batcher(model, rows, eos, 0, sampling=True, nucleus=True)
    ended = list(batcher.run([wanted[i] for i in order] if order else wanted))
    assert sorted(map(id, ended)) == sorted(map(id, wanted)), "each once"
    return wanted


def facts(sequence):
    cache = {name: value for name, value in sequence.cache.items()}
    return sequence.tokens, sequence.finish_reason, cache


def assert_same_sequences(ended, expected):
    assert [facts(sequence) for sequence in ended] == [facts(sequence) for sequence in expected]
    for sequence, other in zip(ended, expected, strict=True):
        assert len(sequence.logprobs) == len(sequence.tokens)
        torch.testing.assert_close(torch.tensor(sequence.logprobs), torch.tensor(other.logprobs), atol=2e-4, rtol=1e-4)


BATCHES = {
    "sdpa": {"backend": "sdpa"},
    "triton": {},
    "triton, H2O": {"update_interval": 1},
    "triton, rolling mean": {"position_rolling": True, "score_norm": "mean"},
    "triton, pure attention between": {"score_every_step": False},
    "sdpa, an interval beyond a chunk": {"backend": "sdpa", "update_interval": 20},
    "stock": None,
}


ORDERS = ((3, None), (7, [6, 5, 4, 3, 2, 1, 0]), (2, [3, 0, 6, 1, 5, 2, 4]))  # rows, and who comes when


@pytest.mark.parametrize("variant", BATCHES)
def test_a_sequence_depends_on_nothing_beside_it(gqa, variant):
    """Rows, order or neighbours that show in a text, its log-probabilities or what its cache held."""
    flags = BATCHES[variant]
    model = gqa.stock if flags is None else gqa.h2o
    if flags is not None:
        model.h2o = settings(**flags)
    expected = batch(model, 1, make_sequences())
    assert {sequence.finish_reason for sequence in expected} == {"stop", "length"}
    for rows, order in ORDERS if variant in ("triton", "stock") else ORDERS[2:]:
        assert_same_sequences(batch(model, rows, make_sequences(), order), expected)


@pytest.mark.parametrize("flags", [{"backend": "sdpa"}, {}, {"update_interval": 1}, None], ids=str)
def test_greedy_sequences_are_generates(gqa, flags):
    """A first token that is skipped or repeated, another end, or another step that slims."""
    model = gqa.stock if flags is None else gqa.h2o
    if flags is not None:
        model.h2o = settings(**flags)
    wanted = make_sequences(sampled=False)
    for sequence in wanted:
        sequence.temperature = 0.0
    for sequence in batch(model, 3, wanted):
        ids, config = torch.tensor([sequence.prompt]), dict(do_sample=False, eos_token_id=list(EOS), pad_token_id=0)
        output = model.generate(
            ids, max_new_tokens=sequence.max_tokens, output_logits=True, return_dict_in_generate=True, **config
        )
        tokens = output.sequences[0, len(sequence.prompt) :].tolist()
        assert sequence.tokens == tokens
        assert sequence.finish_reason == ("stop" if tokens[-1] in EOS else "length")
        logprobs = torch.cat(output.logits).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.logprobs), logprobs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("flags", [{}, {"update_interval": 1}, {"update_interval": 20}, {"prefill_chunk": 3}], ids=str)
def test_statistics_are_a_real_caches(model, flags):
    """Slots, slimmings or tokens by a formula that is not what the cache does."""
    model.h2o = settings(backend="sdpa", **flags)
    for sequence in batch(model, 3, make_sequences()):
        cache = alone(model, sequence.prompt, sequence.tokens[:-1], model.h2o)
        counted = {
            "tokens_seen": cache.seen[0],
            "slots_kept": cache.lengths[0],
            "slimmings": cache.evictions[0],
            "kv_bytes": cache.nbytes,
        }
        assert sequence.cache == counted


def test_statistics_of_the_full_cache(gqa):
    """Bytes of padding, or of the last token, which no cache has seen."""
    for sequence in batch(gqa.stock, 3, make_sequences()):
        seen = len(sequence.prompt) + len(sequence.tokens) - 1
        kv_bytes = seen * 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32
        assert sequence.cache == {"tokens_seen": seen, "slots_kept": seen, "slimmings": 0, "kv_bytes": kv_bytes}


@pytest.mark.parametrize("kind", ["h2o", "stock"])
def test_several_sequences_of_one_prompt(gqa, kind):
    """A prompt that is prefilled for each of its sequences, or whose sequences are all alike, or another prompt's where
    the two alternate."""
    model = getattr(gqa, kind)
    gqa.h2o.h2o = settings()
    texts, columns = [prompt(9), prompt(14)], []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: columns.append(args[0].shape) if args[0].shape[1] > 1 else None, with_kwargs=True
    )
    try:
        results = []
        for rows, order in ((1, None), (4, None), (6, None), (6, [0, 3, 1, 4, 2, 5])):
            columns.clear()
            wanted = [Sequence(texts[i // 3], 9, 1.5, 1.0, (i % 3,)) for i in range(6)]
            results.append([facts(sequence)[:2] for sequence in batch(model, rows, wanted, order, eos=set())])
            if rows == 6:
                assert columns == [(2, 14)], "each prompt once"
    finally:
        hook.remove()
    assert all(result == results[0] for result in results)
    assert len({tuple(tokens) for tokens, _ in results[0][:3]}) == 3
    again = [Sequence(list(texts[0]), 9, 1.5, 1.0, (2,))]
    assert facts(batch(model, 1, again, eos=set())[0])[:2] == results[0][2], "the seed alone decides"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["h2o", "stock"])
def test_has_ended_sees_growing_prefixes(gqa, kind, rows):
    """A prefix that is skipped, or tokens after the one that ended the text."""
    gqa.h2o.h2o = settings()
    looks = [[] for _ in PROMPTS]

    def ends(i):
        return lambda tokens: looks[i].append(list(tokens)) or len(tokens) == 4 + i

    wanted = [Sequence(text, 9, has_ended=ends(i)) for i, text in enumerate(PROMPTS)]
    for i, sequence in enumerate(batch(getattr(gqa, kind), rows, wanted, eos=set())):
        n = min(4 + i, 9)
        assert len(sequence.tokens) == n
        assert sequence.finish_reason == ("stop" if n == 4 + i else "length")
        assert looks[i] == [sequence.tokens[: k + 1] for k in range(n)]


@pytest.mark.parametrize("kind", ["h2o", "stock"])
def test_times_are_positive_and_ordered(gqa, monkeypatch, kind):
    """A time that ends before it begins, or includes what came before the prefill."""
    gqa.h2o.h2o = settings()
    readings = itertools.count()
    monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    ended = batch(getattr(gqa, kind), 3, make_sequences())
    whole = next(readings)
    for sequence in ended:
        assert 0 < sequence.seconds_to_first_token <= sequence.seconds <= whole
        assert (sequence.seconds_to_first_token == sequence.seconds) == (len(sequence.tokens) == 1)
        assert 1 <= sequence.rows <= 3


@pytest.mark.parametrize("kind", ["h2o", "stock"])
def test_shares_of_decode_steps_add_up_without_prefill(gqa, kind, monkeypatch):
    """A speed of decoding that counts prefills in, of others that join as well, or a step once for each of its rows."""
    gqa.h2o.h2o, now, decoded = settings(), 0.0, 0.0
    decode, prefill = batching.Batcher._decode, batching.Batcher._prefill

    def decoding(self, waiting):
        nonlocal now, decoded
        steps, begin, _, *rest = decode(self, waiting)
        now, decoded = now + steps, decoded + steps
        return steps, begin, now, *rest

    def prefilling(self, *args):
        nonlocal now
        prefill(self, *args)
        now += 1000

    monkeypatch.setattr(batching.Clock, "now", lambda self: now)
    monkeypatch.setattr(batching.Batcher, "_decode", decoding)
    monkeypatch.setattr(batching.Batcher, "_prefill", prefilling)
    ended = batch(getattr(gqa, kind), 3, make_sequences())
    assert len(ended) > 3 and sum(sequence.decode_seconds for sequence in ended) == pytest.approx(decoded)


@pytest.mark.parametrize("interval", [1, 3, 20])
def test_a_row_that_is_free_is_taken_at_the_next_slimming(model, interval):
    """Rows that stand idle beside a long text, because steps are counted past the slimming where one could join."""
    model.h2o = settings(backend="sdpa", update_interval=interval)
    long, *short = (Sequence(prompt(5, i), 130 if i == 0 else 21) for i in range(5))
    batch(model, 2, [long, *short], eos=set())
    assert [sequence.rows for sequence in short] == [2] * 4


@pytest.mark.parametrize("interval", [1, 3, 16, 20])
def test_looks_are_as_far_apart_as_joining_allows(model, interval):
    """A look after each slimming, though several fit between two looks: on a GPU each look waits for the device."""
    model.h2o = settings(backend="sdpa", update_interval=interval)
    bounded, schedule = decoding.decoding_of(model), model.h2o.schedule
    bounded.open()
    for clock in range(1, 2 * interval + 1):
        bounded.cache.clock = clock
        steps = bounded.steps(waiting=True)
        assert schedule.is_due(clock + steps - 1)
        assert decoding.CHUNK - interval < steps <= max(decoding.CHUNK, schedule.steps_to_due(clock))


@pytest.mark.parametrize("flags, by_kernel", [({}, True), ({"backend": "sdpa"}, False), (None, False)], ids=str)
def test_log_probabilities_take_no_kernel_that_was_not_chosen(gqa, monkeypatch, flags, by_kernel):
    """A kernel where its compiler does not work, and another backend is the way out."""
    launched, run = [], kernels.token_logprobs
    monkeypatch.setattr(kernels, "token_logprobs", lambda *given: launched.append(len(given[0])) or run(*given))
    model = gqa.stock if flags is None else gqa.h2o
    if flags is not None:
        model.h2o = settings(**flags)
    batch(model, 3, make_sequences())
    assert bool(launched) == by_kernel


def test_a_batcher_can_run_again(model):
    """Rows, tokens or a clock that one run leaves to the next; a run without sequences that does not end."""
    model.h2o = settings()
    expected = batch(model, 1, make_sequences())
    batcher = Batcher(model, 3, EOS, 0, sampling=True, nucleus=True)
    assert list(batcher.run([])) == []
    for _ in range(2):
        wanted = make_sequences()
        assert len(list(batcher.run(wanted))) == len(PROMPTS)
        assert_same_sequences(wanted, expected)


def test_a_full_batch_after_one_that_was_not(gqa):
    """Stock rows that are as few ever after."""
    batcher = Batcher(gqa.stock, 3, EOS, 0, sampling=True, nucleus=True)
    list(batcher.run(make_sequences()[:1]))
    wanted = make_sequences()
    assert max(sequence.rows for sequence in batcher.run(wanted)) == 3
    assert_same_sequences(wanted, batch(gqa.stock, 1, make_sequences()))


@pytest.mark.parametrize("limit, chunk", [(1, None), (25, None), (9, 4)])
def test_prompts_are_prefilled_in_parts(model, monkeypatch, limit, chunk):
    """Rows that get another part's prompts; chunks of a prompt that its neighbours in the batch cut otherwise."""
    model.h2o = settings(prefill_chunk=chunk)
    expected = batch(model, 1, make_sequences())
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", limit)
    assert_same_sequences(batch(model, 5, make_sequences()), expected)


@pytest.mark.parametrize("flags", [{}, {"update_interval": 1}, {"score_norm": "mean"}], ids=str)
def test_rows_that_continue_from_a_prefix_decode_as_alone(model, monkeypatch, flags):
    """Slots or lengths on the device that recorded steps read, of a row that began after a prefix."""
    model.h2o = settings(**flags)

    def sequences() -> list[Sequence]:
        return [
            Sequence(prompt(11 - i % 2) + prompt(1 + i, i), 5 + 4 * (i % 3), 0.8 * (i % 2), 0.9, (i,)) for i in range(6)
        ]

    monkeypatch.setattr(sharing, "LEAST_SAVED", 1)
    monkeypatch.setattr(sharing, "LEAST_TOKENS", 1)
    expected = batch(model, 1, sequences(), eos=set())
    shared = batch(model, 4, sequences(), eos=set())
    assert_same_sequences(shared, expected)
    assert sum(sequence.prompt_computed for sequence in shared) < sum(len(s.prompt) for s in shared) - 4 * 10
    monkeypatch.setattr(sharing, "LEAST_SAVED", 10**6)
    assert_same_sequences(batch(model, 4, sequences(), eos=set()), expected)


# Sampling from a uniform number

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, 3.0, -torch.inf, 1.0, 0.0, -4.0, 2.5, 1.5, -0.5])


def sampled(uniform, temperature=1.0, top_p=1.0, nucleus=None, logits=LOGITS):
    n = len(uniform)
    nucleus = top_p < 1 if nucleus is None else nucleus
    settings = torch.full((n,), float(temperature)), torch.full((n,), float(top_p))
    return sample_rows(logits.expand(n, -1), *settings, uniform[:, None], nucleus)


@pytest.mark.parametrize("temperature, top_p, nucleus", [
    (1.0, 1.0, False), (0.5, 1.0, False), (2.0, 1.0, False), (2.0, 1.0, True), (1.0, 0.8, True), (2.0, 0.5, True),
])  # fmt: skip
def test_sampled_tokens_follow_the_distribution(temperature, top_p, nucleus):
    """Tokens off by one in the cumulative sum, a temperature that multiplies, or a nucleus that is not renormalised."""
    logits = LOGITS[None] / temperature
    expected = (TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits).softmax(-1)[0]
    n = 20_000
    tokens = sampled((torch.arange(n) + 0.5) / n, temperature, top_p, nucleus)
    frequency = torch.bincount(tokens, minlength=12) / n
    assert (frequency - expected).abs().max() <= 2 / n * 12
    random = torch.rand(n, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(sampled(random, temperature, top_p, nucleus), minlength=12)
    kept = expected > 0
    assert not counts[~kept].any()
    chi_square = ((counts - n * expected)[kept].square() / (n * expected[kept])).sum()
    assert chi_square < 40  # 11 degrees of freedom: one in 30,000


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.75, 0.9, 0.99, 0.9999])
def test_the_nucleus_is_transformers(top_p):
    """A token too many or too few at the nucleus's edge."""
    for seed in range(4):
        logits = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 2
        kept = TopPLogitsWarper(top_p)(None, logits[None])[0].isfinite()
        tokens = sampled((torch.arange(20_000) + 0.5) / 20_000, 1.0, top_p, logits=logits)
        likely = logits.softmax(-1) > 1e-4
        found = torch.bincount(tokens, minlength=12) > 0
        assert torch.equal(found & likely, kept & likely) and not (found & ~kept).any()


@pytest.mark.parametrize("nucleus", [False, True])
@pytest.mark.parametrize("top_p", [1.0, 0.5, 1e-9])
def test_uniform_numbers_at_the_ends(nucleus, top_p):
    """A token of no probability, or one past the vocabulary, at 0 or just below 1."""
    ends = torch.tensor([0.0, 1 - 2**-24])
    impossible = [torch.tensor([-torch.inf, 1.0, 0.0, -torch.inf]), LOGITS, torch.tensor([0.0, -200.0, -300.0])]
    large = torch.randn(50_000, generator=torch.Generator().manual_seed(0))  # whose float32 sum falls short of 1
    for logits in (*impossible, large, large.bfloat16()):
        for temperature in (1e-3, 1.0, 50.0):
            tokens = sampled(ends, temperature, top_p if nucleus else 1.0, nucleus, logits)
            assert ((tokens >= 0) & (tokens < len(logits))).all()
            assert logits[tokens].isfinite().all()


def test_temperature_zero_is_the_greatest():
    """A division by zero, or another row's temperature."""
    uniform = torch.linspace(0, 0.999, 50)
    assert (sampled(uniform, 0.0) == 4).all() and (sampled(uniform, 1e-4) == 4).all()
    mixed = torch.tensor([0.0, 5.0] * 25)
    for nucleus in (False, True):
        tokens = sample_rows(LOGITS.expand(50, -1), mixed, torch.ones(50), uniform[:, None], nucleus)
        assert (tokens[::2] == 4).all() and len(set(tokens[1::2].tolist())) > 4


@pytest.mark.parametrize("rows, vocabulary", [(1, 128), (3, 640), (3, 130), (70, 128)])
def test_the_first_of_the_greatest_logits(rows, vocabulary):
    """A token of another part of the vocabulary, or another of several that are equal: both ways decode the same."""
    logits = torch.randint(-3, 3, (rows, 2, vocabulary), generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[0, -1, vocabulary // 2 :] += 9.0
    tokens = choose_greedily(logits[:, -1])
    assert tokens.tolist() == [row.index(max(row)) for row in logits[:, -1].tolist()]
