"""One forward as every layer sees it: how many tokens each row brings, and the slimming plan all layers share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from h2optimizer.utils.heads import HeadRows, HeadWindows, LayerRows
from h2optimizer.utils.memory import to_device
from h2optimizer.utils.padding import Padding, runs_without
from h2optimizer.utils.prefix import Prefix


@dataclass
class Step:
    """One forward as every layer sees it. Row b holds `start[b]` slots and brings `new[b]` tokens in `columns` columns.

    A row's tokens come first and its padding last, so query column i sits at slot start[b] + i and sees all slots up to
    it. In the first forward after a prefix, the tokens of the prefix stand for the slots. The lists live on the host,
    so shapes and branches need no wait for the device. Only slimming changes a row that brings no token.
    """

    rows: Rows | LayerRows
    start: list[int]
    new: list[int]
    columns: int
    decode: bool  # one new token a row, appended in place; rows that have ended bring none
    due: bool  # slimming follows the attention
    scored: bool  # attention reports the mass of its queries
    first_scored: list[int]  # query columns from here to new[b] add mass
    decays: bool = True  # stored mass decays once a forward, in its first chunk
    static: bool = False  # graph-safe: every per-step value is read on the device
    prefix: Prefix | None = None  # the first `start` of each row are its tokens, and no row has a slot yet
    last_layer: int | None = None  # the index of the last layer, if only each row's last token is wanted from it

    def __post_init__(self):
        self.min_start, self.max_start = min(self.start), max(self.start)
        self.width = self.max_start + self.columns  # key columns that queries attend to
        self.padded = min(self.new) < self.columns
        self.partial = self.decode and self.padded
        self.shared = 0 if self.prefix is None else len(self.prefix)
        self.fresh = self.max_start == self.shared  # no row has a slot
        self._on: dict[tuple, torch.Tensor] = {}

    def of_heads(self, rows: LayerRows) -> Step:
        """The same forward as the heads of a layer see it, each with windows of its own: a row is a head of a row."""
        new = rows.repeat(self.new)
        start = [length - n for length, n in zip(rows.lengths, new, strict=True)]
        return replace(self, rows=rows, start=start, new=new, first_scored=rows.repeat(self.first_scored))

    @cached_property
    def alone(self) -> Step:
        """The same forward without its prefix: what the new tokens see of each other."""
        return replace(self, start=[0] * len(self.start), prefix=None)

    def starts(self, device: torch.device) -> torch.Tensor:
        """`start` on `device`, int64 [B]. A decode step derives it from the lengths already on the device."""
        if self.decode:
            brought = self.brought(device) if self.partial else 1
            return self._once(device, "start", lambda: self.rows.mirror(device)[0].long() - brought)
        return self._once(device, "start", lambda: to_device(self.start, device))

    def brought(self, device: torch.device) -> torch.Tensor:
        """Which rows bring tokens: int32 [B], 1 or 0."""
        if self.static:
            return self.rows.brought(device)
        bring = [int(n > 0) for n in self.new]
        return self._once(device, "brought", lambda: to_device(bring, device, torch.int32))

    def attended(self, device: torch.device) -> torch.Tensor:
        """How many slots each row's query sees in a decode step: int32 [B], 0 for rows that bring no token."""
        lengths = self.rows.mirror(device)[0]
        if not self.partial:
            return lengths
        return self._once(device, "attended", lambda: lengths * self.brought(device))

    def padding(self, device: torch.device) -> torch.Tensor:
        """The query columns that hold no token: bool [B, columns]."""
        if self.partial:
            return self.brought(device)[:, None] == 0

        def mask():
            return torch.arange(self.columns, device=device) >= to_device(self.new, device)[:, None]

        return self._once(device, "padding", mask)

    def positions(self, device: torch.device) -> torch.Tensor:
        """Original positions of the query columns: int64 [1 or B, columns]."""
        seen = [seen - new for seen, new in zip(self.rows.seen, self.new, strict=True)]
        column = torch.arange(self.columns, device=device)
        gaps = self.rows.gaps
        if min(seen) == max(seen) and min(gaps) == max(gaps) and not self.static:
            return (column + seen[0] + gaps[0])[None]
        if self.decode:
            positions = self.rows.mirror(device)[1].long()[:, None] - 1
            return positions + self.rows.gap(device)[:, None] if any(gaps) else positions
        seen, gap, last = to_device([seen, gaps, self.rows.seen], device)[..., None]
        # Clamp padding to the last real token: dynamic RoPE scales with the largest position.
        return gap + torch.minimum(seen + column, last - 1)

    def slot_positions(self, device: torch.device) -> torch.Tensor:
        """Positions of slots and new columns under position_rolling, where slots are the positions: int64 [1, width].

        Columns past the longest row are padding in every row. They are clamped to its last slot, because some RoPE
        frequencies depend on the largest position.
        """
        longest = max(start + new for start, new in zip(self.start, self.new, strict=True))
        slots = torch.arange(self.width, device=device)
        return (slots if longest == self.width else slots.clamp(max=longest - 1))[None]

    def scored_columns(self, device: torch.device) -> torch.Tensor:
        """The query columns of each row that add mass: bool [B, columns]."""

        def mask():
            first, new = to_device([self.first_scored, self.new], device)[..., None].unbind(0)
            column = torch.arange(self.columns, device=device)
            return (column >= first) & (column < new)

        return self._once(device, "scored", mask)

    def wanted(self, states: torch.Tensor, layer: int) -> torch.Tensor:
        """Of a layer's states [B, columns, n] those that something will read: all, or each row's last, [B, 1, n]."""
        if layer != self.last_layer:
            return states
        last = [(new - 1) % self.columns for new in self.new]
        if min(last) == max(last):
            return states[:, last[0] : last[0] + 1]
        at = self._once(states.device, "last", lambda: to_device(last, states.device))
        return states[torch.arange(len(states), device=states.device), at][:, None]

    def spans(self, device: torch.device) -> torch.Tensor:
        """`start`, `new` and `first_scored` on `device`: int32 [3, B]."""
        spans = [self.start, self.new, self.first_scored]
        return self._once(device, "spans", lambda: to_device(spans, device, torch.int32))

    def all_scored(self, begin: int, end: int) -> bool:
        """Whether query columns [begin, end) add mass in every row."""
        return begin >= max(self.first_scored) and end <= min(self.new)

    def scored_queries(self, device: torch.device) -> torch.Tensor:
        """How many of the queries that add mass see each slot: float32 [B, width]."""

        def count():
            own = torch.arange(self.width, device=device) - self.starts(device)[:, None]  # first column that sees it
            if self.decode:
                return (own <= 0).float() * (self.brought(device)[:, None] if self.partial else 1)
            columns = self.scored_columns(device).float()
            later = columns.flip(1).cumsum(1).flip(1)  # scored columns from here on
            later = torch.cat([later, later.new_zeros(len(later), 1)], dim=1)
            return later.gather(1, own.clamp(0, self.columns))

        return self._once(device, "queries", count)

    def _once(self, device: torch.device, name: str, make) -> torch.Tensor:
        if (device, name) not in self._on:
            self._on[device, name] = make()
        return self._on[device, name]


