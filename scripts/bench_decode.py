"""Benchmark prefill and decode of whole models: the heavy-hitter cache against the stock model, in one run.

Regime: a Llama-3-8B shape (or --shape's) with random bf16 weights, greedy, no end-of-sequence token. There are three
parts; a flag gives the sizes of each:

- generate (--prompts): whole calls of `generate`. `prefill_ms` is a call for one token. `decode_ms` is what each
  further token adds, (n tokens - 1 token) / (n - 1), for all systems alike. Systems take turns, after warm-up.
  `peak_GiB` is the peak of a call, including what the system keeps between calls.
- decode (--contexts, --batches): steps alone, with contexts in place, at the given batch sizes and the largest that
  fits. H2O's rows are copies of a prefilled one. The stock model's full cache holds random keys and values, in a
  DynamicCache, which copies all of them to append a token, and in buffers that append in place, the best that a full
  cache could do; transformers offers no such cache without a mask. Both loops are eager, so the host bounds them at
  small batches. `tokens_per_s_x` compares with DynamicCache at its best batch size.
- first (--first): the first step of a call compared with later ones, (2 tokens - 1 token), if the batch size was seen
  before; and the whole first and second call of a batch size. The first call compiles kernels and records.

Weights and kernel launches bound small batches; slots bound large ones. `floor_ms` is the time to read weights, keys,
values and mass once at --bandwidth. Its bytes are counted, not measured, and exclude slimming. Launches and host waits
are those of one uncaptured step without slimming, under the profiler, which runs last.
Times are medians of --repeats; `_low` and `_high` are the lowest and highest. `tokens_per_s` counts all rows, without
prefill. The last line is JSON. Keys that end in _x are ratios to stock, x_floor is the ratio to the floor, x_interval
the ratio to a step with slimmings --update_interval steps apart.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from h2optimizer import H2OConfig, H2OModelForCausalLM
from h2optimizer.backends import resolve_backend
from h2optimizer.decoder import CHUNK, Decoder
from h2optimizer.generation import KeptCaches
from h2optimizer.sampling import choose_greedily
from h2optimizer.utils.bench import (
    SHAPES,
    Spread,
    attempt,
    device_report,
    host_ms,
    make_models,
    prefill_and_step_ms,
    prefill_and_whole_ms,
    print_row,
    print_table,
    synchronize,
)
from h2optimizer.utils.cache import CACHE_ARGUMENT, HHCache
from h2optimizer.utils.cli import InputError, OneLineParser, count, counts, positive, sizes
from h2optimizer.utils.costs import floor_ms, head_dim, read_weights, row_held
from h2optimizer.utils.memory import allocated, free_memory, peak_allocated
from h2optimizer.utils.results import to_json

BACKENDS = ("sdpa", "flash_attn")  # besides auto
IN_PLACE, GROWING = "stock full cache, in place, eager", "stock DynamicCache, eager"
STOCK, STATIC, UNCAPTURED = "stock DynamicCache", "stock static cache", "H2O uncaptured"
MARGIN = 4 * 2**30  # bytes left free beside the largest batch for a step's own tensors
TAKEN_AT_ONCE = 64  # rows copied at once, few enough that the copies need little memory


@dataclass
class System:
    """A model, and how its `generate` is called. Each system keeps its own caches, so turns evict no graphs."""

    name: str
    model: PreTrainedModel
    h2o: H2OConfig | None = None
    flags: dict = field(default_factory=dict)
    kept: KeptCaches = field(default_factory=KeptCaches)

    def generate(self, prompt: torch.Tensor, tokens: int) -> None:
        if self.h2o is not None:
            self.model.h2o, self.model.kept_caches = self.h2o, self.kept
        mask = torch.ones_like(prompt)
        self.model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **self.flags)

    def ms(self, prompt: torch.Tensor, tokens: int) -> float:
        return host_ms(lambda: self.generate(prompt, tokens))

    def forget(self) -> None:
        """Drop graphs of earlier calls, and the length that a later static cache would inherit."""
        self.kept = KeptCaches()
        if self.h2o is not None:
            self.model.kept_caches = self.kept
        for name in ("_cache", "_previous_max_cache_length"):
            vars(self.model).pop(name, None)


def make_systems(args, model, stock) -> dict[str, System]:
    """The systems of the generate part by name. On CUDA, auto means captured Triton kernels."""

    def h2o(name: str, **flags) -> System:
        return System(name, model, dataclasses.replace(args.h2o, **flags))

    systems = [System(STOCK, stock)]
    if args.static and not args.prefill_only:
        systems.append(System(STATIC, stock, flags={"cache_implementation": "static"}))
    systems.append(h2o("H2O"))
    if args.prefill_only:
        systems.append(h2o("H2O score_queries=64", score_queries=64))
    else:
        systems += [h2o(UNCAPTURED, capture=False), h2o("H2O score_every_step=False", score_every_step=False)]
    for backend in args.backends:
        try:
            resolve_backend(backend, args.device)
        except ValueError as error:
            cli.say(f"left out: {error}")
            continue
        if backend == "flash_attn":  # returns no scores in a decode step
            name = "H2O backend=flash_attn score_every_step=False"
            systems.append(h2o(name, backend=backend, score_every_step=False))
        else:
            systems.append(h2o(f"H2O backend={backend}", backend=backend))
    named = {system.name: system for system in systems}
    if unknown := set(args.systems or ()) - named.keys():
        raise InputError(f"--systems: unknown: {', '.join(sorted(unknown))}; choose from {', '.join(named)}")
    return named


# generate


def prepare(system: System, prompt: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Compile and record everything that calls with this prompt need; returns their peak memory."""
    weights, before = sum(p.nbytes for p in system.model.parameters()), allocated()
    for _ in range(2):  # graphs are recorded at the second step of each kind
        system.generate(prompt, new_tokens)
    result = {}
    if torch.cuda.is_available():
        extra = peak_allocated(lambda: system.generate(prompt, new_tokens)) - before
        result = {"peak_GiB": (weights + extra) / 2**30, "extra_peak_GiB": extra / 2**30}
    return result


