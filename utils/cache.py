"""The heavy-hitter KV cache: a bounded number of slots per row and KV head, slimmed on every N-th forward.

Heavy-Hitter Oracle: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
Models", arXiv 2306.14048. Keeping the four oldest slots instead is StreamingLLM, arXiv 2309.17453.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What transformers' models call their cache, as argument and as output: `cache` from 5.24 on.
CACHE_ARGUMENT = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))


def kernels_take(states: torch.Tensor) -> bool:
    """Whether dtype and head_dim of [B, H, n, D] are such that the Triton kernels can take them."""
    head_dim = states.shape[-1]
    return states.dtype in KERNEL_DTYPES and head_dim <= 256 and head_dim * states.element_size() % 16 == 0


@dataclass
class Step:
    """One forward as every layer sees it. Row b holds `start[b]` slots and brings `new[b]` tokens in `columns` columns.

    A row's tokens come first and its padding last, so query column i stands at slot start[b] + i and sees the slots up
    to there. The lists live on the host: shapes and branches follow from them without waiting for the device. A row
    that brings no token is left as it is, but for slimming.
    """

    rows: Rows
    start: list[int]
    new: list[int]
    columns: int
    decode: bool  # one new token a row, appended in place; rows that have ended bring none
    due: bool  # slimming follows the attention
    scored: bool  # attention reports the mass of its queries
    first_scored: list[int]  # query columns from here to new[b] add mass
    decays: bool = True  # mass that is there decays: once a forward, in its first chunk
    static: bool = False  # a decode step that tells the device nothing that changes from step to step: a CUDA graph's

    def __post_init__(self):
        self.min_start, self.max_start = min(self.start), max(self.start)
        self.width = self.max_start + self.columns  # key columns that `HHCache.update` returns
        self.padded = min(self.new) < self.columns
        self.partial = self.decode and self.padded
        self._on: dict[tuple, torch.Tensor] = {}

    def starts(self, device: torch.device) -> torch.Tensor:
        """`start` on `device`, int64 [B]; in a decode step from the lengths that are there already."""
        if self.decode:
            brought = self.brought(device) if self.partial else 1
            return self._once(device, "start", lambda: self.rows.mirror(device)[0].long() - brought)
        return self._once(device, "start", lambda: torch.tensor(self.start, device=device))

    def brought(self, device: torch.device) -> torch.Tensor:
        """Which rows bring tokens: int32 [B], 1 or 0."""
        if self.static:
            return self.rows.brought(device)
        bring = [int(n > 0) for n in self.new]
        return self._once(device, "brought", lambda: torch.tensor(bring, dtype=torch.int32, device=device))

    def attended(self, device: torch.device) -> torch.Tensor:
        """How many slots each row's query of a decode step sees: int32 [B], none where a row brings no token."""
        lengths = self.rows.mirror(device)[0]
        if not self.partial:
            return lengths
        return self._once(device, "attended", lambda: lengths * self.brought(device))

    def padding(self, device: torch.device) -> torch.Tensor:
        """The query columns that hold no token: bool [B, columns]."""
        if self.partial:
            return self.brought(device)[:, None] == 0
        new = torch.tensor(self.new, device=device)
        return self._once(device, "padding", lambda: torch.arange(self.columns, device=device) >= new[:, None])

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
        seen, gap, last = torch.tensor([seen, gaps, self.rows.seen], device=device)[..., None]
        return gap + torch.minimum(seen + column, last - 1)  # padding stands nowhere: frequencies follow the farthest

    def slot_positions(self, device: torch.device) -> torch.Tensor:
        """Positions of slots and new columns where slots are the positions (position_rolling): int64 [1, width].

        Columns past the longest row are padding in every row; they stand at its last slot, for some frequencies follow
        the farthest position.
        """
        longest = max(start + new for start, new in zip(self.start, self.new, strict=True))
        slots = torch.arange(self.width, device=device)
        return (slots if longest == self.width else slots.clamp(max=longest - 1))[None]

    def scored_columns(self, device: torch.device) -> torch.Tensor:
        """The query columns of each row that add mass: bool [B, columns]."""

        def mask():
            first, new = torch.tensor([self.first_scored, self.new], device=device)[..., None].unbind(0)
            column = torch.arange(self.columns, device=device)
            return (column >= first) & (column < new)

        return self._once(device, "scored", mask)

    def spans(self, device: torch.device) -> torch.Tensor:
        """`start`, `new` and `first_scored` on `device`: int32 [3, B]."""
        spans = [self.start, self.new, self.first_scored]
        return self._once(device, "spans", lambda: torch.tensor(spans, dtype=torch.int32, device=device))

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

    During a forward both include its new tokens; they are cut to the window once all layers are slimmed. `padding`
    holds the runs of columns (begin, end) in which a row had no token; `ended` those of them that decode steps fed.
    `gaps` are the positions that a row has left out, for holes in a mask.
    """

    def __init__(self, batch_size: int):
        self.lengths = [0] * batch_size
        self.seen = [0] * batch_size
        self.evictions = [0] * batch_size
        self.padding: list[list[tuple[int, int]]] = [[] for _ in range(batch_size)]
        self.ended: list[list[tuple[int, int]]] = [[] for _ in range(batch_size)]
        self.gaps = [0] * batch_size
        self._bring = [1] * batch_size  # what `brought` says on the device
        self._brought: dict[torch.device, torch.Tensor] = {}
        self._gaps: dict[torch.device, torch.Tensor] = {}
        self._mirrors: dict[torch.device, torch.Tensor] = {}
        self._kept: dict[torch.device, torch.Tensor] = {}
        self._plans: dict[tuple, SlimmingPlan] = {}

    def mirror(self, device: torch.device) -> torch.Tensor:
        """int32 [2, B] on `device`: lengths and tokens seen."""
        if device not in self._mirrors:
            with torch.inference_mode(False):  # outlives the mode it is made in
                self._mirrors[device] = torch.tensor([self.lengths, self.seen], dtype=torch.int32, device=device)
        return self._mirrors[device]

    def kept(self, device: torch.device, heads: int, window: int) -> torch.Tensor:
        """int32 [B, heads, window + 1] on `device`, at a fixed address: what the slimming kernels pass on."""
        if device not in self._kept:
            with torch.inference_mode(False):
                shape = (len(self.lengths), heads, window + 1)
                self._kept[device] = torch.zeros(shape, dtype=torch.int32, device=device)
        return self._kept[device]

    def gap(self, device: torch.device) -> torch.Tensor:
        """`gaps` on `device`, at a fixed address: int32 [B]."""
        if device not in self._gaps:
            with torch.inference_mode(False):
                self._gaps[device] = torch.tensor(self.gaps, dtype=torch.int32, device=device)
        return self._gaps[device]

    def brought(self, device: torch.device) -> torch.Tensor:
        """int32 [B] on `device`, at a fixed address: which rows bring a token to a static step."""
        if device not in self._brought:
            with torch.inference_mode(False):
                self._brought[device] = torch.tensor(self._bring, dtype=torch.int32, device=device)
        return self._brought[device]

    def bring(self, new: list[int]) -> None:
        """Say on the device which rows bring a token to the next static steps, before these are replayed."""
        if new != self._bring:
            self._bring = list(new)
            for there in self._brought.values():
                there.copy_(torch.tensor(new, dtype=torch.int32))

    def pad(self, columns: int, real: torch.Tensor, decode: bool) -> None:
        """Account for the padding among new columns, the first of which is number `columns`; real: bool [B, n]."""
        for row, there in enumerate(real.tolist()):
            if all(there):
                continue
            for begin, end in _runs_without(there):
                for runs in (self.padding[row], self.ended[row])[: 1 + decode]:
                    if runs and runs[-1][1] == columns + begin:
                        runs[-1] = runs[-1][0], columns + end
                    else:
                        runs.append((columns + begin, columns + end))

    def append(self, new: list[int], on_device: bool = True) -> None:
        """Account for new tokens; on the device as well, unless `count_step` does so there."""
        self.lengths = [length + n for length, n in zip(self.lengths, new, strict=True)]
        self.seen = [seen + n for seen, n in zip(self.seen, new, strict=True)]
        self._plans.clear()
        if not on_device:
            return
        if set(new) == {1}:
            self.count_step()
        else:
            self.upload()

    def count_step(self, partial: bool = False) -> None:
        """On the device: each row has one more token, or with `partial` each that `brought` says."""
        for device, mirror in self._mirrors.items():
            mirror.add_(self.brought(device) if partial else 1)

    def cut(self, window: int, on_device: bool = True) -> None:
        """Account for a slimming to `window` slots that all layers have done; on the device unless `cut_there` does."""
        self.evictions = [n + (length > window) for n, length in zip(self.evictions, self.lengths, strict=True)]
        self.lengths = [min(length, window) for length in self.lengths]
        self._plans.clear()
        if on_device:
            self.cut_there(window)

    def cut_there(self, window: int) -> None:
        """On the device: no row has more than `window` slots."""
        for mirror in self._mirrors.values():
            mirror[0].clamp_(max=window)

    def clear(self) -> None:
        self.lengths, self.seen, self.evictions = ([0] * len(self.lengths) for _ in range(3))
        self.padding, self.ended = ([[] for _ in self.lengths] for _ in range(2))
        self.gaps = [0] * len(self.lengths)
        self._plans.clear()
        self.upload()

    def reorder(self, order: torch.Tensor) -> None:
        state = list(zip(self.lengths, self.seen, self.evictions, self.gaps, self.padding, self.ended, strict=True))
        if any(row != state[0] for row in state):  # alike rows stay so: beams of one length need no wait for the device
            rows = [[item.copy() if isinstance(item, list) else item for item in state[i]] for i in order.tolist()]
            columns = map(list, zip(*rows, strict=True))
            self.lengths, self.seen, self.evictions, self.gaps, self.padding, self.ended = columns
            self.upload()

    def take(self, rows: list[int], source: Rows, source_rows: list[int]) -> None:
        for row, of in zip(rows, source_rows, strict=True):
            self.lengths[row], self.seen[row] = source.lengths[of], source.seen[of]
            self.evictions[row], self.gaps[row] = source.evictions[of], source.gaps[of]
            self.padding[row], self.ended[row] = source.padding[of].copy(), source.ended[of].copy()
        self._plans.clear()
        self.upload()

    def upload(self) -> None:
        for mirror in self._mirrors.values():
            mirror.copy_(torch.tensor([self.lengths, self.seen], dtype=torch.int32), non_blocking=True)
        for gap in self._gaps.values():
            gap.copy_(torch.tensor(self.gaps, dtype=torch.int32), non_blocking=True)

    def plan(self, *key) -> SlimmingPlan:
        """The `SlimmingPlan` for (device, slots, capacity, heavy, recent), made once for all layers."""
        if key not in self._plans:
            self._plans[key] = SlimmingPlan(self, *key)
        return self._plans[key]


def _runs_without(real: list[bool]) -> list[tuple[int, int]]:
    """The runs (begin, end) of False in a row."""
    edges = [
        at for at in range(len(real) + 1) if (real[at - 1] if at else True) != (real[at] if at < len(real) else True)
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


class SlotMasks(NamedTuple):
    """Which slots are which in a slimming of `slots` columns to the window, and their positions. bool and int32."""

    empty: torch.Tensor  # [B, 1, slots]
    recent: torch.Tensor  # [B, 1, slots]
    appended: torch.Tensor  # [B, 1, slots], positions of the tokens since the last slimming
    filled: torch.Tensor  # [B, 1, capacity], afterwards
    upcoming: torch.Tensor  # [B, 1, capacity], positions counted on past the row's end: appending need not write them


class SlimmingPlan:
    """One slimming of `slots` columns to heavy + recent, as far as all layers on a device share it."""

    def __init__(self, rows: Rows, device: torch.device, slots: int, capacity: int, heavy: int, recent: int):
        self.slots, self.capacity = slots, capacity
        self.heavy, self.recent, self.window = heavy, recent, heavy + recent
        self.longest = max(rows.lengths)
        self.ragged = min(rows.lengths) < min(self.longest, self.window)  # a row leaves slots empty that others fill
        self.mirror = rows.mirror(device)

    @cached_property
    def masks(self) -> SlotMasks:
        """Made when torch picks or moves the slots; the kernels do without."""
        lengths, seen = self.mirror[:, :, None, None].unbind(0)  # [B, 1, 1]
        slot = torch.arange(max(self.slots, self.capacity), dtype=torch.int32, device=lengths.device)
        age = lengths - slot[: self.slots]  # 1 = the newest slot
        kept = lengths.clamp(max=self.window)
        return SlotMasks(
            empty=age <= 0,
            recent=(age > 0) & (age <= self.recent),
            appended=(seen - lengths + slot).to(torch.int32),
            filled=slot[: self.capacity] < kept,
            upcoming=(seen - kept + slot[: self.capacity]).to(torch.int32),
        )


def select_slots(score: torch.Tensor, empty: torch.Tensor, recent: torch.Tensor, window: int) -> torch.Tensor:
    """The slots to keep: all recent ones and, of the older ones, those with the greatest score, `window` together.

    Args:
        score: [B, Hkv, slots], finite, float.
        empty, recent: bool [B, 1, slots]; recent slots are kept whatever their score, empty ones only where a row is
            shorter than the window, to fill it up.
        window: slots to keep; all `slots` when there are no more.

    Returns: int64 [B, Hkv, min(window, slots)], ascending. Of equal scores the older slot is kept. A row that is not
    longer than the window keeps every slot where it is.
    """
    score = score.masked_fill(recent, torch.inf).masked_fill(empty, -torch.inf)
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :window].sort(dim=-1).values


def random_priority(positions: torch.Tensor, layer_idx: int, seed: int) -> torch.Tensor:
    """A fixed pseudo-random number per token and KV head, so that a row's choice depends on neither batch nor device.

    A 32-bit integer hash with the xor-shift-multiply finaliser of MurmurHash3's kind; float32 values below 2**24.

    Args: positions: [B, Hkv, slots]. Returns: float32 of the same shape.
    """
    head = torch.arange(positions.shape[1], device=positions.device)[:, None]
    x = (positions.long() * 0x9E3779B1 + head * 0xC2B2AE3D + random_salt(layer_idx, seed)) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) >> 8).float()


def random_salt(layer_idx: int, seed: int) -> int:
    """What layer and seed add to the hash of a token: 32 bits."""
    return (layer_idx * 0x85EBCA77 + seed * 0x27D4EB2F) & 0xFFFFFFFF


class HHLayer(CacheLayerMixin):
    """The slots of one layer, allocated at its first forward and never moved.

    keys, values [B, Hkv, capacity, D]; mass (and count, for score_norm "mean") [B, Hkv, capacity] float32, zero past a
    row's length; positions [B, Hkv, capacity] int32; lengths [B] int32, of the rows. `block` holds a multi-token
    forward's keys and values (and then mass, count) until its slimming brings them into the slots.
    """

    def __init__(self, h2o, layer_idx: int):
        super().__init__()
        self.h2o = h2o
        self.layer_idx = layer_idx
        self.block: dict[str, torch.Tensor] | None = None

    @torch.inference_mode(False)  # slots outlive the mode they are made in
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = (*key_states.shape[:2], self.h2o.capacity)
        self.keys = key_states.new_zeros(*slots, key_states.shape[-1])
        self.values = value_states.new_zeros(*slots, value_states.shape[-1])
        self.mass = torch.zeros(slots, dtype=torch.float32, device=self.device)
        self.count = torch.zeros_like(self.mass) if self.h2o.needs_mass and self.h2o.score_norm == "mean" else None
        self.positions = torch.arange(slots[-1], dtype=torch.int32, device=self.device).expand(slots).contiguous()
        self.by_kernel = self.h2o.slimming_kernels(self.device) is not None and kernels_take(self.keys)
        self.by_kernel &= self.keys.dtype == self.values.dtype
        self.is_initialized = True

    def join(self, rows: Rows) -> None:
        """Take the rows' lengths from their mirror, and allocate now what a CUDA graph must not allocate."""
        self.lengths = rows.mirror(self.device)[0]
        if self.h2o.slimming_kernels(self.device) is not None:
            rows.kept(self.device, self.keys.shape[1], self.h2o.window_length)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The slot tensors by name, mass only where slots are ranked by it."""
        names = ("keys", "values", "positions") + ("mass", "count") * self.h2o.needs_mass
        return {name: slots for name in names if (slots := getattr(self, name)) is not None}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step):
        if not self.is_initialized or (step.max_start == 0 and not self._takes(key_states, value_states)):
            self.lazy_initialization(key_states, value_states)
            self.join(step.rows)
        # a turn under autocast, or one after it, may compute in another dtype than that of the slots
        key_states, value_states = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)
        if step.decode:
            with torch.no_grad():
                for slots, new in ((self.keys, key_states), (self.values, value_states)):
                    if step.partial:
                        rows = torch.tensor([b for b, n in enumerate(step.new) if n], device=slots.device)
                        slots[rows, :, step.starts(slots.device)[rows]] = new[rows, :, 0]
                    elif step.min_start == step.max_start and not step.static:
                        slots[:, :, step.min_start].copy_(new[:, :, 0])
                    else:
                        at = step.starts(slots.device)
                        slots[torch.arange(len(at), device=slots.device), :, at] = new[:, :, 0]
            width = self.h2o.capacity if step.static else step.width
            return self.keys[:, :, :width], self.values[:, :, :width]
        keys, values = self._join(self.keys, key_states, step), self._join(self.values, value_states, step)
        self.block = {"keys": keys.detach(), "values": values.detach()}
        return keys, values

    def _takes(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether empty slots that are there suit these states: after `reset` the model may be another."""
        pairs = (self.keys, key_states), (self.values, value_states)
        return all(
            (slots.dtype, slots.device, slots.shape[1], slots.shape[3])
            == (states.dtype, states.device, states.shape[1], states.shape[3])
            for slots, states in pairs
        )

    def _join(self, slots: torch.Tensor, new: torch.Tensor, step: Step) -> torch.Tensor:
        """Each row's filled slots, then its new tokens: [B, Hkv, step.width, D]."""
        if step.max_start == 0:
            return new
        if step.min_start == step.max_start:
            return torch.cat([slots[:, :, : step.max_start], new], dim=2)
        joined = new.new_zeros(*new.shape[:2], step.width, new.shape[-1])
        joined[:, :, : step.max_start] = slots[:, :, : step.max_start]
        at = step.starts(new.device)[:, None] + torch.arange(step.columns, device=new.device)
        return joined.scatter(2, at[:, None, :, None].expand_as(new), new)

    def add_mass(self, mass: torch.Tensor, step: Step) -> None:
        """Add this forward's mass [B, Hkv, step.width]; what is there decays first."""
        decay = self.h2o.score_decay
        added = {"mass": mass}
        if self.count is not None:
            added["count"] = step.scored_queries(mass.device)[:, None].expand_as(mass)
        for name, addition in added.items():
            slots = getattr(self, name)
            old = slots[:, :, : step.width if step.decode else step.max_start]
            if decay != 1.0 and step.decays:
                old.mul_(torch.where(step.brought(old.device) > 0, decay, 1.0)[:, None, None] if step.padded else decay)
            if step.decode:
                old.add_(addition)
            else:
                total = addition.clone() if name == "count" else addition
                total[:, :, : step.max_start].add_(old)
                self.block[name] = total

    def slim(self, rows: Rows, heavy: int, recent: int, by_mask: bool, static: bool = False) -> None:
        """Bring slots, or the pending block, into the first heavy + recent slots (boolean mask, or gather).

        With `static` the same is enqueued whatever the rows' lengths.
        """
        source, self.block = self.block or self.tensors(), None
        appending, width = source["keys"] is not self.keys, source["keys"].shape[2]
        plan = rows.plan(self.keys.device, width, self.h2o.capacity, heavy, recent)
        plan.ragged |= static
        if plan.longest <= plan.window and not static:
            for name, old in source.items() if appending else ():
                _fill(getattr(self, name), old[:, :, : plan.longest], plan)
            return  # positions are right: they are counted on past the row's end
        kernels = self.h2o.slimming_kernels(self.keys.device)
        ranking = kernels is not None and max(width, self.h2o.capacity) <= kernels.MAX_SLOTS
        moving = kernels is not None and not by_mask
        if appending and not (ranking and moving):
            filled = min(self.h2o.capacity, width)
            new = plan.masks.appended[..., filled:width].expand(*self.mass.shape[:2], -1)
            source["positions"] = torch.cat([self.positions[:, :, :filled], new], dim=-1)
        kept = rows.kept(self.keys.device, self.keys.shape[1], self.h2o.window_length) if kernels else None
        keep = self._keep(source, plan, kernels if ranking else None, kept, moving)
        if moving:
            if not ranking:
                kernels.hand_over(keep, kept)
            keys, values = source.pop("keys"), source.pop("values")
            kernels.compact(self.keys, self.values, keys, values, plan.mirror, kept, plan.window)
            if ranking:
                return  # the rest moved when its slots were picked
        for name, old in source.items():
            _fill(getattr(self, name), _compact_by_mask(old, keep) if by_mask else _compact(old, keep), plan)
        for name in ("mass", "count"):
            if (slots := getattr(self, name)) is not None:
                slots[:, :, plan.window :].zero_()
        torch.where(plan.masks.filled, self.positions, plan.masks.upcoming, out=self.positions)

    def _keep(self, source: dict[str, torch.Tensor], plan: SlimmingPlan, kernels, kept, moving: bool) -> torch.Tensor:
        """The slots that either slimming keeps, ascending: [B, Hkv, window], int64 from torch, int32 from the kernel.

        The kernel writes them to `kept` and, with `moving`, brings positions, mass and count into place at once.
        """
        if kernels is None:
            return select_slots(self._score(source), plan.masks.empty, plan.masks.recent, plan.window)
        rank, salt, slots, scores = "oldest", 0, (None, None), (None, None)
        if self.h2o.score == "random" and plan.heavy:
            rank, salt = "random", random_salt(self.layer_idx, self.h2o.score_seed)
        elif self.h2o.needs_mass:
            rank, slots = "mass" if self.count is None else "mean", (self.mass, self.count)
            scores = source["mass"].contiguous(), source["count"].contiguous() if "count" in source else None
        kernels.select(
            self.positions, *slots, *scores, plan.slots, plan.mirror, kept, plan.heavy, plan.recent, rank, salt, moving
        )
        return kept[..., : plan.window]

    def _score(self, source: dict[str, torch.Tensor]) -> torch.Tensor:
        """What slots are ranked by, greatest kept: float32 [B, Hkv, slots]."""
        positions = source["positions"]
        if self.h2o.score == "random":
            return random_priority(positions, self.layer_idx, self.h2o.score_seed)
        if not self.h2o.needs_mass:  # sinks, or a window without heavy hitters, where nothing is ranked
            return -torch.arange(positions.shape[-1], dtype=torch.float32, device=positions.device).expand_as(positions)
        if self.count is not None:
            return source["mass"] / source["count"].clamp(min=torch.finfo(torch.float32).tiny)
        return source["mass"]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for slots in self.tensors().values():
            slots.copy_(slots.index_select(0, beam_idx.to(slots.device)))

    def reset(self) -> None:
        self.block = None
        if self.is_initialized:
            for slots in (self.keys, self.values, self.mass) + ((self.count,) if self.count is not None else ()):
                slots.zero_()
            self.positions.copy_(torch.arange(self.h2o.capacity, dtype=torch.int32, device=self.positions.device))

    # The mask sizes and lengths that transformers asks of a layer belong to the whole cache here.
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("ask the HHCache")

    def get_seq_length(self) -> int:
        raise NotImplementedError("ask the HHCache")

    def get_max_length(self) -> int:
        return -1  # tokens never run out of slots


