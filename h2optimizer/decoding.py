"""Decoding behind one interface for both caches: the bounded one, and a stock model's full cache, the baseline.

`decoding_of` returns the one for a model. Batches and streams ask it everything about the cache, and never need to know
which kind it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from h2optimizer.decoder import CHUNK, Choose, Decoder, token_logprobs
from h2optimizer.prefixes import Prefix, can_share, least_own_tokens
from h2optimizer.sampling import choose_greedily
from h2optimizer.utils.cache import CACHE_ARGUMENT, HHCache
from h2optimizer.utils.memory import to_device
from h2optimizer.weights import sliding_window

PREFILL_TOKENS = 16384  # most columns of prompts prefilled at once into a bounded cache, or of one chunk of them
PREFILL_KEYS = 8 * PREFILL_TOKENS  # most keys of such a prefill, those of a shared prefix counted for each prompt


def decoding_of(model, *args, **kwargs) -> BoundedDecoding | FullDecoding:
    """Decoding over the model's kind of cache; the arguments are those of `BoundedDecoding`."""
    kind = FullDecoding if getattr(model, "h2o", None) is None else BoundedDecoding
    return kind(model, *args, **kwargs)


class BoundedDecoding:
    """Rows of one HHCache. A text joins right after a slimming, so it is slimmed at the same steps as if it were alone.

    Args:
        model: an H2OForCausalLM.
        choose: picks the next tokens of all rows.
        eos_token_ids, pad_token_id: as in the model's generation config.

    `cache` is None until `open`, `prefill` or `join` creates it, `decoder` until the first `start`.
    """

    def __init__(
        self, model, choose: Choose = choose_greedily, eos_token_ids: Iterable[int] = (), pad_token_id: int = 0
    ):
        self.model, self.h2o = model, model.h2o
        self.choose, self.eos, self.pad_token_id = choose, sorted(eos_token_ids), pad_token_id
        self.cache: HHCache | None = None
        self.decoder: Decoder | None = None

    def prepare(self) -> None:
        """One-time work that pays off over many steps."""
        self.model.merge_projections()

    def new_cache(self) -> HHCache:
        return HHCache(self.h2o)

    def open(self) -> None:
        """Start with an empty cache of one row, for `feed`."""
        self.cache = self.new_cache()

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Start with one row per prompt: logits [n, vocabulary] of the next tokens. Equal prompts are computed once."""
        logits, self.cache, source = self._prefill_apart(prompts)
        if source != list(range(len(self.cache.lengths))):
            shared, self.cache = self.cache, self.cache.with_rows(len(prompts))
            self.cache.take_rows(list(range(len(prompts))), shared, source)
        return logits

    def join(
        self, prompts: list[list[int]], rows: list[int], of_rows: int, prefix: Prefix | None = None
    ) -> torch.Tensor:
        """Prefill in a separate cache and copy it into `rows`; returns what `prefill` does. Requires `can_join`.

        `prefix`, from `snapshot`, is a beginning of all these prompts.
        """
        logits, cache, source = self._prefill_apart(prompts, prefix, rows)
        if self.cache is None:
            self.cache = cache.with_rows(of_rows)
        self.cache.take_rows(rows, cache, source)
        return logits

    def _prefill_apart(
        self, prompts: list[list[int]], prefix: Prefix | None = None, rows: list[int] | None = None
    ) -> tuple[torch.Tensor, HHCache, list[int]]:
        """Logits, a new cache with one row per distinct prompt, and each prompt's row in it.

        `rows` of this cache will take them, and lend their memory where they can.
        """
        ids, mask, source = _pad(prompts, self.pad_token_id, 0 if prefix is None else len(prefix))
        if self.cache is not None and rows is not None and source == [row - rows[0] for row in rows]:
            cache = self.cache.within(rows[0], len(rows), prefix)
        else:
            cache = self.new_cache() if prefix is None else HHCache(self.h2o, prefix=prefix)
        # the mask stays on the host, where it is read
        outputs = self.model(
            to_device(ids, self.model.device), attention_mask=mask, logits_to_keep=1, **{CACHE_ARGUMENT: cache}
        )
        logits = outputs.logits[:, -1]
        return logits.index_select(0, to_device(source, logits.device)), cache, source

    @property
    def can_share(self) -> bool:
        """Whether prompts that continue from a `snapshot` get what they get alone."""
        return can_share(self.model)

    @property
    def least_own(self) -> int:
        """How many tokens of a prompt must follow a snapshot."""
        return least_own_tokens(self.h2o)

    def snapshot(self, tokens: list[int], prefix: Prefix | None = None) -> Prefix:
        """The beginning that consists of `prefix` and these tokens, for `join`."""
        return self.model.prefill_prefix(tokens, prefix=prefix)

    def can_join(self, busy: int, rows: int) -> bool:
        """Whether sequences can `join` while `busy` of the rows decode."""
        return busy < rows and (self.cache is None or self.cache.can_join)

    def drop(self) -> None:
        """Forget the cache, so that the next to join make one."""
        self.cache = self.decoder = None

    def rest(self) -> None:
        """Reset the cache when no row decodes, so that the next sequence can join without waiting for a slimming."""
        if self.cache is not None:
            self.cache.reset()

    def start(self, tokens: torch.Tensor, rows: list[int]) -> None:
        """Set the tokens, int64 [n], from which `decode` continues these rows."""
        if self.decoder is None:
            eos = torch.tensor(self.eos, device=tokens.device) if self.eos else None
            self.decoder = Decoder(self.model, self.cache, self.choose, eos, self.pad_token_id, logprobs=True)
        self.decoder.start(tokens, rows)

    def decode(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens chosen in up to CHUNK steps, and their log-probabilities: [B, steps]."""
        return self.decoder.decode(steps)

    def steps(self, waiting: bool) -> int:
        """Steps to decode before the host checks the tokens; with `waiting`, rows can join after the last."""
        if not waiting:
            return CHUNK
        steps = self.h2o.schedule.steps_to_due(self.cache.clock)
        return steps + max(0, CHUNK - steps) // self.h2o.update_interval * self.h2o.update_interval

    def feed(self, tokens: torch.Tensor, **kwargs):
        """The model's outputs for given next tokens, int64 [B, n]; `kwargs` are passed to its forward."""
        return self.model(tokens, **{CACHE_ARGUMENT: self.cache}, **kwargs)

    def make_room(self, tokens: int) -> None:
        """Evict before `feed` takes this many tokens of a stream, at most `piece`."""
        self.cache.evict_for_space(tokens)

    @property
    def piece(self) -> int:
        """Tokens of a turn to feed at once: half of the recent slots, or one prefill chunk if that is less."""
        most = max(1, self.h2o.recent // 2)
        return most if self.h2o.prefill_chunk is None else min(most, self.h2o.prefill_chunk)

    # State

    @property
    def slots(self) -> int:
        """Filled slots of the longest row."""
        return max(self.cache.lengths, default=0)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache."""
        return self.cache.nbytes

    def statistics(self, prompt: int, new: int) -> dict[str, int]:
        """Cache statistics at the end of a text of `prompt` + `new` tokens, of which the last was not fed."""
        held = self.h2o.schedule.held_after(prompt, new - 1)
        layers, seen = self.cache.layers, prompt + new - 1
        # of a part of the model as much as of each other part, whatever the windows of its heads
        slots, share = sum(of.slots.positions.numel() for of in layers), sum(of.slots.heads for of in layers)
        kv_bytes = self.cache.nbytes * self.h2o.capacity * share // slots
        return {"tokens_seen": seen, "slots_kept": held.slots, "slimmings": held.evictions, "kv_bytes": kv_bytes}

    # Capacity

    def prompts_at_once(self, longest: int, shared: int = 0) -> int | None:
        """How many prompts of at most `longest` tokens, the first `shared` of them in a snapshot, may join at once.

        None = no limit.
        """
        most = PREFILL_TOKENS // self.h2o.schedule.columns_at_once(longest - shared)
        return min(most, PREFILL_KEYS // longest) if shared else most

    def slots_for(self, tokens: int) -> int:
        """Slots that a row needs for a text of `tokens` tokens."""
        return self.h2o.capacity

    def bytes_per_row(self, cache: HHCache, device: torch.device, tokens: int) -> int:
        """Bytes per row of the cache's layers on a device, read from a cache because a shard has fewer heads."""
        layers = [layer for layer in cache.layers if layer.keys.device == device]
        return sum(layer.slots.nbytes for layer in layers) // len(cache.lengths)

    def rows_within(self, free: float, peak: int, row: int) -> int:
        """Rows of `row` bytes that fit into `free` bytes beside a prefill's peak."""
        return int((free - peak) // row) if row else 2**31


@dataclass(frozen=True)
class FullPrefix:
    """The keys and values of a beginning, which full caches continue from."""

    tokens: tuple[int, ...]
    layers: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values [1, KV heads, tokens, D], rotated

    def __len__(self) -> int:
        return len(self.tokens)


class FullDecoding:
    """As `BoundedDecoding`, for a stock model over a growing DynamicCache: the baseline, never recorded.

    All rows grow together, so a batch is decoded to its end before the next begins. Several groups of prompts may join
    until the first step. Each row then has its tokens in the last columns, whatever prefix they continued from.
    Layers of sliding attention keep all tokens too, and masks hide those out of reach.
    """

    least_own = 1

    def __init__(
        self, model, choose: Choose = choose_greedily, eos_token_ids: Iterable[int] = (), pad_token_id: int = 0
    ):
        self.model, self.choose, self.pad_token_id = model, choose, pad_token_id
        self.cache: DynamicCache | None = None

    def prepare(self) -> None:
        pass

    def new_cache(self) -> DynamicCache:
        cache = DynamicCache()
        cache.layers += (DynamicLayer() for _ in range(self.model.config.num_hidden_layers))
        return cache

    def open(self) -> None:
        self._hold(self.new_cache(), torch.zeros(1, 0, dtype=torch.long, device=self.model.device))

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        self.drop()
        return self.join(prompts, list(range(len(prompts))), len(prompts))

    def join(
        self, prompts: list[list[int]], rows: list[int], of_rows: int, prefix: FullPrefix | None = None
    ) -> torch.Tensor:
        """Prefill and take the next rows of the batch, which must be `rows`."""
        ids, mask, source = _pad(prompts, self.pad_token_id, 0 if prefix is None else len(prefix))
        ragged = not bool(mask.all())
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        cache = self.new_cache() if prefix is None else self.continuing(prefix, len(ids))
        logits, mask = self._feed_to(cache, ids, mask)
        if ragged and prefix is not None:
            mask = _to_right(cache, mask)
        if len(ids) < len(prompts):
            cache.batch_select_indices(torch.tensor(source))  # on the host, because layers may be on several devices
        self._add(cache, mask[source])
        return logits[source]

    def continuing(self, prefix: FullPrefix, rows: int) -> DynamicCache:
        """A cache of `rows` rows that hold the prefix. It is copied when a layer grows, like any full cache."""
        cache = self.new_cache()
        for layer, (keys, values) in zip(cache.layers, prefix.layers, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = (states.expand(rows, -1, -1, -1) for states in (keys, values))
        return cache

    def _feed_to(self, cache: DynamicCache, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Feed tokens [n, columns]: logits [n, vocabulary] of the next ones, and the mask of all columns so far."""
        past = cache.get_seq_length()
        positions = past + (mask.cumsum(dim=1) - 1).clamp(min=0)
        mask = torch.cat([mask.new_ones(len(mask), past), mask], dim=1)
        outputs = self.model(
            ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **{CACHE_ARGUMENT: cache}
        )
        return outputs.logits[:, -1], mask

    def _add(self, cache: DynamicCache, mask: torch.Tensor) -> None:
        """Append rows to those that have joined already."""
        if self.cache is None:
            return self._hold(cache, mask)
        held = self.mask if self.mask is not None else mask.new_ones(len(self.position), self.cache.get_seq_length())
        columns = max(held.shape[1], mask.shape[1])
        for ours, theirs in zip(self.cache.layers, cache.layers, strict=True):
            for name in ("keys", "values"):
                states = [getattr(layer, name) for layer in (ours, theirs)]
                setattr(ours, name, torch.cat([pad(of, (0, 0, columns - of.shape[2], 0)) for of in states]))
                setattr(theirs, name, None)  # free it before the next layer
        mask = torch.cat([pad(of, (columns - of.shape[1], 0)) for of in (held, mask)])
        token = self.token
        self._hold(self.cache, mask)
        self.token[: len(token)] = token

    def _hold(self, cache: DynamicCache, mask: torch.Tensor) -> None:
        self.cache = cache
        self.position = mask.sum(dim=1)  # of the next token
        self.mask = None if bool(mask.all()) else mask
        self.token = torch.zeros_like(self.position)

    @property
    def can_share(self) -> bool:
        # sliding attention reaches back by columns, and padding follows the prefix in rows of fewer tokens
        return can_share(self.model) and sliding_window(self.model.config) is None

    def snapshot(self, tokens: list[int], prefix: FullPrefix | None = None) -> FullPrefix:
        cache = self.new_cache() if prefix is None else self.continuing(prefix, 1)
        ids = torch.tensor([tokens], device=self.model.device)
        self._feed_to(cache, ids, torch.ones_like(ids))
        before = () if prefix is None else prefix.tokens
        return FullPrefix((*before, *tokens), [(layer.keys, layer.values) for layer in cache.layers])

    def can_join(self, busy: int, rows: int) -> bool:
        return not busy

    def drop(self) -> None:
        self.cache = None

    def rest(self) -> None:
        self.drop()  # frees the memory of the batch that has ended

    def start(self, tokens: torch.Tensor, rows: list[int]) -> None:
        self.token[rows] = tokens

    @torch.no_grad()
    def decode(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logprobs = [], []
        for _ in range(steps):
            logits = self.feed(self.token[:, None]).logits[:, -1]
            self.token = self.choose(logits)
            tokens.append(self.token)
            logprobs.append(token_logprobs(logits, self.token))
        return torch.stack(tokens, dim=1), torch.stack(logprobs, dim=1)

    def steps(self, waiting: bool) -> int:
        return 1  # stock generate checks after every step

    def feed(self, tokens: torch.Tensor, **kwargs):
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
        positions = self.position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        self.position = self.position + tokens.shape[1]
        inputs = {"attention_mask": self.mask, "position_ids": positions, CACHE_ARGUMENT: self.cache}
        return self.model(tokens, **inputs, **kwargs)

    def make_room(self, tokens: int) -> None:
        pass

    piece = 512

    @property
    def slots(self) -> int:
        return self.cache.get_seq_length()

    @property
    def kv_bytes(self) -> int:
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def statistics(self, prompt: int, new: int) -> dict[str, int]:
        seen = prompt + new - 1
        kv_bytes = seen * _bytes_per_token(self.cache.layers)
        return {"tokens_seen": seen, "slots_kept": seen, "slimmings": 0, "kv_bytes": kv_bytes}

    def prompts_at_once(self, longest: int, shared: int = 0) -> int | None:
        return None

    def slots_for(self, tokens: int) -> int:
        return tokens

    def bytes_per_row(self, cache: DynamicCache, device: torch.device, tokens: int) -> int:
        return tokens * _bytes_per_token([layer for layer in cache.layers if layer.keys.device == device])

    def rows_within(self, free: float, peak: int, row: int) -> int:
        return int(free // (peak + row))  # all rows prefill at once; a layer's keys and values are copied as they grow


def _pad(prompts: list[list[int]], pad_token_id: int, shared: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The distinct prompts without their first `shared` tokens, left-padded to [n, columns], their mask, and each
    prompt's row."""
    rows: dict[tuple[int, ...], int] = {}
    source = [rows.setdefault(tuple(prompt[shared:]), len(rows)) for prompt in prompts]
    columns = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (columns - len(prompt)) + list(prompt) for prompt in rows])
    mask = torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in rows])
    return ids, mask, source


def _to_right(cache: DynamicCache, mask: torch.Tensor) -> torch.Tensor:
    """Move each row's tokens to the last columns of a full cache, in order; returns their mask, without empty columns.

    mask: [n, columns], with padding anywhere.
    """
    columns = int(mask.sum(dim=1).max())
    order = mask.argsort(dim=1, stable=True)[:, -columns:]  # padding first
    for layer in cache.layers:
        for name in ("keys", "values"):
            states = getattr(layer, name)
            at = order.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            setattr(layer, name, states.gather(2, at))
    return mask.gather(1, order)


def _bytes_per_token(layers) -> int:
    """Bytes per token in one row of a full cache's layers."""
    return sum(states[0, :, 0].nbytes for layer in layers for states in (layer.keys, layer.values))
