"""Decoding behind one interface for both caches: the bounded one, and stock Llama's full cache, the baseline.

`decoding_of` returns the one for a model. Batches and streams ask it everything about the cache, and never need to know
which kind it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import DynamicCache

from h2optimizer.decoder import CHUNK, Choose, Decoder, token_logprobs
from h2optimizer.sampling import choose_greedily
from utils.cache import CACHE_ARGUMENT, HHCache

PREFILL_TOKENS = 16384  # most columns of prompts prefilled at once into a bounded cache, or of one chunk of them


def decoding_of(model, *args, **kwargs) -> BoundedDecoding | FullDecoding:
    """Decoding over the model's kind of cache; the arguments are those of `BoundedDecoding`."""
    kind = FullDecoding if getattr(model, "h2o", None) is None else BoundedDecoding
    return kind(model, *args, **kwargs)


class BoundedDecoding:
    """Rows of one HHCache. A text joins right after a slimming, so it is slimmed at the same steps as if it were alone.

    Args:
        model: an H2OLlamaForCausalLM.
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

    def join(self, prompts: list[list[int]], rows: list[int], of_rows: int) -> torch.Tensor:
        """Prefill in a separate cache and copy it into `rows`; returns what `prefill` does. Requires `can_join`."""
        logits, cache, source = self._prefill_apart(prompts)
        if self.cache is None:
            self.cache = cache.with_rows(of_rows)
        self.cache.take_rows(rows, cache, source)
        return logits

    def _prefill_apart(self, prompts: list[list[int]]) -> tuple[torch.Tensor, HHCache, list[int]]:
        """Logits, a new cache with one row per distinct prompt, and each prompt's row in it."""
        ids, mask, source = _pad(prompts, self.pad_token_id)
        cache = self.new_cache()  # the mask stays on the host, where it is read
        outputs = self.model(
            ids.to(self.model.device), attention_mask=mask, logits_to_keep=1, **{CACHE_ARGUMENT: cache}
        )
        return outputs.logits[source, -1], cache, source

    def can_join(self, busy: int, rows: int) -> bool:
        """Whether sequences can `join` while `busy` of the rows decode."""
        return busy < rows and (self.cache is None or self.cache.can_join)

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

    def prompts_at_once(self, longest: int) -> int | None:
        """How many prompts of at most `longest` tokens may join at once; None = no limit."""
        return PREFILL_TOKENS // self.h2o.schedule.columns_at_once(longest)

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


class FullDecoding:
    """As `BoundedDecoding`, for a LlamaForCausalLM over a growing DynamicCache: the baseline, never recorded.

    All rows grow together, so a batch is decoded to its end before the next begins.
    """

    def __init__(
        self, model, choose: Choose = choose_greedily, eos_token_ids: Iterable[int] = (), pad_token_id: int = 0
    ):
        self.model, self.choose, self.pad_token_id = model, choose, pad_token_id
        self.cache: DynamicCache | None = None

    def prepare(self) -> None:
        pass

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def open(self) -> None:
        self._hold(self.new_cache(), torch.zeros(1, 0, dtype=torch.long, device=self.model.device))

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        self.cache = None  # the previous batch has ended: free its memory
        ids, mask, source = _pad(prompts, self.pad_token_id)
        cache, mask = self.new_cache(), mask.to(self.model.device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        outputs = self.model(
            ids.to(mask.device),
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: cache},
        )
        if len(ids) < len(prompts):
            cache.batch_select_indices(torch.tensor(source))  # on the host, because layers may be on several devices
        self._hold(cache, mask[source])
        return outputs.logits[source, -1]

    def join(self, prompts: list[list[int]], rows: list[int], of_rows: int) -> torch.Tensor:
        return self.prefill(prompts)

    def _hold(self, cache: DynamicCache, mask: torch.Tensor) -> None:
        self.cache = cache
        self.position = mask.sum(dim=1)  # of the next token
        self.mask = None if bool(mask.all()) else mask
        self.token = torch.zeros_like(self.position)

    def can_join(self, busy: int, rows: int) -> bool:
        return not busy

    def rest(self) -> None:
        pass

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

    def prompts_at_once(self, longest: int) -> int | None:
        return None

    def slots_for(self, tokens: int) -> int:
        return tokens

    def bytes_per_row(self, cache: DynamicCache, device: torch.device, tokens: int) -> int:
        return tokens * _bytes_per_token([layer for layer in cache.layers if layer.keys.device == device])

    def rows_within(self, free: float, peak: int, row: int) -> int:
        return int(free // (peak + row))  # all rows prefill at once; a layer's keys and values are copied as they grow


def _pad(prompts: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The distinct prompts left-padded to [n, columns], their mask, and each prompt's row."""
    rows: dict[tuple[int, ...], int] = {}
    source = [rows.setdefault(tuple(prompt), len(rows)) for prompt in prompts]
    columns = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (columns - len(prompt)) + list(prompt) for prompt in rows])
    mask = torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in rows])
    return ids, mask, source


def _bytes_per_token(layers) -> int:
    """Bytes per token in one row of a full cache's layers."""
    return sum(states[0, :, 0].nbytes for layer in layers for states in (layer.keys, layer.values))
