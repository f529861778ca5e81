"""Decode from captured CUDA graphs: a bounded cache has constant shapes, so a step is the same launches every time.

`Decoder` runs the steps of one HHCache. `sample` is `generate` over it, where `can_capture` allows that.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from h2optimizer.attention import has_kernels
from utils.cache import CACHE_ARGUMENT, HHCache

CHUNK = 16  # most steps between two looks of the host at the tokens
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
        use_cache=True,
        **{CACHE_ARGUMENT: cache},
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
    def decode(self, steps: int, new: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Up to CHUNK steps; returns tokens and log-probabilities [B, steps]. Waits for nothing.

        `new` is 1 for rows that bring a token to these steps, 0 for those fed padding; all bring one unless given.
        """
        self.column.zero_()
        for _ in range(steps):
            if self.static:
                self._next(new)
            else:
                mask = None if new is None else torch.tensor(new)[:, None]
                inputs = {"attention_mask": mask, CACHE_ARGUMENT: self._cache()}
                self._keep(self._model()(self.token[:, None], **inputs).logits[:, -1])
        return self.tokens[:, :steps].clone(), None if self.logprobs is None else self.logprobs[:, :steps].clone()

    def ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of the tokens finish their row."""
        if self.eos_token_ids is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        # not torch.isin, which sorts where there are ten or more, and then waits for the device
        return (tokens[..., None] == self.eos_token_ids).any(dim=-1)

    def _next(self, new: list[int] | None) -> None:
        cache = self._cache()
        step = cache.begin(len(self.token), 1, new, static=True)
        name = "scored" if step.scored else "unscored"
        name += " partial" * step.partial + " with gaps" * any(step.rows.gaps)  # each is other work
        self._play(name, self._step)
        if step.due:
            self._play("slimming", cache.slim_all)
        cache.end()

    def _step(self) -> None:
        """All that the device does in a step, but slimming."""
        cache = self._cache()
        step = cache.step
        step.rows.count_step(step.partial)
        if cache.h2o.position_rolling:
            position_ids = torch.arange(cache.h2o.capacity, device=self.token.device)[None]
        else:
            position_ids = step.positions(self.token.device)
        forward = decode_logits if step.partial else self._forward  # not worth compiling once more
        self._keep(forward(self._model(), self.token[:, None], position_ids, cache))

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
            # the generator's offset was set to 0 on that stream: not after the replay has set it to what it is
            torch.cuda.current_stream(device).wait_stream(stream)
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


# generate


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember which rows they have ended: what `generate` feeds these afterwards is padding.

    Where no end-of-sequence token is asked for, `generate` feeds them what they would say next: text, not padding.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        self._pads = any(hasattr(each, "eos_token_id") for each in criteria)
        self._ended: torch.Tensor | None = None  # after the newest token
        self._before: torch.Tensor | None = None  # it is padding in these rows

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.Tensor:
        ended = super().__call__(input_ids, scores, **kwargs)
        self._before, self._ended = self._ended, ended if self._ended is None else ended | self._ended
        return ended

    def mask(self) -> torch.Tensor | None:
        """[B, 1] for the newest tokens, 0 for padding; None where it is that of no row. Waits for the device."""
        if not self._pads or self._before is None or not self._before.any():
            return None
        return (~self._before).long()[:, None]


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
    cache = kwargs.get(CACHE_ARGUMENT)
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
    if not on_gpu or not has_kernels(cache.h2o, model.device):
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
    sharded = getattr(model, "_device_mesh", None) is not None
    if sharded and not CAPTURE_SHARDED:
        return False
    for module in model.modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        # transformers leaves its own where outputs, or gradient checkpointing, were asked for once: idle without
        foreign = not all(str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)
        replaced = vars(module).get("forward")
        if sharded and str(getattr(replaced, "__module__", "")).startswith("transformers.distributed."):
            replaced = None  # the same forward, and then the sum over the model's parts
        if foreign or replaced is not None:
            return False
    return True


CAPTURE_ELSEWHERE = False  # tests run the same steps where there are no graphs
# Of a tensor-parallel model, whose recorded steps hold NCCL's communicator: its end (destroy_process_group) waits for
# them for ever. A program that says True drops the model and its caches before that, or ends without it.
CAPTURE_SHARDED = False


def sample(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, **kwargs
):
    """As GenerationMixin._sample, greedy or sampling: sequences [B, tokens], or its output object.

    End-of-sequence tokens are noticed on the device. The host looks after up to CHUNK steps, where something but the
    length can end the call; other criteria then see every prefix, and what was decoded past the last row's end is
    dropped. A cache that outlives the call never ends a step ahead: where a step could be the last, the host looks at
    once, and rows that have ended bring no token to the steps that follow.
    """
    cache = kwargs[CACHE_ARGUMENT]
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
        cache = kwargs[CACHE_ARGUMENT] = model.kept_caches.take(key) or cache
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
    bring = None  # which rows bring a token to the next step; all where the cache ends with the call
    while True:
        before = ended
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
        if outlives and eos is not None and len(input_ids) > 1:
            bring = (~before).long().tolist()  # the newest token of a row that had ended before it is padding
        if others and eos is not None:  # rows that they ended: the decoder knows of its own only
            decoder.finished.copy_(ended)
            decoder.token.copy_(input_ids[:, -1])
        new = decoder.decode(min(at_a_time, left), bring)[0]
    if not outlives:
        model.kept_caches.put(key, cache)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, **{CACHE_ARGUMENT: cache})
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
