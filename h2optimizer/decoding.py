"""Decoding over either kind of cache, behind one interface: the bounded one, or stock Llama's full one, the baseline.

`decoding_of` gives the model's own. What batches and streams of texts need to know of a cache they ask here, and never
which it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import DynamicCache

from h2optimizer.decoder import CHUNK, Choose, Decoder, token_logprobs
from h2optimizer.sampling import choose_greedily
from utils.cache import CACHE_ARGUMENT, HHCache

PREFILL_TOKENS = 16384  # columns of prompts that join a bounded cache at once, those of a chunk if they come in chunks


def decoding_of(model, *args, **kwargs) -> BoundedDecoding | FullDecoding:
    """Decoding over the model's own kind of cache; the arguments are `BoundedDecoding`'s."""
    kind = FullDecoding if getattr(model, "h2o", None) is None else BoundedDecoding
    return kind(model, *args, **kwargs)


class BoundedDecoding:
    """Rows of one HHCache. A text joins right after a slimming, so that its own fall on the same of its steps as alone.

    Args:
        model: an H2OLlamaForCausalLM.
        choose: the next tokens of all rows.
        eos_token_ids, pad_token_id: as the model's generation config has them.

    `cache` is None until `open`, `prefill` or `join` makes it, and `decoder` until the first `start`.
    """

    def __init__(
        self, model, choose: Choose = choose_greedily, eos_token_ids: Iterable[int] = (), pad_token_id: int = 0
    ):
        self.model, self.h2o = model, model.h2o
        self.choose, self.eos, self.pad_token_id = choose, sorted(eos_token_ids), pad_token_id
        self.cache: HHCache | None = None
        self.decoder: Decoder | None = None

    def prepare(self) -> None:
        """What pays where many steps follow."""
        self.model.merge_projections()

    def new_cache(self) -> HHCache:
        return HHCache(self.h2o)

    def open(self) -> None:
        """Begin with an empty cache of one row, for `feed`."""
        self.cache = self.new_cache()

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Begin with one row for each prompt: logits [n, vocabulary] of their next tokens; equal ones computed once."""
        logits, self.cache, source = self._prefill_apart(prompts)
        if source != list(range(len(self.cache.lengths))):
            shared, self.cache = self.cache, self.cache.with_rows(len(prompts))
            self.cache.take_rows(list(range(len(prompts))), shared, source)
        return logits

    def join(self, prompts: list[list[int]], rows: list[int], of_rows: int) -> torch.Tensor:
        """Prefill beside the slots, and take these of the rows: as `prefill`. Needs `can_join`."""
        logits, cache, source = self._prefill_apart(prompts)
        if self.cache is None:
            self.cache = cache.with_rows(of_rows)
        self.cache.take_rows(rows, cache, source)
        return logits

    def _prefill_apart(self, prompts: list[list[int]]) -> tuple[torch.Tensor, HHCache, list[int]]:
        """Logits, a new cache with a row for each different prompt, and the row of each."""
        ids, mask, source = _pad(prompts, self.pad_token_id)
        cache = self.new_cache()  # the mask stays on the host, which reads it
        outputs = self.model(
            ids.to(self.model.device), attention_mask=mask, logits_to_keep=1, **{CACHE_ARGUMENT: cache}
        )
        return outputs.logits[source, -1], cache, source

    def can_join(self, busy: int, rows: int) -> bool:
        """Whether sequences can `join`, where `busy` of the rows decode."""
        return busy < rows and (self.cache is None or self.cache.can_join)

    def rest(self) -> None:
        """No row decodes: whoever is next need not wait for the next slimming."""
        if self.cache is not None:
            self.cache.reset()

    def start(self, tokens: torch.Tensor, rows: list[int]) -> None:
        """Let `decode` go on from these tokens, int64 [n], in these rows."""
        if self.decoder is None:
            eos = torch.tensor(self.eos, device=tokens.device) if self.eos else None
            self.decoder = Decoder(self.model, self.cache, self.choose, eos, self.pad_token_id, logprobs=True)
        self.decoder.start(tokens, rows)

    def decode(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that `choose` gives in up to CHUNK steps, and their log-probabilities: [B, steps]."""
        return self.decoder.decode(steps)

    def steps(self, waiting: bool) -> int:
        """How many to decode before the next look at the tokens; with `waiting`, up to where sequences can join."""
        if not waiting:
            return CHUNK
        steps = self.h2o.schedule.steps_to_due(self.cache.clock)
        return steps + max(0, CHUNK - steps) // self.h2o.update_interval * self.h2o.update_interval

    def feed(self, tokens: torch.Tensor, **kwargs):
        """The model's outputs for given next tokens, int64 [B, n]; `kwargs` are its forward's."""
        return self.model(tokens, **{CACHE_ARGUMENT: self.cache}, **kwargs)

    def make_room(self, tokens: int) -> None:
        """Before `feed` takes so many in a stream: at most `piece`."""
        self.cache.evict_for_space(tokens)

    @property
    def piece(self) -> int:
        """Tokens of a stream's turn that are fed at once: half of the recent slots, or a chunk if that is less."""
        most = max(1, self.h2o.recent // 2)
        return most if self.h2o.prefill_chunk is None else min(most, self.h2o.prefill_chunk)

    # What it holds

    @property
    def slots(self) -> int:
        """Filled slots of the longest row."""
        return max(self.cache.lengths, default=0)

    @property
    def kv_bytes(self) -> int:
        """Of the cache."""
        return self.cache.nbytes

    def statistics(self, prompt: int, new: int) -> dict[str, int]:
        """What the cache held of a text of prompt and new tokens when it ended: its last token was not fed."""
        held = self.h2o.schedule.held_after(prompt, new - 1)
        kv_bytes = self.cache.nbytes // len(self.cache.lengths)
        seen = prompt + new - 1
        return {"tokens_seen": seen, "slots_kept": held.slots, "slimmings": held.evictions, "kv_bytes": kv_bytes}

    # What fits

    def prompts_at_once(self, longest: int) -> int | None:
        """How many prompts of up to so many tokens may join at once; None if all may."""
        return PREFILL_TOKENS // self.h2o.schedule.columns_at_once(longest)

    def slots_for(self, tokens: int) -> int:
        """Slots that a row needs for a text of so many tokens."""
        return self.h2o.capacity

    def bytes_per_row(self, cache: HHCache, device: torch.device, tokens: int) -> int:
        """Of the layers on a device, as they are in a cache: a part of a model has a part of the heads."""
        layers = [layer for layer in cache.layers if layer.keys.device == device]
        return sum(layer.slots.nbytes for layer in layers) // len(cache.lengths)

    def rows_within(self, free: float, peak: int, row: int) -> int:
        """Rows of so many bytes in what is free beside a prefill's peak."""
        return int((free - peak) // row) if row else 2**31


class FullDecoding:
    """As `BoundedDecoding`, for a LlamaForCausalLM over a DynamicCache, which grows: the baseline, never recorded.

    All rows grow, so that a batch is decoded to its end before the next begins.
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
        self.cache = None  # the batch before has ended: make room
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
            cache.batch_select_indices(torch.tensor(source))  # on the host: layers may be on several devices
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
        return 1  # as stock generate looks

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
        return int(free // (peak + row))  # all prompts at once; a layer's keys and values are copied as they grow


def _pad(prompts: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The different prompts padded on the left, [n, columns], their mask, and the row that each prompt has there."""
    rows: dict[tuple[int, ...], int] = {}
    source = [rows.setdefault(tuple(prompt), len(rows)) for prompt in prompts]
    columns = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (columns - len(prompt)) + list(prompt) for prompt in rows])
    mask = torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in rows])
    return ids, mask, source


def _bytes_per_token(layers) -> int:
    """Of one row of a full cache's layers."""
    return sum(states[0, :, 0].nbytes for layer in layers for states in (layer.keys, layer.values))
