"""Slots in 8 bits: keys and values as int8, each slot of each head with a float32 scale for either."""

from __future__ import annotations

import torch

from h2optimizer.utils.slots import HeadSlots, Slots
from h2optimizer.utils.step import Step

LARGEST = 127  # symmetric: -128 is not used
SCALES = {"keys": "key_scales", "values": "value_scales"}


def quantize(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] as int8, and scales float32 [...]: the largest magnitude / 127. Rounds to nearest, ties to even."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    scales = (torch.linalg.vector_norm(states, torch.inf, dim=-1, dtype=dtype) / LARGEST).float()
    numbers = states.to(dtype) / torch.where(scales == 0, 1, scales)[..., None]
    return numbers.round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scales


def dequantize(numbers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [..., D] times scales [...], rounded once to `dtype`."""
    return torch.mul(numbers, scales[..., None], out=numbers.new_empty(numbers.shape, dtype=dtype))


class Int8Slots(Slots):
    """Slots that store keys and values in 8 bits.

    Tokens are quantised when they enter the slots, and moved as they are stored, so nothing is rounded twice. A
    decode step appends first: its query attends to its own key and value as they are stored. The tokens of a longer
    forward attend to each other as they come, and to earlier ones as they are stored. Norms are those of the values as
    they came. Mass, count, norms and positions are as in other slots.

    key_scales, value_scales: float32, as keys and values without D.
    """

    pairs = (tuple(SCALES), tuple(SCALES.values()))
    plain = False

    def _allocate(self, key_states, value_states, slots: tuple[int, ...], ranked: tuple[str, ...]) -> None:
        super()._allocate(*(of.new_empty(0, of.shape[-1], dtype=torch.int8) for of in (key_states, value_states)),
                          slots, ranked)  # fmt: skip
        self.dtypes = key_states.dtype, value_states.dtype
        self.key_scales, self.value_scales = torch.zeros_like(self.mass), torch.zeros_like(self.mass)

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key_scales, self.value_scales

    def decoded(self, stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if stored["keys"].dtype != torch.int8:  # a block that has not been stored yet
            return super().decoded(stored)
        pairs = zip(SCALES.items(), self.dtypes, strict=True)
        return tuple(dequantize(stored[name], stored[scales], dtype) for (name, scales), dtype in pairs)

    def extended(
        self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if step.decode:  # the step's own token as it is stored; gradients pass through the rounding
            key_states, value_states = map(_straight_through, self._cast(key_states, value_states))
        return super().extended(key_states, value_states, step)

    def block_of(self, extended, key_states, value_states, step: Step) -> dict[str, torch.Tensor]:
        if step.fresh:  # a prompt is rounded when few of its tokens are left
            return super().block_of(extended, key_states, value_states, step)
        new = self._appended(key_states.detach(), value_states.detach())
        return {name: self._joined(name, of, step) for name, of in new.items()}

    def _encoded(self, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        encoded = dict(tokens)
        for name, scales in SCALES.items():
            if name in tokens and tokens[name].dtype != torch.int8:
                encoded[name], encoded[scales] = quantize(tokens[name])
        return encoded

    def empty_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros in the model's dtype, as large as the slots."""
        return tuple(
            torch.zeros_like(of, dtype=dtype) for of, dtype in zip((self.keys, self.values), self.dtypes, strict=True)
        )

    def overwrite(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        for name, tokens in self._encoded({"keys": keys, "values": values}).items():
            getattr(self, name).copy_(tokens)


def _straight_through(states: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        rounding = dequantize(*quantize(states), states.dtype) - states
    return states + rounding


class Int8HeadSlots(Int8Slots, HeadSlots):
    """8-bit slots of heads with capacities of their own."""
