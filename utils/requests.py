"""Request and result files, one JSON object a line, in the form of the H2O project's XSum and CNN/DailyMail files."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils.cli import NOT_TEXT, InputError, is_text

LONGEST_LINE = 16 * 2**20  # bytes; a request's line, some 4 million tokens long


@dataclass(frozen=True)
class Request:
    """One request. Fields missing from its line have these defaults, which decode greedily."""

    index: int  # among the requests read, from 0
    fields: dict  # the line as read
    article: str  # the whole prompt
    summary_gt: str  # the reference summary
    max_tokens: int = 64
    temperature: float = 0.0  # 0 decodes greedily
    top_p: float = 1.0
    n: int = 1  # choices; equal without sampling
    stop: tuple[str, ...] = ()

    @classmethod
    def from_line(cls, line: str | bytes, index: int) -> Request:
        """Raises ValueError with the reason for a bad line."""
        fields = json_object(line)
        for name in ("article", "summary_gt"):
            if not isinstance(fields.get(name), str) or not fields[name].strip():
                raise ValueError(f"has no text in {name!r}")
        return cls(index, fields, fields["article"], fields["summary_gt"], **checked(fields))


def checked(fields: dict, names: Iterable[str] = ()) -> dict:
    """The decoding fields of a line, checked and converted; of `names` or all. Absent and null ones are left out.

    Raises: ValueError with the field, its value and what it must be.
    """
    given = {name: fields[name] for name in names or _CHECKS if fields.get(name) is not None}
    for name, value in given.items():
        wanted, accepts = _CHECKS[name]
        if name in ("max_tokens", "n") and isinstance(value, float) and value.is_integer():
            value = int(value)  # spreadsheet programs write 12 as 12.0
        if isinstance(value, bool) or not accepts(value):
            raise ValueError(f"{name}={value!r:.60}: must be {wanted}")
        if name == "stop":
            value = (value,) if isinstance(value, str) else tuple(value)
        elif name in ("temperature", "top_p"):  # transformers rejects an int
            value = float(value)
        given[name] = value
    return given


MOST_TOKENS, MOST_CHOICES = 1_000_000, 1_000  # of a request; more is a mistake that would run for days

_CHECKS = {
    "max_tokens": (
        f"a whole number from 1 to {MOST_TOKENS:,}",
        lambda v: isinstance(v, int) and 1 <= v <= MOST_TOKENS,
    ),
    # Outside these bounds probabilities overflow or no longer depend on the model.
    "temperature": (
        "0 (greedy), or a number between 0.001 and 1000",
        lambda v: isinstance(v, int | float) and (v == 0 or 0.001 <= v <= 1000),
    ),
    "top_p": ("a number above 0, at most 1", lambda v: isinstance(v, int | float) and 0 < v <= 1),
    "n": (f"a whole number from 1 to {MOST_CHOICES:,}", lambda v: isinstance(v, int) and 1 <= v <= MOST_CHOICES),
    "stop": (
        "a string or a list of strings, none empty",
        lambda v: bool(v) if isinstance(v, str) else isinstance(v, list) and all(isinstance(s, str) and s for s in v),
    ),
}

# Fields of H2O's and HELM's files that need no action: with any value, or with these values.
_SAID_OF_ITSELF = ("article", "summary_gt", *_CHECKS, "id", "index", "model", "engine", "request_type")
_ASKS_NOTHING = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, True),  # also 0 and 1: of the emitted token
    "min_p": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "stream": (False,),
    "top_k": (-1, 0),
}


def unheeded(requests: list[Request]) -> str | None:
    """A warning about fields that ask for something unsupported, and how many requests have them; or None."""
    names, having = {}, 0
    for request in requests:
        found = [
            name
            for name, value in request.fields.items()
            if name not in _SAID_OF_ITSELF and value is not None and value not in _ASKS_NOTHING.get(name, ())
        ]
        having += bool(found)
        names |= dict.fromkeys(found)
    if not names:
        return None
    shown = ", ".join(" ".join(name.split())[:40] for name in list(names)[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"warning: fields that are not known are ignored: {shown}{more} (in {having} of {len(requests)} requests)"


def check_flags(**fields) -> None:
    """Raises InputError for flag values that no request may have; `fields` are named as in a request."""
    try:
        checked(fields)
    except ValueError as error:
        raise InputError(f"--{error}") from None


def request_line(fields: dict) -> str:
    """The line of a request. Raises ValueError if `read_requests` would refuse it."""
    line = json.dumps(fields) + "\n"
    if len(line) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE >> 20} MiB")
    Request.from_line(line, 0)
    return line


def json_object(line: str | bytes) -> dict:
    """The object on a line of JSON. Raises ValueError with the reason for a bad line."""
    fields = None
    try:
        text = line if isinstance(line, str) else line.decode("utf-8-sig")
        if "\0" not in text:  # NUL: UTF-16, or not text at all
            fields = json.loads(text)
            text = json.dumps(fields, ensure_ascii=False)  # a lone surrogate is valid JSON, but not text
    except UnicodeDecodeError:
        raise ValueError(NOT_TEXT) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({getattr(error, 'msg', error)})") from None
    if "\0" in text or not is_text(text):
        raise ValueError(NOT_TEXT)
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    try:
        json.dumps(fields, allow_nan=False)
    except ValueError:
        raise ValueError("holds NaN or an infinite number, which is not JSON") from None
    return fields


def read_lines(path: Path, flag: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, with their numbers. Raises InputError.

    `flag` is the flag that named the path, for messages.
    """
    try:
        with path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(LONGEST_LINE + 1)
                if not line:
                    return
                if len(line) > LONGEST_LINE:  # the file may have no end
                    raise InputError(
                        f"{flag} {path}, line {number}: longer than {LONGEST_LINE >> 20} MiB; "
                        "give a file with one JSON object a line"
                    )
                yield number, line
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read ({error.strerror})") from None


