"""Storage of one layer: where each token's key, value, mass and position are stored, and how they move."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable

import torch

from h2optimizer.utils.memory import to_device
from h2optimizer.utils.step import SlimmingPlan, Step

Gather = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (all slots, indices to keep) -> [B, Hkv, m(, D)]


class Slots:
    """The slots of one layer, allocated once and never moved. A slot index refers to the same token in all tensors.

    keys, values [B, Hkv, capacity, D]; mass, and if slots are ranked by them count and norms (L2, of the values), all
    [B, Hkv, capacity] float32, zero past a row's length. positions [B, Hkv, capacity] int32,
    continued past a row's end so that appends need not write them.

    Args:
        key_states, value_states: [B, Hkv, any, D], with the dtypes and device of the slots.
        capacity: slots per row and KV head.
        ranked: those of "mass", "count" and "norms" that slots are ranked by.
    """

    pairs = (("keys", "values"),)  # the tensors that hold keys, and values
    plain = True  # whether keys and values are [B, Hkv, capacity, D] in the model's dtype
    scales: tuple[torch.Tensor, ...] = ()  # of keys and of values, if these are quantised
    offsets: torch.Tensor | None = None  # where each head begins, if heads have capacities of their own
    capacities: tuple[int, ...] = ()  # and these

    @torch.inference_mode(False)  # slots outlive the caller's inference mode
    def __init__(
        self, key_states: torch.Tensor, value_states: torch.Tensor, capacity: int, ranked: tuple[str, ...] = ()
    ):
        self.capacity = capacity
        batch, self.heads, _, self.head_dim = key_states.shape
        self._allocate(key_states, value_states, (batch, self.heads, capacity), ranked)
        positions = self._first_positions().expand(batch, self.heads, -1)
        self.positions = positions.clone(memory_format=torch.contiguous_format)

    def _first_positions(self) -> torch.Tensor:
        """The positions of a row that has seen no token, int32, on the device: to be copied."""
        return _ascending(self.capacity, self.device)

    def _allocate(self, key_states, value_states, slots: tuple[int, ...], ranked: tuple[str, ...]) -> None:
        """Everything but positions. Keys come first: a window far beyond memory fails at once."""
        self.device, self.ranked = key_states.device, ranked
        self.dtypes = key_states.dtype, value_states.dtype
        self.keys = key_states.new_zeros(*slots, key_states.shape[-1])
        self.values = value_states.new_zeros(*slots, value_states.shape[-1])
        self.mass = torch.zeros(slots, dtype=torch.float32, device=self.device)
        self.count = torch.zeros_like(self.mass) if "count" in ranked else None
        self.norms = torch.zeros_like(self.mass) if "norms" in ranked else None

    def empty_like(self, batch_size: int) -> Slots:
        """New empty slots of the same kind for `batch_size` rows."""
        return type(self)(*self.no_states(batch_size), self.capacities or self.capacity, self.ranked)

    def within(self, first: int, rows: int) -> Slots:
        """Slots in the place of neighbouring rows, sharing their memory and what they hold: to be cleared."""
        part = copy.copy(self)
        for name in (*self.states, "mass", "count", "norms", "positions"):
            if (of := getattr(self, name)) is not None:
                setattr(part, name, of[first : first + rows])
        return part

    def no_states(self, batch_size: int) -> list[torch.Tensor]:
        """No keys and values, of the shapes and dtypes that the model has: [batch_size, Hkv, 0, D]."""
        return [
            of.new_empty(batch_size, self.heads, 0, of.shape[-1], dtype=dtype)
            for of, dtype in zip((self.keys, self.values), self.dtypes, strict=True)
        ]

    def suit(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether states match the dtypes, device, heads and head_dims of these slots."""
        mine = zip(self.dtypes, (self.keys, self.values), (key_states, value_states), strict=True)
        return all(
            (dtype, self.device, self.heads, of.shape[-1])
            == (states.dtype, states.device, states.shape[1], states.shape[3])
            for dtype, of, states in mine
        )

    @property
    def states(self) -> tuple[str, ...]:
        """The names in `pairs`."""
        return tuple(name for pair in self.pairs for name in pair)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, filled or not."""
        return sum(tensor.nbytes for tensor in (*self._cleared(), self.positions))

    def _cleared(self, states: bool = True) -> list[torch.Tensor]:
        """All tensors but positions, or without those of `states`: zero where nothing has been stored."""
        held = (getattr(self, name) for name in (*(self.states if states else ()), "mass", "count", "norms"))
        return [tensor for tensor in held if tensor is not None]

    def stored(self) -> dict[str, torch.Tensor]:
        """What moves with a token, by name, as it is stored; mass, count and norms only if slots are ranked by them."""
        return {name: getattr(self, name) for name in (*self.states, "positions", *self.ranked)}

    def load(self, name: str) -> torch.Tensor:
        """A tensor as [B, Hkv, capacity(, D)]: itself, which `store` then need not write."""
        return getattr(self, name)

    def store(self, name: str, slots: torch.Tensor) -> None:
        """Write what `load` gave back."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What moves with a token, by name, as `load` gives it."""
        return {name: self.load(name) for name in self.stored()}

    # A forward

    def read(self, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `width` slots, or of all: [B, Hkv, width, D], views where heads are alike."""
        return self.decoded({name: self.load(name)[:, :, :width] for name in self.states})

    def decoded(self, stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the model's dtype, of those that slots hold or a block, by name."""
        return stored["keys"], stored["values"]

    @torch.no_grad()
    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step) -> None:
        """Write a decode step's keys and values [B, Hkv, 1, D] behind each row that brings a token."""
        for name, new in self._appended(key_states, value_states).items():
            slots = getattr(self, name)
            if step.partial:
                bring = [b for b, n in enumerate(step.new) if n]
                rows = torch.tensor(bring, dtype=torch.long, device=slots.device)
                slots[rows, :, step.starts(slots.device)[rows]] = new[rows, :, 0]
            elif step.min_start == step.max_start and not step.static:
                slots[:, :, step.min_start].copy_(new[:, :, 0])
            else:
                at = step.starts(slots.device)
                slots[torch.arange(len(at), device=slots.device), :, at] = new[:, :, 0]

    def _appended(self, key_states, value_states) -> dict[str, torch.Tensor]:
        """What a token brings to each stored tensor, by name."""
        keys, values = self._cast(key_states, value_states)
        norms = {} if self.norms is None else {"norms": norms_of(values)}
        return self._encoded({"keys": keys, "values": values} | norms)

    def _encoded(self, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of tokens, by name, in the form in which they are stored."""
        return tokens

    def extended(
        self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of each row's filled keys and values followed by its new tokens: [B, Hkv, step.width, D].

        The new tokens alone, [B, Hkv, columns, D], if no row has a slot.
        """
        key_states, value_states = self._cast(key_states, value_states)
        if step.fresh:
            return key_states, value_states
        keys, values = self.read()
        return _join(keys, key_states, step), _join(values, value_states, step)

    def block_of(
        self,
        extended: tuple[torch.Tensor, torch.Tensor],
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        step: Step,
    ) -> dict[str, torch.Tensor]:
        """What slimming moves of a forward of several tokens, by name: what `extended` has returned, and norms."""
        block = {name: states.detach() for name, states in zip(("keys", "values"), extended, strict=True)}
        if self.norms is not None:
            block["norms"] = self._joined("norms", norms_of(self._cast(key_states, value_states)[1].detach()), step)
        return block

    def _joined(self, name: str, new: torch.Tensor, step: Step) -> torch.Tensor:
        """Each row's filled slots of a tensor, as they are stored, followed by its new ones."""
        if step.fresh:
            return new
        if new.ndim == 4:
            return _join(self.load(name), new, step)
        return _join(self.load(name)[..., None], new[..., None], step)[..., 0]

    def _cast(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States in the dtypes that the slots were made for, which autocast may have changed."""
        return tuple(states.to(dtype) for states, dtype in zip((key_states, value_states), self.dtypes, strict=True))

    # Slimming

    def fill(self, block: dict[str, torch.Tensor], plan: SlimmingPlan) -> None:
        """Write a block, [B, Hkv, n(, D)] by name, to the first n slots, but nothing past a row's end."""
        for name, kept in self._encoded(block).items():
            whole = self.load(name)
            slots = whole[:, :, : kept.shape[2]]
            if plan.ragged:
                filled = plan.masks.filled[..., : kept.shape[2]]
                kept = torch.where(filled if kept.ndim == 3 else filled[..., None], kept, slots)
            _copy(slots, kept)
            self.store(name, whole)

    def compact(self, source: dict[str, torch.Tensor], keep: torch.Tensor, plan: SlimmingPlan, take: Gather) -> None:
        """Move the slots `keep` [B, Hkv, window], ascending, of a source to the front, and clear those after them."""
        for name, old in source.items():
            self.fill({name: take(old, keep)}, plan)
        self._end_rows(plan)

    def fill_holes(self, keep: torch.Tensor, plan: SlimmingPlan) -> None:
        """Keep the slots `keep` [B, Hkv, window]: those of them behind the window move into the holes before it.

        Holes and what fills them are both taken in ascending order.
        """
        window, _ = plan.limits
        slots, most = plan.slots, plan.slots - plan.window  # a row has at most so many holes
        slot = torch.arange(slots, device=self.device)
        kept = torch.zeros(*keep.shape[:2], slots, dtype=torch.bool, device=self.device).scatter(2, keep.long(), True)
        inside = slot < window
        holes, fillers = (torch.where(mask, slot, slot + slots) for mask in (inside & ~kept, kept & ~inside))
        to, of = (candidates.sort(dim=-1).values[..., :most] for candidates in (holes, fillers))
        of, to = torch.where(to < slots, of, to) % slots, to % slots  # where no hole is left, a slot that stays
        for name in self.stored():
            whole = self.load(name)
            moved = gather(whole, of)
            whole.scatter_(2, to if moved.ndim == 3 else to[..., None].expand_as(moved), moved)
            self.store(name, whole)
        self._end_rows(plan)

    def _end_rows(self, plan: SlimmingPlan) -> None:
        """Clear the slots past each row's end, and continue its positions there."""
        for name in ("mass", "count", "norms"):
            if getattr(self, name) is not None:
                slots = self.load(name)
                if plan.even:
                    slots[:, :, plan.window :].zero_()
                else:
                    slots.masked_fill_(~plan.masks.filled, 0.0)
                self.store(name, slots)
        positions = self.load("positions")
        torch.where(plan.masks.filled, positions, plan.masks.upcoming, out=positions)
        self.store("positions", positions)

    # For kernels that move slots

    @staticmethod
    def vectors(name: str, of: torch.Tensor) -> torch.Tensor:
        """A tensor of `states` with a last dimension, as keys and values have."""
        return of if name in ("keys", "values") else of[..., None]

    def empty_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where to write keys and values of a block for `overwrite`: here the slots themselves."""
        return self.keys, self.values

    def overwrite(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store what was written to `empty_states`."""

    # Rows

    def reorder(self, order: torch.Tensor) -> None:
        """Let row b continue row order[b]."""
        for slots in self.stored().values():
            slots.copy_(slots.index_select(0, order.to(slots.device)))

    def take_rows(self, rows: list[int], source: Slots, source_rows: list[int]) -> None:
        """Replace rows by copies of another layer's rows."""
        theirs = source.stored()
        if _adjacent(rows) and _adjacent(source_rows):  # one copy, where indices would take two at half the speed
            to, of = (slice(indices[0], indices[0] + len(rows)) for indices in (rows, source_rows))
            for name, slots in self.stored().items():
                if slots[to].data_ptr() != theirs[name][of].data_ptr():  # the others were made `within` these
                    slots[to].copy_(theirs[name][of])
            return
        to, of = (to_device(indices, self.device) for indices in (rows, source_rows))
        for name, slots in self.stored().items():
            slots.index_copy_(0, to, theirs[name].index_select(0, of))

    @staticmethod
    def clear(of_layers: list[Slots], states: bool = True) -> None:
        """Let slots forget all tokens, in a few launches for any number of layers; without `states`, keys and values
        stay."""
        alike: dict[tuple, list[torch.Tensor]] = {}
        positions: dict[tuple, list[Slots]] = {}
        for slots in of_layers:
            for tensor in slots._cleared(states):
                alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
            positions.setdefault((slots.device, slots.capacities or slots.capacity), []).append(slots)
        for tensors in alike.values():
            torch._foreach_zero_(tensors)
        for same in positions.values():
            whole = same[0].positions.copy_(same[0]._first_positions())
            if len(same) > 1:
                torch._foreach_copy_([slots.positions for slots in same[1:]], [whole] * (len(same) - 1))


class HeadSlots(Slots):
    """Slots of heads with capacities of their own, which lie one after the other in one buffer.

    keys, values [B, total, D]; mass, count, norms and positions [B, total]: head h has the slots from offsets[h] to
    offsets[h + 1], int32 [Hkv + 1]. Torch's methods take each head of a row for a row of one head, padded to the
    longest: states and blocks are [B * Hkv, 1, n(, D)], and what `load` gives is a copy that `store` writes back.

    Args:
        key_states, value_states: [B, Hkv, any, D].
        capacities: slots of each KV head.
        ranked: as in `Slots`.
    """

    plain = False

    @torch.inference_mode(False)
    def __init__(self, key_states: torch.Tensor, value_states: torch.Tensor, capacities: list[int], ranked=()):
        device, self.capacities, self.capacity = key_states.device, tuple(capacities), max(capacities)
        batch, self.heads, _, self.head_dim = key_states.shape
        self._allocate(key_states, value_states, (batch, sum(capacities)), tuple(ranked))
        begins = [0, *itertools.accumulate(capacities)]
        self.offsets = torch.tensor(begins, dtype=torch.int32, device=device)
        # where the slots of the buffer lie in [Hkv, longest], and those in the buffer; past a head's end its last slot
        heads = torch.arange(self.heads).repeat_interleave(torch.tensor(capacities))
        positions = self._first_positions()
        self._to_buffer = heads.to(device) * self.capacity + positions
        slot = torch.arange(self.capacity).expand(self.heads, -1)
        last = torch.tensor(capacities)[:, None] - 1
        self._to_heads = (torch.tensor(begins[:-1])[:, None] + slot.minimum(last)).flatten().to(device)
        self.positions = positions.expand(batch, -1).contiguous()

    def _first_positions(self) -> torch.Tensor:
        return torch.cat([torch.arange(n, dtype=torch.int32) for n in self.capacities]).to(self.device)

    def load(self, name: str) -> torch.Tensor:
        slots = getattr(self, name)[:, self._to_heads]
        return slots.view(-1, 1, self.capacity, *slots.shape[2:])

    def store(self, name: str, slots: torch.Tensor) -> None:
        buffer = getattr(self, name)
        buffer.copy_(slots.view(len(buffer), -1, *slots.shape[3:])[:, self._to_buffer])

    @torch.no_grad()
    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step) -> None:
        begins = self.offsets[:-1].long().repeat(len(self.keys))
        row = torch.arange(len(self.keys), device=self.device).repeat_interleave(self.heads)
        at = row * self.positions.shape[1] + begins + step.starts(self.device)
        for name, new in self._appended(key_states, value_states).items():
            buffer, new = getattr(self, name).flatten(0, 1), new[:, 0, 0]
            if step.partial:
                bring = torch.tensor([r for r, n in enumerate(step.new) if n], dtype=torch.long, device=self.device)
                buffer[at[bring]] = new[bring]
            else:
                buffer[at] = new


def _copy(to: torch.Tensor, of: torch.Tensor) -> None:
    """Copy `of` to `to`, vectors eight bytes at a time: torch gives each element of strided tensors to one thread."""
    vectors = to.ndim == 4 and to.dtype == of.dtype and to.element_size() < 8
    if vectors and all(_in_words(tensor) for tensor in (to, of)):
        to, of = to.view(torch.int64), of.view(torch.int64)
    to.copy_(of)


def _in_words(tensor: torch.Tensor) -> bool:
    """Whether each vector of a tensor [..., D] lies in whole words of eight bytes."""
    *strides, last = tensor.stride()
    in_elements = (*strides, tensor.shape[-1], tensor.storage_offset())
    return last == 1 and all(size * tensor.element_size() % 8 == 0 for size in in_elements)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _ascending(n: int, device: torch.device) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32, device=device)


