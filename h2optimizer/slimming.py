"""Chooses what slims: torch, or Triton kernels if these decode as well."""

from __future__ import annotations

import torch

from h2optimizer.backends import KERNEL_BACKENDS
from utils.policies import random_salt
from utils.slimming import Slimming, TorchSlimmer
from utils.slots import gather


def slimmer_of(backend: str) -> TorchSlimmer:
    """The slimmer for a backend, as named by `resolve_backend`."""
    return KernelSlimmer() if backend in KERNEL_BACKENDS else TorchSlimmer()


class KernelSlimmer(TorchSlimmer):
    """Slimming in two launches. Torch picks the slots if a row is too wide for the kernel that ranks."""

    by_kernel = True

    def pick(self, slimming: Slimming) -> torch.Tensor:
        if not _ranks(slimming):
            return super().pick(slimming)
        _select(slimming, move=False)
        return slimming.kept[..., : slimming.plan.window]

    def slim(self, slimming: Slimming) -> None:
        from h2optimizer.kernels import slimming as kernels

        slots, plan, kept = slimming.slots, slimming.plan, slimming.kept
        ranks = _ranks(slimming)
        if ranks:
            _select(slimming, move=True)
        else:
            keep = super().pick(slimming)
            kernels.hand_over(keep, kept)
        kernels.compact(*slots.read(), slimming.keys, slimming.values, plan.mirror, kept, plan.window)
        if not ranks:  # otherwise `_select` has moved the rest already
            rest = {name: old for name, old in slimming.tensors().items() if name not in ("keys", "values")}
            slots.compact(rest, keep, plan, gather)


def _ranks(slimming: Slimming) -> bool:
    from h2optimizer.kernels import slimming as kernels

    return max(slimming.plan.slots, slimming.plan.capacity) <= kernels.MAX_SLOTS


def _select(slimming: Slimming, move: bool) -> None:
    """Write the slots to keep to `kept`; with `move`, also move positions, mass and count to the front."""
    from h2optimizer.kernels import slimming as kernels

    slots, plan, policy = slimming.slots, slimming.plan, slimming.policy
    rank, order, salt = policy.rank, None, 0
    if rank is None:
        rank, order = "order", slimming.scores().contiguous()
    elif rank == "mass" and slimming.count is not None:
        rank = "mean"
    if policy.seeded:
        salt = random_salt(slimming.layer_idx, slimming.seed)
    mass = None if slimming.mass is None else slots.mass
    sources = (None if source is None else source.contiguous() for source in (slimming.mass, slimming.count))
    kernels.select(
        slots.positions, mass, slots.count, *sources, plan.slots, plan.mirror, slimming.kept, plan.heavy, plan.recent,
        rank, salt, move, order,
    )  # fmt: skip
