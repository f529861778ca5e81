"""Captured decode and kept caches: what `generate` says and leaves, against what runs step by step."""

import contextlib
import copy
import gc
import io
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, TextStreamer
from transformers.generation import StoppingCriteria

import recorded_steps
from conftest import (
    VOCAB,
    assert_close,
    assert_invariants,
    forward,
    left_pad,
    make_llamas,
    prompt,
    set_checkpointing,
)
from h2optimizer import H2OConfig, generation
from h2optimizer.batching import Batcher, Sequence
from recorded_steps import ROWS, run, sequences, settings
from utils.cache import HHCache

pytestmark = recorded_steps.MARKS
captured = recorded_steps.captured  # autouse
interpreted = recorded_steps.interpreted
llamas = recorded_steps.llamas
gqa = recorded_steps.gqa
model = recorded_steps.model


def both_ways(model, captured, rows=ROWS, flags=None, own=False, **kwargs):
    """The outputs of a captured and of transformers' own loop, and the caches that were passed, if `own`."""
    outputs, caches = [], []
    for capture in (True, False):
        model.h2o = settings(capture=capture, **(flags or {}))
        caches.append(HHCache(model.h2o))
        before = len(captured)
        passed = {"past_key_values": caches[-1]} if own else {}
        outputs.append(run(model, rows, **{**kwargs, **passed}))
        assert (len(captured) > before) == capture
    return outputs, caches


def assert_same_cache(cache, expected):
    """All that a cache holds or counts, to the rounding of the mass."""
    for name in ("lengths", "seen", "evictions", "clock"):
        assert getattr(cache, name) == getattr(expected, name), name
    assert cache.get_seq_length() == expected.get_seq_length()
    mirror, _ = cache._rows.mirror(torch.device("cpu")), expected._rows.mirror(torch.device("cpu"))
    assert mirror.tolist() == [expected.lengths, expected.seen], "what the device counted"
    for layer_idx, (layer, other) in enumerate(zip(cache.layers, expected.layers, strict=True)):
        assert cache.positions(layer_idx).tolist() == expected.positions(layer_idx).tolist()
        for b, length in enumerate(cache.lengths):
            for name in ("keys", "values", "mass"):
                ours, theirs = getattr(layer.slots, name)[b, :, :length], getattr(other.slots, name)[b, :, :length]
                if name != "mass" or cache.h2o.needs_mass:
                    assert_close(ours, theirs, what=f"{name} of row {b}, layer {layer_idx}")
    assert_invariants(cache)


# Captured decode is transformers' loop

