"""Stream conversations of any length through one cache, and print replies as they are generated.

    python scripts/run_streaming.py --enable_h2o_generation --enable_position_rolling --report out/stream.jsonl
    python scripts/run_streaming.py --input-path - --model-name meta-llama/Meta-Llama-3-8B-Instruct --chat \\
        --enable_h2o_generation --enable_position_rolling --num_window_length 2048

--input-path is a jsonl in MT-Bench's form (`turns`, a list), of prompts (`prompt`), or of this project's requests
(`article`, with `max_tokens` and `stop`). Pass - to chat on the standard input. One cache is kept across all turns, and
makes room for each turn before it is fed. Without --enable_h2o_generation, the full cache grows until memory
runs out; the script then reports how many tokens had passed.

--report writes a line for every --report_every tokens: perplexity of input tokens ("given") and of generated ones
("said"), mean milliseconds per token, memory (tensors on the GPU; without a GPU, the process) and slots. It also draws
them, next to the reports passed as --beside.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import torch
from tqdm import tqdm
from transformers import TextStreamer

from h2optimizer import H2OConfig
from h2optimizer.flags import DEMO_REQUESTS, add_cache_flags, add_model_flags, attention_backend, bundled, h2o_config
from h2optimizer.loading import (
    end_as_chats_do,
    eos_tokens,
    is_installed,
    load_model,
    must_know,
    quiet_libraries,
    render_chat,
    select_device,
)
from h2optimizer.streaming import Stream
from h2optimizer.texts import Stops, one_bos
from h2optimizer.utils.ablation import FULL, policy_name
from h2optimizer.utils.bench import print_table, synchronize
from h2optimizer.utils.cli import InputError, OneLineParser, count, output_file, seed
from h2optimizer.utils.memory import is_out_of_memory, peak_memory
from h2optimizer.utils.requests import LONGEST_LINE, check_flags, checked, json_object, read_lines, unheeded_fields
from h2optimizer.utils.results import to_json

GIVEN, SAID = "given", "said"
# Fields of a line that are read, that flags decide, or that ask for nothing: MT-Bench's, and those of requests.
HEEDED = (
    *("turns", "prompt", "article", "max_tokens", "stop", "temperature", "top_p", "question_id", "category"),
    *("reference", "summary_gt", "id", "index", "model", "engine", "request_type"),
)
PICTURES = (".png", ".svg")  # beside a report


@dataclass
class Turn:
    """An input text, and when the reply to it ends."""

    text: str
    max_tokens: int | None = None  # None: --max_tokens
    stop: tuple[str, ...] = ()
    opens: bool = False  # the first of a conversation


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--input-path",
        **bundled(DEMO_REQUESTS, "jsonl of turns, prompts or requests; -: standard input", "the bundled requests"),
    )
    add_model_flags(parser)
    add(
        "--max_tokens",
        type=count,
        default=128,
        help="the most tokens of a reply, unless its turn sets them (default: %(default)s)",
    )
    add(
        "--stream_tokens",
        type=count,
        help="repeat the input until this many tokens have passed (default: read it once)",
    )
    add("--temperature", type=float, default=0.0, help="sampling temperature; 0: greedy (default: %(default)s)")
    add("--top_p", type=float, default=1.0, help="nucleus sampling, at a temperature above 0 (default: %(default)s)")
    add("--seed", type=seed, default=42, help="seed for sampling (default: %(default)s)")
    add("--chat", action="store_true", help="wrap turns in the tokenizer's chat template, for instruct models")
    add("--quiet", action="store_true", help="print no text")
    add(
        "--report",
        type=output_file,
        help="jsonl of perplexity, ms per token and memory; figures beside it (default: none)",
    )
    add("--report_every", type=count, help="tokens per line of the report (default: 1 %% of --stream_tokens, or 1,000)")
    add("--overwrite", action="store_true", help="replace an existing report (default: stop with an error)")
    add("--beside", type=Path, nargs="+", default=[], help="other reports to draw in the same figure (default: none)")
    add_cache_flags(parser)
    args = parser.parse_args(argv)
    check_flags(temperature=args.temperature, top_p=args.top_p)
    if args.beside and args.report is None:
        parser.error("--beside needs --report; pass it too")
    if args.report is not None and args.report.suffix in PICTURES:
        parser.error(f"--report {args.report}: this name is for a figure; use one that ends in .jsonl")
    if args.input_path == "-" and args.stream_tokens:
        parser.error("--stream_tokens repeats a file; leave it out with --input-path -")
    return args


# Turns


def read_turns(path: Path) -> list[Turn]:
    """Raises InputError for a file, or a line, without turns."""
    turns, lines = [], []
    for number, line in read_lines(path, "--input-path"):
        if not line.strip():
            continue
        try:
            lines.append(json_object(line))
            turns += turns_of(lines[-1])
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}; fix the line") from None
    if not turns:
        raise InputError(f"--input-path {path}: holds no turns")
    if warning := unheeded_fields(lines, HEEDED, {"n": (1,)}):
        cli.say(warning)
    return turns


def turns_of(fields: dict) -> list[Turn]:
    """Raises ValueError with the reason for a bad line."""
    name = next((name for name in ("turns", "prompt", "article") if name in fields), None)
    if name is None:
        raise ValueError("has none of turns (a list), prompt, article")
    texts = fields[name] if name == "turns" else [fields[name]]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{name!r} must be {'a list of texts' if name == 'turns' else 'a text'}")
    asked = checked(fields, ("max_tokens", "stop"))
    return [Turn(text, **asked, opens=number == 0) for number, text in enumerate(texts)]


def typed_turns() -> Iterator[Turn]:
    """Lines of the standard input, until it ends or a line is /quit. Raises InputError if it is closed."""
    if sys.stdin is None:
        raise InputError("--input-path -: the standard input is closed; give a file")
    opens = True
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        raw = sys.stdin.buffer.readline(LONGEST_LINE + 1)
        if len(raw) > LONGEST_LINE:
            raise InputError(f"--input-path -: a line is longer than {LONGEST_LINE >> 20} MiB; give shorter turns")
        line = raw.decode(errors="replace")
        if opens:
            line = line.removeprefix("\ufeff")
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield Turn(line.rstrip("\r\n"), opens=opens)
            opens = False


class Wording:
    """The tokens of turns, as plain text or in the tokenizer's chat template.

    A later turn is what the template adds to a conversation of one turn and its reply, so no history is needed. A plain
    text that opens a conversation gets the tokenizer's BOS token.
    """

    USER, REPLY = "7f3a91c2", "e05bd846"  # text that no template changes or contains

    def __init__(self, tokenizer, model_name: str, chat: bool):
        self.tokenizer, self.chat, self.name = tokenizer, chat, model_name
        self.closing: list[int] = []  # what the template puts after a reply
        if chat:
            self.before = self._render([self.USER, self.REPLY])
            if self.REPLY not in self.before:
                raise InputError(f"--chat: the chat template of {model_name} rewrites replies; leave --chat out")
            self.closing = self._encode(self.before[self.before.rindex(self.REPLY) + len(self.REPLY) :])

    def tokens(self, turn: Turn, first: bool) -> list[int]:
        """Raises InputError if the template changes earlier turns."""
        if not self.chat:
            return one_bos(self.tokenizer(turn.text, add_special_tokens=turn.opens)["input_ids"], self.tokenizer)
        if first:
            return self._encode(self._render([turn.text]))
        text = self._render([self.USER, self.REPLY, turn.text])
        if not text.startswith(self.before):
            raise InputError(f"--chat: the chat template of {self.name} rewrites earlier turns; leave --chat out")
        return self._encode(text[len(self.before) :])

    def close(self, stream: Stream) -> list[int]:
        """The tokens between a reply and the next turn. A different end-of-sequence token is dropped."""
        if self.closing and stream.pending in stream.eos and stream.pending != self.closing[0]:
            stream.pending = None
        return self.closing[1:] if self.closing[:1] == [stream.pending] else self.closing

    def _render(self, texts: list[str]) -> str:
        return render_chat(self.tokenizer, texts, self.name)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


# What is measured


@dataclass
class Passed:
    """Input or generated tokens in a stretch of the stream, and sums over them."""

    tokens: int = 0
    nll: float = 0.0
    scored: int = 0  # tokens in `nll`
    seconds: float = 0.0
    timed: int = 0  # tokens computed in `seconds`; a reply's last token is fed with the next turn, as input

    def __add__(self, other: Passed) -> Passed:
        return Passed(*(getattr(self, of.name) + getattr(other, of.name) for of in fields(Passed)))


class Block:
    """What has passed in a stretch of the stream."""

    def __init__(self):
        self.of = {GIVEN: Passed(), SAID: Passed()}

    @property
    def tokens(self) -> int:
        return sum(passed.tokens for passed in self.of.values())

    def line(self, stream: Stream, passed: int) -> dict:
        """Leaves perplexity out if it is not finite: JSON has no NaN."""
        line = {"tokens": passed}
        for kind, of in self.of.items():
            line |= {kind: of.tokens, f"scored_{kind}": of.scored, f"timed_{kind}": of.timed}
            if of.scored and math.isfinite(of.nll):
                line[f"perplexity_{kind}"] = math.exp(min(of.nll / of.scored, 700.0))
            if of.timed:
                line[f"ms_{kind}"] = 1e3 * of.seconds / of.timed
        return line | {"memory_bytes": memory(stream.model.device), "kv_bytes": stream.kv_bytes, "slots": stream.slots}


def memory(device: torch.device) -> int:
    """Bytes held now: by tensors on the GPU, or by the process if there is none."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # only Linux tells
        return peak_memory(device)
    return pages * os.sysconf("SC_PAGE_SIZE")


