"""Plain Llama, whose tokens and logits a window that evicts nothing gives, with every kind of RoPE and config."""

import itertools
import json

import pytest
import torch
from transformers import LlamaForCausalLM

from conftest import (
    BACKENDS,
    Llamas,
    assert_close,
    conversation,
    forward,
    generate,
    left_pad,
    make_llamas,
    new_cache,
    new_oracle,
    prompt,
    with_flags,
)
from h2optimizer import H2OLlamaForCausalLM
from h2optimizer.utils.cache import HHCache

# A wide window


def assert_is_stock(llamas, rows, new, **flags):
    expected = generate(llamas.stock, rows, new)
    model = with_flags(llamas, **flags)
    cache = HHCache(model.h2o)
    result = generate(model, rows, new, past_key_values=cache)
    assert torch.equal(result.sequences, expected.sequences)
    assert_close(torch.stack(result.logits), torch.stack(expected.logits), 1e-5)
    assert cache.evictions == [0] * len(rows) and cache.lengths == cache.seen


@pytest.mark.parametrize("llamas, lengths, rolling, backend", [
    *(("gqa", (12, 3, 7), *how) for how in itertools.product((False, True), BACKENDS)),
    ("gqa", (12,), False, "sdpa"), ("gqa", (12,), True, "eager"), ("mha", (12, 3, 7), False, "sdpa"),
    ("mqa", (12, 3, 7), True, "eager"),
], ids=str, indirect=["llamas"])  # fmt: skip
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


# Other Llamas

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
    for rolling, backend in zip((False, True), BACKENDS, strict=True):
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


# Outputs


def test_a_prompts_logits_are_stocks_whatever_the_window(gqa):
    """A prefill that slims before it attends; and hidden states, labels and logits_to_keep of a padded batch, whose
    tokens lie in several chunks."""
    rows = [prompt(20), prompt(7)]
    inputs = left_pad(rows)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"].cumsum(1) < 2, -100)  # nothing predicts the first
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = gqa.stock(**inputs, position_ids=positions, labels=labels, output_hidden_states=True)
        for chunk, given_positions in itertools.product((None, 6), ({}, {"position_ids": positions})):
            window = 4 if chunk is None else 20
            outputs = gqa.h2o(
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
            logits = gqa.h2o(**inputs, logits_to_keep=keep, past_key_values=cache).logits
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
