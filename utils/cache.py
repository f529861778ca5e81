"""The heavy-hitter KV cache: a bounded number of slots per row and KV head, slimmed on every N-th forward.

Heavy-Hitter Oracle: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
Models", arXiv 2306.14048. Keeping the four oldest slots instead is StreamingLLM, arXiv 2309.17453.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from numbers import Integral

import torch
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from h2optimizer.utils.heads import HeadWindows, LayerRows
from h2optimizer.utils.int8_slots import Int8HeadSlots, Int8Slots
from h2optimizer.utils.padding import Padding, check_past, runs_without
from h2optimizer.utils.prefix import LayerPrefix, Prefix, followed_by, least_own_tokens
from h2optimizer.utils.slimming import Slimming, TorchSlimmer
from h2optimizer.utils.slots import HeadSlots, Slots, gather_by_mask
from h2optimizer.utils.step import Rows, Step, plan_of, to_rows

STORAGE = {"auto": (Slots, HeadSlots), "int8": (Int8Slots, Int8HeadSlots)}  # H2OConfig.slots
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What transformers' models call their cache, as argument and as output: `cache` from 5.24 on.
CACHE_ARGUMENT = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))


def kernels_take(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the Triton kernels support such states."""
    return dtype in KERNEL_DTYPES and head_dim <= 256 and head_dim * dtype.itemsize % 16 == 0


def without_gradients(method):
    """As `torch.no_grad`, which is entered only if gradients are recorded: a layer calls so much in each forward."""

    @functools.wraps(method)
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        with torch.no_grad():
            return method(*args, **kwargs)

    return run


