"""Caches and decoders that a model keeps from call to call: used again, copied, freed, left by an interrupted call."""

import contextlib
import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from transformers.generation import StoppingCriteria

import recorded_steps
from conftest import VOCAB, assert_invariants, assert_same_cache, forward, left_pad, make_llamas, prompt
from h2optimizer import generation
from h2optimizer.utils.cache import HHCache
from recorded_steps import ROWS, both_ways, decoders_of, eos_cases, run, sequences, settings

pytestmark = recorded_steps.MARKS
captured = recorded_steps.captured  # autouse
gqa = recorded_steps.gqa
model = recorded_steps.model


def kept(model) -> list[HHCache]:
    return list(model.kept_caches._caches.values())


def slots(cache) -> list[int]:
    return [layer.keys.data_ptr() for layer in cache.layers]


@pytest.mark.parametrize("flags", [{}, {"position_rolling": True, "score_norm": "mean"}], ids=str)
def test_a_kept_cache_is_used_again_and_leaks_nothing(model, captured, flags):
    """New slots for every call, or tokens, mass, ended rows or a clock that the call before has left."""
    expected = []
    eos = eos_cases(model)["each"]
    calls = [(ROWS, None), ([prompt(2), prompt(30), prompt(5)], None), (ROWS, eos), (ROWS, None)]
    for capture in (False, True):
        model.h2o, used = settings(capture=capture, **flags), []
        for i, (rows, ends) in enumerate(calls):
            tokens = sequences(run(model, rows, eos_token_id=ends))
            if not capture:
                expected.append(tokens)
            else:
                assert tokens == expected[i]
                used.append((id(kept(model)[0]), slots(kept(model)[0])))
    assert len(captured) == 4 and len(kept(model)) == 1 and used.count(used[0]) == 4


@pytest.mark.parametrize("flags", [{"score": "value_mass"}, {"position_rolling": True}], ids=str)
def test_a_kept_cache_continues_from_the_prefix_of_the_call(model, captured, flags, monkeypatch):
    """The prefix of an earlier call, or none; or a snapshot that a kept cache holds on to."""
    columns, begin = [], HHCache.begin
    monkeypatch.setattr(HHCache, "begin", lambda *args, **options: columns.append(args[2]) or begin(*args, **options))
    first, second = prompt(9, 1), prompt(4, 2)
    calls = [(first, [prompt(6), prompt(2), prompt(3)]), (second, ROWS), ([], ROWS), (first, ROWS)]
    expected = []
    for shares in (False, True):
        model.h2o = settings(capture=shares, **flags)
        for i, (shared, rows) in enumerate(calls):
            options = {"prefix": model.prefill_prefix(shared)} if shares and shared else {}
            columns.clear()
            tokens = sequences(run(model, [shared + row for row in rows], **options))
            assert columns[0] == max(map(len, rows)) + (0 if shares else len(shared))
            if shares:
                assert tokens == expected[i]
                assert [cache.prefix for cache in kept(model)] == [None], "one cache, which holds no snapshot"
            else:
                expected.append(tokens)
    assert len(captured) == 4


def test_which_cache_is_kept_for_what(model):
    """Slots of another batch size or other flags, or caches that pile up."""
    model.h2o = settings()
    run(model, ROWS[:2], max_new_tokens=2)
    (two,) = kept(model)
    run(model, ROWS, max_new_tokens=2)
    assert kept(model)[0] is two and kept(model)[1].lengths == [9, 4, 9]
    run(model, ROWS[:2], max_new_tokens=2)
    assert kept(model)[1] is two, "the last used is dropped last"
    model.h2o = settings(update_interval=2)
    run(model, ROWS[:2], max_new_tokens=2)
    assert kept(model)[1] is two and kept(model)[2].h2o == model.h2o
    assert len(kept(model)) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "KEPT_CACHES", 2)
        run(model, ROWS, max_new_tokens=2)
        assert len(kept(model)) == 2
        patch.setattr(generation, "KEPT_BYTES", kept(model)[0].nbytes - 1)
        run(model, ROWS, max_new_tokens=2)
    (latest,) = kept(model)
    assert latest.h2o == model.h2o, "the latest is kept, whatever its size"


