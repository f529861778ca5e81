"""Stream conversations through one cache without end: prompts are fed, replies printed as they come.

    python scripts/run_streaming.py --enable_h2o_generation --enable_position_rolling --report out/stream.jsonl
    python scripts/run_streaming.py --input-path - --model-name meta-llama/Meta-Llama-3-8B-Instruct --chat \\
        --enable_h2o_generation --enable_position_rolling --num_window_length 2048

--input-path is a jsonl of MT-Bench's form (`turns`, a list), of prompts (`prompt`), or of this project's requests
(`article`, with its `max_tokens` and `stop`), or - for a chat on the standard input. One cache is kept across all
turns; room for each is made before it is fed. Without --enable_h2o_generation the cache is stock Llama's full one,
which grows until memory ends: that is caught, and said with what had passed by then.

--report writes a line for every --report_every tokens: perplexity of the tokens given (each after what the cache held)
and of those said, milliseconds a token, memory and slots; and draws them, --beside other reports.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count as numbers
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TextStreamer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.batching import is_out_of_memory
from h2optimizer.streaming import Stream
from run_summarization import (
    DEMO_REQUESTS,
    add_cache_flags,
    add_model_flags,
    attention_backend,
    end_as_chats_do,
    h2o_config,
    load_model,
    peak_memory,
    quiet_libraries,
    render_chat,
    says_stop,
    seed,
    select_device,
)
from utils.bench import exit_status, print_table, synchronize
from utils.requests import InputError, OneLineParser, count, must_know

GIVEN, SAID = "given", "said"
PICTURES = (".png", ".svg")  # beside a report


@dataclass
class Turn:
    """What is given, and how the reply to it ends."""

    text: str
    max_tokens: int | None = None  # --max_tokens unless given
    stop: tuple[str, ...] = ()
    opens: bool = False  # the first of a conversation


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--input-path", default=str(DEMO_REQUESTS), help="jsonl of turns, prompts or requests; - = standard input")
    add_model_flags(parser)
    add("--max_tokens", type=count, default=128, help="of a reply, where its turn does not say (%(default)s)")
    add("--stream_tokens", type=count, help="go round the input until so many tokens were given and said; once unless")
    add("--temperature", type=float, default=0.0, help="0 = greedy (%(default)s)")
    add("--top_p", type=float, default=1.0, help="nucleus of a temperature above 0 (%(default)s)")
    add("--seed", type=seed, default=42, help="seed of sampling")
    add("--chat", action="store_true", help="wrap turns in the tokenizer's chat template, for instruct models")
    add("--quiet", action="store_true", help="print no text")
    add("--report", type=Path, help="perplexity, ms a token and memory along the stream, jsonl; plots beside it")
    add("--report_every", type=count, help="tokens of a line of it; 1 %% of --stream_tokens, or 1,000")
    add("--overwrite", action="store_true", help="replace the report that is there")
    add("--beside", type=Path, nargs="+", default=[], help="other reports to draw in the same figure")
    add_cache_flags(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.temperature <= 1000:
        parser.error(f"--temperature {args.temperature}: must lie between 0 and 1000")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top_p {args.top_p}: must be above 0, at most 1")
    if args.beside and args.report is None:
        parser.error("--beside: is drawn with --report; give that")
    if args.report is not None and args.report.suffix in PICTURES:
        parser.error(f"--report {args.report}: is where a figure goes; end it in .jsonl")
    if args.input_path == "-" and args.stream_tokens:
        parser.error("--stream_tokens goes round a file; leave it out with --input-path -")
    return args


# Turns


def read_turns(path: Path) -> list[Turn]:
    """Raises InputError for a file, or a line, without turns."""
    turns = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"--input-path {path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)}); mend it") from None
        turns += turns_of(fields, f"{path}, line {number}")
    if not turns:
        raise InputError(f"--input-path {path}: holds no turns")
    return turns


def turns_of(fields, where: str) -> list[Turn]:
    if not isinstance(fields, dict):
        raise InputError(f"{where}: not a JSON object; mend it")
    name = next((name for name in ("turns", "prompt", "article") if name in fields), None)
    if name is None:
        raise InputError(f"{where}: has none of turns (a list), prompt, article; mend it")
    texts = fields[name] if name == "turns" else [fields[name]]
    if not isinstance(texts, list) or not texts or not all(map(is_text, texts)):
        raise InputError(f"{where}: {name!r} must be {'a list of texts' if name == 'turns' else 'a text'}; mend it")
    stop, most = fields.get("stop") or [], fields.get("max_tokens")
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise InputError(f"{where}: 'stop' must be a string or a list of strings, none empty; mend it")
    if most is not None and (type(most) is not int or most < 1):
        raise InputError(f"{where}: 'max_tokens' must be a whole number of at least 1; mend it")
    return [Turn(text, most, tuple(stop), opens=number == 0) for number, text in enumerate(texts)]


def is_text(value) -> bool:
    """Whether it is a string of something, with no half of a surrogate pair, which is JSON but no text."""
    return isinstance(value, str) and bool(value.strip()) and value.encode(errors="ignore").decode() == value


def typed_turns() -> Iterator[Turn]:
    """Lines of the standard input, until it ends or says /quit. Raises InputError where there is none."""
    if sys.stdin is None:
        raise InputError("--input-path -: the standard input is closed; give a file")
    for number in numbers():
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline().decode(errors="replace")
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield Turn(line.rstrip("\n"), opens=number == 0)


class Wording:
    """The tokens of turns: as they stand, or in the tokenizer's chat template.

    A later turn is what the template adds to a conversation of one turn and its reply, so that no history is needed.
    As they stand, texts that open a conversation get the tokens that the tokenizer puts before a text (BOS).
    """

    USER, REPLY = "7f3a91c2", "e05bd846"  # nothing that a template would change or say itself

    def __init__(self, tokenizer, model_name: str, chat: bool):
        self.tokenizer, self.chat, self.name = tokenizer, chat, model_name
        self.closing: list[int] = []  # what the template puts after a reply
        if chat:
            self.before = self._render([self.USER, self.REPLY])
            if self.REPLY not in self.before:
                raise InputError(f"--chat: the chat template of {model_name} rewrites what was said; leave it out")
            self.closing = self._encode(self.before[self.before.rindex(self.REPLY) + len(self.REPLY) :])

    def tokens(self, turn: Turn, first: bool) -> list[int]:
        """Raises InputError where the template does not go on from where it was."""
        if not self.chat:
            return self.tokenizer(turn.text, add_special_tokens=turn.opens)["input_ids"]
        if first:
            return self._encode(self._render([turn.text]))
        text = self._render([self.USER, self.REPLY, turn.text])
        if not text.startswith(self.before):
            raise InputError(f"--chat: the chat template of {self.name} rewrites earlier turns; leave it out")
        return self._encode(text[len(self.before) :])

    def close(self, pending: int | None) -> list[int]:
        """What follows a reply's last token, None where it was taken away, before the next turn."""
        return self.closing[1:] if self.closing[:1] == [pending] else self.closing

    def _render(self, texts: list[str]) -> str:
        return render_chat(self.tokenizer, texts, self.name)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


