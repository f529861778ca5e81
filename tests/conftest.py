"""Tiny random Llamas, and how tests feed them and look into their caches. Nothing is downloaded, nothing imports
hypothesis: the GPU tests run where it may be missing."""

import functools
import importlib.util
import logging
import os
from collections import namedtuple

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

if importlib.util.find_spec("torchao") is not None:  # what its import says would come after pytest's last line
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

if importlib.util.find_spec("triton") is None:  # it is made for Linux only
    collect_ignore = ["test_backends.py", "test_kernels.py", "test_slimming.py"]

from transformers import AutoConfig

from h2optimizer import H2OConfig, H2OLlamaForCausalLM, generation
from h2optimizer.families import FAMILIES
from h2optimizer.utils.cache import HHCache
from h2optimizer.utils.heads import HeadWindows
from h2optimizer.utils.slots import gather
from h2optimizer.utils.step import Rows, Step
from oracle import Oracle

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    import interpreter  # noqa: F401

pytest.register_assert_rewrite("gpu_models", "recorded_steps")  # their asserts say what was compared, too
torch.set_num_threads(1)

VOCAB = 128
GROUPS = {"mha": 4, "gqa": 2, "mqa": 1}  # KV heads, of 4 query heads
BACKENDS = ("eager", "sdpa")

Llamas = namedtuple("Llamas", "stock h2o")  # one set of weights, as LlamaForCausalLM and as H2OLlamaForCausalLM


def make_llamas(dtype=torch.float32, **config) -> Llamas:
    """Two layers with weights so large that float32 decides the tokens; no end-of-sequence token.

    `model_type` names another family. Its biases and norms are random too.
    """
    config = AutoConfig.for_model(
        **{
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            **config,
        }
    )
    torch.manual_seed(0)
    family = FAMILIES[config.model_type]
    stock = family.stock_class()._from_config(config, dtype=dtype).eval()  # RoPE's frequencies stay float32
    if config.model_type != "llama":
        with torch.no_grad():
            for name, weight in stock.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    weight += 0.3 * torch.randn_like(weight)
    h2o = family._from_config(config, dtype=dtype).eval()
    h2o.load_state_dict(stock.state_dict())
    return Llamas(stock, h2o)


@functools.cache
def llamas_of(group: str) -> Llamas:
    """Those of all tests: a fixture that is parametrized beside other arguments is made anew for each test."""
    return make_llamas(num_key_value_heads=GROUPS[group])


@pytest.fixture(scope="session", params=GROUPS)
def llamas(request):
    """MHA, GQA and MQA. Each test sets `h2o.h2o` to what it needs."""
    return llamas_of(request.param)


@pytest.fixture(scope="session")
def gqa():
    return make_llamas()


def by_groups(names, others=()):
    """Parametrize over `llamas` and a variant's name: all `names` with GQA, and `others` with MHA and MQA too."""
    pairs = [("gqa", name) for name in names] + [(group, name) for group in ("mha", "mqa") for name in others]
    return pytest.mark.parametrize("llamas, variant", pairs, indirect=["llamas"])


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens, none of them the padding token 0."""
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def left_pad(rows: list[list[int]], device="cpu") -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of rows of tokens, padded on the left with 0."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device),
    }


def new_cache(**flags) -> HHCache:
    return HHCache(H2OConfig(**flags))


def new_oracle(llamas: Llamas, *, slimming=None, backend=None, **flags) -> Oracle:
    """The oracle for these flags; the two that say how, not what, are not its business."""
    return Oracle(llamas.stock, **flags)


def with_flags(llamas: Llamas, **flags) -> H2OLlamaForCausalLM:
    """The H2O model, with these flags from here on."""
    llamas.h2o.h2o = H2OConfig(**flags)
    return llamas.h2o


def generate(model, rows: list[list[int]], new_tokens: int, **settings):
    """model.generate on left-padded rows; returns its outputs, logits included."""
    return model.generate(
        **left_pad(rows, model.device),
        max_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **settings},
    )


def new_tokens(result, rows: list[list[int]]) -> list[list[int]]:
    """Of each row, what `generate` said after the left-padded prompts."""
    return result.sequences[:, max(map(len, rows)) :].tolist()


def count_captured(monkeypatch) -> list:
    """A list that grows by one with each `generate` that decodes by captured steps."""
    taken, original = [], generation.sample
    monkeypatch.setattr(generation, "sample", lambda *args, **kwargs: taken.append(1) or original(*args, **kwargs))
    return taken


@torch.no_grad()
def forward(model, rows: list[list[int]], cache) -> list[torch.Tensor]:
    """One forward of these tokens, left-padded where rows differ in length; the logits of each row's own tokens."""
    inputs = left_pad(rows, model.device)
    if len(set(map(len, rows))) == 1:
        del inputs["attention_mask"]
    logits = model(**inputs, past_key_values=cache).logits
    return [logits[b, logits.shape[1] - len(row) :] for b, row in enumerate(rows)]


