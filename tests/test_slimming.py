"""The slimming kernels: on a CPU in Triton's interpreter, on a GPU with -m gpu."""

import itertools
import math
import os

import numpy as np
import pytest
import torch

from conftest import addresses, assert_same_bits, new_cache, slot_tensors
from h2optimizer.backends import resolve_backend
from h2optimizer.slimming import slimmer_of
from h2optimizer.utils import policies
from h2optimizer.utils import slimming as torch_slimming
from h2optimizer.utils.policies import random_priority, random_salt
from h2optimizer.utils.prefix import LayerPrefix, Prefix
from h2optimizer.utils.slimming import select_slots
from h2optimizer.utils.slots import norms_of

slimming = pytest.importorskip("h2optimizer.kernels.slimming")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TINY = torch.finfo(torch.float32).tiny


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if (request.param == "cpu") != INTERPRETED:
        pytest.skip("Triton interprets kernels for all devices or for none")
    return request.param


def bits(tensor):
    return tensor.cpu().contiguous().view(torch.uint8)


def some(values, *shape, seed=0):
    """Random picks from a few values, so that ties are the rule."""
    values = torch.tensor(values)
    return values[torch.randint(len(values), shape, generator=torch.Generator().manual_seed(seed))]


def plain_keep(score, positions, length, seen, heavy, recent):
    """The slots that a row keeps, by a plain loop over its scores and positions."""
    if length <= heavy + recent:
        return list(range(length))
    older = [j for j in range(length) if positions[j] < seen - recent]
    order = sorted(older, key=lambda j: (0, 0, positions[j]) if math.isnan(score[j]) else (1, -score[j], positions[j]))
    return sorted({*range(length)} - {*older} | {*order[:heavy]})


def some_positions(lengths, seen, heads, recent, slots, held=None):
    """Positions, int32 [B, heads, slots]: what slimmings have left in the first slots, `held` or all, in any order,
    then new tokens and those to come."""
    random, positions = np.random.default_rng(0), torch.zeros(len(lengths), heads, slots, dtype=torch.int32)
    for b, head in itertools.product(range(len(lengths)), range(heads)):
        length = lengths[b] if held is None else min(held, lengths[b])
        end = seen[b] - lengths[b] + length
        newest = min(length, recent)
        older = random.choice(end - newest, length - newest, replace=False)
        positions[b, head, :length] = torch.from_numpy(random.permutation([*older, *range(end - newest, end)]))
        positions[b, head, length:] = torch.arange(end, end + slots - length)
    return positions


# select

CAPACITY = 28


def pick(device, rank, score_of, heads, heavy, recent, width, lengths, mass, count=None, move=True, order=None):
    """Run `select` on these rows and hold everything that it writes against plain loops.

    Returns: kept, score and positions [B, heads, width], lengths and tokens seen [B, 1, 1].
    """
    batch, window, seen = len(lengths), heavy + recent, [length + 7 * b for b, length in enumerate(lengths)]
    in_place = width == CAPACITY
    joined = some_positions(lengths, seen, heads, recent, max(width, CAPACITY), held=None if in_place else 9)
    positions, joined = joined[:, :, :CAPACITY].clone(), joined[:, :, :width]
    score = score_of(joined)

    slots = {"positions": positions.to(device), "mass": None, "count": None}
    sources = {"mass": mass, "count": count}
    for name, source in sources.items():
        if source is not None:
            for b, length in enumerate(lengths):
                source[b, :, length:] = torch.nan  # must not be read
            sources[name] = source.to(device)
            slots[name] = sources[name] if in_place else torch.full((batch, heads, CAPACITY), -1.0, device=device)
    before = {name: tensor.cpu().clone() for name, tensor in slots.items() if tensor is not None}
    given = {"positions": joined, "mass": mass.clone() if mass is not None else None, "count": count}
    given = {name: tensor.clone() for name, tensor in given.items() if tensor is not None}
    mirror = torch.tensor([lengths, seen], dtype=torch.int32, device=device)
    kept = torch.full((batch, heads, window + 3), -9, dtype=torch.int32, device=device)
    salt = random_salt(3, 11)
    slimming.select(
        *slots.values(), *sources.values(), width, mirror, kept, heavy, recent, rank, salt=salt, move=move, scores=order
    )  # fmt: skip
    for b, length in enumerate(lengths):
        for head in range(heads):
            keep = plain_keep(score[b, head].double().tolist(), joined[b, head], length, seen[b], heavy, recent)
            row = kept[b, head].tolist()
            assert row[: len(keep)] == keep, (length, head)
            assert row[len(keep) : window] == list(range(length, window)) and row[window:-1] == [-9, -9]
            assert row[-1] == sum(to == slot for to, slot in enumerate(keep))
            for name, tensor in slots.items():
                if tensor is None:
                    continue
                if move:
                    moved = [given[name][b, head, j].item() for j in keep]
                    tail = [seen[b] - len(keep) + j if name == "positions" else 0 for j in range(len(keep), CAPACITY)]
                    assert tensor[b, head].tolist() == pytest.approx(moved + tail, abs=0, nan_ok=True), (name, length)
                else:
                    assert torch.equal(bits(tensor[b, head]), bits(before[name][b, head])), name
    return kept[..., :window].cpu(), score, joined, *torch.tensor([lengths, seen])[..., None, None]


