"""Chooses what slims: torch, or Triton kernels if these decode as well."""

from __future__ import annotations

import torch

from h2optimizer.backends import KERNEL_BACKENDS
from h2optimizer.utils.policies import random_salt
from h2optimizer.utils.slimming import Slimming, TorchSlimmer
from h2optimizer.utils.slots import gather


def slimmer_of(backend: str) -> TorchSlimmer:
    """The slimmer for a backend, as named by `resolve_backend`."""
    return KernelSlimmer() if backend in KERNEL_BACKENDS else TorchSlimmer()


class KernelSlimmer(TorchSlimmer):
    """Slimming in one launch, or in two. Torch picks the slots if a row is too wide for the kernels that rank."""

    by_kernel = True

    @property
    def most_slots(self) -> int:
        from h2optimizer.kernels.slimming import MAX_SLOTS

        return MAX_SLOTS

    def _ranks(self, slimming: Slimming) -> bool:
        """Whether the kernels that pick take so many slots."""
        return max(slimming.plan.slots, slimming.plan.capacity) <= self.most_slots

    def pick(self, slimming: Slimming) -> torch.Tensor:
        if not self._ranks(slimming) or not slimming.plan.even:
            return super().pick(slimming)
        _select(slimming, move=False)
        return slimming.kept[..., : slimming.plan.window]

    def slim(self, slimming: Slimming) -> None:
        from h2optimizer.kernels import slimming as kernels

        slots, plan, kept, ranks = slimming.slots, slimming.plan, slimming.kept, self._ranks(slimming)
        if not ranks and (slimming.fills_holes or not plan.even):
            super().slim(slimming)
            return
        if slimming.fills_holes:
            _fill_holes(slimming)
            return
        if ranks:
            _select(slimming, move=True)
        else:
            keep = super().pick(slimming)
            kernels.hand_over(keep, kept)
        _compact(slimming)
        if not ranks:  # otherwise `_select` has moved the rest already
            slots.compact(slimming.moved(states=False) | {"positions": slimming.positions}, keep, plan, gather)


def _heads(slimming: Slimming):
    """What the kernels need to know of heads with windows of their own."""
    plan, slots = slimming.plan, slimming.slots
    if plan.even:
        return None
    from h2optimizer.kernels.slimming import Heads, classes_of

    return Heads(slots.offsets, plan.split_there, classes_of(slots.capacities, slots.device), slimming.block is None)


def _rank(slimming: Slimming) -> tuple[str, torch.Tensor | None, int]:
    """What the kernels rank by: the name of a rank, scores where they have none of their own, and the salt."""
    policy = slimming.policy
    salt = random_salt(slimming.layer_idx, slimming.seed) if policy.seeded else 0
    if policy.rank is None:
        return "order", slimming.scores().contiguous(), salt
    return "mean" if policy.rank == "mass" and slimming.slots.count is not None else policy.rank, None, salt


def _select(slimming: Slimming, move: bool) -> None:
    """Write the slots to keep to `kept`; with `move`, also move positions, mass, count and norms to the front."""
    from h2optimizer.kernels import slimming as kernels

    slots, plan, (rank, scores, salt) = slimming.slots, slimming.plan, _rank(slimming)
    mass, norms = [getattr(slots, name) if name in slots.ranked else None for name in ("mass", "norms")]
    sources = [slimming.stored(name) for name in ("mass", "count", "norms")]
    source_mass, source_count, source_norms = [None if of is None else of.contiguous() for of in sources]
    kernels.select(
        slots.positions, mass, slots.count, source_mass, source_count, plan.slots, plan.mirror, slimming.kept,
        int(plan.heavy[0]), int(plan.recent[0]), rank, salt, move, scores, norms, source_norms, _heads(slimming),
    )  # fmt: skip


def _compact(slimming: Slimming) -> None:
    """Move keys and values of the slots that `kept` names to the front."""
    from h2optimizer.kernels import slimming as kernels

    slots, plan = slimming.slots, slimming.plan
    rest = plan.mirror, slimming.kept, plan.window, _heads(slimming)
    prefix = None if slimming.prefix is None else slimming.prefix[:2]
    source = slimming.stored("keys"), slimming.stored("values")
    if source[0].dtype != slots.keys.dtype:  # of a prompt: moved first, then stored in another form
        to = slots.empty_states()
        kernels.compact(*to, *source, *rest, prefix)
        slots.overwrite(*to)
        return
    for pair in slots.pairs:
        to = [slots.vectors(name, getattr(slots, name)) for name in pair]
        source = to if slimming.block is None else [slots.vectors(name, slimming.stored(name)) for name in pair]
        kernels.compact(*to, *source, *rest, prefix)


def _fill_holes(slimming: Slimming) -> None:
    """Slim the slots where they lie, in one launch."""
    from h2optimizer.kernels import slimming as kernels

    stored, plan, (rank, scores, salt) = slimming.slots.stored(), slimming.plan, _rank(slimming)
    keys, values, positions = (stored.pop(name) for name in ("keys", "values", "positions"))
    ranked = (stored.get(name) for name in ("mass", "count", "norms"))
    kernels.fill_holes(
        keys, values, positions, tuple(stored.values()), plan.mirror, slimming.kept, int(plan.heavy[0]),
        int(plan.recent[0]), rank, *ranked, salt, scores, _heads(slimming),
    )  # fmt: skip
