"""Slots of 8 bits: what is stored, what that costs in memory and in accuracy, and the flag."""

import dataclasses

import pytest
import torch

from conftest import assert_close, by_head, forward, make_llamas, new_cache, of_llamas, prompt, uneven, with_flags
from h2optimizer import H2OConfig
from h2optimizer.attention import decodes_by_kernel
from h2optimizer.flags import add_cache_flags, h2o_config
from h2optimizer.utils.cache import HHCache
from h2optimizer.utils.cli import InputError, OneLineParser
from h2optimizer.utils.costs import row_held
from h2optimizer.utils.int8_slots import dequantize, quantize

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_rounds_to_the_nearest_of_255_numbers():
    """-128, which has no opposite, half a step too far down, or a division by the scale of zeros."""
    states = torch.tensor([[127.0, -127.0, 0.5, 1.5, -2.5, 2.6, 0.0], [0.0] * 7])
    numbers, scales = quantize(states)
    assert numbers.tolist() == [[127, -127, 0, 2, -2, 3, 0], [0] * 7] and scales.tolist() == [1.0, 0.0]
    for dtype in DTYPES:
        states = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        numbers, scales = quantize(states)
        error = (dequantize(numbers, scales, torch.float32) - states.float()).abs()
        assert (error <= 0.5001 * scales[:, None]).all() and numbers.abs().amax(1).eq(127).all()
    broken = torch.tensor([[1.0, torch.nan], [torch.inf, 1.0]])
    assert not dequantize(*quantize(broken), torch.float32).isfinite().all(dim=1).any()


def named(flags):
    """An id that is the same in every process of a run."""
    return ",".join(f"{name}={getattr(value, '__name__', value)}" for name, value in flags.items()) or "default"


@pytest.mark.parametrize("slimming", ["H", "mask"])
@pytest.mark.parametrize(
    "flags", [{}, {"head_budgets": uneven}, {"prefill_chunk": 5, "position_rolling": True}], ids=named
)
def test_a_token_is_rounded_once(flags, slimming):
    """Rounding that adds up in heavy hitters, turn after turn, because a turn reads slots in bfloat16."""
    if "head_budgets" in flags and slimming == "mask":
        pytest.skip("refused")
    llamas = make_llamas(torch.bfloat16)
    cache = new_cache(**of_llamas({"window_length": 8, "update_interval": 2, **flags}, llamas), slots="int8",
                      slimming=slimming)  # fmt: skip
    forward(llamas.h2o, [prompt(11)], cache)
    held = tokens_of(cache)
    for block in (prompt(4, 1), [3], [4], prompt(9, 2), prompt(2, 3)):
        forward(llamas.h2o, [block], cache)
        now = tokens_of(cache)
        assert held.keys() & now.keys() and all(held[token] == now[token] for token in held.keys() & now.keys())
        held = held | now


def tokens_of(cache) -> dict:
    """What the slots hold of each token, by layer, head and position."""
    held = {}
    for layer_idx, layer in enumerate(cache.layers):
        named = {name: by_head(cache, layer_idx, name)[0] for name in (*layer.slots.states, "positions")}
        for head, length in enumerate(layer.lengths[0].tolist()):
            for slot in range(length):
                of = [named[name][head, slot].tolist() for name in layer.slots.states]
                held[layer_idx, head, named["positions"][head, slot].item()] = of
    return held


@pytest.mark.parametrize("flags", [{}, {"score": "value_mass", "head_budgets": uneven}], ids=named)
def test_bytes_are_those_that_are_held(flags):
    """Scales left out, or keys that are kept in the model's dtype as well."""
    llamas = make_llamas(torch.bfloat16, head_dim=128)
    flags, held = of_llamas({"window_length": 8, "update_interval": 2, **flags}, llamas), {}
    for slots in ("auto", "int8"):
        cache = new_cache(**flags, slots=slots)
        forward(llamas.h2o, [prompt(20)], cache)
        held[slots] = cache.nbytes
        others = row_held(llamas.h2o.config, 2, 20, cache.h2o) - cache.nbytes
        assert 8 * llamas.h2o.config.vocab_size < others < 8 * llamas.h2o.config.vocab_size + 500
        stored = [getattr(layer.slots, name) for layer in cache.layers for name in layer.slots.states]
        held[f"{slots} states"] = sum(of.nbytes for of in stored)
    assert held["int8"] < 0.53 * held["auto"]
    assert held["int8 states"] == (128 + 4) / 256 * held["auto states"]