class Report:
    """Writes a stream's figures line by line; holds one block of them at a time."""

    def __init__(self, path: Path | None, every: int, name: str, model: str, overwrite: bool = False):
        self.path, self.every, self.name, self.block, self._file = path, every, name, Block(), None
        self.passed, self.ended = 0, None  # tokens; why memory ended the stream, or None
        if path is not None:
            for file in (path, *pictures_of(path)):
                if file.exists() and not file.is_file():
                    raise InputError(f"--report {path}: {file} is not a regular file; choose another path")
                if file.exists() and not overwrite:
                    raise InputError(f"--report {path}: {file} exists; choose another path, or pass --overwrite")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("w" if overwrite else "x", encoding="utf-8")
            except OSError as error:
                raise InputError(f"--report {path}: cannot be written ({error.strerror})") from None
            self._write({"stream": name, "model": model})

    def add(self, stream: Stream, kind: str, passed: Passed) -> None:
        self.block.of[kind] += passed
        self.passed += passed.tokens
        if self.block.tokens >= self.every:
            self._write(self.block.line(stream, self.passed))
            self.block = Block()

    def end(self, stream: Stream) -> None:
        """Write the last block, and a line on what ended the stream."""
        if self.block.tokens:
            self._write(self.block.line(stream, self.passed))
        self._write({"ended": self.ended, "tokens": self.passed})

    def _write(self, line: dict) -> None:
        if self._file is None:
            return
        try:
            self._file.write(to_json(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"--report {self.path}: cannot be written ({error.strerror})") from None


def read_report(path: Path) -> tuple[str, list[dict], str | None]:
    """A report's model and name, its lines, and why its stream ended. Raises InputError."""
    try:
        head, *lines = [json_object(line) for _, line in read_lines(path, "--beside")]
        ended = lines.pop()["ended"] if lines and "ended" in lines[-1] else None
        needed = {"tokens", "memory_bytes", "slots"}
        if all(needed <= line.keys() and all(map(math.isfinite, line.values())) for line in lines):
            name = str(head["stream"])
            return f"{head['model']}: {name}" if "model" in head else name, lines, ended
        raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise InputError(f"--beside {path}: not a report of this script; leave it out") from None


def print_tenths(lines: list[dict]) -> None:
    """Print the stream's second tenth beside its last, to show what grows."""
    if len(lines) < 20:
        return
    tenth = len(lines) // 10
    parts = {"second tenth": lines[tenth : 2 * tenth], "last tenth": lines[-tenth:]}
    rows = [{"": name} | means(part) for name, part in parts.items()]
    rows.append({"": "ratio"} | {key: rows[1][key] / rows[0][key] for key in rows[0] if key and key in rows[1]})
    columns = {"": "", "perplexity_given": ".3f", "ms_given": ".3f", "ms_said": ".3f", "memory_MiB": ".1f"}
    print_table(rows, columns | {"slots": ".1f"})


def means(lines: list[dict]) -> dict[str, float]:
    """Means over a stretch of a report: per token where lines hold different numbers of them, else per line."""

    def mean(name: str, weight: str, of=float) -> float | None:
        total = sum(line[weight] for line in lines if name in line)
        return sum(of(line[name]) * line[weight] for line in lines if name in line) / total if total else None

    got = {name: mean(name, f"timed_{kind}") for name, kind in (("ms_given", GIVEN), ("ms_said", SAID))}
    nll = mean("perplexity_given", "scored_given", math.log)
    got["perplexity_given"] = None if nll is None else math.exp(nll)
    got = {name: value for name, value in got.items() if value is not None}
    got["memory_MiB"] = sum(line["memory_bytes"] for line in lines) / len(lines) / 2**20
    got["slots"] = sum(line["slots"] for line in lines) / len(lines)
    return got


def plot(path: Path, others: list[Path]) -> list[Path]:
    """Perplexity, milliseconds and memory against tokens, one line a report; PNG and SVG. Raises InputError."""
    import matplotlib

    reports = [read_report(of) for of in (path, *others)]
    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = {
        "perplexity of tokens given": ("perplexity_given", 1.0),
        "ms a token said": ("ms_said", 1.0),
        "ms a token given": ("ms_given", 1.0),
        "memory, MiB": ("memory_bytes", 2**-20),
    }
    figure, axes = pyplot.subplots(len(panels), sharex=True, figsize=(7.5, 8.5), layout="constrained")
    for number, (name, lines, ended) in enumerate(reports):
        label_of = textwrap.fill(name, 90)
        dashes, grey = ("-", "--", "-.", ":")[number % 4], ("0.0", "0.45", "0.3", "0.6")[number % 4]
        for axis, (label, (key, unit)) in zip(axes, panels.items(), strict=True):
            points = [(line["tokens"], unit * line[key]) for line in lines if key in line]
            if points:
                alone = "o" if len(points) == 1 else None  # of one point there is no line
                axis.plot(*zip(*points, strict=True), dashes, color=grey, linewidth=1.2, marker=alone, label=label_of)
                if ended:
                    axis.plot(*points[-1], "x", color=grey, markersize=8, markeredgewidth=2)
            axis.set_ylabel(label)
    for axis, (key, unit) in zip(axes, panels.values(), strict=True):
        values = [line[key] for _, lines, _ in reports for line in lines if key in line]
        if values and max(values) > 20 * min(values):
            axis.set_yscale("log")
        elif values:
            axis.set_ylim(0, 1.1 * max(values) * unit)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("tokens given and said" + (" (x: memory ran out)" if any(r[2] for r in reports) else ""))
    axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    handles, labels = axes[-1].get_legend_handles_labels()  # every report has memory
    columns = 2 if max(map(len, labels), default=0) <= 40 else 1
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    for picture in pictures_of(path):
        try:
            figure.savefig(picture, dpi=150)
        except OSError as error:
            raise InputError(f"--report: {picture} cannot be written ({error.strerror}); the report is kept") from None
    pyplot.close(figure)
    return pictures_of(path)


def pictures_of(report: Path) -> list[Path]:
    return [report.parent / (report.stem + suffix) for suffix in PICTURES]


# The stream


def stream_name(h2o: H2OConfig | None) -> str:
    """A cache in words, for legends."""
    if h2o is None:
        return FULL
    known = dataclasses.asdict(H2OConfig()) | {"position_rolling": h2o.position_rolling}
    name = f"{policy_name(dataclasses.asdict(h2o), known)}, window {h2o.window_length}, N = {h2o.update_interval}"
    return f"{name}, rolling" if h2o.position_rolling else name


class Printer(TextStreamer):
    """Prints a reply's words as they complete. The cost per word does not grow with the reply.

    Characters that may start one of the `stops` wait for the next ones. `end` prints the rest; `cut` prints the rest of
    a text that a stop string has ended.
    """

    KEPT = 32  # tokens, enough for the letters of a word

    def __init__(self, tokenizer, stops: Stops):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.stops, self.waiting, self.printed = stops, "", 0

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.token_cache) < 2 * self.KEPT:
            return
        text, kept = (self.tokenizer.decode(of, **self.decode_kwargs) for of in (self.token_cache, self._latest()))
        waiting = text[self.print_len :]
        if kept.endswith(waiting):  # forget what has been printed
            self.token_cache, self.print_len = self._latest(), len(kept) - len(waiting)

    def _latest(self) -> list[int]:
        return self.token_cache[-self.KEPT :]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.waiting += text
        shown = len(self.waiting) - (0 if stream_end else self.stops.held(self.waiting))
        print(self.waiting[:shown], end="\n" if stream_end else "", flush=True)
        self.waiting, self.printed = self.waiting[shown:], self.printed + shown

    def cut(self, text: str) -> None:
        print(text[self.printed :], flush=True)


