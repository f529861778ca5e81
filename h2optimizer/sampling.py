"""Choosing tokens: greedily, or with each row's own temperature, top-p and random numbers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from h2optimizer.decoder import CHUNK, Choose
from h2optimizer.utils.memory import to_device

PARTS = 64  # of a row's logits


def choose_greedily(logits: torch.Tensor) -> torch.Tensor:
    """Each row's first token of the greatest logit, [B] of [B, vocabulary]."""
    if len(logits) >= PARTS or logits.shape[-1] % PARTS:
        return logits.argmax(-1)
    # torch gives each maximum to one program, and a few rows would leave the device idle
    highest, at = logits.unflatten(-1, (PARTS, -1)).max(-1)
    part = highest.argmax(-1, keepdim=True)
    return (at.gather(-1, part) + part * (logits.shape[-1] // PARTS))[:, 0]


class Sampled(Protocol):
    """A sequence whose tokens a RowSampler chooses."""

    temperature: float  # 0 = greedy
    top_p: float
    random: np.random.Generator


class RowSampler:
    """Samples each row's token with its own temperature, top-p and random numbers.

    A row's text therefore depends on its seed, not on the other rows in the batch or on when it joined.
    """

    def __init__(self, rows: int, device: torch.device, nucleus: bool):
        self.nucleus = nucleus  # whether any row's top_p is below 1; tokens are sorted only then
        with torch.inference_mode(False):
            self.temperature = torch.zeros(rows, device=device)  # 0 = greedy
            self.top_p = torch.ones(rows, device=device)
            self.uniform = torch.zeros(rows, CHUNK, device=device)
            self.column = torch.zeros(1, dtype=torch.long, device=device)

    def at(self, rows: list[int], sequences: list[Sampled]) -> Choose:
        """Assign sequences to these rows; returns the function that chooses their first tokens."""
        at = to_device(rows, self.temperature.device)
        settings = [[s.temperature for s in sequences], [s.top_p for s in sequences], _uniforms(sequences, 1)[:, 0]]
        temperature, top_p, uniform = (to_device(values, at.device, torch.float32) for values in settings)
        self.temperature.index_copy_(0, at, temperature)
        self.top_p.index_copy_(0, at, top_p)
        return lambda logits: sample_rows(logits, temperature, top_p, uniform[:, None], self.nucleus)

    def draw(self, sequences: list[Sampled | None], steps: int) -> None:
        """Draw random numbers for the next steps of the sequences in all rows."""
        uniform = torch.from_numpy(_uniforms(sequences, steps))
        self.uniform[: len(uniform), :steps].copy_(uniform)
        self.column.zero_()

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        uniform = self.uniform[: len(logits)].index_select(1, self.column)
        self.column.add_(1)
        rows = slice(len(logits))
        return sample_rows(logits, self.temperature[rows], self.top_p[rows], uniform, self.nucleus)


def _uniforms(sequences: list[Sampled | None], steps: int) -> np.ndarray:
    """The next `steps` random numbers in [0, 1) of each sequence, float32 [rows, steps]."""
    uniform = np.zeros((len(sequences), steps), dtype=np.float32)
    for row, sequence in enumerate(sequences):
        if sequence is not None and sequence.temperature > 0:
            uniform[row] = sequence.random.random(steps, dtype=np.float32)
    return uniform


def sample_rows(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor, nucleus: bool
) -> torch.Tensor:
    """Tokens [B] by inverting each row's distribution at uniform numbers [B, 1] in [0, 1).

    temperature, top_p: float32 [B]; temperature 0 is greedy. Top-p keeps the most probable tokens up to the one that
    brings their sum to top_p (Holtzman et al., arXiv 1904.09751).
    """
    sampled = temperature > 0
    probs = (logits.float() / torch.where(sampled, temperature, 1.0)[:, None]).softmax(-1)
    tokens = _invert(probs, uniform)
    if nucleus:  # only for rows with top_p < 1: sorting the tokens would change the samples of the others
        probs, order = probs.sort(dim=-1, descending=True)
        before = probs.cumsum(-1) - probs
        at = _invert(torch.where(before < top_p[:, None], probs, 0.0), uniform)
        tokens = torch.where(top_p[:, None] < 1, order.gather(1, at), tokens)
    return torch.where(sampled, tokens[:, 0], logits.argmax(-1))


def _invert(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index where the sums of each row's probabilities [B, n], of any total, pass its uniform number: int64 [B, 1]."""
    up_to = probs.cumsum(-1)
    at = torch.searchsorted(up_to, uniform * up_to[:, -1:], right=True)
    # rounding may carry the index past the last token of nonzero probability
    last = (probs > 0).long().mul_(torch.arange(probs.shape[-1], device=probs.device)).amax(-1, keepdim=True)
    return torch.minimum(at, last)