def test_a_cache_that_is_given_away_is_not_used_again(model):
    """The cache of a returned output overwritten by the next call."""
    model.h2o = settings()
    first = run(model, return_dict_in_generate=True, max_new_tokens=5)
    before = [layer.keys.clone() for layer in first.past_key_values.layers]
    own = HHCache(model.h2o)
    run(model, past_key_values=own, max_new_tokens=5)
    assert not kept(model)
    second = run(model, return_dict_in_generate=True, max_new_tokens=5)
    run(model, max_new_tokens=9)
    caches = [first.past_key_values, own, second.past_key_values, *kept(model)]
    assert len({id(cache) for cache in caches}) == len({slots(cache)[0] for cache in caches}) == 4
    for layer, keys in zip(first.past_key_values.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


def test_samplings_do_not_pile_up(model, captured):
    """Graphs for each temperature that was ever asked for."""
    model.h2o = settings()
    for i in range(9):
        run(model, do_sample=True, temperature=1.0 + i, max_new_tokens=2)
    (cache,) = kept(model)
    decoders = decoders_of(model, cache)
    assert len(decoders) == generation.KEPT_DECODERS
    run(model, do_sample=True, temperature=6.0, max_new_tokens=2)  # still there: comes to the end
    assert {id(decoder) for decoder in decoders_of(model, cache)} == {id(decoder) for decoder in decoders}
    assert decoders_of(model, cache)[-1] is decoders[0]


@pytest.mark.parametrize("how", [copy.deepcopy, "torch.save"], ids=["deepcopy", "pickle"])
def test_a_used_model_can_be_copied(how, captured):
    """Graphs and slots that go along or cannot be copied, or a copy whose merged weights are the original's."""

    def by_pickle(model):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    model = make_llamas().h2o
    model.h2o = settings()
    expected = sequences(run(model))
    other = (by_pickle if how == "torch.save" else how)(model)
    assert kept(model) and not kept(other)
    assert sequences(run(other)) == expected
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(-1.1)
    assert sequences(run(other)) != expected and sequences(run(model)) == expected


def test_a_deleted_model_is_freed_at_once(captured):
    """Weights, slots and graphs that name each other, and hold a GPU's memory until Python's collector runs."""
    model, cache = make_llamas(num_hidden_layers=1).h2o, HHCache(settings())
    model.h2o = cache.h2o
    run(model, max_new_tokens=5)
    run(model, max_new_tokens=5, past_key_values=cache)
    (decoder,) = decoders_of(model, cache)
    gc.collect()
    gc.disable()
    try:
        left = [weakref.ref(each) for each in (model, kept(model)[0], model.lm_head.weight)]
        del model
        assert len(captured) == 2 and [each() for each in left] == [None] * 3
        assert not decoder.is_current()
    finally:
        gc.enable()


def by_pickle(cache):
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("flags", [{}, {"head_budgets": ((6, 10), (12, 4))}, {"slots": "int8"}], ids=str)
def test_a_used_cache_can_be_copied(model, captured, how, flags):
    """A model, or its graphs, that go along with a copy of the cache; lengths or slots that part from the copy's own,
    as pickle makes them of views."""
    model.h2o = settings(**flags)
    cache = HHCache(model.h2o)
    ids = run(model, past_key_values=cache, max_new_tokens=5)
    other = how(cache)
    assert decoders_of(model, cache) and other not in model.kept_caches.decoders
    for layer in other.layers:
        assert layer.lengths.data_ptr() == layer.rows.mirror(layer.device).data_ptr()
        assert layer.keys is layer.slots.keys
    mask = torch.cat([left_pad(ROWS)["attention_mask"], torch.ones(3, 5, dtype=torch.long)], dim=1)
    results = [
        model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, past_key_values=each).tolist()
        for each in (other, cache)
    ]
    assert results[0] == results[1]
    assert_same_cache(other, cache)


# A model that changes


def moved(model):
    model.to(torch.float64).to(torch.float32)


def replaced(model):
    model.load_state_dict({k: -1.1 * v.clone() for k, v in model.state_dict().items()}, assign=True)


