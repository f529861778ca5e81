"""utils/cache.py: what the slots hold after any sequence of forwards, and what the cache refuses."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import oracle
from conftest import (
    addresses,
    assert_close,
    assert_invariants,
    assert_row_is_oracles,
    assert_same_bits,
    by_head,
    forward,
    generate,
    new_cache,
    new_oracle,
    prompt,
    slot_tensors,
)
from h2optimizer import H2OConfig
from h2optimizer.utils.cache import CACHE_ARGUMENT
from h2optimizer.utils.policies import random_priority
from h2optimizer.utils.slimming import select_slots

PROPERTY = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)

# select_slots


@st.composite
def ranked_slots(draw):
    """Scores from a few values, so that ties are the rule, for rows of every length up to the number of slots."""
    slots = draw(st.integers(1, 12))
    window = draw(st.integers(1, 8))
    heavy = draw(st.sampled_from([0, window // 2, window - 1]))
    rows = draw(st.lists(st.integers(0, slots), min_size=1, max_size=3))
    score = st.sampled_from([0.0, 0.5, 1.0, 3e-7, 3e38])
    heads = draw(st.integers(1, 2))
    scores = draw(st.lists(score, min_size=len(rows) * heads * slots, max_size=len(rows) * heads * slots))
    return torch.tensor(scores).view(len(rows), heads, slots), rows, heavy, window - heavy


@PROPERTY
@given(ranked_slots())
def test_select_slots_picks_what_a_plain_loop_picks(case):
    """Ties won by the younger slot, picks left in score order, a recent slot lost, or a short row that moves."""
    score, lengths, heavy, recent = case
    age = torch.tensor(lengths)[:, None, None] - torch.arange(score.shape[2])
    keep = select_slots(score, age <= 0, (age > 0) & (age <= recent), heavy + recent)
    assert keep.shape == (*score.shape[:2], min(heavy + recent, score.shape[2]))
    assert (keep.diff(dim=-1) > 0).all()
    for (b, length), head in itertools.product(enumerate(lengths), range(score.shape[1])):
        kept, scores = keep[b, head].tolist(), score[b, head].tolist()
        if length <= heavy + recent:
            assert kept[:length] == list(range(length))
        else:
            older = sorted(range(length - recent), key=lambda j: (-scores[j], j))
            assert kept == sorted(older[:heavy]) + list(range(length - recent, length))


@given(st.integers(0, 2**31 - 1), st.integers(0, 200), st.integers(0, 127), st.integers(0, 2**63))
@PROPERTY
def test_random_priority_is_the_oracles_hash(position, layer, head, seed):
    """An overflow or a sign in the hash: int64 on one device and Python's integers would then differ."""
    positions = torch.full((1, head + 1, 1), position, dtype=torch.int32)
    seed %= 2**31
    assert random_priority(positions, layer, seed)[0, head, 0] == oracle.pseudo_random(position, layer, head, seed)


# The slots after any script of forwards, against lists


