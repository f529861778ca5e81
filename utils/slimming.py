"""Slimming one layer: a policy picks the slots to keep, which then move to the front."""

from __future__ import annotations

from functools import cached_property

import torch

from utils.policies import Policy
from utils.slots import Slots, gather
from utils.step import SlimmingPlan


class Slimming:
    """One slimming of one layer: the policy's candidates (its slots, or a pending block), and their destination.

    Args:
        slots: the layer's slots, the destination.
        block: keys, values, mass and count [B, Hkv, width(, D)] of the slots followed by new tokens that are not in
            the slots yet; None to slim the slots themselves.
        plan: shared by all layers on the device.
        policy: ranks the candidates.
        layer_idx, seed: inputs of random ranks.
        kept: int32 [B, Hkv, window_length + 1], `Rows.kept`, if the slimmer uses kernels.
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
    ):
        self.slots, self.plan, self.policy, self.layer_idx, self.seed = slots, plan, policy, layer_idx, seed
        self.kept = kept
        self._source = slots.tensors() if block is None else block
        self.keys, self.values = self._source["keys"], self._source["values"]
        self.mass, self.count = self._source.get("mass"), self._source.get("count")

    @cached_property
    def positions(self) -> torch.Tensor:
        """int32 [B, Hkv, width]. A block's are built on demand, because the kernels do not need them."""
        if "positions" in self._source:
            return self._source["positions"]
        slots, width = self.slots.positions, self.plan.slots
        filled = min(slots.shape[2], width)
        new = self.plan.masks.appended[..., filled:width].expand(*slots.shape[:2], -1)
        return torch.cat([slots[:, :, :filled], new], dim=-1)

    def scores(self) -> torch.Tensor:
        """float32 [B, Hkv, width]; the greatest are kept."""
        return self.policy.score(self)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that move with a token, by name."""
        return self._source | {"positions": self.positions}


class TorchSlimmer:
    """Slimming in torch. The Triton slimmer has the same two methods."""

    by_kernel = False  # whether kernels slim and need `Rows.kept`

    def pick(self, slimming: Slimming) -> torch.Tensor:
        """The slots to keep, ascending: int64 or int32 [B, Hkv, window]. Moves nothing."""
        masks = slimming.plan.masks
        return select_slots(slimming.scores(), masks.empty, masks.recent, slimming.plan.window)

    def slim(self, slimming: Slimming) -> None:
        """Move the slots to keep to the front."""
        slimming.slots.compact(slimming.tensors(), self.pick(slimming), slimming.plan, gather)


def select_slots(score: torch.Tensor, empty: torch.Tensor, recent: torch.Tensor, window: int) -> torch.Tensor:
    """The slots to keep, `window` in total: all recent ones, then the older ones with the greatest score.

    Args:
        score: [B, Hkv, slots], finite, float.
        empty, recent: bool [B, 1, slots]. Recent slots are kept whatever their score; empty slots are kept only to
            fill up rows shorter than the window.
        window: slots to keep; if there are fewer, all are kept.

    Returns: int64 [B, Hkv, min(window, slots)], ascending. Ties keep the older slot. A row no longer than the window
    keeps every slot in place.
    """
    score = score.masked_fill(recent, torch.inf).masked_fill(empty, -torch.inf)
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :window].sort(dim=-1).values
