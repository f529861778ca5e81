"""Decode from captured CUDA graphs: a bounded cache has constant shapes, so a step is the same launches every time.

`Decoder` runs the steps of one HHCache. `sample` is `generate` over it, where `can_capture` allows that; `Batcher`
decodes many sequences, each of its own length and sampling, and lets new ones take the rows of those that end.
"""

from __future__ import annotations

import functools
import gc
import os
import time
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from utils.cache import HHCache

CHUNK = 16  # most steps between two looks of the host at the tokens
PREFILL_TOKENS = 16384  # columns that a Batcher prefills at once
KEPT_CACHES = 8  # caches that a model's `generate` keeps, with their graphs, for later requests of the same size
KEPT_BYTES = 8 * 2**30  # bound of them all but the latest
KEPT_DECODERS = 4  # decoders of one cache, each for its own sampling

# What depends on the logits alone, and on nothing that changes from step to step.
STATELESS_PROCESSORS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)

Choose = Callable[[torch.Tensor], torch.Tensor]  # tokens [B] of logits [B, vocabulary]


def decode_logits(model, token: torch.Tensor, position_ids: torch.Tensor, cache: HHCache) -> torch.Tensor:
    """The model's forward of one token a row, [B, 1], inside an open step of the cache: logits [B, vocabulary]."""
    states = model.model(
        input_ids=token,
        attention_mask=token.new_empty(1, 1, 1, 1),  # as in H2OLlamaForCausalLM.forward
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return model.lm_head(states[:, -1])


class Decoder:
    """Decode steps over one cache, each told nothing by the host: replayed from CUDA graphs on a GPU, else run.

    One graph holds a step up to its next tokens, another the slimming of all layers. The first time each is run, the
    second time recorded. Where slimming is not by kernels the model's own forward takes the steps.

    Args:
        model: an H2OLlamaForCausalLM.
        cache: an HHCache after its prefill; its slots must not be reallocated while the decoder is in use.
        choose: tokens [B] from logits [B, vocabulary]; it waits for nothing.
        eos_token_ids: tokens that finish a row, int64 [n], or None.
        pad_token_id: what a finished row goes on with.
        logprobs: keep the model's own log-probabilities of the chosen tokens as well.
    """

    def __init__(
        self,
        model,
        cache: HHCache,
        choose: Choose,
        eos_token_ids: torch.Tensor | None = None,
        pad_token_id: int = 0,
        logprobs: bool = False,
    ):
        # weak: the model keeps caches and a cache its decoders; `del model` frees its memory at once
        self._model, self._cache, self.choose = weakref.ref(model), weakref.ref(cache), choose
        self.eos_token_ids, self.pad_token_id = eos_token_ids, pad_token_id
        rows, device = len(cache.lengths), model.device
        with torch.inference_mode(False):  # outlive the mode they are made in
            self.token = torch.zeros(rows, dtype=torch.long, device=device)  # what the next step feeds
            self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
            self.column = torch.zeros(1, dtype=torch.long, device=device)  # of `tokens`, that the next step writes
            self.tokens = torch.zeros(rows, CHUNK, dtype=torch.long, device=device)
            self.logprobs = torch.zeros(rows, CHUNK, device=device) if logprobs else None
        self.static = (
            cache.h2o.slimming == "H"
            and all(layer.by_kernel for layer in cache.layers)
            # frequencies that follow the length are the host's business in each step (longrope's in transformers 5.17)
            and not any(name in model.model.rotary_emb.rope_type for name in ("dynamic", "longrope"))
            and is_replayable(model)
        )
        self._forward = decode_logits
        if self.static and cache.h2o.compile:
            model.merge_projections()  # compiled, a merged product no longer asks whether its layers are the same
            # Coordinate descent lets batch-1 products become reductions that read at full bandwidth; sums that several
            # kernels read are stored, or each product would add up the residual stream again for every weight.
            options = {"coordinate_descent_tuning": True, "realize_reads_threshold": 1}
            on_gpu = device.type == "cuda"
            backend = {"backend": "inductor", "options": options} if on_gpu else {"backend": "aot_eager"}
            # torch.compile counts recompilations by code object, and gives up after eight: each decoder has its own
            forward = types.FunctionType(decode_logits.__code__.replace(), decode_logits.__globals__)
            self._forward = torch.compile(forward, fullgraph=True, dynamic=False, **backend)
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._ran: set[str] = set()  # what has run once, so that all its kernels are compiled
        self._pool = None
        self._weights = _addresses(model)

    def is_current(self) -> bool:
        """Whether the model has the modules, and these their weights, that it had when the graphs were recorded."""
        model = self._model()
        return model is not None and self._weights == _addresses(model)

    def start(self, tokens: torch.Tensor, rows: list[int] | None = None) -> None:
        """Go on from these tokens of all rows, or of some, which begin anew."""
        at = torch.arange(len(self.token)) if rows is None else torch.tensor(rows)
        at = at.to(self.token.device)
        self.finished.index_copy_(0, at, self.ends(tokens))
        self.token.index_copy_(0, at, tokens)

    @torch.inference_mode(False)  # the same mode in each call, or torch.compile compiles again, maybe in a recording
    @torch.no_grad()
    def decode(self, steps: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Up to CHUNK steps; returns tokens and log-probabilities [B, steps]. Waits for nothing."""
        self.column.zero_()
        for _ in range(steps):
            if self.static:
                self._next()
            else:
                self._keep(self._model()(self.token[:, None], past_key_values=self._cache()).logits[:, -1])
        return self.tokens[:, :steps].clone(), None if self.logprobs is None else self.logprobs[:, :steps].clone()

    def ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of the tokens finish their row."""
        if self.eos_token_ids is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        # not torch.isin, which sorts where there are ten or more, and then waits for the device
        return (tokens[..., None] == self.eos_token_ids).any(dim=-1)

    def _next(self) -> None:
        cache = self._cache()
        step = cache.begin(len(self.token), 1, static=True)
        self._play("scored" if step.scored else "unscored", self._step)
        if step.due:
            self._play("slimming", cache.slim_all)
        cache.end()

    def _step(self) -> None:
        """All that the device does in a step, but slimming."""
        cache = self._cache()
        cache.step.rows.count_step()
        if cache.h2o.position_rolling:
            position_ids = torch.arange(cache.h2o.capacity, device=self.token.device)[None]
        else:
            position_ids = cache.step.positions(self.token.device)
        self._keep(self._forward(self._model(), self.token[:, None], position_ids, cache))

    def _keep(self, logits: torch.Tensor) -> None:
        tokens = torch.where(self.finished, self.pad_token_id, self.choose(logits))
        if self.logprobs is not None:
            self.logprobs.index_copy_(1, self.column, token_logprobs(logits, tokens)[:, None])
        self.tokens.index_copy_(1, self.column, tokens[:, None])
        self.finished.logical_or_(self.ends(tokens))
        self.token.copy_(tokens)
        self.column.add_(1)

    def _play(self, name: str, run: Callable[[], None]) -> None:
        device = self.token.device
        if name in self._graphs:
            self._graphs[name].replay()
        elif device.type != "cuda" or name not in self._ran:
            run()
            self._ran.add(name)
        else:
            graph, stream = torch.cuda.CUDAGraph(), _recording_stream(device)
            # thread_local: what other threads do on the device meanwhile (pinning memory, say) is no error
            options = {"pool": self._pool, "stream": stream, "capture_error_mode": "thread_local"}
            with torch.cuda.device(device), torch.cuda.graph(graph, **options):
                run()
            self._pool = graph.pool()
            self._graphs[name] = graph
            graph.replay()


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """torch's own is the first device's, where nothing of a model on another would be recorded."""
    return torch.cuda.Stream(device)


def _addresses(model) -> list[int]:
    """Of the model's modules and of its tensors' memory."""
    tensors = [tensor.data_ptr() for held in (model.parameters(), model.buffers()) for tensor in held]
    return [*map(id, model.modules()), *tensors]


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The model's own log-probabilities, before temperature and top-p, of tokens [B]: float32 [B]."""
    return logits.log_softmax(-1, dtype=torch.float32).gather(1, tokens[:, None])[:, 0]


def choose_greedily(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


class RowSampler:
    """Chooses each row's token by its own temperature and top-p, from a uniform number of its own.

    A row's text therefore depends on its seed, and on neither the rows beside it nor when it joined them.
    """

    def __init__(self, rows: int, device: torch.device, nucleus: bool):
        self.nucleus = nucleus  # whether any row's top_p is below 1: only then are the tokens sorted
        with torch.inference_mode(False):
            self.temperature = torch.zeros(rows, device=device)  # 0: the greatest
            self.top_p = torch.ones(rows, device=device)
            self.uniform = torch.zeros(rows, CHUNK, device=device)
            self.column = torch.zeros(1, dtype=torch.long, device=device)

    def at(self, rows: list[int], sequences: list[Sequence]) -> Choose:
        """Let sequences have these rows; returns the choice of their first tokens."""
        at = torch.tensor(rows, device=self.temperature.device)
        settings = [[s.temperature for s in sequences], [s.top_p for s in sequences], _uniforms(sequences, 1)[:, 0]]
        temperature, top_p, uniform = (
            torch.as_tensor(values, dtype=torch.float32).to(at.device) for values in settings
        )
        self.temperature.index_copy_(0, at, temperature)
        self.top_p.index_copy_(0, at, top_p)
        return lambda logits: sample_rows(logits, temperature, top_p, uniform[:, None], self.nucleus)

    def draw(self, sequences: list[Sequence | None], steps: int) -> None:
        """Numbers for the next steps of the sequences in all rows."""
        uniform = torch.from_numpy(_uniforms(sequences, steps))
        self.uniform[: len(uniform), :steps].copy_(uniform)
        self.column.zero_()

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        uniform = self.uniform[: len(logits)].index_select(1, self.column)
        self.column.add_(1)
        rows = slice(len(logits))
        return sample_rows(logits, self.temperature[rows], self.top_p[rows], uniform, self.nucleus)


def _uniforms(sequences: list[Sequence | None], steps: int) -> np.ndarray:
    """The next `steps` random numbers in [0, 1) of each sequence, float32 [rows, steps]."""
    uniform = np.zeros((len(sequences), steps), dtype=np.float32)
    for row, sequence in enumerate(sequences):
        if sequence is not None and sequence.temperature > 0:
            uniform[row] = sequence.random.random(steps, dtype=np.float32)
    return uniform


def sample_rows(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor, nucleus: bool
) -> torch.Tensor:
    """Tokens [B] by inversion of the distribution of each row, at uniform numbers [B, 1] in [0, 1).

    temperature, top_p: float32 [B]; temperature 0 takes the greatest. Top-p keeps the most probable tokens up to the
    one that brings their sum to top_p (Holtzman et al., arXiv 1904.09751).
    """
    sampled = temperature > 0
    probs = (logits.float() / torch.where(sampled, temperature, 1.0)[:, None]).softmax(-1)
    tokens = _invert(probs, uniform)
    if nucleus:  # of the rows that ask for one: in another order of the tokens the others would say something else
        probs, order = probs.sort(dim=-1, descending=True)
        before = probs.cumsum(-1) - probs
        at = _invert(torch.where(before < top_p[:, None], probs, 0.0), uniform)
        tokens = torch.where(top_p[:, None] < 1, order.gather(1, at), tokens)
    return torch.where(sampled, tokens[:, 0], logits.argmax(-1))


def _invert(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Where the sums of each row's probabilities [B, n], of any total, pass its uniform number: int64 [B, 1]."""
    up_to = probs.cumsum(-1)
    at = torch.searchsorted(up_to, uniform * up_to[:, -1:], right=True)
    # rounding may leave the sum short of the last token, or at ones of no probability
    last = (probs > 0).long().mul_(torch.arange(probs.shape[-1], device=probs.device)).amax(-1, keepdim=True)
    return torch.minimum(at, last)


# generate


class KeptCaches:
    """Caches that `generate` made, with the graphs over their slots, for later calls of the same batch size."""

    def __init__(self):
        self._caches: OrderedDict[Hashable, HHCache] = OrderedDict()

    def take(self, key: Hashable) -> HHCache | None:
        """One for this key, empty, the caller's until it is put back."""
        cache = self._caches.pop(key, None)
        if cache is not None:
            cache.reset()
        return cache

    def put(self, key: Hashable, cache: HHCache) -> None:
        self._caches[key] = cache
        while len(self._caches) > KEPT_CACHES or self._earlier_bytes() > KEPT_BYTES:
            self._caches.popitem(last=False)

    def _earlier_bytes(self) -> int:
        return sum(cache.nbytes for cache in list(self._caches.values())[:-1])

    def clear(self) -> bool:
        """Free them; whether there was one."""
        any_kept = bool(self._caches)
        self._caches.clear()
        return any_kept

    def __reduce__(self):  # a copy is empty: graphs belong to one model's weights
        return KeptCaches, ()


def can_capture(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, **kwargs
) -> bool:
    """Whether `sample` gives what transformers' loop gives."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, HHCache) or not cache.h2o.capture or cache.h2o.slimming != "H":
        return False
    if synced_gpus or streamer is not None or generation_config.is_assistant or model.training:
        return False
    wanted = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
    if generation_config.return_dict_in_generate and any(getattr(generation_config, name) for name in wanted):
        return False
    if not all(type(processor) in STATELESS_PROCESSORS for processor in logits_processor):
        return False
    if not is_replayable(model):
        return False
    on_gpu = model.device.type == "cuda" or CAPTURE_ELSEWHERE
    if not on_gpu or cache.h2o.slimming_kernels(model.device) is None:
        return False
    return cache.h2o.position_rolling or _positions_are_counts(input_ids, **kwargs)


def _positions_are_counts(input_ids, position_ids=None, attention_mask=None, inputs_embeds=None, **kwargs) -> bool:
    """Whether the last token's position is the number of those before it, from where the cache counts on."""
    if position_ids is None:
        return True
    columns = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
    tokens = columns if attention_mask is None else attention_mask.sum(dim=-1)
    return position_ids.ndim == 2 and bool((position_ids[:, -1] + 1 == tokens).all())


def is_replayable(model) -> bool:
    """Whether each forward is the same work of one device: a graph that is replayed calls nothing on the host."""
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return False
    if torch.is_autocast_enabled(model.device.type):  # a graph would outlive the casts of the weights
        return False
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:  # its layers may ask the device (bitsandbytes, 8 bits)
        return False
    for module in model.modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        # transformers leaves its own where outputs, or gradient checkpointing, were asked for once: idle without
        foreign = not all(str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)
        if foreign or "forward" in vars(module):
            return False
    return True


CAPTURE_ELSEWHERE = False  # tests run the same steps where there are no graphs


def sample(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, **kwargs
):
    """As GenerationMixin._sample, greedy or sampling: sequences [B, tokens], or its output object.

    End-of-sequence tokens are noticed on the device. The host looks after up to CHUNK steps, where something but the
    length can end the call; other criteria then see every prefix, and what was decoded past the last row's end is
    dropped. A cache that outlives the call never ends a step ahead: where a step could be the last, the host looks at
    once.
    """
    cache = kwargs["past_key_values"]
    outlives = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
    eos = [criteria.eos_token_id for criteria in stopping_criteria if isinstance(criteria, EosTokenCriteria)]
    eos = torch.cat([ids.reshape(-1) for ids in eos]).to(input_ids.device) if eos else None
    others = [c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
    pad = generation_config._pad_token_tensor
    pad = 0 if pad is None else int(pad)
    max_length = stopping_criteria.max_length
    at_a_time = 1 if outlives and (eos is not None or others) else CHUNK

    key = (len(input_ids), cache.h2o, model.dtype, model.device)
    if not outlives:
        cache = kwargs["past_key_values"] = model.kept_caches.take(key) or cache
    logits = None
    while logits is None:
        try:
            logits = model._prefill(input_ids, generation_config, dict(kwargs), is_first_iteration=True).logits[:, -1]
        except torch.OutOfMemoryError:
            if not model.kept_caches.clear():
                raise
        if logits is None:  # again, with what was kept out of the way
            torch.cuda.empty_cache()
            cache.reset()
    decoder = _decoder_of(model, cache, logits_processor, generation_config.do_sample, eos, pad)

    new = decoder.choose(logits)
    decoder.start(new)
    new, ended = new[:, None], torch.zeros_like(decoder.finished)
    while True:
        done = []  # for each new column, whether it ends the last row
        if others:
            for column in new.unbind(1):
                column = column if eos is None else torch.where(ended, pad, column)
                input_ids = torch.cat([input_ids, column[:, None]], dim=1)
                ended = ended | decoder.ends(column)
                for criteria in others:
                    ended = ended | criteria(input_ids, None)
                done.append(ended.all())
            done = torch.stack(done).tolist()  # the host waits here
        else:
            input_ids = torch.cat([input_ids, new], dim=1)
            if eos is not None:
                ended_by = (decoder.ends(new).cumsum(dim=1) > 0) | ended[:, None]
                ended = ended_by[:, -1]
                done = ended_by.all(dim=0).tolist()  # or here
        if True in done:
            input_ids = input_ids[:, : input_ids.shape[1] - len(done) + done.index(True) + 1]
            break
        left = CHUNK if max_length is None else max_length - input_ids.shape[1]
        if left <= 0:
            break
        if others and eos is not None:  # rows that they ended: the decoder knows of its own only
            decoder.finished.copy_(ended)
            decoder.token.copy_(input_ids[:, -1])
        new = decoder.decode(min(at_a_time, left))[0]
    if not outlives:
        model.kept_caches.put(key, cache)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=cache)
    return input_ids


def _decoder_of(model, cache: HHCache, processors: LogitsProcessorList, do_sample: bool, eos, pad: int) -> Decoder:
    """A decoder over this cache that chooses so; the one of an earlier call where there is one."""
    settings = [(type(p).__name__, *sorted((k, str(v)) for k, v in vars(p).items())) for p in processors]
    key = (id(model), *settings, do_sample, None if eos is None else tuple(eos.tolist()), pad)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        scores = processors(None, logits.float())
        return torch.multinomial(scores.softmax(-1), 1)[:, 0] if do_sample else scores.argmax(-1)

    decoder = cache.decoders.pop(key, None)
    if decoder is None or not decoder.is_current():
        greedy = not do_sample and not processors
        decoder = Decoder(model, cache, choose_greedily if greedy else choose, eos, pad)
    cache.decoders[key] = decoder  # the last in order
    while len(cache.decoders) > KEPT_DECODERS:
        del cache.decoders[next(iter(cache.decoders))]
    return decoder


# Many sequences


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
    finish_reason: str | None = None  # "stop" (an end-of-sequence token, or has_ended) or "length"
    rows: int = 0  # sequences in its batch at its end
    cache: dict[str, int] = field(default_factory=dict)  # what it held at the end: tokens_seen, slots_kept, …
    seconds: float = 0.0  # from the beginning of its prefill to its end
    seconds_to_first_token: float = 0.0

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
            if self.mask is not None:
                self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            logits = self.model(
                self.token[:, None],
                attention_mask=self.mask,
                position_ids=self.position[:, None],
                past_key_values=self.cache,
            ).logits[:, -1]
            self.token = self.choose(logits)
            self.position = self.position + 1
            tokens.append(self.token)
            logprobs.append(token_logprobs(logits, self.token))
        return torch.stack(tokens, dim=1), torch.stack(logprobs, dim=1)


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
    """

    def __init__(
        self,
        model,
        rows: int,
        eos_token_ids: set[int],
        pad_token_id: int,
        sampling: bool = False,
        nucleus: bool = False,
    ):
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
        """Yields each sequence when it has ended; prompts of one object, side by side, are prefilled once.

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
            prompts.add(id(prompt))
            columns = max(columns, len(prompt))
            if group and self.h2o is not None and len(prompts) * columns > PREFILL_TOKENS:
                self._prefill(group, free[: len(group)])
                group, free = [], free[len(group) :]
                prompts, columns = set(), 0
            else:
                group.append(waiting.popleft())
        self._prefill(group, free[: len(group)])

    def _prefill(self, group: list[Sequence], rows: list[int]) -> None:
        begin, device = self._clock.now(), self.model.device
        prompts = list({id(sequence.prompt): sequence.prompt for sequence in group}.values())
        of = {id(prompt): i for i, prompt in enumerate(prompts)}
        source = [of[id(sequence.prompt)] for sequence in group]
        columns = max(map(len, prompts))
        ids = torch.tensor([[self.pad_token_id] * (columns - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        choose = choose_greedily
        if self.sampler is not None:
            choose = self.sampler.at(rows, group)
        if self.h2o is None:
            self.cache = self.decoder = None  # the batch before has ended: make room
            cache, mask = DynamicCache(config=self.model.config), mask.to(device)
            position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = self.model(
                ids.to(device), attention_mask=mask, position_ids=position_ids, past_key_values=cache, logits_to_keep=1
            ).logits[source, -1]
            if source != list(range(len(prompts))):
                cache.batch_select_indices(torch.tensor(source, device=device))
            self.cache = cache
            self.decoder = FullCacheDecoder(self.model, cache, self.sampler or choose_greedily, mask[source])
        else:
            cache = HHCache(self.h2o)
            logits = self.model(ids.to(device), attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[
                source, -1
            ]  # the mask stays on the host, which reads it
            if self.cache is None:
                self.cache = cache.with_rows(len(self.rows))
                eos = torch.tensor(sorted(self.eos), device=device) if self.eos else None
                self.decoder = Decoder(
                    self.model, self.cache, self.sampler or choose_greedily, eos, self.pad_token_id, logprobs=True
                )
            self.cache.take_rows(rows, cache, source)
        tokens = choose(logits)
        self.decoder.start(tokens, rows)
        for row, sequence in zip(rows, group, strict=True):
            self.rows[row], self._begun[row] = sequence, (begin, self._clock.now())
        self._first.append((group, tokens, token_logprobs(logits, tokens)))

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
        for row, sequence in enumerate(self.rows):
            if sequence is None:
                continue
            since, first = self._begun[row]
            sequence.rows = together
            taken = 0 if sequence.finish_reason else self._extend(sequence, table[0][row], table[1][row])
            if sequence.finish_reason:
                sequence.seconds_to_first_token = self._clock.seconds(since, first)
                sequence.seconds = sequence.seconds_to_first_token
                if len(sequence.tokens) > 1:
                    share = taken / steps * self._clock.seconds(begin, end)
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
            if token in self.eos or (sequence.has_ended is not None and sequence.has_ended(sequence.tokens)):
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
        kept, slimmings = min(len(sequence.prompt), window), int(len(sequence.prompt) > window)
        for step in range(1, len(sequence.tokens)):
            kept += 1
            if step % interval == 0:
                slimmings += kept > window
                kept = min(kept, window)
        kv_bytes = self.cache.nbytes // len(self.rows)
        return {"tokens_seen": seen, "slots_kept": kept, "slimmings": slimmings, "kv_bytes": kv_bytes}


@torch.inference_mode()
def rows_that_fit(model, longest: int, max_tokens: int) -> int:
    """How many sequences a Batcher can decode at once in the memory that is free, its prefills beside them.

    On a GPU a prefill of the longest prompt is measured. On a CPU more than 16 gain nothing.

    Args: longest: tokens of the longest prompt; max_tokens: of the longest text.
    """
    h2o, config, device = getattr(model, "h2o", None), model.config, model.device
    slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    logits = 48 * config.vocab_size  # bytes a row: probabilities, sorted, with their order and sums
    row = logits + slot * (longest + max_tokens if h2o is None else h2o.capacity)
    if device.type != "cuda":
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError):  # only Linux tells
            return 16
        return max(1, min(16, int(free // 2 // row)))
    prompts = 1 if h2o is None else max(1, PREFILL_TOKENS // longest)
    cache = DynamicCache(config=config) if h2o is None else HHCache(h2o)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        model(torch.zeros(prompts, longest, dtype=torch.long, device=device), past_key_values=cache, logits_to_keep=1)
    except torch.OutOfMemoryError:
        return 1
    peak = torch.cuda.max_memory_allocated(device) - before
    if h2o is not None:
        row = logits + cache.nbytes // prompts
    del cache
    torch.cuda.empty_cache()
    free = 0.95 * torch.cuda.mem_get_info(device)[0]
    if h2o is None:  # all prompts of a batch at once; a layer's keys and values are copied as they grow
        return max(1, int(free // (peak + row)))
    return max(1, int((free - peak) // row))
