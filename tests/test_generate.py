"""H2OLlamaForCausalLM, through `generate` and its own forward, against the oracle, single rows and stock Llama."""

import copy
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaForCausalLM

from conftest import (
    BACKENDS,
    VOCAB,
    Llamas,
    addresses,
    assert_close,
    assert_invariants,
    assert_row_is_oracles,
    forward,
    generate,
    left_pad,
    make_llamas,
    new_cache,
    new_oracle,
    prompt,
    set_checkpointing,
    slot_tensors,
)
from h2optimizer import H2OConfig, H2OLlamaForCausalLM
from utils.cache import CACHE_ARGUMENT, HHCache


def with_flags(llamas, **flags) -> H2OLlamaForCausalLM:
    llamas.h2o.h2o = H2OConfig(**flags)
    return llamas.h2o


def new_tokens(result, rows) -> list[list[int]]:
    return result.sequences[:, max(map(len, rows)) :].tolist()


def assert_follows_oracle(result, row, oracle, block):
    """The logits of each step are the oracle's on the tokens that were emitted; feeds all of them but the last."""
    logits = torch.stack(result.logits)[:, row]
    tokens = result.sequences[row, result.sequences.shape[1] - len(logits) :].tolist()
    for step, token in enumerate(tokens):
        expected = oracle.forward(block)[-1]
        assert_close(logits[step], expected, what=f"logits of row {row}, step {step}")
        block = [token]
    return tokens


# Every flag against the oracle

VARIANTS = {
    "H2O": {"update_interval": 1},
    "rotation": {"update_interval": 4},
    "rotation longer than the generation": {"update_interval": 16},
    "local": {"num_heavy_hitters": 0},
    "one recent slot": {"num_heavy_hitters": 7, "update_interval": 2},
    "sink": {"score": "sink"},
    "4 sinks": {"score": "streaming_llm", "window_length": 7},
    "random": {"score": "random", "score_seed": 3},
    "decay": {"score_decay": 0.5},
    "last forward only": {"score_decay": 0.0},
    "last due step only": {"score_decay": 0.0, "score_every_step": False},
    "decay on scored steps": {"score_decay": 0.5, "score_every_step": False},
    "mean": {"score_norm": "mean"},
    "mean of some": {"score_norm": "mean", "score_decay": 0.75, "score_queries": 4, "score_every_step": False},
    "last queries": {"score_queries": 3},
    "more queries than tokens": {"score_queries": 99},
    "pure attention between": {"score_every_step": False},
    "first head": {"group_reduce": "first"},
    "first head's mean": {"group_reduce": "first", "score_norm": "mean", "update_interval": 1},
    "rolling": {"position_rolling": True},
    "rolling H2O": {"position_rolling": True, "update_interval": 1, "score_decay": 0.5},
    "rolling random": {"position_rolling": True, "score": "random", "slimming": "mask"},
    "mask": {"slimming": "mask", "score_norm": "mean", "update_interval": 1},
    "chunks": {"prefill_chunk": 4, "score_decay": 0.5},
    "rolling chunks": {"prefill_chunk": 3, "position_rolling": True, "score_norm": "mean"},
    "chunks of last queries": {"prefill_chunk": 4, "score_queries": 2, "score_decay": 0.5, "slimming": "mask"},
    "chunks of one": {"prefill_chunk": 1, "update_interval": 2},
}


def conversation(llamas, caches, flags, blocks):
    """The same forwards on every cache and on the oracle: logits, and what is kept, agree after each of them."""
    oracle = new_oracle(llamas, **flags)
    for block in blocks:
        expected = oracle.forward(block)
        for cache in caches:
            (logits,) = forward(llamas.h2o, [block], cache)
            assert_close(logits, expected, what=f"{cache.h2o.backend}, forward {oracle.clock}")
            assert_row_is_oracles(cache, 0, oracle)
            assert_invariants(cache)
    return oracle


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_flag_is_the_oracles(llamas, variant):
    """A flag that does something else than it says, in prompt, decode steps, a second turn or the steps after it."""
    flags = {"window_length": 8, "update_interval": 3, **variant}
    decode = [[token] for token in prompt(20, 1)]
    blocks = [prompt(13), *decode[:8], prompt(5, 2), *decode[8:15]]
    caches = [new_cache(**flags, backend=backend) for backend in BACKENDS]
    oracle = conversation(llamas, caches, flags, blocks)
    assert oracle.evictions >= 2


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 20])
def test_prompts_around_the_window(llamas, length):
    """A prompt of one token, or shorter than, as long as and longer than the window, that slims too early or not."""
    flags = {"window_length": 8, "update_interval": 2}
    caches = [new_cache(**flags, backend=backend) for backend in BACKENDS]
    conversation(llamas, caches, flags, [prompt(length), *([token] for token in prompt(10, 1))])


@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries(
        {
            "window_length": st.just(6),
            "num_heavy_hitters": st.integers(-1, 5),
            "update_interval": st.integers(1, 5),
            "score_every_step": st.booleans(),
            "score_decay": st.sampled_from([1.0, 0.7, 0.0]),
            "score_norm": st.sampled_from(["sum", "mean"]),
            "score_queries": st.sampled_from([None, 1, 4]),
            "group_reduce": st.sampled_from(["sum", "first"]),
            "position_rolling": st.booleans(),
            "slimming": st.sampled_from(["H", "mask"]),
            "backend": st.sampled_from(BACKENDS),
            "prefill_chunk": st.sampled_from([None, None, 2, 3, 5]),
        }
    ),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
)
def test_flags_in_any_combination(gqa, flags, turns, steps):
    """Flags that are right one by one and wrong together."""
    tokens = iter(prompt(99))
    blocks = []
    for turn, decode in zip(turns, steps, strict=True):
        blocks += [[next(tokens) for _ in range(turn)], *([next(tokens)] for _ in range(decode))]
    conversation(gqa, [new_cache(**flags)], flags, blocks)


# generate


@pytest.mark.parametrize("new", [1, 3, 4, 5, 6, 8, 9, 10])
@pytest.mark.parametrize("rolling", [False, True])
def test_greedy_generations_of_any_length(llamas, new, rolling):
    """A step clock that runs with the generation: it must end before, on and after a due step (4 and 8) alike."""
    flags = {"window_length": 6, "update_interval": 4, "position_rolling": rolling}
    model, oracle = with_flags(llamas, **flags), new_oracle(llamas, **flags)
    cache = HHCache(model.h2o)
    result = generate(model, [prompt(11)], new, past_key_values=cache)
    assert new_tokens(result, [prompt(11)])[0] == oracle.generate(prompt(11), new)
    assert result.past_key_values is cache and cache.clock == new
    assert_row_is_oracles(cache, 0, oracle)


@pytest.mark.parametrize("interval", [1, 4, 16])
@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_left_padded_batch_is_its_rows_alone(llamas, interval, rolling, backend):
    """Padding that takes slots, mass or positions, or a row that is slimmed as its neighbours are."""
    flags = {"window_length": 8, "update_interval": interval, "position_rolling": rolling}
    model = with_flags(llamas, **flags, backend=backend)
    rows, new = [prompt(13), prompt(3), prompt(8), prompt(1)], 19
    together = HHCache(model.h2o)
    batch = generate(model, rows, new, past_key_values=together)
    assert_invariants(together)
    for b, row in enumerate(rows):
        alone = HHCache(model.h2o)
        single = generate(model, [row], new, past_key_values=alone)
        assert new_tokens(batch, rows)[b] == new_tokens(single, [row])[0], f"row {b}"
        assert_close(torch.stack(batch.logits)[:, b], torch.stack(single.logits)[:, 0], what=f"row {b}")
        assert (together.lengths[b], together.seen[b]) == (alone.lengths[0], alone.seen[0])
        assert together.evictions[b] == alone.evictions[0]
        length = alone.lengths[0]
        for layer_idx, (layer, own) in enumerate(zip(together.layers, alone.layers, strict=True)):
            assert torch.equal(together.positions(layer_idx)[b, :, :length], alone.positions(layer_idx)[0])
            for name in ("keys", "values", "mass"):
                ours, theirs = getattr(layer.slots, name), getattr(own.slots, name)
                assert_close(ours[b, :, :length], theirs[0, :, :length], what=name)
    oracle = new_oracle(llamas, **flags)
    assert new_tokens(batch, rows)[1] == oracle.generate(rows[1], new)
    assert_row_is_oracles(together, 1, oracle)