def picked_by_torch(score, positions, lengths, seen, heavy, recent):
    empty = torch.arange(score.shape[-1]) >= lengths
    return select_slots(score, empty, ~empty & (positions >= seen - recent), heavy + recent, positions=positions)


EDGES = [0, 5, 8, 9, 13, CAPACITY]  # around a window of 8, up to the capacity


@pytest.mark.parametrize("heads, heavy, width, lengths", [
    (1, 4, CAPACITY, EDGES),
    (2, 0, CAPACITY, [8, 9, CAPACITY]),
    (2, 7, CAPACITY, [3, 9, CAPACITY]),
    (8, 5, CAPACITY, [17]),
    (2, 4, 41, [41, 8, 30]),
    (1, 4, 12, [12, 3, 9]),
], ids=str)  # fmt: skip
def test_select_keeps_what_select_slots_keeps(device, heads, heavy, width, lengths):
    """A tie won by the younger slot, a recent slot lost, an edge of the window, or mass and positions left behind."""
    mass = some([0.0, 0.5, 1.0, 3e-7, 1e-45, 3e38], len(lengths), heads, width)
    clean = mass.clone()
    kept, *row = pick(device, "mass", lambda _: clean, heads, heavy, 8 - heavy, width, lengths, mass)
    assert torch.equal(kept.long(), picked_by_torch(*row, heavy, 8 - heavy))


@pytest.mark.parametrize("values", [
    [0.0, -0.0, 1.0],
    [0.0, -0.0, -1.0, -2.0, -1e-45, 1e-45],
    [1.0, 2.0, 3.0, torch.nan, -torch.nan],
    [torch.inf, -torch.inf, torch.nan, 0.0],
    [5.0],
], ids=str)  # fmt: skip
def test_select_ranks_every_float_as_sort_does(device, values):
    """Signs, zeros or NaN out of order, a NaN that beats an older one, or so many NaN that recent slots are lost."""
    mass = some(values, 2, 3, CAPACITY)
    mass[0, 0] = mass[0, 0].where(mass[0, 0].isfinite(), 7.0)  # one row where select_slots' promise holds
    clean = mass.clone()
    kept, *row = pick(device, "mass", lambda _: clean, 3, 5, 3, CAPACITY, [CAPACITY, 9], mass)
    score, positions, _, seen = row
    expected, older = picked_by_torch(*row, 5, 3), positions < seen - 3
    special = (~score.isfinite() & (score != -torch.inf) & older).sum(dim=-1) <= 5  # no more than heavy hitters
    assert special[0, 0] and torch.equal(kept.long()[special], expected[special])


@pytest.mark.parametrize("rank", ["mean", "random", "oldest"])
@pytest.mark.parametrize("width", [CAPACITY, 33])
def test_select_ranks_by_other_scores(device, rank, width):
    """A division that rounds in another way, a count left behind, or a hash with other bits than the torch function."""
    lengths, heads = [width, 8, 11], 2
    mass = count = None
    if rank == "mean":
        count = torch.arange(width).float().expand(3, heads, width).contiguous()
        mass = (count.double() / 10).float()  # their quotients differ in the last bit only
        mean = mass / count.clamp(min=TINY)
    score_of = {
        "mean": lambda _: mean,
        "random": lambda positions: random_priority(positions, 3, 11),
        "oldest": lambda positions: -positions,
    }[rank]
    pick(device, rank, score_of, heads, 5, 3, width, lengths, mass, count)