# What is measured


@dataclass
class Block:
    """Sums over a stretch of the stream."""

    tokens: dict[str, int] = field(default_factory=lambda: {GIVEN: 0, SAID: 0})
    nll: dict[str, float] = field(default_factory=lambda: {GIVEN: 0.0, SAID: 0.0})
    scored: dict[str, int] = field(default_factory=lambda: {GIVEN: 0, SAID: 0})
    seconds: dict[str, float] = field(default_factory=lambda: {GIVEN: 0.0, SAID: 0.0})

    def add(self, kind: str, tokens: int, nll: float, scored: int, seconds: float) -> None:
        for of, value in ((self.tokens, tokens), (self.nll, nll), (self.scored, scored), (self.seconds, seconds)):
            of[kind] += value

    def line(self, stream: Stream, passed: int) -> dict:
        line = {"tokens": passed}
        for kind in (GIVEN, SAID):
            line[kind] = self.tokens[kind]
            if self.scored[kind]:
                line[f"perplexity_{kind}"] = math.exp(min(self.nll[kind] / self.scored[kind], 700.0))
            if self.tokens[kind]:
                line[f"ms_{kind}"] = 1e3 * self.seconds[kind] / self.tokens[kind]
        return line | {"memory_bytes": memory(stream.model.device), "kv_bytes": stream.kv_bytes, "slots": stream.slots}


