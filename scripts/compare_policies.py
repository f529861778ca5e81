"""Compare this project's policies, and beside them kvpress' presses, with the full cache: one model, one table.

    python scripts/compare_policies.py --model-name M --chat --input-path requests.jsonl --sample_num 100 \\
        --window_length 64 128 256 --policies mass value_mass:3/4,head_budgets=plan.json \\
        --slots auto int8 --kvpress ~/kvpress

The full cache writes a greedy text for each request. All others are fed that text, and each next token's distribution
is compared with the full cache's, for the text's tokens after the first: KL divergence (nats a token) and top-1
agreement, means over tokens with 95 % bootstrap intervals over requests. --rouge adds ROUGE of each one's own texts.
If all references are single words or numbers, the table shows the share of texts that contain them ("found %") instead.

The two count a window in different ways, and the table says so. This project's window holds prompt and text. A press
cuts the prompt to the window once, and keeps the text on top.

A press runs in kvpress itself, which needs an older transformers. This makes its environment, beside your torch:

    python -m pip install --no-deps --target ~/kvpress kvpress==0.5.5 transformers==4.57.6 tokenizers==0.22.1 \\
        huggingface_hub==0.36.0 accelerate==1.10.1 cachetools==5.5.2

Every measured request is a line of --output-path. Run the same command again to resume; more policies, windows or
presses add to the file. The table is also in the metrics JSON beside it. --figure draws it, from results that are there
already as well.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import torch
from tqdm import tqdm

from h2optimizer import H2OConfig
from h2optimizer.batching import Sequence
from h2optimizer.fidelity import Recorded, compare
from h2optimizer.flags import add_input_flag, add_model_flags
from h2optimizer.loading import (
    ANY_CACHE,
    check_windows,
    end_as_chats_do,
    fingerprint_of,
    is_installed,
    load_model,
    plans_of_model,
    quiet_libraries,
    select_device,
)
from h2optimizer.policy_flags import plans_of_policies, policy_config
from h2optimizer.summarizing import Prompt, Summarizer, decoding_order, tokenize, warn_of_long_prompts
from h2optimizer.utils.ablation import FULL
from h2optimizer.utils.ablation_report import FEW, with_interval
from h2optimizer.utils.bench import print_table, stock_model
from h2optimizer.utils.budgets import HeadBudgets, own_texts
from h2optimizer.utils.cli import InputError, OneLineParser, count, output_file
from h2optimizer.utils.figures import figure_file
from h2optimizer.utils.long_prompts import join_articles
from h2optimizer.utils.memory import halving, is_out_of_memory
from h2optimizer.utils.policy_figure import PROMPT_ALONE, PROMPT_AND_TEXT, lines_of, save_policies
from h2optimizer.utils.requests import Request, read_requests, unheeded
from h2optimizer.utils.results import ResultsFile, fingerprint
from h2optimizer.utils.rouge import ROUGE_TYPES, is_found, mean_with_interval

PRESSES = (
    "ObservedAttention", "ExpectedAttention", "AdaKV+ExpectedAttention", "TOVA", "SnapKV", "PyramidKV",
    "CriticalKV+SnapKV", "KeyDiff", "LagKV", "StreamingLLM", "Random",
)  # fmt: skip
RUNNER = Path(__file__).resolve().with_name("kvpress_presses.py")
FOUND = "found"  # beside ROUGE, of a reference of one word
MEASURED = ("tokens", "agreed", "kl", "nll", "slots_kept", "kv_bytes")  # of a request, by this project and by kvpress


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_input_flag(parser)
    add(
        "--output-path",
        type=output_file,
        default=Path("out/policies.jsonl"),
        help="jsonl of measured requests; metrics beside it (%(default)s)",
    )
    add("--overwrite", action="store_true", help="start anew instead of resuming the results at --output-path")
    add_model_flags(parser)
    add("--sample_num", type=count, help="use only this many prompts, from the top of the file")
    add("--articles", type=count, default=1, help="articles in a prompt, which asks for a summary of one (%(default)s)")
    add("--chat", action="store_true", help="wrap each prompt in the tokenizer's chat template, for instruct models")
    add("--max_tokens", type=count, help="longest text (what each request asks for)")
    add("--batch_size", type=count, default=8, help="sequences together; presses take one by one (%(default)s)")
    add("--rouge", action="store_true", help="also generate with every policy, for ROUGE or answers; slow for presses")
    add("--window_length", type=count, nargs="+", default=[64, 128, 256], help="windows, in slots (64 128 256)")
    add("--update_interval", type=count, nargs="+", default=[1], help="of this project's policies (1)")
    add(
        "--policies",
        nargs="*",
        default=["mass"],
        metavar="POLICY",
        help="each as score[:heavy][,flag=value...]: a --score, the value of --num_heavy_hitter_tokens, and other "
        "flags of the cache, such as mass mass:7/8 value_mass:3/4,head_budgets=plan.json (mass)",
    )
    add(
        "--slots",
        nargs="+",
        choices=("auto", "int8"),
        help="run every policy with keys and values stored as each of these; auto is the model's dtype (auto)",
    )
    add("--kvpress", type=Path, metavar="FOLDER", help="kvpress' environment (see the top of this script)")
    add("--presses", nargs="+", choices=PRESSES, metavar="PRESS", help=f"some of {', '.join(PRESSES)} (all)")
    add("--figure", type=figure_file, help="draw KL against bytes held: a PNG, SVG or PDF file; needs matplotlib")
    return parser.parse_args(argv)


# What is compared


@dataclasses.dataclass(frozen=True)
class Cell:
    """A policy or press at a window; with neither, the full cache."""

    label: str
    window: int | None = None
    h2o: H2OConfig | None = None
    press: str | None = None
    versions: tuple[str, ...] = ()  # of the libraries that run the press

    @property
    def name(self) -> str:
        """A hash of what its figures depend on, besides the run's settings."""
        settings = dataclasses.asdict(self.h2o) if self.h2o else [self.press, self.press and self.window, self.versions]
        return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:16]

    def index(self, request: int) -> str:
        """Identifies a request's line in the results, which are sorted by it."""
        return f"{request:06d} {self.name}"


