"""Captured decode, kept caches, merged projections and the Batcher: all of it against what runs step by step, alone.

There are no graphs on a CPU: the same static steps are run there. Most tests let torch stand for the kernels
(kernel_doubles.py); what is marked `interpreted` runs them in Triton's interpreter.
"""

import contextlib
import copy
import dataclasses
import gc
import io
import itertools
import os
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor, TextStreamer
from transformers.generation import StoppingCriteria, TopPLogitsWarper
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import kernel_doubles
from conftest import (
    GROUPS,
    VOCAB,
    assert_close,
    assert_invariants,
    forward,
    left_pad,
    make_llamas,
    new_cache,
    prompt,
    set_checkpointing,
)
from h2optimizer import H2OConfig, H2OLlamaForCausalLM, batching, decoding, generation
from h2optimizer.batching import Batcher, Sequence
from h2optimizer.fused import MergedLinear
from h2optimizer.llama import H2OLlamaRMSNorm
from h2optimizer.sampling import sample_rows
from utils.cache import HHCache

pytest.importorskip("triton")

from h2optimizer.kernels import mlp

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="graphs are recorded here: test_gpu.py"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero|All-NaN slice):RuntimeWarning"),
]

SMALL = {"window_length": 8, "update_interval": 3, "backend": "triton"}
ROWS = [prompt(13), prompt(3), prompt(8)]


@pytest.fixture(autouse=True)
def captured(monkeypatch, request):
    """The steps of a graph, run; a list that grows by one with each generate that took them."""
    if "interpreted" not in request.fixturenames:
        kernel_doubles.install(monkeypatch)
    taken, original = [], generation.sample
    monkeypatch.setattr(generation, "sample", lambda *args, **kwargs: taken.append(1) or original(*args, **kwargs))
    return taken


@pytest.fixture
def interpreted():
    """Triton's own kernels."""


@pytest.fixture(scope="module", params=GROUPS)
def llamas(request):
    """The session's as no other test has left them: a hook or training mode would end capture."""
    return make_llamas(num_key_value_heads=GROUPS[request.param])


@pytest.fixture(scope="module")
def gqa():
    return make_llamas()


@pytest.fixture
def model(gqa):
    """With no cache of an earlier test."""
    gqa.h2o.kept_caches = generation.KeptCaches()
    return gqa.h2o


def settings(**flags) -> H2OConfig:
    return H2OConfig(**{**SMALL, **flags})


def run(model, rows=ROWS, **kwargs):
    """Greedy unless told, with a seeded sampler; sequences, or the output object."""
    torch.manual_seed(7)
    return model.generate(**left_pad(rows), **{"max_new_tokens": 21, "do_sample": False, **kwargs})


def sequences(output) -> list[list[int]]:
    return (output if isinstance(output, torch.Tensor) else output.sequences).tolist()


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
                ours, theirs = getattr(layer, name)[b, :, :length], getattr(other, name)[b, :, :length]
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
    with pytest.raises(ValueError, match="compile=True compiles captured steps"):
        H2OConfig(compile=True, **flags)
    assert H2OConfig(compile=True).compile and H2OConfig(compile=True, backend="triton").compile
    with pytest.raises(ValueError, match="compile=1"):
        H2OConfig(compile=1)


# Merged projections


def merged_llama():
    llamas = make_llamas()
    llamas.h2o.h2o = H2OConfig(backend="triton")  # whose steps take the products
    llamas.h2o.merge_projections()
    return llamas


def merges(model):
    return [part.merged for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]


def one_token(model):
    with torch.no_grad():
        cache = new_cache(window_length=8, backend="sdpa")
        model(torch.tensor([prompt(4), prompt(4, 1)]), past_key_values=cache)
        return model(torch.tensor([[5], [9]]), past_key_values=cache).logits


def test_one_product_is_three(interpreted):
    """Outputs that are split at another place, or weights in another order."""
    llamas = merged_llama()
    logits = one_token(llamas.h2o)
    for layer in llamas.h2o.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.merged.is_current(attention.q_proj, attention.k_proj, attention.v_proj), "it is used"
        assert mlp.merged.is_current(mlp.gate_proj, mlp.up_proj)
        attention.merged.weight = mlp.merged.weight = None
    assert_close(logits, one_token(llamas.h2o), 1e-5)


def test_only_what_kernels_take_is_merged():
    """A float64 model whose activation is rounded to float32 on the way, or merged weights where nothing uses them."""
    for dtype, backend in ((torch.float64, "triton"), (torch.float32, "sdpa")):
        model = make_llamas(dtype).h2o
        model.h2o = H2OConfig(backend=backend)
        model.merge_projections()
        assert all(merge.weight is None for merge in merges(model))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 0)])