class Rows:
    """Row lengths and tokens seen, on the host and mirrored at a fixed address on each device that holds a layer.

    During a forward both include its new tokens; lengths are cut to the window once all layers are slimmed. `padding`
    records the columns in which a row had no token. `gaps` counts the positions that a row skipped at holes in a mask.
    Where heads have windows of their own, `lengths` are those of the fullest head, and `heads` counts for each.
    """

    def __init__(self, batch_size: int, windows: HeadWindows):
        self.windows = windows
        self.lengths = [0] * batch_size
        self.seen = [0] * batch_size
        self.evictions = [0] * batch_size
        self.padding = [Padding() for _ in range(batch_size)]
        self.gaps = [0] * batch_size
        self._bring = [1] * batch_size  # the host's copy of `brought`
        self._brought: dict[torch.device, torch.Tensor] = {}
        self._gaps: dict[torch.device, torch.Tensor] = {}
        self._mirrors: dict[torch.device, torch.Tensor] = {}
        self._lengths: dict[tuple, torch.Tensor] = {}  # views of the mirrors
        self._kept: dict[tuple, torch.Tensor] = {}
        self.plans: dict[tuple, SlimmingPlan] = {}
        self.heads = None if windows.even else HeadRows(self, windows)

    def mirror(self, device: torch.device) -> torch.Tensor:
        """int32 [2, B] on `device`: lengths and tokens seen."""
        if device not in self._mirrors:
            with torch.inference_mode(False):  # outlives the caller's inference mode
                self._mirrors[device] = to_device([self.lengths, self.seen], device, torch.int32)
        return self._mirrors[device]

    def lengths_there(self, device: torch.device, heads: int) -> torch.Tensor:
        """int32 [B, heads]: each row's length, at a fixed address on `device`."""
        key = device, heads
        if key not in self._lengths:
            self._lengths[key] = self.mirror(device)[0, :, None].expand(-1, heads)
        return self._lengths[key]

    def forget_shared(self) -> None:
        """Drop what would have to share memory with the mirrors, in a copy that does not."""
        self.plans.clear()
        self._lengths.clear()

    def kept(self, slots) -> torch.Tensor:
        """int32 [B, KV heads, capacity], at a fixed address: what the phases of a slimming by kernels pass on."""
        return self.passed_on(slots.device, (len(self.lengths), slots.heads, slots.capacity))

    def passed_on(self, device: torch.device, shape: tuple[int, ...]) -> torch.Tensor:
        """int32 of this shape, the same for all layers."""
        key = device, shape
        if key not in self._kept:
            with torch.inference_mode(False):
                self._kept[key] = torch.zeros(shape, dtype=torch.int32, device=device)
        return self._kept[key]

    def gap(self, device: torch.device) -> torch.Tensor:
        """`gaps` on `device`, at a fixed address: int32 [B]."""
        if device not in self._gaps:
            with torch.inference_mode(False):
                self._gaps[device] = to_device(self.gaps, device, torch.int32)
        return self._gaps[device]

    def brought(self, device: torch.device) -> torch.Tensor:
        """int32 [B] on `device`, at a fixed address: which rows bring a token to a static step."""
        if device not in self._brought:
            with torch.inference_mode(False):
                self._brought[device] = to_device(self._bring, device, torch.int32)
        return self._brought[device]

    def bring(self, new: list[int]) -> None:
        """Tell the devices which rows bring a token to the next static steps; call it before these are replayed."""
        if new != self._bring:
            self._bring = list(new)
            for there in self._brought.values():
                there.copy_(torch.tensor(new, dtype=torch.int32))

    def pad(self, columns: int, real: torch.Tensor, decode: bool) -> None:
        """Record the padding among new columns, counted from column `columns`. real: bool [B, n]."""
        for row, begin, end in runs_without(real):
            self.padding[row].add((columns + begin, columns + end), decode)

    def append(self, new: list[int], on_device: bool = True) -> None:
        """Count new tokens, on the device as well unless `count_step` does that."""
        self.lengths = [length + n for length, n in zip(self.lengths, new, strict=True)]
        self.seen = [seen + n for seen, n in zip(self.seen, new, strict=True)]
        self.plans.clear()
        if self.heads is not None:
            self.heads.append(new)
        if not on_device:
            return
        if set(new) == {1}:
            self.count_step()
        else:
            self.upload()

    def follow(self, prefix: int) -> None:
        """Let empty rows begin after a prefix of so many tokens."""
        self.lengths, self.seen = [prefix] * len(self.lengths), [prefix] * len(self.lengths)
        self.plans.clear()
        if self.heads is not None:
            self.heads.held[:] = prefix
        self.upload()

    def count_step(self, partial: bool = False) -> None:
        """Count one more token on the device for each row, or with `partial` only for the rows in `brought`."""
        for device, mirror in self._mirrors.items():
            mirror.add_(self.brought(device) if partial else 1)
        if self.heads is not None:
            self.heads.count_step(self.brought if partial else None)

    def cut(self, windows: HeadWindows, on_device: bool = True) -> None:
        """Cut lengths to `windows` after all layers were slimmed, on the device too unless `cut_there` does that."""
        longest = windows.largest
        longer = [length > longest for length in self.lengths] if self.heads is None else self.heads.cut(windows)
        self.evictions = [n + cut for n, cut in zip(self.evictions, longer, strict=True)]
        self.lengths = [min(length, longest) for length in self.lengths]
        self.plans.clear()
        if on_device:
            self.cut_there(windows)

    def cut_there(self, windows: HeadWindows) -> None:
        """Cut the lengths on the device to `windows`."""
        for mirror in self._mirrors.values():
            mirror[0].clamp_(max=windows.largest)
        if self.heads is not None:
            self.heads.cut_there(windows)

    def clear(self) -> None:
        if self.heads is not None:
            self.heads.held[:] = 0
        self.lengths, self.seen, self.evictions = ([0] * len(self.lengths) for _ in range(3))
        self.padding = [Padding() for _ in self.lengths]
        self.gaps = [0] * len(self.lengths)
        self.plans.clear()
        self.upload()

    def reorder(self, order: torch.Tensor) -> None:
        state = list(zip(self.lengths, self.seen, self.evictions, self.gaps, self.padding, strict=True))
        if any(row != state[0] for row in state):  # reading `order` waits for the device; equal rows do not need it
            columns = map(list, zip(*(state[i] for i in order.tolist()), strict=True))
            self.lengths, self.seen, self.evictions, self.gaps, padding = columns
            self.padding = [of_row.copy() for of_row in padding]
            if self.heads is not None:
                self.heads.held = self.heads.held[order.tolist()]
            self.upload()

    def take(self, rows: list[int], source: Rows, source_rows: list[int]) -> None:
        for row, of in zip(rows, source_rows, strict=True):
            self.lengths[row], self.seen[row] = source.lengths[of], source.seen[of]
            self.evictions[row], self.gaps[row] = source.evictions[of], source.gaps[of]
            self.padding[row] = source.padding[of].copy()
        if self.heads is not None:
            self.heads.held[rows] = source.heads.held[source_rows]
        self.plans.clear()
        self.upload()

    def upload(self) -> None:
        for mirror in self._mirrors.values():
            mirror.copy_(torch.tensor([self.lengths, self.seen], dtype=torch.int32), non_blocking=True)
        for gap in self._gaps.values():
            gap.copy_(torch.tensor(self.gaps, dtype=torch.int32), non_blocking=True)
        if self.heads is not None:
            self.heads.upload()

    def split(self, windows: HeadWindows) -> np.ndarray:
        """Slots kept by score, and newest ones, the same for all heads: int [2, 1]."""
        return windows.split


