"""Slimming in one launch, if slots may lie in any order, or in two.

`fill_holes` picks the slots to keep and moves only those that lie behind the window. `select` picks them as well, and
`compact` moves their keys and values to the front, in order: from a block of new tokens, or in place.

None of them waits for the device or reads a length on the host, and after a decode step their arguments and grids never
change, so all are graph-safe. `mirror` int32 [2, B] holds each row's length and tokens seen. `kept` int32
[B, Hkv, capacity] passes slots on: from `select` to `compact` those to keep, ascending, and in the last column the
number of them that stay in place. `fill_holes` uses it between two of its phases.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from h2optimizer.kernels.common import Launch, on_its_device

RANKS = ("mass", "mean", "random", "oldest", "order")
MAX_SLOTS = 32768  # most slots that `select` can rank: one tile in registers
LEAST_TILE = 1024  # slots; heads with fewer are taken together with those that fill it
PROGRAMS = 512  # `compact` splits heads to reach this many, about four per multiprocessor of a large GPU
SLOTS_AT_ONCE = 16  # that `fill_holes` moves together
FEW = tl.constexpr(16)  # slots to drop that are found one after the other, and not by bisection
LEAST, GREATEST = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)  # int64
LEAST_BYTES = 32  # least bytes of a slot that one program moves: a memory sector
TILE_BYTES = 8192  # bytes of a tile with 4 warps; with few programs, four times that with 8 warps


class Heads(NamedTuple):
    """Heads of a layer with windows of their own, whose slots lie one after the other."""

    offsets: torch.Tensor  # int32 [Hkv + 1]: where each head's slots begin
    split: torch.Tensor  # int32 [2, Hkv]: heavy and recent slots
    classes: tuple[tuple[int, torch.Tensor], ...]  # heads of about one size, int32, and the longest's capacity
    in_place: bool  # the source is the slots themselves


@functools.cache
def classes_of(capacities: tuple[int, ...], device: torch.device) -> tuple[tuple[int, torch.Tensor], ...]:
    """The heads that `select` takes at once: those whose tiles are equally wide."""
    classes: dict[int, list[int]] = {}
    for head, capacity in enumerate(capacities):
        classes.setdefault(max(LEAST_TILE, triton.next_power_of_2(capacity)), []).append(head)
    return tuple(
        (max(capacities[head] for head in heads), torch.tensor(heads, dtype=torch.int32).to(device))
        for heads in classes.values()
    )


@functools.lru_cache
def _selection(programs: int, most: int, *numbers: int, **constants) -> Launch:
    """most: slots of a head, here or in the source."""
    tile = triton.next_power_of_2(most)
    options = dict(num_warps=min(16, max(1, tile // 256)), num_stages=1, maxnreg=128)
    return Launch(_select, programs, *numbers, TILE=tile, **constants, options=options)


def select(
    positions: torch.Tensor,
    mass: torch.Tensor | None,
    count: torch.Tensor | None,
    source_mass: torch.Tensor | None,
    source_count: torch.Tensor | None,
    width: int,
    mirror: torch.Tensor,
    kept: torch.Tensor,
    heavy: int,
    recent: int,
    rank: str,
    salt: int = 0,
    move: bool = True,
    scores: torch.Tensor | None = None,
    norms: torch.Tensor | None = None,
    source_norms: torch.Tensor | None = None,
    heads: Heads | None = None,
) -> None:
    """Write to `kept` each row's `recent` newest tokens and, of the older ones, the `heavy` best-ranked.

    A row no longer than heavy + recent keeps its slots in place. With `move`, the positions, mass and count of kept
    slots move to the front. Behind them, mass and count become zero and positions become those of the next tokens.

    Args:
        positions: int32 [B, Hkv, capacity], in any order; past a row's end, the positions of the tokens to come.
        mass, count: float32 [B, Hkv, capacity]; None if neither `rank` nor the caller's policy uses them.
        source_mass, source_count: float32 [B, Hkv, width], contiguous; may be `mass` and `count` themselves.
        width: slots of the source; at most MAX_SLOTS, like the capacity.
        rank: "mass", "mean" (mass / count), "random" (hash of position, head and `salt`), "oldest", or "order". Ties
            keep the older token; NaN ranks above everything.
        salt: any integer; only its low 32 bits are used.
        scores: float32 [B, Hkv, width], contiguous, that rank "order" goes by, the greatest kept. None otherwise.
        norms, source_norms: as mass: rank "mass" or "mean" is multiplied by them. None where nothing ranks by them.
        heads: if heads have windows of their own. Then positions, mass, count, norms and `kept` are [B, all slots],
            `mirror` has a column for each head of each row, and heavy and recent are not read.

    Raises: ValueError for an unknown rank, or scores without rank "order", or that rank without scores.
    """
    _check(rank, scores)
    ragged = heads is not None
    in_place = ragged and heads.in_place
    batch, capacity = positions.shape[0], positions.shape[-1]
    offsets, split = (heads.offsets, heads.split) if ragged else (None, None)
    count_heads, classes = _classes(positions, heads)
    for longest, which in classes:
        chosen = len(which)
        launch = _selection(
            batch * chosen, longest if in_place else max(width, longest), batch, count_heads, chosen, width, capacity,
            kept.shape[-1], heavy, recent, _as_int32(salt), RANK=rank, MASS=mass is not None, COUNT=count is not None,
            NORMS=norms is not None, MOVE=move, IN_PLACE=in_place, RAGGED=ragged,
        )  # fmt: skip
        launch(
            positions, mass, count, norms, source_mass, source_count, source_norms, scores, mirror, kept, offsets,
            split, which if ragged else None,
        )  # fmt: skip


@on_its_device
def fill_holes(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    carried: tuple[torch.Tensor, ...],
    mirror: torch.Tensor,
    kept: torch.Tensor,
    heavy: int,
    recent: int,
    rank: str,
    mass: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    norms: torch.Tensor | None = None,
    salt: int = 0,
    scores: torch.Tensor | None = None,
    heads: Heads | None = None,
) -> None:
    """Drop all but each row's `recent` newest tokens and, of the older ones, the `heavy` best-ranked.

    Kept slots behind the first heavy + recent move to those of dropped tokens before, both in ascending order. A row no
    longer than heavy + recent stays as it is.

    Args:
        keys, values: [B, Hkv, capacity, D], contiguous, any dtype; 16-byte accesses where D is a multiple of 8.
        positions: int32 [B, Hkv, capacity], as in `select`, and so are rank, salt and heads.
        carried: what else moves with a token, float32 [B, Hkv, capacity]; zero past a row's end.
        mass, count, norms: those of `carried` that `rank` needs.
        scores: float32 [B, Hkv, capacity], contiguous, for rank "order".

    Raises: ValueError as `select` does.
    """
    _check(rank, scores)
    ragged = heads is not None
    batch, capacity, head_dim = len(keys), keys.shape[-2], keys.shape[-1]
    count_heads, classes = _classes(positions, heads)
    for longest, which in classes:
        tile = triton.next_power_of_2(longest)
        _fill_holes[(batch * len(which),)](
            keys, values, positions, carried, mass, count, norms, scores, mirror, kept,
            heads.offsets if ragged else None, heads.split if ragged else None, which if ragged else None,
            batch, count_heads, len(which), capacity if scores is None else scores.shape[-1], capacity, kept.shape[-1],
            heavy, recent, _as_int32(salt),
            RANK=rank, NORMS=norms is not None, D=head_dim, CHUNK=triton.next_power_of_2(head_dim), TILE=tile,
            SLOTS=SLOTS_AT_ONCE, RAGGED=ragged, num_warps=min(16, max(1, tile // 512)), num_stages=1,
            maxnreg=64 if tile <= 8192 else 128,
        )  # fmt: skip


def _check(rank: str, scores: torch.Tensor | None) -> None:
    if rank not in RANKS or (rank == "order") != (scores is not None):
        raise ValueError(f"rank={rank!r}: choose one of {', '.join(RANKS)}, and give scores with the last of them")


def _classes(positions: torch.Tensor, heads: Heads | None) -> tuple[int, tuple]:
    """How many KV heads there are, and those to take at once with the longest's capacity."""
    if heads is None:
        return positions.shape[1], ((positions.shape[2], range(positions.shape[1])),)
    return len(heads.offsets) - 1, heads.classes


