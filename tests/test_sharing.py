"""Beginnings that prompts share, computed once: texts, scores and statistics are those without sharing."""

import dataclasses
import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from conftest import VOCAB, assert_close, make_llamas, prompt
from h2optimizer import H2OConfig, decoding, sharing
from h2optimizer.batching import Batcher, Sequence
from h2optimizer.decoding import decoding_of
from h2optimizer.fidelity import ForcedDecode, compare
from h2optimizer.likelihood import log_likelihoods_in_batches
from h2optimizer.sharing import SharedPrefixes, bytes_per_token, snapshot_bytes

SMALL = {"window_length": 8, "update_interval": 3, "backend": "sdpa"}
EOS = {*range(5, VOCAB, 12)}
FLAGS = {
    "H2O": {"update_interval": 1},
    "rotation": {},
    "eager": {"backend": "eager"},
    "mask": {"slimming": "mask"},
    "wide": {"window_length": 64},
    "recent only": {"num_heavy_hitters": 0},
    "rolling mean": {"position_rolling": True, "score_norm": "mean"},
    "last queries": {"score_queries": 3},
    "first of group": {"group_reduce": "first", "score_every_step": False},
    "value mass": {"score": "value_mass"},
    "decay": {"score_decay": 0.5},
    "sinks": {"score": "streaming_llm"},
    "random": {"score": "random"},
    "int8": {"slots": "int8"},
    "uneven heads": {"head_budgets": ((5, 11), (8, 8))},
    "full cache": None,
}
UNSHARED = {"chunks": {"prefill_chunk": 4}}


@pytest.fixture(scope="module")
def gqa():
    return make_llamas()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Whatever saves a token is shared."""
    monkeypatch.setattr(sharing, "LEAST_TOKENS", 1)
    monkeypatch.setattr(sharing, "LEAST_SAVED", 1)


def model_of(gqa, flags):
    if flags is None:
        return gqa.stock
    gqa.h2o.h2o = H2OConfig(**SMALL | flags)
    return gqa.h2o


def tree(seed: int, count: int = 9) -> list[list[int]]:
    """Prompts that branch at random: a template for most, shots for some, and some of them twice."""
    drawn = random.Random(seed)
    stems = [prompt(6, seed)]
    for i in range(4):
        stem = drawn.choice(stems)
        stems.append(stem[: drawn.randint(1, len(stem))] + prompt(drawn.randint(1, 9), 100 * seed + i))
    texts = [drawn.choice(stems) + prompt(drawn.randint(1, 12), 50 * seed + i) for i in range(count)]
    texts[drawn.randrange(count)] = texts[0]
    texts[-1] = prompt(5, seed + 1)  # shares nothing
    return texts


def make_sequences(texts, seed: int = 0) -> list[Sequence]:
    sequences = []
    for i, text in enumerate(texts):
        ends = (lambda tokens: len(tokens) == 4) if i % 4 == 2 else None
        sequences.append(Sequence(text, 2 + 3 * (i % 4), 0.9 * (i % 3 == 1), 0.8, (seed, i), ends))
    return sequences


def run(model, texts, rows: int, snapshots: int | None = None) -> list[Sequence]:
    """The sequences of these prompts, ended."""
    wanted = make_sequences(texts)
    batcher = Batcher(model, rows, EOS, 0, sampling=True, nucleus=True, snapshots=snapshots)
    ended = list(batcher.run(wanted))
    assert sorted(map(id, ended)) == sorted(map(id, wanted)), "each once"
    assert not batcher._prefixes._held, "snapshots that nobody needs"
    return wanted


def assert_same(shared: list[Sequence], expected: list[Sequence]) -> None:
    for one, other in zip(shared, expected, strict=True):
        assert (one.tokens, one.finish_reason, one.cache) == (other.tokens, other.finish_reason, other.cache)
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=2e-4, rtol=1e-4)


class Fed:
    """Counts the tokens of all forwards of several columns, and those of prompts of one token."""

    def __init__(self, model, monkeypatch):
        self.tokens = 0
        for kind in (decoding.BoundedDecoding, decoding.FullDecoding):
            for name in ("join", "snapshot"):
                self._count(kind, name, monkeypatch)

    def _count(self, kind, name, monkeypatch):
        original = getattr(kind, name)

        def counted(of, given, *args, **kwargs):
            if name == "snapshot":
                self.tokens += len(given)
            else:
                prefix = args[2] if len(args) > 2 else None
                distinct = {tuple(text) for text in given}
                self.tokens += sum(len(text) - (0 if prefix is None else len(prefix)) for text in distinct)
                assert prefix is None or all(text[: len(prefix)] == prefix.tokens for text in distinct)
            return original(of, given, *args, **kwargs)

        monkeypatch.setattr(kind, name, counted)


@pytest.mark.parametrize("rows, variant", [
    *((2, name) for name in FLAGS), *((12, name) for name in ("rotation", "decay", "uneven heads", "full cache")),
])  # fmt: skip
def test_texts_are_those_without_sharing(gqa, monkeypatch, variant, rows):
    """Mass of a prefix that is lost or counted twice, positions that begin anew, rows that take another's beginning."""
    model, texts = model_of(gqa, FLAGS[variant]), tree(seed=rows == 12)
    expected = run(model, texts, rows, snapshots=0)
    with monkeypatch.context() as patch:
        fed = Fed(model, patch)
        shared = run(model, texts, rows)
    assert_same(shared, expected)
    computed = sum(sequence.prompt_computed for sequence in shared)
    assert computed == fed.tokens < sum(sequence.prompt_computed for sequence in expected)
    assert all(0 <= sequence.prompt_computed <= len(sequence.prompt) for sequence in shared)


