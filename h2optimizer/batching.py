"""Many sequences at once: each of its own length and sampling, and new ones in the rows of those that have ended."""

from __future__ import annotations

import gc
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from h2optimizer.decoder import CHUNK, Choose, Decoder, token_logprobs
from h2optimizer.sampling import RowSampler, choose_greedily
from utils.cache import CACHE_ARGUMENT, HHCache

PREFILL_TOKENS = 16384  # columns that a Batcher prefills at once, those of a chunk where prompts come in chunks


@dataclass
class Sequence:
    """One text to generate, and then what came of it."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0  # 0: greedily
    top_p: float = 1.0
    seed: tuple[int, ...] = (0,)  # of its samples, which depend on nothing else
    has_ended: Callable[[list[int]], bool] | None = None  # whether its tokens so far, more at each look, end it
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" (an end-of-sequence token, or has_ended), "length" or "nan" (no logits)
    rows: int = 0  # sequences in its batch at its end
    cache: dict[str, int] = field(default_factory=dict)  # what it held at the end: tokens_seen, slots_kept, …
    seconds: float = 0.0  # from the beginning of its prefill to its end
    seconds_to_first_token: float = 0.0
    decode_seconds: float = 0.0  # its share of the decode steps it was in: a step is shared equally by its sequences

    def __post_init__(self):
        self.random = np.random.default_rng(self.seed)


class Clock:
    """Moments on the device's own time, so that timing waits for nothing; on a CPU, the host's."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"

    def now(self) -> torch.cuda.Event | float:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begin, end) -> float:
        """Between two moments that the device has reached."""
        return begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin


class Prefilled(NamedTuple):
    """What `prefill` made of n prompts."""

    logits: torch.Tensor  # [n, vocabulary], of the next tokens
    cache: HHCache | DynamicCache
    mask: torch.Tensor  # [n, columns], 0 for padding; on the model's device where later steps read it: a full cache's
    source: list[int]  # the cache's row of each prompt


def prefill(model, prompts: list[list[int]], pad_token_id: int) -> Prefilled:
    """Prompts, padded on the left, into a new cache: an HHCache for a model with settings of one, else a full cache.

    Equal prompts are computed once. They share a row of an HHCache, whose rows `take_rows` copies.
    """
    rows: dict[tuple[int, ...], int] = {}
    source = [rows.setdefault(tuple(prompt), len(rows)) for prompt in prompts]
    columns, h2o, device = max(map(len, rows)), getattr(model, "h2o", None), model.device
    ids = torch.tensor([[pad_token_id] * (columns - len(prompt)) + list(prompt) for prompt in rows])
    mask = torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in rows])
    if h2o is not None:
        cache, positions = HHCache(h2o), {}  # the mask stays on the host, which reads it
    else:
        cache, mask = DynamicCache(config=model.config), mask.to(device)
        positions = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    outputs = model(ids.to(device), attention_mask=mask, logits_to_keep=1, **{CACHE_ARGUMENT: cache}, **positions)
    logits, mask = outputs.logits[source, -1], mask[source]
    if h2o is None and len(rows) < len(prompts):
        cache.batch_select_indices(torch.tensor(source))  # on the host: layers may be on several devices
        source = list(range(len(prompts)))
    return Prefilled(logits, cache, mask, source)