def _adjacent(rows: list[int]) -> bool:
    return bool(rows) and rows == list(range(rows[0], rows[0] + len(rows)))


def norms_of(values: torch.Tensor) -> torch.Tensor:
    """L2 norms of [..., D], in float32."""
    return torch.linalg.vector_norm(
        values, dim=-1, dtype=torch.float32 if values.dtype != torch.float64 else None
    ).float()


def _join(slots: torch.Tensor, new: torch.Tensor, step: Step) -> torch.Tensor:
    """Each row's filled slots followed by its new tokens: [B, Hkv, step.width, D]."""
    if step.min_start == step.max_start:
        return torch.cat([slots[:, :, : step.max_start], new], dim=2)
    joined = new.new_zeros(*new.shape[:2], step.width, new.shape[-1])
    joined[:, :, : step.max_start] = slots[:, :, : step.max_start]
    at = step.starts(new.device)[:, None] + torch.arange(step.columns, device=new.device)
    return joined.scatter(2, at[:, None, :, None].expand_as(new), new)


def gather(old: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The kept slots of [B, Hkv, slots(, D)] by gather."""
    if old.ndim == 3:
        return old.gather(2, keep)
    dtype = old.dtype
    if old.shape[-1] * old.itemsize % 8 == 0:  # move 8 bytes per index, not 2
        old = old.view(torch.int64)
    return old.gather(2, keep[..., None].expand(*keep.shape, old.shape[-1])).view(dtype)


def gather_by_mask(old: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The kept slots as H2O takes them: by a boolean mask over the slots and a copy."""
    mask = torch.zeros(old.shape[:3], dtype=torch.bool, device=old.device).scatter(2, keep.long(), True)
    return old[mask].view(*keep.shape, *old.shape[3:])