@examples(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(10, 10_000), rows=st.integers(1, 9), tokens=st.integers(0, 40))
@pytest.mark.parametrize("flags", [{}, None], ids=["h2o", "full"])
def test_random_trees_within_memory(gqa, monkeypatch, flags, seed, rows, tokens):
    """More bytes of snapshots than allowed; a beginning computed twice because it was dropped too early."""
    model, texts, held = model_of(gqa, flags), tree(seed), {}
    bound = tokens * bytes_per_token(model)
    expected = run(model, texts, rows, snapshots=0)
    kind = decoding.FullDecoding if flags is None else decoding.BoundedDecoding
    original, computed = kind.snapshot, []

    def snapshot(self, tokens, prefix=None):
        made = original(self, tokens, prefix)
        computed.append(tuple(made.tokens))
        return made

    class Held(dict):
        def __setitem__(self, key, snapshot):
            super().__setitem__(key, snapshot)
            assert sum(len(each) for each in self.values()) <= tokens
            held[key] = len(snapshot)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "snapshot", snapshot)
        begin = SharedPrefixes.__init__

        def init(self, *args):
            begin(self, *args)
            self._held = Held()

        patch.setattr(SharedPrefixes, "__init__", init)
        shared = run(model, texts, rows, snapshots=bound)
        assert len(computed) == len(set(computed)), "each once"
        peak = snapshot_bytes(decoding_of(model), texts, rows, bound)
    assert_same(shared, expected)
    assert bool(peak) == bool(computed) and peak <= bound


@pytest.mark.parametrize("flags", UNSHARED.values(), ids=UNSHARED)
def test_what_cannot_be_exact_is_not_shared(gqa, monkeypatch, flags):
    """Other chunks, which a shared beginning would bring."""
    model = model_of(gqa, flags)
    monkeypatch.setattr(decoding.BoundedDecoding, "snapshot", lambda *args: pytest.fail("shared"))
    assert_same(run(model, tree(1), 3), run(model, tree(1), 3, snapshots=0))


