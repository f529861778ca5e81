"""Many sequences at once, each with its own length and sampling; new ones take over the rows of finished ones."""

from __future__ import annotations

import gc
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from h2optimizer.decoder import CHUNK, Choose, token_logprobs
from h2optimizer.decoding import decoding_of
from h2optimizer.sampling import RowSampler, choose_greedily
from h2optimizer.sharing import SharedPrefixes, most_snapshot_bytes
from h2optimizer.utils.cache import CACHE_ARGUMENT
from h2optimizer.utils.costs import head_dim


@dataclass
class Sequence:
    """One text to generate, and its results."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    seed: tuple[int, ...] = (0,)  # its random numbers depend on nothing else
    has_ended: Callable[[list[int]], bool] | None = None  # whether its tokens so far end it; called after each token
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" (an end-of-sequence token, or has_ended), "length" or "nan" (no logits)
    rows: int = 0  # sequences in its batch when it ended
    cache: dict[str, int] = field(default_factory=dict)  # statistics at the end: tokens_seen, slots_kept, …
    seconds: float = 0.0  # from the start of its prefill to its end
    seconds_to_first_token: float = 0.0
    decode_seconds: float = 0.0  # its share of its decode steps, each divided equally among the sequences in it
    prompt_computed: int = 0  # tokens of its prompt that were computed for it; the others were shared

    def __post_init__(self):
        self.random = np.random.default_rng(self.seed)


class Clock:
    """Timestamps recorded on the device, so that timing never waits for it; on a CPU, the host's clock."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"

    def now(self) -> torch.cuda.Event | float:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begin, end) -> float:
        """Seconds between two timestamps that the device has reached."""
        return begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin


