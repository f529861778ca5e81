"""Decode steps of a bounded cache. Its shapes are constant, so every step is the same launches and can be recorded."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable

import torch

from h2optimizer.backends import has_kernels
from h2optimizer.fused import has_foreign_hooks
from h2optimizer.shards import is_divided
from h2optimizer.utils.cache import CACHE_ARGUMENT, KERNEL_DTYPES, HHCache
from h2optimizer.utils.memory import to_device
from h2optimizer.weights import plain_tensors

CHUNK = 16  # most steps between two checks of the tokens by the host

Choose = Callable[[torch.Tensor], torch.Tensor]  # logits [B, vocabulary] -> tokens [B]


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, by_kernel: bool = False) -> torch.Tensor:
    """Log-probabilities of tokens [B] under the model itself, before temperature and top-p: float32 [B].

    by_kernel: in one pass, if there is a kernel for the dtype.
    """
    if by_kernel and logits.dtype in KERNEL_DTYPES:
        from h2optimizer.kernels import logits as kernels

        return kernels.token_logprobs(logits, tokens)
    return logits.log_softmax(-1, dtype=torch.float32).gather(1, tokens[:, None])[:, 0]


def decode_logits(model, token: torch.Tensor, position_ids: torch.Tensor, cache: HHCache) -> torch.Tensor:
    """The model's forward of one token per row, [B, 1], within an open step of the cache: logits [B, vocabulary]."""
    states = model.model(
        input_ids=token,
        attention_mask=token.new_empty(1, 1, 1, 1),  # as in H2OForCausalLM.forward
        position_ids=position_ids,
        use_cache=True,
        **{CACHE_ARGUMENT: cache},
    ).last_hidden_state
    return model.lm_head(states[:, -1])


def is_replayable(model) -> bool:
    """Whether every forward is the same work on one device. A replayed graph runs no Python code."""
    if torch.is_autocast_enabled(model.device.type):  # a graph would outlive the casts of the weights
        return False
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:  # its layers may read from the device (8-bit bnb)
        return False
    sharded = getattr(model, "_device_mesh", None) is not None
    if sharded and not model.capture_sharded:
        return False
    devices = set()
    for module in _modules(model):
        devices.update([held.device for held in module._parameters.values() if held is not None])
        # a divided layer has its original forward plus a sum over the model's shards
        replaced = "forward" in vars(module) and not (sharded and is_divided(module))
        if replaced or has_foreign_hooks(module):
            return False
    return len(devices) <= 1