@pytest.mark.parametrize("width", [CAPACITY, 33])
@pytest.mark.parametrize("counted", [False, True])
def test_select_ranks_by_scores_that_it_is_given(device, counted, width):
    """Slots ranked by mass all the same, or scores that move in its place."""
    heads, lengths = 2, [width, 8, 11]
    mass = some([0.0, 0.5, 1.0], 3, heads, width)
    count = some([1.0, 2.0], 3, heads, width, seed=1) if counted else None
    order = some([0.0, 2.0, -1.0, 5.0], 3, heads, width, seed=2).to(device)
    pick(device, "order", lambda _: order.cpu(), heads, 5, 3, width, lengths, mass, count, order=order)


def test_select_refuses_a_rank_that_it_does_not_know(device):
    """A new score that would silently be ranked as another."""
    mass = torch.ones(1, 2, CAPACITY)
    for rank, order in (("value_mass", None), ("order", None), ("mass", mass.to(device))):
        with pytest.raises(ValueError, match="rank="):
            pick(device, rank, lambda _: mass, 2, 5, 3, CAPACITY, [CAPACITY], mass.clone(), order=order)


def test_select_that_only_picks_touches_no_slot(device):
    """The boolean mask's slimming, which moves the slots itself, and would move them twice."""
    mass = some([0.0, 1.0, 2.0], 2, 2, CAPACITY)
    clean = mass.clone()
    pick(device, "mass", lambda _: clean, 2, 5, 3, CAPACITY, [CAPACITY, 6], mass, move=False)


def test_hash_of_any_seed(device):
    """A salt or a position past 2**31 that overflows where the torch function wraps around."""
    positions = torch.tensor([0, 1, 2**31 - 3, 2**30, 77, 2**31 - 2], dtype=torch.int32).repeat(1, 2, 1)
    for layer, seed in ((0, 0), (127, 2**32 - 1), (31, 2**31)):
        kept = torch.zeros(1, 2, 4, dtype=torch.int32, device=device)
        mirror = torch.tensor([[6], [2**31 - 1]], dtype=torch.int32, device=device)
        args = (
            positions.clone().to(device),
            None,
            None,
            None,
            None,
            6,
            mirror,
            kept,
            2,
            1,
            "random",
            random_salt(layer, seed),
        )
        slimming.select(*args)
        score = random_priority(positions, layer, seed)
        for head in range(2):
            assert kept[0, head, :3].tolist() == plain_keep(
                score[0, head].tolist(), positions[0, head].tolist(), 6, 2**31 - 1, 2, 1
            )


# compact

TILINGS = {"small": (8, 4, 4), "one slot": (16, 1, 1)}


def kept_slots(rows, window, device, moved=0):
    """`kept` of rows that keep `window` ascending slots below the capacity, the first `moved` where they are."""
    generator, kept = torch.Generator().manual_seed(1), torch.zeros(*rows, window + 1, dtype=torch.int32)
    for row in kept.view(-1, window + 1):
        later = torch.randperm(CAPACITY - moved, generator=generator)[: window - moved].sort().values + moved
        row[:window] = torch.cat([torch.arange(moved), later])
        row[-1] = (row[:window] == torch.arange(window)).sum()
    return kept.to(device)