def plan_of(rows: Rows | LayerRows, *key) -> SlimmingPlan:
    """The `SlimmingPlan` for (device, slots, capacity, windows), made once for all layers if they share the rows."""
    if isinstance(rows, LayerRows):
        return SlimmingPlan(rows, *key)
    if key not in rows.plans:
        rows.plans[key] = SlimmingPlan(rows, *key)
    return rows.plans[key]


def to_rows(states: torch.Tensor, step: Step | int) -> torch.Tensor:
    """States [B, H, n(, D)] for the rows of a step, or so many: [rows, H / heads, n(, D)] if heads are rows."""
    rows = step if isinstance(step, int) else len(step.new)
    return states if states.shape[0] == rows else states.reshape(rows, -1, *states.shape[2:])


class SlotMasks(NamedTuple):
    """Masks (bool) and positions (int32) of the slots in a slimming of `slots` columns to the window."""

    empty: torch.Tensor  # [B, 1, slots]
    first_recent: torch.Tensor  # [B, 1, 1], the position of the first recent token; those before it are older
    appended: torch.Tensor  # [B, 1, slots], positions of the tokens since the last slimming
    filled: torch.Tensor  # [B, 1, capacity], afterwards
    upcoming: torch.Tensor  # [B, 1, capacity], positions continued past the row's end, so that appends need not write