def another_head(model):
    model.lm_head = torch.nn.Linear(64, VOCAB, bias=False)


def another_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()


def another_table(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


@pytest.mark.parametrize("change", [moved, replaced, another_head, another_activation, another_table])
def test_a_changed_model_is_recorded_anew(captured, change):
    """Graphs that read weights, or run modules, which the model has no longer."""
    model = make_llamas().h2o
    model.h2o = settings()
    run(model)
    (cache,) = kept(model)
    (before,) = decoders_of(model, cache)
    assert before.is_current()
    run(model)
    assert decoders_of(model, cache) == [before], "nothing has changed"
    change(model)
    assert not before.is_current()
    tokens = sequences(run(model))
    assert kept(model) == [cache] and before not in decoders_of(model, cache)
    model.h2o = settings(capture=False)
    assert sequences(run(model)) == tokens


def test_weights_edited_in_place_are_the_models(model, captured):
    """A copy of the weights that edits do not reach."""
    model.h2o = settings()
    before = sequences(run(model))
    weight = model.model.layers[0].self_attn.v_proj.weight
    try:
        weight.data.mul_(-1)
        outputs, _ = both_ways(model, captured)
        assert sequences(outputs[0]) == sequences(outputs[1]) != before
    finally:
        weight.data.mul_(-1)


# A hostile user


class Interrupts(StoppingCriteria):
    def __init__(self, at):
        self.at = at

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.at:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("at", [14, 15, 24])
def test_interrupted_and_called_again(model, captured, monkeypatch, at):
    """Ended rows, a column or an open step that an interrupted call leaves to the next."""
    model.h2o = settings()
    expected, own = sequences(run(model)), HHCache(model.h2o)
    for passed in ({}, {"past_key_values": own}):
        with pytest.raises(KeyboardInterrupt):
            run(model, stopping_criteria=[Interrupts(at)], **passed)
        own.reset()
        assert sequences(run(model, **passed)) == expected


@pytest.mark.parametrize("own", [False, True])
def test_interrupted_inside_a_step(model, captured, monkeypatch, own):
    """A step that never ended, in a cache which is used again."""
    model.h2o, calls = settings(), []
    expected = sequences(run(model))
    cache = HHCache(model.h2o)
    passed = {"past_key_values": cache} if own else {}
    original = type(model.model.layers[1].mlp).forward

    def dies(self, states):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return original(self, states)

    monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        run(model, **passed)
    if own:
        with pytest.raises((RuntimeError, ValueError), match=r"reset\(\)"):
            run(model, **passed)
        cache.reset()
    assert sequences(run(model, **passed)) == expected


def test_one_cache_under_two_models(model, captured):
    """The graphs of one model run for the other."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    model.h2o = other.h2o = settings()
    expected = {each: sequences(run(each)) for each in (model, other)}
    assert expected[model] != expected[other]
    cache = HHCache(model.h2o)
    for each in (model, other, model, other):
        cache.reset()
        assert sequences(run(each, past_key_values=cache)) == expected[each]


def test_inside_inference_mode_and_outside(model, captured):
    """Slots, counters or weights made in inference mode, which nothing may change outside of it."""
    model.h2o = settings()
    expected, cache = sequences(run(model)), HHCache(model.h2o)
    assert model.kept_caches.clear() and not model.kept_caches.clear() and not kept(model)
    for mode in (torch.inference_mode, contextlib.nullcontext, torch.inference_mode):
        with mode():
            cache.reset()
            assert sequences(run(model)) == sequences(run(model, past_key_values=cache)) == expected
    cache.reset()
    forward(model, ROWS, cache)
    forward(model, [[4], [5], [6]], cache)
    cache.evict_for_space(2)
    assert_invariants(cache, recent=2)


def test_another_batch_size_in_one_cache(model, captured):
    """Decoders over slots that the cache has no longer."""
    model.h2o = settings()
    cache = HHCache(model.h2o)
    for rows in (ROWS, ROWS[:1], ROWS):
        cache.reset()
        assert sequences(run(model, rows, past_key_values=cache)) == sequences(run(model, rows))
