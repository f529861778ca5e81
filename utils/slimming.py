"""Slimming one layer: picking the slots that stay, by a policy, and bringing them to the front."""

from __future__ import annotations

from functools import cached_property

import torch

from utils.policies import Policy
from utils.slots import Slots, gather
from utils.step import SlimmingPlan


class Slimming:
    """One slimming of one layer: its slots, or a pending block, as the policy's candidates, and where the kept go.

    Args:
        slots: of the layer.
        block: keys and values, mass and count [B, Hkv, width(, D)] of slots and new tokens that are not in the slots
            yet; None where the slots themselves are slimmed.
        plan: of all layers on the device.
        policy: that ranks.
        layer_idx, seed: what random ranks depend on.
        kept: int32 [B, Hkv, window_length + 1], `Rows.kept`, where the slimmer is made of kernels.
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
        """int32 [B, Hkv, width]; a block's are joined when they are asked for: the kernels do without."""
        if "positions" in self._source:
            return self._source["positions"]
        slots, width = self.slots.positions, self.plan.slots
        filled = min(slots.shape[2], width)
        new = self.plan.masks.appended[..., filled:width].expand(*slots.shape[:2], -1)
        return torch.cat([slots[:, :, :filled], new], dim=-1)

    def scores(self) -> torch.Tensor:
        """float32 [B, Hkv, width], the greatest are kept."""
        return self.policy.score(self)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that moves with a token, by name."""
        return self._source | {"positions": self.positions}


class TorchSlimmer:
    """Slimming in torch. The kernels' has the same two methods."""

    by_kernel = False  # whether kernels slim, which pass `Rows.kept` on

    def pick(self, slimming: Slimming) -> torch.Tensor:
        """The slots that stay, ascending: int64 or int32 [B, Hkv, window]. Nothing moves."""
        masks = slimming.plan.masks
        return select_slots(slimming.scores(), masks.empty, masks.recent, slimming.plan.window)

    def slim(self, slimming: Slimming) -> None:
        """Bring the slots that stay to the front."""
        slimming.slots.compact(slimming.tensors(), self.pick(slimming), slimming.plan, gather)


def select_slots(score: torch.Tensor, empty: torch.Tensor, recent: torch.Tensor, window: int) -> torch.Tensor:
    """The slots to keep: all recent ones and, of the older ones, those with the greatest score, `window` together.

    Args:
        score: [B, Hkv, slots], finite, float.
        empty, recent: bool [B, 1, slots]; recent slots are kept whatever their score, empty ones only where a row is
            shorter than the window, to fill it up.
        window: slots to keep; all `slots` when there are no more.

    Returns: int64 [B, Hkv, min(window, slots)], ascending. Of equal scores the older slot is kept. A row that is not
    longer than the window keeps every slot where it is.
    """
    score = score.masked_fill(recent, torch.inf).masked_fill(empty, -torch.inf)
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :window].sort(dim=-1).values
