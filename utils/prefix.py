"""A beginning that several texts share: its keys, values and mass, computed once and never changed or slimmed."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch

# The settings that keys, mass and counts of a prefix depend on; those of window and schedule are not among them.
SHAPING = ("score", "score_norm", "score_queries", "group_reduce", "position_rolling")


class LayerPrefix(NamedTuple):
    """One layer of a prefix of P tokens. Mass and count, float32, come from the prefix' own queries."""

    keys: torch.Tensor  # [1, KV heads, P, D], not rotated under position_rolling
    values: torch.Tensor  # [1, KV heads, P, D]
    mass: torch.Tensor | None = None  # [1, KV heads, P]; None if nothing ranks by it, or no query of the prefix counts
    count: torch.Tensor | None = None  # [1, KV heads, P], likewise
    norms: torch.Tensor | None = None  # [1, KV heads, P]: L2 norms of the values, if slots are ranked by them

    @property
    def nbytes(self) -> int:
        return sum(of.nbytes for of in self if of is not None)

    @property
    def kind(self) -> tuple:
        """What keys and values must have in common with the tokens that follow: dtypes, device, KV heads, head_dims."""
        return kind_of(self.keys, self.values)


@dataclass(frozen=True, eq=False)
class Prefix:
    """The snapshot of a beginning, from `model.prefill_prefix`. Caches whose rows continue from it share its tensors.

    It belongs to the model that computed it, with the weights it had then.
    """

    h2o: object  # the H2OConfig it was computed with
    tokens: tuple[int, ...]
    layers: tuple[LayerPrefix, ...]
    model: weakref.ref

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def check_settings(self, h2o) -> None:
        """Raise ValueError unless a cache with these settings, an H2OConfig, can continue from the prefix exactly."""
        if (fault := fault_of(h2o)) is not None:
            raise ValueError(f"prefix: {fault}, or leave the prefix out")
        for name in SHAPING:
            mine, wanted = getattr(self.h2o, name), getattr(h2o, name)
            if mine != wanted:
                raise ValueError(
                    f"prefix: was computed with {name}={mine!r}, but this cache has {name}={wanted!r}: compute it "
                    "again with model.prefill_prefix"
                )
        if h2o.needs_mass and not self.h2o.needs_mass:
            raise ValueError(
                "prefix: was computed without heavy hitters, so it has no mass: compute it again with "
                "model.prefill_prefix"
            )

    def check_model(self, model) -> None:
        """Raise ValueError for any model but the one that computed the prefix."""
        if self.model() is not model:
            raise ValueError("prefix: was computed by another model: compute it with this model's prefill_prefix")

    def check_states(self, layer_idx: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Raise ValueError unless a layer's states [B, KV heads, n, D] continue those of the prefix."""
        if layer_idx >= len(self.layers):
            raise ValueError(f"prefix: has {len(self.layers)} layers, the model has more: compute it with this model")
        mine, states = self.layers[layer_idx].kind, kind_of(key_states, value_states)
        if mine != states:
            fault = next(f"{of}, the model now has {now}" for of, now in zip(mine, states, strict=True) if of != now)
            raise ValueError(
                f"prefix: its layer {layer_idx} has {fault}: compute it again with model.prefill_prefix, in the "
                "dtype and on the devices where it is used"
            )


def fault_of(h2o) -> str | None:
    """Why prefixes cannot be shared exactly with these settings, and the way out; None if they can."""
    if h2o.score_decay < 1:
        return f"score_decay={h2o.score_decay} is not shared, as stored mass decays between forwards: set it to 1"
    if h2o.prefill_chunk is not None:
        return (
            f"prefill_chunk={h2o.prefill_chunk} is not shared, as chunks would end elsewhere than in the whole "
            "prompt: set it to None"
        )
    return None


def least_own_tokens(h2o) -> int:
    """How many tokens must follow a prefix in each row: the last is needed for logits, and the scored ones for mass."""
    return (h2o.score_queries if h2o.needs_mass else None) or 1


def kind_of(keys: torch.Tensor, values: torch.Tensor) -> tuple:
    """Dtypes, device and shape of keys and values, in words where a number alone says little."""
    shape = f"{keys.shape[1]} KV heads of {keys.shape[3]} and {values.shape[3]}"
    return keys.dtype, values.dtype, keys.device, shape


def followed_by(shared: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A prefix' tensor [1, KV heads, P(, D)] followed by rows' own [B, KV heads, n(, D)], in a copy.

    The rows may also be heads of rows, [B * KV heads, 1, n(, D)].
    """
    rows = own.shape[0] * own.shape[1] // shared.shape[1]
    shared = shared.expand(rows, *shared.shape[1:]).reshape(*own.shape[:2], *shared.shape[2:])
    return torch.cat([shared, own], dim=2)