def config_of(policy: str, window: int, interval: int, device: torch.device) -> H2OConfig:
    """The settings of a --policies value. Raises InputError."""
    given = {"enable_h2o_generation": True, "num_window_length": window, "update_interval": interval}
    h2o = policy_config(policy, device, argparse.Namespace(**given))
    for flag, own, shared in (
        ("window_length", h2o.window_length, window), ("update_interval", h2o.update_interval, interval),
    ):  # fmt: skip
        if own != shared:
            raise InputError(f"--policies {policy}: the window and the interval are the table's; pass --{flag} {own}")
    return h2o


def cells_of(args: argparse.Namespace, device: torch.device) -> list[Cell]:
    """The full cache and all that is compared with it, without repetitions. Raises InputError."""
    cells = [Cell(FULL)]
    policies = [text for policy in args.policies for text in with_slots(policy, args.slots)]
    for text, window, interval in itertools.product(policies, args.window_length, args.update_interval):
        cells.append(Cell(text, window, config_of(text, window, interval, device)))
    if args.presses and args.kvpress is None:
        raise InputError("--presses: needs kvpress' environment; pass --kvpress")
    if args.kvpress is not None:
        versions = versions_in(args.kvpress)
        presses = itertools.product(args.presses or PRESSES, args.window_length)
        cells += [Cell(f"kvpress {press}", window, press=press, versions=versions) for press, window in presses]
    if len(cells) == 1:
        raise InputError("--policies: none given; name some, or pass --kvpress")
    return list({cell.name: cell for cell in cells}.values())


def with_slots(policy: str, slots: list[str] | None) -> list[str]:
    """A policy once for each of --slots. Raises InputError if it names its own."""
    if slots and ",slots=" in policy:
        raise InputError(f"--policies {policy}: names its own slots; leave that or --slots out")
    return [policy if of == "auto" else f"{policy},slots={of}" for of in slots or ["auto"]]