def memory(device: torch.device) -> int:
    """Bytes held now: tensors on the GPU, or without one what the process has in memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # only Linux tells
        return peak_memory(device)
    return pages * os.sysconf("SC_PAGE_SIZE")


class Report:
    """Lines of a stream's figures, written as they come; no more than one block of them is kept."""

    def __init__(self, path: Path | None, every: int, name: str, overwrite: bool = False):
        self.path, self.every, self.block, self.passed, self._file = path, every, Block(), 0, None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("w" if overwrite else "x", encoding="utf-8")
            except FileExistsError:
                raise InputError(
                    f"--report {path}: is there already; choose another path, or pass --overwrite"
                ) from None
            except OSError as error:
                raise InputError(f"--report {path}: cannot be written ({error.strerror})") from None
            self._write({"stream": name})

    def add(self, stream: Stream, kind: str, tokens: int, nll: float, scored: int, seconds: float) -> None:
        self.block.add(kind, tokens, nll, scored, seconds)
        self.passed += tokens
        if sum(self.block.tokens.values()) >= self.every:
            self._write(self.block.line(stream, self.passed))
            self.block = Block()

    def end(self, stream: Stream, why: str | None) -> None:
        """The last block, and a line on what ended the stream: memory, or None."""
        if any(self.block.tokens.values()):
            self._write(self.block.line(stream, self.passed))
        self._write({"ended": why, "tokens": self.passed})

    def _write(self, line: dict) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"--report {self.path}: cannot be written ({error.strerror})") from None


def read_report(path: Path) -> tuple[str, list[dict], str | None]:
    """A report's name, its lines, and why its stream ended. Raises InputError."""
    try:
        name, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        ended = lines.pop()["ended"] if lines and "ended" in lines[-1] else None
        if all({"tokens", "memory_bytes", "slots"} <= line.keys() for line in lines):
            return name["stream"], lines, ended
        raise ValueError
    except OSError as error:
        raise InputError(f"--beside {path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--beside {path}: not a report of this script; leave it out") from None


def print_tenths(lines: list[dict]) -> None:
    """The stream's second tenth beside its last: what grows, and what does not."""
    if len(lines) < 20:
        return
    tenth = len(lines) // 10
    parts = {"second tenth": lines[tenth : 2 * tenth], "last tenth": lines[-tenth:]}
    rows = [{"": name} | means(part) for name, part in parts.items()]
    rows.append({"": "ratio"} | {key: rows[1][key] / rows[0][key] for key in rows[0] if key and key in rows[1]})
    columns = {"": "", "perplexity": ".3f", "ms_given": ".3f", "ms_said": ".3f", "memory_MiB": ".1f", "slots": ".1f"}
    print_table(rows, columns)


def means(lines: list[dict]) -> dict[str, float]:
    """Of a stretch of a report: by token where tokens differ, else by line."""
    got = {}
    for name, weight in (("ms_given", GIVEN), ("ms_said", SAID)):
        if total := sum(line[weight] for line in lines if name in line):
            got[name] = sum(line[name] * line[weight] for line in lines if name in line) / total
    if total := sum(line[GIVEN] for line in lines if "perplexity_given" in line):
        nll = sum(math.log(line["perplexity_given"]) * line[GIVEN] for line in lines if "perplexity_given" in line)
        got["perplexity"] = math.exp(nll / total)
    got["memory_MiB"] = sum(line["memory_bytes"] for line in lines) / len(lines) / 2**20
    got["slots"] = sum(line["slots"] for line in lines) / len(lines)
    return got


def plot(path: Path, others: list[Path]) -> list[Path]:
    """Perplexity, milliseconds and memory against tokens, one line a report; PNG and SVG. Raises InputError."""
    reports = [read_report(of) for of in (path, *others)]
    try:
        import matplotlib
    except ImportError:
        raise InputError("--report: the figures need matplotlib: pip install matplotlib; the report is kept") from None
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
        dashes, grey = ("-", "--", "-.", ":")[number % 4], ("0.0", "0.45", "0.3", "0.6")[number % 4]
        for axis, (label, (key, unit)) in zip(axes, panels.items(), strict=True):
            points = [(line["tokens"], unit * line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), dashes, color=grey, linewidth=1.2, label=name)
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
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    pictures = [path.with_suffix(suffix) for suffix in PICTURES]
    for picture in pictures:
        figure.savefig(picture, dpi=150)
    pyplot.close(figure)
    return pictures


# The stream