@pytest.mark.parametrize("flags", [
    {"score": "random"},
    {"score_norm": "mean", "score_queries": 2},
    {"prefill_chunk": 5, "score_decay": 0.5, "position_rolling": True},
    {"prefill_chunk": 4, "score_queries": 3, "backend": "eager"},
], ids=str)  # fmt: skip
def test_scores_know_nothing_of_the_batch(llamas, flags):
    """A pseudo-random choice drawn for the batch, or counts, last queries and chunks that include padding, or decay in
    a chunk that a row has no token in."""
    flags = {"window_length": 6, "update_interval": 2, **flags}
    model, rows = with_flags(llamas, **flags), [prompt(4), prompt(12), prompt(9)]
    cache = HHCache(model.h2o)
    batch = generate(model, rows, 9, past_key_values=cache)
    for b, row in enumerate(rows):
        oracle = new_oracle(llamas, **flags)
        assert_follows_oracle(batch, b, oracle, row)
        assert_row_is_oracles(cache, b, oracle)


def test_random_is_fixed_by_its_seed(gqa):
    """A seed that is not used, or a global generator that is."""
    kept = {}
    for seed, disturbance in itertools.product((0, 1), (0, 1)):
        torch.manual_seed(disturbance)
        model = with_flags(gqa, window_length=8, update_interval=1, score="random", score_seed=seed)
        cache = HHCache(model.h2o)
        generate(model, [prompt(30)], 5, past_key_values=cache)
        kept[seed, disturbance] = [cache.positions(layer).tolist() for layer in range(2)]
    assert kept[0, 0] == kept[0, 1] and kept[1, 0] == kept[1, 1] and kept[0, 0] != kept[1, 0]
    assert kept[0, 0][0] != kept[0, 0][1], "layers choose alike"
    assert kept[0, 0][0][0][0] != kept[0, 0][0][0][1], "heads choose alike"


@pytest.mark.parametrize("rolling", [False, True])
def test_a_second_prompt_and_a_second_model_start_afresh(llamas, rolling):
    """State that outlives a generation: in an attention module, a class or a default argument."""
    flags = {"window_length": 8, "update_interval": 3, "position_rolling": rolling}
    model, oracle = with_flags(llamas, **flags), new_oracle(llamas, **flags)
    other = H2OLlamaForCausalLM(llamas.stock.config, model.h2o).eval()
    other.load_state_dict(llamas.stock.state_dict())
    for length, new in ((12, 7), (5, 2), (9, 10)):
        row = prompt(length, new)
        expected = oracle.generate(row, new)
        for each in (model, other):
            result = generate(each, [row], new)
            assert new_tokens(result, [row])[0] == expected
            assert_row_is_oracles(result.past_key_values, 0, oracle)


@pytest.mark.parametrize("interval", [1, 4])
def test_an_early_stop_leaves_no_trace(llamas, interval):
    """A stop before the full length that desynchronises the next prompt."""
    flags = {"window_length": 8, "update_interval": interval}
    model, oracle = with_flags(llamas, **flags), new_oracle(llamas, **flags)
    tokens = oracle.generate(prompt(12), 12)
    eos = tokens[5]
    stop = tokens.index(eos) + 1
    cache = HHCache(model.h2o)
    result = generate(model, [prompt(12)], 12, past_key_values=cache, eos_token_id=eos)
    assert new_tokens(result, [prompt(12)])[0] == tokens[:stop] == oracle.generate(prompt(12), 12, eos=eos)
    assert cache.clock == stop and stop < 12
    assert_row_is_oracles(cache, 0, oracle)
    cache.reset()
    for settings_ in ({"past_key_values": cache}, {}):
        result = generate(model, [prompt(10, 1)], 9, **settings_)
        assert new_tokens(result, [prompt(10, 1)])[0] == oracle.generate(prompt(10, 1), 9)
        assert_row_is_oracles(result.past_key_values, 0, oracle)


def test_rows_that_stop_do_not_touch_the_others(gqa):
    """A row that ends early and is fed padding from then on, in a batch that goes on."""
    model = with_flags(gqa, window_length=8, update_interval=2)
    rows = [prompt(12), prompt(6)]
    alone = [new_tokens(generate(model, [row], 12), [row])[0] for row in rows]
    eos = next(token for token in alone[0][:6] if token not in alone[1])
    batch = new_tokens(generate(model, rows, 12, eos_token_id=eos), rows)
    stop = alone[0].index(eos) + 1
    assert batch == [alone[0][:stop] + [0] * (12 - stop), alone[1]]


@pytest.mark.parametrize("lengths", [(3, 3, 3), (4, 2, 6)], ids=["alike", "ragged"])
@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("interval", [1, 3])
def test_a_second_turn_on_the_same_cache(llamas, interval, rolling, lengths):
    """A turn of several tokens after evictions: wrong starts, positions or causal bounds in ragged rows, which alone
    would show in one row and not in the other."""
    flags = {"window_length": 8, "update_interval": interval, "position_rolling": rolling}
    model, rows = with_flags(llamas, **flags), [prompt(11), prompt(2), prompt(7)]
    oracles = [new_oracle(llamas, **flags) for _ in rows]
    cache, inputs = HHCache(model.h2o), left_pad(rows)
    blocks = rows
    for turn in range(3):
        result = model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            past_key_values=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = [assert_follows_oracle(result, b, oracles[b], blocks[b]) for b in range(3)]
        for b in range(3):
            assert_row_is_oracles(cache, b, oracles[b])
        # The last token of each row is not in the cache yet: it opens the next turn, behind the turn's padding.
        blocks = [[row[-1], *prompt(length, turn)] for row, length in zip(tokens, lengths, strict=True)]
        added = left_pad(blocks)
        inputs = {
            "input_ids": torch.cat([result.sequences[:, :-1], added["input_ids"]], dim=1),
            "attention_mask": torch.cat(
                [inputs["attention_mask"], torch.ones(3, 5, dtype=torch.long), added["attention_mask"]], dim=1
            ),
        }
    assert min(cache.evictions) >= 4