FLAGS = {
    "H2O": {"update_interval": 1},
    "rotation": {},
    "interval of a chunk": {"update_interval": 16},
    "rolling": {"position_rolling": True},
    "rolling mean": {"position_rolling": True, "score_norm": "mean", "score_decay": 0.75},
    "last due step only": {"score_every_step": False, "score_decay": 0.0},
    "mean of some": {"score_every_step": False, "score_norm": "mean", "score_queries": 4},
    "first head": {"group_reduce": "first", "score_decay": 0.5},
    "sink": {"score": "sink"},
    "local": {"num_heavy_hitters": 0},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_captured_tokens_and_cache_are_the_stock_loops(llamas, captured, flags):
    """A step that tells the device something which a graph would hold fixed, a slimming on another step, a mass or
    count that is added twice or not at all: tokens and the whole cache of left-padded rows."""
    outputs, caches = both_ways(llamas.h2o, captured, flags=flags, own=True)
    assert sequences(outputs[0]) == sequences(outputs[1])
    assert_same_cache(*caches)
    assert min(caches[0].evictions) >= 1


@pytest.mark.parametrize("flags", [{"position_rolling": True, "score_norm": "mean"}], ids=str)
def test_on_the_kernels_themselves(interpreted, captured, flags):
    """What torch that stands for the kernels would hide: their arguments in a static step."""
    llamas = make_llamas(hidden_size=32, intermediate_size=32, num_key_value_heads=1, num_hidden_layers=1)
    outputs, caches = both_ways(llamas.h2o, captured, [prompt(10), prompt(3)], flags, own=True, max_new_tokens=5)
    assert sequences(outputs[0]) == sequences(outputs[1])
    assert_same_cache(*caches)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("new_tokens", [1, 2, 15, 16, 17, 18, 33])
def test_any_number_of_tokens(model, captured, new_tokens, own):
    """A token too many or too few around the chunks that are decoded at once, or a cache that ends a step ahead."""
    outputs, caches = both_ways(model, captured, own=own, max_new_tokens=new_tokens)
    assert sequences(outputs[0]) == sequences(outputs[1])
    assert outputs[0].shape[1] == 13 + new_tokens
    if own:
        assert_same_cache(*caches)


@pytest.mark.parametrize("rows", [[[5]], [prompt(40)], [[5], prompt(40)], [prompt(8), prompt(8, 1)]], ids=len)
def test_prompts_of_any_length(model, captured, rows):
    """A prompt of one token taken for a decode step, or one beyond window and capacity that is not slimmed."""
    outputs, caches = both_ways(model, captured, rows, own=True, max_new_tokens=9)
    assert sequences(outputs[0]) == sequences(outputs[1])
    assert_same_cache(*caches)


def eos_cases(model):
    """Tokens that end some rows, all rows at different steps, or none."""
    model.h2o = settings(capture=False, backend="sdpa")
    base = run(model, max_new_tokens=20)[:, 13:]
    first, later, last = base[0, 5].item(), base[1, 9].item(), base[2, 19].item()
    return {"one": first, "each": [first, later, last], "late": base[2, 17].item(), "at once": base[:, 0].tolist()}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("case", ["one", "each", "late", "at once"])
def test_end_of_sequence(model, captured, case, own):
    """Tokens after a row's end, other padding than the stock loop's, columns after the last row's end, or a cache that
    has seen more than the sequences hold."""
    eos = eos_cases(model)[case]
    outputs, caches = both_ways(model, captured, own=own, eos_token_id=eos, max_new_tokens=33)
    assert sequences(outputs[0]) == sequences(outputs[1])
    if case == "each":
        assert outputs[0].shape[1] < 13 + 33 and (outputs[0][:, -1] == 0).any()
    if own:
        assert_same_cache(*caches)


@pytest.mark.parametrize("flags", [{}, {"position_rolling": True, "score_norm": "mean"}, {"score_decay": 0.5}], ids=str)
def test_a_second_turn_after_rows_that_ended(model, captured, flags):
    """Padding that recorded steps append for a row that has ended, or a row that stays ended in the next turn."""
    ends, turn, outputs, caches = eos_cases(model)["each"], torch.tensor([prompt(3, i) for i in range(3)]), [], []
    for capture in (True, False):
        model.h2o = settings(capture=capture, **flags)
        cache = HHCache(model.h2o)
        ids = run(model, past_key_values=cache, eos_token_id=ends, pad_token_id=0)
        ended = torch.isin(ids[:, 13:], torch.tensor(ends)).cumsum(1)
        text = (torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1) == 0).long()
        assert text.sum(1).min() < text.shape[1]
        fed = text[:, :-1].sum(1).tolist()  # the newest column has not been
        assert cache.seen == [len(row) + n for row, n in zip(ROWS, fed, strict=True)]
        mask = torch.cat([left_pad(ROWS)["attention_mask"], text, torch.ones_like(turn)], dim=1)
        ids = torch.cat([ids, turn], dim=1)
        outputs.append(
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=9, do_sample=False)
        )
        caches.append(cache)
        assert cache.seen == (mask.sum(1) + 8).tolist()
    assert len(captured) == 2 and sequences(outputs[0]) == sequences(outputs[1])
    assert_same_cache(*caches)


def test_holes_without_positions(model, captured, monkeypatch):
    """Positions that a mask leaves out where the caller gives none, as peft does: a graph that counts without them."""
    monkeypatch.setattr(type(model), "_prepare_position_ids_for_generation", lambda *args: None)
    inputs = left_pad(ROWS)
    inputs["attention_mask"][1, 6:11] = 0
    inputs["attention_mask"][1, :6] = inputs["attention_mask"][1, 11:] = 1
    tokens = []
    for capture in (True, False):
        model.h2o = settings(capture=capture, window_length=64)
        tokens.append(model.generate(**inputs, max_new_tokens=9, do_sample=False).tolist())
    assert len(captured) == 1 and tokens[0] == tokens[1]


SAMPLING = {
    "top_k": {"top_k": 5, "temperature": 0.7},
    "top_p": {"top_k": 0, "top_p": 0.5, "temperature": 3.0},
    "min_p": {"top_k": 0, "min_p": 0.1, "temperature": 2.0},
    "all": {"top_k": 20, "top_p": 0.8, "temperature": 4.0},
}


@pytest.mark.parametrize("case", SAMPLING.values(), ids=SAMPLING)
def test_sampling_with_a_seed_is_the_stock_loops(model, captured, case):
    """Another distribution, or random numbers drawn in another order."""
    eos = eos_cases(model)["each"]
    for more in ({}, {"eos_token_id": eos}, {"num_return_sequences": 2}):
        outputs, _ = both_ways(model, captured, do_sample=True, own=True, **case, **more)
        assert sequences(outputs[0]) == sequences(outputs[1])
        assert sequences(outputs[0]) != sequences(run(model))