@torch.no_grad()
def measure_generate(systems: list[System], prompt: torch.Tensor, new_tokens: int, args) -> dict[str, dict]:
    """Time and memory of `generate` on a prompt [B, n], by system."""
    results, times = {}, {}
    for system in systems:
        failures = (Exception,) if system.name == STATIC else (torch.OutOfMemoryError,)
        result = attempt(system.name, prepare, system, prompt, new_tokens, failures=failures)
        if result is None:
            system.forget()
        else:
            results[system.name], times[system.name] = result, []
    for _ in range(args.repeats):
        for system in systems:
            if system.name in results:
                times[system.name].append(prefill_and_whole_ms(partial(system.generate, prompt), new_tokens))
    for system in systems:
        if system.name not in results:
            continue
        result = results[system.name]
        prefill, step = prefill_and_step_ms(times[system.name], new_tokens)
        result |= {"prefill_ms": prefill.median, "prefill_ms_low": prefill.low, "prefill_ms_high": prefill.high}
        if new_tokens > 1:
            floor = floor_ms(system.model, *prompt.shape, new_tokens - 1, args.bandwidth, system.h2o)
            result |= step_figures(step, len(prompt), floor)
    return results


def step_figures(step: Spread, batch: int, floor: float) -> dict[str, float]:
    """Figures of a step of `batch` rows; rates are at the median time."""
    return {
        "decode_ms": step.median,
        "decode_ms_low": step.low,
        "decode_ms_high": step.high,
        "tokens_per_s": batch / step.median * 1e3,
        "floor_ms": floor,
        "x_floor": step.median / floor,
    }


def generate_rows(args, model, stock) -> Iterator[dict]:
    systems = make_systems(args, model, stock)
    tokens = 1 if args.prefill_only else args.new_tokens
    chosen = [system for name, system in systems.items() if args.systems is None or name in args.systems]
    runs = [(length, batch, chosen, tokens) for length, batch in args.prompts]
    if args.alone:
        runs.append((args.alone, 1, [systems["H2O"]], 1))
    for length, batch, chosen, tokens in runs:
        prompt = torch.randint(1, model.config.vocab_size, (batch, length), device=args.device)
        results = attempt(f"prompt {length}x{batch}", measure_generate, chosen, prompt, tokens, args) or {}
        for system in chosen:
            system.forget()
        free_memory()
        baseline = results.get(STOCK, {})
        for name, result in results.items():
            row = {"prompt": f"{length}x{batch}", "system": name} | result
            yield row | ratios(result, baseline)


def ratios(result: dict, baseline: dict) -> dict[str, float]:
    keys = ("prefill_ms", "decode_ms", "tokens_per_s", "peak_GiB", "extra_peak_GiB", "launches", "ms")
    return {f"{key}_x": result[key] / baseline[key] for key in keys if key in result and baseline.get(key)}


# decode