@pytest.mark.parametrize("head_dim, dtype, tiling, in_place", [
    (16, torch.float32, "own", True), (16, torch.float32, "one slot", False), (5, torch.float16, "small", True),
    (5, torch.float16, "small", False), (8, torch.float64, "own", False), (64, torch.bfloat16, "own", True),
    (80, torch.float16, "own", False), (80, torch.float16, "small", True), (96, torch.bfloat16, "own", True),
    (128, torch.bfloat16, "own", False), (24, torch.bfloat16, "one slot", True),
], ids=str)  # fmt: skip
def test_compact_is_a_gather(device, head_dim, dtype, in_place, tiling, monkeypatch):
    """A tile that overwrites the source of a later one, a column of the head missed or written twice, keys for values,
    strides of another tensor, or slots past a row's end that are read or written."""
    if tiling != "own":
        monkeypatch.setattr(slimming, "_tiling", lambda *_: TILINGS[tiling])
    heads, window, lengths = 2, 11, [CAPACITY, 6]
    width = CAPACITY
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, heads, CAPACITY, head_dim, generator=generator).to(device, dtype).unbind(0)
    sources = [keys, values]
    if not in_place:  # as projections leave them, and as a rotation does
        sources[0] = torch.randn(2, width, heads, head_dim, generator=generator).to(device, dtype).transpose(1, 2)
        sources[1] = torch.randn(2, heads, width, head_dim, generator=generator).to(device, dtype)
    kept = kept_slots((2, heads), window, device, moved=3)
    kept[1] = torch.arange(window + 1)
    kept[1, :, -1] = lengths[1]
    expected = []
    for slots, source in zip((keys, values), sources, strict=True):
        source[1, :, lengths[1] :] = torch.nan
        for b, head in ((b, head) for b in range(2) for head in range(heads)):
            unused = set(range(lengths[b])) - set(kept[b, head, :window].tolist())
            source[b, head, list(unused)] = torch.nan
        result = slots.clone()
        for b, length in enumerate(lengths):
            n = min(length, window)
            for head in range(heads):
                result[b, head, :n] = source[b, head, kept[b, head, :n].long()]
        expected.append(result)
    mirror = torch.tensor([lengths, lengths], dtype=torch.int32, device=device)
    slimming.compact(keys, values, *sources, mirror, kept, window)
    for slots, result in zip((keys, values), expected, strict=True):
        assert torch.equal(bits(slots), bits(result))
        assert not slots[0, :, :window].isnan().any()


def test_tiles_cover_the_head_and_fill_the_device():
    """A tile that is no power of two, lost columns, or a batch of one that a handful of programs have to move."""
    for rows in (8, 128, 2048):
        for head_dim in (64, 80, 96, 128, 256):
            for itemsize in (2, 4):
                chunk, slots, warps = slimming._tiling(rows, head_dim, itemsize, 1024)
                assert chunk & (chunk - 1) == slots & (slots - 1) == 0
                assert 16 <= chunk * slots * itemsize / (32 * warps) <= 128, "bytes in each thread's registers"
                programs = rows * 2 * -(-head_dim // chunk)
                assert programs >= slimming.PROGRAMS or chunk * itemsize <= slimming.LEAST_BYTES
                assert rows < 2048 or chunk >= head_dim
    assert slimming._tiling(8, 128, 2, 5)[1] == 8, "tiles of no more slots than the window needs"


# fill_holes


def filled_by_loop(slots, keep, window):
    """A row's slots afterwards: what it keeps behind the window moves to what it does not keep before it."""
    slots, holes = slots.clone(), sorted({*range(window)} - {*keep})
    fillers = [j for j in keep if j >= window]
    assert len(holes) == len(fillers)
    slots[holes] = slots[fillers]
    return slots


@pytest.mark.parametrize("rank, heavy, recent, capacity, lengths, head_dim, dtype", [
    ("mass", 4, 4, 9, [9, 8, 3], 16, torch.float32),
    ("mass", 0, 8, CAPACITY, [CAPACITY, 9], 5, torch.float16),
    ("mean", 7, 1, CAPACITY, [CAPACITY, 24, 13], 80, torch.float16),
    ("norms", 10, 13, 50, [50, 40, 24, 0], 24, torch.bfloat16),
    ("oldest", 20, 4, 50, [50, 25], 128, torch.bfloat16),
    ("random", 3, 5, 12, [12, 10, 9], 64, torch.bfloat16),
    ("order", 5, 3, CAPACITY, [CAPACITY, 20], 8, torch.float64),
], ids=str)  # fmt: skip
def test_holes_are_filled_and_nothing_else_moves(device, rank, heavy, recent, capacity, lengths, head_dim, dtype):
    """Slots of the newest tokens taken for those at the end of a row, a tie won by the younger token, a hole filled
    twice or not at all, what another slot or head holds, or a row that is short enough and changes."""
    heads, window, batch = 2, heavy + recent, len(lengths)
    seen = [length + 7 * b for b, length in enumerate(lengths)]
    positions = some_positions(lengths, seen, heads, recent, capacity)
    shape, past = (batch, heads, capacity), torch.arange(capacity) >= torch.tensor(lengths)[:, None, None]
    slots = {
        "mass": some([0.0, 0.5, 1.0, 3e-7, 1e-45, torch.nan], *shape).masked_fill(past, 0.0),
        "count": some([1.0, 2.0], *shape, seed=1).masked_fill(past, 0.0),
        "norms": some([1.0, 3.0], *shape, seed=2).masked_fill(past, 0.0),
    }
    scores = some([2.0, -1.0, torch.inf], *shape, seed=3).masked_fill(past, torch.nan) if rank == "order" else None
    score = {
        "mass": slots["mass"],
        "mean": slots["mass"] / slots["count"].clamp(min=TINY),
        "norms": slots["mass"] * slots["norms"],
        "oldest": -positions,
        "random": random_priority(positions, 3, 11),
        "order": scores,
    }[rank]
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, *shape, head_dim, generator=generator).to(dtype)
    slots = {"keys": keys, "values": values, "positions": positions} | slots
    expected = {name: tensor.clone() for name, tensor in slots.items()}
    moved = 0
    for b, head in itertools.product(range(batch), range(heads)):
        keep = plain_keep(score[b, head].tolist(), positions[b, head].tolist(), lengths[b], seen[b], heavy, recent)
        moved += sum(j >= window for j in keep)
        for name, tensor in expected.items():
            if lengths[b] > window:
                tensor[b, head] = filled_by_loop(tensor[b, head], keep, window)
                if name == "positions":
                    tensor[b, head, window:] = torch.arange(seen[b], seen[b] + capacity - window)
                elif name not in ("keys", "values"):
                    tensor[b, head, window:] = 0
    assert moved, "tells nothing of what moves"
    ours = {name: tensor.to(device) for name, tensor in slots.items()}
    states = [ours.pop(name) for name in ("keys", "values", "positions")]
    ranked = {name: ours[name] for name in ("mass", "count", "norms")[: {"mean": 2, "norms": 3}.get(rank, 1)]}
    if rank == "norms":
        del ranked["count"]
    mirror = torch.tensor([lengths, seen], dtype=torch.int32, device=device)
    kept = torch.zeros(*shape, dtype=torch.int32, device=device)
    slimming.fill_holes(
        *states, tuple(ours.values()), mirror, kept, heavy, recent, "mass" if rank == "norms" else rank, **ranked,
        salt=random_salt(3, 11), scores=None if scores is None else scores.to(device),
    )  # fmt: skip
    for (name, tensor), result in zip(expected.items(), [*states, *ours.values()], strict=True):
        assert torch.equal(bits(result), bits(tensor)), name