class EndsAfter(StoppingCriteria):
    """Ends each row after its own number of columns; keeps how many it was shown."""

    def __init__(self, columns):
        self.columns, self.looks = torch.tensor(columns), []

    def __call__(self, input_ids, scores, **kwargs):
        self.looks.append(input_ids.shape[1])
        return input_ids.shape[1] >= self.columns


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("columns", [(14, 14, 14), (15, 20, 30), (30, 45, 31), (14, 99, 15)], ids=str)
def test_other_criteria_see_every_prefix(model, captured, columns, own):
    """A prefix that is not shown, rows that go on after they were ended, or more columns than the last of them has."""
    for eos in (None, eos_cases(model)["each"]):
        looks, outputs, caches = [], [], []
        for capture in (True, False):
            model.h2o = settings(capture=capture)
            ends, cache = EndsAfter(columns), HHCache(model.h2o)
            passed = {"past_key_values": cache} if own else {}
            outputs.append(run(model, stopping_criteria=[ends], max_new_tokens=33, eos_token_id=eos, **passed))
            n = outputs[-1].shape[1] - 13  # the stock loop is wiser with nobody waiting for the device
            assert ends.looks[:n] == list(range(14, 14 + n))
            looks.append(ends.looks), caches.append(cache)
        assert sequences(outputs[0]) == sequences(outputs[1])
        if own:
            assert_same_cache(*caches)
    assert len(captured) == 2


def test_stop_strings(model, captured):
    """A string that is found in one row and ends another, or not at all."""

    class Tokenizer:  # as much of one as stop strings take
        def get_vocab(self):
            return {f"<{i}>": i for i in range(VOCAB)}

        def __call__(self, text, **kwargs):
            return {"input_ids": [text]}

        def _convert_id_to_token(self, token):
            return token

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

    model.h2o = settings(capture=False)
    base = run(model)[:, 13:]
    stop = [f"<{base[0, 4]}><{base[0, 5]}>", f"<{base[1, 8]}>", f"<{base[2, 2]}>"]
    outputs, _ = both_ways(model, captured, stop_strings=stop, tokenizer=Tokenizer())
    assert sequences(outputs[0]) == sequences(outputs[1]) and outputs[0].shape[1] < 13 + 21


@pytest.mark.parametrize("how", ["dict", "own cache", "both"])
def test_a_second_turn(model, captured, how):
    """A cache that is a step ahead or behind when the next turn begins."""
    histories, caches = [], []
    for capture in (True, False):
        model.h2o = settings(capture=capture)
        cache = HHCache(model.h2o) if how != "dict" else None
        ids = torch.tensor([prompt(11), prompt(11, 1)])
        for turn in range(3):
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False, past_key_values=cache,
                return_dict_in_generate=how != "own cache",
            )  # fmt: skip
            cache = output.past_key_values if how == "dict" else cache
            ids = torch.cat([torch.tensor(sequences(output)), torch.tensor([prompt(4, turn), prompt(4, turn + 5)])], 1)
        histories.append(ids.tolist()), caches.append(cache)
    assert histories[0] == histories[1] and len(captured) == 3
    assert_same_cache(*caches)


def test_embeddings_for_a_prompt(model, captured):
    """Sequences that begin with tokens nobody gave, or end too early."""
    outputs = []
    for capture in (True, False):
        model.h2o = settings(capture=capture)
        embeddings = model.model.embed_tokens(torch.tensor([prompt(9)])).detach()
        outputs.append(model.generate(inputs_embeds=embeddings, max_new_tokens=18, do_sample=False).tolist())
    assert outputs[0] == outputs[1] and len(outputs[0][0]) == 18 and len(captured) == 1


# What is not captured


class Favour(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, input_ids[:, -1]] += 3.0
        return scores


NOT_CAPTURED = {
    "beams": ({}, {"num_beams": 2}),
    "processors of one's own": ({}, {"logits_processor": [Favour()]}),
    "repetition penalty": ({}, {"repetition_penalty": 1.5}),
    "streamer": ({}, {"streamer": True}),
    "logits": ({}, {"output_logits": True, "return_dict_in_generate": True}),
    "scores": ({}, {"output_scores": True, "return_dict_in_generate": True}),
    "hidden states": ({}, {"output_hidden_states": True, "return_dict_in_generate": True}),
    "mask": ({"slimming": "mask"}, {}),
    "capture=False": ({"capture": False}, {}),
    "no kernels": ({"backend": "sdpa"}, {}),
    "positions of one's own": ({}, {"position_ids": torch.arange(13).expand(3, -1) + 40}),
    "a DynamicCache": ({}, {"past_key_values": True}),
}