class HHLayer(CacheLayerMixin):
    """One layer: its slots, allocated at the first forward, and the pending block of a forward of several tokens.

    `block` holds that forward's keys and values (later also mass and count) until slimming moves them into the slots.
    In the first forward after a prefix, `before` holds the prefix, whose keys and values the block lacks.
    `keys` and `values` alias the slots, as transformers' cache layers expose them, and `dtype` is that of the model;
    `lengths` [B] int32 are the rows'.
    """

    def __init__(self, h2o, layer_idx: int):
        super().__init__()
        self.h2o = h2o
        self.layer_idx = layer_idx
        self.slimmer = TorchSlimmer()
        self.block: dict[str, torch.Tensor] | None = None
        self.before: LayerPrefix | None = None
        self._seen: tuple[Step, Step] | None = None  # a forward, and `seen_by` of it

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor, rows: Rows) -> None:
        h2o, policy = self.h2o, self.h2o.policy
        needs = {"mass": policy.by_mass, "count": policy.by_mass and h2o.score_norm == "mean", "norms": policy.by_value}
        ranked = tuple(name for name, needed in needs.items() if needed)
        alike, of_heads = STORAGE[h2o.slots]
        if rows.windows.even:
            slots = alike(key_states, value_states, h2o.capacity, ranked)
        else:
            windows = rows.windows.of_heads(self.layer_idx, key_states.shape[1])
            slots = of_heads(key_states, value_states, [window + h2o.update_interval for window in windows], ranked)
        self.own(slots)
        self.join(rows)

    def own(self, slots: Slots) -> None:
        """Use these slots from now on."""
        self.slots, self.keys, self.values = slots, slots.keys, slots.values
        self.device, (self.dtype, dtype_of_values) = slots.device, slots.dtypes
        takes = kernels_take(self.dtype, slots.head_dim) and self.dtype == dtype_of_values
        self.by_kernel = self.slimmer.by_kernel and takes
        if slots.offsets is not None:  # torch does not slim these without waiting for the device
            self.by_kernel &= slots.capacity <= self.slimmer.most_slots
        self.is_initialized = True

    def join(self, rows: Rows) -> None:
        """Read row lengths from the device mirror, and allocate now what must not be allocated in a CUDA graph."""
        self.rows = rows if rows.windows.even else LayerRows(rows, self.layer_idx, self.slots.heads, self.device)
        self.lengths = self.rows.lengths_there(self.device, self.slots.heads)
        self.kept = self.rows.kept(self.slots) if self.slimmer.by_kernel else None

    def seen_by(self, step: Step) -> Step:
        """The forward as this layer's slots see it: where heads have windows of their own, a row is a head of a row.

        A prompt in an empty cache is the same for all heads.
        """
        if not isinstance(self.rows, LayerRows) or (step.fresh and not step.decode):
            return step
        if self._seen is None or self._seen[0] is not step:
            self._seen = step, step.of_heads(self.rows)
        return self._seen[1]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, step: Step, slimmer: TorchSlimmer):
        if not self.is_initialized or (step.fresh and not self.slots.suit(key_states, value_states)):
            self.slimmer = slimmer
            self.lazy_initialization(key_states, value_states, step.rows)
        held = self.slots.heads, self.slots.head_dim
        if held != (new := (key_states.shape[1], key_states.shape[3])):
            raise ValueError(f"this HHCache holds {held} KV heads and head_dim, the model has {new}: reset() it first")
        step = self.seen_by(step)
        key_states, value_states = to_rows(key_states, step), to_rows(value_states, step)
        if step.decode:
            extended = None
            if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
                # slots carry no gradient, and later steps overwrite them
                extended = self.slots.extended(key_states, value_states, step)
            self.slots.append(key_states, value_states, step)
            return extended or self.slots.read(self.slots.capacity if step.static else step.width)
        if step.prefix is not None:
            step.prefix.check_states(self.layer_idx, key_states, value_states)
            self.before = step.prefix.layers[self.layer_idx]
        keys, values = self.slots.extended(key_states, value_states, step)
        self.block = self.slots.block_of((keys, values), key_states, value_states, step)
        return keys, values

    def add_mass(self, mass: torch.Tensor, step: Step) -> None:
        """Add this forward's mass to the stored mass, after decaying it.

        mass: in the shape of what `update` returned without D, and after a prefix with the prefix' slots in front.
        """
        decay, step = self.h2o.score_decay, self.seen_by(step)
        added = {"mass": mass}
        if self.slots.count is not None:
            added["count"] = step.scored_queries(mass.device)[:, None].expand_as(mass)
        for name, addition in added.items():
            if self.before is not None:
                self._add_to_prefix(name, addition)
                continue
            if not step.decode and not step.max_start:  # nothing is stored yet
                self.block[name] = addition.clone() if name == "count" else addition
                continue
            slots = self.slots.load(name)
            old = slots[:, :, : step.width if step.decode else step.max_start]
            if decay != 1.0 and step.decays and step.max_start:
                old.mul_(torch.where(step.brought(old.device) > 0, decay, 1.0)[:, None, None] if step.padded else decay)
            if step.decode:
                old.add_(addition)
                self.slots.store(name, slots)
            else:
                total = addition.clone() if name == "count" else addition
                total[:, :, : step.max_start].add_(old)
                self.block[name] = total

    def _add_to_prefix(self, name: str, addition: torch.Tensor) -> None:
        """Add what the prefix' own queries gave to its slots."""
        total, old = addition.clone() if name == "count" else addition, getattr(self.before, name)
        if old is not None:
            total[:, :, : old.shape[2]].add_(old)
        self.block[name] = total

    def snapshot(self) -> LayerPrefix:
        """The pending block in place of its slimming, as a prefix: of one row, without padding."""
        before, block, self.before, self.block = self.before, self.block, None, None
        keys, values = (
            block[name].clone(memory_format=torch.contiguous_format)
            if before is None
            else followed_by(getattr(before, name), block[name])
            for name in ("keys", "values")
        )
        norms = block.get("norms")
        if before is not None and norms is not None:
            norms = followed_by(before.norms, norms)
        return LayerPrefix(keys, values, block.get("mass"), block.get("count"), norms)

    def slim(self, windows: HeadWindows, by_mask: bool, static: bool = False) -> None:
        """Slim the slots, or the pending block, to `windows` (by boolean mask, or by gather).

        With `static`, the same work is enqueued whatever the row lengths.
        """
        block, self.block = self.block, None
        before, self.before = self.before, None
        if block is not None:
            rows = self.rows.mirror(self.device).shape[1]
            block = {name: to_rows(old, rows) for name, old in block.items()}
            if before is not None and self.slots.norms is not None:
                block["norms"] = followed_by(before.norms, block["norms"])
        capacity = self.slots.capacity
        width = capacity if block is None else block["keys"].shape[2] + (0 if before is None else before.keys.shape[2])
        plan = plan_of(self.rows, self.device, width, capacity, windows)
        slimming = Slimming(
            self.slots, block, plan, self.h2o.policy, self.layer_idx, self.h2o.score_seed, self.kept, before,
            in_order=self.h2o.position_rolling,
        )  # fmt: skip
        if static:
            plan.ragged = True
        elif not plan.drops:
            if block is not None:  # positions past a row's end are already those of the tokens to come
                self.slots.fill({name: old[:, :, : plan.longest] for name, old in slimming.moved().items()}, plan)
            return
        if by_mask and plan.even:
            self.slots.compact(slimming.tensors(), self.slimmer.pick(slimming), plan, gather_by_mask)
        else:
            self.slimmer.slim(slimming)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.slots.reorder(beam_idx)

    def drop_block(self) -> None:
        """Forget a forward that did not finish."""
        self.block = self.before = None

    def reset(self) -> None:
        self.drop_block()
        if self.is_initialized:
            Slots.clear([self.slots])

    # transformers asks each layer for mask sizes and lengths; here only the whole cache knows them.
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("ask the HHCache")

    def get_seq_length(self) -> int:
        raise NotImplementedError("ask the HHCache")

    def get_max_length(self) -> int:
        return -1  # no maximum


