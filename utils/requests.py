"""Files of requests, one JSON object a line, in the form of the H2O project's XSum and CNN/DailyMail files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from h2optimizer.utils.cli import NOT_TEXT, InputError, is_text

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
    return unheeded_fields([request.fields for request in requests], _SAID_OF_ITSELF)


def unheeded_fields(lines: list[dict], heeded: tuple[str, ...], defaults: dict[str, tuple] | None = None) -> str | None:
    """As `unheeded`, for lines of which the `heeded` fields are read; `defaults`: values that ask for nothing."""
    names, having, asks_nothing = {}, 0, _ASKS_NOTHING | (defaults or {})
    for fields in lines:
        found = [
            name
            for name, value in fields.items()
            if name not in heeded and value is not None and value not in asks_nothing.get(name, ())
        ]
        having += bool(found)
        names |= dict.fromkeys(found)
    if not names:
        return None
    shown = ", ".join(" ".join(name.split())[:40] or repr(name) for name in list(names)[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"warning: unknown fields are ignored: {shown}{more} (in {having} of {len(lines)} requests)"


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
        raise ValueError("contains NaN or infinity, which JSON does not allow") from None
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
        raise InputError(f"{flag} {path}: has no requests{bad}; scripts/prepare_data.py makes some")
    return requests, skipped
