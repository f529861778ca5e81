"""Storage of one layer: where each token's key, value, mass and position are stored, and how they move."""

from __future__ import annotations

from collections.abc import Callable

import torch

from utils.step import SlimmingPlan, Step

Gather = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (all slots, indices to keep) -> [B, Hkv, m(, D)]


class Slots:
    """The slots of one layer, allocated once and never moved. A slot index refers to the same token in all tensors.

    keys, values [B, Hkv, capacity, D]; mass (and count, if requested) [B, Hkv, capacity] float32, zero past a row's
    length; positions [B, Hkv, capacity] int32, continued past a row's end so that appends need not write them.

    Args:
        key_states, value_states: [B, Hkv, any, D], with the dtypes and device of the slots.
        capacity: slots per row and KV head.
        ranked: those of "mass" and "count" that slots are ranked by.
    """

    @torch.inference_mode(False)  # slots outlive the caller's inference mode
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
        """New empty slots of the same kind for `batch_size` rows."""
        states = (of[:1].expand(batch_size, -1, -1, -1) for of in (self.keys, self.values))
        return Slots(*states, self.capacity, self.ranked)

    def suit(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether states match the dtypes, device, heads and head_dims of these slots."""
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
        """The tensors that move with a token, by name: mass and count only if slots are ranked by them."""
        return {name: getattr(self, name) for name in ("keys", "values", "positions", *self.ranked)}

    # A forward

    def read(self, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values of the first `width` slots (default: all): [B, Hkv, width, D]."""
        if width is None:
            return self.keys, self.values
        return self.keys[:, :, :width], self.values[:, :, :width]

    @torch.no_grad()
    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step) -> None:
        """Append a decode step's keys and values [B, Hkv, 1, D] to each row that brings a token."""
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
        """Copies of each row's filled keys and values followed by its new tokens: [B, Hkv, step.width, D]."""
        key_states, value_states = self._cast(key_states, value_states)
        return _join(self.keys, key_states, step), _join(self.values, value_states, step)

    def _cast(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cast to the slots' dtype, which a forward in or after autocast may not share."""
        return key_states.to(self.keys.dtype), value_states.to(self.values.dtype)

    # Slimming

    def fill(self, block: dict[str, torch.Tensor], plan: SlimmingPlan) -> None:
        """Copy a block, [B, Hkv, n(, D)] by name, into the first n slots, but nothing past a row's end."""
        for name, kept in block.items():
            slots = getattr(self, name)[:, :, : kept.shape[2]]
            if plan.ragged:
                filled = plan.masks.filled[..., : kept.shape[2]]
                kept = torch.where(filled if kept.ndim == 3 else filled[..., None], kept, slots)
            slots.copy_(kept)

    def compact(self, source: dict[str, torch.Tensor], keep: torch.Tensor, plan: SlimmingPlan, take: Gather) -> None:
        """Move the source's slots `keep` [B, Hkv, window] (ascending) to the front, and clear the mass behind them."""
        for name, old in source.items():
            self.fill({name: take(old, keep)}, plan)
        for slots in (self.mass, self.count):
            if slots is not None:
                slots[:, :, plan.window :].zero_()
        torch.where(plan.masks.filled, self.positions, plan.masks.upcoming, out=self.positions)

    # Rows

    def reorder(self, order: torch.Tensor) -> None:
        """Make row b a copy of row order[b]."""
        for slots in self.tensors().values():
            slots.copy_(slots.index_select(0, order.to(slots.device)))

    def take_rows(self, rows: list[int], source: Slots, source_rows: list[int]) -> None:
        """Replace rows with copies of another layer's rows."""
        to, of = (torch.tensor(indices, device=self.device) for indices in (rows, source_rows))
        for name, slots in self.tensors().items():
            slots.index_copy_(0, to, getattr(source, name).index_select(0, of))

    def clear(self) -> None:
        for slots in (self.keys, self.values, self.mass, self.count):
            if slots is not None:
                slots.zero_()
        self.positions.copy_(torch.arange(self.capacity, dtype=torch.int32, device=self.device))


def _join(slots: torch.Tensor, new: torch.Tensor, step: Step) -> torch.Tensor:
    """Each row's filled slots followed by its new tokens: [B, Hkv, step.width, D]."""
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
    if old.shape[-1] * old.itemsize % 8 == 0:  # move 8 bytes per index, not 2
        old = old.view(torch.int64)
    return old.gather(2, keep[..., None].expand(*keep.shape, old.shape[-1])).view(dtype)


def gather_by_mask(old: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The kept slots as H2O takes them: by a boolean mask over the slots and a copy."""
    mask = torch.zeros(old.shape[:3], dtype=torch.bool, device=old.device).scatter(2, keep.long(), True)
    return old[mask].view(*keep.shape, *old.shape[3:])