def read_text(path: Path, flag: str) -> str:
    """A whole file of at most LONGEST_LINE bytes. Raises InputError."""
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST_LINE + 1)
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read ({error.strerror})") from None
    if len(raw) > LONGEST_LINE:
        raise InputError(f"{flag} {path}: larger than {LONGEST_LINE >> 20} MiB; give a smaller file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{flag} {path}: {NOT_TEXT}; save it as UTF-8")
    return text


def read_requests(
    path: Path, skip_bad: bool | None = False, limit: int | None = None, flag: str = "--input-path"
) -> tuple[list[Request], int]:
    """The first `limit` requests of a jsonl file, and how many bad lines were skipped. Blank lines do not count.

    `skip_bad` is --skip_bad_requests, None if the command has no such flag. `flag` is the flag that named the path, for
    messages.

    Raises: InputError if the file cannot be read or has no requests, and for a bad line unless `skip_bad`.
    """
    requests, skipped = [], 0
    for number, raw in read_lines(path, flag):
        if not raw.strip():
            continue
        try:
            requests.append(Request.from_line(raw, len(requests)))
        except ValueError as error:
            if not skip_bad:
                way_out = "fix the line" if skip_bad is None else "fix the line, or pass --skip_bad_requests"
                raise InputError(f"{path}, line {number}: {error}; {way_out}") from None
            skipped += 1
        if len(requests) == limit:
            break
    if not requests:
        bad = f" ({skipped} bad lines skipped)" if skipped else ""
        raise InputError(f"{flag} {path}: holds no requests{bad}; scripts/prepare_data.py makes some")
    return requests, skipped


def must_know(model, name: str, largest: int) -> None:
    """Raises InputError where the checkpoint's tokenizer makes a token that the model does not know."""
    if largest >= (known := model.config.vocab_size):
        raise InputError(
            f"--model-name {name}: its tokenizer makes token {largest}, the model knows {known} tokens; "
            "they do not belong together"
        )