def _fill(slots: torch.Tensor, kept: torch.Tensor, plan: SlimmingPlan) -> None:
    """Copy [B, Hkv, n(, D)] into the first n slots, but nothing past a row's end: padding stays outside."""
    slots = slots[:, :, : kept.shape[2]]
    if plan.ragged:
        filled = plan.masks.filled[..., : kept.shape[2]]
        kept = torch.where(filled if kept.ndim == 3 else filled[..., None], kept, slots)
    slots.copy_(kept)


def _compact(old: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The kept slots of [B, Hkv, slots(, D)] by gather."""
    if old.ndim == 3:
        return old.gather(2, keep)
    dtype = old.dtype
    if old.shape[-1] * old.itemsize % 8 == 0:  # move 8 bytes with each index, not 2
        old = old.view(torch.int64)
    return old.gather(2, keep[..., None].expand(*keep.shape, old.shape[-1])).view(dtype)


def _compact_by_mask(old: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The same as H2O does it: a boolean mask over the slots, and a copy of what it leaves."""
    mask = torch.zeros(old.shape[:3], dtype=torch.bool, device=old.device).scatter(2, keep.long(), True)
    return old[mask].view(*keep.shape, *old.shape[3:])


class HHCache(Cache):
    """Heavy-hitter cache of all layers: `capacity` = window_length + update_interval slots per row and KV head.

    Invariants, for every layer:

    - keys, values [B, Hkv, capacity, D], mass [B, Hkv, capacity] float32, positions [B, Hkv, capacity] int32: one slot
      index means the same token in all four. A row's slots are filled from 0; past its length mass is zero.
    - Kept slots stay in ascending order of original position; the `recent` newest tokens always survive.
    - lengths[b] <= window_length after slimming, <= capacity between forwards; the same for all layers and heads.
    - `get_seq_length()` counts the columns seen (as a full cache would hold them), not the slots stored.
    - Padding is dropped on entry, wherever it stands: a row's slots are what they would be alone. So is what `generate`
      feeds to a row that has ended while others go on.
    - The step clock is the number of forwards since the cache was reset; slimming is due after forwards of several
      tokens and after every `update_interval`-th forward. A forward that takes its columns in chunks is one forward
      (one tick, one decay of mass), slimmed after each chunk.
    - The slots are allocated at the first forward of a batch size and stay at their addresses; a decode step makes
      no host wait for the device.
    - Rows are independent: one may be replaced right after a slimming (`take_rows`), and goes on as it would alone.

    `H2OLlamaForCausalLM.forward` drives it: `begin`, then per layer `update`, `add_mass` and `slim`, then `end`.

    Args:
        h2o: an `H2OConfig`; the cache's own settings, whatever the model's are.
    """

    def __init__(self, h2o):
        if not hasattr(h2o, "window_length"):
            raise ValueError(f"HHCache: give an H2OConfig, not {h2o!r:.60}")
        super().__init__(layers=[])
        self.h2o = h2o
        self.step: Step | None = None  # the forward under way
        self.clock = 0
        self._columns = 0
        self._chunked = 0  # columns of a forward in chunks that have been taken, 0 between forwards
        self._rows: Rows | None = None

    # One forward

    def begin(
        self,
        batch_size: int,
        columns: int,
        new: list[int] | None = None,
        static: bool = False,
        chunk: tuple[int, int] | None = None,
        real: torch.Tensor | None = None,
    ) -> Step:
        """Open a forward of [batch_size, columns] tokens; `new[b]` of row b's are real, all unless given.

        `real`, bool [batch_size, columns] on the host, says in which columns these stand: the last ones unless given.

        Of a forward in chunks, `chunk` says which columns (begin, end) are taken now; the others come before and after,
        each opened and closed in turn. Where `score_queries` counts the last queries of a prompt, those are the last of
        a chunk that drops slots, and of the whole prompt: slots cannot be ranked by queries that are still to come.

        With `static`, a decode step tells the device nothing that changes from step to step, so that a CUDA graph can
        hold it: what the device counts, it counts in `Rows.count_step` and `slim_all`, which are recorded with it.

        Raises: RuntimeError after a forward that did not finish; ValueError when the batch size changes before a reset.
        """
        begin, end = (0, columns) if chunk is None else chunk
        if self.step is not None or begin != self._chunked:
            raise RuntimeError("the last forward with this HHCache did not finish: reset() it before the next one")
        if self._rows is None or (self.clock == 0 and len(self._rows.lengths) != batch_size):
            self._rows, self.layers = Rows(batch_size), []
        rows, h2o = self._rows, self.h2o
        if len(rows.lengths) != batch_size:
            raise ValueError(f"this HHCache holds {len(rows.lengths)} rows, the input {batch_size}: reset() it first")
        new = new or [columns] * batch_size
        if len(new) != batch_size:
            raise ValueError(f"{len(new)} token counts for {batch_size} rows")
        decode = self.clock > 0 and columns == 1
        due = not decode or self.due
        if begin == 0 and min(new) < columns:
            if real is None:
                real = torch.arange(columns) >= columns - torch.tensor(new)[:, None]
            rows.pad(self._columns, real, decode)
        if static:
            rows.bring(new)
        later = [max(0, n - end) for n in new]
        new = [min(max(0, n - begin), end - begin) for n in new]
        first_scored = [0] * batch_size
        if self.clock == 0 and h2o.score_queries is not None:
            for b, length in enumerate(rows.lengths):
                last = new[b] + (later[b] if length + new[b] <= h2o.window_length else 0) - h2o.score_queries
                first_scored[b] = min(max(0, last), new[b])
        scored = h2o.needs_mass and (h2o.score_every_step or due) and (decode or first_scored != new)
        self._chunked = end % columns
        self.step = Step(rows, rows.lengths, new, end - begin, decode, due, scored, first_scored, begin == 0, static)
        rows.append(new, on_device=not static)
        return self.step

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Add a layer's new keys and values [B, Hkv, columns, D]; returns those to attend to, [B, Hkv, width, D].

        A decode step returns views of the slots, a forward of several tokens the slots followed by the new tokens.
        Slots carry no gradient: it reaches the new tokens of a forward of several, and those only.

        Raises: RuntimeError outside a forward of H2OLlamaForCausalLM, which alone would slim the cache.
        """
        if self.step is None:
            raise RuntimeError(
                "an HHCache is slimmed only by H2OLlamaForCausalLM: call that model (not its .model, and not a plain "
                "LlamaForCausalLM), or use a DynamicCache"
            )
        while len(self.layers) <= layer_idx:
            self.layers.append(HHLayer(self.h2o, len(self.layers)))
        return self.layers[layer_idx].update(key_states, value_states, self.step)

    @torch.no_grad()
    def add_mass(self, mass: torch.Tensor, layer_idx: int) -> None:
        """Add the mass [B, Hkv, width] float32 that this forward's queries gave to the slots (after score_decay)."""
        self.layers[layer_idx].add_mass(mass, self.step)

    @torch.no_grad()
    def update_slimmingH(self, layer_idx: int) -> None:
        """Slim a layer by gathering the kept slots into place; the slots are not reallocated."""
        static = self.step is not None and self.step.static
        self.layers[layer_idx].slim(self._rows, self.h2o.heavy, self.h2o.recent, by_mask=False, static=static)

    @torch.no_grad()
    def update_slimming(self, layer_idx: int) -> None:
        """Slim a layer as H2O does, by a boolean mask over the slots and a copy; leaves the same cache."""
        self.layers[layer_idx].slim(self._rows, self.h2o.heavy, self.h2o.recent, by_mask=True)

    def slim(self, layer_idx: int) -> None:
        """The slimming that the settings name."""
        (self.update_slimmingH if self.h2o.slimming == "H" else self.update_slimming)(layer_idx)

    @torch.no_grad()
    def slim_all(self) -> None:
        """Slim all layers in a static step, whose layers leave it to the end, and count that on the device."""
        for layer_idx in range(len(self.layers)):
            self.update_slimmingH(layer_idx)
        self._rows.cut_there(self.h2o.window_length)

    def end(self, gaps: list[int] | None = None) -> None:
        """Close the forward after its last layer. `gaps`: positions that each row has left out in it."""
        if self.step.due:
            self._rows.cut(self.h2o.window_length, on_device=not self.step.static)
        self._columns += self.step.columns
        self.clock += self._chunked == 0
        if gaps is not None and not self._chunked:
            self._rows.gaps = [before + gap for before, gap in zip(self._rows.gaps, gaps, strict=True)]
            self._rows.upload()
        self.step = None

    @property
    def due(self) -> bool:
        """Whether slimming follows the next forward, if that is a decode step."""
        return self.clock % self.h2o.update_interval == 0

    @property
    def can_join(self) -> bool:
        """Whether the last forward slimmed, or nothing has been seen: where `take_rows` may exchange rows."""
        between = self.step is None and not self._chunked
        return between and (self.clock == 0 or (self.clock - 1) % self.h2o.update_interval == 0)

    # Between forwards

    @torch.no_grad()
    def evict_for_space(self, space_needed: int) -> None:
        """Slim every row to window_length - space_needed slots, taken from its recent part, before a turn of so many.

        Raises: ValueError where space_needed is negative, or more than the recent part.
        """
        if space_needed < 0:
            raise ValueError(f"space_needed={space_needed}: must be at least 0")
        if space_needed > self.h2o.recent:
            raise ValueError(
                f"space_needed={space_needed} does not fit into the {self.h2o.recent} recent slots of the window: "
                "raise window_length, lower num_heavy_hitters, or split the turn"
            )
        if self._rows is None:
            return
        recent = self.h2o.recent - space_needed
        for layer in self.layers:
            layer.slim(self._rows, self.h2o.heavy, recent, by_mask=False)
        self._rows.cut(self.h2o.heavy + recent)

    def reset(self) -> None:
        """Forget all tokens and counts, and set the clock to 0; the slots stay allocated, for a next use."""
        self.step, self.clock, self._columns, self._chunked = None, 0, 0, 0
        if self._rows is not None:
            self._rows.clear()
        for layer in self.layers:
            layer.reset()

    def with_rows(self, batch_size: int) -> HHCache:
        """Another cache with `batch_size` empty rows and slots as this one's, for `take_rows`."""
        other = HHCache(self.h2o)
        other._rows = Rows(batch_size)
        for layer in self.layers:
            other.layers.append(HHLayer(self.h2o, layer.layer_idx))
            row = layer.keys[:1].expand(batch_size, -1, -1, -1), layer.values[:1].expand(batch_size, -1, -1, -1)
            other.layers[-1].lazy_initialization(*row)
            other.layers[-1].join(other._rows)
        return other

    @torch.no_grad()
    def take_rows(self, rows: list[int], source: HHCache, source_rows: list[int]) -> None:
        """Replace `rows` by copies of another cache's rows, which then go on here as they would there.

        Raises: ValueError unless both caches have the same settings and have just slimmed: a row's own slimmings then
        fall on the same of its steps.
        """
        if self.h2o != source.h2o or len(self.layers) != len(source.layers):
            raise ValueError("take_rows: the caches' settings or layers differ")
        if not (self.can_join and source.can_join):
            raise ValueError("take_rows: rows change right after a slimming only (where `can_join` holds)")
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            to, of = (torch.tensor(indices, device=mine.keys.device) for indices in (rows, source_rows))
            for name, slots in mine.tensors().items():
                slots.index_copy_(0, to, getattr(theirs, name).index_select(0, of))
        self._rows.take(rows, source._rows, source_rows)
        self.clock = max(self.clock, 1)  # what a row brings begins with its prefill

    @torch.no_grad()
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let row b continue row beam_idx[b], [B] int64, in place."""
        for layer in self.layers:
            layer.reorder_cache(beam_idx)
        if self._rows is not None:
            self._rows.reorder(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "the rows of an HHCache are fixed: reorder_cache exchanges them, reset() makes new ones"
        )

    batch_repeat_interleave = batch_select_indices

    def crop(self, tokens_to_remove: int = 0) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "an HHCache cannot take tokens back (evicted ones are gone): assisted decoding needs a full cache"
        )

    activate_past_recording = crop  # what assisted decoding asks for first

    # What it holds

    @property
    def lengths(self) -> list[int]:
        """Filled slots of each row."""
        return list(self._rows.lengths) if self._rows else []

    @property
    def seen(self) -> list[int]:
        """Tokens each row has seen, padding not counted."""
        return list(self._rows.seen) if self._rows else []

    @property
    def evictions(self) -> list[int]:
        """Slimmings that dropped slots, for each row."""
        return list(self._rows.evictions) if self._rows else []

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, filled or not: keys, values, mass and positions of every layer."""
        return sum(
            slots.nbytes
            for layer in self.layers
            if layer.is_initialized
            for slots in (layer.tensors() | {"mass": layer.mass}).values()
        )

    def positions(self, layer: int) -> torch.Tensor:
        """Original positions that a layer's slots hold, int32 [B, Hkv, longest row], -1 past a row's length."""
        positions = self.layers[layer].positions[:, :, : max(self.lengths)]
        lengths = self._rows.mirror(positions.device)[0, :, None, None]
        return positions.masked_fill(torch.arange(positions.shape[-1], device=positions.device) >= lengths, -1)

    def check_past(self, past: torch.Tensor) -> None:
        """Raise ValueError unless a mask of the columns so far, bool [B, n] on the host, is that of the tokens seen.

        Of the padding that decode steps fed to rows that had ended it may say what it likes: it is in no slot.
        """
        if self._rows is None:
            seen = torch.zeros(len(past), 0, dtype=torch.bool)
        else:
            seen = torch.ones(len(self._rows.lengths), self._columns, dtype=torch.bool)
        shown = past[:, max(0, past.shape[1] - seen.shape[1]) :]  # what is to the left of all columns must be padding
        if len(past) != len(seen) or shown.shape != seen.shape or past[:, : past.shape[1] - seen.shape[1]].any():
            raise ValueError(
                f"attention_mask: shows {past.shape[1]} columns before this input, the cache has seen "
                f"{seen.shape[1]}; give the mask of all columns or of the new ones only, or reset() the cache"
            )
        ended = torch.zeros_like(seen)
        for mask, runs, value in ((seen, self._runs("padding"), False), (ended, self._runs("ended"), True)):
            for row, begin, end in runs:
                mask[row, begin:end] = value
        for fault, what in ((seen & ~shown, "hides tokens that"), (shown & ~seen & ~ended, "shows padding that")):
            if fault.any():
                row, column = fault.nonzero()[0].tolist()
                raise ValueError(
                    f"attention_mask: {what} the cache has taken as such (row {row}, column {column}); tokens cannot "
                    "be hidden or shown afterwards: give the mask of the new columns only, or reset() the cache"
                )

    def _runs(self, name: str) -> list[tuple[int, int, int]]:
        """(row, begin, end) of the rows' `padding` or `ended`."""
        runs = getattr(self._rows, name, ())
        return [(row, begin, end) for row, of_row in enumerate(runs) for begin, end in of_row]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included: where a full cache, and so `generate`, would be."""
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._columns + query_length, 0