class FullLayer(DynamicLayer):
    """A full cache's layer that appends in place to buffers [B, Hkv, length + room, D]: the stock model's best case."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int):
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        begin, self.length = self.length, self.length + key_states.shape[2]
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[:, :, begin : self.length] = new
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


class GrowingLayer(DynamicLayer):
    """A DynamicCache's layer that already holds `length` tokens."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int):
        super().__init__()
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True


@torch.no_grad()
def stock_ms(args, stock, context: int, in_place: bool, batch: int) -> Spread:
    """Milliseconds of an eager step of the stock model over a full cache of random keys and values.

    `in_place` appends to buffers; else each step copies the cache to append to it, as DynamicCache does.
    """
    config, steps = stock.config, args.new_tokens
    room = steps if in_place else 0
    shape = (batch, config.num_key_value_heads, context + room, head_dim(config))
    buffers = [
        [torch.empty(shape, dtype=stock.dtype, device=stock.device).normal_() for _ in range(2)]
        for _ in range(config.num_hidden_layers)
    ]
    cache, token = None, torch.zeros(batch, 1, dtype=torch.long, device=stock.device)
    positions = torch.arange(context, context + steps, device=stock.device)[:, None, None]

    if not in_place:
        cache = Cache(layers=[GrowingLayer(*states, context) for states in buffers])
        buffers.clear()

    def decode(steps: int) -> None:
        nonlocal token, cache
        if in_place:
            cache = Cache(layers=[FullLayer(*states, context) for states in buffers])
        for position in positions[:steps]:
            logits = stock(token, position_ids=position, **{CACHE_ARGUMENT: cache}).logits[:, -1]
            token = logits.argmax(-1, keepdim=True)

    decode(3)
    return Spread.of(host_ms(lambda: decode(steps)) / steps for _ in range(args.repeats))