def set_checkpointing(model, on: bool) -> None:
    """Recompute layers in the backward pass, or no longer: transformers 5.24 has another name for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_{'enable' if on else 'disable'}")()


# One attention, without a model

HEADS, SCALING = 4, 0.3
GARBAGE = 1e4  # stands where a row has no slot


def make_step(start, new, decode=False, scored=True, score_queries=None) -> Step:
    """A Step of rows with `start[b]` slots and `new[b]` new tokens, the last `score_queries` of which are scored."""
    rows = Rows(len(start), HeadWindows.of(256, 128))
    rows.append(start)
    rows.append(new)
    first = [0 if score_queries is None else max(0, n - score_queries) for n in new]
    return Step(rows, start, new, max(new), decode, due=True, scored=scored, first_scored=first)


def make_states(step: Step, kv_heads: int, dtype=torch.float32, head_dim=16, device="cpu"):
    """Random query, key and value; garbage in the key and value columns that a row does not have."""
    generator, batch_size = torch.Generator().manual_seed(0), len(step.start)
    query = torch.randn(batch_size, HEADS, step.columns, head_dim, generator=generator)
    key, value = 1.5 * torch.randn(2, batch_size, kv_heads, step.width, head_dim, generator=generator)
    for b, (start, new) in enumerate(zip(step.start, step.new, strict=True)):
        key[b, :, start + new :] = value[b, :, start + new :] = GARBAGE
    return query.to(device, dtype), key.to(device, dtype), value.to(device, dtype)


def plain_attention(query, key, value, step, group_reduce):
    """Output and mass row by row, head by head, query by query, in float64. Outputs of padding columns are left 0."""
    query, key, value = (states.double().cpu() for states in (query, key, value))
    group = query.shape[1] // key.shape[1]
    output, mass = torch.zeros_like(query), torch.zeros(key.shape[:3], dtype=torch.float64)
    for b in range(len(step.start)):
        for head in range(query.shape[1]):
            for i in range(step.new[b]):
                visible = step.start[b] + i + 1
                probs = (key[b, head // group, :visible] @ query[b, head, i] * SCALING).softmax(0)
                output[b, head, i] = probs @ value[b, head // group, :visible]
                if i >= step.first_scored[b] and (head % group == 0 or group_reduce == "sum"):
                    mass[b, head // group, :visible] += probs
    return output, mass


def own_columns(output, step):
    """The output of the columns that hold a row's tokens, one row after the other."""
    return torch.cat([output[b, :, :new].flatten() for b, new in enumerate(step.new)])


# What a cache has to hold


def assert_close(actual, expected, tolerance=2e-5, what=""):
    """Within `tolerance` of the largest expected magnitude; NaN is never close."""
    actual, expected = torch.as_tensor(actual).double().cpu(), torch.as_tensor(expected).double().cpu()
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    error, scale = (actual - expected).abs().amax().item(), expected.abs().amax().item()
    assert error <= tolerance * scale, f"{what}: off by {error:.3g} where values reach {scale:.3g}"


def assert_row_is_oracles(cache: HHCache, row: int, oracle: Oracle, tolerance=5e-5):
    """A row holds the oracle's slots: how many, of which tokens, with which mass, after as many evictions."""
    counts = (cache.lengths[row], cache.seen[row], cache.evictions[row])
    assert counts == (oracle.length(), oracle.seen, oracle.evictions), f"row {row}: length, seen, evictions"
    for layer_idx in range(len(cache.layers)):
        expected = oracle.positions(layer_idx)
        positions = [[at for at in head if at >= 0] for head in cache.positions(layer_idx)[row].tolist()]
        assert positions == expected, f"row {row}, layer {layer_idx}"
        if cache.h2o.needs_mass:
            for held, mass in zip(by_head(cache, layer_idx, "mass")[row], oracle.mass(layer_idx), strict=True):
                assert_close(held[: len(mass)], mass, tolerance, f"mass, row {row}, layer {layer_idx}")


def by_head(cache: HHCache, layer_idx: int, name: str) -> torch.Tensor:
    """A tensor of a layer's slots in the order of their tokens, those to come included: [B, Hkv, slots(, D)], padded
    where heads have capacities of their own."""
    layer = cache.layers[layer_idx]
    slots = gather(layer.slots.load(name), layer.slots.load("positions").argsort(dim=-1, stable=True))
    return slots.view(-1, layer.slots.heads, *slots.shape[2:])


def assert_same_bits(cache: HHCache, expected: HHCache):
    """Both hold the same bits, in slots of any order. Keys, values and their scales may differ past a row's length."""
    for layer_idx, layer in enumerate(expected.layers):
        assert cache.layers[layer_idx].slots.stored().keys() == layer.slots.stored().keys()
        for name in layer.slots.stored():
            ours, theirs = (by_head(of, layer_idx, name) for of in (cache, expected))
            if name in layer.slots.states:
                filled = torch.arange(ours.shape[2], device=layer.device) < layer.lengths[..., None]
                ours, theirs = ours[filled], theirs[filled]
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), f"{name}, layer {layer_idx}"


