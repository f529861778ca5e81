"""Columns without a token: what a row was fed as padding, and whether later masks say the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

Run = tuple[int, int]  # columns (begin, end)


@dataclass
class Padding:
    """The runs of columns in which one row had no token; `ended` holds those of them that decode steps fed."""

    runs: list[Run] = field(default_factory=list)
    ended: list[Run] = field(default_factory=list)

    def add(self, run: Run, decode: bool) -> None:
        """Account for new columns without a token."""
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
    """Raise ValueError unless a mask of the columns so far, bool [B, n] on the host, is that of the tokens seen.

    Of the padding that decode steps fed to rows that had ended it may say what it likes: it is in no slot.

    Args: columns: seen so far; rows: what each row has had for padding in them.
    """
    seen = torch.ones(len(rows), columns, dtype=torch.bool)
    shown = past[:, max(0, past.shape[1] - columns) :]  # what is to the left of all columns must be padding
    if shown.shape != seen.shape or past[:, : past.shape[1] - columns].any():
        raise ValueError(
            f"attention_mask: shows {past.shape[1]} columns before this input, the cache has seen "
            f"{columns}; give the mask of all columns or of the new ones only, or reset() the cache"
        )
    ended = torch.zeros_like(seen)
    for row, padding in enumerate(rows):
        for begin, end in padding.runs:
            seen[row, begin:end] = False
        for begin, end in padding.ended:
            ended[row, begin:end] = True
    for fault, what in ((seen & ~shown, "hides tokens that"), (shown & ~seen & ~ended, "shows padding that")):
        if fault.any():
            row, column = fault.nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask: {what} the cache has taken as such (row {row}, column {column}); tokens cannot "
                "be hidden or shown afterwards: give the mask of the new columns only, or reset() the cache"
            )
