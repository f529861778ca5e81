"""Measure what a policy, a budget or an interval costs: a grid of cache settings, compared with the full cache.

    python scripts/ablate.py --window_length 64 128 256 --update_interval 1 4 16 --score mass streaming_llm sink random

Every field of H2OConfig takes several values. A YAML file (--grid) holds a mapping of fields to values, or a list of
such mappings, whose cells are combined. Settings that mean the same are one cell. For each cell the script measures:

- ROUGE of its greedy texts against the references.
- Fidelity, without references. The full cache's own greedy texts are fed to both caches token by token, and each next
  token's distribution is compared: top-1 agreement, KL divergence, perplexity of those texts. Also the share of the
  full cache's attention that falls on evicted tokens. In half precision the two caches also differ in rounding; a
  window as long as prompt and text shows by how much.
- Time and memory of `generate` alone: --batch_size prompts cut to one length, --timed_tokens tokens, after warm-up, the
  device synchronised. Time per token is (n tokens - 1 token) / (n - 1), for a step that gives each prompt a token.
  Median, lowest and highest of --repeats.
- Which tokens of one request each layer still holds, step by step. --retention_request chooses it; by default it is the
  request with the longest text by the full cache (on a tie, the longest prompt, then the first).

A finished cell is one line of --output-path (see utils/ablation.py) and is not run again. An interrupted sweep resumes
when you run it again, and another grid over the same model, requests and device adds to the file.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import torch
import transformers
import yaml
from tqdm import tqdm

from h2optimizer import H2OConfig
from h2optimizer.decoding import decoding_of
from h2optimizer.fidelity import SUMS, Fidelity, Retention, compare
from h2optimizer.flags import (
    FLAG_OF_FIELD,
    add_input_flag,
    add_model_flags,
    add_sharing_flag,
    attention_backend,
    plans_in,
)
from h2optimizer.loading import (
    ANY_CACHE,
    check_windows,
    device_name,
    fingerprint_of,
    load_model,
    plans_of_model,
    quiet_libraries,
    select_device,
)
from h2optimizer.sharing import SharedPrefixes, most_snapshot_bytes
from h2optimizer.summarizing import Prompt, Summarizer, decoding_order, tokenize, warn_of_long_prompts
from h2optimizer.utils.ablation import FULL, check_cell, figures, pack, policy_name, signed, with_range
from h2optimizer.utils.ablation_report import FEW
from h2optimizer.utils.bench import prefill_and_step_ms, prefill_and_whole_ms, print_table, stock_model
from h2optimizer.utils.budgets import own_texts
from h2optimizer.utils.cli import InputError, OneLineParser, count, count_or_zero, output_file
from h2optimizer.utils.memory import free_memory, halving, is_out_of_memory, peak_allocated
from h2optimizer.utils.policies import STREAMING_LLM
from h2optimizer.utils.requests import read_requests, read_text, unheeded
from h2optimizer.utils.results import JsonlFile, fingerprint
from h2optimizer.utils.rouge import ROUGE_TYPES

DEFAULTS = dataclasses.asdict(H2OConfig())
SCORING = ("score_every_step", "score_decay", "score_norm", "score_queries", "group_reduce")
WORDS = {"true": True, "false": False, "none": None, "all": None}
TIMINGS = 10  # most timed calls per --repeats; calls are added while a few tokens take less than the clock's noise
FORM = 2  # version of a cell's line; cells of another version are measured again


def value(text: str) -> bool | int | float | str | None:
    """An argparse type: a field's value, written as in Python or on run_summarization's command line."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return WORDS.get(text.lower(), text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_input_flag(parser)
    add(
        "--output-path",
        type=output_file,
        default=Path("out/ablation.jsonl"),
        help="jsonl of cells, one per setting of the cache (default: %(default)s)",
    )
    add_model_flags(parser)
    add("--sample_num", type=count, help="use only this many requests, from the top of the file (default: all)")
    add(
        "--batch_size",
        type=count,
        default=8,
        help="sequences decoded together, and prompts of a timed call (default: %(default)s)",
    )
    add(
        "--timed_tokens",
        type=count,
        default=65,
        help="tokens of a timed call, the first included (default: %(default)s)",
    )
    add("--repeats", type=count, default=3, help="timed calls; the median is reported (default: %(default)s)")
    add(
        "--retention_request",
        type=count_or_zero,
        help="index of the request whose tokens are followed (default: the one with the longest text)",
    )
    add_sharing_flag(parser)
    add("--grid", type=Path, help="a YAML file with the grid (default: the flags below)")
    grid = parser.add_argument_group(
        "grid", "One or more values for each field of H2OConfig. run_summarization.py --help explains the fields."
    )
    for name in DEFAULTS:
        flags = {f"--{name}": None, f"--{FLAG_OF_FIELD.get(name, name)}": None}
        grid.add_argument(*flags, dest=name, type=value, nargs="+", metavar="VALUE", help=f"default: {DEFAULTS[name]}")
    return parser.parse_args(argv)