def fingerprint(requests: list[Request]) -> str:
    """SHA-256 over requests, to tell whether a file of results belongs to them."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(json.dumps(request.fields, sort_keys=True).encode())
    return digest.hexdigest()


def checkpoint_fingerprint(name: str | Path) -> str | None:
    """SHA-256 over what decides a checkpoint's texts: the files of a folder, or the commit of a name on the hub.

    Files are read whole up to 64 MiB, larger ones at 4,096 places: few enough to take seconds, and so many that each
    large matrix is met. None for a checkpoint of which nothing is on this machine.
    """
    folder, digest = Path(name), hashlib.sha256()
    try:
        if not folder.is_dir():
            return _commit_on_hub(str(name))
        for file in _files_of(folder):
            size = file.stat().st_size
            digest.update(os.fsencode(f"{file.relative_to(folder)} {size}\n"))
            with file.open("rb") as opened:
                if size <= 2**26:
                    digest.update(opened.read())
                    continue
                digest.update(opened.read(2**20))
                for place in range(4096):
                    opened.seek(place * (size - 2**12) // 4095)  # the last one ends with the file
                    digest.update(opened.read(2**12))
    except OSError:
        return None
    return digest.hexdigest()


def _files_of(folder: Path) -> list[Path]:
    """A checkpoint's files: weights, settings, tokenizer, chat template; and shards that an index names elsewhere."""
    # .jinja: the chat template; .txt: merges and vocabularies
    kinds = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt", ".tiktoken", ".distcp")
    files = {file for file in folder.iterdir() if file.suffix in kinds and file.is_file()}
    for index in folder.glob("*.index.json"):
        try:
            shards = json.loads(index.read_bytes())["weight_map"].values()
            files |= {file for shard in shards if (file := folder / shard).is_file()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # what loads the model says so
    return sorted(files)


def _commit_on_hub(name: str) -> str | None:
    from transformers.utils.hub import cached_file, extract_commit_hash  # takes seconds

    try:
        file = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return extract_commit_hash(file, None)


def to_json(value, **kwargs) -> str:
    """JSON of a value of dicts, lists and numbers; NaN and infinity, which JSON has no names for, are null.

    kwargs: json.dumps'.
    """
    try:
        return json.dumps(value, allow_nan=False, **kwargs)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **kwargs)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_entries(
    lines: Iterable[bytes], key: str, check: Callable[[dict], None] | None = None
) -> Iterator[tuple[dict, bytes]]:
    """Each entry of a jsonl, told apart by `key`, its first field, with its line.

    A last line that a crash cut short is left out; where it lacks its end of line alone, nothing of it is lost.

    Raises: ValueError for a line that is no entry, or that `check` raises one for.
    """
    opening = json.dumps({key: 0}).encode()[:-2]
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            hash(entry[key])
            if check is not None:
                check(entry)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            ours = number > 1 or line[: len(opening)] == opening[: len(line)]
            if ours and not line.endswith(b"\n"):
                return
            own = type(error) is ValueError  # what `check` says; others' words help nobody
            raise ValueError(f"line {number}{f' ({error})' if own else ''}") from None
        yield entry, line


