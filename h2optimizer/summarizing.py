"""Running requests through a model, many at once: prompts, jobs, one result line each, and metrics over all."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import transformers

from h2optimizer.batching import Batcher, Sequence, devices_of, rows_that_fit
from h2optimizer.decoding import decoding_of
from h2optimizer.llama import H2OConfig
from h2optimizer.loading import device_name, eos_tokens, must_know, render_chat, unusable
from h2optimizer.sharing import deal, most_snapshot_bytes, snapshot_bytes
from h2optimizer.texts import Stops, one_bos
from h2optimizer.utils import cli
from h2optimizer.utils.cli import InputError
from h2optimizer.utils.memory import half, halving, peak_memory
from h2optimizer.utils.processes import Processes
from h2optimizer.utils.requests import Request
from h2optimizer.utils.rouge import ROUGE_TYPES, Rouge, mean_with_interval


@dataclass
class Prompt:
    """A request with its tokens."""

    request: Request
    tokens: list[int]


def tokenize(requests: list[Request], tokenizer, model, model_name: str, chat: bool = False) -> list[Prompt]:
    """Requests with their tokens. Raises InputError if tokenizer and model do not belong together."""
    articles = [request.article for request in requests]
    texts = [render_chat(tokenizer, [article], model_name) for article in articles] if chat else articles
    try:
        encoded = tokenizer(texts, add_special_tokens=not chat)["input_ids"]  # a template adds its own BOS
    except Exception as error:  # an incomplete tokenizer, or a library's own error for invalid text
        raise unusable(model_name, error, "its tokenizer fails") from None
    if not chat:
        encoded = [one_bos(of, tokenizer) for of in encoded]
    must_know(model, model_name, max(max(tokens, default=0) for tokens in encoded))
    for request, tokens in zip(requests, encoded, strict=True):
        if not tokens:
            raise InputError(f"request {request.index}: its article has no tokens in the tokenizer of {model_name}")
    return [Prompt(request, tokens) for request, tokens in zip(requests, encoded, strict=True)]


def warn_of_long_prompts(prompts: list[Prompt], positions: int, h2o: H2OConfig | None) -> None:
    """Warn once if requests need more positions than the model was trained on, with their number."""
    rolling = h2o is not None and h2o.position_rolling
    # Rolling keeps decode within the window's positions, but prefill still uses those of the prompt or chunk.
    needs = [len(p.tokens) + (0 if rolling else p.request.max_tokens) for p in prompts]
    if rolling and h2o.prefill_chunk is not None:
        needs = [min(n, h2o.window_length + h2o.prefill_chunk) for n in needs]
    if too_long := sum(n > positions for n in needs):
        what = "prompts" if rolling else "prompts with their summaries"
        way_out = "; --prefill_chunk keeps them within window and chunk" if rolling else ""
        cli.say(
            f"warning: {too_long} of {len(prompts)} {what} are longer than the model's {positions} positions "
            f"(the longest needs {max(needs)}); expect poor text there{way_out}"
        )


def decoding_order(prompts: list[Prompt], batch_size: int | str, processes: Processes | None = None) -> list[Prompt]:
    """The order of decoding: longest prompts first, so that similar lengths run together and memory runs out early.

    At batch size 1, requests keep their order. Several processes deal them out longest first, for similar shares, and
    those that share a beginning to one process.
    """
    shares = processes.shares if processes else 1
    if batch_size == 1 and shares == 1:
        return prompts
    prompts = sorted(prompts, key=lambda prompt: -len(prompt.tokens))
    if shares == 1:
        return prompts
    return [prompts[i] for i in deal([prompt.tokens for prompt in prompts], shares)[processes.rank]]


def sampling(request: Request, greedy: bool) -> tuple[float, float, int]:
    """(temperature, top_p, sequences) of a request; (0, 1, 1) is greedy, because greedy choices are all equal."""
    return (0.0, 1.0, 1) if greedy or request.temperature == 0 else (request.temperature, request.top_p, request.n)


@dataclass
class Job:
    """A request in progress: one sequence per choice, or a single one if all choices are equal."""

    prompt: Prompt
    sequences: list[Sequence]

    @property
    def has_ended(self) -> bool:
        return all(sequence.finish_reason for sequence in self.sequences)


def left_of(jobs: list[Job]) -> int:
    """Number of sequences that have not ended."""
    return sum(not sequence.finish_reason for job in jobs for sequence in job.sequences)


class Summarizer:
    """Runs requests through a model, many at once, and fewer when memory runs out.

    Args:
        model: an H2OForCausalLM, or its stock model.
        rows: sequences decoded together, or "auto": as many as fit into free memory.
        greedy: ignore the requests' temperature, top_p and n.
        seed: of sampling.
        processes: those of this run; each may hold a shard of the model.
        share_prefixes: compute beginnings that several prompts share once, where the results are the same.
    """

    def __init__(
        self,
        model,
        tokenizer,
        rows: int | str,
        greedy: bool = False,
        seed: int = 0,
        processes: Processes | None = None,
        share_prefixes: bool = True,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.rows, self.greedy, self.seed = rows, greedy, seed
        self.processes = processes or Processes()
        self.share_prefixes = share_prefixes
        self.rouge = Rouge()
        self._stops: dict[tuple[str, ...], Stops] = {}
        self.eos = eos_tokens(model)

    def run(self, prompts: list[Prompt]) -> Iterator[dict]:
        """Result lines, in order of completion. Raises InputError if a request is too large even alone."""
        latest = time.perf_counter()
        for job in self.decode(prompts):
            now = time.perf_counter()
            yield self._result(job, wall_time=(now - latest) / self.processes.shares)
            latest = now

    def decode(self, prompts: list[Prompt]) -> Iterator[Job]:
        """Finished jobs, in order of completion. Raises InputError if a request is too large even alone."""
        if not prompts:
            return
        jobs = [self._job(prompt) for prompt in prompts]
        self._snapshots = self._most_snapshot_bytes()
        rows = self._rows_that_fit(prompts) if self.rows == "auto" else self.rows
        yield from halving(partial(self._ended, jobs), min(rows, left_of(jobs)), partial(self._fewer, jobs))

    def _most_snapshot_bytes(self) -> int:
        """Bytes that snapshots of shared beginnings may take, equal for all parts of a model; 0 shares nothing."""
        most = most_snapshot_bytes(self.model) if self.share_prefixes else 0
        return min(self.processes.gather(most)) if self.processes.splits > 1 else most

    def _bytes_beside(self, prompts: list[list[int]], rows: int) -> int:
        """Bytes that snapshots for these prompts take at any time."""
        return snapshot_bytes(decoding_of(self.model), prompts, rows, self._snapshots)

    def _job(self, prompt: Prompt) -> Job:
        choices = sampling(prompt.request, self.greedy)[2]
        return Job(prompt, [self._sequence(prompt, choice) for choice in range(choices)])

    def _rows_that_fit(self, prompts: list[Prompt]) -> int:
        """How many sequences fit into free memory on every process. Raises InputError if not even one does."""
        tokens = [prompt.tokens for prompt in prompts]
        longest, most = max(map(len, tokens)), max(prompt.request.max_tokens for prompt in prompts)
        try:
            beside = self._bytes_beside(tokens, len(tokens))
            rows = rows_that_fit(self.model, longest, most, beside)
        except torch.OutOfMemoryError:  # the other processes may have enough and be waiting
            raise InputError(
                f"process {self.processes.rank}: out of memory with the longest prompt ({longest} tokens) alone; "
                "start more processes, or pass --prefill_chunk"
            ) from None
        if self.processes.splits > 1:
            rows = min(self.processes.gather(rows))
        self.processes.say(f"--batch_size auto: up to {rows} sequences at once")
        return rows

    def _fewer(self, jobs: list[Job], rows: int) -> int:
        """Restart unfinished sequences; returns half as many rows. Raises InputError if it cannot continue."""
        jobs = [job for job in jobs if not job.has_ended]
        if self.processes.splits > 1:  # the other processes are in the middle of a step
            raise InputError(
                f"process {self.processes.rank}: out of memory with {rows} sequences; pass a smaller --batch_size "
                "to resume (results so far are kept)"
            )
        how = f"with {half(rows)}"
        if rows == 1 and self._bytes_beside([job.prompt.tokens for job in jobs for _ in job.sequences], rows):
            self._snapshots, how = 0, "without shared prefixes"
        elif rows == 1:
            prompt = jobs[0].prompt
            raise InputError(
                f"request {prompt.request.index} ({len(prompt.tokens)} tokens): does not fit into memory even "
                "alone; use a larger device, a smaller window, or leave the request out (results so far are kept)"
            )
        for job in jobs:  # restarted sequences produce the same tokens again
            for choice, sequence in enumerate(job.sequences):
                if not sequence.finish_reason:
                    job.sequences[choice] = self._sequence(job.prompt, choice)
        self.processes.say(f"out of memory with {rows} sequences: continuing {how}")
        return min(half(rows), left_of(jobs))

    def _sequence(self, prompt: Prompt, choice: int) -> Sequence:
        request = prompt.request
        temperature, top_p, _ = sampling(request, self.greedy)
        return Sequence(
            prompt=prompt.tokens,
            max_tokens=request.max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=(self.seed, request.index, choice),
            has_ended=self._stops_of(request).said if request.stop else None,
        )

    def _stops_of(self, request: Request) -> Stops:
        if request.stop not in self._stops:
            self._stops[request.stop] = Stops(self.tokenizer, request.stop)
        return self._stops[request.stop]

    def _ended(self, jobs: list[Job], rows: int) -> Iterator[Job]:
        """Each job when the last of its sequences has ended."""
        todo = [(sequence, job) for job in jobs for sequence in job.sequences if not sequence.finish_reason]
        job_of = {id(sequence): job for sequence, job in todo}
        left = Counter(id(job) for _, job in todo)  # sequences not yielded yet; several may end in one step
        sampled = [sequence for sequence, _ in todo if sequence.temperature > 0]
        nucleus = any(sequence.top_p < 1 for sequence in sampled)
        agree = self.processes.agree_on if self.processes.splits > 1 else None
        pad = self.tokenizer.pad_token_id
        batcher = Batcher(self.model, rows, self.eos, pad, bool(sampled), nucleus, agree, self._snapshots)
        for sequence in batcher.run(sequence for sequence, _ in todo):
            job = job_of[id(sequence)]
            left[id(job)] -= 1
            if sequence.finish_reason == "nan":
                raise InputError(
                    f"request {job.prompt.request.index}: the model's logits are NaN after {len(sequence.tokens) - 1} "
                    f"tokens in {str(self.model.dtype).removeprefix('torch.')}; pass another --dtype, or leave the "
                    "request out (results so far are kept)"
                )
            if not left[id(job)]:
                yield job

    def _result(self, job: Job, wall_time: float) -> dict:
        request, longest = job.prompt.request, max(job.sequences, key=lambda sequence: len(sequence.tokens))
        choices = [self.choice(request, sequence) for sequence in job.sequences]
        if request.temperature == 0 and not self.greedy:
            choices *= request.n
        decoding = longest.seconds - longest.seconds_to_first_token
        kv_bytes = sum(sequence.cache["kv_bytes"] for sequence in job.sequences)
        computed = sum(sequence.prompt_computed for sequence in job.sequences)
        timing = {
            "latency": longest.seconds,
            "time_to_first_token": longest.seconds_to_first_token,
            "time_per_output_token": decoding / (len(longest.tokens) - 1) if len(longest.tokens) > 1 else None,
            "decode_time": sum(sequence.decode_seconds for sequence in job.sequences) / self.processes.shares,
            "wall_time": wall_time,
            "batch_size": longest.rows,
            "prompt_tokens_computed": computed,
            "prompt_tokens_shared": len(job.sequences) * len(job.prompt.tokens) - computed,
        }
        return {
            "index": request.index,
            "request": request.fields,
            "result": {"choices": choices, "request_time": timing},
            "rouge": self.rouge.score(request.summary_gt, choices[0]["text"]),
            "cache": longest.cache | {"kv_bytes": kv_bytes * self.processes.splits},  # each process has as many heads
            "sequences": len(job.sequences),
            "tokens_generated": sum(len(sequence.tokens) for sequence in job.sequences),
            "tokens_emitted": sum(len(choice["logprobs"]["tokens"]) for choice in choices),
            "peak_memory_bytes": self._peak_memory(),
        }

    def _peak_memory(self) -> int:
        """Bytes at the peak, summed over all devices that hold the model."""
        peak = sum(map(peak_memory, devices_of(self.model)))
        return sum(self.processes.gather(peak)) if self.processes.splits > 1 else peak

    def choice(self, request: Request, sequence: Sequence) -> dict:
        """Text up to the stop string or EOS, with the tokens that make it up."""
        tokens = sequence.tokens
        emitted = tokens[:-1] if tokens[-1] in self.eos else tokens
        text = self.tokenizer.decode(emitted, skip_special_tokens=True)
        stop = self._stops_of(request).first(tokens) if request.stop else None
        if stop is not None and stop[1] <= len(emitted):
            text, emitted = stop[0], emitted[: stop[1]]
        return {
            "text": text,
            "logprobs": {
                "tokens": self.tokenizer.convert_ids_to_tokens(emitted),
                "token_logprobs": [round(p, 6) for p in sequence.logprobs[: len(emitted)]],
            },
            "finish_reason": sequence.finish_reason,
        }


def check_result(result: dict, requests: list[Request]) -> None:
    """Raises ValueError, with the reason, for a line that is not the result of one of these requests."""
    index = result["index"]
    if type(index) is not int or not 0 <= index < len(requests):
        raise ValueError(f"its index is {index!r}; the requests are 0 to {len(requests) - 1}")
    if result.get("request") != requests[index].fields:
        raise ValueError(f"its request is not request {index}")
    try:
        timing, decoded = result["result"]["request_time"], timed_alone(result)
        numbers = [result["rouge"][name] for name in ROUGE_TYPES]
        numbers += [result["cache"][name] for name in ("kv_bytes", "slots_kept", "slimmings")]
        numbers += [result[name] for name in ("sequences", "tokens_generated", "tokens_emitted", "peak_memory_bytes")]
        names = "time_to_first_token", "decode_time", "wall_time", "prompt_tokens_computed", "prompt_tokens_shared"
        numbers += [timing[name] for name in names] + decoded
        whole = all(isinstance(number, int | float) for number in numbers)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError("it is incomplete")


def timed_alone(result: dict) -> list[float]:
    """[time per token after the first], or [] if there was only one token."""
    each = result["result"]["request_time"]["time_per_output_token"]
    return [] if each is None else [each]


def decode_speed(results: Iterable[dict]) -> float | None:
    """Decode tokens per second over all sequences together; None without any. First tokens come from prefill."""
    tokens = seconds = 0
    for result in results:
        tokens += result["tokens_generated"] - result["sequences"]
        seconds += result["result"]["request_time"]["decode_time"]
    return tokens / seconds if tokens and seconds else None


def metrics_of(results: list[dict], device: torch.device, idle: float = 0.0) -> dict:
    """The metrics over all results, including those of earlier, interrupted runs. Times are in seconds.

    Decode speed covers all sequences together, without prefill: their tokens except the first, over the time of the
    steps. `tokens_per_second` includes prefill's time and tokens. Speeds are None if no token was decoded.

    Args: idle: seconds that processes waited for the slowest, on average.
    """
    times = [result["result"]["request_time"] for result in results]
    seconds = sum(t["wall_time"] for t in times) + idle
    tokens = sum(result["tokens_generated"] for result in results)
    mean = {"time_to_first_token": sum(t["time_to_first_token"] for t in times) / len(times)}
    timed = [each for result in results for each in timed_alone(result)]  # a single token has no time per token
    mean["time_per_output_token"] = sum(timed) / len(timed) if timed else None
    return {
        "rouge_unit": "F-measure from 0 to 1",
        "rouge": {name: mean_with_interval([result["rouge"][name] for result in results]) for name in ROUGE_TYPES},
        "requests": len(results),
        "prompt_tokens_computed": sum(t["prompt_tokens_computed"] for t in times),
        "prompt_tokens_shared": sum(t["prompt_tokens_shared"] for t in times),
        "tokens_generated": tokens,
        "tokens_emitted": sum(result["tokens_emitted"] for result in results),
        **mean,
        "decode_tokens_per_second": decode_speed(results),
        "requests_per_second": len(results) / seconds,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        "peak_memory_of": "GPU" if device.type == "cuda" else "process",
        "kv_bytes_per_request": sum(result["cache"]["kv_bytes"] for result in results) / len(results),
        "slots_kept_per_request": sum(result["cache"]["slots_kept"] for result in results) / len(results),
        "requests_evicted_from": sum(result["cache"]["slimmings"] > 0 for result in results),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": device_name(device),
    }