def test_frequencies_of_the_whole_prompt_are_not_shared():
    """RoPE types whose frequencies are those of the longest prompt."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    llamas = make_llamas(rope_parameters=scaling)
    assert not decoding_of(llamas.stock).can_share and not decoding_of(llamas.h2o).can_share
    llamas = make_llamas()
    assert decoding_of(llamas.stock).can_share and decoding_of(llamas.h2o).can_share


def test_beginnings_that_save_little_are_not_shared(gqa, monkeypatch):
    """Two forwards more to save a few tokens."""
    monkeypatch.undo()
    texts = [prompt(15) + prompt(3, i) for i in range(40)], [prompt(40) + prompt(3, i) for i in range(13)]
    for few in texts:
        prefixes = SharedPrefixes(decoding_of(gqa.stock), few, 4, 2**40)
        enough = SharedPrefixes(decoding_of(gqa.stock), [prompt(50) + text for text in few], 4, 2**40)
        assert {prefixes.beginning_of(i) for i in range(len(few))} == {None}
        assert {enough.beginning_of(i) for i in range(len(few))} == {0}


@pytest.mark.parametrize("shares", [2, 3])
def test_processes_do_not_compute_each_others_beginnings(shares):
    """Questions about one text that are dealt out to all processes; a process that has nearly all requests."""
    groups = [[prompt(9, i) + prompt(2, 10 * i + k) for k in range(2)] for i in range(12)]
    few = [text for pair in zip(*groups, strict=True) for text in pair]
    dealt = sharing.deal(few, shares)
    assert sorted(i for share in dealt for i in share) == list(range(24)) and {len(share) for share in dealt} == {
        24 // shares
    }
    for share in dealt:
        assert share == sorted(share) and {(i + 12) % 24 for i in share} == set(share), "both of a group"
    for texts in ([prompt(9) + prompt(2, i) for i in range(24)], [[i, i] for i in range(24)]):
        assert sharing.deal(texts, shares) == [list(range(24))[rank::shares] for rank in range(shares)]


@pytest.mark.parametrize("kind", ["h2o", "stock"])
def test_a_prefix_is_computed_once_for_all_that_join(gqa, kind):
    """Copies of a prompt that end at other times, more of them than rows: each would compute it again."""
    model = model_of(gqa, {} if kind == "h2o" else None)
    text = prompt(30)
    wanted = [Sequence(text, 3 + i, 1.0, 1.0, (i,)) for i in range(7)]
    expected = [Sequence(text, 3 + i, 1.0, 1.0, (i,)) for i in range(7)]
    list(Batcher(model, 2, set(), 0, sampling=True).run(wanted))
    list(Batcher(model, 7, set(), 0, sampling=True, snapshots=0).run(expected))
    assert [s.tokens for s in wanted] == [s.tokens for s in expected]
    assert sum(s.prompt_computed for s in expected) == 30 and expected[0].prompt_computed == 30
    joins = 30 - 29 + sum(s.prompt_computed for s in wanted) - 30  # one token each, after 29 that all share
    assert 29 + joins == sum(s.prompt_computed for s in wanted) and 4 <= joins <= 7


def test_full_caches_of_several_beginnings_are_one_batch(gqa):
    """Padding between a prefix and what follows it, which is attended to or moves positions; rows out of place."""
    texts = [
        prompt(9) + prompt(2, 1),
        prompt(9) + prompt(7, 2),
        prompt(4, 3) + prompt(3, 4),
        prompt(4, 3) + prompt(1, 5),
    ]
    together, expected = decoding_of(gqa.stock), decoding_of(gqa.stock)
    with torch.inference_mode():
        wanted = expected.prefill(texts)
        long, short = together.snapshot(texts[0][:9]), together.snapshot(texts[2][:4])
        assert long.tokens == tuple(prompt(9)) and len(short) == 4
        got = torch.cat([
            together.join(texts[:2], [0, 1], 4, long), together.join(texts[2:], [2, 3], 4, short),
        ])  # fmt: skip
        assert_close(got, wanted)
        assert together.position.tolist() == expected.position.tolist()
        for _ in range(3):
            for ours, theirs in zip(together.cache.layers, expected.cache.layers, strict=True):
                assert ours.keys.shape == theirs.keys.shape
                for row, mask in enumerate(expected.mask.bool()):
                    assert_close(ours.keys[row][:, mask], theirs.keys[row][:, mask])
                    assert_close(ours.values[row][:, mask], theirs.values[row][:, mask])
            assert torch.equal(together.mask, expected.mask)
            for each in (together, expected):
                each.start(torch.tensor([3, 4, 5, 6]), [0, 1, 2, 3])
            for one, other in zip(together.decode(2), expected.decode(2), strict=True):
                assert_close(one, other)
    for keys, _ in long.layers:
        assert keys.shape[0] == 1 and keys.shape[2] == 9, "a snapshot that grew with its rows"


@pytest.mark.parametrize("contexts, variant", [
    *((4, name) for name in FLAGS), *((1, name) for name in ("rotation", "full cache")),
])  # fmt: skip
def test_log_likelihoods_are_those_without_sharing(gqa, variant, contexts):
    """A continuation scored after another's context, or contexts that are counted as often as they are fed."""
    model, texts = model_of(gqa, FLAGS[variant]), tree(3)
    pairs = [(text, prompt(1 + (i + k) % 5, 7 * i + k)) for i, text in enumerate(texts) for k in range(3)]
    counts, before = Counter(), Counter()
    got = dict(log_likelihoods_in_batches(model, pairs, contexts, counts=counts))
    expected = dict(log_likelihoods_in_batches(model, pairs, contexts, snapshots=0, counts=before))
    assert sorted(got) == list(range(len(pairs)))
    for i, score in expected.items():
        assert got[i].greedy == score.greedy and got[i].after_eviction == score.after_eviction
        assert got[i].logprob == pytest.approx(score.logprob, abs=2e-4)
    assert counts.total() == before.total() == sum(len(context) for context, _ in pairs)
    assert counts["prompt_tokens_computed"] < before["prompt_tokens_computed"]


def test_fidelity_is_that_without_sharing(gqa):
    """Columns of the full cache that no longer belong to the token whose attention is lost."""
    model, texts = model_of(gqa, {}), tree(5)
    said = [prompt(6, 90 + i) for i in range(len(texts))]
    prefixes = [SharedPrefixes(decoding_of(of), texts, 9, 2**40) for of in (gqa.stock, model)]
    order = prefixes[1].order
    assert prefixes[0].order == order != sorted(order)
    rows = [[texts[i] for i in order], [said[i] for i in order]]
    prefills = tuple(lambda to, of=of: of.prefill(to, order) for of in prefixes)
    got, retention = compare(gqa.stock, model, *rows, 0, 2, None, prefills)
    expected, other = compare(gqa.stock, model, *rows, 0, 2)
    for one, wanted in zip(got, expected, strict=True):
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(wanted), rel=1e-3, abs=1e-4)
    assert torch.equal(retention.last_held, other.last_held)
    assert all(of.counts["prompt_tokens_shared"] > 0 for of in prefixes)
    forced = ForcedDecode(model, rows[0], prefill=prefills[1])
    assert_close(forced.logits, ForcedDecode(model, rows[0]).logits)