@pytest.mark.parametrize("mask_says", ["all", "none", "left padding"])
@pytest.mark.parametrize("window", [8, 64])
def test_what_is_fed_to_a_row_that_has_ended_leaves_no_trace(gqa, window, mask_says):
    """Padding that takes slots, mass or positions, or is taken for text in the next turn, whatever the mask says of it
    there. The row is what the oracle holds of it alone, with the slimmings that fall due while it waits."""
    flags = {"window_length": window, "update_interval": 2, "score_decay": 0.5}
    model, rows, turn = with_flags(gqa, **flags), [prompt(12), prompt(6)], [prompt(3), prompt(3, 1)]
    alone = [new_tokens(generate(model, [row], 8), [row])[0] for row in rows]
    eos = next(token for token in alone[0][:4] if token not in alone[1])
    end = alone[0].index(eos) + 1  # tokens of the first row, the last of which is fed
    cache = HHCache(model.h2o)
    result = generate(model, rows, 8, eos_token_id=eos, past_key_values=cache)
    oracles = [new_oracle(gqa, **flags) for _ in rows]
    for row, oracle, tokens in zip(rows, oracles, (alone[0][:end], alone[1][:7]), strict=True):
        oracle.forward(row)
        for token in tokens:
            oracle.forward([token])
    for _ in range(end, 7):
        oracles[0].wait()
    for b in range(2):
        assert_row_is_oracles(cache, b, oracles[b])
    inputs = {"input_ids": torch.cat([result.sequences, torch.tensor(turn)], dim=1)}
    if mask_says != "none":
        inputs["attention_mask"] = torch.cat([left_pad(rows)["attention_mask"], torch.ones(2, 8 + 3)], dim=1).long()
    if mask_says == "all":
        inputs["attention_mask"][0, 12 + end : 20] = 0
    if mask_says == "none":
        logits = model(inputs["input_ids"][:, -4:], past_key_values=cache).logits
    else:
        logits = generate_logits(model, cache, inputs)
    blocks = [turn[0] if mask_says == "all" else [0, *turn[0]], [alone[1][7], *turn[1]]]
    for b in range(2):
        assert_close(logits[b, -1:], oracles[b].forward(blocks[b])[-1:], what=f"row {b}")
        assert_row_is_oracles(cache, b, oracles[b])


def generate_logits(model, cache, inputs):
    """The logits of the first token that generate decodes after these inputs: [B, 1, vocabulary]."""
    settings = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return model.generate(**inputs, past_key_values=cache, **settings).logits[0][:, None]


@pytest.mark.parametrize("change", ["hide", "show", "shorter", "longer"])
def test_tokens_cannot_be_masked_after_the_fact(gqa, change):
    """A second turn whose mask says something else of columns than the first: what was attended to cannot be undone."""
    model, rows = with_flags(gqa, window_length=64), [prompt(12), prompt(6)]
    cache = HHCache(model.h2o)
    forward(model, rows, cache)
    past = left_pad(rows)["attention_mask"]
    past[1, {"hide": 8, "show": 2}.get(change, 0)] = {"hide": 0, "show": 1}.get(change, 0)
    if change == "shorter":
        past = past[:, 1:]
    elif change == "longer":
        past = torch.cat([torch.ones(2, 1, dtype=torch.long), past], dim=1)
    mask, clock, lengths = torch.cat([past, torch.ones(2, 3)], dim=1), cache.clock, cache.lengths
    with pytest.raises(ValueError, match=r"attention_mask: (hides|shows)"):
        model(torch.tensor([prompt(3), prompt(3)]), attention_mask=mask, past_key_values=cache)
    assert (cache.clock, cache.lengths) == (clock, lengths)
    forward(model, [prompt(3), prompt(3)], cache)  # the refusal did no harm


def test_later_forwards_take_a_mask_of_all_or_of_the_new_columns(llamas):
    """A mask read from the wrong end: the first columns of the conversation for the turn's own."""
    flags = {"window_length": 8, "update_interval": 2}
    rows, turn = [prompt(11), prompt(4)], [prompt(2, 1), prompt(5, 1)]
    logits = []
    for whole in (False, True):
        cache = new_cache(**flags)
        forward(llamas.h2o, rows, cache)
        inputs = left_pad(turn)
        if whole:
            inputs["attention_mask"] = torch.cat([left_pad(rows)["attention_mask"], inputs["attention_mask"]], dim=1)
        with torch.no_grad():
            logits.append(llamas.h2o(**inputs, past_key_values=cache).logits)
    assert torch.equal(*logits)
    for b in range(2):
        oracle = new_oracle(llamas, **flags)
        oracle.forward(rows[b])
        assert_close(logits[0][b, 5 - len(turn[b]) :], oracle.forward(turn[b]))


def test_chunks_of_a_prompt_are_forwards_of_their_own(llamas):
    """generate's prefill_chunk_size: chunks of which some hold only padding of a row."""
    flags = {"window_length": 8, "update_interval": 3}
    model, rows = with_flags(llamas, **flags), [prompt(17), prompt(6)]
    cache = HHCache(model.h2o)
    result = generate(model, rows, 6, past_key_values=cache, prefill_chunk_size=5)
    for b, row in enumerate(rows):
        oracle = new_oracle(llamas, **flags)
        padding = 17 - len(row)
        chunks = [row[max(0, begin - padding) : max(0, begin + 5 - padding)] for begin in range(0, 17, 5)]
        for index, chunk in enumerate(chunks[:-1]):
            if chunk:
                oracle.forward(chunk)
            oracle.clock = index + 1
        assert_follows_oracle(result, b, oracle, chunks[-1])
        assert_row_is_oracles(cache, b, oracle)
    expected = generate(llamas.stock, rows, 4).sequences
    model = with_flags(llamas, window_length=64, update_interval=3)
    for size in (1, 5, 16):  # the mask must be read even for chunks of one column, as no decode step's is
        assert torch.equal(generate(model, rows, 4, prefill_chunk_size=size).sequences, expected)


CHUNKED = [{}, {"score_queries": 4}, {"score_decay": 0.5, "score_norm": "mean"}, {"position_rolling": True}]