@pytest.mark.parametrize("flags, kwargs", NOT_CAPTURED.values(), ids=NOT_CAPTURED)
def test_what_is_not_captured(model, captured, flags, kwargs):
    """Something that is asked of generate and that the captured steps do not do."""
    results = []
    for capture in (True, False):
        given = dict(kwargs)
        if "streamer" in given:
            given["streamer"] = TextStreamer(SimpleNamespace(decode=lambda ids, **kwargs: ""))
        if "past_key_values" in given:
            given["past_key_values"] = DynamicCache(config=model.config)
        rows = ROWS[:1] if "streamer" in given else [prompt(13), prompt(13, 1), prompt(13, 2)]
        model.h2o = settings(**({"capture": capture} | flags))
        results.append(sequences(run(model, rows, **given)))
    assert not captured and results[0] == results[1]


def test_training_mode_is_not_captured(model, captured):
    """Dropout of one step replayed in all."""
    model.h2o = settings()
    model.train()
    try:
        run(model, max_new_tokens=3)
    finally:
        model.eval()
    assert not captured


@pytest.mark.parametrize("where", ["model", "layer", "projection"])
@pytest.mark.parametrize("how", ["after", "before", "replaced"])
def test_hooks_are_called_on_every_step(model, captured, where, how):
    """A hook that a graph, replayed, does not call: on the model or on any module in it."""
    module, calls = (
        {
            "model": model,
            "layer": model.model.layers[1],
            "projection": model.model.layers[0].self_attn.v_proj,
        }[where],
        [],
    )
    model.h2o = settings()
    with contextlib.ExitStack() as undo:
        if how == "replaced":
            forward = module.forward
            module.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
            undo.callback(delattr, module, "forward")
        else:
            register = module.register_forward_hook if how == "after" else module.register_forward_pre_hook
            undo.callback(register(lambda *args: calls.append(1)).remove)
        run(model, max_new_tokens=6)
    assert len(calls) == 6 and not captured
    run(model, max_new_tokens=6)
    assert len(captured) == 1


def test_hidden_states_once_asked_for_do_not_end_capture(model, captured):
    """The hooks that transformers installs then, and leaves, taken for somebody's."""
    model.h2o = settings()
    run(model, output_hidden_states=True, return_dict_in_generate=True, max_new_tokens=3)
    assert any(module._forward_hooks for module in model.modules()) and not captured
    set_checkpointing(model, True)
    set_checkpointing(model, False)
    assert model.model.embed_tokens._forward_hooks
    run(model, max_new_tokens=3)
    assert captured


@pytest.mark.parametrize("rope", ["dynamic", "linear", "llama3", "longrope", "yarn"])
def test_scaled_positions(captured, rope):
    """Frequencies that are chosen on the host by the length, in a step that is recorded once."""
    parameters = {
        "dynamic": {"factor": 2.0},
        "linear": {"factor": 2.0},
        "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0},
        "yarn": {"factor": 2.0, "attention_factor": 1.5},
    }[rope]
    if rope in ("llama3", "longrope", "yarn"):
        parameters["original_max_position_embeddings"] = 16
    rope_parameters = {"rope_type": rope, "rope_theta": 10000.0, **parameters}
    model = make_llamas(max_position_embeddings=16, rope_parameters=rope_parameters).h2o
    outputs, caches = both_ways(model, captured, [prompt(13), prompt(9)], own=True)
    assert sequences(outputs[0]) == sequences(outputs[1])
    (decoder,) = decoders_of(model, caches[0])
    assert decoder.static == (rope in ("linear", "llama3", "yarn"))


def test_autocast_is_not_captured(model, captured):
    """Slots, or a graph, of weights as they are cast no longer."""
    model.h2o = settings()
    run(model, max_new_tokens=3)
    tokens = []
    for capture in (True, False):
        model.h2o = settings(capture=capture)
        with torch.autocast("cpu", torch.bfloat16):
            tokens.append(sequences(run(model)))
    assert tokens[0] == tokens[1] and len(captured) == 1


