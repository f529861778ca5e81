"""KV heads with windows of their own: how many slots each keeps, and how many it holds.

A layer of such heads is treated as batch x KV heads rows of one head, whose lengths differ. What handles rows of
different lengths then handles heads of different windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

Table = tuple[tuple[int, ...], ...]  # [layers][KV heads]


def as_share(value: int | float | str | Fraction) -> Fraction | None:
    """`value` as a share of the window: "31/32", or a number between 0 and 1. None for a whole number.

    Raises: ValueError for anything else.
    """
    if type(value) is int:
        return None
    if isinstance(value, (str, float, Fraction)):
        try:
            share = Fraction(value)
        except (ValueError, ZeroDivisionError, OverflowError):
            share = Fraction(0)
        if 0 < share < 1:
            return share
    raise ValueError(f"{value!r}: must be a whole number, or a share between 0 and 1 such as 31/32")


def check_table(table, mean: int, recent: int) -> Table:
    """A table of windows [layers][KV heads] as tuples.

    Raises: ValueError for bad entries, windows that do not hold the `recent` slots, or another mean.
    """
    try:
        table = tuple(tuple(row) for row in table)
    except TypeError:
        raise ValueError(f"{table!r:.60}: must be 'even', or a table [layers][KV heads] of windows") from None
    if not table or not table[0] or any(len(row) != len(table[0]) for row in table):
        raise ValueError("a table [layers][KV heads] needs rows of one length")
    windows, least = [window for row in table for window in row], max(recent, 2)
    for window in windows:
        if not isinstance(window, (int, np.integer)) or isinstance(window, bool) or window < least:
            raise ValueError(
                f"{window!r:.60}: a head's window must be a whole number of at least {least}, for it holds the "
                f"{recent} newest slots as well"
            )
    if sum(windows) != mean * len(windows):
        raise ValueError(f"the windows' mean is {sum(windows) / len(windows):g}: it must be window_length={mean}")
    return tuple(tuple(int(window) for window in row) for row in table)


@dataclass(frozen=True, eq=False)
class HeadWindows:
    """How many slots each KV head keeps: one window for all heads, or a table. The newest slots are as many in each."""

    recent: int  # the newest slots of each window
    sizes: np.ndarray  # int [U], the different windows, ascending
    index: np.ndarray | None  # int [layers, KV heads] into the others; None = all heads alike

    @classmethod
    def of(cls, windows: int | Table, recent: int) -> HeadWindows:
        """`windows` as `H2OConfig` has them."""
        table = np.array(windows)
        sizes, index = np.unique(table, return_inverse=True)
        return cls(recent, sizes, None if table.ndim == 0 else index.reshape(table.shape))

    @property
    def even(self) -> bool:
        return self.index is None

    @property
    def heavy(self) -> np.ndarray:
        """int [U]: the slots of each window that are kept by score."""
        return self.sizes - self.recent

    @property
    def split(self) -> np.ndarray:
        """int [2, U]: slots kept by score, and newest ones."""
        return np.stack([self.heavy, np.full_like(self.sizes, self.recent)])

    @property
    def smallest(self) -> int:
        return int(self.sizes.min())

    @property
    def largest(self) -> int:
        return int(self.sizes.max())

    @property
    def table(self) -> np.ndarray:
        """int [layers, KV heads]."""
        return self.sizes[self.index]

    @property
    def counts(self) -> tuple[tuple[int, int], ...]:
        """The different windows, and how many heads have each; none if heads are alike."""
        if self.even:
            return ()
        return tuple(zip(self.sizes.tolist(), np.bincount(self.index.ravel()).tolist(), strict=True))

    def of_heads(self, layer: int, heads: int) -> list[int]:
        """The windows of the `heads` KV heads of a layer that this process holds."""
        return self.table[layer, heads_held(self.index.shape[1], heads)].tolist()

    def sparing(self, space: int) -> HeadWindows:
        """Windows that leave room for `space` tokens, at most `recent`, taken from the newest slots."""
        return replace(self, sizes=self.sizes - space, recent=self.recent - space)


def heads_held(table_heads: int, heads: int) -> slice:
    """Which of a layer's KV heads this process holds: all, or its part under tensor parallelism."""
    if heads == table_heads:
        return slice(None)
    first = torch.distributed.get_rank() * heads % table_heads
    return slice(first, first + heads)


