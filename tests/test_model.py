"""H2OLlamaForCausalLM as a user meets it: the cache it makes or is given, checkpoints, and what is refused."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaForCausalLM

from conftest import (
    VOCAB,
    addresses,
    assert_close,
    assert_invariants,
    forward,
    generate,
    left_pad,
    make_llamas,
    new_cache,
    new_tokens,
    prompt,
    slot_tensors,
    with_flags,
)
from h2optimizer import H2OConfig, H2OLlamaForCausalLM
from h2optimizer.utils.cache import HHCache

# The cache under the model


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


def test_addresses_never_change(gqa):
    """Slots that are allocated anew on the way: no captured graph would survive it."""
    for slimming in ("H", "mask"):
        model = with_flags(gqa, window_length=8, update_interval=3, slimming=slimming, score_norm="mean")
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


def test_the_last_token_is_not_cached(gqa):
    """`seen` counts what the cache has been fed: the prompt and all new tokens but the last."""
    model = with_flags(gqa, window_length=8, update_interval=2)
    result = generate(model, [prompt(9), prompt(4)], 5)
    assert result.past_key_values.seen == [13, 8] and result.past_key_values.get_seq_length() == 13
    assert result.sequences.shape == (2, 14) and result.sequences.max() < VOCAB
    assert all(tensor.shape[0] == 2 for tensor in slot_tensors(result.past_key_values).values())


def test_cache_moves_between_inference_mode_and_generate(gqa):
    """Slots that are inference tensors: nothing outside could write to them, not even after a reset."""
    model, ids = with_flags(gqa, window_length=8, update_interval=2), prompt(12)
    expected = new_tokens(generate(model, [ids], 6), [ids])
    cache = HHCache(model.h2o)
    with torch.inference_mode():
        generate(model, [ids], 6, past_key_values=cache)
    cache.reset()
    assert new_tokens(generate(model, [ids], 6, past_key_values=cache), [ids]) == expected


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


# Checkpoints


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


def test_device_map(gqa, tmp_path):
    """Weights that accelerate places: hooks around layers that pass the cache on."""
    pytest.importorskip("accelerate")
    gqa.stock.save_pretrained(tmp_path)
    flags = H2OConfig(window_length=8, update_interval=2)
    placed = H2OLlamaForCausalLM.from_pretrained(tmp_path, h2o=flags, device_map={"": "cpu"})
    rows = [prompt(12), prompt(5)]
    expected = generate(with_flags(gqa, window_length=8, update_interval=2), rows, 6)
    assert new_tokens(generate(placed, rows, 6), rows) == new_tokens(expected, rows)


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


# What a user may do wrong, or only differently


def test_generate_refuses_to_go_without_its_cache(gqa):
    """use_cache=False or another cache_implementation that runs as stock Llama and reports H2O's results."""
    model = with_flags(gqa, window_length=8)
    for settings_ in ({"use_cache": False}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}):
        with pytest.raises(ValueError, match="HHCache"):
            generate(model, [prompt(5)], 2, **settings_)
    assert generate(model, [prompt(5)], 2, past_key_values=DynamicCache()).past_key_values.get_seq_length() == 6


@pytest.mark.parametrize(
    "kwargs",
    [{"output_attentions": True}, {"logits_to_keep": torch.tensor([[1], [2]])}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_a_forward_cannot_give_is_refused(gqa, kwargs):
    """None for attention maps, or logits of the wrong shape, without a word."""
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        with_flags(gqa, window_length=8)(torch.tensor([prompt(5), prompt(5)]), **kwargs)


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