@st.composite
def scripts(draw):
    """Flags, and what happens to a cache of a few rows: forwards, slimmings for space, reorderings, resets."""
    window = draw(st.integers(2, 6))
    flags = {
        "window_length": window,
        "num_heavy_hitters": draw(st.sampled_from([window // 2, window - 1, 1, 0])),
        "update_interval": draw(st.integers(1, 4)),
        "score": draw(st.sampled_from(["mass"] * 6 + ["sink", "streaming_llm", "random"])),
        "score_seed": draw(st.integers(0, 3)),
        "score_every_step": draw(st.booleans()),
        "score_decay": draw(st.sampled_from([1.0, 0.5, 0.0])),
        "score_norm": draw(st.sampled_from(["sum", "mean"])),
        "score_queries": draw(st.sampled_from([None, 1, 3])),
    }
    rows = draw(st.integers(1, 3))
    block = st.lists(st.integers(0, 9), min_size=rows, max_size=rows).filter(any).map(lambda new: ("forward", new))
    decode = st.integers(2, 7).map(lambda times: ("decode", times))
    recent = window - flags["num_heavy_hitters"]
    space = st.integers(0, recent).map(lambda n: ("evict_for_space", n))
    reorder = st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows).map(lambda order: ("reorder", order))
    action = st.one_of(decode, decode, block, space, reorder, st.just(("reset", None)))
    return flags, rows, [draw(block), *draw(st.lists(action, min_size=5, max_size=8))], draw(st.integers(0, 99))


class PlainRow:
    """One row as lists of [owner, position, mass, count], for each layer and KV head."""

    def __init__(self):
        self.slots = [[[], []], [[], []]]
        self.seen = self.evictions = 0

    @property
    def length(self):
        return len(self.slots[0][0])

    def slim(self, h2o, recent):
        if self.length <= h2o.heavy + recent:
            return
        for layer, heads in enumerate(self.slots):
            for head, slots in enumerate(heads):
                slots.sort(key=lambda slot: slot[1])
                older = len(slots) - recent

                def score(j, slots=slots, layer=layer, head=head):
                    _, position, mass, count = slots[j]
                    if h2o.score == "mass" and h2o.score_norm == "mean":
                        return float(np.float32(mass) / np.float32(count)) if count else 0.0
                    return {
                        "mass": mass,
                        "sink": -j,
                        "streaming_llm": -j,
                        "random": oracle.pseudo_random(position, layer, head, h2o.score_seed),
                    }[h2o.score]

                best = sorted(range(older), key=lambda j: (-score(j), j))
                heads[head] = [slots[j] for j in sorted(best[: h2o.heavy])] + slots[older:]
        self.evictions += 1


def drive(cache, rows, new, clock, random):
    """One forward of tokens that say whose they are, on the cache and on the plain rows."""
    h2o, columns, starts = cache.h2o, max(new), [row.length for row in rows]
    due = clock == 0 or columns != 1 or clock % h2o.update_interval == 0
    scored = h2o.score == "mass" and h2o.heavy > 0 and (h2o.score_every_step or due)
    step = cache.begin(len(rows), columns, new)
    assert (step.due, step.scored) == (due, scored)
    for layer in range(2):
        fresh = torch.zeros(len(rows), 2, columns, 3)
        for b, row in enumerate(rows):
            for head, i in itertools.product(range(2), range(new[b])):
                fresh[b, head, i] = torch.tensor([b, row.seen + i, layer * 2 + head])
        if len(cache.layers) > layer:
            held = cache.layers[layer].slots.positions.tolist()
            for b, row in enumerate(rows):  # slots may lie in any order
                for head, slots in enumerate(row.slots[layer]):
                    slots.sort(key=lambda slot, there=held[b][head]: there.index(slot[1]))
        keys, values = cache.update(fresh + 1, -fresh - 1, layer)
        mass = torch.zeros(keys.shape[:3])
        for b, row in enumerate(rows):
            first = max(0, new[b] - h2o.score_queries) if clock == 0 and h2o.score_queries else 0
            for head, slots in enumerate(row.slots[layer]):
                slots += [[b, row.seen + i, 0.0, 0.0] for i in range(new[b])]
                for j, slot in sorted(enumerate(slots), key=lambda numbered: numbered[1][1]):
                    assert keys[b, head, j].tolist() == [slot[0] + 1, slot[1] + 1, layer * 2 + head + 1]
                    assert values[b, head, j].tolist() == [-slot[0] - 1, -slot[1] - 1, -layer * 2 - head - 1]
                    if scored and new[b]:
                        seen_by = sum(starts[b] + i >= j for i in range(first, new[b]))
                        mass[b, head, j] = random.integers(0, 3) if seen_by else 0
                        slot[2] = slot[2] * h2o.score_decay + mass[b, head, j].item()
                        slot[3] = slot[3] * h2o.score_decay + seen_by
        if scored:
            cache.add_mass(mass, layer)
        if due:
            cache.slim(layer)
    cache.end()
    for row, n in zip(rows, new, strict=True):
        row.seen += n
        if due:
            row.slim(h2o, h2o.recent)


def assert_holds(cache, rows):
    assert cache.lengths == [row.length for row in rows]
    assert cache.seen == [row.seen for row in rows]
    assert cache.evictions == [row.evictions for row in rows]
    for (layer_idx, layer), b in itertools.product(enumerate(cache.layers), range(len(rows))):
        for head, slots in enumerate(rows[b].slots[layer_idx]):
            slots, tag, length = sorted(slots, key=lambda slot: slot[1]), layer_idx * 2 + head, len(slots)
            held = {name: by_head(cache, layer_idx, name)[b, head] for name in layer.slots.stored()}
            assert layer.slots.positions[b, head, :length].sort().values.tolist() == [slot[1] for slot in slots]
            shown = cache.positions(layer_idx)[b, head].tolist()
            assert shown == [slot[1] for slot in slots] + [-1] * (max(cache.lengths) - length)
            owners = [[slot[0], slot[1], tag] for slot in slots]
            assert (held["keys"][:length] - 1).tolist() == owners
            assert (-held["values"][:length] - 1).tolist() == owners
            mass = by_head(cache, layer_idx, "mass")[b, head, :length]
            assert mass.tolist() == [slot[2] for slot in slots]
            if layer.slots.count is not None and cache.h2o.needs_mass:
                assert held["count"][:length].tolist() == [slot[3] for slot in slots]
                assert not layer.slots.count[b, head, length:].any()


def carry_out(cache, actions, batch_size, seed):
    """Carry the script out on the cache and on lists; they agree after every action, and no slot tensor moves."""
    rows, clock, random, at = [PlainRow() for _ in range(batch_size)], 0, np.random.default_rng(seed), None
    for action, argument in actions:
        if action in ("forward", "decode"):
            for _ in range(argument if action == "decode" else 1):
                drive(cache, rows, [1] * batch_size if action == "decode" else argument, clock, random)
                clock += 1
                at = at or addresses(cache)
        elif action == "evict_for_space":
            cache.evict_for_space(argument)
            for row in rows:
                row.slim(cache.h2o, cache.h2o.recent - argument)
        elif action == "reorder":
            cache.reorder_cache(torch.tensor(argument))
            rows = [copy.deepcopy(rows[b]) for b in argument]
        else:
            cache.reset()
            rows, clock = [PlainRow() for _ in range(batch_size)], 0
        assert cache.clock == clock
        assert_holds(cache, rows)
        assert_invariants(cache, recent=0)
        assert addresses(cache) == at


@PROPERTY
@given(scripts())
def test_any_script_leaves_what_plain_lists_hold(script):
    """A key, value, mass or position that belongs to another token, a wrong due step, or counts of another row."""
    flags, batch_size, actions, seed = script
    caches = [new_cache(**flags, slimming=slimming) for slimming in ("H", "mask")]
    for cache in caches:
        carry_out(cache, actions, batch_size, seed)
    assert_same_bits(*caches)  # update_slimming's and update_slimmingH's


@pytest.mark.parametrize("head_dim", [1, 3, 6, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_slimming_moves_whole_heads_of_any_width(dtype, head_dim):
    """The gather that moves 8 bytes at a time, on heads that are no multiple of 8 bytes or tensors that are views."""
    generator = torch.Generator().manual_seed(0)
    for slimming in ("H", "mask"):
        cache = new_cache(window_length=4, update_interval=2, slimming=slimming)
        whole = torch.randn(2, 9, 3, head_dim, generator=generator).to(dtype)
        cache.begin(2, 9)
        cache.update(whole.transpose(1, 2), whole.transpose(1, 2) + 1, 0)
        cache.add_mass(torch.rand(2, 3, 9, generator=generator), 0)
        cache.slim(0)
        cache.end()
        layer = cache.layers[0]
        assert layer.keys.dtype == layer.values.dtype == dtype
        for b, head in itertools.product(range(2), range(3)):
            kept = layer.slots.positions[b, head, :4].long()
            assert torch.equal(layer.keys[b, head, :4], whole[b, kept, head])
            assert torch.equal(layer.values[b, head, :4], whole[b, kept, head] + 1)


# Under the model

FLAGS = {
    "H2O": {"update_interval": 1},
    "rotation": {"update_interval": 4},
    "mean": {"update_interval": 3, "score_norm": "mean"},
    "local": {"update_interval": 3, "num_heavy_hitters": 0},
    "one recent slot": {"update_interval": 3, "num_heavy_hitters": 7},
    "skipped scores": {"update_interval": 3, "score_every_step": False, "score_decay": 0.5},
    "sink": {"update_interval": 3, "score": "sink"},
    "random": {"update_interval": 3, "score": "random"},
    "rolling": {"update_interval": 3, "position_rolling": True},
    "first": {"update_interval": 3, "group_reduce": "first"},
}


@pytest.mark.parametrize(
    "variant, slimming",
    [*((name, "H") for name in FLAGS), *((name, "mask") for name in ("rotation", "mean", "rolling"))],
)
def test_invariants_hold_after_every_forward(gqa, variant, slimming):
    """Rows past their bounds, positions out of order, mass past the end, or slots that are reallocated on the way."""
    flags = FLAGS[variant]
    cache = new_cache(window_length=8, slimming=slimming, **flags)
    turns = [[prompt(14), prompt(3), prompt(8)], [prompt(2, 1), prompt(7, 1), prompt(4, 1)]]
    at, forwards = None, 0
    for rows in turns * 2:
        seen = cache.seen or [0, 0, 0]
        block = rows
        for step in range(6):
            logits = forward(gqa.h2o, block, cache)
            assert_invariants(cache)
            at = at or addresses(cache)
            assert addresses(cache) == at
            due = step == 0 or forwards % cache.h2o.update_interval == 0
            assert max(cache.lengths) <= (8 if due else 8 + flags["update_interval"] - 1)
            seen = [count + len(tokens) for count, tokens in zip(seen, block, strict=True)]
            assert cache.seen == seen
            block = [[int(row[-1].argmax())] for row in logits]
            forwards += 1
    assert min(cache.evictions) >= 3
    columns = sum(max(map(len, rows)) + 5 for rows in turns * 2)
    assert cache.get_seq_length() == columns and cache.get_mask_sizes(1, 0) == (columns + 1, 0)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_reset_and_reuse_is_a_fresh_cache_in_the_same_place(gqa, flags):
    """A reset that leaves mass, counts, positions, clock or evictions behind, or that allocates anew."""
    used, fresh = new_cache(window_length=8, **flags), new_cache(window_length=8, **flags)
    generate(_with(gqa, used), [prompt(13), prompt(6)], 9, past_key_values=used)
    at = addresses(used)
    used.reset()
    assert addresses(used) == at
    assert used.lengths == used.seen == used.evictions == [0, 0] and used.clock == used.get_seq_length() == 0
    results = [
        generate(_with(gqa, cache), [prompt(3, 1), prompt(15, 1)], 10, past_key_values=cache)  # 3: what was there shows
        for cache in (used, fresh)
    ]
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert torch.equal(torch.stack(results[0].logits), torch.stack(results[1].logits))
    assert addresses(used) == at
    assert (used.lengths, used.seen, used.evictions, used.clock) == (
        fresh.lengths,
        fresh.seen,
        fresh.evictions,
        fresh.clock,
    )
    for where, tensor in slot_tensors(fresh).items():
        assert torch.equal(slot_tensors(used)[where], tensor), f"{where} after reset"


def _with(llamas, cache):
    """The model with the cache's settings, so that a mix-up of the two cannot show."""
    llamas.h2o.h2o = cache.h2o
    return llamas.h2o


def test_a_reset_forgets_gaps_and_padding():
    """Positions that a hole left out, or columns without a token, of the text before."""
    cache = new_cache(window_length=8)
    cache.begin(1, 4, [2], real=torch.tensor([[1, 0, 0, 1]]).bool())
    cache.end(gaps=[2])
    cache.reset()
    assert cache.begin(1, 3).positions(torch.device("cpu")).tolist() == [[0, 1, 2]]
    cache.end()
    cache.check_past(torch.ones(1, 3, dtype=torch.bool))


def test_a_reset_cache_takes_another_batch_size(gqa):
    """Slots of the old batch size after a reset; and a batch that changes under way must not pass unnoticed."""
    cache = new_cache(window_length=8, update_interval=3)
    forward(gqa.h2o, [prompt(9)] * 3, cache)
    with pytest.raises(ValueError, match=r"3 rows.* 2.*reset"):
        forward(gqa.h2o, [[1], [2]], cache)
    forward(gqa.h2o, [[1], [2], [3]], cache)  # the refusal did no harm
    cache.reset()
    alone = new_cache(window_length=8, update_interval=3)
    for block in ([prompt(12), prompt(5)], [[4], [5]]):
        for logits, expected in zip(forward(gqa.h2o, block, cache), forward(gqa.h2o, block, alone), strict=True):
            assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [*FLAGS.values(), FLAGS["sink"] | {"score_norm": "mean"}], ids=str)
def test_nbytes_is_what_is_allocated(flags, dtype):
    """Bytes that are computed from something else than the slots, or slots that are allocated and not counted."""
    cache = new_cache(window_length=8, **flags)
    assert cache.nbytes == 0
    states = torch.randn(3, 2, 5, 16, dtype=dtype)
    cache.begin(3, 5)
    for layer in range(2):
        cache.update(states, states, layer)
    if cache.h2o.needs_mass:  # keys and values, position, mass, and the count that the mean divides by
        per_slot = 2 * 16 * dtype.itemsize + 4 + 4 + (4 if cache.h2o.score_norm == "mean" else 0)
        assert cache.nbytes == 2 * 3 * 2 * (8 + flags["update_interval"]) * per_slot
    assert cache.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in slot_tensors(cache).values())


@pytest.mark.parametrize("lengths, variant", [
    *(((5, 12, 9), name) for name in FLAGS), *(((11, 11, 11), name) for name in ("H2O", "mean", "rolling")),
], ids=str)  # fmt: skip
def test_reordered_rows_continue_as_the_rows_they_were(gqa, variant, lengths):
    """A reorder that leaves keys, mass, counts, positions or lengths where they were: beams would mix their pasts."""
    flags = FLAGS[variant]
    rows, order = [prompt(length, b) for b, length in enumerate(lengths)], [2, 0, 0]
    cache, expected = new_cache(window_length=8, **flags), new_cache(window_length=8, **flags)
    blocks = [[[7], [8], [9]], [[4], [5], [6]]]
    for block in (rows, *blocks):
        forward(gqa.h2o, block, cache)
        forward(gqa.h2o, [block[b] for b in order], expected)
    cache.reorder_cache(torch.tensor(order))
    for block in [[[t], [t + 1], [t + 2]] for t in range(10, 15)] + [[prompt(3), prompt(6), prompt(4)]]:
        for logits, alone in zip(forward(gqa.h2o, block, cache), forward(gqa.h2o, block, expected), strict=True):
            assert_close(logits, alone)
        assert (cache.lengths, cache.seen, cache.evictions) == (expected.lengths, expected.seen, expected.evictions)
        for layer_idx, layer in enumerate(cache.layers):
            assert torch.equal(cache.positions(layer_idx), expected.positions(layer_idx))
            assert_close(layer.slots.mass, expected.layers[layer_idx].slots.mass)
            if layer.slots.count is not None:
                assert torch.equal(layer.slots.count, expected.layers[layer_idx].slots.count)


NO_ORDERS = {
    "list": [1, 0],
    "numpy": np.array([1, 0]),
    "float32": torch.tensor([1.0, 0.0]),
    "bool": torch.ones(2).bool(),
}


@pytest.mark.parametrize("order", NO_ORDERS.values(), ids=NO_ORDERS)
def test_an_order_of_rows_that_is_no_long_tensor_is_refused(gqa, order):
    """An AttributeError from within, or a mask of rows taken for their numbers. The cache holds what it held."""
    rows = [prompt(11), prompt(4)]
    cache, untouched = new_cache(window_length=8), new_cache(window_length=8)
    for each in (cache, untouched):
        forward(gqa.h2o, rows, each)
    with pytest.raises(TypeError, match="must be a LongTensor of row numbers, not "):
        cache.reorder_cache(order)
    assert cache.lengths == untouched.lengths
    for where, tensor in slot_tensors(untouched).items():
        assert torch.equal(slot_tensors(cache)[where], tensor), where


@pytest.mark.parametrize("copied", ["reorder_cache", "take_rows"])
def test_copied_rows_keep_positions_and_padding_of_their_own(copied):
    """Gaps in a row's positions that its copy forgets, or padding that two copies of one row share afterwards."""
    cache = new_cache(window_length=8, update_interval=1)
    cache.begin(2, 4, [2, 4], real=torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]]).bool())
    cache.end(gaps=[2, 0])
    past = torch.tensor([[1, 0, 0, 1]] * 2).bool()
    if copied == "reorder_cache":
        cache.reorder_cache(torch.tensor([0, 0]))
    else:
        source, cache = cache, cache.with_rows(2)
        cache.take_rows([0, 1], source, [0, 0])
    step = cache.begin(2, 1, [0, 1])
    assert step.positions(torch.device("cpu"))[-1].tolist() == [4]
    cache.end()
    with pytest.raises(ValueError, match=r"hides a token .*row 1"):
        cache.check_past(torch.cat([past, torch.tensor([[False], [False]])], dim=1))


