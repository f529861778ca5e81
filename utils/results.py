"""Files of results, one JSON object a line, that survive a crash at any moment; and what a resumed run must share."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from h2optimizer.utils.cli import InputError
from h2optimizer.utils.requests import Request

PLAN = "head_budgets.json"  # a plan beside a checkpoint: no part of it, and made for its fingerprint
SETTINGS = "h2o_config.json"  # the cache's settings beside a checkpoint: no part of it


def fingerprint(requests: list[Request]) -> str:
    """SHA-256 of the requests, to tell whether a file of results belongs to them."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(json.dumps(request.fields, sort_keys=True).encode())
    return digest.hexdigest()


def checkpoint_fingerprint(name: str | Path) -> str | None:
    """SHA-256 of what determines a checkpoint's texts: the files of a folder, a GGUF file, or the hub commit of a name.

    Files up to 64 MiB are read whole, larger ones at 4,096 places: that takes seconds and touches every large matrix.
    None if nothing of the checkpoint is on this machine.
    """
    folder, digest = Path(name), hashlib.sha256()
    try:
        if not os.path.exists(folder):
            return _commit_on_hub(str(name))
        for file in _files_of(folder) if folder.is_dir() else [folder]:
            size = file.stat().st_size
            digest.update(os.fsencode(f"{file.relative_to(folder)} {size}\n"))
            with file.open("rb") as opened:
                if size <= 2**26:
                    digest.update(opened.read())
                    continue
                digest.update(opened.read(2**20))
                for place in range(4096):
                    opened.seek(place * (size - 2**12) // 4095)  # the last place ends with the file
                    digest.update(opened.read(2**12))
    except OSError:
        return None
    return digest.hexdigest()


def _files_of(folder: Path) -> list[Path]:
    """A checkpoint's files: weights, settings, tokenizer, chat template, and shards that an index names elsewhere."""
    # .jinja: the chat template; .txt: merges and vocabularies
    kinds = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt", ".tiktoken", ".distcp")
    beside = (PLAN, SETTINGS, _named_plan(folder))
    files = {file for file in folder.iterdir() if file.suffix in kinds and file.is_file() and file.name not in beside}
    for index in folder.glob("*.index.json"):
        try:
            shards = json.loads(index.read_bytes())["weight_map"].values()
            files |= {file for shard in shards if (file := folder / shard).is_file()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # loading the model reports it
    return sorted(files)


def _named_plan(folder: Path) -> str | None:
    """The plan that the settings beside a checkpoint name, by hand."""
    try:
        return json.loads((folder / SETTINGS).read_bytes())["head_budgets"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # no settings, or bad ones, which their reader reports


def _commit_on_hub(name: str) -> str | None:
    from transformers.utils.hub import cached_file, extract_commit_hash  # takes seconds

    try:
        file = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return extract_commit_hash(file, None)


def to_json(value, **kwargs) -> str:
    """JSON of dicts, lists and numbers. NaN and infinity, which JSON cannot express, become null.

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
    """Each entry of a jsonl with its line. `key`, its first field, identifies an entry.

    A last line that a crash cut short is dropped. If only its newline is missing, the entry is kept.

    Raises: ValueError for a line that is not an entry, or that `check` rejects.
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
            own = type(error) is ValueError  # only the message of `check` helps the user
            raise ValueError(f"line {number}{f' ({error})' if own else ''}") from None
        yield entry, line


class JsonlFile:
    """A jsonl that grows by whole lines and survives a crash at any moment.

    Entries are appended and flushed as they come. When the file is opened again, a line that a crash cut short is
    dropped. Only one run at a time can write it.

    Args:
        path: the file, at --output-path; its folder is created.
        key: the field that identifies an entry; `entries` holds the last line of each.
        form: what an entry is called in messages.
        source: the file of requests, which must be another file.
        also: other files that are written or removed beside it, under the same conditions.

    Raises: InputError if a path cannot be written, is in use, or is not a regular file.
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
                    f"--output-path {path}: another run is writing to it; wait, or choose another path"
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
        """Read the existing entries. Raises InputError, ending in `keep`, if the file holds something else.

        `check` raises ValueError, with the reason, for a line that is not an entry.
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
        """Write and flush one entry. Raises InputError."""
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
    """The results file of a process other than the first: each file has one writer."""
    return path.with_name(f"{path.name}.part{rank}")


def parts_of(path: Path) -> list[Path]:
    """The existing parts, left by processes that have ended."""
    named = re.compile(re.escape(path.name) + r"\.part[1-9]\d*")
    try:
        return sorted(beside for beside in path.parent.iterdir() if named.fullmatch(beside.name))
    except OSError:
        return []


KEEP = "choose another --output-path, or pass --overwrite"


class ResultsFile(JsonlFile):
    """A jsonl of results, and the metrics JSON beside it.

    `finish` sorts the results by `index`, the order of the requests, in one rename. From `start` on, the metrics file
    holds the settings, so a run with other settings cannot mix in its results. Other processes of a run write parts
    beside the file; `absorb` merges these, and those of an earlier run.

    Args:
        path: the results; the metrics are beside it, with `.metrics.json` instead of `.jsonl`.
        settings: what a resumed run must have in common, by command-line flag.
        overwrite: replace existing results; they stay until `start`.
        source: the file of requests, which must be another file.
        check: raises ValueError, with the reason, for a line that is not a result of this run.

    Raises: InputError if a path cannot be written, is in use, or holds anything but results of `settings`.
    """

    def __init__(
        self,
        path: Path,
        settings: dict,
        overwrite: bool = False,
        source: Path | None = None,
        check: Callable[[dict], None] | None = None,
    ):
        self.settings = json.loads(to_json(settings))  # as a resumed run reads them: tuples are lists
        self.overwrite, self.check = overwrite, check
        self.metrics: dict = {}  # of a finished run
        self.metrics_path = path.parent / (path.name.removesuffix(".jsonl") + ".metrics.json")
        parts = parts_of(path)
        if parts and not overwrite and not path.exists():
            raise InputError(f"--output-path {path}: is missing, but its {parts[0].name} exists; restore it, {KEEP}")
        other = path.parent / (path.name.removesuffix(".jsonl") if path.suffix == ".jsonl" else f"{path.name}.jsonl")
        if os.path.isfile(other) and os.path.exists(self.metrics_path):  # of which names may be too long
            raise InputError(
                f"--output-path {path}: its {self.metrics_path.name} would replace that of {other.name}; choose "
                "another path"
            )
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
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(
                f"--output-path {self.path}: exists without its {self.metrics_path.name}; {KEEP}"
            ) from None
        for flag in before | self.settings:
            old, new = before.get(flag), self.settings.get(flag)
            if old != new and flag not in before:  # results of an earlier version
                raise InputError(f"{flag} is {new!r:.120}, of which the results at {self.path} say nothing: {KEEP}")
            if old != new and flag not in self.settings:
                raise InputError(f"{flag} is {old!r:.120} in the results at {self.path}, but no setting here: {KEEP}")
            if old != new:
                same = "pass the same value to resume, " if flag.startswith("--") else ""  # others cannot be passed
                raise InputError(
                    f"{flag} is {new!r:.120}, but {old!r:.120} in the results at {self.path}: {same}{KEEP}"
                )
        self.resume(KEEP, self.check)
        self.metrics = metrics
        self.absorb()

    def absorb(self) -> None:
        """Merge the results of parts and remove the parts. Raises InputError, also if one is still being written."""
        for path in parts_of(self.path):
            part = JsonlFile(path, self.key, self.form)
            part.resume(KEEP, self.check)
            for index, entry in part.entries.items():
                if index not in self.entries:
                    self.append(entry)
            with self._writing():
                os.fsync(self._file.fileno())  # before the only other copy is removed
                path.unlink()
            part.close()

    def start(self) -> None:
        """Call before the first result: applies `overwrite` and writes the settings. Raises InputError."""
        with self._writing():
            if self.overwrite:
                for part in parts_of(self.path):  # before the results: if one cannot be removed, none are lost
                    part.unlink()
                self.clear()
            self.write_metrics({})

    def finish(self, metrics: dict) -> None:
        """Sort the results like the requests and write the final metrics. Raises InputError."""
        lines = (to_json(self.results[i], ensure_ascii=False) + "\n" for i in sorted(self.results))
        with self._writing("; results are kept, run the same command again to resume"):
            replace_file(self.path, lines)
            self.write_metrics(metrics)
        self.metrics = metrics
        self._file.close()

    def write_metrics(self, metrics: dict) -> None:
        replace_file(self.metrics_path, [to_json({"settings": self.settings} | metrics, indent=2) + "\n"])


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Replace a file atomically: a reader, or a crash, finds either the old file or the new one."""
    path = path.resolve()  # a link stays a link
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
