"""Summarise a jsonl of requests with Llama, with the heavy-hitter cache or with the full cache as the baseline.

    python run_summarization.py --input-path data/xsum.jsonl --output-path out/xsum.jsonl \\
        --model-name meta-llama/Meta-Llama-3-8B --enable_h2o_generation

Without arguments it runs the bundled model on the bundled requests. A flag of the cache that is not given takes
H2OConfig's value, so that editing h2optimizer/llama.py is enough.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import platform
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import torch
import transformers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from h2optimizer import H2OConfig, H2OLlamaForCausalLM
from h2optimizer.attention import ATTENTION_BACKENDS, resolve_backend
from utils.cache import HHCache
from utils.requests import (
    InputError,
    OneLineParser,
    Request,
    ResultsFile,
    checkpoint_fingerprint,
    fingerprint,
    read_requests,
)
from utils.rouge import ROUGE_TYPES, Rouge, mean_with_interval

DEMO_REQUESTS = Path(__file__).resolve().parent / "data/summarization/demo.jsonl"
DEMO_MODEL = Path(__file__).resolve().parent / "data/demo_model"

# The flags that are not called what their H2OConfig field is: the names that H2O's own scripts use.
FLAG_OF_FIELD = {
    "window_length": "num_window_length",
    "num_heavy_hitters": "num_heavy_hitter_tokens",
    "position_rolling": "enable_position_rolling",
}


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0 and {2**32 - 1}")
    return number


def count_or_all(text: str) -> int | None:
    return None if text == "all" else count(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--input-path", type=Path, default=DEMO_REQUESTS, help="requests, jsonl; the bundled ones unless given")
    add(
        "--output-path", type=Path, default=Path("out/summaries.jsonl"), help="results; metrics beside it (%(default)s)"
    )
    add("--model-name", default=str(DEMO_MODEL), help="a Llama checkpoint: a folder, or a name on the hub; or bundled")
    add("--sample_num", type=count, help="only so many requests, from the top of the file")
    add("--batch_size", type=count, default=1, help="requests decoded together; halved when memory runs out")
    add("--greedy", action="store_true", help="decode greedily whatever temperature, top_p and n the requests ask for")
    add("--seed", type=seed, default=42, help="seed of sampling")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: the checkpoint's; on a CPU float32",
    )
    add("--device", default="auto", help="cuda, cuda:1, cpu …; auto: cuda where there is one")
    add("--overwrite", action="store_true", help="start anew instead of going on with the results at --output-path")
    add("--skip_bad_requests", action="store_true", help="skip lines that are no requests, and count them")

    h2o = parser.add_argument_group("heavy-hitter cache", "a flag not given takes the value in h2optimizer/llama.py")
    add = h2o.add_argument
    add("--enable_h2o_generation", action="store_true", help="use it; without it, the full cache of stock Llama")
    add("--num_heavy_hitter_tokens", type=int, help="heavy hitters in the window; -1 = half of it, 0 = local attention")
    add("--num_window_length", type=int, help="slots kept: heavy hitters + recent")
    add("--enable_position_rolling", action=argparse.BooleanOptionalAction, help="rotate keys by slot index")
    add("--update_interval", type=int, help="slimming on every N-th step; 1 = H2O")
    add("--slimming", choices=("H", "mask"), help="H: gather into place; mask: boolean mask and copy")
    add("--backend", choices=("auto", *ATTENTION_BACKENDS), help="attention; auto: triton on CUDA, else sdpa")
    add("--score", choices=("mass", "sink", "random"), help="what slots are ranked by")
    add("--score_seed", type=seed, help="of --score random")
    add("--score_every_step", action=argparse.BooleanOptionalAction, help="mass on skipped steps as well")
    add("--score_decay", type=float, help="mass is multiplied by this before each addition")
    add("--score_norm", choices=("sum", "mean"), help="mean: mass per query that could see the slot")
    add("--score_queries", type=count_or_all, default=argparse.SUPPRESS, help="prefill mass from the last k, or all")
    add("--group_reduce", choices=("sum", "first"), help="mass over the query heads of a KV head")
    return parser.parse_args(argv)


def h2o_config(args: argparse.Namespace) -> H2OConfig | None:
    """H2OConfig with the flags that were given; None for the full-cache baseline. Raises InputError."""
    given = {}
    for field in dataclasses.fields(H2OConfig):
        flag = FLAG_OF_FIELD.get(field.name, field.name)
        if field.name == "score_queries":
            if hasattr(args, flag):
                given[field.name] = args.score_queries
        elif getattr(args, flag) is not None:
            given[field.name] = getattr(args, flag)
    if not args.enable_h2o_generation:
        if given:
            flag = FLAG_OF_FIELD.get(name := next(iter(given)), name)
            raise InputError(f"--{flag}: does nothing without --enable_h2o_generation; add that, or drop it")
        return None
    try:
        return H2OConfig(**given)
    except ValueError as error:
        raise InputError(in_flags(str(error))) from None


def in_flags(message: str) -> str:
    """What H2OConfig or its backend says, in the words of the command line."""
    for field, flag in FLAG_OF_FIELD.items():
        message = message.replace(field, flag)
    message = message.replace("score_every_step=False", "--no-score_every_step")
    message = re.sub(r"backend='(\w+)'", r"--backend \1", message)
    return message if message.startswith("--") else f"--{message}"


def select_device(name: str) -> torch.device:
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and (device.index or 0) >= (visible := torch.cuda.device_count()):
            raise InputError(f"--device {name}: {visible} CUDA devices are visible; pass --device cpu")
        torch.zeros(1, device=device).item()  # torch names devices that it cannot compute on here
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--device {name}: cannot be used ({reason}); pass cuda, cuda:1 or cpu") from None
    return device


def load_model(args: argparse.Namespace, h2o: H2OConfig | None, device: torch.device):
    """Model (eval mode) and left-padding tokenizer of a Llama checkpoint. Raises InputError."""
    name, on_gpu = args.model_name, device.type == "cuda"
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "llama":
            raise InputError(f"--model-name {name}: a {config.model_type} checkpoint; H2Optimizer runs Llama only")
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        kwargs = {
            "dtype": getattr(torch, args.dtype) if args.dtype != "auto" else "auto" if on_gpu else torch.float32,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,  # they are named below
        }
        if h2o is None:
            model, loading = LlamaForCausalLM.from_pretrained(name, **kwargs)
        else:
            model, loading = H2OLlamaForCausalLM.from_pretrained(name, h2o=h2o, **kwargs)
    except InputError:
        raise
    except Exception as error:  # a damaged checkpoint fails in any of four libraries
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--model-name {name}: cannot be loaded here or from the hub ({reason})") from None
    # transformers would fill these at random, and the summaries would be noise.
    if absent := sorted([*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]):
        raise InputError(f"--model-name {name}: {len(absent)} weights miss or have another shape, first {absent[0]}")
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= model.config.vocab_size:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    # Requests decide how to sample: nothing else of the checkpoint's generation defaults takes part.
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        return model.to(device).eval(), tokenizer
    except torch.OutOfMemoryError:
        raise InputError(f"--model-name {name}: does not fit into the memory of --device {device}") from None


@dataclasses.dataclass
class Prompt:
    """A request with its tokens."""

    request: Request
    tokens: list[int]


def plan_batches(prompts: list[Prompt], batch_size: int, greedy: bool) -> list[list[Prompt]]:
    """Batches of requests that sample alike, longest prompts first so that memory runs out early or not at all.

    One by one, requests keep their order.
    """
    if batch_size == 1:
        return [[prompt] for prompt in prompts]
    alike: dict[tuple, list[Prompt]] = {}
    for prompt in prompts:
        alike.setdefault(sampling(prompt.request, greedy), []).append(prompt)
    batches = []
    for group in alike.values():
        group.sort(key=lambda prompt: -len(prompt.tokens))
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return sorted(batches, key=lambda batch: -len(batch[0].tokens))


def sampling(request: Request, greedy: bool) -> tuple[float, float, int]:
    """(temperature, top_p, n) that a request is decoded with; (0, 1, 1) is greedy."""
    return (0.0, 1.0, 1) if greedy or request.temperature == 0 else (request.temperature, request.top_p, request.n)


class TokenLogprobs(LogitsProcessor):
    """Keeps the model's own log-probabilities of the step, before temperature and top-p."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.latest = scores.log_softmax(dim=-1)
        return scores