@pytest.mark.parametrize("rolling", [False, True])
def test_heavy_hitters_keep_the_keys_they_came_with(gqa, rolling):
    """A cached key that is rotated again in place: the rounding would add up in heavy hitters."""
    cache = new_cache(window_length=8, num_heavy_hitters=6, update_interval=3, position_rolling=rolling)
    forward(gqa.h2o, [prompt(12)], cache)
    first = [(layer.slots.positions[0, :, :8].tolist(), layer.keys[0, :, :8].clone()) for layer in cache.layers]
    for token in range(1, 40):
        forward(gqa.h2o, [[token]], cache)
    kept = 0
    for layer, (positions, keys) in zip(cache.layers, first, strict=True):
        for head, slot in itertools.product(range(2), range(cache.lengths[0])):
            position = layer.slots.positions[0, head, slot].item()
            if position in positions[head]:
                assert torch.equal(layer.keys[0, head, slot], keys[head, positions[head].index(position)])
                kept += 1
    assert kept > 8


# evict_for_space


@pytest.mark.parametrize(
    "variant, rolling", [("H2O", False), ("rotation", True), ("rotation", False), ("mean", True), ("local", False)]
)
def test_evict_for_space_is_the_oracles(gqa, variant, rolling):
    """Space taken from heavy hitters, from a row that has it, or not counted as an eviction."""
    flags = {"window_length": 8, "position_rolling": rolling, **FLAGS[variant]}
    cache, rows = new_cache(**flags), [prompt(13), prompt(5)]
    oracles = [new_oracle(gqa, **flags) for _ in rows]
    recent = cache.h2o.recent
    turns = [(2, [prompt(2, 3), prompt(2, 4)]), (recent, [prompt(recent, 5)] * 2), (0, [prompt(6, 6), prompt(5, 6)])]
    blocks = [(None, rows), (None, [[3], [4]]), (None, [[5], [6]]), *turns, (None, [[7], [8]])]
    for space, block in blocks:
        if space is not None:
            cache.evict_for_space(space)
            for oracle_row in oracles:
                oracle_row.evict_for_space(space)
            assert max(cache.lengths) <= 8 - space
            assert_invariants(cache, recent=recent - space)
            for b, oracle_row in enumerate(oracles):
                assert_row_is_oracles(cache, b, oracle_row)
        for b, logits in enumerate(forward(gqa.h2o, block, cache)):
            assert_close(logits, oracles[b].forward(block[b]), what=f"logits of row {b}")
            assert_row_is_oracles(cache, b, oracles[b])


