"""Storage of one layer: where each token's key, value, mass and position lie, and how they move."""

from __future__ import annotations

from collections.abc import Callable

import torch

from utils.step import SlimmingPlan, Step

Gather = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # kept slots [B, Hkv, m(, D)] of all, and which they are


class Slots:
    """The slots of one layer, allocated once and never moved. One slot index means the same token in all tensors.

    keys, values [B, Hkv, capacity, D]; mass (and count, where it is asked for) [B, Hkv, capacity] float32, zero past a
    row's length; positions [B, Hkv, capacity] int32, counted on past a row's end: appending need not write them.

    Args:
        key_states, value_states: [B, Hkv, any, D], of the dtypes and on the device that slots get.
        capacity: slots of a row and head.
        ranked: "mass" and "count", as far as slots are ranked by them.
    """

    @torch.inference_mode(False)  # slots outlive the mode they are made in
    def __init__(
        self, key_states: torch.Tensor, value_states: torch.Tensor, capacity: int, ranked: tuple[str, ...] = ()
    ):
        slots = (*key_states.shape[:2], capacity)
        self.device, self.capacity, self.ranked = key_states.device, capacity, ranked
        self.keys = key_states.new_zeros(*slots, key_states.shape[-1])
        self.values = value_states.new_zeros(*slots, value_states.shape[-1])
        self.mass = torch.zeros(slots, dtype=torch.float32, device=self.device)
        self.count = torch.zeros_like(self.mass) if "count" in ranked else None
        self.positions = torch.arange(capacity, dtype=torch.int32, device=self.device).expand(slots).contiguous()

    def empty_like(self, batch_size: int) -> Slots:
        """Others of the same kind, for so many rows."""
        states = (of[:1].expand(batch_size, -1, -1, -1) for of in (self.keys, self.values))
        return Slots(*states, self.capacity, self.ranked)

    def suit(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether states are of the dtypes, device, heads and head_dims of these slots."""
        pairs = (self.keys, key_states), (self.values, value_states)
        return all(
            (slots.dtype, slots.device, slots.shape[1], slots.shape[3])
            == (states.dtype, states.device, states.shape[1], states.shape[3])
            for slots, states in pairs
        )

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, filled or not."""
        tensors = (self.keys, self.values, self.positions, self.mass, self.count)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What moves with a token, by name: mass and count only where slots are ranked by them."""
        return {name: getattr(self, name) for name in ("keys", "values", "positions", *self.ranked)}

    # A forward

    def read(self, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `width` slots, or of all, as views: [B, Hkv, width, D]."""
        if width is None:
            return self.keys, self.values
        return self.keys[:, :, :width], self.values[:, :, :width]

    @torch.no_grad()
    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step) -> None:
        """Write a decode step's keys and values [B, Hkv, 1, D] behind each row that brings a token."""
        for slots, new in zip(self.read(), self._cast(key_states, value_states), strict=True):
            if step.partial:
                bring = [b for b, n in enumerate(step.new) if n]
                rows = torch.tensor(bring, dtype=torch.long, device=slots.device)
                slots[rows, :, step.starts(slots.device)[rows]] = new[rows, :, 0]
            elif step.min_start == step.max_start and not step.static:
                slots[:, :, step.min_start].copy_(new[:, :, 0])
            else:
                at = step.starts(slots.device)
                slots[torch.arange(len(at), device=slots.device), :, at] = new[:, :, 0]

    def extended(
        self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of each row's filled slots, then its new tokens: [B, Hkv, step.width, D] beside the slots."""
        key_states, value_states = self._cast(key_states, value_states)
        return _join(self.keys, key_states, step), _join(self.values, value_states, step)

    def _cast(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A turn under autocast, or one after it, may compute in another dtype than that of the slots."""
        return key_states.to(self.keys.dtype), value_states.to(self.values.dtype)

    # Slimming

    def fill(self, block: dict[str, torch.Tensor], plan: SlimmingPlan) -> None:
        """Take over a block, [B, Hkv, n(, D)] by name, into the first n slots; nothing past a row's end."""
        for name, kept in block.items():
            slots = getattr(self, name)[:, :, : kept.shape[2]]
            if plan.ragged:
                filled = plan.masks.filled[..., : kept.shape[2]]
                kept = torch.where(filled if kept.ndim == 3 else filled[..., None], kept, slots)
            slots.copy_(kept)

    def compact(self, source: dict[str, torch.Tensor], keep: torch.Tensor, plan: SlimmingPlan, take: Gather) -> None:
        """Bring the slots `keep` [B, Hkv, window], ascending, of a source to the front, and clear what follows them."""
        for name, old in source.items():
            self.fill({name: take(old, keep)}, plan)
        for slots in (self.mass, self.count):
            if slots is not None:
                slots[:, :, plan.window :].zero_()
        torch.where(plan.masks.filled, self.positions, plan.masks.upcoming, out=self.positions)

    # Rows

    def reorder(self, order: torch.Tensor) -> None:
        """Let row b continue row order[b]."""
        for slots in self.tensors().values():
            slots.copy_(slots.index_select(0, order.to(slots.device)))

    def take_rows(self, rows: list[int], source: Slots, source_rows: list[int]) -> None:
        """Replace rows by copies of another layer's."""
        to, of = (torch.tensor(indices, device=self.device) for indices in (rows, source_rows))
        for name, slots in self.tensors().items():
            slots.index_copy_(0, to, getattr(source, name).index_select(0, of))

    def clear(self) -> None:
        for slots in (self.keys, self.values, self.mass, self.count):
            if slots is not None:
                slots.zero_()
        self.positions.copy_(torch.arange(self.capacity, dtype=torch.int32, device=self.device))


def _join(slots: torch.Tensor, new: torch.Tensor, step: Step) -> torch.Tensor:
    """Each row's filled slots, then its new tokens: [B, Hkv, step.width, D]."""
    if step.max_start == 0:
        return new
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
    if old.shape[-1] * old.itemsize % 8 == 0:  # move 8 bytes with each index, not 2
        old = old.view(torch.int64)
    return old.gather(2, keep[..., None].expand(*keep.shape, old.shape[-1])).view(dtype)


def gather_by_mask(old: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The same as H2O does it: a boolean mask over the slots, and a copy of what it leaves."""
    mask = torch.zeros(old.shape[:3], dtype=torch.bool, device=old.device).scatter(2, keep.long(), True)
    return old[mask].view(*keep.shape, *old.shape[3:])