def test_fill_holes_refuses_a_rank_that_it_does_not_know(device):
    """A new score that would silently be ranked as another."""
    slots = torch.ones(1, 2, CAPACITY, device=device)
    for rank, order in (("value_mass", None), ("order", None), ("mass", slots)):
        with pytest.raises(ValueError, match="rank="):
            slimming.fill_holes(slots, slots, slots, (), None, slots, 5, 3, rank, slots, scores=order)


# The whole cache

FLAGS = {
    "rotation": {"num_heavy_hitters": 4},
    "H2O": {"update_interval": 1},
    "mean": {"score_norm": "mean", "score_decay": 0.5},
    "local": {"num_heavy_hitters": 0},
    "sink": {"score": "sink"},
    "4 sinks": {"score": "streaming_llm"},
    "random": {"score": "random", "score_seed": 5},
    "value mass": {"score": "value_mass", "num_heavy_hitters": "5/8"},
    "value mean": {"score": "value_mass", "score_norm": "mean", "num_heavy_hitters": 3},
    "uneven": {"head_budgets": ((4, 12),), "score_norm": "mean"},
    "uneven value mass": {
        "head_budgets": ((13, 3),),
        "score": "value_mass",
        "update_interval": 1,
        "num_heavy_hitters": "3/4",
    },
    "uneven without heavy": {"head_budgets": ((10, 6),), "num_heavy_hitters": "1/4"},
    "uneven sinks": {"head_budgets": ((4, 12),), "score": "streaming_llm"},
    "uneven random": {"head_budgets": ((5, 11),), "score": "random", "score_seed": 5},
    "rolling": {"position_rolling": True},
    "uneven rolling": {"position_rolling": True, "head_budgets": ((4, 12),)},
}
SCRIPT = [[13, 3, 8], "decode", "decode", "decode", "reorder", [2, 9, 4], "decode", "space", [1, 2, 1], "decode"]


