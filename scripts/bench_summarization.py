"""Benchmark requests per second: a batcher over heavy-hitter rows against the stock model, one by one and in batches.

Regime: prompts of random tokens, a Llama-3-8B shape with random bf16 weights, greedy; every request generates all its
tokens. The stock model runs a sample: the first --stock_requests one by one, and the first four batches, sorted by
length to avoid padding. Ours runs all requests in their order. `all_s` is the time for all requests at a system's rate.
Compiling and recording happen before the clock starts, and are printed as `setup_s`. Rates count all rows together:
`tokens_per_s` includes the time of prefill; `decode_per_s` excludes it and each text's first token. `prefill_share` is
the share of the time that the device spends in forwards of more than one token per row. The last line is JSON;
requests_per_s_x is the ratio to one by one.

Several workloads run in one process: give --prompt_tokens and --shared_tokens as lists. With --shared_tokens S, the
first S of a prompt's --prompt_tokens are the same in all prompts.

`prefill_ms` is the time of one forward of the size that a system prefilled most, `prefill` (rows x tokens);
`products_ms` is that of its matrix products alone, in order, with the same weights and the activations of the first of
each size. Both are medians of turns. With --quantize, the batcher runs once more, with float8 weights and products.

With --soak, requests of mixed lengths, a third of them sampled, go through the batcher. Each must come back once with
as many tokens as it asked for, and memory must not grow; otherwise the exit status is 1.
"""

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import torch
from transformers import PreTrainedModel

from h2optimizer import H2OConfig, H2OModelForCausalLM, batching
from h2optimizer.batching import Batcher, Clock, Sequence
from h2optimizer.decoding import decoding_of
from h2optimizer.loading import quantization
from h2optimizer.utils.bench import (
    SHAPES,
    MatrixProducts,
    attempt,
    device_report,
    device_us,
    host_us,
    make_models,
    print_row,
    print_table,
    synchronize,
)
from h2optimizer.utils.cache import CACHE_ARGUMENT
from h2optimizer.utils.cli import OneLineParser, count, count_or_auto, count_or_zero, counts, counts_or_zeros
from h2optimizer.utils.memory import allocated, free_memory, peak_allocated
from h2optimizer.utils.results import to_json

SAMPLED_BATCHES = 4  # batches that the stock model runs
SHORTEST = 16  # tokens of the shortest prompt in a soak, and of most prompts in a warm-up
WHOLE = 64  # prompts that a warm-up does not cut, so that the largest prefill runs once
ONE_BY_ONE = "stock, one by one"


class PrefillTimer:
    """Sums the device time of a model's forwards of several tokens per row, without waiting for the device.

    `sizes` counts these forwards by rows and tokens per row.
    """

    def __init__(self, model: PreTrainedModel):
        self.clock, self.moments, self.sizes = Clock(model.device), [], Counter()
        self.hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True),
        ]

    def stop(self) -> float:
        """Seconds of prefill so far."""
        for hook in self.hooks:
            hook.remove()
        synchronize()
        return sum(self.clock.seconds(begin, end) for begin, end in self.moments)

    def _begin(self, model, args, kwargs) -> None:
        self.begin = self.clock.now()

    def _end(self, model, args, kwargs, output) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        if ids.shape[1] > 1:
            self.moments.append((self.begin, self.clock.now()))
            self.sizes[tuple(ids.shape)] += 1


# Requests


class Workload(NamedTuple):
    prompt_tokens: int  # of the longest prompt
    shared_tokens: int  # of them, the first ones, which all prompts share