@pytest.mark.parametrize("compileable", [False, True])
def test_quantised_layers_that_ask_the_device_are_not_captured(model, captured, monkeypatch, compileable):
    """bitsandbytes' layers of 8 bits, which look for outliers on the host, in a graph: an error of CUDA's."""
    monkeypatch.setattr(model, "hf_quantizer", SimpleNamespace(is_compileable=compileable), raising=False)
    model.h2o = settings()
    run(model, max_new_tokens=3)
    assert len(captured) == compileable
    batcher = Batcher(model, 2, set(), 0)
    list(batcher.run([Sequence(prompt(5), 3)]))
    assert batcher.decoding.decoder.static == compileable


# Kept caches


def kept(model) -> list[HHCache]:
    return list(model.kept_caches._caches.values())


def decoders_of(model, cache) -> list:
    """What decodes over the cache's slots, the last used last."""
    return list(model.kept_caches.decoders[cache].values())


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


@pytest.mark.parametrize("flags", [{}, {"compile": True}], ids=str)
def test_a_deleted_model_is_freed_at_once(captured, flags):
    """Weights, slots and graphs that name each other, and hold a GPU's memory until Python's collector runs."""
    model, cache = make_llamas(num_hidden_layers=1).h2o, HHCache(settings(**flags))
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


def test_a_used_cache_can_be_copied(model, captured):
    """A model, or its graphs, that go along with a copy of the cache; lengths that part from the copy's own."""
    model.h2o = settings()
    cache = HHCache(model.h2o)
    ids = run(model, past_key_values=cache, max_new_tokens=5)
    other = copy.deepcopy(cache)
    assert decoders_of(model, cache) and other not in model.kept_caches.decoders
    for layer in other.layers:
        assert layer.lengths.data_ptr() == other._rows.mirror(layer.device).data_ptr()
    mask = torch.cat([left_pad(ROWS)["attention_mask"], torch.ones(3, 5, dtype=torch.long)], dim=1)
    results = [
        model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, past_key_values=each).tolist()
        for each in (other, cache)
    ]
    assert results[0] == results[1]
    assert_same_cache(other, cache)


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


# torch.compile


@pytest.mark.parametrize("versions, flags", [
    (1, {"position_rolling": True, "score_norm": "mean"}), (2, {"score_every_step": False}),
], ids=str)  # fmt: skip
def test_compiled_tokens(captured, versions, flags):
    """A step that does not compile as one graph or is compiled once more when slimming is due, which may be when it is
    recorded; the compiler's error after so many versions of one function (eight), which every batch size adds to."""
    model = make_llamas(hidden_size=32, intermediate_size=32, num_hidden_layers=1).h2o
    for n in (2, 1)[: 3 - versions]:
        tokens = []
        for how in ({"compile": True}, {"capture": False}):
            model.h2o = settings(update_interval=2, **flags, **how)
            with torch._dynamo.config.patch(recompile_limit=versions):
                tokens.append(sequences(run(model, ROWS[:n], max_new_tokens=7)))
        assert tokens[0] == tokens[1]
    assert len(captured) == 3 - versions


def test_a_step_is_compiled_once_inside_inference_mode_and_outside(captured):
    """A compilation while a graph is recorded, whose measurements CUDA refuses there."""
    model = make_llamas(hidden_size=32, intermediate_size=32, num_hidden_layers=1).h2o
    model.h2o, graphs = settings(compile=True), []
    for mode in (contextlib.nullcontext, torch.inference_mode):
        with mode():
            run(model, max_new_tokens=7)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(captured) == 2 and graphs[0] == graphs[1]


def test_a_compiled_step_asks_whether_layers_are_still_the_merged_ones(captured):
    """Weights that the layers have no longer, under a cache of the user's own, for which generate merges nothing."""
    model = make_llamas(hidden_size=32, intermediate_size=32, num_hidden_layers=1).h2o
    model.h2o, tokens = settings(compile=True), []
    run(model, max_new_tokens=3)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = torch.nn.Parameter(-1.5 * mlp.up_proj.weight.detach())
    for flags in ({"compile": True}, {"capture": False}):
        tokens.append(sequences(run(model, past_key_values=HHCache(settings(**flags)))))
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("flags", [
    {"capture": False}, {"slimming": "mask"}, {"backend": "sdpa"}, {"backend": "eager"},
    {"backend": "flash_attn", "score_every_step": False},
], ids=str)  # fmt: skip
def test_compile_needs_captured_kernels(flags):
    """A flag that is taken and does nothing."""
    with pytest.raises(ValueError, match="compile=True compiles captured Triton steps"):
        H2OConfig(compile=True, **flags)
    assert H2OConfig(compile=True).compile and H2OConfig(compile=True, backend="triton").compile
    with pytest.raises(ValueError, match="compile=1"):
        H2OConfig(compile=1)
