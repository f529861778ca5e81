"""The heavy-hitter KV cache: a bounded number of slots per row and KV head, slimmed on every N-th forward.

Heavy-Hitter Oracle: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
Models", arXiv 2306.14048. Keeping the four oldest slots instead is StreamingLLM, arXiv 2309.17453.
"""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from utils.padding import Padding, check_past
from utils.slimming import Slimming, TorchSlimmer
from utils.slots import Slots, gather_by_mask
from utils.step import Rows, Step

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What transformers' models call their cache, as argument and as output: `cache` from 5.24 on.
CACHE_ARGUMENT = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))


def kernels_take(states: torch.Tensor) -> bool:
    """Whether dtype and head_dim of [B, H, n, D] are such that the Triton kernels can take them."""
    head_dim = states.shape[-1]
    return states.dtype in KERNEL_DTYPES and head_dim <= 256 and head_dim * states.element_size() % 16 == 0


class HHLayer(CacheLayerMixin):
    """One layer: its slots, allocated at its first forward, and what a forward of several tokens adds to them.

    `block` holds such a forward's keys and values (and then mass, count) until its slimming brings them into the slots.
    `keys` and `values` are the slots', for code that knows transformers' layers; `lengths` [B] int32 are the rows'.
    """

    def __init__(self, h2o, layer_idx: int):
        super().__init__()
        self.h2o = h2o
        self.layer_idx = layer_idx
        self.slimmer = TorchSlimmer()
        self.block: dict[str, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        ranked = ("mass", "count") if self.h2o.score_norm == "mean" else ("mass",)
        ranked *= self.h2o.needs_mass
        self.own(Slots(key_states, value_states, self.h2o.capacity, ranked))

    def own(self, slots: Slots) -> None:
        """Hold these slots from here on."""
        self.slots, self.keys, self.values = slots, *slots.read()
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.by_kernel = self.slimmer.by_kernel and kernels_take(self.keys) and self.keys.dtype == self.values.dtype
        self.is_initialized = True

    def join(self, rows: Rows) -> None:
        """Take the rows' lengths from their mirror, and allocate now what a CUDA graph must not allocate."""
        self.lengths = rows.mirror(self.device)[0]
        if self.slimmer.by_kernel:
            rows.kept(self.device, self.slots.heads, self.h2o.window_length)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step, slimmer: TorchSlimmer):
        if not self.is_initialized or (step.max_start == 0 and not self.slots.suit(key_states, value_states)):
            self.slimmer = slimmer
            self.lazy_initialization(key_states, value_states)
            self.join(step.rows)
        held = self.slots.heads, self.keys.shape[3]
        if held != (new := (key_states.shape[1], key_states.shape[3])):
            raise ValueError(f"this HHCache holds {held} KV heads and head_dim, the model has {new}: reset() it first")
        if step.decode:
            extended = None
            if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
                # slots carry no gradient, and later steps write to them
                extended = self.slots.extended(key_states, value_states, step)
            self.slots.append(key_states, value_states, step)
            return extended or self.slots.read(self.h2o.capacity if step.static else step.width)
        keys, values = self.slots.extended(key_states, value_states, step)
        self.block = {"keys": keys.detach(), "values": values.detach()}
        return keys, values

    def add_mass(self, mass: torch.Tensor, step: Step) -> None:
        """Add this forward's mass [B, Hkv, step.width]; what is there decays first."""
        decay = self.h2o.score_decay
        added = {"mass": mass}
        if self.slots.count is not None:
            added["count"] = step.scored_queries(mass.device)[:, None].expand_as(mass)
        for name, addition in added.items():
            slots = getattr(self.slots, name)
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
        block, self.block = self.block, None
        width = self.h2o.capacity if block is None else block["keys"].shape[2]
        plan = rows.plan(self.device, width, self.h2o.capacity, heavy, recent)
        plan.ragged |= static
        if plan.longest <= plan.window and not static:
            if block is not None:
                self.slots.fill({name: old[:, :, : plan.longest] for name, old in block.items()}, plan)
            return  # positions are right: they are counted on past the row's end
        kept = None
        if self.slimmer.by_kernel:
            kept = rows.kept(self.device, self.slots.heads, self.h2o.window_length)
        slimming = Slimming(self.slots, block, plan, self.h2o.policy, self.layer_idx, self.h2o.score_seed, kept)
        if by_mask:
            self.slots.compact(slimming.tensors(), self.slimmer.pick(slimming), plan, gather_by_mask)
        else:
            self.slimmer.slim(slimming)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.slots.reorder(beam_idx)

    def reset(self) -> None:
        self.block = None
        if self.is_initialized:
            self.slots.clear()

    # The mask sizes and lengths that transformers asks of a layer belong to the whole cache here.
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("ask the HHCache")

    def get_seq_length(self) -> int:
        raise NotImplementedError("ask the HHCache")

    def get_max_length(self) -> int:
        return -1  # tokens never run out of slots


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

    `H2OLlamaForCausalLM.forward` drives it: `begin`, then per layer `update`, `add_mass` and `slim`, then `end`. The
    attention hands the slimmer that goes with its backend to `update`.

    Args:
        h2o: an `H2OConfig`; the cache's own settings, whatever the model's are.
    """

    def __init__(self, h2o):
        if not hasattr(h2o, "window_length"):
            raise ValueError(f"HHCache: give an H2OConfig, not a {type(h2o).__name__}")
        super().__init__(layers=[])
        self.h2o = h2o
        self.schedule = h2o.schedule
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

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args,
        slimmer: TorchSlimmer | None = None,
        **kwargs,
    ):
        """Add a layer's new keys and values [B, Hkv, columns, D]; returns those to attend to, [B, Hkv, width, D].

        A decode step returns views of the slots, a forward of several tokens the slots followed by the new tokens.
        Slots carry no gradient: it reaches the new tokens, and those only. `slimmer`, torch's unless given, slims the
        layer from its first forward on.

        Raises: RuntimeError outside a forward of H2OLlamaForCausalLM, which alone would slim the cache; ValueError for
            a model of another shape than the one whose tokens it holds.
        """
        if self.step is None:
            raise RuntimeError(
                "an HHCache is slimmed only by H2OLlamaForCausalLM: call that model (not its .model, and not a plain "
                "LlamaForCausalLM), or use a DynamicCache"
            )
        if len(self.layers) <= layer_idx and self.clock:
            raise ValueError(f"this HHCache holds {len(self.layers)} layers, the model has more: reset() it first")
        while len(self.layers) <= layer_idx:
            self.layers.append(HHLayer(self.h2o, len(self.layers)))
        return self.layers[layer_idx].update(key_states, value_states, self.step, slimmer or TorchSlimmer())

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
        return self.schedule.is_due(self.clock)

    @property
    def can_join(self) -> bool:
        """Whether the last forward slimmed, or nothing has been seen: where `take_rows` may exchange rows."""
        between = self.step is None and not self._chunked
        return between and (self.clock == 0 or self.schedule.is_due(self.clock - 1))

    # Between forwards

    @torch.no_grad()
    def evict_for_space(self, space_needed: int) -> None:
        """Slim every row to window_length - space_needed slots, taken from its recent part, before a turn of so many.

        Raises: ValueError where space_needed is negative, or more than the recent part.
        """
        if not isinstance(space_needed, Integral) or space_needed < 0:
            raise ValueError(f"space_needed={space_needed!r:.60}: must be a whole number of at least 0")
        space_needed = int(space_needed)
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
            other.layers[-1].slimmer = layer.slimmer
            other.layers[-1].own(layer.slots.empty_like(batch_size))
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
            mine.slots.take_rows(rows, theirs.slots, source_rows)
        self._rows.take(rows, source._rows, source_rows)
        self.clock = max(self.clock, 1)  # what a row brings begins with its prefill

    @torch.no_grad()
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let row b continue row beam_idx[b], [B] int64, in place. Raises ValueError for another number of rows."""
        if beam_idx.shape != (len(self.lengths),):
            raise ValueError(f"beam_idx {tuple(beam_idx.shape)}: this HHCache holds {len(self.lengths)} rows")
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
        return sum(layer.slots.nbytes for layer in self.layers if layer.is_initialized)

    def positions(self, layer: int) -> torch.Tensor:
        """Original positions that a layer's slots hold, int32 [B, Hkv, longest row], -1 past a row's length."""
        positions = self.layers[layer].slots.positions[:, :, : max(self.lengths)]
        lengths = self._rows.mirror(positions.device)[0, :, None, None]
        return positions.masked_fill(torch.arange(positions.shape[-1], device=positions.device) >= lengths, -1)

    def check_past(self, past: torch.Tensor) -> None:
        """Raise ValueError unless a mask of the columns so far, bool [B, n] on the host, is that of the tokens seen."""
        check_past(past, self._columns, [Padding()] * len(past) if self._rows is None else self._rows.padding)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included: where a full cache, and so `generate`, would be."""
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._columns + query_length, 0