def uneven(llamas: Llamas, window: int) -> tuple:
    """Windows of their own for all heads, with this mean: the first keeps half as many, and so on in pairs."""
    config = llamas.stock.config
    heads, half = config.num_hidden_layers * config.num_key_value_heads, window // 2
    pairs = [w for i in range(heads) for w in (half + i % half, 2 * window - half - i % half)]
    flat = pairs[: heads // 2 * 2] + [window] * (heads % 2)
    return tuple(zip(*[iter(flat)] * config.num_key_value_heads, strict=True))


def of_llamas(flags: dict, llamas: Llamas, window: int = 8) -> dict:
    """The flags with the windows of `uneven` for this model, where they ask for them."""
    return flags | ({"head_budgets": uneven(llamas, window)} if flags.get("head_budgets") is uneven else {})


def assert_invariants(cache: HHCache, recent: int | None = None):
    """What the docstring of HHCache promises of the slots between any two forwards, `recent` of them the newest."""
    h2o = cache.h2o
    windows = h2o.head_windows
    for layer_idx, layer in enumerate(cache.layers):
        kv_heads = layer.slots.heads
        table = [h2o.window_length] * kv_heads if windows.even else windows.of_heads(layer_idx, kv_heads)
        positions, masses = by_head(cache, layer_idx, "positions"), by_head(cache, layer_idx, "mass")
        stored = sum(table) + kv_heads * h2o.update_interval
        assert layer.keys[0].numel() == stored * layer.slots.head_dim and layer.slots.mass[0].numel() == stored
        assert masses.dtype == torch.float32 and positions.dtype == torch.int32
        for b, seen in enumerate(cache.seen):
            for head, (window, length) in enumerate(zip(table, layer.lengths[b].tolist(), strict=True)):
                assert 0 <= length <= min(window + h2o.update_interval, cache.lengths[b])
                held = positions[b, head, :length]
                assert (held.diff() > 0).all(), "a token is in two slots"
                if h2o.position_rolling:
                    first = layer.slots.load("positions").view(positions.shape)[b, head, :length]
                    assert torch.equal(first, held), "slots are not in the order of their tokens"
                of_head = h2o.recent if recent is None else recent
                newest = list(range(seen - min(of_head, length), seen))
                assert held[length - len(newest) :].tolist() == newest, "a recent token is gone"
                assert not masses[b, head, length : window + h2o.update_interval].any(), "mass past the row's length"


def assert_same_cache(cache, expected):
    """All that a cache holds or counts, to the rounding of the mass."""
    for name in ("lengths", "seen", "evictions", "clock"):
        assert getattr(cache, name) == getattr(expected, name), name
    assert cache.get_seq_length() == expected.get_seq_length()
    mirror, _ = cache._rows.mirror(torch.device("cpu")), expected._rows.mirror(torch.device("cpu"))
    assert mirror.tolist() == [expected.lengths, expected.seen], "what the device counted"
    for layer_idx, layer in enumerate(cache.layers):
        assert cache.positions(layer_idx).tolist() == expected.positions(layer_idx).tolist()
        lengths = layer.lengths.tolist()
        assert lengths == expected.layers[layer_idx].lengths.tolist()
        for name in ("keys", "values", *layer.slots.ranked):
            ours, theirs = (by_head(of, layer_idx, name) for of in (cache, expected))
            for b, row in enumerate(lengths):
                for h, length in enumerate(row):
                    what = f"{name} of row {b}, layer {layer_idx}, head {h}"
                    assert_close(ours[b, h, :length], theirs[b, h, :length], what=what)
    assert_invariants(cache)


def assert_follows_oracle(result, row, oracle, block):
    """The logits of each step are the oracle's on the tokens that were emitted; feeds all of them but the last."""
    logits = torch.stack(result.logits)[:, row]
    tokens = result.sequences[row, result.sequences.shape[1] - len(logits) :].tolist()
    for step, token in enumerate(tokens):
        expected = oracle.forward(block)[-1]
        assert_close(logits[step], expected, what=f"logits of row {row}, step {step}")
        block = [token]
    return tokens


def conversation(llamas, caches, flags, blocks, rounded=1.0):
    """The same forwards on every cache and on the oracle: logits, and what is kept, agree after each of them, within
    `rounded` times the usual tolerance."""
    oracle = new_oracle(llamas, **flags)
    for block in blocks:
        expected = oracle.forward(block)
        for cache in caches:
            (logits,) = forward(llamas.h2o, [block], cache)
            assert_close(logits, expected, 2e-5 * rounded, f"{cache.h2o.backend}, forward {oracle.clock}")
            assert_row_is_oracles(cache, 0, oracle, 5e-5 * rounded)
            assert_invariants(cache)
    return oracle


def slot_tensors(cache: HHCache) -> dict[tuple[int, str], torch.Tensor]:
    """Every tensor that the layers' slots are made of, by layer and name."""
    return {
        (layer_idx, name): value
        for layer_idx, layer in enumerate(cache.layers)
        for name, value in vars(layer.slots).items()
        if isinstance(value, torch.Tensor)
    }


def addresses(cache: HHCache) -> dict[tuple[int, str], int]:
    return {where: tensor.data_ptr() for where, tensor in slot_tensors(cache).items()}
