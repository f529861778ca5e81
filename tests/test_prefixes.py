"""Shared prefixes: rows that continue from a snapshot hold and say what they would after whole prompts."""

import dataclasses
import gc
import random
import weakref
from importlib.util import find_spec

import pytest
import torch

from conftest import (
    BACKENDS,
    assert_close,
    assert_row_is_oracles,
    assert_same_cache,
    forward,
    left_pad,
    make_llamas,
    new_oracle,
    of_llamas,
    prompt,
    uneven,
    with_flags,
)
from h2optimizer import H2OConfig, attention
from h2optimizer.generation import prefix_first
from h2optimizer.prefixes import Prefix, can_share, least_own_tokens, prefix_first
from h2optimizer.utils import slimming
from h2optimizer.utils.cache import HHCache

FLAGS = {
    "rotation": {},
    "H2O": {"update_interval": 1},
    "mask": {"slimming": "mask"},
    "mean": {"score_norm": "mean"},
    "local": {"num_heavy_hitters": 0},
    "sink": {"score": "sink"},
    "4 sinks": {"score": "streaming_llm"},
    "random": {"score": "random", "score_seed": 3},
    "value mass": {"score": "value_mass", "num_heavy_hitters": "5/8"},
    "decay": {"score_decay": 0.5, "score_norm": "mean"},
    "value mean": {"score": "value_mass", "score_norm": "mean", "slimming": "mask"},
    "last queries": {"score_queries": 2, "score_norm": "mean"},
    "first head": {"group_reduce": "first"},
    "rolling": {"position_rolling": True, "score_norm": "mean"},
    "pure attention between": {"score_every_step": False},
    "uneven": {"head_budgets": uneven},
    "uneven value mean": {"head_budgets": uneven, "score": "value_mass", "score_norm": "mean"},
    "uneven rolling": {"head_budgets": uneven, "position_rolling": True, "update_interval": 1},
    "uneven sinks": {"head_budgets": uneven, "score": "sink"},
}
WINDOW, WIDE = 8, 64  # one that drops slots of the prompts, and one that holds them all
CASES = [
    *(("gqa", WINDOW, name) for name in FLAGS),
    *(("gqa", WIDE, name) for name in ("mask", "decay", "last queries", "rolling", "pure attention between", "uneven")),
    *((heads, WINDOW, name) for heads in ("mha", "mqa") for name in ("mean", "first head", "uneven value mean")),
]


def cut(tokens: list[int], pieces: random.Random) -> list[list[int]]:
    """One to three pieces of the tokens."""
    at = sorted(pieces.sample(range(1, len(tokens)), pieces.randint(0, min(2, len(tokens) - 1))))
    return [tokens[begin:end] for begin, end in zip([0, *at], [*at, len(tokens)], strict=True)]


def prefix_of(model, pieces: list[list[int]]) -> Prefix:
    """A prefix, each piece of which extends the one before."""
    prefix = None
    for piece in pieces:
        prefix = model.prefill_prefix(piece, prefix=prefix)
    return prefix


def tensors_of(prefix: Prefix) -> list[torch.Tensor]:
    return [of for layer in prefix.layers for of in layer if of is not None]


def assert_shared_is_whole(model, shared, rows, steps, pieces=None):
    """The same forwards, once after a prefix, which must stay as it is: the same logits, and the same caches."""
    prefix = prefix_of(model, pieces or [shared])
    assert prefix.tokens == tuple(shared)
    before = [of.clone() for of in tensors_of(prefix)]
    whole, after = HHCache(model.h2o), HHCache(model.h2o, prefix=prefix)
    assert after.get_seq_length() == len(shared)
    for step, block in enumerate(([[*shared, *row] for row in rows], *steps)):
        expected = forward(model, block, whole)
        logits = forward(model, block if step else rows, after)
        for b in range(len(rows)):
            assert_close(logits[b], expected[b][-len(logits[b]) :], 1e-5, f"forward {step}, row {b}")
        assert_same_cache(after, whole)
    assert all(map(torch.equal, tensors_of(prefix), before)), "the prefix has changed"
    return after


