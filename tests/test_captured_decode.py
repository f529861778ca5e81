"""Captured decode: what `generate` says and leaves, against what runs step by step, and what is not captured."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, TextStreamer
from transformers.generation import StoppingCriteria

import recorded_steps
from conftest import (
    VOCAB,
    assert_same_cache,
    by_groups,
    left_pad,
    make_llamas,
    of_llamas,
    prompt,
    set_checkpointing,
    uneven,
)
from h2optimizer.batching import Batcher, Sequence
from h2optimizer.utils.cache import HHCache
from recorded_steps import ROWS, both_ways, decoders_of, eos_cases, run, sequences, settings

pytestmark = recorded_steps.MARKS
captured = recorded_steps.captured  # autouse
interpreted = recorded_steps.interpreted
llamas = recorded_steps.llamas
gqa = recorded_steps.gqa
model = recorded_steps.model


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
    "value mass": {"score": "value_mass", "num_heavy_hitters": "3/4"},
    "uneven": {"head_budgets": uneven, "score": "value_mass", "score_norm": "mean"},
    "int8": {"slots": "int8", "score": "value_mass"},
    "int8 uneven": {"slots": "int8", "head_budgets": uneven, "position_rolling": True},
    "uneven rolling": {"head_budgets": uneven, "position_rolling": True, "update_interval": 1},
}


@by_groups(FLAGS, ["rotation", "first head", "uneven"])
def test_captured_tokens_and_cache_are_the_stock_loops(llamas, captured, variant):
    """A step that tells the device something which a graph would hold fixed, a slimming on another step, a mass or
    count that is added twice or not at all: tokens and the whole cache of left-padded rows."""
    outputs, caches = both_ways(llamas.h2o, captured, flags=of_llamas(FLAGS[variant], llamas), own=True)
    assert sequences(outputs[0]) == sequences(outputs[1])
    assert_same_cache(*caches)
    assert min(caches[0].evictions) >= 1


@pytest.mark.parametrize(
    "flags", [{"position_rolling": True, "score_norm": "mean"}, FLAGS["uneven"]], ids=["rolling", "uneven"]
)
def test_on_the_kernels_themselves(interpreted, captured, flags):
    """What torch that stands for the kernels would hide: their arguments in a static step."""
    kv_heads = 2 if "head_budgets" in flags else 1
    sizes = {"num_attention_heads": 2, "num_key_value_heads": kv_heads, "num_hidden_layers": 1}
    llamas = make_llamas(hidden_size=32, intermediate_size=32, **sizes)
    flags = of_llamas(flags, llamas)
    outputs, caches = both_ways(llamas.h2o, captured, [prompt(10), prompt(3)], flags, own=True, max_new_tokens=4)
    assert sequences(outputs[0]) == sequences(outputs[1])
    assert_same_cache(*caches)


@pytest.mark.parametrize("new_tokens, own", [*((n, True) for n in (1, 2, 15, 16, 17, 18, 33)), (1, False), (17, False)])
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


@pytest.mark.parametrize(
    "case, own", [("one", True), ("each", True), ("late", True), ("at once", True), ("each", False)]
)
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


@pytest.mark.parametrize("case", SAMPLING)
def test_sampling_with_a_seed_is_the_stock_loops(model, captured, case):
    """Another distribution, or random numbers drawn in another order."""
    more_of = {"top_p": [{"eos_token_id": eos_cases(model)["each"]}], "all": [{"num_return_sequences": 2}]}
    for more in ({}, *more_of.get(case, [])):
        outputs, _ = both_ways(model, captured, do_sample=True, own=True, **SAMPLING[case], **more)
        assert sequences(outputs[0]) == sequences(outputs[1])
        assert sequences(outputs[0]) != sequences(run(model))


class EndsAfter(StoppingCriteria):
    """Ends each row after its own number of columns; keeps how many it was shown."""

    def __init__(self, columns):
        self.columns, self.looks = torch.tensor(columns), []

    def __call__(self, input_ids, scores, **kwargs):
        self.looks.append(input_ids.shape[1])
        return input_ids.shape[1] >= self.columns


@pytest.mark.parametrize("columns, own", [
    ((14, 14, 14), True), ((15, 20, 30), True), ((30, 45, 31), False), ((14, 99, 15), True),
], ids=str)  # fmt: skip
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