@torch.no_grad()
def run_script(cache, device, script=SCRIPT, slim=None):
    """Forwards of a few rows on one layer, with keys, values and mass that are the same for every cache."""
    generator, heads = torch.Generator().manual_seed(0), 2
    for action in script:
        if action == "reorder":
            cache.reorder_cache(torch.tensor([2, 0, 0], device=device))
            continue
        if action == "space":
            cache.evict_for_space(2)
            continue
        new = [1, 1, 1] if action == "decode" else action
        step = cache.begin(3, max(new), new)
        states = torch.randn(2, 3, max(new), heads, 8, generator=generator)
        for b, n in enumerate(new):
            states[:, b, n:] = torch.nan  # padding must not get into the slots
        keys, values = states.to(device).transpose(2, 3)
        backend = resolve_backend(cache.h2o.backend, str(device))
        cache.update(keys, values, 0, slimmer=slimmer_of(backend))
        seen = cache.layers[0].seen_by(step)
        mass = torch.randint(0, 4, (len(seen.new), 3 * heads // len(seen.new), seen.width), generator=generator) / 3
        if not seen.fresh:  # a token's mass does not depend on its slot
            by_age = cache.layers[0].slots.load("positions")[:, :, : seen.max_start].argsort(dim=-1).cpu()
            mass[:, :, : seen.max_start] = mass[:, :, : seen.max_start].gather(2, by_age.argsort(dim=-1))
        for b, (start, n) in enumerate(zip(seen.start, seen.new, strict=True)):
            mass[b, :, start + n :] = 0
        if step.scored:
            cache.add_mass(mass.to(device), 0)
        if step.due:
            (slim or cache.slim)(0)
        cache.end()


@pytest.mark.parametrize("which", FLAGS)
def test_kernels_leave_the_cache_that_torch_leaves(device, which, monkeypatch):
    """Any bit of any slot, used or not, that depends on who slims: kernels or torch, by gather or by mask."""
    flags, calls = {"window_length": 8, "update_interval": 2, **FLAGS[which]}, []
    for name in ("select", "compact", "fill_holes"):
        kernel = getattr(slimming, name)
        monkeypatch.setattr(slimming, name, lambda *args, name=name, kernel=kernel: calls.append(name) or kernel(*args))
    caches = {}
    ways = ["H", "mask"] if which in ("rotation", "local", "value mean", "random", "rolling") else ["H"]
    for slimming_, backend in itertools.product(ways, ["sdpa", "triton"]):
        cache = caches[slimming_, backend] = new_cache(slimming=slimming_, backend=backend, **flags)
        run_script(cache, device, SCRIPT[:1])
        at = addresses(cache)
        run_script(cache, device, SCRIPT[1:])
        assert addresses(cache) == at
        used = set(calls)
        from_blocks = {"select", "compact"} if slimming_ == "H" else {"select"}
        in_place = {"select", "compact"} if flags.get("position_rolling") else {"fill_holes"}  # evict_for_space too
        assert used == (set() if backend == "sdpa" else from_blocks | in_place)
        calls.clear()
    expected = caches.pop(("H", "sdpa"))
    assert min(expected.evictions) >= 2 and not expected.layers[0].keys.isnan().any()
    for which, cache in caches.items():
        assert (cache.lengths, cache.seen, cache.evictions) == (expected.lengths, expected.seen, expected.evictions)
        if which[0] == "mask":
            assert_same_bits(cache, expected)
            continue
        for where, tensor in slot_tensors(expected).items():
            assert torch.equal(bits(slot_tensors(cache)[where]), bits(tensor)), (which, where)


@pytest.mark.parametrize("which, tokens", [
    ("rotation", 7), ("value mass", 0), ("uneven", 0), ("uneven", 7), ("rolling", 0), ("uneven rolling", 7),
])  # fmt: skip
def test_kernels_leave_the_8_bit_slots_that_torch_leaves(device, which, tokens):
    """A number without its scale, or with another slot's; a block that is moved as if it had 8 bits, or a prefix; or
    numbers that are rounded again whenever they move."""
    flags = {"window_length": 8, "update_interval": 2, **FLAGS[which], "slots": "int8", "score_decay": 1.0}
    ways = [("H", "sdpa"), ("H", "triton"), *([] if "head_budgets" in flags else [("mask", "sdpa")])]
    caches = [new_cache(slimming=slimming_, backend=backend, **flags) for slimming_, backend in ways]
    for actions in (SCRIPT[:1], SCRIPT[1:]):
        for cache in caches:
            if tokens and actions == SCRIPT[:1]:
                cache.follow(random_prefix(cache.h2o, tokens, device))
            run_script(cache, device, actions)
            assert_same_bits(cache, caches[0])
            assert cache.layers[0].keys.dtype == torch.int8 and cache.positions(0).equal(caches[0].positions(0))
    assert min(caches[0].evictions) >= 2


@pytest.mark.parametrize("slimming_", ["H", "mask"])
@pytest.mark.parametrize("norm", ["sum", "mean"])
def test_a_policy_without_a_rank_of_the_kernels(device, norm, slimming_, monkeypatch):
    """A score that the kernel cannot compute, ranked by plain mass without a word; or values of other slots."""
    flags = {"window_length": 8, "update_interval": 2, "score_norm": norm, "slimming": slimming_}
    by_mass = new_cache(backend="sdpa", **flags)
    run_script(by_mass, device)

    def value_mass(slots):
        return policies.mass(slots) * slots.values.norm(dim=-1)

    monkeypatch.setitem(policies.POLICIES, "mass", policies.Policy("value mass", value_mass, by_mass=True))
    expected, cache = (new_cache(backend=backend, **flags) for backend in ("sdpa", "triton"))
    for each in (expected, cache):
        run_script(each, device)
    for where, tensor in slot_tensors(expected).items():
        assert torch.equal(bits(slot_tensors(cache)[where]), bits(tensor)), where
    assert not torch.equal(cache.positions(0), by_mass.positions(0))


@pytest.mark.parametrize("slimming_", ["H", "mask"])
@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("lengths", [[13, 3, 8], [5, 3, 8]], ids=["longer", "no longer"])
def test_padding_stays_outside(device, lengths, backend, slimming_):
    """Keys of padding, whatever they hold, copied into the slots that a short row has yet to fill."""
    cache = new_cache(window_length=8, update_interval=2, slimming=slimming_, backend=backend)
    run_script(cache, device, [lengths])
    for slots in (cache.layers[0].keys, cache.layers[0].values):
        for b, length in enumerate(cache.lengths):
            assert slots[b, :, :length].all() and not slots[b, :, length:].any()


@pytest.mark.parametrize("most", [0, 11])
def test_sources_too_wide_for_the_kernel(device, most, monkeypatch):
    """A block, or slots, that torch ranks and the kernel moves: indices of another width, or mass that stays."""
    flags = {"window_length": 8, "update_interval": 2, "score_norm": "mean"}
    expected, cache = new_cache(backend="sdpa", **flags), new_cache(backend="triton", **flags)
    run_script(expected, device)
    monkeypatch.setattr(slimming, "MAX_SLOTS", most)
    run_script(cache, device)
    for where, tensor in slot_tensors(expected).items():
        assert torch.equal(bits(slot_tensors(cache)[where]), bits(tensor)), where


def random_prefix(h2o, tokens, device):
    """A prefix of one layer like those of `run_script`."""
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 1, 2, tokens, 8, generator=generator).to(device)
    count = torch.arange(tokens, 0, -1.0, device=device).expand(1, 2, -1)
    mass = torch.randint(0, 4, (1, 2, tokens), generator=generator).to(device) * count / 20
    layer = LayerPrefix(keys, values, mass, count, norms_of(values))
    return Prefix(h2o, tuple(range(tokens)), (layer,), lambda: None)


MEAN = {"score_norm": "mean"}
AFTER_PREFIX = (
    "rotation", "mean", "local", "4 sinks", "random", "value mean", "rolling", "uneven", "uneven value mass",
    "uneven random", "uneven rolling",
)  # fmt: skip


@pytest.mark.parametrize("tokens, most, flags", [
    *((7, None, {**FLAGS[which], "score_decay": 1.0}) for which in AFTER_PREFIX),
    (1, None, MEAN), (30, None, MEAN), (30, 11, MEAN), (30, None, {**MEAN, "slimming": "mask"}),
    (30, 11, {**MEAN, "head_budgets": ((4, 12),)}),
], ids=str)  # fmt: skip
def test_kernels_slim_a_prefix_where_it_lies(device, tokens, most, flags, monkeypatch):
    """A slot taken from the wrong one of two sources, or from another head's; or a copy of the prefix for each row."""
    if most is not None:  # torch ranks
        monkeypatch.setattr(slimming, "MAX_SLOTS", most)
    caches = [new_cache(backend=b, **{"window_length": 8, "update_interval": 2, **flags}) for b in ("sdpa", "triton")]
    for actions in (SCRIPT[:1], SCRIPT[1:6]):
        for cache in caches:
            if actions == SCRIPT[:1]:
                cache.follow(random_prefix(cache.h2o, tokens, device))
            with monkeypatch.context() as patch:
                if cache is caches[1] and cache.h2o.slimming == "H" and not (most and "head_budgets" in flags):
                    patch.delattr(torch_slimming, "followed_by")
                run_script(cache, device, actions)
        expected, cache = caches
        assert (cache.lengths, cache.seen, cache.evictions) == (expected.lengths, expected.seen, expected.evictions)
        for where, tensor in slot_tensors(expected).items():
            assert torch.equal(bits(slot_tensors(cache)[where]), bits(tensor)), where
        if tokens == 30 and actions == SCRIPT[:1] and "head_budgets" not in flags:
            heavy_in_prefix = cache.positions(0)[0, :, :4] < tokens
            assert heavy_in_prefix.any(-1).all() and not heavy_in_prefix.all(), "says nothing of the other source"
    assert min(expected.evictions) >= 2 and not expected.layers[0].keys.isnan().any()


@pytest.mark.parametrize("rolling, kernels", [(False, 1), (True, 2)])
def test_decode_slimmings_launch_the_same_thing(device, rolling, kernels, monkeypatch):
    """An argument that follows the step or lies elsewhere: a CUDA graph would repeat the first one's. Or something that
    is allocated at the first slimming, which would belong to the graph's memory."""
    launches, fill_holes, run = [], slimming._fill_holes, slimming.Launch._run

    def record(grid, args, options):
        flat = [part for arg in args for part in (arg if isinstance(arg, tuple) else [arg])]
        launches[-1].append((grid, [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in flat], options))

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **options):
                record(grid, args, options)
                return fill_holes[grid](*args, **options)

            return launch

    def run_and_record(self, tensors, *rest):
        record(self._grid, (*tensors, *self._arguments), self._options)
        run(self, tensors, *rest)

    monkeypatch.setattr(slimming, "_fill_holes", Spy())
    monkeypatch.setattr(slimming.Launch, "_run", run_and_record)
    cache = new_cache(window_length=8, update_interval=2, backend="triton", position_rolling=rolling)

    def slim(layer_idx):
        launches.append([])
        cache.slim(layer_idx)

    run_script(cache, device, [[7, 3, 8]], slim)
    assert launches == [[]]
    (kept,) = cache._rows._kept.values()
    run_script(cache, device, ["decode"] * 8, slim)
    decode = launches[1:]
    assert [kept.data_ptr()] == [table.data_ptr() for table in cache._rows._kept.values()]
    assert len(decode) == 4 and all(len(launched) == kernels for launched in decode)
    assert all(launched == decode[0] for launched in decode)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_a_graph_holds_the_slimming():
    """A wait for the device, which a capture refuses, or a length that the graph keeps from the step it was made in."""
    script, graph = [[13, 3, 8]] + ["decode"] * 12, torch.cuda.CUDAGraph()
    expected, cache = (new_cache(window_length=8, update_interval=3, backend="triton") for _ in range(2))
    run_script(expected, "cuda", script)
    slimmings = []

    def slim(layer_idx):
        slimmings.append(layer_idx)
        if len(slimmings) == 3:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                cache.slim(layer_idx)
        if len(slimmings) >= 3:
            graph.replay()
        else:
            cache.slim(layer_idx)

    run_script(cache, "cuda", script, slim)
    assert len(slimmings) == 5
    for where, tensor in slot_tensors(expected).items():
        assert torch.equal(bits(slot_tensors(cache)[where]), bits(tensor)), where


def test_who_slims(device):
    """Kernels on a CPU that nobody asked for, or none where they were asked for."""
    configs = [new_cache(backend=backend).h2o for backend in ("auto", "sdpa", "eager", "triton")]
    slimmers = [slimmer_of(resolve_backend(h2o.backend, device)) for h2o in configs]
    assert [slimmer.by_kernel for slimmer in slimmers] == [device == "cuda", False, False, True]
