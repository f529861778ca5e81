"""Slimming one layer: a policy picks the slots to keep, which then move to the front."""

from __future__ import annotations

from functools import cached_property

import torch

from h2optimizer.utils.policies import Policy
from h2optimizer.utils.prefix import LayerPrefix, followed_by
from h2optimizer.utils.slots import Slots, gather
from h2optimizer.utils.step import SlimmingPlan


class Slimming:
    """One slimming of one layer: the policy's candidates (its slots, or a pending block), and their destination.

    Args:
        slots: the layer's slots, the destination.
        block: keys, values, mass and count [B, Hkv, width(, D)] of the slots followed by new tokens that are not in
            the slots yet; None to slim the slots themselves.
        prefix: tokens that come before those of the block and take part. The block's keys and values do not contain
            them, so that they are not copied for each row; all else does.
        plan: shared by all layers on the device.
        policy: ranks the candidates.
        layer_idx, seed: inputs of random ranks.
        kept: int32 [B, Hkv, capacity], `Rows.kept`, if the slimmer uses kernels.
        in_order: whether slots have to stay in the order of their tokens.
    """

    def __init__(
        self,
        slots: Slots,
        block: dict[str, torch.Tensor] | None,
        plan: SlimmingPlan,
        policy: Policy,
        layer_idx: int,
        seed: int,
        kept: torch.Tensor | None = None,
        prefix: LayerPrefix | None = None,
        in_order: bool = False,
    ):
        self.prefix = prefix
        self.fills_holes = block is None and not in_order  # few slots move, for most of them stay
        self.slots, self.plan, self.policy, self.layer_idx, self.seed = slots, plan, policy, layer_idx, seed
        self.kept, self.block, self.heads = kept, block, slots.heads

    def stored(self, name: str) -> torch.Tensor | None:
        """A tensor of the slots as stored, or of the block, [B, Hkv, width(, D)]; None where nothing ranks by it."""
        if self.block is None:
            return self.slots.stored().get(name)
        of = self.block.get(name)
        rows = self.slots.keys.shape[0]  # of the batch, where the plan's are heads
        return of if of is None or of.shape[0] == rows else of.view(rows, -1, *of.shape[2:])

    @cached_property
    def _source(self) -> dict[str, torch.Tensor]:
        return self.slots.tensors() if self.block is None else self.block

    @cached_property
    def _states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all candidates, which the kernels do not need: in a copy with a prefix, or of 8 bits."""
        own = self.slots.decoded(self._source)
        if self.prefix is None:
            return own
        return tuple(followed_by(*pair) for pair in zip(self.prefix[:2], own, strict=True))

    @property
    def keys(self) -> torch.Tensor:
        return self._states[0]

    @property
    def values(self) -> torch.Tensor:
        return self._states[1]

    @property
    def mass(self) -> torch.Tensor | None:
        return self._source.get("mass")

    @property
    def count(self) -> torch.Tensor | None:
        return self._source.get("count")

    @property
    def norms(self) -> torch.Tensor | None:
        return self._source.get("norms")

    @cached_property
    def positions(self) -> torch.Tensor:
        """int32 [B, Hkv, width]. A block's are built on demand, because the kernels do not need them."""
        if "positions" in self._source:
            return self._source["positions"]
        slots, width = self.slots.load("positions"), self.plan.slots
        filled = min(slots.shape[2], width)
        if self.slots.capacities:  # a short head has no position for each of the block's columns
            past = torch.arange(filled, device=slots.device) >= self.plan.of_rows(self.slots.offsets.diff())
            slots = torch.where(past, self.plan.masks.appended[..., :filled], slots[:, :, :filled])
        new = self.plan.masks.appended[..., filled:width].expand(*slots.shape[:2], -1)
        return torch.cat([slots[:, :, :filled], new], dim=-1)

    def scores(self) -> torch.Tensor:
        """float32 [B, Hkv, width]; the greatest are kept."""
        return self.policy.score(self)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that move with a token, by name."""
        return self.moved() | {"positions": self.positions}

    def moved(self, states: bool = True) -> dict[str, torch.Tensor]:
        """What moves with a token but its position, by name; without `states`, neither do its key and value."""
        left_out = ("positions",) if states else (*self.slots.states, "positions")
        moved = {name: of for name, of in self._source.items() if name not in left_out}
        if states and self.prefix is not None:
            moved |= {"keys": self.keys, "values": self.values}
        return moved


class TorchSlimmer:
    """Slimming in torch. The Triton slimmer has the same two methods."""

    most_slots = 0  # that kernels can pick from
    by_kernel = False  # whether kernels slim and need `Rows.kept`

    def pick(self, slimming: Slimming) -> torch.Tensor:
        """The slots to keep, ascending: int64 or int32 [B, Hkv, window]. Moves nothing."""
        plan, positions = slimming.plan, slimming.positions
        empty, recent = plan.masks.empty, positions >= plan.masks.first_recent
        windows = None if plan.even else plan.limits[0]
        return select_slots(slimming.scores(), empty, recent & ~empty, plan.window, windows, positions)

    def slim(self, slimming: Slimming) -> None:
        """Move the slots to keep into the window."""
        keep = self.pick(slimming)
        if slimming.fills_holes:
            slimming.slots.fill_holes(keep, slimming.plan)
        else:
            slimming.slots.compact(slimming.tensors(), keep, slimming.plan, gather)


def select_slots(
    score: torch.Tensor,
    empty: torch.Tensor,
    recent: torch.Tensor,
    window: int,
    windows: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """The slots to keep: all recent ones and, of the older ones, those with the greatest score, `window` together.

    Args:
        score: [B, Hkv, slots], finite, float.
        empty, recent: bool [B, 1 or Hkv, slots]; recent slots are kept whatever their score, empty ones only where a
            row is shorter than the window, to fill it up.
        window: slots to keep; all `slots` when there are no more.
        windows: int [B, 1, 1], the rows' own windows where they differ; `window` is the largest. A shorter row ends
            with the last slot, repeated.
        positions: int [B, Hkv, slots], which tell the older of two slots, and are greatest in empty ones. None if slots
            are in the order of their tokens.

    Returns: int64 [B, Hkv, min(window, slots)], ascending. Of equal scores the older slot is kept. A row that is not
    longer than the window keeps every slot where it is.
    """
    score = score.masked_fill(recent, torch.inf).masked_fill(empty, -torch.inf)
    if positions is None:
        best = score.sort(dim=-1, descending=True, stable=True).indices[..., :window]
    else:
        by_age = positions.argsort(dim=-1)
        best = score.gather(-1, by_age).sort(dim=-1, descending=True, stable=True).indices[..., :window]
        best = by_age.gather(-1, best)
    if windows is not None:
        rank = torch.arange(best.shape[-1], device=best.device)
        best = best.masked_fill(rank >= windows, score.shape[-1] - 1)
    return best.sort(dim=-1).values
