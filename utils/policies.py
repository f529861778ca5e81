"""How slots can be ranked. A policy is one entry of `POLICIES`, which settings, command lines and figures read.

A new policy needs a function of `Candidates` and an entry that declares what it ranks by. `H2OConfig.score` names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class Candidates(Protocol):
    """Slots of one layer to rank. Columns past a row's length may hold anything, even NaN; they are never kept.

    If heads have windows of their own, [B, Hkv, …] is [B * Hkv, 1, …]: a row is a head of a row. CUDA graphs record the
    score, so it must not wait for the device, nor depend on what changes on the host.
    """

    positions: torch.Tensor  # int32 [B, Hkv, slots], original positions of the tokens
    mass: torch.Tensor | None  # float32 [B, Hkv, slots], if the policy is `by_mass`
    count: torch.Tensor | None  # float32 [B, Hkv, slots]: queries that could see the slot, if score_norm is "mean"
    norms: torch.Tensor | None  # float32 [B, Hkv, slots]: L2 norms of the values, if the policy is `by_value`
    keys: torch.Tensor  # [B, Hkv, slots, D], not rotated under position_rolling
    values: torch.Tensor  # [B, Hkv, slots, D]
    heads: int  # KV heads of the layer
    layer_idx: int
    seed: int  # H2OConfig.score_seed


@dataclass(frozen=True)
class Policy:
    """How slots older than the recent ones are ranked.

    `score` returns float32 [B, Hkv, slots]. The greatest are kept; ties keep the older token. Slots may lie in any
    order.
    """

    label: str  # in tables and figures
    score: Callable[[Candidates], torch.Tensor]
    meaning: str = ""  # shown beside the name in --help
    by_mass: bool = False  # needs attention mass, which decode steps then accumulate
    by_value: bool = False  # needs the norms of the values, which are stored when a token is appended
    seeded: bool = False  # depends on score_seed
    heavy: int | None = None  # slots kept by score if num_heavy_hitters is -1; None = half of the window
    # The slimming kernel's name for this score if it has its own implementation; None = it ranks by `score`. "mass" is
    # divided by the queries and multiplied by the norms if these are stored.
    rank: str | None = None

    @property
    def keeps_oldest(self) -> bool:
        """Whether the policy keeps sinks, the oldest slots."""
        return self.rank == "oldest"


def mass(slots: Candidates) -> torch.Tensor:
    """Attention mass: the sum, or the mean per query if queries are counted."""
    if slots.count is None:
        return slots.mass
    return slots.mass / slots.count.clamp(min=torch.finfo(torch.float32).tiny)


def value_mass(slots: Candidates) -> torch.Tensor:
    """Attention mass times the L2 norm of the value: about how much of the attention's output the slot has made up."""
    return mass(slots) * slots.norms


def oldest(slots: Candidates) -> torch.Tensor:
    """Negated position. Those that float32 rounds to one number are ties, which keep the older token."""
    return -slots.positions.float()


def random(slots: Candidates) -> torch.Tensor:
    positions = slots.positions.reshape(-1, slots.heads, slots.positions.shape[-1])
    return random_priority(positions, slots.layer_idx, slots.seed).view(slots.positions.shape)


STREAMING_LLM = Policy("StreamingLLM", oldest, "the 4 oldest", heavy=4, rank="oldest")  # as in arXiv 2309.17453
POLICIES = {
    "mass": Policy("H2O", mass, "H2O", by_mass=True, rank="mass"),
    "value_mass": Policy("value mass", value_mass, "times the value's norm", by_mass=True, by_value=True, rank="mass"),
    "sink": Policy("sinks", oldest, "the oldest slots, half of the window", rank="oldest"),
    "streaming_llm": STREAMING_LLM,
    "random": Policy("random + recent", random, seeded=True, rank="random"),
}
RECENT_ONLY = Policy("recent only", oldest, heavy=0, rank="oldest")  # for a window without heavy hitters


def named_policies() -> str:
    """The policies as listed in --help."""
    return ", ".join(name + (f" ({of.meaning})" if of.meaning else "") for name, of in POLICIES.items())


def random_priority(positions: torch.Tensor, layer_idx: int, seed: int) -> torch.Tensor:
    """A fixed pseudo-random number per token and KV head, so that a row's ranks depend on neither batch nor device.

    A 32-bit integer hash with an xor-shift-multiply finaliser like MurmurHash3's; float32 values below 2**24.

    Args: positions: [B, Hkv, slots]. Returns: float32 of the same shape.
    """
    head = torch.arange(positions.shape[1], device=positions.device)[:, None]
    x = (positions.long() * 0x9E3779B1 + head * 0xC2B2AE3D + random_salt(layer_idx, seed)) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) >> 8).float()


def random_salt(layer_idx: int, seed: int) -> int:
    """The 32 bits that layer and seed contribute to a token's hash."""
    return (layer_idx * 0x85EBCA77 + seed * 0x27D4EB2F) & 0xFFFFFFFF