class JsonlFile:
    """A jsonl of entries that grows by whole lines and survives a crash at any moment.

    Entries are appended and flushed as they come; a line that a crash cut short is dropped when the file is opened
    again. One run at a time writes it.

    Args:
        path: the file, at --output-path; its folder is made.
        key: the field that tells entries apart; `entries` holds the last line of each.
        form: what an entry is called in messages.
        source: the file of requests, which it may not be.
        also: other files that are written, or removed, beside it, under the same conditions.

    Raises: InputError when a path cannot be written, is in use, or is something else.
    """

    def __init__(self, path: Path, key: str, form: str, source: Path | None = None, also: Iterable[Path] = ()):
        self.path, self.key, self.form = path, key, form
        self.entries: dict = {}
        with self._writing():
            for written in (path, *also):
                self._must_be_ours(written, source)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            if not os.access(path.parent, os.W_OK):
                raise PermissionError(13, "the folder is not writable")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"--output-path {path}: another run is writing it; wait, or choose another path"
                ) from None

    @contextmanager
    def _writing(self, note: str = ""):
        try:
            yield
        except OSError as error:
            raise InputError(f"--output-path {self.path}: cannot be written ({error.strerror}){note}") from None

    def _must_be_ours(self, path: Path, source: Path | None) -> None:
        if not path.exists():
            return
        if not path.is_file():  # a device could not be replaced by a file
            raise InputError(f"--output-path {self.path}: {path} is not a regular file; choose another path")
        if source is not None and source.exists() and path.samefile(source):
            raise InputError(f"--output-path {self.path}: {path} is the --input-path; choose another path")

    def resume(self, keep: str, check: Callable[[dict], None] | None = None) -> None:
        """Read the entries that are there. Raises InputError, which ends in `keep`, for another file.

        `check` raises ValueError, with the reason, for what is no entry.
        """
        self._file.seek(0)
        end, line = 0, b"\n"
        try:
            for entry, line in read_entries(self._file, self.key, check):
                self.entries[entry[self.key]] = entry
                end += len(line)
        except ValueError as error:
            raise InputError(f"{self.path}, {error}: not a {self.form}; {keep}") from None
        with self._writing():
            self._file.truncate(end)
            if not line.endswith(b"\n"):
                self._file.write(b"\n")
                self._file.flush()

    def append(self, entry: dict) -> None:
        """Add one entry, in one write, and hand it to the operating system at once. Raises InputError."""
        with self._writing(f"; {self.form}s so far are kept, run the same command again to resume"):
            self._file.write(to_json(entry, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        self.entries[entry[self.key]] = entry

    def clear(self) -> None:
        """Raises InputError."""
        with self._writing():
            self._file.truncate(0)

    def close(self) -> None:
        self._file.close()


def part_path(path: Path, rank: int) -> Path:
    """Where another process than the first writes its results: one writer a file."""
    return path.with_name(f"{path.name}.part{rank}")


def parts_of(path: Path) -> list[Path]:
    """The parts that are there, as processes that have ended have left them."""
    named = re.compile(re.escape(path.name) + r"\.part[1-9]\d*")
    try:
        return sorted(beside for beside in path.parent.iterdir() if named.fullmatch(beside.name))
    except OSError:
        return []


KEEP = "choose another --output-path, or pass --overwrite"


class ResultsFile(JsonlFile):
    """A jsonl of results, and the metrics JSON beside it.

    `finish` puts the results into the order of the requests, by `index`, in one rename. Settings stand in the metrics
    file from `start` on, so that a run with other settings does not mix with these results. Other processes of a run
    write parts beside it; what they, or those of an earlier run, have left there is taken in by `absorb`.

    Args:
        path: the results; the metrics go beside it, with `.metrics.json` in the place of `.jsonl`.
        settings: what a resumed run must share, by command-line flag.
        overwrite: start anew whatever is there; it stays until `start`.
        source: the file of requests, which neither may be.

    Raises: InputError when a path cannot be written, is in use, or holds something else than results of `settings`.
    """

    def __init__(self, path: Path, settings: dict, overwrite: bool = False, source: Path | None = None):
        self.settings, self.overwrite = settings, overwrite
        self.metrics: dict = {}  # of a finished run
        self.metrics_path = path.parent / (path.name.removesuffix(".jsonl") + ".metrics.json")
        parts = parts_of(path)
        if parts and not overwrite and not path.exists():
            raise InputError(f"--output-path {path}: is not there, but its {parts[0].name} is; bring it back, {KEEP}")
        super().__init__(path, "index", "result", source, also=(self.metrics_path, *parts))
        if not overwrite and (parts or path.stat().st_size):
            self._resume()

    @property
    def results(self) -> dict[int, dict]:
        return self.entries

    def _resume(self) -> None:
        try:
            metrics = json.loads(self.metrics_path.read_text())
            before = dict(metrics.pop("settings"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"--output-path {self.path}: exists without its {self.metrics_path.name}; {KEEP}"
            ) from None
        for flag in before | self.settings:
            old, new = before.get(flag), self.settings.get(flag)
            if old != new:
                raise InputError(
                    f"{flag} is {new!r}, but {old!r} in the results at {self.path}: pass the same to go on, {KEEP}"
                )
        self.resume(KEEP)
        self.metrics = metrics
        self.absorb()

    def absorb(self) -> None:
        """Take the results of parts in, and remove these. Raises InputError, also where one is still being written."""
        for path in parts_of(self.path):
            part = JsonlFile(path, self.key, self.form)
            part.resume(KEEP)
            for index, entry in part.entries.items():
                if index not in self.entries:
                    self.append(entry)
            with self._writing():
                os.fsync(self._file.fileno())  # before the only other copy goes
                path.unlink()
            part.close()

    def start(self) -> None:
        """Before the first result: `overwrite` takes effect, and the settings are written. Raises InputError."""
        with self._writing():
            if self.overwrite:
                for part in parts_of(self.path):  # before the results: one that cannot be removed costs none
                    part.unlink()
                self.clear()
            self.write_metrics({})

    def finish(self, metrics: dict) -> None:
        """Order the results as the requests are, and write the final metrics. Raises InputError."""
        lines = (to_json(self.results[i], ensure_ascii=False) + "\n" for i in sorted(self.results))
        with self._writing("; results are kept, run the same command again to resume"):
            replace_file(self.path, lines)
            self.write_metrics(metrics)
        self.metrics = metrics
        self._file.close()

    def write_metrics(self, metrics: dict) -> None:
        replace_file(self.metrics_path, [to_json({"settings": self.settings} | metrics, indent=2) + "\n"])


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Write a file so that a reader, or a crash, finds the old or the new one whole."""
    path = path.resolve()  # a link stays one
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