class Talk:
    """Feeds turns to a stream and prints its replies."""

    def __init__(self, stream: Stream, tokenizer, wording: Wording, report: Report, args: argparse.Namespace):
        self.stream, self.tokenizer, self.wording, self.report, self.args = stream, tokenizer, wording, report, args
        self.warned = False

    def turn(self, turn: Turn) -> None:
        """Raises RuntimeError when memory runs out."""
        stream, tokens = self.stream, self.wording.tokens(turn, first=not self.stream.fed)
        if stream.fed:
            tokens = self.wording.close(stream) + tokens
        if not tokens:
            return
        must_know(stream.model, self.args.model_name, max(tokens))
        for piece in stream.pieces(tokens):
            begin, before = time.perf_counter(), stream.fed
            nll, scored = stream.feed(piece)
            synchronize()
            seconds = time.perf_counter() - begin
            self.report.add(stream, GIVEN, Passed(len(piece), nll, scored, seconds, stream.fed - before))
        self._warn()
        stops, said = Stops(self.tokenizer, turn.stop), []
        printer = None if self.args.quiet else Printer(self.tokenizer, stops)
        begin = time.perf_counter()
        for token, logprob in stream.say(turn.max_tokens or self.args.max_tokens):
            said.append(token)
            step = (time.perf_counter() - begin, 1) if len(said) > 1 else ()  # `feed` computed the first
            self.report.add(stream, SAID, Passed(1, -logprob, 1, *step))
            if not math.isfinite(logprob):
                raise InputError(
                    f"the model's logits are NaN in {str(stream.model.dtype).removeprefix('torch.')} after "
                    f"{self.report.passed} tokens; pass another --dtype"
                )
            if turn.stop and stops.said(said):
                if token not in stream.eos:
                    stream.pending = None  # not fed yet, and not meant to be
                break
            if printer is not None and token not in stream.eos:
                printer.put(torch.tensor([token]))  # prints what can no longer change
            begin = time.perf_counter()
        if printer is None:
            return
        if (stop := stops.first(said)) is not None:
            printer.cut(stop[0])
        else:
            printer.end()

    def _warn(self) -> None:
        positions, h2o = self.stream.model.config.max_position_embeddings, self.stream.h2o
        needs = self.stream.fed if h2o is None or not h2o.position_rolling else h2o.capacity
        if needs > positions and not self.warned:
            if h2o is not None and h2o.position_rolling:
                warning = f"window and interval need {needs} positions, the model has {positions}; set a smaller window"
            else:
                warning = f"the stream has passed the model's {positions} positions; pass --enable_position_rolling"
            tqdm.write(f"warning: {warning}, or expect poor text", file=sys.stderr)
            self.warned = True


