"""Columns without a token: which columns of a row were padding, and whether later masks agree."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

Run = tuple[int, int]  # columns (begin, end)


@dataclass
class Padding:
    """The runs of columns in which one row had no token; `ended` holds those from decode steps."""

    runs: list[Run] = field(default_factory=list)
    ended: list[Run] = field(default_factory=list)

    def add(self, run: Run, decode: bool) -> None:
        """Record new columns without a token."""
        for runs in (self.runs, self.ended)[: 1 + decode]:
            if runs and runs[-1][1] == run[0]:
                runs[-1] = runs[-1][0], run[1]
            else:
                runs.append(run)

    def copy(self) -> Padding:
        return Padding(self.runs.copy(), self.ended.copy())


def runs_without(real: torch.Tensor) -> list[tuple[int, int, int]]:
    """(row, begin, end) of each run of False in bool [B, n] on the host."""
    edge = torch.ones(len(real), 1, dtype=torch.int8)
    edges = torch.cat([edge, real.to(torch.int8), edge], dim=1).diff(dim=1).nonzero().tolist()
    return [(row, begin, end) for (row, begin), (_, end) in zip(edges[::2], edges[1::2], strict=True)]


def check_past(past: torch.Tensor, columns: int, rows: list[Padding]) -> None:
    """Raise ValueError unless a mask of past columns, bool [B, n] on the host, matches the tokens seen.

    The mask may have either value at padding that decode steps fed to finished rows, because no slot holds it.

    Args: columns: seen so far; rows: each row's padding in them.
    """
    seen = torch.ones(len(rows), columns, dtype=torch.bool)
    shown = past[:, max(0, past.shape[1] - columns) :]  # anything left of all columns must be padding
    if shown.shape != seen.shape or past[:, : past.shape[1] - columns].any():
        raise ValueError(
            f"attention_mask: shows {past.shape[1]} columns before this input, but the cache has seen "
            f"{columns}; give the mask of all columns or of the new ones only, or reset() the cache"
        )
    ended = torch.zeros_like(seen)
    for row, padding in enumerate(rows):
        for begin, end in padding.runs:
            seen[row, begin:end] = False
        for begin, end in padding.ended:
            ended[row, begin:end] = True
    for fault, what in (
        (seen & ~shown, "hides a token that the cache has seen"),
        (shown & ~seen & ~ended, "shows a token where the cache has seen padding"),
    ):
        if fault.any():
            row, column = fault.nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask: {what} (row {row}, column {column}); a mask cannot "
                "change afterwards: give the mask of the new columns only, or reset() the cache"
            )