@pytest.mark.parametrize("heavy", [0, 3, 7])
def test_evict_for_space_refuses_what_does_not_fit(gqa, heavy):
    """More space than the recent part has would be taken from the heavy hitters without a word."""
    cache = new_cache(window_length=8, num_heavy_hitters=heavy, update_interval=2)
    cache.evict_for_space(8 - heavy)  # nothing there yet, nothing to do
    forward(gqa.h2o, [prompt(12)], cache)
    before = {where: tensor.clone() for where, tensor in slot_tensors(cache).items()}
    for refused, why in ((8 - heavy + 1, "does not fit"), (100, "does not fit"), (-1, "at least 0")):
        with pytest.raises(ValueError, match=why):
            cache.evict_for_space(refused)
    with pytest.raises(ValueError):
        oracle_row = new_oracle(gqa, window_length=8, num_heavy_hitters=heavy)
        oracle_row.evict_for_space(8 - heavy + 1)
    assert cache.lengths == [8]
    assert all(torch.equal(tensor, before[where]) for where, tensor in slot_tensors(cache).items())


# What is refused, and what is left alone


def test_plain_llama_refuses_the_cache(gqa):
    """A plain Llama, or the decoder without its head, would never slim the cache and never say so."""
    for model in (gqa.stock, gqa.stock.model, gqa.h2o.model):
        with pytest.raises(RuntimeError, match="H2OLlamaForCausalLM"):
            model(torch.tensor([prompt(5)]), **{CACHE_ARGUMENT: new_cache(window_length=8)})
    with pytest.raises(RuntimeError, match="H2OLlamaForCausalLM"):
        generate(gqa.stock, [prompt(5)], 3, **{CACHE_ARGUMENT: new_cache(window_length=8)})