class FullCacheDecoder:
    """Decode steps of stock Llama over a DynamicCache, which grows: the baseline. As `Decoder`, but never recorded."""

    def __init__(self, model, cache: DynamicCache, choose: Choose, mask: torch.Tensor):
        self.model, self.cache, self.choose = model, cache, choose
        self.position = mask.sum(dim=1)  # of the next token
        self.mask = None if bool(mask.all()) else mask
        self.token = torch.zeros_like(self.position)

    def start(self, tokens: torch.Tensor, rows: list[int]) -> None:
        self.token[rows] = tokens

    @torch.no_grad()
    def decode(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logprobs = [], []
        for _ in range(steps):
            logits = self.feed(self.token).logits[:, -1]
            self.token = self.choose(logits)
            tokens.append(self.token)
            logprobs.append(token_logprobs(logits, self.token))
        return torch.stack(tokens, dim=1), torch.stack(logprobs, dim=1)

    def feed(self, tokens: torch.Tensor, **kwargs):
        """The model's outputs for a next token of each row, int64 [B]; `kwargs` are its forward's."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        inputs = {"attention_mask": self.mask, "position_ids": self.position[:, None], CACHE_ARGUMENT: self.cache}
        self.position = self.position + 1
        return self.model(tokens[:, None], **inputs, **kwargs)


class Batcher:
    """Decodes sequences together; one that ends makes room for the next.

    With an HHCache a new sequence joins right after a slimming, so that its own slimmings fall on the same of its steps
    as alone; prompts are prefilled in sub-batches beside the slots, whose peak decides nothing. With stock Llama's full
    cache, whose rows all grow, a batch is decoded to its end before the next begins.

    Args:
        model: an H2OLlamaForCausalLM, or a LlamaForCausalLM.
        rows: sequences decoded at once.
        eos_token_ids, pad_token_id: as the model's generation config has them.
        sampling: whether any sequence samples; nucleus: whether any has a top_p below 1.
        agree: makes chosen tokens [B] those of all processes that hold a part of the model each, in place; or None.
    """

    def __init__(
        self,
        model,
        rows: int,
        eos_token_ids: set[int],
        pad_token_id: int,
        sampling: bool = False,
        nucleus: bool = False,
        agree: Choose | None = None,
    ):
        self.agree = agree
        self.model, self.eos, self.pad_token_id = model, eos_token_ids, pad_token_id
        self.h2o = getattr(model, "h2o", None)
        self.sampler = RowSampler(rows, model.device, nucleus) if sampling else None
        self.rows: list[Sequence | None] = [None] * rows
        self.cache: HHCache | DynamicCache | None = None
        self.decoder: Decoder | FullCacheDecoder | None = None
        self._clock = Clock(model.device)
        self._begun: list[tuple] = [()] * rows  # moments of each row's prefill: begin, end
        self._first: list[tuple] = []  # tokens from prefills that the host has not seen: sequences, tokens, logprobs
        if self.h2o is not None:
            model.merge_projections()

    @torch.inference_mode()
    def run(self, sequences: Iterable[Sequence]) -> Iterator[Sequence]:
        """Yields each sequence when it has ended; equal prompts, side by side, are prefilled once.

        Raises: torch.OutOfMemoryError; sequences that were not yielded then have to be begun anew.
        """
        waiting = deque(sequences)
        while waiting or any(self.rows):
            if self.h2o is not None and self.cache is not None and not any(self.rows):
                self.cache.reset()  # its clock: nobody waits for the next slimming
            if waiting and self._can_join():
                self._fill(waiting)
            yield from self._look(*self._decode(bool(waiting)))

    def _can_join(self) -> bool:
        if self.h2o is None or self.cache is None:
            return not any(self.rows)
        return None in self.rows and self.cache.can_join

    def _fill(self, waiting: deque[Sequence]) -> None:
        """Prefill sequences for the free rows."""
        free = [row for row, sequence in enumerate(self.rows) if sequence is None]
        group: list[Sequence] = []
        prompts, columns = set(), 0
        while waiting and len(group) < len(free):
            prompt = waiting[0].prompt
            prompts.add(tuple(prompt))
            columns = max(columns, _columns_at_once(self.h2o, len(prompt)))
            if group and self.h2o is not None and len(prompts) * columns > PREFILL_TOKENS:
                self._prefill(group, free[: len(group)])
                group, free = [], free[len(group) :]
                prompts, columns = set(), 0
            else:
                group.append(waiting.popleft())
        self._prefill(group, free[: len(group)])

    def _prefill(self, group: list[Sequence], rows: list[int]) -> None:
        begin = self._clock.now()
        choose = choose_greedily
        if self.sampler is not None:
            choose = self.sampler.at(rows, group)
        if self.h2o is None:
            self.cache = self.decoder = None  # the batch before has ended: make room
        prompts = [sequence.prompt for sequence in group]
        logits, cache, mask, source = prefill(self.model, prompts, self.pad_token_id)
        if self.h2o is None:
            self.cache = cache
            self.decoder = FullCacheDecoder(self.model, cache, self._agreed(self.sampler or choose_greedily), mask)
        else:
            if self.cache is None:
                self.cache = cache.with_rows(len(self.rows))
                eos = torch.tensor(sorted(self.eos), device=logits.device) if self.eos else None
                choose_next = self._agreed(self.sampler or choose_greedily)
                self.decoder = Decoder(self.model, self.cache, choose_next, eos, self.pad_token_id, logprobs=True)
            self.cache.take_rows(rows, cache, source)
        tokens = self._agreed(choose)(logits)
        self.decoder.start(tokens, rows)
        for row, sequence in zip(rows, group, strict=True):
            self.rows[row], self._begun[row] = sequence, (begin, self._clock.now())
        self._first.append((group, tokens, token_logprobs(logits, tokens)))

    def _agreed(self, choose: Choose) -> Choose:
        return choose if self.agree is None else lambda logits: self.agree(choose(logits))

    def _decode(self, waiting: bool) -> tuple:
        """Steps up to where sequences can join, or CHUNK; moments before and after, tokens and log-probabilities."""
        if self.h2o is None:
            steps = 1  # as stock generate looks
        elif not waiting:
            steps = CHUNK
        else:
            interval = self.h2o.update_interval
            steps = interval - (self.cache.clock - 1) % interval
            while steps + interval <= CHUNK:
                steps += interval
        unseen = {id(sequence) for group, *_ in self._first for sequence in group}
        left = [s.max_tokens - len(s.tokens) - (id(s) in unseen) for s in self.rows if s is not None]
        steps = min(steps, CHUNK, max(left))
        if self.sampler is not None:
            self.sampler.draw(self.rows, steps)
        begin = self._clock.now()
        tokens, logprobs = self.decoder.decode(steps) if steps else (None, None)
        return steps, begin, self._clock.now(), tokens, logprobs

    def _look(self, steps: int, begin, end, tokens, logprobs) -> Iterator[Sequence]:
        """Take in the tokens that the device has chosen; the sequences that have ended leave their rows."""
        for group, *first in self._first:
            for sequence, token, logprob in zip(group, *(tensor.tolist() for tensor in first), strict=True):
                self._extend(sequence, [token], [logprob])
        self._first.clear()
        table = [tensor.tolist() for tensor in (tokens, logprobs)] if steps else [[[]] * len(self.rows)] * 2
        if not steps and self._clock.on_gpu:
            end.synchronize()
        ended, together = [], sum(sequence is not None for sequence in self.rows)
        decoding = self._clock.seconds(begin, end) if steps else 0.0
        for row, sequence in enumerate(self.rows):
            if sequence is None:
                continue
            since, first = self._begun[row]
            sequence.rows = together
            sequence.decode_seconds += decoding / together
            taken = 0 if sequence.finish_reason else self._extend(sequence, table[0][row], table[1][row])
            if sequence.finish_reason:
                sequence.seconds_to_first_token = self._clock.seconds(since, first)
                sequence.seconds = sequence.seconds_to_first_token
                if len(sequence.tokens) > 1:
                    share = taken / steps * decoding
                    sequence.seconds = self._clock.seconds(since, begin) + share
                ended.append(row)
        for row in ended:
            sequence, self.rows[row] = self.rows[row], None
            sequence.cache = self._statistics(sequence)
            yield sequence

    def _extend(self, sequence: Sequence, tokens: list[int], logprobs: list[float]) -> int:
        """Add tokens up to the sequence's end; how many there were."""
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True), start=1):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            if not math.isfinite(logprob):  # of logits that overflowed: the token means nothing, nor would the next
                sequence.finish_reason = "nan"
            elif token in self.eos or (sequence.has_ended is not None and sequence.has_ended(sequence.tokens)):
                sequence.finish_reason = "stop"
            elif len(sequence.tokens) >= sequence.max_tokens:
                sequence.finish_reason = "length"
            if sequence.finish_reason:
                return i
        return len(tokens)

    def _statistics(self, sequence: Sequence) -> dict[str, int]:
        """What the cache held of a sequence when it ended: its last token was not fed."""
        seen = len(sequence.prompt) + len(sequence.tokens) - 1
        if self.h2o is None:
            per_token = sum(t[0, :, 0].nbytes for layer in self.cache.layers for t in (layer.keys, layer.values))
            return {"tokens_seen": seen, "slots_kept": seen, "slimmings": 0, "kv_bytes": seen * per_token}
        window, interval = self.h2o.window_length, self.h2o.update_interval
        prompt, kept, slimmings = len(sequence.prompt), 0, 0
        chunk = _columns_at_once(self.h2o, prompt)
        forwards = [(min(chunk, prompt - begin), True) for begin in range(0, prompt, chunk)]
        forwards += [(1, step % interval == 0) for step in range(1, len(sequence.tokens))]
        for new, due in forwards:
            kept += new
            if due:
                slimmings += kept > window
                kept = min(kept, window)
        kv_bytes = self.cache.nbytes // len(self.rows)
        return {"tokens_seen": seen, "slots_kept": kept, "slimmings": slimmings, "kv_bytes": kv_bytes}