class RowWatch(StoppingCriteria):
    """Follows each row of a `generate`: its tokens, their log-probabilities, when and why it ends, its cache then."""

    def __init__(
        self, requests: list[Request], padding: list[int], eos: set[int], cache, logprobs: TokenLogprobs, tokenizer
    ):
        self.requests, self.padding, self.eos = requests, padding, eos
        self.cache, self.logprobs, self.tokenizer = cache, logprobs, tokenizer
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.token_logprobs: list[list[float]] = [[] for _ in requests]
        self.finish_reason: list[str | None] = [None] * len(requests)
        self.end_time = [0.0] * len(requests)
        self.cache_stats: list[dict] = [{} for _ in requests]
        self.first_token_time: float | None = None

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        latest = input_ids[:, -1:]
        chosen = torch.cat([latest.double(), self.logprobs.latest.gather(1, latest).double()], dim=1).tolist()
        now = time.perf_counter()  # `tolist` waited for the device
        self.first_token_time = self.first_token_time or now
        for row, (token, logprob) in enumerate(chosen):
            if self.finish_reason[row] is None:
                self.tokens[row].append(int(token))
                self.token_logprobs[row].append(logprob)
                if reason := self._reason_to_end(row):
                    self.finish_reason[row], self.end_time[row] = reason, now
                    self.cache_stats[row] = self._cache_stats(row)
        return torch.tensor([reason is not None for reason in self.finish_reason], device=input_ids.device)

    def _reason_to_end(self, row: int) -> str | None:
        request, tokens = self.requests[row], self.tokens[row]
        if tokens[-1] in self.eos:
            return "stop"
        if request.stop:
            # A stop string that has just appeared lies in the last tokens; UTF-8 takes at most 4 tokens a character.
            tail = tokens[-4 * max(map(len, request.stop)) - 4 :]
            if self._stops_in(tail, request.stop) and self._stops_in(tokens, request.stop):
                return "stop"
        return "length" if len(tokens) >= request.max_tokens else None

    def _stops_in(self, tokens: list[int], stops: tuple[str, ...]) -> bool:
        return first_stop(self.tokenizer.decode(tokens, skip_special_tokens=True), stops) is not None

    def _cache_stats(self, row: int) -> dict[str, int]:
        cache = self.cache
        if isinstance(cache, HHCache):
            seen, kept, evictions = cache.seen[row], cache.lengths[row], cache.evictions[row]
            nbytes = cache.nbytes // len(cache.lengths)
        else:
            seen = kept = cache.get_seq_length() - self.padding[row]
            evictions = 0
            nbytes = seen * sum(t[0, :, 0].nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        return {"tokens_seen": seen, "slots_kept": kept, "slimmings": evictions, "kv_bytes": nbytes}


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the earliest stop string begins in a text; None where there is none."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


class Summarizer:
    """Runs batches of requests through a model, halving them when memory runs out."""

    def __init__(self, model, tokenizer, args: argparse.Namespace):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.batch_limit = args.batch_size
        self.rouge = Rouge()
        self._cache: HHCache | None = None
        eos = model.generation_config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos]) - {None}

    def run(self, batch: list[Prompt]) -> Iterator[dict]:
        """Results of a batch, as result lines. Raises InputError when one request alone is too large."""
        if len(batch) > self.batch_limit:
            limit = self.batch_limit
            for i in range(0, len(batch), limit):
                yield from self.run(batch[i : i + limit])
            return
        results = None
        try:
            results = self._generate(batch)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
        if results is not None:
            yield from results
            return
        # Out of memory: handled here, where the traceback no longer holds the tensors.
        self._cache = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            prompt = batch[0]
            raise InputError(
                f"request {prompt.request.index} ({len(prompt.tokens)} tokens): does not fit into memory even "
                "alone; use a device with more or a smaller window, or leave it out (results so far are kept)"
            )
        self.batch_limit = (len(batch) + 1) // 2
        tqdm.write(f"out of memory with {len(batch)} requests: going on with {self.batch_limit}", file=sys.stderr)
        yield from self.run(batch)

    def _empty_cache(self):
        if not isinstance(self.model, H2OLlamaForCausalLM):
            return DynamicCache(config=self.model.config)
        if self._cache is None:
            self._cache = HHCache(self.model.h2o)
        self._cache.reset()  # its slots are used again, or made anew where the number of rows changes
        return self._cache

    @torch.inference_mode()
    def _generate(self, batch: list[Prompt]) -> list[dict]:
        temperature, top_p, choices = sampling(batch[0].request, self.args.greedy)
        requests = [prompt.request for prompt in batch for _ in range(choices)]
        encoded = self.tokenizer.pad({"input_ids": [prompt.tokens for prompt in batch]}, return_tensors="pt")
        encoded = {name: tensor.to(self.model.device) for name, tensor in encoded.items()}
        cache, logprobs = self._empty_cache(), TokenLogprobs()
        padding = [encoded["input_ids"].shape[1] - len(prompt.tokens) for prompt in batch for _ in range(choices)]
        watch = RowWatch(requests, padding, self.eos, cache, logprobs, self.tokenizer)
        torch.manual_seed(self.args.seed + batch[0].request.index)
        begin = time.perf_counter()
        self.model.generate(
            **encoded,
            past_key_values=cache,
            max_new_tokens=max(request.max_tokens for request in requests),
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_p=top_p if temperature else None,
            top_k=0 if temperature else None,
            num_return_sequences=choices,
            logits_processor=LogitsProcessorList([logprobs]),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        batch_time = time.perf_counter() - begin
        steps = max(map(len, watch.tokens))
        timing = {
            "batch_time": batch_time,
            "batch_size": len(batch),
            "time_to_first_token": watch.first_token_time - begin,
            "time_per_output_token": (max(watch.end_time) - watch.first_token_time) / max(steps - 1, 1),
        }
        return [
            self._result(prompt.request, watch, range(i * choices, (i + 1) * choices), timing)
            for i, prompt in enumerate(batch)
        ]

    def _result(self, request: Request, watch: RowWatch, rows: range, timing: dict) -> dict:
        choices = [self._choice(request, watch, row) for row in rows]
        longest = max(rows, key=lambda row: len(watch.tokens[row]))
        stats = watch.cache_stats[longest] | {"kv_bytes": sum(watch.cache_stats[row]["kv_bytes"] for row in rows)}
        return {
            "index": request.index,
            "request": request.fields,
            "result": {"choices": choices, "request_time": timing},
            "rouge": self.rouge.score(request.summary_gt, choices[0]["text"]),
            "cache": stats,
            "tokens_generated": sum(len(watch.tokens[row]) for row in rows),
            "peak_memory_bytes": peak_memory(self.model.device),
        }

    def _choice(self, request: Request, watch: RowWatch, row: int) -> dict:
        """Text up to the stop string or EOS, with the tokens that make it up."""
        tokens, reason = watch.tokens[row], watch.finish_reason[row]
        emitted = tokens[:-1] if tokens[-1] in self.eos else tokens
        text = self.tokenizer.decode(emitted, skip_special_tokens=True)
        stop_at = first_stop(text, request.stop)
        if stop_at is not None:
            text = text[:stop_at]
            while emitted and self.tokenizer.decode(emitted[:-1], skip_special_tokens=True).startswith(text):
                emitted = emitted[:-1]
        return {
            "text": text,
            "logprobs": {
                "tokens": self.tokenizer.convert_ids_to_tokens(emitted),
                "token_logprobs": [round(p, 6) for p in watch.token_logprobs[row][: len(emitted)]],
            },
            "finish_reason": reason,
        }


def peak_memory(device: torch.device) -> int:
    """Bytes at the process's peak so far: of the GPU, or without one of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summarize_metrics(results: list[dict], device: torch.device) -> dict:
    """What the metrics file says of all results, those of earlier, interrupted runs included. Times in seconds."""
    times = [result["result"]["request_time"] for result in results]
    seconds = sum(t["batch_time"] / t["batch_size"] for t in times)
    tokens = sum(result["tokens_generated"] for result in results)
    mean = {}
    for name in ("time_to_first_token", "time_per_output_token"):
        timed = [t[name] for t in times if t[name]] or [0.0]  # a single token has no time per token
        mean[name] = sum(timed) / len(timed)
    return {
        "rouge": {name: mean_with_interval([result["rouge"][name] for result in results]) for name in ROUGE_TYPES},
        "requests": len(results),
        "tokens_generated": tokens,
        **mean,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        "kv_bytes_per_request": sum(result["cache"]["kv_bytes"] for result in results) / len(results),
        "slots_kept_per_request": sum(result["cache"]["slots_kept"] for result in results) / len(results),
        "requests_evicted_from": sum(result["cache"]["slimmings"] > 0 for result in results),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }


def print_table(metrics: dict) -> None:
    for name in ROUGE_TYPES:
        score = metrics["rouge"][name]
        label = f"ROUGE-{name.removeprefix('rouge')}"
        print(f"{label:<22}{100 * score['mean']:8.2f}   [{100 * score['low']:.2f}, {100 * score['high']:.2f}]")
    print(f"{'requests':<22}{metrics['requests']:8d}   {metrics['requests_evicted_from']} with slots dropped")
    print(f"{'time to first token':<22}{1e3 * metrics['time_to_first_token']:8.1f} ms")
    print(f"{'time per token':<22}{1e3 * metrics['time_per_output_token']:8.1f} ms")
    print(f"{'throughput':<22}{metrics['tokens_per_second']:8.1f} tokens/s")
    print(f"{'KV cache':<22}{metrics['kv_bytes_per_request'] / 2**20:8.2f} MiB a request")
    print(f"{'peak memory':<22}{metrics['peak_memory_bytes'] / 2**30:8.2f} GiB")


def warn_of_long_prompts(prompts: list[Prompt], positions: int, rolling: bool) -> None:
    """Say once how many requests need more positions than the model was trained on."""
    # Rolling keeps decoding within the window's positions, but the prompt itself is still prefilled at its own.
    needs = [len(p.tokens) + (0 if rolling else p.request.max_tokens) for p in prompts]
    if too_long := sum(n > positions for n in needs):
        what = "prompts" if rolling else "prompts with their summaries"
        print(
            f"warning: {too_long} of {len(prompts)} {what} are longer than the model's {positions} positions "
            f"(the longest needs {max(needs)}); expect poor text there",
            file=sys.stderr,
        )


def run(args: argparse.Namespace) -> int:
    h2o = h2o_config(args)
    device = select_device(args.device)
    try:
        backend = None if h2o is None else resolve_backend(h2o.backend, device.type)
    except ValueError as error:
        raise InputError(in_flags(str(error))) from None
    requests, skipped = read_requests(args.input_path, args.skip_bad_requests, args.sample_num)
    if skipped:
        print(f"warning: {skipped} bad lines of {args.input_path} skipped", file=sys.stderr)
    settings = {
        "--model-name": args.model_name,
        "--sample_num": args.sample_num,
        "--input-path": f"sha256 {fingerprint(requests)[:16]}",
        "--greedy": args.greedy,
        "--seed": args.seed,
        "--dtype": args.dtype,
        "--enable_h2o_generation": args.enable_h2o_generation,
    }
    if weights := checkpoint_fingerprint(Path(args.model_name)):
        settings["what --model-name holds"] = f"sha256 {weights[:16]}"
    if h2o is not None:
        for name, value in dataclasses.asdict(h2o).items():
            settings[f"--{FLAG_OF_FIELD.get(name, name)}"] = value
    output = ResultsFile(args.output_path, settings, args.overwrite, source=args.input_path)

    todo = [request for request in requests if request.index not in output.results]
    if output.results:
        print(f"{len(output.results)} of {len(requests)} results are there already", file=sys.stderr)
    if todo:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        huggingface_hub.logging.set_verbosity_error()
        model, tokenizer = load_model(args, h2o, device)
        encoded = tokenizer([request.article for request in requests])["input_ids"]
        prompts = [Prompt(request, tokens) for request, tokens in zip(requests, encoded, strict=True)]
        known, largest = model.config.vocab_size, max(max(tokens, default=0) for tokens in encoded)
        if largest >= known:
            raise InputError(
                f"--model-name {args.model_name}: its tokenizer makes token {largest}, the model knows {known} tokens; "
                "they do not belong together"
            )
        rolling = h2o is not None and h2o.position_rolling
        warn_of_long_prompts(prompts, model.config.max_position_embeddings, rolling)
        # Batches are those of an uninterrupted run, so that a resumed one samples the same.
        batches = plan_batches(prompts, args.batch_size, args.greedy)
        output.start()
        summarize(Summarizer(model, tokenizer, args), batches, output, len(requests))
    if todo or not output.metrics:
        metrics = summarize_metrics([output.results[request.index] for request in requests], device)
        metrics |= {"input_path": str(args.input_path), "skipped_lines": skipped, "batch_size": args.batch_size}
        metrics["attention_backend"] = backend
        output.finish(metrics)
    print_table(output.metrics)
    return 0


def summarize(summarizer: Summarizer, batches: list[list[Prompt]], output: ResultsFile, total: int) -> None:
    """Run the batches, writing each result as soon as it is there."""
    rouge2 = [result["rouge"]["rouge2"] for result in output.results.values()]
    tokens, begin = 0, time.perf_counter()
    with tqdm(total=total, initial=len(rouge2), unit="req", dynamic_ncols=True) as bar:
        for batch in batches:
            if all(prompt.request.index in output.results for prompt in batch):
                continue
            # A batch that was interrupted runs again whole: what a row samples depends on the rows beside it.
            for result in summarizer.run(batch):
                tokens += result["tokens_generated"]
                if result["index"] not in output.results:
                    output.append(result)
                    rouge2.append(result["rouge"]["rouge2"])
                    bar.update()
            speed = tokens / (time.perf_counter() - begin)
            bar.set_postfix_str(f"ROUGE-2 {100 * sum(rouge2) / len(rouge2):.2f}, {speed:.0f} tokens/s")


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        return run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: results so far are in {args.output_path}; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