def test_another_cache_is_stock_gqa(gqa):
    """A DynamicCache, or no cache, that gets slimmed or another attention under H2OLlamaForCausalLM."""
    gqa.h2o.h2o = H2OConfig(window_length=4, update_interval=1)
    rows = [prompt(9), prompt(14)]
    expected = generate(gqa.stock, rows, 8)
    cache = DynamicCache()
    result = generate(gqa.h2o, rows, 8, past_key_values=cache)
    assert result.past_key_values is cache and cache.get_seq_length() == 14 + 7
    assert torch.equal(result.sequences, expected.sequences)
    assert torch.equal(torch.stack(result.logits), torch.stack(expected.logits))
    with torch.no_grad():
        ids = torch.tensor([prompt(9)])
        outputs = gqa.h2o(ids, use_cache=False)
        assert torch.equal(outputs.logits, gqa.stock(ids, use_cache=False).logits)
        assert outputs.past_key_values is None


def test_a_forward_that_failed_closes_the_cache(gqa, monkeypatch):
    """An interrupted forward leaves layers that disagree; the next one must not go on from there."""
    model, flags = gqa.h2o, {"window_length": 8, "update_interval": 2}
    for fail_at in ("prefill", "decode"):
        cache = new_cache(**flags)
        blocks = [[prompt(12)], [[3]], [[4]]]
        for block in blocks if fail_at == "decode" else []:
            forward(model, block, cache)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].mlp, "forward", lambda hidden: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                forward(model, [[5]] if fail_at == "decode" else blocks[0], cache)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"did not finish.*reset"):
                forward(model, [[6]], cache)
        cache.reset()
        fresh = new_cache(**flags)
        for block in [[prompt(10, 1)], [[7]], [[8]], [[9]]]:
            assert torch.equal(forward(model, block, cache)[0], forward(model, block, fresh)[0])
        for where, tensor in slot_tensors(fresh).items():
            assert torch.equal(slot_tensors(cache)[where], tensor), where