def versions_in(folder: Path) -> tuple[str, ...]:
    """Of what runs presses in an environment. Raises InputError if it is none."""
    found = {of.metadata["Name"]: of.version for of in importlib.metadata.distributions(path=[str(folder)])}
    try:
        return tuple(f"{name} {found[name]}" for name in ("kvpress", "transformers"))
    except KeyError as error:
        way_out = "make it with the pip command at the top of scripts/compare_policies.py"
        raise InputError(f"--kvpress {folder}: {error.args[0]} is not installed there; {way_out}") from None


# Measuring


class Comparison:
    """A model, its stock model over the same weights, the prompts, and the file of results."""

    def __init__(self, args: argparse.Namespace, model, tokenizer, prompts: list[Prompt], output: ResultsFile):
        self.args, self.model, self.tokenizer, self.prompts, self.output = args, model, tokenizer, prompts, output
        model.merge_projections()  # moves the weights, which the stock model then shares
        self.stock = stock_model(model)
        self.order = decoding_order(prompts, args.batch_size)
        self.eos = Summarizer(self.stock, tokenizer, 1).eos
        self.refused: dict[tuple[str, int], str] = {}  # by press and window: why

    def is_missing(self, cell: Cell, prompt: Prompt) -> bool:
        return cell.index(prompt.request.index) not in self.output.results

    def text(self, prompt: Prompt) -> list[int]:
        """Tokens of the full cache's text."""
        return self.output.results[Cell(FULL).index(prompt.request.index)]["text"]

    def write(self, cell: Cell, prompt: Prompt, measured: dict, said: Sequence | None = None) -> None:
        line = {"index": cell.index(prompt.request.index), "request": prompt.request.index, "policy": cell.label}
        line |= {"window": cell.window, "interval": cell.h2o and cell.h2o.update_interval, **measured}
        if self.args.rouge:
            line["rouge"] = self._rouge(prompt.request, said)
        try:
            check_line(line, len(self.prompts), self.args.rouge)
        except ValueError as error:
            raise InputError(
                f"--dtype {self.args.dtype}: request {prompt.request.index} cannot be measured with {cell.label} "
                f"({error}); pass another (results so far are kept)"
            ) from None
        self.output.append(line)

    def _rouge(self, request: Request, said: Sequence) -> dict[str, float]:
        summarizer = Summarizer(self.stock, self.tokenizer, 1, greedy=True)
        text = summarizer.choice(request, said)["text"]
        scores = {name: round(score, 6) for name, score in summarizer.rouge.score(request.summary_gt, text).items()}
        if len(request.summary_gt.split()) == 1:
            scores[FOUND] = float(is_found(request.summary_gt, text))
        return scores

    def texts_of_full_cache(self) -> Iterator[str]:
        cell = Cell(FULL)
        todo = [prompt for prompt in self.order if self.is_missing(cell, prompt)]
        for job in Summarizer(self.stock, self.tokenizer, self.args.batch_size, greedy=True).decode(todo):
            (said,) = job.sequences
            tokens = max(len(said.tokens) - 1, 0)
            held = {name: said.cache[name] for name in ("slots_kept", "kv_bytes")}
            nll = -sum(said.logprobs[1:])
            measured = {"tokens": tokens, "agreed": tokens, "kl": 0.0, "nll": nll, **held, "text": said.tokens}
            self.write(cell, job.prompt, measured, said)
            yield cell.label

    def policies(self, cells: list[Cell]) -> Iterator[str]:
        """All policies, batch by batch, each result's label: the full cache's side of a batch is computed once."""
        pad = self.tokenizer.pad_token_id
        todo = [prompt for prompt in self.order if any(self.is_missing(cell, prompt) for cell in cells)]

        def compared(at_once: int) -> Iterator[str]:
            while todo:
                batch = todo[:at_once]
                texts = [self.text(prompt) for prompt in batch]
                recorded = Recorded(self.stock, [prompt.tokens for prompt in batch], texts, pad)
                for cell in cells:
                    if rows := [row for row, prompt in enumerate(batch) if self.is_missing(cell, prompt)]:
                        self._policy(cell, [batch[row] for row in rows], recorded.of(rows))
                        yield from [cell.label] * len(rows)
                del todo[:at_once]

        yield from halving(compared, self.args.batch_size)
        self.model.kept_caches.clear()

    def _policy(self, cell: Cell, batch: list[Prompt], recorded: Recorded) -> None:
        self.model.h2o = cell.h2o
        tokens, texts = [prompt.tokens for prompt in batch], [self.text(prompt) for prompt in batch]
        said = {}
        if self.args.rouge:
            summarizer = Summarizer(self.model, self.tokenizer, len(batch), greedy=True)
            said = {job.prompt.request.index: job.sequences[0] for job in summarizer.decode(batch)}
        pad = self.tokenizer.pad_token_id
        fidelity, _ = compare(self.stock, self.model, tokens, texts, pad, recorded=recorded)
        for prompt, of_row in zip(batch, fidelity, strict=True):
            measured = {name: getattr(of_row, name) for name in MEASURED}
            self.write(cell, prompt, measured, said.get(prompt.request.index))

    def presses(self, cells: list[Cell]) -> Iterator[str]:
        """All presses, request by request: the full cache's distributions are computed once for each."""
        of = {(cell.press, cell.window): cell for cell in cells}
        jobs = []
        for prompt in self.order:
            request = prompt.request
            if cuts := [place for place, cell in of.items() if self.is_missing(cell, prompt)]:
                full = self.output.results[Cell(FULL).index(request.index)]
                job = {"request": request.index, "prompt": prompt.tokens, "text": full["text"], "nll": full["nll"]}
                job |= {
                    "cuts": cuts,
                    "max_tokens": request.max_tokens if self.args.rouge else 0,
                    "eos": sorted(self.eos),
                }
                jobs.append(job)
        by_index = {prompt.request.index: prompt for prompt in self.prompts}
        dtype = str(self.model.dtype).removeprefix("torch.")
        flags = ["--model-name", self.args.model_name, "--device", str(self.model.device), "--dtype", dtype]
        for result in run_presses(self.args.kvpress, flags, jobs):
            place, prompt = (result["press"], result["budget"]), by_index[result["request"]]
            if "error" in result:
                self.refused.setdefault(place, f"request {result['request']}: {result['error']}")
            else:
                tokens = result["said"]
                said = None
                if tokens is not None:
                    reason = "stop" if tokens[-1] in self.eos else "length"
                    said = Sequence(prompt.tokens, prompt.request.max_tokens, tokens=tokens, finish_reason=reason)
                self.write(of[place], prompt, {name: result[name] for name in MEASURED}, said)
            yield of[place].label