@torch.no_grad()
def prefilled_row(model, h2o: H2OConfig, context: int) -> HHCache:
    """A cache of one row that has seen a whole context."""
    cache = HHCache(h2o)
    prompt = torch.randint(1, model.config.vocab_size, (1, context), device=model.device)
    model(prompt, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    return cache


@torch.no_grad()
def h2o_ms(args, model, source: HHCache, batch: int) -> Spread:
    """Milliseconds of a `Decoder`'s step over copies of a prefilled row, averaged over whole update intervals."""
    cache = source.with_rows(batch)
    for begin in range(0, batch, TAKEN_AT_ONCE):
        rows = list(range(begin, min(begin + TAKEN_AT_ONCE, batch)))
        cache.take_rows(rows, source, [0] * len(rows))
    decoder = Decoder(model, cache, choose_greedily)
    decoder.start(torch.zeros(batch, dtype=torch.long, device=model.device))

    def decode(steps: int) -> None:
        for begin in range(0, steps, CHUNK):
            decoder.decode(min(CHUNK, steps - begin))

    interval = source.h2o.update_interval
    steps = whole_intervals(args.new_tokens, interval)
    decode(3 * interval)  # steps and slimming run, are recorded, and are replayed
    return Spread.of(host_ms(lambda: decode(steps)) / steps for _ in range(args.repeats))


def whole_intervals(steps: int, interval: int) -> int:
    return -(-steps // interval) * interval


def largest_batch(row_bytes: float, args) -> int:
    """Rows that fit into free memory; without CUDA, --max_batch."""
    if args.device != "cuda":
        return args.max_batch
    free_memory()
    return min(args.max_batch, max(0, int((torch.cuda.mem_get_info()[0] - MARGIN) / row_bytes)))


def at_largest_batch(name: str, batch: int, run: Callable[[int], Spread]) -> tuple[int, Spread | None]:
    """Call `run(batch)`, with fewer rows if memory runs out: the final batch, and the result or None."""
    while batch:
        ms = attempt(f"{name}, {batch} rows", run, batch)
        if ms is not None:
            return batch, ms
        batch = batch * 9 // 10
    return 0, None


def measure_batches(
    args, name: str, row_bytes: float, run: Callable[[int], Spread], largest: bool = True
) -> dict[int, Spread]:
    """Step times by batch size: those of --batches that fit and, with `largest`, as many rows as fit."""
    fits = largest_batch(row_bytes, args)
    times = {}
    for batch in args.batches:
        if batch > fits:
            print(f"left out: {name}, {batch} rows: {fits} fit", file=sys.stderr)
            continue
        ms = attempt(f"{name}, {batch} rows", run, batch)
        free_memory()
        if ms is not None:
            times[batch] = ms
    if largest and fits not in times:
        batch, ms = at_largest_batch(name, fits, run)
        free_memory()
        if ms is not None:
            times[batch] = ms
    return times


def decode_rows(args, model, stock) -> Iterator[dict]:
    h2o = {"H2O": args.h2o}
    if args.update_interval > 1:
        h2o["H2O N=1"] = dataclasses.replace(args.h2o, update_interval=1)
    for context in args.contexts:
        row_bytes = row_held(model.config, model.dtype.itemsize, context + args.new_tokens)
        times = {}
        for name, in_place in ((IN_PLACE, True), (GROWING, False)):
            run = partial(stock_ms, args, stock, context, in_place)
            times[name] = measure_batches(args, name, row_bytes, run)
        for name, config in h2o.items():
            source = prefilled_row(model, config, context)
            row_bytes = row_held(model.config, model.dtype.itemsize, context, config)
            run = partial(h2o_ms, args, model, source)
            times[name] = measure_batches(args, name, row_bytes, run, largest=name == "H2O")
            del source, run
            free_memory()
        yield from decode_figures(args, model, context, times, h2o)


def decode_figures(args, model, context: int, times: dict[str, dict[int, Spread]], h2o: dict) -> Iterator[dict]:
    """One table row per system and batch size of one context."""
    stock = times[GROWING]
    best = max((batch / ms.median * 1e3 for batch, ms in stock.items()), default=None)
    for name, by_batch in times.items():
        config = h2o.get(name)
        steps = args.new_tokens if config is None else whole_intervals(args.new_tokens, config.update_interval)
        for batch, ms in by_batch.items():
            result = step_figures(ms, batch, floor_ms(model, batch, context, steps, args.bandwidth, config))
            if best:
                result["tokens_per_s_x"] = result["tokens_per_s"] / best
            if batch in stock:
                result["decode_ms_x"] = ms.median / stock[batch].median
            if name == "H2O N=1" and batch in times["H2O"]:
                result["x_interval"] = ms.median / times["H2O"][batch].median
            yield {"context": context, "batch": batch, "system": name} | result


# first


def first_rows(args, model, stock) -> Iterator[dict]:
    systems = make_systems(args, model, stock)
    for length, batch in args.first:
        prompt = torch.randint(1, model.config.vocab_size, (batch, length), device=args.device)
        systems[UNCAPTURED].generate(prompt.repeat(2, 1), 2)  # Triton's kernels compile, at another batch size
        for name in (STOCK, "H2O"):
            system = systems[name]
            result = attempt(name, measure_first, system, prompt, args)
            system.forget()
            free_memory()
            if result is not None:
                yield {"first": f"{length}x{batch}", "system": name} | result


@torch.no_grad()
def measure_first(system: System, prompt: torch.Tensor, args) -> dict[str, float]:
    """The first and second call for a batch size, and the first step of later calls."""
    system.forget()
    free_memory()
    calls = [system.ms(prompt, args.new_tokens) for _ in range(3)]
    ms = {tokens: [] for tokens in (1, 2)}
    for _ in range(args.repeats):
        for tokens, times in ms.items():
            times.append(system.ms(prompt, tokens))
    prefill_ms = statistics.median(ms[1])
    return {
        "first_call_ms": calls[0],
        "second_call_ms": calls[1],
        "third_call_ms": calls[2],
        "prefill_ms": prefill_ms,
        "decode_ms": (calls[2] - prefill_ms) / (args.new_tokens - 1),
        "first_step_ms": statistics.median(two - one for one, two in zip(ms[1], ms[2], strict=True)),
    }


# launches


def launch_rows(args, model, stock) -> Iterator[dict]:
    """Call after all timing: once profiled, every later launch of the process costs the host more."""
    if args.prefill_only:
        return
    systems = make_systems(args, model, stock)
    for length, batch in args.prompts:
        prompt = torch.randint(1, model.config.vocab_size, (batch, length), device=args.device)
        baseline = {}
        for name in (STOCK, UNCAPTURED):
            if args.systems is not None and name not in args.systems:
                continue
            result = attempt(name, count_launches, systems[name], prompt)
            if result is not None:
                baseline = result if name == STOCK else baseline
                yield {"prompt": f"{length}x{batch}", "system": name} | result | ratios(result, baseline)


@torch.no_grad()
def count_launches(system: System, prompt: torch.Tensor) -> dict[str, int]:
    """Kernel launches and host waits of one decode step that is not due."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    cache = DynamicCache(config=system.model.config) if system.h2o is None else HHCache(system.h2o)
    system.model(prompt, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
    token = prompt[:, :1]
    for _ in range(3):
        system.model(token, **{CACHE_ARGUMENT: cache})
    synchronize()
    with profile(activities=activities) as prof:
        system.model(token, **{CACHE_ARGUMENT: cache})
    names = [event.name for event in prof.events()]
    return {
        "launches": sum("LaunchKernel" in name for name in names),
        "host_waits": sum(name in ("aten::_local_scalar_dense", "aten::nonzero") for name in names),
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
    parser.add_argument(
        "--prefill_chunk", type=count, help="prompt tokens from one slimming to the next (default: all)"
    )
    parser.add_argument(
        "--position_rolling", action="store_true", help="take the positions of H2O's keys from their slots"
    )
    parser.add_argument(
        "--prompts", type=sizes("length", "batch"), default="2048x1,2048x16,8192x1,32768x1",
        help="generate part: prompt length x batch, comma-separated; '': none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--alone", type=count, help="also prefill one prompt of this length with H2O only (default: none)"
    )
    parser.add_argument(
        "--backends",
        nargs="*",
        choices=BACKENDS,
        default=BACKENDS,
        help="H2O backends to run besides auto (default: all)",
    )
    parser.add_argument(
        "--systems", nargs="+", help="generate part: run only these systems, named as in the table (default: all)"
    )
    parser.add_argument("--no-static", dest="static", action="store_false", help="leave out stock's static cache")
    parser.add_argument("--prefill_only", action="store_true", help="skip decode; also run with score_queries=64")
    parser.add_argument(
        "--contexts", type=counts, default="", help="decode part: context lengths, comma-separated (default: none)"
    )
    parser.add_argument(
        "--batches",
        type=counts,
        default="1,256",
        help="decode part: batch sizes besides the largest (default: %(default)s)",
    )
    parser.add_argument(
        "--max_batch",
        type=count,
        default=1024,
        help="decode part: the largest batch size to try (default: %(default)s)",
    )
    parser.add_argument(
        "--first", type=sizes("length", "batch"), default="",
        help="first part: prompt length x batch, comma-separated (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--new_tokens",
        type=count,
        default=65,
        help="tokens of a call of generate, the first included (default: %(default)s)",
    )
    parser.add_argument(
        "--bandwidth",
        type=positive,
        default=4.27,
        help="TB/s for floor_ms (default: %(default)s, a device copy on an H200)",
    )
    parser.add_argument(
        "--slots", choices=("auto", "int8"), default="auto", help="what H2O stores keys and values as (default: bf16)"
    )
    parser.add_argument("--repeats", type=count, default=3, help="runs; the median is reported (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        fields = ("window_length", "update_interval", "prefill_chunk", "position_rolling", "slots")
        args.h2o = H2OConfig(**{name: getattr(args, name) for name in fields})
    except ValueError as error:
        parser.error(str(error))
    if args.prefill_only and (args.contexts or args.first):
        parser.error("--prefill_only skips decode steps; leave out --contexts and --first")
    if args.first and args.new_tokens < 3:
        parser.error("--first compares the first step with later ones; give --new_tokens of at least 3")
    if not (args.prompts or args.alone or args.contexts or args.first):
        parser.error("nothing to do: give --prompts, --alone, --contexts or --first")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


TABLE = {
    "prompt": "", "context": "", "first": "", "batch": "", "system": "", "prefill_ms": ".1f", "decode_ms": ".2f",
    "decode_ms_low": ".2f", "decode_ms_high": ".2f", "tokens_per_s": ".0f",
    "floor_ms": ".2f", "x_floor": ".2f", "decode_ms_x": ".3f", "tokens_per_s_x": ".2f",
    "x_interval": ".2f", "peak_GiB": ".1f", "launches": "", "first_step_ms": ".2f", "first_call_ms": ".0f",
    "second_call_ms": ".0f",
}  # fmt: skip


def run(args) -> None:
    model, stock = make_models(H2OModelForCausalLM.from_config, args.shape, args.device)
    report = device_report(args.device) | {
        "weights_GB": round(read_weights(model) / 1e9, 2),
        "bandwidth_TBps": args.bandwidth,
        "h2o": dataclasses.asdict(args.h2o),
    }
    rows = []
    for part in (generate_rows, decode_rows, first_rows, launch_rows):
        for result in part(args, model, stock):
            rows.append(print_row(result))
    print()
    print_table(rows, {key: spec for key, spec in TABLE.items() if any(key in row for row in rows)})
    print(to_json(report | {"rows": rows}))


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    way_out = "give shorter --prompts, --contexts or --alone"
    return cli.run(lambda: run(parse_args(argv)), "the results so far are printed above", way_out)


if __name__ == "__main__":
    sys.exit(main())
