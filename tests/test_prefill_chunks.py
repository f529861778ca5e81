"""Prompts in chunks: H2O's `prefill_chunk`, and generate's `prefill_chunk_size`."""

import pytest
import torch

from conftest import (
    BACKENDS,
    VOCAB,
    assert_close,
    assert_follows_oracle,
    assert_invariants,
    assert_row_is_oracles,
    forward,
    generate,
    new_cache,
    new_oracle,
    prompt,
    with_flags,
)
from h2optimizer.utils.cache import HHCache


def test_chunks_of_a_prompt_are_forwards_of_their_own(gqa):
    """generate's prefill_chunk_size: chunks of which some hold only padding of a row."""
    flags = {"window_length": 8, "update_interval": 3}
    model, rows = with_flags(gqa, **flags), [prompt(17), prompt(6)]
    cache = HHCache(model.h2o)
    result = generate(model, rows, 6, past_key_values=cache, prefill_chunk_size=5)
    for b, row in enumerate(rows):
        oracle = new_oracle(gqa, **flags)
        padding = 17 - len(row)
        chunks = [row[max(0, begin - padding) : max(0, begin + 5 - padding)] for begin in range(0, 17, 5)]
        for index, chunk in enumerate(chunks[:-1]):
            if chunk:
                oracle.forward(chunk)
            oracle.clock = index + 1
        assert_follows_oracle(result, b, oracle, chunks[-1])
        assert_row_is_oracles(cache, b, oracle)
    expected = generate(gqa.stock, rows, 4).sequences
    model = with_flags(gqa, window_length=64, update_interval=3)
    for size in (1, 5, 16):  # the mask must be read even for chunks of one column, as no decode step's is
        assert torch.equal(generate(model, rows, 4, prefill_chunk_size=size).sequences, expected)


CHUNKED = [{}, {"score_queries": 4}, {"score_decay": 0.5, "score_norm": "mean"}, {"position_rolling": True}]


@pytest.mark.parametrize("llamas, backend, flags", [
    *(("gqa", BACKENDS[i % 2], flags) for i, flags in enumerate(CHUNKED)), ("gqa", "sdpa", CHUNKED[2]),
    ("mqa", "eager", CHUNKED[1]),
], ids=str, indirect=["llamas"])  # fmt: skip
def test_chunks_in_a_wide_window_are_the_exact_prefill(llamas, backend, flags):
    """Chunks that a prompt shows where nothing is dropped: in its logits, in slots and mass, and so in what a later
    turn evicts; or a clock that ticks with each, so that decode steps slim at other times."""
    rows, turn = [prompt(21), prompt(6), prompt(14)], [prompt(7, 1), prompt(9, 1), prompt(2, 1)]
    wide = {"window_length": 21, "update_interval": 4, "backend": backend, **flags}
    for chunk in (1, 5, 20, 21):
        exact, chunked = new_cache(**wide), new_cache(**wide, prefill_chunk=chunk)
        for step, block in enumerate((rows, *([[token]] * 3 for token in prompt(6)))):
            expected, logits = (forward(llamas.h2o, block, cache) for cache in (exact, chunked))
            for b in range(3):
                assert_close(logits[b], expected[b], what=f"chunks of {chunk}, forward {step}, row {b}")
            assert (chunked.clock, chunked.lengths, chunked.evictions) == (exact.clock, exact.lengths, exact.evictions)
            for layer, other in zip(chunked.layers, exact.layers, strict=True):
                assert torch.equal(layer.slots.positions, other.slots.positions)
                assert_close(layer.slots.mass, other.slots.mass, what=f"mass, chunks of {chunk}")
        assert max(exact.evictions) == 1, "tells nothing of what is ranked"
        forward(llamas.h2o, turn, chunked)
        assert chunked.clock == 8 and chunked.get_seq_length() == 21 + 6 + 9


def test_a_prompt_of_any_length_takes_window_and_chunk(gqa):
    """Slots, keys or positions that grow with the prompt, or chunks as long as the prompt."""
    flags = {"window_length": 8, "update_interval": 2, "position_rolling": True, "prefill_chunk": 6}
    model, cache, seen = with_flags(gqa, **flags), new_cache(**flags), []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].shape[1], kwargs["position_ids"].max().item())),
        with_kwargs=True,
    )
    long = [token for part in range(4) for token in prompt(300, part)]  # more than the model is said to know
    try:
        with torch.no_grad():
            logits = model(torch.tensor([long]), past_key_values=cache, logits_to_keep=2).logits
    finally:
        hook.remove()
    assert seen == [(6, 5), (6, 11)] + [(6, 13)] * 198
    assert logits.shape == (1, 2, VOCAB) and logits.isfinite().all()
    assert (cache.seen, cache.lengths, cache.evictions, cache.clock) == ([1200], [8], [199], 1)
    assert_invariants(cache)


def test_chunks_whose_queries_do_not_count_take_no_mass(gqa):
    """A pass over keys for the mass of no query."""
    flags = {"window_length": 20, "score_queries": 3, "prefill_chunk": 8}
    cache, scored, begin = new_cache(**flags), [], HHCache.begin
    cache.begin = lambda *args, **kwargs: scored.append((step := begin(cache, *args, **kwargs)).scored) or step
    forward(gqa.h2o, [prompt(20), prompt(20, 1)], cache)
    assert scored == [False, False, True]


def test_a_forward_that_stopped_between_chunks(gqa, monkeypatch):
    """What is left of a prompt that a Ctrl-C came in: the next prompt must not go on from there."""
    flags = {"window_length": 8, "update_interval": 2, "prefill_chunk": 4}
    cache, end = new_cache(**flags), HHCache.end

    def stop(cache, gaps):
        end(cache, gaps)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HHCache, "end", stop)
        forward(gqa.h2o, [prompt(10)], cache)
    assert not cache.can_join
    with pytest.raises(RuntimeError, match=r"did not finish.*reset"):
        forward(gqa.h2o, [prompt(10)], cache)
    cache.reset()
    assert torch.equal(forward(gqa.h2o, [prompt(10)], cache)[0], forward(gqa.h2o, [prompt(10)], new_cache(**flags))[0])