def run_presses(folder: Path, flags: list[str], jobs: list[dict]) -> Iterator[dict]:
    """The results of RUNNER for its jobs, as they come; see there for their form. Raises InputError if it fails."""
    if not jobs:
        return
    ahead = os.pathsep.join(filter(None, [str(folder.resolve()), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as stdin, tempfile.TemporaryFile("w+", errors="replace") as stderr:
        stdin.writelines(json.dumps(job) + "\n" for job in jobs)
        stdin.seek(0)
        runner = subprocess.Popen(
            [sys.executable, str(RUNNER), *flags],
            env=os.environ | {"PYTHONPATH": ahead},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        try:
            for line in runner.stdout:
                yield json.loads(line)
            if status := runner.wait():
                stderr.seek(0)
                said = [line for line in stderr.read().splitlines() if line.strip()] or ["no message"]
                raise InputError(
                    f"--kvpress {folder}: {RUNNER.name} ended with status {status} ({said[-1].strip()[:200]}); "
                    "results so far are kept"
                )
        finally:
            runner.kill()
            runner.wait()
            runner.stdout.close()


def check_line(line: dict, requests: int, rouge: bool) -> None:
    """Raises ValueError, with the reason, for a line that is not of this script."""
    request = line.get("request")
    if type(request) is not int or not 0 <= request < requests:
        raise ValueError(f"its request is {request!r}; the requests are 0 to {requests - 1}")
    try:
        values = [line[name] for name in MEASURED] + [line["rouge"][name] for name in ROUGE_TYPES if rouge]
        finite = all(abs(value) < float("inf") for value in values)
        text = line["policy"] != FULL or all(type(token) is int for token in line["text"])
    except (KeyError, TypeError):
        raise ValueError("a part of it is missing") from None
    if not (finite and text):
        raise ValueError("a figure is not a finite number")


# The table

TABLE = {
    "policy": "", "window": "", "N": "", "window holds": "", "KL": "", "top-1 %": "", "ROUGE-2": "", "found %": "",
    "slots": ".1f", "KV MiB": ".3f",
}  # fmt: skip


def table_row(cell: Cell, lines: list[dict]) -> dict:
    """Means over a cell's requests; those of tokens with intervals {mean, low, high}."""
    sums = {name: [line[name] for line in lines] for name in MEASURED}
    holds = "everything" if cell.window is None else PROMPT_ALONE if cell.press else PROMPT_AND_TEXT
    row = {"policy": cell.label, "window": cell.window, "N": cell.h2o and cell.h2o.update_interval}
    row |= {"window holds": holds, "requests": len(lines)}
    if sum(sums["tokens"]):
        row |= {"kl": mean_with_interval(sums["kl"], sums["tokens"])}
        row |= {"top1": mean_with_interval(sums["agreed"], sums["tokens"])}
    scored = ROUGE_TYPES if "rouge" in lines[0] else ()
    if scored and all(FOUND in line["rouge"] for line in lines):
        scored = (*scored, FOUND)
    for name in scored:
        row[name] = mean_with_interval([100 * line["rouge"][name] for line in lines])
    return row | {name: sum(sums[name]) / len(lines) for name in ("slots_kept", "kv_bytes")}


def shown(row: dict) -> dict:
    """A row in the table's units."""
    cells = {"slots": row["slots_kept"], "KV MiB": row["kv_bytes"] / 2**20}
    for name, key, scale, digits in (
        ("KL", "kl", 1, 4), ("top-1 %", "top1", 100, 1), ("ROUGE-2", "rouge2", 1, 2), ("found %", FOUND, 1, 1),
    ):  # fmt: skip
        cells[name] = with_interval(row[key], scale, digits) if key in row else None
    return row | cells


def print_rows(rows: list[dict], requests: int) -> None:
    # a single word has no ROUGE-2
    left_out = {"ROUGE-2": FOUND in rows[0] or "rouge2" not in rows[0], "found %": FOUND not in rows[0]}
    columns = {name: spec for name, spec in TABLE.items() if not left_out.get(name)}
    print_table(map(shown, rows), columns)
    over = f"{requests} requests, [95 % interval over them]" if requests > 1 else "one request, without an interval"
    print(f"\nKL to the full cache, nats a token, and top-1 agreement: {over}.")
    if 1 < requests < FEW:
        print(f"With fewer than {FEW} requests these intervals are too narrow.")
    print("slots: what a head can attend to at the end of a text, on average. KV MiB: bytes then held for a request.")
    if any(row["window holds"] == PROMPT_ALONE for row in rows):
        print("Presses cut the prompt and keep the text on top. AdaKV masks slots without giving up their bytes.")


def rows_of(cells: list[Cell], results: dict, requests: int, refused: dict) -> list[dict]:
    """The full cache first, then window by window, best first. A cell without all its requests is left out."""
    rows = []
    for cell in cells:
        lines = [results[index] for i in range(requests) if (index := cell.index(i)) in results]
        if len(lines) == requests:
            rows.append(table_row(cell, lines))
        else:
            reason = refused.get((cell.press, cell.window), "it has not been measured")
            cli.say(f"left out: {cell.label} at {cell.window}: {len(lines)} of {requests} requests ({reason})")
    return sorted(rows, key=lambda row: (row["window"] or 0, row["kl"]["mean"] if "kl" in row else 0.0))


# The script


def read(args: argparse.Namespace, plans: list[HeadBudgets]) -> list[Request]:
    """The prompts that the flags ask for. Raises InputError."""
    limit = args.sample_num and args.sample_num * args.articles
    requests, _ = read_requests(args.input_path, None, limit)
    if warning := unheeded(requests):
        cli.say(warning)
    for warning in own_texts(plans, requests):
        cli.say(warning)
    if args.articles > 1:
        requests = join_articles(requests, args.articles)
    if args.max_tokens is not None:
        requests = [dataclasses.replace(request, max_tokens=args.max_tokens) for request in requests]
    return requests


def settings_of(args: argparse.Namespace, requests: list[Request]) -> dict:
    """What a resumed run must share, by flag."""
    weights = fingerprint_of(args.model_name)
    return {
        "the form of results": 1,
        "--model-name": args.model_name,
        "what --model-name holds": weights and f"sha256 {weights[:16]}",
        "--input-path": f"sha256 {fingerprint(requests)[:16]}",
        "--sample_num": args.sample_num,
        "--articles": args.articles,
        "--chat": args.chat,
        "--max_tokens": args.max_tokens,
        "--dtype": args.dtype,
        "--rouge": args.rouge,
    }


def run(args: argparse.Namespace) -> int:
    if args.figure is not None and not is_installed("matplotlib"):
        raise InputError("--figure: matplotlib is not installed: pip install matplotlib, or leave it out")
    device = select_device(args.device)
    cells = cells_of(args, device)
    check_windows(args.model_name, [cell.h2o for cell in cells if cell.h2o])
    requests = read(args, plans_of_model(plans_of_policies(args.policies), args.model_name))
    check = partial(check_line, requests=len(requests), rouge=args.rouge)
    output = ResultsFile(args.output_path, settings_of(args, requests), args.overwrite, args.input_path, check)
    every = [cell.index(request.index) for cell in cells for request in requests]
    todo, refused = sum(index not in output.results for index in every), {}
    if todo < len(every):
        cli.say(f"{len(every) - todo} of {len(every)} results are there already")
    if todo:
        refused = measure(args, device, requests, cells, output, todo)
    rows = rows_of(cells, output.results, len(requests), refused)
    output.finish({"requests": len(requests), "rows": rows})
    print_rows(rows, len(requests))
    if args.figure is not None:
        draw(rows, args)
    return 0


def draw(rows: list[dict], args: argparse.Namespace) -> None:
    """Raises InputError if nothing can be drawn."""
    if not lines_of(rows):
        raise InputError(f"--figure {args.figure}: no policy has a KL to draw; results are kept")
    save_policies(rows, Path(args.model_name).name, args.figure)


def measure(args, device: torch.device, requests: list[Request], cells: list[Cell], output: ResultsFile, todo: int):
    """Measure what is missing, and write each request as soon as it is done. Returns what presses could not do."""
    quiet_libraries()
    model, tokenizer = load_model(args.model_name, ANY_CACHE, device, args.dtype)
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError(f"--model-name {args.model_name}: is quantised; give a checkpoint with plain weights")
    prompts = tokenize(requests, tokenizer, model, args.model_name, args.chat)
    if args.chat:
        end_as_chats_do(model, tokenizer)
    warn_of_long_prompts(prompts, model.config.max_position_embeddings, h2o=None)
    output.start()
    comparison = Comparison(args, model, tokenizer, prompts, output)
    with tqdm(total=todo, unit="result", dynamic_ncols=True) as bar:
        try:
            for label in itertools.chain(
                comparison.texts_of_full_cache(),
                comparison.policies([cell for cell in cells if cell.h2o]),
                comparison.presses([cell for cell in cells if cell.press]),
            ):
                bar.set_postfix_str(label, refresh=False)
                bar.update()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"--device {args.device}: out of memory even with one request at once; use a device with more (results "
                "so far are kept)"
            ) from None
    return comparison.refused


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    return cli.run(lambda: run(parse_args(argv)), "results so far are kept; run the same command again to resume")


if __name__ == "__main__":
    sys.exit(main())