def passing(turns: list[Turn], talk: Talk, tokens: int | None) -> Iterator[Turn]:
    """Yield the turns once, or repeat them until `tokens` have passed."""
    report = talk.report
    with tqdm(total=tokens, unit="token", dynamic_ncols=True, disable=not talk.args.quiet) as bar:
        while True:
            before = report.passed
            for turn in turns:
                if not talk.args.quiet:
                    print(f">>> {turn.text.strip()}", flush=True)
                yield turn
                bar.update(report.passed - bar.n)
                if tokens is not None and report.passed >= tokens:
                    return
            if tokens is None:
                return
            if report.passed == before:
                raise InputError(f"--input-path {talk.args.input_path}: no turn has any token in this tokenizer")


def run(args: argparse.Namespace) -> int:
    h2o = h2o_config(args, say=cli.say)
    device = select_device(args.device)
    attention_backend(h2o, device)
    turns = None if args.input_path == "-" else read_turns(Path(args.input_path))
    for other in args.beside:
        read_report(other)
    for flag, other in [("--input-path", Path(args.input_path)), *(("--beside", other) for other in args.beside)]:
        if args.report is not None and args.report.exists() and other.exists() and args.report.samefile(other):
            raise InputError(f"--report {args.report}: is also given as {flag}; choose another path")
    if args.report is not None and not is_installed("matplotlib"):
        raise InputError("--report needs matplotlib for its figures: pip install matplotlib, or leave it out")
    quiet_libraries()
    model, tokenizer = load_model(args.model_name, h2o, device, args.dtype)
    wording = Wording(tokenizer, args.model_name, args.chat)
    if args.chat:
        end_as_chats_do(model, tokenizer)
    every = args.report_every or (args.stream_tokens or 100_000) // 100 or 1
    report = Report(args.report, every, stream_name(h2o), Path(args.model_name).resolve().name, args.overwrite)
    stream = Stream(model, eos_tokens(model), args.temperature, args.top_p, args.seed)
    talk = Talk(stream, tokenizer, wording, report, args)
    try:
        follow(talk, typed_turns() if turns is None else passing(turns, talk, args.stream_tokens))
    except BaseException:
        with suppress(InputError):  # report the first failure only
            conclude(talk)
        raise
    conclude(talk)
    return 0


def follow(talk: Talk, turns: Iterator[Turn]) -> None:
    """Returns when memory runs out with the full cache. Raises InputError if it does with an H2O cache."""
    stream, report = talk.stream, talk.report
    try:
        for turn in turns:
            talk.turn(turn)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        held = f"{stream.kv_bytes / 2**20:,.0f} MiB of KV cache"
        report.ended = f"out of memory after {report.passed:,} tokens, with {held}"
        if stream.h2o is not None:
            way_out = "give a smaller window, --update_interval or --prefill_chunk"
            raise InputError(f"{report.ended}; {way_out}") from None
        cli.say(f"{report.name}: {report.ended}")


def conclude(talk: Talk) -> None:
    """Finish the report, print its table, draw its figures. Raises InputError if one cannot be written."""
    path = talk.args.report
    talk.report.end(talk.stream)
    if path is not None:
        lines = read_report(path)[1]
        print_tenths(lines)
        if lines:
            cli.say("figures: " + ", ".join(map(str, plot(path, talk.args.beside))))


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py; 0 also if the full cache ran out of memory."""
    kept = "the report so far is kept, if there is one"
    return cli.run(lambda: run(parse_args(argv)), kept, "give a smaller window")


if __name__ == "__main__":
    sys.exit(main())