def make_requests(args, work: Workload, soak: bool = False) -> list[Sequence]:
    """Random prompts, always the same; a soak has all lengths, and samples a third of them."""
    chance, vocabulary = random.Random(0), SHAPES[args.shape]["vocab_size"]
    of_all = random.Random(1)
    shared = [of_all.randrange(1, vocabulary) for _ in range(work.shared_tokens)]
    requests = []
    for i in range(args.requests):
        length, tokens, sampling = work.prompt_tokens, args.new_tokens, {}
        if soak:
            length, tokens = chance.randint(min(SHORTEST, length), length), chance.randint(1, tokens)
            sampling = {"temperature": 0.8, "top_p": 0.9, "seed": (i,)} if i % 3 == 0 else {}
        elif args.mixed:
            length = chance.randint(max(1, length // 2), length)
        own = [chance.randrange(1, vocabulary) for _ in range(length - len(shared))]
        requests.append(Sequence(shared[:length] + own, tokens, **sampling))
    return requests


def again(requests: list[Sequence]) -> list[Sequence]:
    """Fresh copies of the requests, without answers."""
    return [Sequence(r.prompt, r.max_tokens, r.temperature, r.top_p, r.seed) for r in requests]


# Systems


@torch.no_grad()
def stock_generate(stock, requests: list[Sequence]) -> None:
    """One left-padded batch through the stock model, run until the longest request ends."""
    columns = max(len(request.prompt) for request in requests)
    pads = [columns - len(request.prompt) for request in requests]
    ids = torch.tensor([[0] * pad + r.prompt for pad, r in zip(pads, requests, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (columns - pad) for pad in pads])
    tokens = max(request.max_tokens for request in requests)
    ids, mask = ids.to(stock.device), mask.to(stock.device)
    stock.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0).cpu()


def measure_stock(stock, requests: list[Sequence], batch: int) -> dict[str, float]:
    requests = sorted(requests, key=lambda request: -len(request.prompt))
    batches = [requests[begin : begin + batch] for begin in range(0, len(requests), batch)]
    setup_s = seconds(lambda: stock_generate(stock, batches[0]))
    return {"rows": batch, "setup_s": setup_s} | figures(
        stock, requests, lambda: [stock_generate(stock, batch) for batch in batches]
    )


def measure_batcher(args, model, requests: list[Sequence]) -> dict[str, float]:
    """All requests through a `Batcher` that has been warmed up on some of them."""
    batcher, rows = make_batcher(args, model, requests)
    some = again(requests[:rows])  # as many as rows, because steps of fewer are recorded apart
    for sequence in some[WHOLE:]:
        sequence.prompt = sequence.prompt[:SHORTEST]
    setup_s = seconds(lambda: list(batcher.run(some)))
    done = []
    result = figures(model, requests, lambda: done.extend(batcher.run(again(requests))))
    if len(done) != len(requests) or any(len(sequence.tokens) != args.new_tokens for sequence in done):
        raise RuntimeError("the batcher lost requests or tokens: see --soak")
    return {"rows": rows, "setup_s": setup_s} | result


def make_batcher(args, model, requests: list[Sequence]) -> tuple[Batcher, int]:
    """A batcher for these requests, and its number of rows."""
    model.h2o = H2OConfig(window_length=args.window_length, update_interval=args.update_interval)
    rows = args.batch_size
    if rows == "auto":
        longest, tokens = max(len(r.prompt) for r in requests), max(r.max_tokens for r in requests)
        rows = batching.rows_that_fit(model, longest, tokens)
    rows = min(rows, len(requests))
    sampling, nucleus = any(r.temperature > 0 for r in requests), any(r.top_p < 1 for r in requests)
    return Batcher(model, rows, set(), 0, sampling=sampling, nucleus=nucleus), rows


def seconds(run) -> float:
    return host_us(run) / 1e6


def figures(model, requests: list[Sequence], run) -> dict[str, float]:
    """Rates, peak memory and prefill's share of the time of `run`, which answers these requests."""
    timer, elapsed = PrefillTimer(model), []
    try:
        peak = peak_allocated(lambda: elapsed.append(seconds(run)))
    finally:
        prefill_s = timer.stop()
    decoded = sum(request.max_tokens - 1 for request in requests)
    return {
        "requests": len(requests),
        "seconds": elapsed[0],
        "requests_per_s": len(requests) / elapsed[0],
        "tokens_per_s": sum(request.max_tokens for request in requests) / elapsed[0],
        "decode_per_s": decoded / (elapsed[0] - prefill_s) if decoded else None,
        "prefill_share": prefill_s / elapsed[0],
        "peak_GiB": peak / 2**30,
        "prefill": timer.sizes.most_common(1)[0][0],
    }


def systems_of(args, model, stock, requests: list[Sequence]) -> dict[str, tuple]:
    """Name of each system with unquantised weights -> its model, and how to measure it."""
    systems, batch = {}, args.stock_batch
    if args.stock_requests:
        systems[ONE_BY_ONE] = stock, partial(measure_stock, stock, requests[: args.stock_requests], 1)
    if batch:
        sample = requests[: SAMPLED_BATCHES * batch]
        systems[f"stock, batches of {batch}"] = stock, partial(measure_stock, stock, sample, batch)
    systems["H2O batcher"] = model, partial(measure_batcher, args, model, requests)
    return systems


def measure(args, work: Workload, systems: dict[str, tuple], requests: int, baseline: float | None) -> Iterator[dict]:
    """Yield one result per system as soon as it is measured. `baseline`: requests/s one by one, if known."""
    for name, (model, run) in systems.items():
        result = attempt(name, run)
        free_memory()
        if result is None:
            continue
        size = result.pop("prefill")
        products = attempt(f"products of {name}", beside_products, args, model, size)
        free_memory()
        if name == ONE_BY_ONE:
            baseline = result["requests_per_s"]
        if baseline is not None:
            result["requests_per_s_x"] = result["requests_per_s"] / baseline
        result |= {"all_s": requests / result["requests_per_s"], "prefill": "x".join(map(str, size))}
        yield {"system": name} | work._asdict() | result | (products or {})


@torch.inference_mode()
def beside_products(args, model, size: tuple[int, int]) -> dict[str, float]:
    """The time of a prefill of rows x tokens, and of its matrix products alone, in turns."""
    generator = torch.Generator(model.device).manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, size, device=model.device, generator=generator)
    decoding = decoding_of(model)

    def prefill():
        model(ids, logits_to_keep=1, **{CACHE_ARGUMENT: decoding.new_cache()})

    prefill()
    with (products := MatrixProducts()):
        prefill()
    products.run()
    times = [(device_us(prefill), device_us(products.run)) for _ in range(args.repeats)]
    prefill_ms, products_ms = (statistics.median(each) / 1e3 for each in zip(*times, strict=True))
    return {"prefill_ms": prefill_ms, "products_ms": products_ms, "prefill_x_products": prefill_ms / products_ms}


def quantize(args, model) -> None:
    """Turn the weights of the model's layers into float8, in place. Raises InputError where that cannot be."""
    from torchao.quantization import quantize_

    quantize_(model.model, float8_config(args, model))
    model.merge_projections()  # lets go of the merged bf16 weights


def float8_config(args, model):
    options = quantization(args.quantize, model.config, model.device, "bfloat16")
    return options["quantization_config"].quant_type


# Soak


def memory_bytes() -> int:
    """Bytes of tensors on the GPU; without a GPU, bytes held by the process (Linux)."""
    if torch.cuda.is_available():
        return allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def soak(args, model) -> dict:
    """Run many mixed requests through one batcher: wrong results, and memory after each tenth of the requests."""
    requests = make_requests(args, args.work[0], soak=True)
    batcher, rows = make_batcher(args, model, requests)
    returned, memory, begin = Counter(), [], time.perf_counter()
    for done, sequence in enumerate(batcher.run(requests), start=1):
        returned[id(sequence)] += 1
        if done * 10 // len(requests) > (done - 1) * 10 // len(requests):
            memory.append(memory_bytes() / 2**20)
            print(f"{done} done  {time.perf_counter() - begin:.1f} s  {memory[-1]:.1f} MiB", flush=True)
    wrong = []
    for i, request in enumerate(requests):
        if returned[id(request)] != 1:
            wrong.append(f"request {i} came back {returned[id(request)]} times")
        elif len(request.tokens) != request.max_tokens or request.finish_reason != "length":
            wrong.append(f"request {i} has {len(request.tokens)} of {request.max_tokens} tokens")
        elif not all(0 <= token < model.config.vocab_size for token in request.tokens):
            wrong.append(f"request {i} has tokens that do not exist")
    growth = memory[-1] - memory[1] if len(memory) > 1 else 0.0
    print(f"memory grew by {growth:.1f} MiB from the 2nd to the last tenth; {len(wrong)} requests are wrong")
    return {
        "requests": len(requests),
        "rows": rows,
        "seconds": round(time.perf_counter() - begin, 1),
        "tokens": sum(len(request.tokens) for request in requests),
        "memory_MiB": [round(number, 1) for number in memory],
        "growth_MiB": round(growth, 1),
        "wrong": wrong,
    }


# The script


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="model shape (default: %(default)s)")
    parser.add_argument(
        "--window_length", type=count, default=1024, help="slots kept after slimming (default: %(default)s)"
    )
    parser.add_argument(
        "--update_interval", type=count, default=16, help="steps from one slimming to the next (default: %(default)s)"
    )
    parser.add_argument("--requests", type=count, help="number of requests (default: 512; with --soak 2000)")
    parser.add_argument(
        "--prompt_tokens",
        type=counts,
        default="2048",
        help="tokens of the longest prompt; comma-separated: of one workload after the other (default: %(default)s)",
    )
    parser.add_argument(
        "--shared_tokens",
        type=counts_or_zeros,
        default="0",
        help="how many of a prompt's tokens, the first ones, are the same in all prompts; comma-separated: a number "
        "for each of --prompt_tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--new_tokens",
        type=count,
        default=64,
        help="tokens to generate; with --soak, at most so many (default: %(default)s)",
    )
    parser.add_argument(
        "--mixed", action="store_true", help="vary prompts from half to full length (default: all of full length)"
    )
    parser.add_argument(
        "--batch_size",
        type=count_or_auto,
        default="auto",
        help="requests decoded together; auto: as many as memory holds (default: %(default)s)",
    )
    parser.add_argument(
        "--stock_requests",
        type=count_or_zero,
        default=16,
        help="requests that the stock model runs one by one; 0: skip (default: %(default)s)",
    )
    parser.add_argument(
        "--stock_batch",
        type=count_or_zero,
        default=16,
        help="batch size of the stock model; 0: skip (default: %(default)s)",
    )
    parser.add_argument(
        "--quantize",
        choices=("torchao-float8",),
        help="also run the batcher with float8 weights and products, last (default: bf16 only)",
    )
    parser.add_argument(
        "--repeats",
        type=count,
        default=5,
        help="turns of a prefill and its matrix products (default: %(default)s)",
    )
    parser.add_argument("--soak", action="store_true", help="look for lost requests and leaked memory instead")
    args = parser.parse_args(argv)
    try:
        H2OConfig(window_length=args.window_length, update_interval=args.update_interval)
    except ValueError as error:
        parser.error(str(error))
    prompts, shared = args.prompt_tokens, args.shared_tokens
    if not prompts:
        parser.error("--prompt_tokens: give at least one number")
    if len(shared) not in (1, len(prompts)):
        parser.error(f"--shared_tokens: {len(shared)} numbers for {len(prompts)} of --prompt_tokens; give one for each")
    args.work = [Workload(*each) for each in zip(prompts, shared * (len(prompts) // len(shared)), strict=True)]
    for prompt_tokens, shared_tokens in args.work:
        if shared_tokens > prompt_tokens:
            parser.error(f"--shared_tokens {shared_tokens}: must be at most --prompt_tokens {prompt_tokens}")
    if args.soak and (len(args.work) > 1 or args.quantize):
        parser.error("--soak: runs one workload of bf16; give one --prompt_tokens and leave --quantize out")
    args.requests = args.requests or (2000 if args.soak else 512)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


TABLE = {
    "system": "", "prompt_tokens": "", "shared_tokens": "", "rows": "", "requests": "", "setup_s": ".1f",
    "seconds": ".1f", "all_s": ".1f", "requests_per_s": ".2f", "tokens_per_s": ".0f", "decode_per_s": ".0f",
    "prefill_share": ".2f", "peak_GiB": ".1f", "requests_per_s_x": ".2f", "prefill": "", "prefill_ms": ".1f",
    "products_ms": ".1f", "prefill_x_products": ".2f",
}  # fmt: skip


def run(args) -> int:
    model, stock = make_models(H2OModelForCausalLM.from_config, args.shape, args.device)
    if args.quantize:
        float8_config(args, model)  # fails now, not after minutes
    report = device_report(args.device) | {name: vars(args)[name] for name in ("new_tokens", "mixed")}
    if args.soak:
        result = soak(args, model)
        for line in result["wrong"][:10]:
            print(f"wrong: {line}", file=sys.stderr)
        print(to_json(report | result))
        return 1 if result["wrong"] else 0
    rows, baselines = [], {}
    for work in args.work:
        requests = make_requests(args, work)
        for result in measure(args, work, systems_of(args, model, stock, requests), len(requests), None):
            rows.append(print_row(result))
            if result["system"] == ONE_BY_ONE:
                baselines[work] = result["requests_per_s"]
    if args.quantize:
        del stock  # it shares the weights, and would keep them
        quantize(args, model)
        for work in args.work:
            requests = make_requests(args, work)
            systems = {"H2O batcher float8": (model, partial(measure_batcher, args, model, requests))}
            for result in measure(args, work, systems, len(requests), baselines.get(work)):
                rows.append(print_row(result))
    print()
    print_table(rows, TABLE)
    print(to_json(report | {"rows": rows}))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    way_out = "give a smaller --batch_size or --prompt_tokens"
    return cli.run(lambda: run(parse_args(argv)), "the results so far are printed above", way_out)


if __name__ == "__main__":
    sys.exit(main())
