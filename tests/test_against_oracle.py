"""Every flag of H2O, in forwards, `generate`, sampling and beams, against the oracle and single rows."""

import copy
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import (
    BACKENDS,
    assert_close,
    assert_follows_oracle,
    assert_invariants,
    assert_row_is_oracles,
    by_groups,
    conversation,
    forward,
    generate,
    left_pad,
    new_cache,
    new_oracle,
    new_tokens,
    of_llamas,
    prompt,
    uneven,
    with_flags,
)
from h2optimizer import H2OLlamaForCausalLM
from h2optimizer.utils.cache import HHCache

# Every flag

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
    "value mass": {"score": "value_mass"},
    "value mass of some": {"score": "value_mass", "score_norm": "mean", "score_decay": 0.5, "slimming": "mask"},
    "a share": {"num_heavy_hitters": "5/8"},
    "uneven": {"head_budgets": uneven},
    "uneven H2O": {"head_budgets": uneven, "update_interval": 1, "score": "value_mass", "num_heavy_hitters": "3/4"},
    "uneven mean": {"head_budgets": uneven, "score_norm": "mean", "score_decay": 0.5, "num_heavy_hitters": 5},
    "uneven chunks": {"head_budgets": uneven, "prefill_chunk": 4, "score_decay": 0.5, "score_queries": 2},
    "uneven rolling": {"head_budgets": uneven, "position_rolling": True, "update_interval": 2},
    "uneven rolling chunks": {"head_budgets": uneven, "position_rolling": True, "prefill_chunk": 3},
    "uneven sinks": {"head_budgets": uneven, "score": "streaming_llm"},
    "uneven random": {"head_budgets": uneven, "score": "random", "score_seed": 3},
}


DECODE = [[token] for token in prompt(20, 1)]
TURNS = [prompt(13), *DECODE[:4], prompt(5, 2), *DECODE[4:8]]  # a due decode step in both, for every update_interval
IN_ALL_GROUPS = ("H2O", "first head's mean", "rolling chunks", "uneven H2O")


@by_groups(VARIANTS, IN_ALL_GROUPS)
def test_every_flag_is_the_oracles(llamas, variant):
    """A flag that does something else than it says, in prompt, decode steps, a second turn or the steps after it."""
    flags = of_llamas({"window_length": 8, "update_interval": 3, **VARIANTS[variant]}, llamas)
    caches = [new_cache(**flags, backend=backend) for backend in BACKENDS]
    oracle = conversation(llamas, caches, flags, TURNS)
    assert oracle.evictions >= 2


INT8 = (
    "H2O", "rotation", "mean of some", "rolling H2O", "mask", "rolling chunks", "value mass of some", "chunks of one",
    "uneven H2O", "uneven rolling", "uneven chunks",
)  # fmt: skip


@by_groups(INT8, ["mean of some", "uneven chunks"])
def test_8_bit_slots_are_the_oracles(llamas, variant):
    """Scales that move apart from their slots, a step that sees its own token unrounded, a turn that rounds its tokens
    before they see each other, norms of rounded values, keys rounded before their rotation, or mass that is rounded.

    A number halfway between two of 255 falls to either side in float32, which shows in the fourth digit.
    """
    flags = of_llamas({"window_length": 8, "update_interval": 3, **VARIANTS[variant], "slots": "int8"}, llamas)
    caches = [new_cache(**flags, backend=backend) for backend in BACKENDS]
    oracle = conversation(llamas, caches, flags, TURNS, rounded=200)
    assert oracle.evictions >= 2


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 20])
def test_prompts_around_the_window(gqa, length):
    """A prompt of one token, or shorter than, as long as and longer than the window, that slims too early or not."""
    flags = {"window_length": 8, "update_interval": 2}
    caches = [new_cache(**flags, backend=backend) for backend in BACKENDS]
    conversation(gqa, caches, flags, [prompt(length), *([token] for token in prompt(10, 1))])


@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
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