class HHCache(Cache):
    """Heavy-hitter cache of all layers: `capacity` = window_length + update_interval slots per row and KV head.

    Invariants, for every layer:

    - keys, values [B, Hkv, capacity, D], mass [B, Hkv, capacity] float32, positions [B, Hkv, capacity] int32: a slot
      index refers to the same token in all four. A row fills its slots from 0; mass is zero past its length. Slots of
      8 bits also have scales (utils/int8_slots.py).
    - The `recent` newest tokens always survive. Slots may lie in any order, which changes nothing but the order of
      sums: positions tell which are newer. Under position_rolling they stay in the order of their tokens.
    - lengths[b] <= window_length after slimming, <= capacity between forwards; the same for all layers and heads.
    - `get_seq_length()` counts the columns seen, as a full cache would store them, not the slots in use.
    - Padding in any column is dropped on entry, so batching does not change a row's slots. The tokens that `generate`
      feeds to finished rows are dropped too.
    - The step clock is the number of forwards since the last reset. Slimming is due after forwards of several tokens
      and after every `update_interval`-th forward. A forward taken in chunks counts as one (one tick, one decay of
      mass), but is slimmed after each chunk.
    - The slots are allocated at the first forward of a batch size and keep their addresses. A decode step never makes
      the host wait for the device.
    - After a prefix, the first forward attends to it and adds mass to it where it lies, and is slimmed over both: the
      slots are those of a forward of the whole texts, up to the order of sums. The prefix itself never changes.
    - Rows are independent: a row can be replaced right after a slimming (`take_rows`) and decodes as if it were alone.

    `H2OForCausalLM.forward` drives it: `begin`, then per layer `update`, `add_mass` and `slim`, then `end`. The
    attention passes its backend's slimmer to `update`.

    Args:
        h2o: an `H2OConfig`. The cache uses these settings even if the model's differ.
        prefix: from `model.prefill_prefix`: all rows begin after it. The first forward takes the tokens that follow.

    Raises: ValueError if the settings rule out a prefix, or are not those that it was computed with.
    """

    def __init__(self, h2o, prefix: Prefix | None = None):
        if not hasattr(h2o, "window_length"):
            raise ValueError(f"HHCache: give an H2OConfig, not a {type(h2o).__name__}")
        super().__init__(layers=[])
        self.h2o = h2o
        self.schedule, self.windows = h2o.schedule, h2o.head_windows
        self._rows: Rows | None = None
        self.follow(prefix)

    def __setstate__(self, state: dict) -> None:
        """Restore a copy. What layers share with their slots and rows must be shared again: pickle copies it."""
        vars(self).update(state)
        if self._rows is not None:
            self._rows.forget_shared()
        for layer in self.layers:
            if layer.is_initialized:
                layer.own(layer.slots)
                layer.join(self._rows)

    def follow(self, prefix: Prefix | None) -> None:
        """Reset the cache, and let its rows begin after another prefix, or after none.

        Raises: ValueError as the constructor does.
        """
        if prefix is not None:
            prefix.check_settings(self.h2o)
        self.prefix = prefix
        self.reset()

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
        """Open a forward of [batch_size, columns] tokens, of which `new[b]` are real in row b (default: all).

        `real`, bool [batch_size, columns] on the host, marks the columns of real tokens (default: the last `new[b]`).

        In a chunked forward, `chunk` gives the columns (begin, end) to process now; every chunk is opened and closed in
        turn. `score_queries` then counts the last queries of each chunk that drops slots, as well as those of the whole
        prompt: slots cannot be ranked by queries that have not run yet.

        `static` makes a decode step safe for CUDA graphs: the host sends no value that changes from step to step. The
        device counts for itself in `Rows.count_step` and `slim_all`, which are recorded with the step.

        Raises: RuntimeError after a forward that did not finish; ValueError when the batch size changes before a reset,
            or too few tokens follow a prefix.
        """
        begin, end = (0, columns) if chunk is None else chunk
        if self.step is not None or begin != self._chunked:
            raise RuntimeError("the last forward with this HHCache did not finish: reset() it before the next one")
        if self._rows is None or (self.clock == 0 and len(self._rows.lengths) != batch_size):
            self._rows, self.layers = Rows(batch_size, self.windows), []
        rows, h2o = self._rows, self.h2o
        if len(rows.lengths) != batch_size:
            raise ValueError(f"this HHCache holds {len(rows.lengths)} rows, the input {batch_size}: reset() it first")
        new = new or [columns] * batch_size
        if len(new) != batch_size:
            raise ValueError(f"{len(new)} token counts for {batch_size} rows")
        prefix = self.prefix if self.continues_prefix else None
        if prefix is not None:
            self._follow_prefix(new)
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
        first_scored = self.first_scored(new, later)
        scored = h2o.needs_mass and (h2o.score_every_step or due) and (decode or first_scored != new)
        self._chunked = end % columns
        self.step = Step(
            rows, rows.lengths, new, end - begin, decode, due, scored, first_scored, begin == 0, static, prefix
        )
        rows.append(new, on_device=not static)
        return self.step

    @property
    def continues_prefix(self) -> bool:
        """Whether the next forward continues from the prefix."""
        return self.prefix is not None and self.clock == 0

    def _follow_prefix(self, new: list[int]) -> None:
        """Let the empty rows begin after the prefix, and bring `new` tokens."""
        fewest, least = min(new), self.least_own_tokens()
        if fewest < least:
            why = "the last token of a text is needed for its logits"
            if least > 1:
                why = f"score_queries={least} takes mass from the last {least} tokens of a text"
            raise ValueError(
                f"prefix: {fewest} tokens follow it in row {new.index(fewest)}, but at least {least} must, as {why}: "
                "use a shorter prefix"
            )
        self._rows.follow(len(self.prefix))

    def least_own_tokens(self) -> int:
        """How many tokens must follow the prefix in each row."""
        return least_own_tokens(self.h2o)

    def first_scored(self, new: list[int], later: list[int]) -> list[int]:
        """The first query of each row that adds mass, of `new` ones now; `later` ones of the same forward follow."""
        queries = self.h2o.score_queries
        if self.clock > 0 or queries is None:
            return [0] * len(new)
        drops = [length + n > self.windows.smallest for length, n in zip(self._rows.lengths, new, strict=True)]
        last = [n if drop else n + more for n, more, drop in zip(new, later, drops, strict=True)]
        return [min(max(0, end - queries), n) for end, n in zip(last, new, strict=True)]

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

        A decode step returns views of the slots. A forward of several tokens returns the slots followed by the new
        tokens; the first one after a prefix the new tokens alone, [B, Hkv, columns, D]. Slots carry no gradient; it
        reaches only the new tokens. `slimmer` (default: torch's) is set at the layer's first forward.

        Raises: RuntimeError outside a forward of an H2OForCausalLM, which alone slims the cache; ValueError
            for a model whose shape differs from that of the tokens in the cache.
        """
        if self.step is None:
            raise RuntimeError(
                "an HHCache is slimmed only by H2OLlamaForCausalLM and its like: call that model (not its .model, and "
                "not a plain LlamaForCausalLM), or use a DynamicCache"
            )
        if len(self.layers) <= layer_idx and self.clock:
            raise ValueError(f"this HHCache holds {len(self.layers)} layers, the model has more: reset() it first")
        while len(self.layers) <= layer_idx:
            self.layers.append(HHLayer(self.h2o, len(self.layers)))
        return self.layers[layer_idx].update(key_states, value_states, self.step, slimmer or TorchSlimmer())

    @without_gradients
    def add_mass(self, mass: torch.Tensor, layer_idx: int) -> None:
        """Add the mass [B, Hkv, width] float32 that this forward's queries gave to the slots, after `score_decay`."""
        self.layers[layer_idx].add_mass(mass, self.step)

    @without_gradients
    def update_slimmingH(self, layer_idx: int) -> None:
        """Slim a layer in place: after a decode step, few slots move."""
        static = self.step is not None and self.step.static
        self.layers[layer_idx].slim(self.windows, by_mask=False, static=static)

    @without_gradients
    def update_slimming(self, layer_idx: int) -> None:
        """Slim a layer as H2O does, by a boolean mask over the slots and a copy. The resulting cache is the same."""
        self.layers[layer_idx].slim(self.windows, by_mask=True)

    def slim(self, layer_idx: int) -> None:
        """Slim a layer in the way that `H2OConfig.slimming` names."""
        (self.update_slimmingH if self.h2o.slimming == "H" else self.update_slimming)(layer_idx)

    @torch.no_grad()
    def slim_all(self) -> None:
        """Slim all layers at the end of a static step, and update the row lengths on the device."""
        for layer_idx in range(len(self.layers)):
            self.update_slimmingH(layer_idx)
        self._rows.cut_there(self.windows)

    def end(self, gaps: list[int] | None = None) -> None:
        """Close the forward after its last layer. `gaps`: positions that each row skipped in it."""
        if self.step.due:
            self._rows.cut(self.windows, on_device=not self.step.static)
        self._columns += self.step.columns
        self.clock += self._chunked == 0
        if gaps is not None and not self._chunked:
            self._rows.gaps = [before + gap for before, gap in zip(self._rows.gaps, gaps, strict=True)]
            self._rows.upload()
        self.step = None

    @property
    def due(self) -> bool:
        """Whether slimming follows the next forward, if it is a decode step."""
        return self.schedule.is_due(self.clock)

    @property
    def can_join(self) -> bool:
        """Whether `take_rows` may replace rows: right after a slimming, or before any token has been seen."""
        between = self.step is None and not self._chunked
        return between and (self.clock == 0 or self.schedule.is_due(self.clock - 1))

    # Between forwards

    @torch.no_grad()
    def evict_for_space(self, space_needed: int) -> None:
        """Make room for a turn of `space_needed` tokens: slim every row to window_length - space_needed slots.

        The slots are taken from the recent part. Raises: ValueError if space_needed is negative or exceeds that part.
        """
        if not isinstance(space_needed, Integral) or space_needed < 0:
            raise ValueError(f"space_needed={space_needed!r:.60}: must be a whole number of at least 0")
        space_needed = int(space_needed)
        if space_needed > self.h2o.recent:
            raise ValueError(
                f"space_needed={space_needed} does not fit into the {self.h2o.recent} recent slots of the window: "
                "raise window_length, lower num_heavy_hitters or split the turn"
            )
        if self._rows is None:
            return
        windows = self.windows.sparing(space_needed)
        for layer in self.layers:
            layer.slim(windows, by_mask=False)
        self._rows.cut(windows)

    def reset(self) -> None:
        """Forget all tokens and counts, and set the clock to 0, as in a new cache. The slots stay allocated for reuse.

        The rows then begin after the cache's prefix again, if it has one; see `follow`.
        """
        self.step: Step | None = None  # the forward in progress
        self.clock = 0
        self._columns = 0 if self.prefix is None else len(self.prefix)
        self._chunked = 0  # columns already processed of a chunked forward, 0 between forwards
        if self._rows is not None:
            self._rows.clear()
        for layer in self.layers:
            layer.drop_block()
        Slots.clear([layer.slots for layer in self.layers if layer.is_initialized])

    def with_rows(self, batch_size: int) -> HHCache:
        """A new cache of `batch_size` empty rows with slots like this one's, for `take_rows`."""
        return self._with(batch_size, [layer.slots.empty_like(batch_size) for layer in self.layers])

    @torch.no_grad()
    def within(self, first: int, rows: int, prefix: Prefix | None = None) -> HHCache:
        """A new cache in the place of neighbouring rows of this one, whose texts are forgotten.

        This cache's `take_rows` then has nothing to copy. Raises: ValueError as the constructor does.
        """
        parts = [layer.slots.within(first, rows) for layer in self.layers]
        # kernels read nothing past a row's length, where a NaN of an earlier text may be
        by_kernel = all(layer.by_kernel for layer in self.layers) and self.h2o.backend != "flash_attn"
        Slots.clear(parts, states=not by_kernel)
        return self._with(rows, parts, prefix)

    def _with(self, batch_size: int, slots: list[Slots], prefix: Prefix | None = None) -> HHCache:
        """A new cache of empty rows with the given slots of all layers."""
        other = HHCache(self.h2o, prefix)
        other._rows = Rows(batch_size, other.windows)
        for layer, of in zip(self.layers, slots, strict=True):
            other.layers.append(HHLayer(self.h2o, layer.layer_idx))
            other.layers[-1].slimmer = layer.slimmer
            other.layers[-1].own(of)
            other.layers[-1].join(other._rows)
        return other

    @torch.no_grad()
    def take_rows(self, rows: list[int], source: HHCache, source_rows: list[int]) -> None:
        """Replace `rows` with copies of another cache's rows, which then decode here as they would there.

        Raises: ValueError unless both caches have the same settings and have just slimmed, which keeps each row's
        slimmings on the same steps.
        """
        if self.h2o != source.h2o or len(self.layers) != len(source.layers):
            raise ValueError("take_rows: the caches' settings or layers differ")
        if not (self.can_join and source.can_join):
            raise ValueError("take_rows: rows can be replaced right after a slimming only (check `can_join`)")
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            mine.slots.take_rows(rows, theirs.slots, source_rows)
        self._rows.take(rows, source._rows, source_rows)
        if self.clock == 0:  # a new cache is where its first rows come from
            self._columns = source._columns
        self.clock = max(self.clock, 1)  # the rows have had their prefill

    @torch.no_grad()
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let row b continue row beam_idx[b], [B] int64, in place.

        Raises: TypeError for anything but a tensor of whole numbers; ValueError for another number of rows.
        """
        if not isinstance(beam_idx, torch.Tensor) or beam_idx.dtype not in (torch.int64, torch.int32):
            given = beam_idx.dtype if isinstance(beam_idx, torch.Tensor) else type(beam_idx).__name__
            raise TypeError(f"beam_idx: must be a LongTensor of row numbers, not {given}")
        if beam_idx.shape != (len(self.lengths),):
            raise ValueError(f"beam_idx {tuple(beam_idx.shape)}: this HHCache holds {len(self.lengths)} rows")
        for layer in self.layers:
            layer.reorder_cache(beam_idx)
        if self._rows is not None:
            self._rows.reorder(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "the number of rows of an HHCache is fixed: use reorder_cache to reorder them, or reset() to change it"
        )

    batch_repeat_interleave = batch_select_indices

    def crop(self, tokens_to_remove: int = 0) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "an HHCache cannot be cropped, as evicted tokens are gone: assisted decoding needs a full cache"
        )

    activate_past_recording = crop  # assisted decoding calls this first

    # State

    @property
    def lengths(self) -> list[int]:
        """Filled slots of each row."""
        return list(self._rows.lengths) if self._rows else []

    @property
    def seen(self) -> list[int]:
        """Tokens that each row has seen, without padding."""
        return list(self._rows.seen) if self._rows else []

    @property
    def longest(self) -> int:
        """Slots allocated for a head, or for the one with the largest window."""
        return self.windows.largest + self.h2o.update_interval

    @property
    def evictions(self) -> list[int]:
        """Slimmings that dropped slots, for each row."""
        return list(self._rows.evictions) if self._rows else []

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, filled or not: keys, values, mass and positions of every layer."""
        return sum(layer.slots.nbytes for layer in self.layers if layer.is_initialized)

    def positions(self, layer: int) -> torch.Tensor:
        """Original positions of what a layer holds, ascending: int32 [B, Hkv, longest row], -1 past a row's length."""
        of, longest = self.layers[layer], max(self.lengths)
        positions = of.slots.load("positions").view(len(of.lengths), of.slots.heads, -1)[:, :, :longest]
        past = torch.arange(positions.shape[-1], device=positions.device) >= of.lengths[..., None]
        # sorted, a row's own come first
        positions = positions.masked_fill(past, torch.iinfo(torch.int32).max).sort(dim=-1).values.masked_fill(past, -1)
        return torch.nn.functional.pad(positions, (0, longest - positions.shape[-1]), value=-1)

    def set_padding(self, real: torch.Tensor) -> None:
        """Correct where padding was among all columns seen, bool [B, columns] on the host, if they were reordered."""
        padding = [Padding() for _ in range(len(real))]
        for row, begin, end in runs_without(real):
            padding[row].add((begin, end), decode=False)
        self._rows.padding = padding

    def check_past(self, past: torch.Tensor) -> None:
        """Raise ValueError unless a mask of past columns, bool [B, n] on the host, matches the tokens seen."""
        check_past(past, self._columns, [Padding()] * len(past) if self._rows is None else self._rows.padding)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included: the length of a full cache, which `generate` expects."""
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._columns + query_length, 0