@pytest.mark.parametrize("llamas, window, variant", CASES, indirect=["llamas"])
def test_a_prefix_shows_in_nothing_that_follows(llamas, window, variant):
    """Mass of the prefix' own queries that is lost or counted twice, keys at other positions, slots taken from the
    wrong one of two sources, another clock, or a short row's padding: in prompts, decode steps and a second turn."""
    flags = of_llamas({"window_length": window, "update_interval": 3, **FLAGS[variant]}, llamas, window)
    model = with_flags(llamas, **flags)
    for seed in range(2):
        pieces = random.Random(f"{variant} {window} {seed}")
        shared = prompt(pieces.randint(1, 20), seed)
        lengths = [pieces.randint(least_own_tokens(model.h2o), 9) for _ in range(pieces.randint(1, 4))]
        rows = [prompt(length, 10 * seed + b) for b, length in enumerate(lengths)]
        steps = [[[pieces.randint(1, 99)] for _ in rows] for _ in range(5)]
        steps.insert(3, [prompt(pieces.randint(1, 4), 20 * seed + b) for b, _ in enumerate(rows)])
        model.h2o = dataclasses.replace(model.h2o, backend=BACKENDS[seed % 2])
        assert_shared_is_whole(model, shared, rows, steps, cut(shared, pieces))


@pytest.mark.parametrize("variant", ["mean", "last queries", "rolling", "uneven value mean"])
def test_rows_after_a_prefix_are_the_oracles(gqa, variant):
    """What both of the paths above would get wrong alike."""
    flags = of_llamas({"window_length": 8, "update_interval": 2, **FLAGS[variant]}, gqa)
    model, shared, rows = with_flags(gqa, **flags), prompt(11), [prompt(6, 1), prompt(3, 2)]
    cache = HHCache(model.h2o, prefix=prefix_of(model, [shared[:4], shared[4:]]))
    blocks = [rows, *([[token]] * 2 for token in prompt(4))]
    oracles = [new_oracle(gqa, **flags) for _ in rows]
    for step, block in enumerate(blocks):
        logits = forward(model, block, cache)
        for b, oracle in enumerate(oracles):
            expected = oracle.forward(block[b] if step else [*shared, *rows[b]])
            assert_close(logits[b], expected[-len(block[b]) :])
            assert_row_is_oracles(cache, b, oracle)


