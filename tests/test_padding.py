"""Padding and masks: left, right and inside, in prompts, later turns and rows that have ended."""

import pytest
import torch
from transformers import DynamicCache

from conftest import (
    assert_close,
    assert_row_is_oracles,
    forward,
    generate,
    left_pad,
    new_cache,
    new_oracle,
    new_tokens,
    prompt,
    with_flags,
)
from h2optimizer.utils.cache import CACHE_ARGUMENT, HHCache

# Rows that have ended, and later turns


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


def test_later_forwards_take_a_mask_of_all_or_of_the_new_columns(gqa):
    """A mask read from the wrong end: the first columns of the conversation for the turn's own."""
    flags = {"window_length": 8, "update_interval": 2}
    rows, turn = [prompt(11), prompt(4)], [prompt(2, 1), prompt(5, 1)]
    logits = []
    for whole in (False, True):
        cache = new_cache(**flags)
        forward(gqa.h2o, rows, cache)
        inputs = left_pad(turn)
        if whole:
            inputs["attention_mask"] = torch.cat([left_pad(rows)["attention_mask"], inputs["attention_mask"]], dim=1)
        with torch.no_grad():
            logits.append(gqa.h2o(**inputs, past_key_values=cache).logits)
    assert torch.equal(*logits)
    for b in range(2):
        oracle = new_oracle(gqa, **flags)
        oracle.forward(rows[b])
        assert_close(logits[0][b, 5 - len(turn[b]) :], oracle.forward(turn[b]))


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


# Masks of any pattern

MASKS = {
    "right": [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 1, 1, 1]],
    "everywhere": [[0, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
    "nothing": [[0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_masks_of_any_pattern(gqa, mask, chunk):
    """Padding on the right or inside, in the first forward and in a later one: real columns say what stock Llama says
    of them, padded ones what the token before them says, and slots are those of the tokens alone, in order."""
    mask, rows = torch.tensor(mask), torch.tensor([prompt(7), prompt(7, 1)])
    model = with_flags(gqa, window_length=32, prefill_chunk=chunk)
    cache, full = HHCache(model.h2o), DynamicCache(config=gqa.stock.config)
    # Padding between a forward's tokens takes positions, as in stock Llama; padding around them takes none.
    first, last = mask.argmax(1, keepdim=True), 6 - mask.flip(1).argmax(1, keepdim=True)
    positions = (torch.arange(7) - first).clamp(min=0)
    with torch.no_grad():
        for turn in range(2):
            seen = mask.repeat(1, turn + 1)
            logits = model(rows, attention_mask=seen, past_key_values=cache).logits
            expected = gqa.stock(
                rows, attention_mask=seen, position_ids=positions + turn * (last - first + 1), **{CACHE_ARGUMENT: full}
            ).logits
            if not turn:
                unasked = gqa.stock(rows, attention_mask=mask).logits
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
def test_no_output_depends_on_a_token_to_its_right(gqa, mask):
    """Padding that is computed beside the tokens of its row, and so sees later ones."""
    mask, rows = torch.tensor(mask), torch.tensor([prompt(7), prompt(7, 1)])
    model = with_flags(gqa, window_length=8, update_interval=1)
    with torch.no_grad():
        first = model(rows, attention_mask=mask, past_key_values=HHCache(model.h2o), output_hidden_states=True)
        for column in range(1, 7):
            other = rows.clone()
            other[:, column:] = torch.tensor([prompt(7, 2), prompt(7, 3)])[:, column:]
            second = model(other, attention_mask=mask, past_key_values=HHCache(model.h2o), output_hidden_states=True)
            states = zip((first.logits, *first.hidden_states), (second.logits, *second.hidden_states), strict=True)
            for ours, theirs in states:
                assert torch.equal(ours[:, :column], theirs[:, :column]), f"column {column}"


def test_generate_from_prompts_padded_on_the_right(gqa):
    """The logits of a padded last column: a row goes on from its last token, as alone."""
    model, rows = with_flags(gqa, window_length=8, update_interval=2), [prompt(11), prompt(5), prompt(8)]
    ids = torch.tensor([row + [0] * (11 - len(row)) for row in rows])
    result = model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=9, do_sample=False)
    for b, row in enumerate(rows):
        assert result[b, 11:].tolist() == new_tokens(generate(model, [row], 9), [row])[0]


@pytest.mark.parametrize("chunk", [1, 2])
def test_columns_of_padding_alone(gqa, chunk):
    """A column that brings a token to no row, fed by itself."""
    model, rows = with_flags(gqa, window_length=64), torch.tensor([prompt(12), prompt(12, 1)])
    mask = torch.ones_like(rows)
    mask[:, :2] = mask[0, 5:8] = mask[1, 5:7] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = gqa.stock.generate(rows, **settings)
    assert model.generate(rows, prefill_chunk_size=chunk, **settings).tolist() == expected.tolist()


# Masks that are refused


@pytest.mark.parametrize("shape", [(2, 7), (1, 20), (3, 20)])
def test_mask_of_another_shape_is_refused(gqa, shape):
    """A mask that is cut to fit, or fails in the middle and leaves the cache unusable."""
    model, ids = with_flags(gqa, window_length=8), torch.tensor([prompt(20), prompt(20)])
    cache = HHCache(model.h2o)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(shape, dtype=torch.long), past_key_values=cache)
    model(ids, past_key_values=cache)


@pytest.mark.parametrize("mask", [torch.tensor([[0.0, -1e9, 0.0]]), torch.tensor([[1, 2, 1]])], ids=["additive", "2"])
def test_a_mask_of_other_numbers_is_refused(gqa, mask):
    """A mask of another kind, every number of which but 0 would be taken for a token."""
    model = with_flags(gqa, window_length=8)
    with pytest.raises(ValueError, match="1 for tokens and 0 for padding"):
        model(torch.tensor([prompt(3)]), attention_mask=mask)