# The grid


def grids(args: argparse.Namespace) -> list[dict[str, list]]:
    """For each grid, its fields and their values. Raises InputError."""
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    if args.grid is None:
        return [given]
    if given:
        raise InputError(f"--{next(iter(given))}: has no effect with --grid {args.grid}; leave one of them out")
    try:
        parsed = yaml.safe_load(read_text(args.grid, "--grid"))
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"--grid {args.grid}: not YAML ({' '.join(str(error).split())[:200]})") from None
    parsed = parsed if isinstance(parsed, list) else [parsed]
    if not parsed or not all(isinstance(grid, dict) for grid in parsed):
        raise InputError(f"--grid {args.grid}: must map fields of H2OConfig to values, or list such mappings")
    return [{name: of if isinstance(of, list) else [of] for name, of in grid.items()} for grid in parsed]


def cells_of(args: argparse.Namespace, made: list[dict[str, list]], device: torch.device) -> list[H2OConfig]:
    """The settings of these grids, without repetitions. Raises InputError if none of them works."""
    where = "" if args.grid is None else f"--grid {args.grid}: "
    cells, faults = {}, []
    for grid in made:
        if unknown := [name for name in grid if name not in DEFAULTS]:
            raise InputError(f"{where}H2OConfig has no field {unknown[0]!r}; its fields are {', '.join(DEFAULTS)}")
        # policies first, then windows, then intervals
        names = sorted(grid, key=lambda name: (name == "window_length") + 2 * (name == "update_interval"))
        for values in itertools.product(*(grid[name] for name in names)):
            settings = dict(zip(names, values, strict=True))
            try:
                h2o = H2OConfig(**settings)
                attention_backend(h2o, device)
            except (ValueError, InputError) as error:
                said = str(error).removeprefix("--")
                cell = ", ".join(f"{name}={of}" for name, of in settings.items())
                named = len(settings) == 1 and said.startswith(*settings)  # the message names the setting already
                faults.append(said if named else f"{cell}: {said}")
            else:
                cells[canonical(h2o, device)] = None
    if not cells:
        raise InputError(f"{where}{faults[0] if faults else 'no values given, so there is nothing to measure'}")
    for fault in dict.fromkeys(faults):
        cli.say(f"left out: {fault}")
    return list(cells)


