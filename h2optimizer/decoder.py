"""Decode steps of a bounded cache: its shapes are constant, so a step is the same launches every time, and recorded."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable

import torch

from utils.cache import CACHE_ARGUMENT, HHCache

CHUNK = 16  # most steps between two looks of the host at the tokens

Choose = Callable[[torch.Tensor], torch.Tensor]  # tokens [B] of logits [B, vocabulary]


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The model's own log-probabilities, before temperature and top-p, of tokens [B]: float32 [B]."""
    return logits.log_softmax(-1, dtype=torch.float32).gather(1, tokens[:, None])[:, 0]


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
    if sharded and not model.capture_sharded:
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
        # weak: the model keeps caches and their decoders; `del model` frees its memory at once
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
        self._slots = [weakref.ref(layer.slots.positions) for layer in cache.layers]

    def is_current(self) -> bool:
        """Whether the model has the modules, and these their weights, that it had when the graphs were recorded."""
        model = self._model()
        return model is not None and self._weights == _addresses(model)

    def has_slots_of(self, cache: HHCache) -> bool:
        """Whether the cache has the slots still that the graphs were recorded over."""
        slots = [layer.slots.positions for layer in cache.layers]
        return len(slots) == len(self._slots) and all(
            there() is now for there, now in zip(self._slots, slots, strict=True)
        )

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