@pytest.mark.parametrize("rows, size", [(1, 5), (3, 1024), (2, 2050)])
def test_activation_of_a_merged_product(interpreted, dtype, tolerance, rows, size):
    """Gate and up exchanged, a tail left out, or half precision rounded once where torch rounds twice."""
    gate, up = 3 * torch.randn(2, rows, 1, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.nn.functional.silu(gate) * up
    for run in (mlp.run_silu_and_multiply, mlp.silu_and_multiply):
        output = run(torch.cat([gate, up], dim=-1))
        assert output.dtype == dtype and output.shape == gate.shape
        apart = (output - expected).abs() > tolerance + torch.finfo(dtype).eps * expected.abs()
        assert not apart.any(), "by more than the last bit"


def test_merged_checkpoints_are_whole(tmp_path):
    """Weights that share memory taken for copies of each other, and left out of the file."""
    llamas = merged_llama()
    state = llamas.h2o.state_dict()
    assert state.keys() == llamas.stock.state_dict().keys()
    llamas.h2o.save_pretrained(tmp_path)
    for kind in (LlamaForCausalLM, H2OLlamaForCausalLM):
        back, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        for name, tensor in llamas.stock.state_dict().items():
            assert torch.equal(state[name], tensor) and torch.equal(back.state_dict()[name], tensor), name


def train(model, columns):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = torch.tensor([prompt(columns), prompt(columns, 1)])
    loss = model(ids, labels=ids).loss if columns > 1 else model(ids).logits.logsumexp(-1).sum()
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("columns", [7, 1])
def test_merged_weights_are_trained(columns):
    """Gradients that go to the product and not to the layers, of one column; a step that the product does not see."""
    merged, plain = merged_llama(), make_llamas()
    before = one_token(merged.h2o)
    for llamas in (merged, plain):
        train(llamas.h2o, columns)
    for (name, weight), other in zip(merged.h2o.named_parameters(), plain.h2o.parameters(), strict=True):
        assert_close(weight.detach(), other.detach(), 1e-5, name)
    assert all(merge.weight is not None for merge in merges(merged.h2o))
    assert_close(one_token(merged.h2o), one_token(plain.h2o))
    assert not torch.allclose(one_token(merged.h2o), before)


@pytest.mark.parametrize("columns", [7, 1])
def test_gradients_of_inputs_to_frozen_weights(columns):
    """A soft prompt's gradient that stops at a kernel which has none."""
    gradients = []
    for model in merged_llama():
        model.requires_grad_(False)
        embeddings = torch.randn(2, columns, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        embeddings.requires_grad_(True)
        model(inputs_embeds=embeddings, use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append(embeddings.grad)
    assert_close(gradients[0], gradients[1], 1e-5)


def edit_in_place(model, attention):
    attention.k_proj.weight.data[3].mul_(-2)


def load(model, attention):
    model.load_state_dict({name: -0.5 * tensor for name, tensor in model.state_dict().items()})


def assign(model, attention):
    model.load_state_dict({name: -0.5 * tensor for name, tensor in model.state_dict().items()}, assign=True)


class Adapter(torch.nn.Module):
    """As LoRA's: a layer around a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.weight, self.bias = layer, layer.weight, None
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, states):
        return 1.5 * self.base_layer(states)


class Scaled(torch.nn.Linear):
    def forward(self, states):
        return 1.5 * super().forward(states)


def adapt(model, attention):
    attention.q_proj = Adapter(attention.q_proj)


def subclass(model, attention):
    attention.q_proj.__class__ = Scaled


def hook(model, attention):
    attention.v_proj.register_forward_hook(lambda module, args, output: -output)


def pre_hook(model, attention):
    attention.v_proj.register_forward_pre_hook(lambda module, args: (-args[0],))


def patch(model, attention):
    original = attention.q_proj.forward
    attention.q_proj.forward = lambda states: 2 * original(states)


def bias(model, attention):
    attention.k_proj.bias = torch.nn.Parameter(torch.linspace(-3, 3, attention.k_proj.out_features))


def another_weight(model, attention):
    attention.v_proj.weight = torch.nn.Parameter(-attention.v_proj.weight.detach())


def move(model, attention):
    model.double()


EDITS = [edit_in_place, load, assign, adapt, subclass, hook, pre_hook, patch, bias, another_weight, move]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_the_product_follows_its_layers(edit):
    """Weights that the model has no longer, or a layer's wrapper, hook or bias passed by. Merging again, which
    `generate` does, is right as well."""
    merged, plain = merged_llama().h2o, make_llamas().h2o
    before = one_token(merged)
    for model in (merged, plain):
        edit(model, model.model.layers[0].self_attn)
    expected = one_token(plain)
    assert not torch.allclose(expected, before.to(expected.dtype)), "the edit does something"
    for _ in range(2):
        assert_close(one_token(merged), expected, 1e-5)
        merged.merge_projections()
    alone = [merge.weight is None for merge in merges(merged)]
    assert alone[0] == (edit in (adapt, subclass, hook, pre_hook, patch, bias, move))
    assert all(alone) if edit is move else not alone[1], "no kernel takes float64"


def test_merging_twice_moves_nothing():
    """Weights that are copied at each generate."""
    merge, layers = MergedLinear(), [torch.nn.Linear(8, n, bias=False) for n in (4, 2, 2)]
    merge.merge(*layers)
    at = [layer.weight.data_ptr() for layer in layers]
    assert all(isinstance(layer.weight, torch.nn.Parameter) for layer in layers)
    merge.merge(*layers)
    assert [layer.weight.data_ptr() for layer in layers] == at
    states = torch.randn(2, 1, 8)
    assert merge.product(states, *layers) is None, "gradients are the layers' own"
    with torch.no_grad():
        product = merge.product(states, *layers)
        assert_close(product, torch.cat([layer(states) for layer in layers], dim=-1), 1e-6)
        assert merge.product(torch.randn(2, 3, 8), *layers) is None, "prompts gain nothing"


def test_generate_merges(model, captured):
    """Products that are never used."""
    for merge in merges(model):
        merge.weight = None
    model.h2o = settings()
    run(model, max_new_tokens=2)
    assert all(merge.weight is not None for merge in merges(model))


@pytest.mark.parametrize("states_in, weight_in", [
    (torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("columns", [1, 3])
def test_norm_of_one_column(columns, states_in, weight_in):
    """Another epsilon or weight, a sum in half precision, or another dtype than stock Llama's comes out."""
    ours, stock = H2OLlamaRMSNorm(64, eps=1e-3), LlamaRMSNorm(64, eps=1e-3)
    for norm in (ours, stock):
        norm.weight.data = torch.linspace(0.1, 2, 64).to(weight_in)
    states = (torch.randn(3, columns, 64, generator=torch.Generator().manual_seed(0)) * 0.1).to(states_in)
    output, expected = ours(states), stock(states)
    assert output.dtype == expected.dtype
    eps = max(torch.finfo(states_in).eps, torch.finfo(weight_in).eps, 1e-7)  # stock sums float64 in float32
    assert_close(output.detach(), expected.detach(), 2 * eps)


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


@pytest.mark.parametrize("flags", JOINS.values(), ids=JOINS)
def test_rows_that_join_go_on_as_alone(model, flags):
    """A row whose slimmings fall on other steps than alone, or that keeps something of the row before it."""
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
            assert torch.equal(layer.positions[row, :, :length], expected.layers[layer_idx].positions[0, :, :length])
            if h2o.needs_mass:
                assert_close(layer.mass[row, :, :length], expected.layers[layer_idx].mass[0, :, :length])
                assert not layer.mass[row, :, length:].any()


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


@pytest.mark.parametrize("flags", BATCHES.values(), ids=BATCHES)
def test_a_sequence_depends_on_nothing_beside_it(gqa, flags):
    """Rows, order or neighbours that show in a text, its log-probabilities or what its cache held."""
    model = gqa.stock if flags is None else gqa.h2o
    if flags is not None:
        model.h2o = settings(**flags)
    expected = batch(model, 1, make_sequences())
    assert {sequence.finish_reason for sequence in expected} == {"stop", "length"}
    for rows, order in ((3, None), (7, [6, 5, 4, 3, 2, 1, 0]), (2, [3, 0, 6, 1, 5, 2, 4])):
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


@pytest.mark.parametrize(
    "flags", [{}, {"update_interval": 1}, {"update_interval": 20}, {"prefill_chunk": 3}, {"prefill_chunk": 8}], ids=str
)
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
    stock = batch(make_llamas().stock, 3, make_sequences())
    for sequence in stock:
        seen = len(sequence.prompt) + len(sequence.tokens) - 1
        kv_bytes = seen * 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32
        assert sequence.cache == {"tokens_seen": seen, "slots_kept": seen, "slimmings": 0, "kv_bytes": kv_bytes}


@pytest.mark.parametrize("kind", ["h2o", "stock"])
def test_several_sequences_of_one_prompt(gqa, kind):
    """A prompt that is prefilled for each of its sequences, or whose sequences are all alike."""
    model = getattr(gqa, kind)
    gqa.h2o.h2o = settings()
    texts, columns = [prompt(9), prompt(14)], []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: columns.append(args[0].shape) if args[0].shape[1] > 1 else None, with_kwargs=True
    )
    try:
        results = []
        for rows in (1, 4, 6):
            columns.clear()
            wanted = [Sequence(texts[i // 3], 9, 1.5, 1.0, (i % 3,)) for i in range(6)]
            results.append([facts(sequence)[:2] for sequence in batch(model, rows, wanted, eos=set())])
            if rows == 6:
                assert columns == [(2, 14)], "each prompt once"
    finally:
        hook.remove()
    assert results[0] == results[1] == results[2]
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