class Talk:
    """Feeds turns to a stream and prints what it says."""

    def __init__(self, stream: Stream, tokenizer, wording: Wording, report: Report, args: argparse.Namespace):
        self.stream, self.tokenizer, self.wording, self.report, self.args = stream, tokenizer, wording, report, args
        self.streamer = None if args.quiet else TextStreamer(tokenizer, skip_special_tokens=True)
        self.warned = False

    def turn(self, turn: Turn) -> None:
        """Raises RuntimeError when memory runs out."""
        stream, tokens = self.stream, self.wording.tokens(turn, first=not self.stream.fed)
        if stream.fed:
            tokens = self.wording.close(stream.pending) + tokens
        if not tokens:
            return
        must_know(stream.model, self.args.model_name, max(tokens))
        begin = time.perf_counter()
        nll, scored = stream.feed(tokens)
        synchronize()
        self.report.add(stream, GIVEN, len(tokens), nll, scored, time.perf_counter() - begin)
        self._warn()
        said: list[int] = []
        begin = time.perf_counter()
        for token, logprob in stream.say(turn.max_tokens or self.args.max_tokens):
            said.append(token)
            now = time.perf_counter()
            self.report.add(stream, SAID, 1, -logprob, 1, now - begin)
            if self.streamer is not None and token not in stream.eos:
                self.streamer.put(torch.tensor([token]))  # prints what can no longer change
            begin = time.perf_counter()
            if turn.stop and says_stop(self.tokenizer, turn.stop, said):
                stream.pending = None  # not fed yet, and not meant to be
                break
        if self.streamer is not None:
            self.streamer.end()

    def _warn(self) -> None:
        positions, h2o = self.stream.model.config.max_position_embeddings, self.stream.h2o
        needs = self.stream.fed if h2o is None or not h2o.position_rolling else h2o.capacity
        if needs > positions and not self.warned:
            way_out = "a smaller window" if h2o is not None and h2o.position_rolling else "--enable_position_rolling"
            warning = f"the stream has passed the model's {positions} positions; expect poor text without {way_out}"
            tqdm.write(f"warning: {warning}", file=sys.stderr)
            self.warned = True


def passing(turns: list[Turn], talk: Talk, tokens: int | None) -> Iterator[Turn]:
    """Turns, round and round until so many tokens have passed, or once."""
    report = talk.report
    with tqdm(total=tokens, unit="token", dynamic_ncols=True, disable=not talk.args.quiet) as bar:
        while True:
            for turn in turns:
                if not talk.args.quiet:
                    print(f">>> {turn.text.strip()}")
                yield turn
                bar.update(report.passed - bar.n)
                if tokens is not None and report.passed >= tokens:
                    return
            if tokens is None:
                return


def run(args: argparse.Namespace) -> int:
    h2o = h2o_config(args)
    device = select_device(args.device)
    attention_backend(h2o, device)
    turns = None if args.input_path == "-" else read_turns(Path(args.input_path))
    for other in args.beside:
        read_report(other)
    quiet_libraries()
    model, tokenizer = load_model(args, h2o, device)
    wording = Wording(tokenizer, args.model_name, args.chat)
    if args.chat:
        end_as_chats_do(model, tokenizer)
    eos = model.generation_config.eos_token_id
    eos = set(eos if isinstance(eos, list) else [eos]) - {None}
    every = args.report_every or (args.stream_tokens or 100_000) // 100 or 1
    name = "full cache" if h2o is None else f"window {h2o.window_length}, N = {h2o.update_interval}"
    name += ", rolling" if h2o is not None and h2o.position_rolling else ""
    report = Report(args.report, every, name, args.overwrite)
    stream = Stream(model, eos, args.temperature, args.top_p, args.seed)
    talk = Talk(stream, tokenizer, wording, report, args)
    ended = None
    try:
        for turn in typed_turns() if turns is None else passing(turns, talk, args.stream_tokens):
            talk.turn(turn)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        ended = f"out of memory after {report.passed:,} tokens, with {stream.kv_bytes / 2**20:,.0f} MiB of KV cache"
        if h2o is not None:
            raise InputError(f"{ended}; give a smaller window, or a --prefill_chunk") from None
        print(f"{name}: {ended}", file=sys.stderr)
    finally:
        report.end(stream, ended)
        if args.report is not None:
            lines = read_report(args.report)[1]
            print_tenths(lines)
            if lines:
                print("figures: " + ", ".join(map(str, plot(args.report, args.beside))), file=sys.stderr)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, also where memory ended the full cache; 2 after one line about what can be put right."""
    kept = "the report up to here is kept, where one was asked for"
    try:
        return exit_status(lambda: run(parse_args(argv)), "give a smaller window", kept)
    except BrokenPipeError:  # whoever read the text has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