def test_tokens_cannot_be_taken_back(gqa):
    """Cropping after evictions would leave a cache that never existed; assisted decoding depends on it."""
    cache = new_cache(window_length=8)
    forward(gqa.h2o, [prompt(12)], cache)
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        cache.crop(-1)
    gqa.h2o.h2o = cache.h2o
    for assistant in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": gqa.stock}):
        with pytest.raises(NotImplementedError, match="assisted decoding"):
            gqa.h2o.generate(torch.tensor([prompt(12)]), max_new_tokens=4, **assistant)


def test_a_copied_cache_goes_its_own_way(gqa):
    """A prefix kept by copy.deepcopy: state shared between the copies would let one conversation move the other."""
    kept, alone = new_cache(window_length=8, update_interval=2), new_cache(window_length=8, update_interval=2)
    for cache in (kept, alone):
        forward(gqa.h2o, [prompt(12), prompt(7)], cache)
    other = copy.deepcopy(kept)
    forward(gqa.h2o, [prompt(5, 1), prompt(3, 1)], other)
    for token in range(1, 6):
        for logits, expected in zip(
            forward(gqa.h2o, [[token]] * 2, kept), forward(gqa.h2o, [[token]] * 2, alone), strict=True
        ):
            assert torch.equal(logits, expected)
    assert kept.lengths == alone.lengths and kept.seen == alone.seen