@pytest.mark.parametrize("new, rolling", [(1, False), (3, True), (4, False), (5, True), (8, True), (9, False)])
def test_greedy_generations_of_any_length(gqa, new, rolling):
    """A step clock that runs with the generation: it must end before, on and after a due step (4 and 8) alike."""
    flags = {"window_length": 6, "update_interval": 4, "position_rolling": rolling}
    model, oracle = with_flags(gqa, **flags), new_oracle(gqa, **flags)
    cache = HHCache(model.h2o)
    result = generate(model, [prompt(11)], new, past_key_values=cache)
    assert new_tokens(result, [prompt(11)])[0] == oracle.generate(prompt(11), new)
    assert result.past_key_values is cache and cache.clock == new
    assert_row_is_oracles(cache, 0, oracle)


UNEVEN = {
    "decay": {"score_decay": 0.5, "score": "value_mass"},
    "rolling": {"position_rolling": True, "score_norm": "mean", "num_heavy_hitters": "5/8"},
    "chunks": {"prefill_chunk": 5, "score_decay": 0.5},
}


@pytest.mark.parametrize("llamas, backend, variant", [
    ("gqa", "eager", "decay"), ("gqa", "sdpa", "rolling"), ("gqa", "eager", "chunks"), ("mqa", "sdpa", "decay"),
    ("mha", "sdpa", "chunks"),
], indirect=["llamas"])  # fmt: skip
def test_rows_whose_heads_have_windows_of_their_own(llamas, backend, variant):
    """Heads of one row that take another's length, decay or slots: ragged prompts and turns, room made, copied rows."""
    flags = of_llamas({"window_length": 8, "update_interval": 3, "head_budgets": uneven, **UNEVEN[variant]}, llamas)
    cache, oracles = new_cache(**flags, backend=backend), [new_oracle(llamas, **flags) for _ in range(3)]
    decode = [[[token], [token + 1], [token + 2]] for token in range(1, 6)]
    turn = [prompt(4, 2), prompt(7, 3), prompt(2, 4)]
    for block in ([prompt(13), prompt(3), prompt(8)], *decode, "space", turn, "reorder", *decode):
        if block == "space":
            for each in (cache, *oracles):
                each.evict_for_space(2)
        elif block == "reorder":
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            oracles = [copy.copy(oracles[b]) for b in (2, 0, 0)]
            for oracle in oracles:
                oracle.cache = copy.deepcopy(oracle.cache)
        else:
            for b, logits in enumerate(forward(llamas.h2o, block, cache)):
                assert_close(logits, oracles[b].forward(block[b]), what=f"row {b}")
        for b, oracle in enumerate(oracles):
            assert_row_is_oracles(cache, b, oracle)


@pytest.mark.parametrize("llamas, backend, rolling, interval", [
    ("gqa", "eager", False, 1), ("gqa", "sdpa", True, 1), ("gqa", "eager", True, 4), ("gqa", "sdpa", False, 16),
    ("mha", "sdpa", False, 4), ("mqa", "sdpa", True, 4),
], indirect=["llamas"])  # fmt: skip
def test_a_left_padded_batch_is_its_rows_alone(llamas, interval, rolling, backend):
    """Padding that takes slots, mass or positions, or a row that is slimmed as its neighbours are."""
    flags = {"window_length": 8, "update_interval": interval, "position_rolling": rolling}
    model = with_flags(llamas, **flags, backend=backend)
    rows, new = [prompt(13), prompt(3), prompt(8), prompt(1)], max(9, interval + 3)
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
def test_scores_know_nothing_of_the_batch(gqa, flags):
    """A pseudo-random choice drawn for the batch, or counts, last queries and chunks that include padding, or decay in
    a chunk that a row has no token in."""
    flags = {"window_length": 6, "update_interval": 2, **flags}
    model, rows = with_flags(gqa, **flags), [prompt(4), prompt(12), prompt(9)]
    cache = HHCache(model.h2o)
    batch = generate(model, rows, 9, past_key_values=cache)
    for b, row in enumerate(rows):
        oracle = new_oracle(gqa, **flags)
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
def test_a_second_prompt_and_a_second_model_start_afresh(gqa, rolling):
    """State that outlives a generation: in an attention module, a class or a default argument."""
    flags = {"window_length": 8, "update_interval": 3, "position_rolling": rolling}
    model, oracle = with_flags(gqa, **flags), new_oracle(gqa, **flags)
    other = H2OLlamaForCausalLM(gqa.stock.config, model.h2o).eval()
    other.load_state_dict(gqa.stock.state_dict())
    for length, new in ((12, 7), (5, 2), (9, 10)):
        row = prompt(length, new)
        expected = oracle.generate(row, new)
        for each in (model, other):
            result = generate(each, [row], new)
            assert new_tokens(result, [row])[0] == expected
            assert_row_is_oracles(result.past_key_values, 0, oracle)