class Batcher:
    """Decodes sequences together; each one that ends makes room for the next.

    `decoding`, for the model's kind of cache, decides when a sequence can join and how many prompts prefill at once.
    A bounded cache prefills in sub-batches beside the slots, too small to set the peak of memory. A beginning that many
    prompts share is computed once, and these prompts are scheduled together.

    Args:
        model: an H2OForCausalLM, or its stock model.
        rows: sequences decoded at once.
        eos_token_ids, pad_token_id: as in the model's generation config.
        sampling: whether any sequence samples; nucleus: whether any has a top_p below 1.
        agree: makes all processes that share a model use the same chosen tokens [B], in place; or None.
        snapshots: bytes that the shared beginnings held at any time may take, 0 to share nothing; None = a part of the
            device's memory. Processes that share a model must give the same.
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
        snapshots: int | None = None,
    ):
        self.agree = agree
        self.snapshots = most_snapshot_bytes(model) if snapshots is None else snapshots
        self.model, self.eos = model, eos_token_ids
        self.sampler = RowSampler(rows, model.device, nucleus) if sampling else None
        self.rows: list[Sequence | None] = [None] * rows
        choose = self._agreed(self.sampler or choose_greedily)
        self.decoding = decoding_of(model, choose, eos_token_ids, pad_token_id)
        self.decoding.prepare()
        self._clock = Clock(model.device)
        self._begun: list[tuple] = [()] * rows  # timestamps of each row's prefill: begin, end
        self._first: list[tuple] = []  # first tokens that the host has not read yet: sequences, tokens, logprobs
        self._prefixes: SharedPrefixes  # of this run's sequences,
        self._number: dict[int, int]  # which are numbered there; by id

    @torch.inference_mode()
    def run(self, sequences: Iterable[Sequence]) -> Iterator[Sequence]:
        """Yield each sequence when it has ended. Adjacent equal prompts are prefilled once.

        Sequences begin in the given order, except that those who share a beginning come with the first of them.

        Raises: torch.OutOfMemoryError. Sequences not yielded by then must be restarted.
        """
        given = list(sequences)
        prompts = [sequence.prompt for sequence in given]
        self._prefixes = SharedPrefixes(self.decoding, prompts, len(self.rows), self.snapshots)
        self._number = {id(sequence): i for i, sequence in enumerate(given)}
        waiting = deque(given[i] for i in self._prefixes.order)
        while waiting or any(self.rows):
            busy = sum(sequence is not None for sequence in self.rows)
            if not busy:
                self.decoding.rest()
            if waiting and self.decoding.can_join(busy, len(self.rows)):
                self._fill(waiting)
            yield from self._look(*self._decode(bool(waiting)))

    def _fill(self, waiting: deque[Sequence]) -> None:
        """Prefill sequences for the free rows."""
        free = [row for row, sequence in enumerate(self.rows) if sequence is None]
        group: list[Sequence] = []
        prompts, longest = set(), 0
        while waiting and len(group) < len(free):
            prompt, shared = waiting[0].prompt, self._prefixes.tokens_of(self._number[id(waiting[0])])
            prompts.add(tuple(prompt))
            longest = max(longest, len(prompt))
            at_once = self.decoding.prompts_at_once(longest, shared)
            full = at_once is not None and len(prompts) > at_once
            if group and (full or not self._begin_alike(group[-1], waiting[0])):
                self._prefill(group, free[: len(group)])
                group, free = [], free[len(group) :]
                prompts, longest = set(), 0
            else:
                group.append(waiting.popleft())
        self._prefill(group, free[: len(group)])

    def _begin_alike(self, *sequences: Sequence) -> bool:
        """Whether these prompts continue from the same beginning, or all from none."""
        return len({self._prefixes.beginning_of(self._number[id(sequence)]) for sequence in sequences}) == 1

    def _prefill(self, group: list[Sequence], rows: list[int]) -> None:
        """Let sequences that begin alike join these rows."""
        begin = self._clock.now()
        choose = choose_greedily
        if self.sampler is not None:
            choose = self.sampler.at(rows, group)
        numbers = [self._number[id(sequence)] for sequence in group]
        logits, computed = self._prefixes.join(self.decoding, numbers, rows, len(self.rows))
        for sequence, tokens in zip(group, computed, strict=True):
            sequence.prompt_computed = tokens
        tokens = self._agreed(choose)(logits)
        self.decoding.start(tokens, rows)
        for row, sequence in zip(rows, group, strict=True):
            self.rows[row], self._begun[row] = sequence, (begin, self._clock.now())
        self._first.append((group, tokens, token_logprobs(logits, tokens)))

    def _agreed(self, choose: Choose) -> Choose:
        return choose if self.agree is None else lambda logits: self.agree(choose(logits))

    def _decode(self, waiting: bool) -> tuple:
        """Decode until sequences can join, at most CHUNK steps: steps, begin, end, tokens and log-probabilities."""
        unseen = {id(sequence) for group, *_ in self._first for sequence in group}
        left = [s.max_tokens - len(s.tokens) - (id(s) in unseen) for s in self.rows if s is not None]
        steps = min(self.decoding.steps(waiting), CHUNK, max(left))
        if self.sampler is not None:
            self.sampler.draw(self.rows, steps)
        begin = self._clock.now()
        tokens, logprobs = self.decoding.decode(steps) if steps else (None, None)
        return steps, begin, self._clock.now(), tokens, logprobs

    def _look(self, steps: int, begin, end, tokens, logprobs) -> Iterator[Sequence]:
        """Read the chosen tokens from the device, and yield the sequences that ended, freeing their rows."""
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
            sequence.cache = self.decoding.statistics(len(sequence.prompt), len(sequence.tokens))
            yield sequence

    def _extend(self, sequence: Sequence, tokens: list[int], logprobs: list[float]) -> int:
        """Add tokens up to the sequence's end; returns how many were added."""
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True), start=1):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            if not math.isfinite(logprob):  # the logits overflowed, so this token and all later ones are meaningless
                sequence.finish_reason = "nan"
            elif token in self.eos or (sequence.has_ended is not None and sequence.has_ended(sequence.tokens)):
                sequence.finish_reason = "stop"
            elif len(sequence.tokens) >= sequence.max_tokens:
                sequence.finish_reason = "length"
            if sequence.finish_reason:
                return i
        return len(tokens)


def devices_of(model) -> list[torch.device]:
    """The GPUs that hold layers of a model, or its only device."""
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return sorted(gpus, key=lambda device: device.index) or [model.device]


@torch.inference_mode()
def rows_that_fit(model, longest: int, max_tokens: int, beside: int = 0) -> int:
    """How many sequences a Batcher can decode at once in free memory, with its prefills beside them.

    On GPUs, a prefill of the longest prompt is measured on every GPU with layers. On a CPU, more than 16 gain nothing.

    Args: longest: tokens of the longest prompt; max_tokens: tokens of the longest text; beside: bytes of snapshots.

    Raises: torch.OutOfMemoryError if processes share the model, because the others are still in that prefill.
    """
    decoding, config, device = decoding_of(model), model.config, model.device
    logits = 48 * config.vocab_size  # bytes per row: probabilities, also sorted, with their order and sums
    if device.type != "cuda":
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError):  # not Linux
            return 16
        slot = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * model.dtype.itemsize
        row = logits + slot * decoding.slots_for(longest + max_tokens)
        return max(1, min(16, int((free // 2 - beside) // row)))
    prompts, cache = max(1, decoding.prompts_at_once(longest) or 1), decoding.new_cache()
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
    row = {device: decoding.bytes_per_row(cache, device, longest + max_tokens) for device in devices}
    row[chosen] += logits
    del cache
    torch.cuda.empty_cache()
    free = {device: 0.95 * torch.cuda.mem_get_info(device)[0] - beside / len(devices) for device in devices}
    return max(1, min(decoding.rows_within(free[device], peak[device], row[device]) for device in devices))