def _modules(model: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """As `model.modules()`, in another order and several times faster: `generate` walks while the device is idle."""
    found, waiting = {}, [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting += module._modules.values()
    return found.values()


class Decoder:
    """Decode steps over one cache that need no values from the host: replayed from CUDA graphs on a GPU, else run.

    One graph holds a step up to its next tokens, another the slimming of all layers. Each is run the first time and
    recorded the second time. If slimming does not use kernels, the model's own forward takes the steps.

    Args:
        model: an H2OForCausalLM.
        cache: an HHCache after its prefill; its slots must not be reallocated while the decoder is in use.
        choose: maps logits [B, vocabulary] to tokens [B] without waiting for the device.
        eos_token_ids: tokens that finish a row, int64 [n], or None.
        pad_token_id: the token of finished rows.
        logprobs: also keep the model's own log-probabilities of the chosen tokens.
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
        # weak: the model owns caches and their decoders, and `del model` must free its memory at once
        self._model, self._cache, self.choose = weakref.ref(model), weakref.ref(cache), choose
        self.eos_token_ids, self.pad_token_id = eos_token_ids, pad_token_id
        rows, device = len(cache.lengths), model.device
        with torch.inference_mode(False):  # outlive the caller's inference mode
            self.token = torch.zeros(rows, dtype=torch.long, device=device)  # input of the next step
            self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
            self.column = torch.zeros(1, dtype=torch.long, device=device)  # column of `tokens` for the next step
            self.tokens = torch.zeros(rows, CHUNK, dtype=torch.long, device=device)
            self.logprobs = torch.zeros(rows, CHUNK, device=device) if logprobs else None
        self.static = (
            cache.h2o.slimming == "H"
            and all(layer.by_kernel for layer in cache.layers)
            # the host updates length-dependent RoPE frequencies in each step (longrope: in transformers 5.17)
            and not any(name in model.model.rotary_emb.rope_type for name in ("dynamic", "longrope"))
            and is_replayable(model)
        )
        self._by_kernel = has_kernels(cache.h2o, device)
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._ran: set[str] = set()  # names run once, whose kernels are therefore compiled
        self._pool = None
        self._weights = _addresses(model)
        self._slots = [weakref.ref(layer.slots.positions) for layer in cache.layers]

    def is_current(self) -> bool:
        """Whether the model still has the modules and weights over which the graphs were recorded."""
        model = self._model()
        return model is not None and self._weights == _addresses(model)

    def has_slots_of(self, cache: HHCache) -> bool:
        """Whether the cache still has the slots over which the graphs were recorded."""
        slots = [layer.slots.positions for layer in cache.layers]
        return len(slots) == len(self._slots) and all(
            there() is now for there, now in zip(self._slots, slots, strict=True)
        )

    def start(self, tokens: torch.Tensor, rows: list[int] | None = None) -> None:
        """Set the next input tokens of all rows, or restart only the rows given."""
        at = slice(None) if rows is None else to_device(rows, self.token.device)
        self.finished[at] = self.ends(tokens)
        self.token[at] = tokens

    @torch.no_grad()
    def decode(self, steps: int, new: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run up to CHUNK steps without waiting for the device; returns tokens and log-probabilities [B, steps].

        `new` is 1 for rows that bring a token to these steps and 0 for rows fed padding (default: all 1).
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
        # not torch.isin, which sorts from ten tokens on and then waits for the device
        return (tokens[..., None] == self.eos_token_ids).any(dim=-1)

    def _next(self, new: list[int] | None) -> None:
        cache = self._cache()
        step = cache.begin(len(self.token), 1, new, static=True)
        name = "scored" if step.scored else "unscored"
        name += " partial" * step.partial + " with gaps" * any(step.rows.gaps)  # each needs a graph of its own
        self._play(name, self._step)
        if step.due:
            self._play("slimming", cache.slim_all)
        cache.end()

    def _step(self) -> None:
        """All device work of a step except slimming."""
        cache = self._cache()
        step = cache.step
        step.rows.count_step(step.partial)
        if cache.h2o.position_rolling:
            position_ids = torch.arange(cache.longest, device=self.token.device)[None]
        else:
            position_ids = step.positions(self.token.device)
        self._keep(decode_logits(self._model(), self.token[:, None], position_ids, cache))

    def _keep(self, logits: torch.Tensor) -> None:
        tokens = torch.where(self.finished, self.pad_token_id, self.choose(logits))
        if self.logprobs is not None:
            self.logprobs.index_copy_(1, self.column, token_logprobs(logits, tokens, self._by_kernel)[:, None])
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
            # thread_local: other threads may use the device during the capture (to pin memory, say)
            options = {"pool": self._pool, "stream": stream, "capture_error_mode": "thread_local"}
            with torch.cuda.device(device), torch.cuda.graph(graph, **options):
                run()
            # capture resets the generator's offset on that stream; wait, so that the replay sets it afterwards
            torch.cuda.current_stream(device).wait_stream(stream)
            self._pool = graph.pool()
            self._graphs[name] = graph
            graph.replay()


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """A capture stream on the model's device. torch's default is on the first device and would record nothing else."""
    return torch.cuda.Stream(device)


def _addresses(model) -> list[int]:
    """Identities of the model's modules and addresses of its tensors."""
    addresses = []
    for module in _modules(model):
        addresses.append(id(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                addresses += [plain.data_ptr() for plain in plain_tensors(tensor)]
    return addresses