def test_little_is_lost():
    """Keys or values of another head's or slot's scale: predictions move by far more than rounding moves them."""
    llamas = make_llamas(initializer_range=0.1)
    tokens, logits = prompt(60), {}
    for slots in ("auto", "int8"):
        cache = new_cache(window_length=16, update_interval=4, slots=slots)
        blocks = [tokens[:20], *([token] for token in tokens[20:])]
        logits[slots] = torch.cat([forward(llamas.h2o, [block], cache)[0] for block in blocks])
    exact, rounded = (logits[slots].log_softmax(-1) for slots in ("auto", "int8"))
    divergence = (exact.exp() * (exact - rounded)).sum(-1)[20:].mean().item()
    assert 0 < divergence < 1e-3


def test_a_step_with_gradients_sees_what_is_stored(gqa):
    """A step that attends to its own token unrounded only where gradients are wanted, or gradients that the rounding
    stops."""
    embed, grads = gqa.h2o.model.embed_tokens, []
    logits = []
    for wanted in (False, True):
        cache = new_cache(window_length=8, slots="int8")
        forward(gqa.h2o, [prompt(10)], cache)
        states = embed(torch.tensor([[7]])).detach().requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            result = gqa.h2o(inputs_embeds=states, past_key_values=cache).logits
        if wanted:
            result.sum().backward()
            grads.append(states.grad)
        logits.append(result.detach())
    assert_close(logits[1], logits[0])
    assert grads[0].abs().min() > 0


def test_a_turn_reads_the_norms_that_tokens_came_with(gqa):
    """Norms of rounded values after a second turn, by which the tokens of the first would rank otherwise."""
    caches = [new_cache(window_length=16, score="value_mass", slots=slots) for slots in ("auto", "int8")]
    for cache in caches:
        forward(gqa.h2o, [prompt(9)], cache)
    before = by_head(caches[1], 0, "norms")[:, :, :9].clone()
    assert_close(before, by_head(caches[0], 0, "norms")[:, :, :9], 1e-6)
    forward(gqa.h2o, [prompt(3)], caches[1])
    assert torch.equal(by_head(caches[1], 0, "norms")[:, :, :9], before)


@pytest.mark.parametrize(
    "flags", [{"score": "value_mass"}, {"head_budgets": uneven, "position_rolling": True}], ids=named
)
def test_a_prefix_leaves_what_the_whole_prompt_leaves(llamas, flags):
    """A prefix that is rounded before its own tokens or those that follow have seen it: all that they see differs."""
    flags = of_llamas({"window_length": 8, "update_interval": 3, **flags, "slots": "int8"}, llamas)
    model, shared, rows = with_flags(llamas, **flags), prompt(17), [prompt(9, 1), prompt(3, 2)]
    prefix = model.prefill_prefix(shared)
    caches = [HHCache(model.h2o, prefix=prefix), HHCache(model.h2o)]
    blocks = [rows, *([[token]] * 2 for token in prompt(4)), [prompt(4, 3), prompt(2, 4)]]
    for block in blocks:
        whole = [[*shared, *row] for row in block] if block is rows else block
        ours, expected = (forward(model, of, cache) for of, cache in zip((block, whole), caches, strict=True))
        for b, row in enumerate(block):
            assert_close(ours[b], expected[b][-len(row) :], 4e-3)  # a number between two may fall to either side
    for layer_idx, layer in enumerate(caches[0].layers):
        assert caches[0].positions(layer_idx).equal(caches[1].positions(layer_idx))
        assert layer.keys.dtype == torch.int8 and prefix.layers[layer_idx].keys.dtype == model.dtype


def test_flash_attn_leaves_decode_steps_to_the_kernel(gqa):
    """A package that reads plain tensors given int8, or a copy of all slots at each step."""
    for slots in ("auto", "int8"):
        cache = new_cache(window_length=8, slots=slots, backend="sdpa", score_every_step=False)
        forward(gqa.h2o, [prompt(10)], cache)
        layer, step = cache.layers[0], cache.begin(1, 1)
        layer.h2o, layer.by_kernel = dataclasses.replace(cache.h2o, backend="flash_attn"), True
        assert not step.scored and decodes_by_kernel(layer, step) == (slots == "int8")


def flags_of(*argv):
    parser = OneLineParser()
    add_cache_flags(parser, always=True)
    return h2o_config(parser.parse_args(argv))


def test_the_flag():
    """A value that is silently taken for the default, or a traceback."""
    assert flags_of().slots == "auto" and flags_of("--slots", "int8").slots == "int8"
    with pytest.raises(InputError, match=r"--slots: invalid choice: 'int4' .*auto.*int8") as refused:
        flags_of("--slots", "int4")
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="slots='int4': choose one of auto, int8"):
        H2OConfig(slots="int4")