class HeadRows:
    """What each KV head holds of each row, where heads have windows of their own.

    `held` int [B, U] counts the slots of a head with each of the U different windows. On a device the numbers of all
    layers' heads stand at a fixed address, int32 [layers, 2, B * KV heads]: lengths, and tokens seen.

    Args:
        rows: the `h2optimizer.utils.step.Rows` that count the batch.
        windows: with a table.
    """

    def __init__(self, rows, windows: HeadWindows):
        self.rows, self.windows = rows, windows
        self.held = np.zeros((len(rows.lengths), len(windows.sizes)), dtype=np.int64)
        self.part: slice | None = None  # the heads that this process holds
        self._mirrors: dict[torch.device, torch.Tensor] = {}
        self._limits: dict[torch.device, torch.Tensor] = {}

    def append(self, new: list[int]) -> None:
        self.held += np.array(new)[:, None]

    def cut(self, windows: HeadWindows) -> list[bool]:
        """Cut each head to its window on the host. Returns which rows had a head that was longer."""
        longer = (self.held > windows.sizes).any(axis=1).tolist()
        self.held = np.minimum(self.held, windows.sizes)
        return longer

    def mirror(self, layer: int, heads: int, device: torch.device) -> torch.Tensor:
        """int32 [2, B * heads] of a layer on `device`: lengths and tokens seen."""
        if device not in self._mirrors:
            self.part = heads_held(self.windows.index.shape[1], heads)
            with torch.inference_mode(False):  # outlives the mode it is made in
                self._mirrors[device] = self._numbers().to(device)
                self._limits[device] = self._limit(self.windows).to(device)
        return self._mirrors[device][layer]

    def count_step(self, brought: Callable[[torch.device], torch.Tensor] | None) -> None:
        """On the device: each row has one more token, or as many as `brought` int32 [B] says."""
        for device, mirror in self._mirrors.items():
            by_row = mirror.unflatten(2, (len(self.held), -1))
            by_row.add_(1 if brought is None else brought(device)[:, None])

    def cut_there(self, windows: HeadWindows) -> None:
        """On the device: no head has more slots than its window."""
        for device, mirror in self._mirrors.items():
            lengths = mirror[:, 0].unflatten(1, (len(self.held), -1))
            limit = self._limits[device] if windows is self.windows else self._limit(windows).to(device)
            torch.minimum(lengths, limit, out=lengths)

    def upload(self) -> None:
        for mirror in self._mirrors.values():
            mirror.copy_(self._numbers(), non_blocking=True)

    def _numbers(self) -> torch.Tensor:
        lengths = self.held[:, self.windows.index[:, self.part]].transpose(1, 0, 2)  # [layers, B, heads]
        seen = np.broadcast_to(np.array(self.rows.seen)[:, None], lengths.shape)
        return torch.from_numpy(np.stack([lengths, seen], axis=1).astype(np.int32)).flatten(2)

    def _limit(self, windows: HeadWindows) -> torch.Tensor:
        """The windows of all layers' heads, int32 [layers, 1, heads]."""
        return torch.from_numpy(windows.sizes[windows.index[:, self.part]].astype(np.int32))[:, None]


class LayerRows:
    """The rows of a layer whose heads have windows of their own: B * KV heads rows of one head each.

    Answers what `Step` and `SlimmingPlan` ask of `Rows`.

    Args:
        rows: the `h2optimizer.utils.step.Rows` of the batch.
        layer: its index.
        heads: how many of its KV heads this process holds.
        device: that holds the layer.
    """

    def __init__(self, rows, layer: int, heads: int, device: torch.device):
        self.rows, self.layer, self.heads = rows, layer, heads
        self.mirror(device)
        self._split: torch.Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        return self._of_heads(self.rows.heads.held).reshape(-1).tolist()

    @property
    def seen(self) -> list[int]:
        return self.repeat(self.rows.seen)

    def mirror(self, device: torch.device) -> torch.Tensor:
        """int32 [2, B * heads] on `device`: lengths and tokens seen."""
        return self.rows.heads.mirror(self.layer, self.heads, device)

    def lengths_there(self, device: torch.device, heads: int) -> torch.Tensor:
        """int32 [B, heads]: the heads' lengths, at a fixed address on `device`."""
        return self.mirror(device)[0].view(-1, heads)

    def brought(self, device: torch.device) -> torch.Tensor:
        """Which rows bring a token to a static step: int32 [B * heads]."""
        rows = len(self.rows.lengths)
        return self.rows.brought(device).repeat_interleave(self.heads, output_size=rows * self.heads)

    def repeat(self, of_rows: list) -> list:
        """Each row's value for all its heads."""
        return [value for value in of_rows for _ in range(self.heads)]

    def kept(self, slots) -> torch.Tensor:
        """int32 [B, slots], at a fixed address, as the slots lie: passed from one slimming kernel to the next."""
        rows, total = len(self.rows.lengths), slots.positions.shape[1]
        interval = slots.capacities[0] - self.rows.windows.of_heads(self.layer, self.heads)[0]
        most = int(self.rows.windows.table.sum(axis=1).max()) + interval * self.rows.windows.table.shape[1]
        return self.rows.passed_on(slots.device, (rows * most,))[: rows * total].view(rows, total)

    def split_there(self, windows: HeadWindows, device: torch.device) -> torch.Tensor:
        """`split` on `device`, int32 [2, heads], contiguous; at a fixed address, unless slots are spared."""
        if windows is self.rows.windows and self._split is not None:
            return self._split
        with torch.inference_mode(False):
            split = torch.from_numpy(self.split(windows).astype(np.int32)).contiguous().to(device)
        if windows is self.rows.windows:
            self._split = split
        return split

    def split(self, windows: HeadWindows) -> np.ndarray:
        """Slots of each head kept by score, and newest ones: int [2, heads]."""
        return self._of_heads(windows.split)

    def _of_heads(self, values: np.ndarray) -> np.ndarray:
        """Of values [n, U] those of this layer's heads: [n, heads]."""
        return values[:, self.rows.heads.windows.index[self.layer, self.rows.heads.part]]