@pytest.mark.skipif(torch.cuda.is_available() or not find_spec("triton"), reason="on a GPU: test_gpu_prefixes.py")
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero|All-NaN slice):RuntimeWarning")
@pytest.mark.parametrize("variant", ["value mean", "rolling", "uneven sinks"])
def test_kernels_continue_from_a_prefix_without_copying_it(variant, monkeypatch):
    """What the kernels would be given in a real forward: another layout, or the prefix copied for each row."""
    llamas = make_llamas(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    flags = of_llamas({"window_length": 8, "update_interval": 3, **FLAGS[variant]}, llamas)
    model, shared, rows = with_flags(llamas, backend="triton", **flags), prompt(17), [prompt(9), prompt(3)]
    after = HHCache(model.h2o, prefix=prefix_of(model, [shared[:10], shared[10:]]))
    with monkeypatch.context() as patch:
        if model.h2o.slimming == "H":
            for module in (attention, slimming):
                patch.delattr(module, "followed_by")
        logits = forward(model, rows, after)
    model.h2o = dataclasses.replace(model.h2o, backend="eager")
    expected = forward(model, [shared + row for row in rows], whole := HHCache(model.h2o))
    for b, row in enumerate(rows):
        assert_close(logits[b], expected[b][-len(row) :], what=f"row {b}")
    assert_same_cache(after, whole)


# generate


def layouts(shared):
    """Whole prompts of three lengths, with zeros of a mask on the left, on the right, and in the prefix too."""
    rows = [shared + prompt(7, 1), shared + prompt(2, 2), shared + prompt(4, 3)]
    left = left_pad(rows)
    yield "no padding", {"input_ids": torch.tensor([shared + prompt(5, 1), shared + prompt(5, 2)])}
    yield "left", left
    yield (
        "right",
        {
            "input_ids": torch.tensor([row + [0] * (len(rows[0]) - len(row)) for row in rows]),
            "attention_mask": left["attention_mask"].flip(1),
        },
    )
    ids, mask = left["input_ids"].clone(), left["attention_mask"].clone()
    ids[0, 1:] = left["input_ids"][0, :-1].clone()
    mask[0, 2], ids[0, :2], ids[0, -1] = 0, torch.tensor(shared[:2]), 9
    mask[2, -2] = 0
    yield "holes", {"input_ids": ids, "attention_mask": mask}


WAYS = {
    "greedy": {},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "with a processor": {"no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize(
    "way, rolling",
    [("greedy", False), ("greedy", True), ("samples", True), ("beams", False), ("with a processor", False)],
)
def test_generate_says_the_same_with_a_prefix(gqa, way, rolling):
    """Padding that separates the prefix from what follows it, or returned sequences in which it moved."""
    model = with_flags(gqa, window_length=9, update_interval=3, position_rolling=rolling)
    shared = prompt(6)
    prefix = model.prefill_prefix(torch.tensor([shared]))
    for name, inputs in layouts(shared):
        outputs = []
        for options in ({}, {"prefix": prefix}):
            torch.manual_seed(5)
            outputs.append(model.generate(**inputs, max_new_tokens=9, **{"do_sample": False, **WAYS[way], **options}))
        assert outputs[0].tolist() == outputs[1].tolist(), name


def test_a_second_turn_of_generate(gqa):
    """A mask of the whole conversation that disagrees with where the cache has seen the padding."""
    model, shared = with_flags(gqa, window_length=9, update_interval=3), prompt(6)
    prefix = model.prefill_prefix(shared)
    options = dict(max_new_tokens=5, do_sample=False)
    for name, inputs in layouts(shared):
        texts = []
        for cache in (HHCache(model.h2o), HHCache(model.h2o, prefix=prefix)):
            ids, mask = inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            first = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
            ids = torch.cat([first, ids[:, :3].clamp(min=1)], dim=1)
            mask = torch.cat([mask, torch.ones(len(ids), 8, dtype=torch.long)], dim=1)
            texts.append(model.generate(ids, attention_mask=mask, past_key_values=cache, **options).tolist())
        assert texts[0] == texts[1], name


def test_prompts_that_do_not_continue_the_prefix(gqa):
    """Another text than the one asked for, in silence."""
    model, shared = with_flags(gqa, window_length=9), prompt(6)
    prefix = model.prefill_prefix(shared)

    def refused(match, rows=None, **options):
        rows = rows or [shared + prompt(3), shared + prompt(2)]
        with pytest.raises(ValueError, match=match):
            model.generate(**{**left_pad(rows), "max_new_tokens": 3, "prefix": prefix, **options})

    refused(r"row 1 differs from it at token 4.*whole prompts", [shared + [5], shared[:4] + prompt(9, 2)])
    refused(r"row 1 only 6: give whole prompts of at least one token more", [shared + [5], shared])
    refused(r"row 0 only 3", [shared[:3], shared + [5]])
    refused(r"HHCache\(h2o, prefix=prefix\)", past_key_values=HHCache(model.h2o))
    refused("leave prefill_chunk_size out", prefill_chunk_size=2)
    refused("inputs_embeds", input_ids=None, inputs_embeds=torch.ones(2, 9, 64))
    model.generate(**left_pad([shared + [5]]), max_new_tokens=1, prefix=prefix)


def test_prefix_first_keeps_all_other_columns_in_their_order():
    """A column that is lost or doubled."""
    ids = torch.tensor([[0, 7, 0, 8, 9, 4], [7, 8, 1, 2, 3, 0]])
    real = torch.tensor([[0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
    assert prefix_first(ids, real, (7, 8)).tolist() == [[1, 3, 0, 2, 4, 5], [0, 1, 2, 3, 4, 5]]


# What cannot be shared, and what is shared


@pytest.mark.parametrize("flags, shares", [
    ({}, True),
    ({"score_queries": 5}, True),
    ({"position_rolling": True}, True),
    ({"score_decay": 0.5}, True),
    ({"prefill_chunk": 64}, False),
], ids=str)  # fmt: skip
def test_what_can_be_shared(gqa, flags, shares):
    """A result that would not be exact, or a refusal without a way out."""
    model = with_flags(gqa, window_length=9, **flags)
    assert can_share(model) == can_share(model.h2o) == shares
    if shares:
        model.prefill_prefix([1, 2])
        return
    name = next(iter(flags))
    with pytest.raises(ValueError, match=f"prefill_prefix: {name}=.*set it to"):
        model.prefill_prefix([1, 2])
    prefix = with_flags(gqa, window_length=9).prefill_prefix([1, 2])
    model = with_flags(gqa, window_length=9, **flags)
    with pytest.raises(ValueError, match=f"prefix: {name}=.*set it to.*or leave the prefix out"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, prefix=prefix)


@pytest.mark.parametrize("rope_type", ["dynamic", "linear"])
def test_frequencies_that_depend_on_the_whole_length(rope_type):
    """A prefix rotated as if nothing followed it."""
    parameters = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10000.0}
    llamas = make_llamas(rope_parameters=parameters, max_position_embeddings=16)
    assert can_share(llamas.h2o) == can_share(llamas.stock) == (rope_type == "linear")
    if rope_type == "dynamic":
        with pytest.raises(ValueError, match="prefill_prefix: RoPE type dynamic"):
            llamas.h2o.prefill_prefix([1, 2])


@pytest.mark.parametrize("ids", [[], [[1, 2], [3, 4]], [[[1]]], [0.5]], ids=str)
def test_a_prefix_is_one_row_of_tokens(gqa, ids):
    with pytest.raises(ValueError, match=r"prefill_prefix: ids.*tokens of one row"):
        with_flags(gqa, window_length=9).prefill_prefix(ids)


def test_a_prefix_of_other_settings(gqa):
    """Mass that was summed in another way; while windows and intervals may be any."""
    made_with = {"window_length": 8, "update_interval": 3}
    prefix = with_flags(gqa, **made_with).prefill_prefix(prompt(6))
    for flags in FLAGS.values():
        flags = of_llamas({**made_with, **flags}, gqa)
        shaping = {"score", "score_norm", "score_queries", "group_reduce", "position_rolling"} & set(flags)
        if not shaping:
            HHCache(H2OConfig(**flags), prefix=prefix)
            continue
        with pytest.raises(ValueError, match=r"prefix: was computed with .*=.*prefill_prefix"):
            HHCache(H2OConfig(**flags), prefix=prefix)
    without = with_flags(gqa, num_heavy_hitters=0, **made_with).prefill_prefix(prompt(6))
    with pytest.raises(ValueError, match=r"without heavy hitters.*prefill_prefix"):
        HHCache(H2OConfig(**made_with), prefix=without)


def test_a_prefix_of_another_model_or_dtype(gqa):
    """Keys of other weights, or a failure deep in attention."""
    model, other = with_flags(gqa, window_length=9), make_llamas()
    prefix = model.prefill_prefix(prompt(6))
    cache = HHCache(model.h2o, prefix=prefix)
    with pytest.raises(ValueError, match="another model"):
        forward(other.h2o, [prompt(3)], cache)
    mine = other.h2o.prefill_prefix(prompt(6))
    other.h2o.double()
    with pytest.raises(ValueError, match=r"layer 0 has torch.float32, the model now has torch.float64.*prefill_prefix"):
        forward(other.h2o, [prompt(3)], HHCache(other.h2o.h2o, prefix=mine))
    forward(model, [prompt(3)], cache)  # the refusal did no harm


@pytest.mark.parametrize(
    "flags, least", [({}, 1), ({"score_queries": 4}, 4), ({"score_queries": 4, "score": "sink"}, 1)]
)
def test_rows_that_bring_too_few_tokens(gqa, flags, least):
    """Logits of no token, or mass of the prefix' last queries, which was never computed."""
    model = with_flags(gqa, window_length=9, **flags)
    assert least_own_tokens(model.h2o) == least
    cache = HHCache(model.h2o, prefix=model.prefill_prefix(prompt(6)))
    inputs = left_pad([prompt(5), prompt(max(1, least - 1))])
    if least == 1:
        inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match=f"{least - 1} tokens follow it in row 1, but at least {least} must.*shorter"):
        model(**inputs, past_key_values=cache)
    forward(model, [prompt(5), prompt(least)], cache)  # the refusal did no harm


def test_the_life_of_a_cache_with_a_prefix(gqa):
    """A reset that loses the prefix, or keeps what followed it; room made in slots that hold nothing yet."""
    model, shared = with_flags(gqa, window_length=9, update_interval=3), prompt(12)
    cache = HHCache(model.h2o, prefix=model.prefill_prefix(shared))
    for other in (prompt(5), prompt(3), prompt(1)):
        cache.evict_for_space(2)
        expected = forward(model, [shared + other] * 2, whole := HHCache(model.h2o))
        logits = forward(model, [other] * 2, cache)
        assert_close(logits[1], expected[1][12:])
        assert_same_cache(cache, whole)
        forward(model, [[3]] * 2, cache)
        cache.reset()
        assert (cache.get_seq_length(), cache.clock, cache.lengths) == (12, 0, [0, 0])
    cache.follow(None)
    assert cache.prefix is None and cache.get_seq_length() == 0
    expected = forward(model, [shared] * 2, HHCache(model.h2o))
    assert torch.equal(forward(model, [shared] * 2, cache)[0], expected[0])


@pytest.mark.parametrize("variant", ["value mean", "uneven rolling"])
def test_rows_that_join_a_running_batch(gqa, variant):
    """A row from a prefix that decodes otherwise among rows that have none."""
    model, shared = with_flags(gqa, **of_llamas({"window_length": 8, **FLAGS[variant]}, gqa)), prompt(9)
    prefix, rows = model.prefill_prefix(shared), [prompt(4, 1), prompt(6, 2)]
    batches = []
    for caches in ([HHCache(model.h2o, prefix=prefix)], [HHCache(model.h2o)]):
        block = rows if caches[0].prefix is not None else [shared + row for row in rows]
        forward(model, block, caches[0])
        forward(model, [prompt(11)], alone := HHCache(model.h2o))
        batch = caches[0].with_rows(3)
        batch.take_rows([0, 2], caches[0], [1, 0])
        batch.take_rows([1], alone, [0])
        for token in prompt(5):
            forward(model, [[token]] * 3, batch)
        batches.append(batch)
    assert batches[0].seen == batches[1].seen and batches[0].lengths == batches[1].lengths
    for layer_idx in range(2):
        assert batches[0].positions(layer_idx).tolist() == batches[1].positions(layer_idx).tolist()


def test_nbytes_is_that_of_all_tensors(gqa):
    model = with_flags(gqa, window_length=9, score="value_mass", score_norm="mean")
    prefix = model.prefill_prefix(prompt(6))
    assert len(prefix) == 6 and prefix.nbytes == 2 * 2 * 6 * (2 * 16 + 3) * 4
    assert sum(of.untyped_storage().nbytes() for of in tensors_of(prefix)) == prefix.nbytes, "views of larger tensors"


def test_nothing_but_its_holders_keeps_a_prefix(gqa):
    """Snapshots that fill the memory: held by a cache that generate keeps, or by the model."""
    model = with_flags(gqa, window_length=9)
    prefix = model.prefill_prefix(prompt(6))
    model.generate(torch.tensor([prompt(6) + [5]]), max_new_tokens=3, do_sample=False, prefix=prefix)
    there = weakref.ref(prefix)
    del prefix
    gc.collect()
    assert there() is None


def test_a_prefix_outlives_inference_mode(gqa):
    """Tensors that no later forward with gradients could use."""
    model = with_flags(gqa, window_length=9)
    with torch.inference_mode():
        prefix = model.prefill_prefix(prompt(6))
    model(torch.tensor([prompt(3)]), past_key_values=HHCache(model.h2o, prefix=prefix)).logits.sum().backward()
    model.zero_grad()