def canonical(h2o: H2OConfig, device: torch.device) -> H2OConfig:
    """The same cache with defaults for fields that have no effect on this device, and numbers of one type."""
    idle = set() if h2o.needs_mass else set(SCORING)
    if not h2o.policy.seeded:
        idle.add("score_seed")
    if not h2o.heavy:
        idle.add("score")
    if h2o.backend == attention_backend(H2OConfig(), device):
        idle.add("backend")
    if device.type != "cuda":
        idle.add("capture")
    settings = {"score_decay": float(h2o.score_decay)} | {name: DEFAULTS[name] for name in idle}
    default = h2o.policy.heavy or h2o.window_length // 2
    if h2o.heavy and h2o.policy.keeps_oldest:
        sinks = {STREAMING_LLM.heavy: "streaming_llm", h2o.window_length // 2: "sink"}
        settings["score"] = sinks.get(h2o.heavy, "sink")
        settings["num_heavy_hitters"] = -1 if h2o.heavy in sinks else h2o.heavy
    elif h2o.heavy == default:
        settings["num_heavy_hitters"] = -1
    return dataclasses.replace(h2o, **settings)


# One cell


class Lab:
    """A model and its stock model over the same weights, and the requests to compare them on."""

    def __init__(self, args: argparse.Namespace, model, tokenizer, prompts: list[Prompt]):
        self.args, self.model, self.tokenizer, self.prompts = args, model, tokenizer, prompts
        model.merge_projections()  # moves the weights, which the stock model then shares
        self.stock = stock_model(model)
        self.pad = tokenizer.pad_token_id
        # similar lengths together, as in a run; the timed prompts are the first of the file
        self.order = decoding_order(prompts, args.batch_size)
        timed = prompts[: args.batch_size]
        shortest = min(len(prompt.tokens) for prompt in timed)
        rows = [prompt.tokens[:shortest] for prompt in timed]
        rows = [rows[i % len(rows)] for i in range(args.batch_size)]  # the file may hold fewer requests
        self.timed = torch.tensor(rows, device=model.device)

    def measure(self, h2o: H2OConfig | None, texts: list[list[int]] | None) -> dict:
        """One cell's figures. `h2o` is None for the full cache; the others are compared on its `texts`."""
        model = self.stock
        if h2o is not None:
            model, model.h2o = self.model, h2o
        measured = self._texts(model)
        if h2o is None:
            texts = measured["texts"]
        else:
            del measured["texts"]
        self.followed = self.args.retention_request
        if self.followed is None:
            self.followed = longest(texts, self.prompts)
        measured |= self._fidelity(model, texts) | self._time(model)
        self.model.kept_caches.clear()
        return measured

    def _texts(self, model) -> dict:
        """Greedy texts, their ROUGE, and what the cache held."""
        share = {"share_prefixes": self.args.share_prefixes}
        summarizer = Summarizer(model, self.tokenizer, self.args.batch_size, greedy=True, **share)
        sequences = {}
        for job in summarizer.decode(self.order):
            sequences[job.prompt.request.index] = job.sequences[0]
        rouge = {name: [] for name in ROUGE_TYPES}
        for prompt in self.prompts:
            request = prompt.request
            text = summarizer.choice(request, sequences[request.index])["text"]
            for name, score in summarizer.rouge.score(request.summary_gt, text).items():
                rouge[name].append(round(score, 6))
        held = [sequence.cache for sequence in sequences.values()]
        return {
            "rouge": rouge,
            "kv_bytes": sum(cache["kv_bytes"] for cache in held) / len(held),
            "slots_kept": sum(cache["slots_kept"] for cache in held) / len(held),
            "texts": [sequences[prompt.request.index].tokens for prompt in self.prompts],
        }

    def _fidelity(self, model, texts: list[list[int]]) -> dict:
        sums: list[Fidelity | None] = [None] * len(self.prompts)
        prefixes = [self._prefixes(of) for of in (self.stock, model)]
        followed, todo = None, list(prefixes[1].order)  # numbers in self.order

        def compared(at_once: int) -> Iterator[tuple]:
            while todo:
                numbers = todo[:at_once]
                batch = [self.order[number].request.index for number in numbers]
                follow = batch.index(self.followed) if self.followed in batch else None
                prompts, said = [self.prompts[i].tokens for i in batch], [texts[i] for i in batch]
                prefills = tuple(partial(of.prefill, prompts=numbers) for of in prefixes)
                yield batch, *compare(self.stock, model, prompts, said, self.pad, follow, None, prefills)
                del todo[:at_once]

        for batch, fidelity, retention in halving(compared, self.args.batch_size):
            for i, of_row in zip(batch, fidelity, strict=True):
                sums[i] = of_row
            followed = retention or followed
        result = {"fidelity": {name: [round(getattr(row, name), 9) for row in sums] for name in SUMS}}
        return result if followed is None else result | {"retention": self._retention(followed)}

    def _prefixes(self, model) -> SharedPrefixes:
        """What the requests share, for one of the models."""
        most_bytes = most_snapshot_bytes(model) if self.args.share_prefixes else 0
        prompts = [prompt.tokens for prompt in self.order]
        return SharedPrefixes(decoding_of(model, pad_token_id=self.pad), prompts, self.args.batch_size, most_bytes)

    def _retention(self, followed: Retention) -> dict:
        return {
            "index": self.followed,
            "prompt_tokens": followed.prompt_tokens,
            "last_held": pack(followed.last_held.numpy()),
            "mass_lost": followed.mass_lost,
        }

    def _time(self, model) -> dict:
        """Seconds and bytes of `generate` on the timed prompts."""
        tokens, (batch, length) = self.args.timed_tokens, self.timed.shape
        mask = torch.ones_like(self.timed)

        def generate(tokens: int) -> None:
            model.generate(self.timed, attention_mask=mask, max_new_tokens=tokens, do_sample=False)

        free_memory()  # of earlier figures: peak memory is that of these calls
        with never_ending(model):
            warm = 2 if self.timed.is_cuda else 1  # graphs are recorded at the second step of each kind
            for _ in range(warm):
                generate(tokens)
            peak = peak_allocated(partial(generate, tokens)) if self.timed.is_cuda else None
            times = []
            for _ in range(TIMINGS):
                times += [prefill_and_whole_ms(generate, tokens) for _ in range(self.args.repeats)]
                first, step = prefill_and_step_ms(times, tokens)
                if step.median > 0:
                    break
        if step.median <= 0:
            raise InputError(
                f"--timed_tokens {tokens}: too few to time on this device; give more (cells so far are kept)"
            )
        timing = {
            "batch": batch,
            "prompt_tokens": length,
            "calls": len(times),
            "time_to_first_token": first.median / 1e3,
            "time_to_first_token_range": [first.low / 1e3, first.high / 1e3],
            "time_per_token": step.median / 1e3,
            "time_per_token_range": [step.low / 1e3, step.high / 1e3],
            "tokens_per_second": batch / step.median * 1e3,
        }
        return {"time": timing, "peak_memory_bytes": peak}


def longest(texts: list[list[int]], prompts: list[Prompt]) -> int:
    """The index of the longest text; on a tie, of the longest prompt, then the first."""
    return max(range(len(texts)), key=lambda i: (len(texts[i]), len(prompts[i].tokens), -i))


@contextmanager
def never_ending(model):
    """No token ends a sequence, so all calls have the same steps."""
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        yield
    finally:
        model.generation_config.eos_token_id = before


# The script

TABLE = {
    "policy": "", "window_length": "", "update_interval": "", "ROUGE-2": "", "difference": "", "top-1 %": ".2f",
    "KL": "z.4f", "perplexity": ".3f", "mass lost %": ".2f", "KV MiB": ".2f", "first ms": "", "ms/step": "",
    "tokens/s": "", "peak GiB": ".1f",
}  # fmt: skip


def table_row(cell: dict, full: dict) -> dict:
    """A cell in the table's units; quality has 95 % intervals."""
    row = figures(cell, full, DEFAULTS)
    shown = {
        "ROUGE-2": f"{row['rouge2']['mean']:.2f}",
        "difference": signed(row["rouge2_delta"]) if cell["h2o"] else None,
        "KV MiB": row["kv_bytes"] / 2**20,
        "first ms": with_range(row, "time_to_first_token", 1e3, 1),
        "ms/step": with_range(row, "time_per_token", 1e3),
        "tokens/s": with_range(row, "tokens_per_second", digits=0),
        "peak GiB": row["peak_memory_bytes"] and row["peak_memory_bytes"] / 2**30,
    }
    for name, key, scale in (
        ("top-1 %", "top1", 100), ("KL", "kl", 1), ("perplexity", "perplexity", 1), ("mass lost %", "mass_lost", 100),
    ):  # fmt: skip
        shown[name] = scale * row[key]["mean"] if key in row else None
    return row | shown


def run(args: argparse.Namespace) -> int:
    device = select_device(args.device)
    made = grids(args)
    budgets = itertools.chain.from_iterable(grid.get("head_budgets", []) for grid in made)
    plans = plans_of_model(plans_in(budgets), args.model_name)
    cells = [None, *cells_of(args, made, device)]
    check_windows(args.model_name, cells[1:])
    requests, _ = read_requests(args.input_path, None, args.sample_num)
    for warning in filter(None, [unheeded(requests), *own_texts(plans, requests)]):
        cli.say(warning)
    if args.retention_request is not None and not 0 <= args.retention_request < len(requests):
        raise InputError(f"--retention_request {args.retention_request}: the requests are 0 to {len(requests) - 1}")
    if args.timed_tokens < 2:
        raise InputError("--timed_tokens: prefill gives the first token; give at least 2")
    weights = fingerprint_of(args.model_name)
    setup = {
        "form": FORM,
        "model": Path(args.model_name).resolve().name
        if Path(args.model_name).exists()
        else args.model_name,  # may be moved
        "weights": weights and weights[:16],
        "requests": fingerprint(requests)[:16],
        "number of requests": len(requests),
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "timed_tokens": args.timed_tokens,
        "repeats": args.repeats,
        "retention_request": "longest text" if args.retention_request is None else args.retention_request,
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    names = [cell_name(setup, h2o) for h2o in cells]
    file = JsonlFile(args.output_path, "cell", "cell", args.input_path)
    file.resume("choose another --output-path", check_cell)
    todo = [(name, h2o) for name, h2o in zip(names, cells, strict=True) if name not in file.entries]
    if len(todo) < len(cells):
        print(f"{len(cells) - len(todo)} of {len(cells)} cells are already measured", file=sys.stderr)
    if todo:
        quiet_libraries()
        model, tokenizer = load_model(args.model_name, ANY_CACHE, device, args.dtype)
        if getattr(model, "hf_quantizer", None) is not None:
            raise InputError(f"--model-name {args.model_name}: is quantised; give a checkpoint with plain weights")
        prompts = tokenize(requests, tokenizer, model, args.model_name)
        warn_of_long_prompts(prompts, model.config.max_position_embeddings, h2o=None)
        with torch.cuda.device(device if device.type == "cuda" else -1):  # the device to time and measure; -1: no GPU
            sweep(Lab(args, model, tokenizer, prompts), setup, todo, names[0], file)
    full = file.entries[names[0]]
    try:
        rows = [table_row(file.entries[name], full) for name in names]
    except ValueError as error:  # the full cache was measured again with other libraries
        raise InputError(f"--output-path {args.output_path}: a cell does not fit: {error}; choose another") from None
    print_table(rows, TABLE)
    print_units(rows[0], len(requests))
    return 0


def print_units(full: dict, requests: int) -> None:
    """Explain the table's figures. `full`: the full cache's row."""
    over = f"[95 % interval over {requests} requests]" if requests > 1 else "of one request: no interval"
    print(f"\nROUGE-2, difference from the full cache, 0 to 100, {over}.")
    if 1 < requests < FEW:
        print(f"With fewer than {FEW} requests these intervals are too narrow.")
    calls = f"Median [lowest, highest] of {full['calls']} calls" if full.get("calls", 1) > 1 else "One call"
    print(f"{calls} with {full['batch']} prompts of {full['prompt_tokens']} tokens. first ms: their prefill. ms/step:")
    print(f"a step that gives each prompt a token. tokens/s: all {full['batch']} together, without prefill.")
    print("KL: nats per token. KV MiB: per request.")


def cell_name(setup: dict, h2o: H2OConfig | None) -> str:
    """A hash of everything a cell's figures depend on."""
    settings = None if h2o is None else dataclasses.asdict(h2o)
    return hashlib.sha256(json.dumps([setup, settings]).encode()).hexdigest()[:16]


def sweep(lab: Lab, setup: dict, todo: list[tuple[str, H2OConfig | None]], full: str, file: JsonlFile) -> None:
    """Measure cells and write each as soon as it is done. Raises InputError."""
    for name, h2o in (bar := tqdm(todo, unit="cell", dynamic_ncols=True)):
        settings = None if h2o is None else dataclasses.asdict(h2o)
        words = (
            FULL if h2o is None else f"{policy_name(settings, DEFAULTS)}, {h2o.window_length}, {h2o.update_interval}"
        )
        bar.set_postfix_str(words)
        try:
            measured = lab.measure(h2o, file.entries.get(full, {}).get("texts"))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"--batch_size {lab.args.batch_size}: out of memory ({words}); give a smaller one (cells so "
                "far are kept)"
            ) from None
        except InputError as error:
            raise InputError(f"{error} [{words}]") from None
        cell = {"cell": name, "setup": setup, "h2o": settings, **measured}
        try:
            check_cell(cell)
        except ValueError as error:  # logits that overflow
            raise InputError(
                f"--dtype {lab.args.dtype}: {words} cannot be measured ({error}); give another (cells so far are kept)"
            ) from None
        file.append(cell)


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    kept = "cells so far are kept; run the same command again to resume"
    return cli.run(lambda: run(parse_args(argv)), kept, f"give a smaller --batch_size ({kept})")


if __name__ == "__main__":
    sys.exit(main())