@pytest.mark.parametrize("flags", CHUNKED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
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
    long = [token for part in range(10) for token in prompt(300, part)]  # three times what the model is said to know
    try:
        with torch.no_grad():
            logits = model(torch.tensor([long]), past_key_values=cache, logits_to_keep=2).logits
    finally:
        hook.remove()
    assert seen == [(6, 5), (6, 11)] + [(6, 13)] * 498
    assert logits.shape == (1, 2, VOCAB) and logits.isfinite().all()
    assert (cache.seen, cache.lengths, cache.evictions, cache.clock) == ([3000], [8], [499], 1)
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


def test_embeddings_in_place_of_tokens(gqa):
    """inputs_embeds that are not freed of padding as tokens are, or that feed later steps too."""
    model, rows = with_flags(gqa, window_length=8, update_interval=3), [prompt(13), prompt(4)]
    expected = generate(model, rows, 8)
    inputs = left_pad(rows)
    result = model.generate(
        inputs_embeds=model.model.embed_tokens(inputs.pop("input_ids")).detach(),
        **inputs,
        max_new_tokens=8,
        do_sample=False,
    )
    assert result.tolist() == new_tokens(expected, rows)


# Sampling and beams


@pytest.mark.parametrize("rolling", [False, True])
def test_sampled_sequences_are_consistent(llamas, rolling):
    """num_return_sequences whose rows share or mix their slots: each row's logits are the oracle's on its tokens."""
    flags = {"window_length": 8, "update_interval": 3, "position_rolling": rolling}
    model, rows = with_flags(llamas, **flags), [prompt(11), prompt(5)]
    cache = HHCache(model.h2o)
    torch.manual_seed(1)
    result = generate(model, rows, 9, past_key_values=cache, do_sample=True, num_return_sequences=2, temperature=1.5)
    assert len(set(map(tuple, new_tokens(result, rows)))) == 4, "the samples differ, or the test says nothing"
    for b in range(4):
        oracle = new_oracle(llamas, **flags)
        assert_follows_oracle(result, b, oracle, rows[b // 2])
        assert_row_is_oracles(cache, b, oracle)


BEAMS = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "early_stopping": False}


def beam_search(model, rows, new, **more):
    result = generate(model, rows, new, output_scores=True, **BEAMS, **more)
    first = result.beam_indices.reshape(len(rows), 3, -1)[..., 1:new]
    assert (first != first[..., :1]).any(), "beams change places, or the test says nothing"
    return result


@pytest.mark.parametrize("flags", [
    {"update_interval": 1},
    {"update_interval": 1, "position_rolling": True, "slimming": "mask"},
    {"update_interval": 3},
    {"update_interval": 3, "score_norm": "mean", "score_decay": 0.5},
    {"update_interval": 1, "score": "random"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("lengths", [(9, 9), (12, 4)], ids=["alike", "ragged"])
def test_beams_score_their_own_tokens(llamas, flags, lengths):
    """Keys, mass or positions that do not follow their beam: its score would be that of tokens it does not hold."""
    flags = {"window_length": 6, **flags}
    model, rows, new = with_flags(llamas, **flags), [prompt(length) for length in lengths], 12
    result = beam_search(model, rows, new)
    for b, tokens in enumerate(new_tokens(result, rows)):
        oracle, block, score = new_oracle(llamas, **flags), rows[b // 3], 0.0
        for token in tokens:
            score += oracle.forward(block)[-1].log_softmax(-1)[token].item()
            block = [token]
        assert abs(score - result.sequences_scores[b].item()) < 1e-4, f"beam {b}"
        assert oracle.evictions > 0


@pytest.mark.parametrize("rolling", [False, True])
def test_beams_with_a_wide_window_are_stocks(llamas, rolling):
    """Beam search that goes its own way even where nothing is evicted."""
    rows = [prompt(10), prompt(4)]
    expected = beam_search(llamas.stock, rows, 10)
    model = with_flags(llamas, window_length=64, update_interval=2, position_rolling=rolling)
    result = beam_search(model, rows, 10)
    assert torch.equal(result.sequences, expected.sequences)
    assert_close(result.sequences_scores, expected.sequences_scores, 1e-5)


# A wide window is plain Llama


def assert_is_stock(llamas, rows, new, **flags):
    expected = generate(llamas.stock, rows, new)
    model = with_flags(llamas, **flags)
    cache = HHCache(model.h2o)
    result = generate(model, rows, new, past_key_values=cache)
    assert torch.equal(result.sequences, expected.sequences)
    assert_close(torch.stack(result.logits), torch.stack(expected.logits), 1e-5)
    assert cache.evictions == [0] * len(rows) and cache.lengths == cache.seen


@pytest.mark.parametrize("lengths", [(12,), (12, 3, 7)], ids=["one row", "left-padded"])
@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_window_is_stock(llamas, backend, rolling, lengths):
    """An approximation where none is asked for; the window is exactly as wide as it has to be."""
    rows = [prompt(length) for length in lengths]
    for interval in (1, 4):
        assert_is_stock(
            llamas, rows, 10, window_length=21, update_interval=interval, backend=backend, position_rolling=rolling
        )


def test_a_window_one_slot_too_narrow_is_not_stock(gqa):
    """The guard of the test above: a window that is never applied would be stock as well."""
    model = with_flags(gqa, window_length=20, update_interval=1)
    assert generate(model, [prompt(12)], 10).past_key_values.evictions == [1]
    assert generate(model, [prompt(12)], 9).past_key_values.evictions == [0]


ROPES = {
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn's attention": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "attention_factor": 1.5,
                         "beta_fast": 16.0, "original_max_position_embeddings": 16},
    "yarn's mscale": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 0.5,
                      "truncate": False, "original_max_position_embeddings": 16},
}  # fmt: skip
# Frequencies of these follow the longest position so far; beyond 16 they change.
GROWING = {
    "dynamic": {"max_position_embeddings": 16,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    "longrope": {"max_position_embeddings": 64,
                 "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
                                     "original_max_position_embeddings": 16,
                                     "short_factor": [1.0] * 4 + [1.5] * 4, "long_factor": [1.0] * 3 + [4.0] * 5}},
}  # fmt: skip
attention = GROWING["longrope"]["rope_parameters"] | {"attention_factor": 1.5}
GROWING["longrope's attention"] = GROWING["longrope"] | {"rope_parameters": attention}
CONFIGS = {name: {"rope_parameters": rope} for name, rope in ROPES.items()} | {
    "attention_bias": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 24, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_other_llamas(config):
    """Rope scaling that is not read, a bias left out, or head_dim taken for hidden_size / heads."""
    llamas = make_llamas(**config)
    for module in llamas.stock.modules():  # biases are born 0, and 0 cannot be missed
        if getattr(module, "bias", None) is not None:
            torch.nn.init.normal_(module.bias)
    llamas.h2o.load_state_dict(llamas.stock.state_dict())
    rows = [prompt(25), prompt(9)]
    for rolling, backend in itertools.product((False, True), BACKENDS):
        assert_is_stock(llamas, rows, 6, window_length=64, backend=backend, position_rolling=rolling)
        flags = {"window_length": 8, "update_interval": 2, "position_rolling": rolling}
        conversation(
            llamas, [new_cache(**flags, backend=backend)], flags, [prompt(11), *([t] for t in prompt(6)), prompt(4)]
        )


def frequencies(config, length: int) -> torch.Tensor:
    """RoPE's for 16 dimensions and a text of this length: float64 [8]."""
    rope, theta, by = config["rope_parameters"], 10000.0, 1.0
    if rope["rope_type"] == "dynamic" and length > 16:  # bloc97's NTK
        theta *= (rope["factor"] * length / 16 - (rope["factor"] - 1)) ** (16 / 14)
    elif rope["rope_type"] == "longrope":  # arXiv 2402.13753
        by = torch.tensor(rope["long_factor" if length > 16 else "short_factor"], dtype=torch.float64)
    return theta ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16) / by


@pytest.mark.parametrize("config", GROWING.values(), ids=GROWING)
def test_frequencies_that_follow_the_length(config):
    """Keys that are rotated anew without rolling, where stock Llama leaves them as they are; or that are not with it,
    where positions are slots and all keys have the frequencies of the step; frequencies of evicted tokens."""
    llamas = make_llamas(**config)
    for rows, backend in itertools.product(([prompt(12)], [prompt(13), prompt(4)], [prompt(25), prompt(9)]), BACKENDS):
        assert_is_stock(llamas, rows, 9, window_length=64, backend=backend)
    for length in (12, 25):
        flags = {"window_length": 64, "update_interval": 2, "position_rolling": True}
        oracle, cache = new_oracle(llamas, **flags), new_cache(**flags)
        for block in [prompt(length), *([token] for token in prompt(8, 1))]:
            oracle.inv_freq = frequencies(config, oracle.length() + len(block))
            assert_close(forward(llamas.h2o, [block], cache)[0], oracle.forward(block), what=f"{oracle.seen} tokens")
    rotary = llamas.stock.model.rotary_emb
    llamas.stock(torch.tensor([prompt(3)]))  # back to the first frequencies, the oracle's
    assert torch.equal(rotary.inv_freq, rotary.original_inv_freq)
    flags = {"window_length": 8, "update_interval": 2, "position_rolling": True, "prefill_chunk": 6}
    conversation(llamas, [new_cache(**flags)], flags, [prompt(40), *([token] for token in prompt(6)), prompt(14)])


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("config", GROWING.values(), ids=GROWING)
def test_padding_stands_at_no_position(config, rolling):
    """A later turn whose padding comes to stand beyond all tokens, and changes the frequencies of all rows."""
    llamas, flags = make_llamas(**config), {"window_length": 32, "position_rolling": rolling}
    together, alone = new_cache(**flags), new_cache(**flags)
    forward(llamas.h2o, [prompt(2), prompt(14)], together)
    forward(llamas.h2o, [prompt(14)], alone)
    _, turn = forward(llamas.h2o, [prompt(5, 1), prompt(1, 1)], together)  # 5 columns from position 14 on: 18
    assert_close(turn, forward(llamas.h2o, [prompt(1, 1)], alone)[0])


@pytest.mark.parametrize("rope", [
    {"rope_theta": 10000.0},
    {"rope_theta": 5000.0, "rope_scaling": None},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                              "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
], ids=["Llama 1", "Llama 2", "linear", "dynamic", "Llama 3.1"])  # fmt: skip
def test_checkpoints_as_earlier_versions_wrote_them(tmp_path, rope):
    """A config without KV heads and head_dim, or a rope_scaling beside rope_theta, that is read as another model's."""
    make_llamas(num_key_value_heads=4, max_position_embeddings=16).stock.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("rope_parameters", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"):
        config.pop(name, None)
    path.write_text(json.dumps(config | rope))
    stock, h2o = (kind.from_pretrained(tmp_path).eval() for kind in (LlamaForCausalLM, H2OLlamaForCausalLM))
    theta, scaling = rope.get("rope_theta", 10000.0), rope.get("rope_scaling") or {}
    frequencies = theta ** -(torch.arange(0, 16, 2) / 16)
    plain = torch.allclose(h2o.model.rotary_emb.inv_freq, frequencies)
    assert plain == (not scaling or scaling.get("type") == "dynamic"), "tells nothing"
    assert torch.equal(h2o.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)
    assert_is_stock(Llamas(stock, h2o), [prompt(20), prompt(5)], 5, window_length=32)


def test_a_prompts_logits_are_stocks_whatever_the_window(llamas):
    """A prefill that slims before it attends; and hidden states, labels and logits_to_keep of a padded batch, whose
    tokens lie in several chunks."""
    rows = [prompt(20), prompt(7)]
    inputs = left_pad(rows)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(1) < 2, -100)  # nothing predicts the first
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = llamas.stock(**inputs, position_ids=positions, labels=labels, output_hidden_states=True)
        for chunk, given_positions in itertools.product((None, 6), ({}, {"position_ids": positions})):
            window = 4 if chunk is None else 20
            outputs = llamas.h2o(
                **inputs,
                **given_positions,
                labels=labels,
                output_hidden_states=True,
                past_key_values=new_cache(window_length=window, update_interval=1, prefill_chunk=chunk),
            )
            real = inputs["attention_mask"].bool()
            assert outputs.logits.shape == expected.logits.shape
            assert_close(outputs.logits[real], expected.logits[real], 1e-5)
            assert_close(outputs.loss, expected.loss, 1e-5)
            assert len(outputs.hidden_states) == len(expected.hidden_states)
            for hidden, stock in zip(outputs.hidden_states, expected.hidden_states, strict=True):
                assert_close(hidden[real], stock[real], 1e-5)
        for chunk, keep in itertools.product((None, 6), (1, 3, torch.tensor([4, 19]))):
            cache = new_cache(window_length=20, prefill_chunk=chunk)
            logits = llamas.h2o(**inputs, logits_to_keep=keep, past_key_values=cache).logits
            columns = slice(-keep, None) if isinstance(keep, int) else keep
            assert_close(logits[0], expected.logits[0, columns], 1e-5)
            assert_close(logits[1, -1], expected.logits[1, -1], 1e-5)


def test_outputs_as_a_tuple(gqa):
    """return_dict=False, which stock Llama takes."""
    model, ids = with_flags(gqa, window_length=8), torch.tensor([prompt(9)])
    with torch.no_grad():
        outputs, expected = model(ids, return_dict=False), gqa.stock(ids, return_dict=False)
    assert isinstance(outputs, tuple) and len(outputs) == len(expected)
    assert_close(outputs[0], expected[0], 1e-5)


def test_a_model_without_a_cache_makes_its_own(gqa):
    """A forward without past_key_values that hands back a cache of another kind or with other settings."""
    model = with_flags(gqa, window_length=8, update_interval=2)
    with torch.no_grad():
        cache = model(torch.tensor([prompt(12)])).past_key_values
        assert isinstance(cache, HHCache) and cache.h2o is model.h2o and cache.lengths == [8]
        assert model(torch.tensor([[5]]), past_key_values=cache).past_key_values is cache
    assert cache.seen == [13]


def test_rolled_positions_stay_below_the_capacity(gqa):
    """A stream that runs past the positions the model was trained on."""
    model = with_flags(gqa, window_length=8, update_interval=3, position_rolling=True)
    highest = []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: highest.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    try:
        generate(model, [prompt(10), prompt(2)], 40)
    finally:
        hook.remove()
    assert highest[0] == 9 and max(highest[1:]) == model.h2o.capacity - 1 == 10


def test_addresses_never_change(llamas):
    """Slots that are allocated anew on the way: no captured graph would survive it."""
    for slimming in ("H", "mask"):
        model = with_flags(llamas, window_length=8, update_interval=3, slimming=slimming, score_norm="mean")
        cache = HHCache(model.h2o)
        forward(model, [prompt(12), prompt(5)], cache)
        at = addresses(cache)
        assert len(at) == len(set(at.values())) == 2 * 5  # keys, values, mass, count and positions of two layers
        for token in range(1, 20):
            forward(model, [[token], [token]], cache)
            assert addresses(cache) == at
        cache.evict_for_space(2)
        forward(model, [prompt(2), prompt(9)], cache)
        cache.reorder_cache(torch.tensor([1, 1]))
        assert addresses(cache) == at
        for rows in ([prompt(20), prompt(1)], [prompt(3), prompt(4)]):
            cache.reset()
            generate(model, rows, 8, past_key_values=cache)
            assert addresses(cache) == at


# The model as a checkpoint and its flags


def test_checkpoints_are_plain_llamas(gqa, tmp_path):
    """A checkpoint that only this project can load, or that loses weights on the way in or out."""
    flags = H2OConfig(window_length=8, update_interval=2)
    expected = generate(gqa.stock, [prompt(9)], 6).sequences
    gqa.h2o.save_pretrained(tmp_path / "ours")
    gqa.stock.save_pretrained(tmp_path / "stock")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"] and saved["model_type"] == "llama"
    assert not any("h2o" in key.lower() for key in saved)
    for load in (LlamaForCausalLM, AutoModelForCausalLM):
        back = load.from_pretrained(tmp_path / "ours")
        assert type(back) is LlamaForCausalLM
        assert torch.equal(generate(back, [prompt(9)], 6).sequences, expected)
    for folder in ("ours", "stock"):
        model, info = H2OLlamaForCausalLM.from_pretrained(tmp_path / folder, h2o=flags, output_loading_info=True)
        assert model.h2o == flags and not any(info.values())
        for name, tensor in gqa.stock.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        cache = generate(model, [prompt(9)], 6).past_key_values
        assert cache.h2o == flags and cache.lengths == [9]
    assert H2OLlamaForCausalLM.from_pretrained(tmp_path / "stock").h2o == H2OConfig()


def test_new_flags_take_effect_at_the_next_generate(llamas):
    """Flags copied at construction; and a cache that is given keeps its own, whatever the model's have become."""
    flags = {"window_length": 8, "update_interval": 4}
    model = with_flags(llamas, **flags)
    for changes in ({"update_interval": 1}, {"window_length": 5}, {"position_rolling": True}, {"num_heavy_hitters": 0}):
        flags |= changes
        given_cache = HHCache(model.h2o)
        before = given_cache.h2o
        model.h2o = dataclasses.replace(model.h2o, **changes)
        oracle = new_oracle(llamas, **flags)
        result = generate(model, [prompt(12)], 9)
        assert new_tokens(result, [prompt(12)])[0] == oracle.generate(prompt(12), 9)
        assert_row_is_oracles(result.past_key_values, 0, oracle)
        generate(model, [prompt(12)], 9, past_key_values=given_cache)
        assert given_cache.h2o == before != model.h2o and max(given_cache.lengths) <= before.capacity
        old = new_oracle(llamas, **{**flags, **{name: getattr(before, name) for name in changes}})
        old.generate(prompt(12), 9)
        assert given_cache.evictions == [old.evictions] and given_cache.lengths == [old.length()]


REFUSED = {
    "no such slimming": ({"slimming": "h"}, "H, mask"),
    "no such backend": ({"backend": "flash"}, "eager, sdpa"),
    "no such score": ({"score": "attention"}, "mass, sink, streaming_llm, random"),
    "no such norm": ({"score_norm": "max"}, "sum, mean"),
    "no such reduction": ({"group_reduce": "last"}, "sum, first"),
    "window of one": ({"window_length": 1}, "at least 2"),
    "a fraction of a window": ({"window_length": 0.2}, "whole number"),
    "true is no number": ({"update_interval": True}, "whole number"),
    "no interval": ({"update_interval": 0}, "at least 1"),
    "no recent slot": ({"window_length": 8, "num_heavy_hitters": 8}, "window_length=8"),
    "more than the window": ({"window_length": 8, "num_heavy_hitters": 9}, "window_length=8"),
    "no room for 4 sinks": ({"score": "streaming_llm", "window_length": 4}, "give at least 5"),
    "heavy -2": ({"num_heavy_hitters": -2}, "at least -1"),
    "negative decay": ({"score_decay": -0.1}, "between 0 and 1"),
    "growing decay": ({"score_decay": 1.1}, "between 0 and 1"),
    "not a decay": ({"score_decay": float("nan")}, "between 0 and 1"),
    "a decay in quotes": ({"score_decay": "0.5"}, "between 0 and 1"),
    "a switch in quotes": ({"score_every_step": "no"}, "True or False"),
    "no queries": ({"score_queries": 0}, "at least 1"),
    "no chunk": ({"prefill_chunk": 0}, "at least 1"),
    "half a chunk": ({"prefill_chunk": 512.5}, "whole number"),
    "a fraction of a seed": ({"score_seed": 1.5}, "whole number"),
    "a seed of 40 bits": ({"score_seed": 2**40}, "must be below"),
}


@pytest.mark.parametrize(("flags", "way_out"), REFUSED.values(), ids=REFUSED)
def test_flags_that_cannot_work(flags, way_out):
    """A typing error that runs for hours with a default; the message names the flag and the way out."""
    with pytest.raises(ValueError, match=way_out) as raised:
        H2OConfig(**flags)
    assert list(flags)[-1] in str(raised.value)


def test_flags_that_work_at_their_bounds():
    """A check that is off by one; and flags that change under a running generation."""
    config = H2OConfig(window_length=2, num_heavy_hitters=1, update_interval=1, score_decay=0.0, score_queries=1)
    assert (config.heavy, config.recent, config.capacity) == (1, 1, 3)
    assert H2OConfig(window_length=7).heavy == 3 and H2OConfig(num_heavy_hitters=0).recent == 256
    streaming = H2OConfig(window_length=5, score="streaming_llm")
    assert (streaming.heavy, streaming.recent, streaming.needs_mass) == (4, 1, False)
    assert H2OConfig(score="streaming_llm").recent == 252 and H2OConfig(score="sink").recent == 128
    assert H2OConfig(window_length=4, score="streaming_llm", num_heavy_hitters=2).heavy == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window_length = 3


MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 1, 1, 1]],
    "everywhere": [[0, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
    "nothing": [[0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_masks_of_any_pattern(llamas, mask, chunk):
    """Padding on the right or inside, in the first forward and in a later one: real columns say what stock Llama says
    of them, padded ones what the token before them says, and slots are those of the tokens alone, in order."""
    mask, rows = torch.tensor(mask), torch.tensor([prompt(7), prompt(7, 1)])
    model = with_flags(llamas, window_length=32, prefill_chunk=chunk)
    cache, full = HHCache(model.h2o), DynamicCache(config=llamas.stock.config)
    # Padding between a forward's tokens takes positions, as in stock Llama; padding around them takes none.
    first, last = mask.argmax(1, keepdim=True), 6 - mask.flip(1).argmax(1, keepdim=True)
    positions = (torch.arange(7) - first).clamp(min=0)
    with torch.no_grad():
        for turn in range(2):
            seen = mask.repeat(1, turn + 1)
            logits = model(rows, attention_mask=seen, past_key_values=cache).logits
            expected = llamas.stock(
                rows, attention_mask=seen, position_ids=positions + turn * (last - first + 1), **{CACHE_ARGUMENT: full}
            ).logits
            if not turn:
                unasked = llamas.stock(rows, attention_mask=mask).logits
                assert_close(unasked[mask.bool()], expected[mask.bool()], 1e-4)
            for b in range(2):
                newest = None
                for column in range(7):
                    if mask[b, column]:
                        newest = logits[b, column]
                        assert_close(newest, expected[b, column], what=f"turn {turn}, row {b}, column {column}")
                    elif newest is not None:
                        assert torch.equal(logits[b, column], newest)
    assert cache.seen == cache.lengths == (2 * mask.sum(1)).tolist()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_no_output_depends_on_a_token_to_its_right(llamas, mask):
    """Padding that is computed beside the tokens of its row, and so sees later ones."""
    mask, rows = torch.tensor(mask), torch.tensor([prompt(7), prompt(7, 1)])
    model = with_flags(llamas, window_length=8, update_interval=1)
    with torch.no_grad():
        first = model(rows, attention_mask=mask, past_key_values=HHCache(model.h2o), output_hidden_states=True)
        for column in range(1, 7):
            other = rows.clone()
            other[:, column:] = torch.tensor([prompt(7, 2), prompt(7, 3)])[:, column:]
            second = model(other, attention_mask=mask, past_key_values=HHCache(model.h2o), output_hidden_states=True)
            states = zip((first.logits, *first.hidden_states), (second.logits, *second.hidden_states), strict=True)
            for ours, theirs in states:
                assert torch.equal(ours[:, :column], theirs[:, :column]), f"column {column}"


def test_generate_from_prompts_padded_on_the_right(llamas):
    """The logits of a padded last column: a row goes on from its last token, as alone."""
    model, rows = with_flags(llamas, window_length=8, update_interval=2), [prompt(11), prompt(5), prompt(8)]
    ids = torch.tensor([row + [0] * (11 - len(row)) for row in rows])
    result = model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=9, do_sample=False)
    for b, row in enumerate(rows):
        assert result[b, 11:].tolist() == new_tokens(generate(model, [row], 9), [row])[0]


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_loss_and_gradients_are_stock_llamas(gqa, side):
    """Mass summed for a cache that nobody keeps, and padded columns that see the row's later tokens: of a left-padded
    batch they decide what the first token costs."""
    model, rows = with_flags(gqa, window_length=8), torch.tensor([prompt(12), prompt(12, 1)])
    mask = torch.ones_like(rows)
    mask[0, {"left": slice(5), "right": slice(7, None), "holes": slice(3, 8)}[side]] = 0
    labels, losses, gradients = rows.masked_fill(mask == 0, -100), [], []
    for llama in (gqa.stock, model):
        llama.zero_grad()
        outputs = llama(rows, attention_mask=mask, labels=labels)
        outputs.loss.backward()
        losses.append(outputs.loss)
        gradients.append(torch.cat([p.grad.flatten() for p in llama.parameters()]))
        llama.zero_grad()
    assert outputs[CACHE_ARGUMENT] is None if CACHE_ARGUMENT in outputs else True
    assert_close(losses[1], losses[0], 1e-6)
    assert_close(gradients[1], gradients[0], 1e-5)
    if side == "left":  # with a cache, too, where padding comes before all tokens
        wide = with_flags(gqa, window_length=64)
        assert_close(wide(rows, attention_mask=mask, labels=labels, use_cache=True).loss, losses[0], 1e-5)


def test_generate_refuses_to_go_without_its_cache(gqa):
    """use_cache=False or another cache_implementation that runs as stock Llama and reports H2O's results."""
    model = with_flags(gqa, window_length=8)
    for settings_ in ({"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}):
        with pytest.raises(ValueError, match="HHCache"):
            generate(model, [prompt(5)], 2, **settings_)
    assert generate(model, [prompt(5)], 2, past_key_values=DynamicCache()).past_key_values.get_seq_length() == 6


def test_the_last_token_is_not_cached(gqa):
    """`seen` counts what the cache has been fed: the prompt and all new tokens but the last."""
    model = with_flags(gqa, window_length=8, update_interval=2)
    result = generate(model, [prompt(9), prompt(4)], 5)
    assert result.past_key_values.seen == [13, 8] and result.past_key_values.get_seq_length() == 13
    assert result.sequences.shape == (2, 14) and result.sequences.max() < VOCAB
    assert all(tensor.shape[0] == 2 for tensor in slot_tensors(result.past_key_values).values())


def test_gradients_reach_a_later_turns_own_keys(gqa):
    """Keys and values of a second turn that are cached under no_grad and attended to without a gradient."""
    model = with_flags(gqa, window_length=64)
    first, turn = torch.tensor([prompt(9)]), torch.tensor([prompt(5)])
    norms = []
    for llama, cache in ((gqa.stock, DynamicCache()), (model, HHCache(model.h2o))):
        with torch.no_grad():
            llama(first, **{CACHE_ARGUMENT: cache})
        llama.zero_grad()
        llama(turn, labels=turn, **{CACHE_ARGUMENT: cache}).loss.backward()
        norms.append([p.grad.norm() for name, p in llama.named_parameters() if "layers.0.self_attn" in name])
        llama.zero_grad()
    assert_close(torch.stack(norms[1]), torch.stack(norms[0]), 1e-4)


def test_gradient_checkpointing_goes_without_a_cache(gqa):
    """A cache that checkpointed layers never see, and attention under a mask that is no mask."""
    model, ids, losses = with_flags(gqa, window_length=8), torch.tensor([prompt(12)]), []
    for llama in (gqa.stock, model):
        set_checkpointing(llama, True)
        llama.train()
        losses.append(llama(ids, labels=ids).loss)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids, past_key_values=HHCache(model.h2o))
    for llama in (gqa.stock, model):
        set_checkpointing(llama, False)
        llama.eval()
    assert_close(losses[1], losses[0], 1e-5)


def test_cache_moves_between_inference_mode_and_generate(gqa):
    """Slots that are inference tensors: nothing outside could write to them, not even after a reset."""
    model, ids = with_flags(gqa, window_length=8, update_interval=2), prompt(12)
    expected = new_tokens(generate(model, [ids], 6), [ids])
    cache = HHCache(model.h2o)
    with torch.inference_mode():
        generate(model, [ids], 6, past_key_values=cache)
    cache.reset()
    assert new_tokens(generate(model, [ids], 6, past_key_values=cache), [ids]) == expected


@pytest.mark.parametrize("shape", [(2, 7), (1, 20), (3, 20)])
def test_mask_of_another_shape_is_refused(gqa, shape):
    """A mask that is cut to fit, or fails in the middle and leaves the cache unusable."""
    model, ids = with_flags(gqa, window_length=8), torch.tensor([prompt(20), prompt(20)])
    cache = HHCache(model.h2o)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(shape, dtype=torch.long), past_key_values=cache)
    model(ids, past_key_values=cache)


@pytest.mark.parametrize(
    "kwargs",
    [{"output_attentions": True}, {"logits_to_keep": torch.tensor([[1], [2]])}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_a_forward_cannot_give_is_refused(gqa, kwargs):
    """None for attention maps, or logits of the wrong shape, without a word."""
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        with_flags(gqa, window_length=8)(torch.tensor([prompt(5), prompt(5)]), **kwargs)


def test_device_map(gqa, tmp_path):
    """Weights that accelerate places: hooks around layers that pass the cache on."""
    pytest.importorskip("accelerate")
    gqa.stock.save_pretrained(tmp_path)
    flags = H2OConfig(window_length=8, update_interval=2)
    placed = H2OLlamaForCausalLM.from_pretrained(tmp_path, h2o=flags, device_map={"": "cpu"})
    rows = [prompt(12), prompt(5)]
    expected = generate(with_flags(gqa, window_length=8, update_interval=2), rows, 6)
    assert new_tokens(generate(placed, rows, 6), rows) == new_tokens(expected, rows)


# What a user may do wrong, or only differently


def test_settings_given_as_a_dict(gqa):
    """A dict that is kept as it is, and fails in the first forward; a field that does not exist, or no settings."""
    model = H2OLlamaForCausalLM(gqa.stock.config, h2o={"window_length": 8, "update_interval": 2})
    assert model.h2o == H2OConfig(window_length=8, update_interval=2)
    for wrong, said in (({"window": 8}, "'window' is no field"), (8, "must be an H2OConfig"), ("H", "must be")):
        with pytest.raises(ValueError, match=said):
            model.h2o = wrong
        with pytest.raises(ValueError, match=said):
            H2OLlamaForCausalLM(gqa.stock.config, h2o=wrong)
    with pytest.raises(ValueError, match="HHCache: give an H2OConfig"):
        HHCache({"window_length": 8})


@pytest.mark.parametrize("mask", [torch.tensor([[0.0, -1e9, 0.0]]), torch.tensor([[1, 2, 1]])], ids=["additive", "2"])
def test_a_mask_of_other_numbers_is_refused(gqa, mask):
    """A mask of another kind, every number of which but 0 would be taken for a token."""
    model = with_flags(gqa, window_length=8)
    with pytest.raises(ValueError, match="1 for tokens and 0 for padding"):
        model(torch.tensor([prompt(3)]), attention_mask=mask)


def test_inputs_without_a_token_are_refused(gqa):
    model = with_flags(gqa, window_length=8)
    for cache in (None, HHCache(model.h2o)):
        with pytest.raises(ValueError, match="no columns"):
            model(torch.zeros(2, 0, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("given", [3, 9, 12])
def test_generate_refuses_fewer_tokens_than_the_cache_has_seen(gqa, given):
    """A turn given alone with a mask of its own: transformers would cut it to nothing, or to other tokens."""
    model, cache = with_flags(gqa, window_length=8), new_cache(window_length=8)
    forward(model, [prompt(12)], cache)
    with pytest.raises(ValueError, match="the cache has seen 12"):
        model.generate(torch.tensor([prompt(given)]), past_key_values=cache, max_new_tokens=2)
    assert cache.seen == [12]
    model.generate(torch.tensor([prompt(13)]), past_key_values=cache, max_new_tokens=2)
    assert cache.seen == [14]


def test_a_cache_after_reset_takes_another_model(gqa):
    """Slots of another dtype, or of other heads, that outlive what they held."""
    cache, rows = new_cache(window_length=8, update_interval=2), [prompt(12), prompt(5)]
    for llamas in (gqa, make_llamas(dtype=torch.float64), make_llamas(num_key_value_heads=4), gqa):
        model = with_flags(llamas, window_length=8, update_interval=2)
        cache.reset()
        result = generate(model, rows, 6, past_key_values=cache)
        assert new_tokens(result, rows) == new_tokens(generate(model, rows, 6), rows)
        assert cache.layers[0].keys.dtype == model.dtype


@pytest.mark.parametrize("first", [True, False])
def test_autocast_in_one_turn_only(gqa, first):
    """Keys of two dtypes in one cache."""
    model, cache = with_flags(gqa, window_length=8, update_interval=2), new_cache(window_length=8, update_interval=2)
    ids = torch.tensor([prompt(12)])
    for autocast in (first, not first):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            ids = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
        ids = torch.cat([ids, torch.tensor([prompt(3)])], dim=1)
    assert cache.seen == [12 + 5 + 3 + 4] and cache.evictions[0] > 2
    assert_invariants(cache)


def test_a_checkpoints_use_cache_is_not_the_callers(gqa, tmp_path):
    """use_cache false in a checkpoint's settings, as training leaves it; in a call it is a wish that cannot be met."""
    gqa.stock.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"use_cache": False}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    model = H2OLlamaForCausalLM.from_pretrained(tmp_path, h2o=H2OConfig(window_length=8, update_interval=2))
    expected = generate(with_flags(gqa, window_length=8, update_interval=2), [prompt(12)], 6)
    assert new_tokens(generate(model, [prompt(12)], 6), [prompt(12)]) == new_tokens(expected, [prompt(12)])
    wish = GenerationConfig(use_cache=False, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match="HHCache"):
        model.generate(torch.tensor([prompt(12)]), generation_config=wish)


@pytest.mark.parametrize("padded", [False, True])
def test_prompt_tuning(gqa, padded):
    """peft's virtual tokens before a left-padded prompt: a mask with holes, and no positions."""
    peft = pytest.importorskip("peft")
    rows = [prompt(12), prompt(5)] if padded else [prompt(12), prompt(12, 1)]
    tuned = []
    for llama in (gqa.stock, with_flags(gqa, window_length=64)):
        torch.manual_seed(0)
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        tuned.append(peft.get_peft_model(copy.deepcopy(llama), settings).eval())
    prefix = tuned[1].get_prompt(batch_size=2)
    assert torch.equal(prefix, tuned[0].get_prompt(batch_size=2))
    inputs = left_pad(rows)
    tokens = tuned[1].generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:].tolist()
    # what stock Llama says after the same embeddings, token by token, without a cache
    embeds = torch.cat([prefix, gqa.stock.get_input_embeddings()(inputs["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), inputs["attention_mask"]], dim=1)
    expected = []
    with torch.no_grad():
        for _ in range(5):
            logits = gqa.stock(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[:, -1]
            expected.append(logits.argmax(-1))
            embeds = torch.cat([embeds, gqa.stock.get_input_embeddings()(expected[-1][:, None])], dim=1)
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    assert tokens == torch.stack(expected, dim=1).tolist()


def test_prefix_tuning_is_refused(gqa):
    """Keys and values without tokens, in a cache of their own: a full one, without a word."""
    peft = pytest.importorskip("peft")
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(copy.deepcopy(with_flags(gqa, window_length=8)), settings).eval()
    with pytest.raises(ValueError, match="PREFIX_TUNING"):
        model.generate(**left_pad([prompt(5)]), max_new_tokens=2)


def second_turn_inputs(model):
    """A first turn of 20 + 4 columns, whose cache and ids are returned, and the ids with five more tokens."""
    ids, cache = torch.tensor([prompt(20, 1), prompt(20, 2)]), HHCache(model.h2o)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    return cache, torch.cat([first, ids[:, :5]], dim=1)


def test_masks_of_ones_have_a_length(gqa):
    """A mask that transformers drops because it holds ones only: of the wrong length the whole text would be fed once
    more, and of the right one the new tokens alone would be refused."""
    model = with_flags(gqa, window_length=64)
    turn = {"max_new_tokens": 4, "do_sample": False}
    cache, ids = second_turn_inputs(model)
    expected = model.generate(ids, past_key_values=cache, **turn)[:, -4:].tolist()
    cache, ids = second_turn_inputs(model)
    new_only = model.generate(ids[:, 23:], attention_mask=torch.ones_like(ids), past_key_values=cache, **turn)
    assert new_only[:, -4:].tolist() == expected and cache.seen == [32, 32]
    for columns in (6, 28, 30):
        cache, ids = second_turn_inputs(model)
        with pytest.raises(ValueError, match="attention_mask"):
            model.generate(ids, attention_mask=torch.ones(2, columns).long(), past_key_values=cache, **turn)
        assert cache.seen == [23, 23]


@pytest.mark.parametrize("chunk", [1, 2])
def test_columns_of_padding_alone(gqa, chunk):
    """A column that brings a token to no row, fed by itself."""
    model, rows = with_flags(gqa, window_length=64), torch.tensor([prompt(12), prompt(12, 1)])
    mask = torch.ones_like(rows)
    mask[:, :2] = mask[0, 5:8] = mask[1, 5:7] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = gqa.stock.generate(rows, **settings)
    assert model.generate(rows, prefill_chunk_size=chunk, **settings).tolist() == expected.tolist()


@pytest.mark.parametrize("flags", [{"window_length": 8, "update_interval": 1}, {"window_length": 64}], ids=str)
@pytest.mark.parametrize("lengths", [(12, 12), (12, 5)], ids=["alike", "ragged"])
def test_gradients_of_a_decode_step(gqa, flags, lengths):
    """Slots that a step writes to before its gradients are computed, or a step whose own keys have none."""
    rows = [prompt(length) for length in lengths]
    gradients = []
    for llama, cache in (
        (gqa.stock, DynamicCache(config=gqa.stock.config)),
        (with_flags(gqa, **flags), new_cache(**flags)),
    ):
        inputs = left_pad(rows)
        with torch.no_grad():
            llama(**inputs, **{CACHE_ARGUMENT: cache})
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1).long()], dim=1)
        llama.zero_grad()
        logits = llama(torch.tensor([[5], [7]]), attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits
        logits.sum().backward()
        gradients.append([p.grad.clone() for name, p in llama.named_parameters() if "k_proj" in name])
        llama.zero_grad()
    assert all(gradient.any() for gradient in gradients[1])
    if flags["window_length"] == 64:
        for ours, theirs in zip(*gradients[::-1], strict=True):
            assert_close(ours, theirs, 1e-4)


def test_prompt_tuning_of_rows_that_end(gqa):
    """Virtual tokens that peft puts before the mask of a step in which a row has ended."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(copy.deepcopy(with_flags(gqa, window_length=64)), settings).eval()
    rows = [prompt(12), prompt(5)]
    free = model.generate(**left_pad(rows), max_new_tokens=6, do_sample=False)[:, -6:].tolist()
    ends = next(token for token in free[0] if token not in free[1])
    ended = model.generate(**left_pad(rows), max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=0)
    end = free[0].index(ends) + 1
    assert ended[:, -6:].tolist() == [free[0][:end] + [0] * (6 - end), free[1]]


@pytest.mark.parametrize(
    "inputs, said",
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.ones(1, 3).long(), "inputs_embeds": torch.ones(1, 3, 64)}, "either input_ids"),
        ({"input_ids": torch.ones(3).long()}, r"must be \[batch, tokens\]"),
        ({"input_ids": torch.ones(0, 3).long()}, "no rows"),
    ],
)
def test_inputs_of_another_form_are_refused(gqa, inputs, said):
    with pytest.raises(ValueError, match=said):
        with_flags(gqa, window_length=8)(**inputs)


@pytest.mark.parametrize("keep", [np.int64(2), torch.tensor(2), [9, 10]], ids=["numpy", "0-dimensional", "list"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_logits_to_keep_in_any_form(gqa, keep, chunk):
    model, inputs = with_flags(gqa, window_length=64, prefill_chunk=chunk), left_pad([prompt(11), prompt(5)])
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=keep).logits
        assert_close(logits, model(**inputs).logits[:, -2:])


@pytest.mark.parametrize("space", [2.5, "3", None, float("nan"), -1])
def test_space_of_another_form_is_refused(space):
    with pytest.raises(ValueError, match="must be a whole number of at least 0"):
        new_cache(window_length=8).evict_for_space(space)


def test_a_cache_of_another_model_is_refused(gqa):
    """Tokens that some layers never see, or heads of another number."""
    for config, said in (({"num_hidden_layers": 3}, "2 layers"), ({"num_key_value_heads": 4}, "KV heads")):
        cache = new_cache(window_length=8)
        forward(gqa.h2o, [prompt(9)], cache)
        with pytest.raises(ValueError, match=said):
            forward(with_flags(make_llamas(**config), window_length=8), [prompt(3)], cache)
        with pytest.raises(ValueError, match="1 rows"):
            cache.reorder_cache(torch.tensor([0, 0]))