@pytest.mark.parametrize("interval", [1, 4])
def test_an_early_stop_leaves_no_trace(gqa, interval):
    """A stop before the full length that desynchronises the next prompt."""
    flags = {"window_length": 8, "update_interval": interval}
    model, oracle = with_flags(gqa, **flags), new_oracle(gqa, **flags)
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


@pytest.mark.parametrize("interval, rolling, lengths", [
    (1, False, (4, 2, 6)), (3, True, (4, 2, 6)), (3, False, (3, 3, 3)), (1, True, (3, 3, 3)),
], ids=str)  # fmt: skip
def test_a_second_turn_on_the_same_cache(gqa, interval, rolling, lengths):
    """A turn of several tokens after evictions: wrong starts, positions or causal bounds in ragged rows, which alone
    would show in one row and not in the other."""
    flags = {"window_length": 8, "update_interval": interval, "position_rolling": rolling}
    model, rows = with_flags(gqa, **flags), [prompt(11), prompt(2), prompt(7)]
    oracles = [new_oracle(gqa, **flags) for _ in rows]
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
def test_sampled_sequences_are_consistent(gqa, rolling):
    """num_return_sequences whose rows share or mix their slots: each row's logits are the oracle's on its tokens."""
    flags = {"window_length": 8, "update_interval": 3, "position_rolling": rolling}
    model, rows = with_flags(gqa, **flags), [prompt(11), prompt(5)]
    cache = HHCache(model.h2o)
    torch.manual_seed(1)
    result = generate(model, rows, 9, past_key_values=cache, do_sample=True, num_return_sequences=2, temperature=1.5)
    assert len(set(map(tuple, new_tokens(result, rows)))) == 4, "the samples differ, or the test says nothing"
    for b in range(4):
        oracle = new_oracle(gqa, **flags)
        assert_follows_oracle(result, b, oracle, rows[b // 2])
        assert_row_is_oracles(cache, b, oracle)


BEAMS = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "early_stopping": False}


def beam_search(model, rows, new, **more):
    result = generate(model, rows, new, output_scores=True, **BEAMS, **more)
    first = result.beam_indices.reshape(len(rows), 3, -1)[..., 1:new]
    assert (first != first[..., :1]).any(), "beams change places, or the test says nothing"
    return result


@pytest.mark.parametrize("lengths, flags", [
    ((9, 9), {"update_interval": 1}),
    ((12, 4), {"update_interval": 1, "position_rolling": True, "slimming": "mask"}),
    ((12, 4), {"update_interval": 3}),
    ((9, 9), {"update_interval": 3, "score_norm": "mean", "score_decay": 0.5}),
    ((12, 4), {"update_interval": 1, "score": "random"}),
], ids=str)  # fmt: skip
def test_beams_score_their_own_tokens(gqa, flags, lengths):
    """Keys, mass or positions that do not follow their beam: its score would be that of tokens it does not hold."""
    flags = {"window_length": 6, **flags}
    model, rows, new = with_flags(gqa, **flags), [prompt(length) for length in lengths], 12
    result = beam_search(model, rows, new)
    for b, tokens in enumerate(new_tokens(result, rows)):
        oracle, block, score = new_oracle(gqa, **flags), rows[b // 3], 0.0
        for token in tokens:
            score += oracle.forward(block)[-1].log_softmax(-1)[token].item()
            block = [token]
        assert abs(score - result.sequences_scores[b].item()) < 1e-4, f"beam {b}"
        assert oracle.evictions > 0


@pytest.mark.parametrize("rolling", [False, True])
def test_beams_with_a_wide_window_are_stocks(gqa, rolling):
    """Beam search that goes its own way even where nothing is evicted."""
    rows = [prompt(10), prompt(4)]
    expected = beam_search(gqa.stock, rows, 10)
    model = with_flags(gqa, window_length=64, update_interval=2, position_rolling=rolling)
    result = beam_search(model, rows, 10)
    assert torch.equal(result.sequences, expected.sequences)
    assert_close(result.sequences_scores, expected.sequences_scores, 1e-5)