def _as_int32(salt: int) -> int:
    return (salt + 2**31) % 2**32 - 2**31


def hand_over(keep: torch.Tensor, kept: torch.Tensor) -> None:
    """Write slots [B, Hkv, window] that torch has picked to `kept`, for `compact`."""
    window = keep.shape[2]
    kept[..., :window] = keep
    kept[..., -1] = (keep == torch.arange(window, device=keep.device)).sum(dim=-1)


@functools.lru_cache
def _compaction(rows: int, head_dim: int, tiling: tuple[int, int, int], *numbers: int, **constants) -> Launch:
    chunk, slots, warps = tiling
    return Launch(
        _compact, rows * 2 * triton.cdiv(head_dim, chunk), *numbers, D=head_dim, CHUNK=chunk, SLOTS=slots, **constants,
        options=dict(num_warps=warps, num_stages=1),
    )  # fmt: skip


def compact(
    keys: torch.Tensor,
    values: torch.Tensor,
    source_keys: torch.Tensor,
    source_values: torch.Tensor,
    mirror: torch.Tensor,
    kept: torch.Tensor,
    window: int,
    heads: Heads | None = None,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Move the kept slots of the source, at most `window` per row, to the front of keys and values.

    Args:
        keys, values: [B, Hkv, capacity, D], or [B, all slots, D] with `heads`; contiguous, any dtype; 16-byte accesses
            where D is a multiple of 8.
        source_keys, source_values: [B, Hkv, width, D] with contiguous heads; keys and values themselves, or
            tensors that share no memory with them.
        heads: as in `select`; `window` is then the largest.
        prefix: keys and values [1, Hkv, P, D], contiguous, of the source's first slots in all rows; source_keys and
            source_values then begin after them.
    """
    batch, capacity, head_dim = keys.shape[0], keys.shape[-2], keys.shape[-1]
    count_heads = keys.shape[1] if heads is None else len(heads.offsets) - 1
    in_place = source_keys is keys
    strides = (0,) * 6 if in_place else (*source_keys.stride()[:3], *source_values.stride()[:3])
    prefix_keys, prefix_values = prefix or (None, None)
    offsets, split = (None, None) if heads is None else (heads.offsets, heads.split)
    rows, shared = batch * count_heads, 0 if prefix is None else prefix_keys.shape[2]
    launch = _compaction(
        rows, head_dim, _tiling(rows, head_dim, keys.itemsize, window), count_heads, capacity, kept.shape[-1], window,
        shared, *strides, IN_PLACE=in_place, RAGGED=heads is not None, PREFIX=prefix is not None,
    )  # fmt: skip
    launch(keys, values, source_keys, source_values, prefix_keys, prefix_values, mirror, kept, offsets, split)


@functools.lru_cache
def _tiling(rows: int, head_dim: int, itemsize: int, window: int) -> tuple[int, int, int]:
    """Elements of the head and slots in a tile, and warps: whole heads, unless programs are too few to fill a GPU."""
    chunk = triton.next_power_of_2(head_dim)
    while rows * 2 * triton.cdiv(head_dim, chunk) < PROGRAMS and chunk * itemsize > LEAST_BYTES:
        chunk //= 2
    few = rows * 2 * triton.cdiv(head_dim, chunk) <= PROGRAMS // 2
    slots = max(1, TILE_BYTES * (4 if few else 1) // (chunk * itemsize))
    return chunk, min(slots, triton.next_power_of_2(max(1, window))), 8 if few else 4


@triton.jit
def _of_head(mirror, offsets, split, batch_row, head, row, batch, heads, heavy, recent, capacity, kept_stride,
             RAGGED: tl.constexpr):  # fmt: skip
    """A row's KV head: length, tokens seen, heavy and recent slots, first slot, capacity, and its part of `kept`."""
    if RAGGED:
        length, seen = tl.load(mirror + row), tl.load(mirror + batch * heads + row)
        heavy, recent = tl.load(split + head), tl.load(split + heads + head)
        begin = tl.load(offsets + head)
        first = batch_row.to(tl.int64) * capacity + begin
        at_kept = first
        capacity = tl.load(offsets + head + 1) - begin
        kept_stride = heavy + recent + 1
    else:
        length, seen = tl.load(mirror + batch_row), tl.load(mirror + batch + batch_row)
        first = row.to(tl.int64) * capacity
        at_kept = row.to(tl.int64) * kept_stride
    return length, seen, heavy, recent, first, capacity, at_kept, kept_stride


@triton.jit(
    do_not_specialize=["batch", "heads", "chosen", "width", "capacity", "kept_stride", "heavy", "recent", "salt"]
)
def _select(
    positions, mass, count, norms, source_mass, source_count, source_norms, scores, mirror, kept, offsets, split,
    which, batch, heads, chosen, width, capacity, kept_stride, heavy, recent, salt,
    RANK: tl.constexpr, MASS: tl.constexpr, COUNT: tl.constexpr, NORMS: tl.constexpr, MOVE: tl.constexpr,
    TILE: tl.constexpr, IN_PLACE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    row = _row(which, chosen, heads, RAGGED)
    batch_row, head = row // heads, row % heads
    length, seen, heavy, recent, first, capacity, at_kept, kept_stride = _of_head(
        mirror, offsets, split, batch_row, head, row, batch, heads, heavy, recent, capacity, kept_stride, RAGGED
    )
    kept += at_kept
    window = heavy + recent
    slot = tl.arange(0, TILE)
    filled = slot < length
    row = row.to(tl.int64)
    source = first if IN_PLACE else row * width
    # Tokens past the capacity are all new, so their positions follow from their slots.
    position = tl.load(positions + first + slot, mask=slot < capacity, other=0)
    position = tl.where(slot < capacity, position, seen - length + slot)

    keep = filled
    if length > window:
        order = _order_by(source_mass, source_count, source_norms, scores, source + slot, row * width + slot, filled,
                          position, head, salt, RANK, NORMS)  # fmt: skip
        keep = filled & ~_dropped(order, position, filled & (position < seen - recent), length - window)

    kept_slots = tl.minimum(length, window)
    to = tl.cumsum(keep.to(tl.int32), axis=0) - 1
    tl.store(kept + to, slot, mask=keep)
    tl.store(kept + slot, slot, mask=(slot >= kept_slots) & (slot < window))  # empty slots of a short row
    tl.store(kept + kept_stride - 1, tl.sum((keep & (to == slot)).to(tl.int32)))
    if MOVE:
        if MASS:
            slot_mass = tl.load(source_mass + source + slot, mask=keep)
        if COUNT:
            slot_count = tl.load(source_count + source + slot, mask=keep)
        if NORMS:
            slot_norm = tl.load(source_norms + source + slot, mask=keep)
        tail = (slot >= kept_slots) & (slot < capacity)
        tl.debug_barrier()  # every thread has read its part of the row, which may now be overwritten
        _put(positions + first, position, to, keep, slot, seen - kept_slots + slot, tail)
        if MASS:
            _put(mass + first, slot_mass, to, keep, slot, 0.0, tail)
        if COUNT:
            _put(count + first, slot_count, to, keep, slot, 0.0, tail)
        if NORMS:
            _put(norms + first, slot_norm, to, keep, slot, 0.0, tail)


@triton.jit(
    do_not_specialize=["batch", "heads", "chosen", "width", "capacity", "kept_stride", "heavy", "recent", "salt"]
)
def _fill_holes(
    keys, values, positions, carried, mass, count, norms, scores, mirror, kept, offsets, split, which, batch, heads,
    chosen, width, capacity, kept_stride, heavy, recent, salt,
    RANK: tl.constexpr, NORMS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    SLOTS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    row = _row(which, chosen, heads, RAGGED)
    batch_row, head = row // heads, row % heads
    length, seen, heavy, recent, first, capacity, at_kept, kept_stride = _of_head(
        mirror, offsets, split, batch_row, head, row, batch, heads, heavy, recent, capacity, kept_stride, RAGGED
    )
    window = heavy + recent
    if length > window:
        slot = tl.arange(0, TILE)
        filled, behind = slot < length, slot >= window
        position = tl.load(positions + first + slot, mask=filled, other=0)
        order = _order_by(mass, count, norms, scores, first + slot, row.to(tl.int64) * width + slot, filled, position,
                          head, salt, RANK, NORMS)  # fmt: skip
        dropped = _dropped(order, position, filled & (position < seen - recent), length - window)
        # List the holes from the front of `kept` on, and what fills them from its window-th entry on.
        hole, filler = dropped & ~behind, filled & behind & ~dropped  # as many of each
        holes = tl.sum(hole.to(tl.int32))
        rank = tl.cumsum((hole | filler).to(tl.int32), axis=0) - 1
        kept += at_kept
        tl.store(kept + tl.where(hole, rank, rank - holes + window), slot, mask=hole | filler)
        tl.debug_barrier()  # the lists are written, and the row is read: its slots may now be overwritten
        few, d = tl.arange(0, SLOTS), tl.arange(0, CHUNK)
        keys += first * D
        values += first * D
        for begin in range(0, holes, SLOTS):
            there = begin + few < holes
            to = tl.load(kept + begin + few, mask=there)
            of = tl.load(kept + begin + few + window, mask=there)
            whole = there[:, None] & (d < D)[None, :]
            key = tl.load(keys + of[:, None] * D + d[None, :], mask=whole)
            value = tl.load(values + of[:, None] * D + d[None, :], mask=whole)
            tl.store(keys + to[:, None] * D + d[None, :], key, mask=whole)
            tl.store(values + to[:, None] * D + d[None, :], value, mask=whole)
            tl.store(positions + first + to, tl.load(positions + first + of, mask=there), mask=there)
            for i in tl.static_range(len(carried)):
                tl.store(carried[i] + first + to, tl.load(carried[i] + first + of, mask=there), mask=there)
        tl.debug_barrier()  # all that moves is read
        for begin in range(window, capacity, SLOTS):
            past = begin + few
            tl.store(positions + first + past, seen - window + past, mask=past < capacity)
            for i in tl.static_range(len(carried)):
                tl.store(carried[i] + first + past, 0.0, mask=past < capacity)


@triton.jit
def _row(which, chosen, heads, RAGGED: tl.constexpr):
    """This program's row: a KV head of a row of the batch."""
    row = tl.program_id(0)
    if RAGGED:
        row = row // chosen * heads + tl.load(which + row % chosen)
    return row


@triton.jit
def _order_by(mass, count, norms, scores, at, at_score, filled, position, head, salt, RANK: tl.constexpr,
              NORMS: tl.constexpr):  # fmt: skip
    """int32 that rank the slots, the greatest the best."""
    if RANK == "oldest":
        order = tl.zeros_like(position)  # all tie, and the older ones win
    elif RANK == "random":
        order = _hash(position, head, salt)
    elif RANK == "order":
        order = _order(tl.load(scores + at_score, mask=filled, other=0.0))
    else:
        score = tl.load(mass + at, mask=filled, other=0.0)
        if RANK == "mean":
            queries = tl.load(count + at, mask=filled, other=0.0)
            score = tl.div_rn(score, tl.maximum(queries, 1.1754943508222875e-38))
        if NORMS:
            score *= tl.load(norms + at, mask=filled, other=0.0)
        order = _order(score)
    return order


@triton.jit
def _order(score):
    """int32 that compare like the float32 scores, with -0.0 equal to 0.0 and every NaN above everything."""
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    order = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, order)


@triton.jit
def _hash(position, head, salt):
    """int32 below 2**24, a fixed pseudo-random number per token and head: `random_priority` of utils/policies.py."""
    x = position.to(tl.uint32) * 0x9E3779B1 + (head.to(tl.uint32) * 0xC2B2AE3D + salt.to(tl.uint32))
    x = (x ^ (x >> 16)) * 0x45D9F3B
    x = (x ^ (x >> 16)) * 0x45D9F3B
    return ((x ^ (x >> 16)) >> 8).to(tl.int32)


@triton.jit
def _dropped(order, position, older, n):
    """Mask of the n >= 1 older slots, of at least n, with the least order; of equal orders the newest."""
    # No two keys are equal, as positions are not, so exactly n keys are no greater than the n-th least.
    key = tl.where(older, (order.to(tl.int64) << 32) - position, GREATEST)
    bound = tl.full((), LEAST, tl.int64)
    if n <= FEW:
        for _ in range(n):
            bound = tl.min(tl.where(key > bound, key, GREATEST), axis=0)
    else:
        # Find, bit by bit from the sign down, a number that exactly n keys are below.
        below = tl.sum((key < 0).to(tl.int32))
        bound = tl.where(below <= n, 0, bound)
        below = tl.where(below <= n, below, 0)
        bit = tl.full((), 1 << 62, tl.int64)
        while (bit > 0) & (below != n):
            trial = tl.sum((key < bound + bit).to(tl.int32))
            bound = tl.where(trial <= n, bound + bit, bound)
            below = tl.where(trial <= n, trial, below)
            bit = bit >> 1
        bound -= 1
    return older & (key <= bound)


@triton.jit
def _put(row, value, to, keep, slot, tail_value, tail):
    """Scatter the kept slots' values to the front of a row, and fill its tail."""
    tl.store(row + to, value, mask=keep)
    tl.store(row + slot, tail_value, mask=tail)


@triton.jit(do_not_specialize=["heads", "capacity", "kept_stride", "window", "shared"])
def _compact(
    keys, values, source_keys, source_values, prefix_keys, prefix_values, mirror, kept, offsets, split, heads,
    capacity, kept_stride, window, shared, key_row, key_head, key_slot, value_row, value_head, value_slot,
    D: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, IN_PLACE: tl.constexpr, RAGGED: tl.constexpr,
    PREFIX: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (D + CHUNK - 1) // CHUNK
    row, part = tl.program_id(0) // (2 * chunks), tl.program_id(0) % (2 * chunks)
    batch_row, head = row // heads, row % heads
    length, _, heavy, recent, slot, capacity, at_kept, kept_stride = _of_head(
        mirror, offsets, split, batch_row, head, row, 0, heads, 0, window, capacity, kept_stride, RAGGED
    )
    end = tl.minimum(length, heavy + recent)
    kept += at_kept
    first = 0
    offset = slot * D
    if IN_PLACE:
        first = tl.load(kept + kept_stride - 1)  # slots before that stay where they are
        key_slot, value_slot = D, D
        source_keys += offset
        source_values += offset
    else:
        source_keys += batch_row.to(tl.int64) * key_row + head.to(tl.int64) * key_head
        source_values += batch_row.to(tl.int64) * value_row + head.to(tl.int64) * value_head
    if PREFIX:
        prefix_keys += head.to(tl.int64) * shared * D
        prefix_values += head.to(tl.int64) * shared * D
    if part < chunks:
        _move(keys + offset, source_keys, prefix_keys, shared, key_slot, kept, first, end, part * CHUNK, D, CHUNK,
              SLOTS, IN_PLACE, PREFIX)  # fmt: skip
    else:
        part -= chunks
        _move(values + offset, source_values, prefix_values, shared, value_slot, kept, first, end, part * CHUNK, D,
              CHUNK, SLOTS, IN_PLACE, PREFIX)  # fmt: skip


@triton.jit
def _move(
    slots, source, prefix, shared, stride, kept, first, end, column,
    D: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr, IN_PLACE: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Move slots [first, end) of a chunk of the head, tile by tile, prefetching the next tile.

    This is safe in place. Every slot's source is itself or a later slot, so storing a tile overwrites no source of a
    later tile. A tile's own sources are in registers on all threads before it is stored.
    """
    slot = first + tl.arange(0, SLOTS)
    d = column + tl.arange(0, CHUNK)
    tile = _gather(source, prefix, shared, _index(kept, slot, end), stride, d, D, PREFIX)
    index = _index(kept, slot + SLOTS, end)
    for _ in range(first, end, SLOTS):
        following = _gather(source, prefix, shared, index, stride, d, D, PREFIX)
        index = _index(kept, slot + 2 * SLOTS, end)
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(slots + slot[:, None] * D + d[None, :], tile, mask=(slot < end)[:, None] & (d < D)[None, :])
        tile = following
        slot += SLOTS


@triton.jit
def _index(kept, slot, end):
    """The source of each slot, -1 past the end."""
    return tl.load(kept + slot, mask=slot < end, other=-1)


@triton.jit
def _gather(source, prefix, shared, index, stride, d, D: tl.constexpr, PREFIX: tl.constexpr):
    """Load [SLOTS, CHUNK] of the source, its first `shared` slots from the prefix, masked out where the index is -1."""
    mask = (index >= 0)[:, None] & (d < D)[None, :]
    if PREFIX:
        in_prefix = (index < shared)[:, None]
        theirs = tl.load(prefix + index.to(tl.int64)[:, None] * D + d[None, :], mask=mask & in_prefix, other=0.0)
        own = source + (index - shared).to(tl.int64)[:, None] * stride + d[None, :]
        tile = tl.where(in_prefix, theirs, tl.load(own, mask=mask & (index >= shared)[:, None], other=0.0))
    else:
        tile = tl.load(source + index.to(tl.int64)[:, None] * stride + d[None, :], mask=mask)
    return tile