class SlimmingPlan:
    """What a slimming of `slots` columns to `windows` needs to know. Layers on a device share it if heads are alike.

    `window` is that of the heads, or the largest of their windows. Where these differ, a row here is a head of a row.
    """

    def __init__(self, rows: Rows | LayerRows, device: torch.device, slots: int, capacity: int, windows: HeadWindows):
        self.rows, self.slots, self.capacity, self.even = rows, slots, capacity, windows.even
        self.windows_of = windows
        self.heavy, self.recent = rows.split(windows)  # int [1], or [KV heads]
        self.windows = self.heavy + self.recent
        self.window = int(self.windows.max())
        self.mirror = rows.mirror(device)

    @cached_property
    def split_there(self) -> torch.Tensor:
        """Heavy and recent slots of the heads on the device: int32 [2, KV heads]."""
        return self.rows.split_there(self.windows_of, self.mirror.device)

    @cached_property
    def longest(self) -> int:
        return max(self.rows.lengths)

    @cached_property
    def drops(self) -> bool:
        """Whether a slot is dropped."""
        lengths = np.array(self.rows.lengths).reshape(-1, len(self.windows))
        return bool((lengths > self.windows).any())

    @cached_property
    def ragged(self) -> bool:
        """Whether a row leaves slots empty that others fill."""
        return not self.even or min(self.rows.lengths) < min(self.longest, self.window)

    @cached_property
    def masks(self) -> SlotMasks:
        """Built only when torch picks or moves the slots; the kernels do not need them."""
        lengths, seen = self.mirror[:, :, None, None].unbind(0)  # [B, 1, 1]
        slot = torch.arange(max(self.slots, self.capacity), dtype=torch.int32, device=lengths.device)
        age = lengths - slot[: self.slots]  # 1 = the newest slot
        window, recent = self.limits
        kept = lengths.clamp(max=window)
        return SlotMasks(
            empty=age <= 0,
            first_recent=(seen - recent).to(torch.int32),
            appended=(seen - lengths + slot).to(torch.int32),
            filled=slot[: self.capacity] < kept,
            upcoming=(seen - kept + slot[: self.capacity]).to(torch.int32),
        )

    @cached_property
    def limits(self) -> tuple[int | torch.Tensor, int | torch.Tensor]:
        """The rows' windows, and how many of their newest slots stay: two numbers, or int32 [B, 1, 1] each."""
        if self.even:
            return self.window, int(self.recent[0])
        return self.of_rows(self.split_there.sum(dim=0, dtype=torch.int32)), self.of_rows(self.split_there[1])

    def of_rows(self, of_heads: torch.Tensor) -> torch.Tensor:
        """What the heads have, for each row: [heads] -> [B, 1, 1]."""
        return of_heads.repeat(self.mirror.shape[1] // len(of_heads))[:, None, None]