def _columns_at_once(h2o, tokens: int) -> int:
    """How many tokens of a prompt of so many one prefill computes; `h2o` None is the full cache."""
    return tokens if h2o is None or h2o.prefill_chunk is None else min(tokens, h2o.prefill_chunk)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def devices_of(model) -> list[torch.device]:
    """The GPUs that hold layers of a model, or its only device."""
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return sorted(gpus, key=lambda device: device.index) or [model.device]


@torch.inference_mode()
def rows_that_fit(model, longest: int, max_tokens: int) -> int:
    """How many sequences a Batcher can decode at once in the memory that is free, its prefills beside them.

    On GPUs a prefill of the longest prompt is measured, on each that holds layers. On a CPU more than 16 gain nothing.

    Args: longest: tokens of the longest prompt; max_tokens: of the longest text.

    Raises: torch.OutOfMemoryError where the model's parts are on several processes: the others are in that prefill.
    """
    h2o, config, device = getattr(model, "h2o", None), model.config, model.device
    logits = 48 * config.vocab_size  # bytes a row: probabilities, sorted, with their order and sums
    if device.type != "cuda":
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError):  # only Linux tells
            return 16
        slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
        row = logits + slot * (longest + max_tokens if h2o is None else h2o.capacity)
        return max(1, min(16, int(free // 2 // row)))
    prompts = 1 if h2o is None else max(1, PREFILL_TOKENS // _columns_at_once(h2o, longest))
    cache = DynamicCache(config=config) if h2o is None else HHCache(h2o)
    devices = devices_of(model)
    gc.collect()
    torch.cuda.empty_cache()
    before = {}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
        before[device] = torch.cuda.memory_allocated(device)
    try:
        ids = torch.zeros(prompts, longest, dtype=torch.long, device=model.device)
        chosen = model(ids, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits.device
    except torch.OutOfMemoryError:
        if getattr(model, "_device_mesh", None) is not None:
            raise
        return 1
    peak = {device: torch.cuda.max_memory_allocated(device) - before[device] for device in devices}
    row = {device: _bytes_per_row(cache, device, longest + max_tokens) for device in devices}
    row[chosen] += logits
    del cache
    torch.cuda.empty_cache()
    fitting = []
    for device in devices:
        free = 0.95 * torch.cuda.mem_get_info(device)[0]
        if h2o is None:  # all prompts of a batch at once; a layer's keys and values are copied as they grow
            fitting.append(free // (peak[device] + row[device]))
        else:
            fitting.append((free - peak[device]) // row[device] if row[device] else 2**31)
    return max(1, int(min(fitting)))


def _bytes_per_row(cache: HHCache | DynamicCache, device: torch.device, tokens: int) -> int:
    """Of the layers on a device, as they are: a part of a model has a part of the heads. A full cache at `tokens`."""
    layers = [layer for layer in cache.layers if layer.keys.device == device]
    if isinstance(cache, HHCache):
        return sum(slots.nbytes for layer in layers for slots in (layer.tensors() | {"mass": layer.mass}).values()) // (
            len(cache.lengths)
        )
    return tokens * sum(t[0, :, 0].nbytes for layer in layers for t in (layer.keys, layer.values))
