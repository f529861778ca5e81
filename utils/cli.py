"""What every program shares: flags, one-line errors, closed pipes, full disks, Ctrl-C and SIGTERM.

A program calls `begin` before it imports anything slow, and does its work through `run`. Its exit status is

    0    the work is done
    1    a benchmark found a wrong result
    2    one line on stderr says what the user can fix
    130  Ctrl-C
    141  the reader of the standard output is gone; nothing is printed
    143  SIGTERM, otherwise handled like Ctrl-C

If stderr cannot be written, messages and progress bars are dropped and the work continues.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

INPUT_ERROR, INTERRUPTED, CLOSED_PIPE, TERMINATED = 2, 128 + signal.SIGINT, 128 + signal.SIGPIPE, 128 + signal.SIGTERM
STOPPING = (signal.SIGINT, signal.SIGTERM)
TWICE = 1.0  # seconds in which a repeated signal counts once: timeout and torchrun send theirs twice

NOT_TEXT = "is not valid UTF-8 text"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".lzma", ".zip", ".7z", ".br")
LONGEST_NAME = 200  # bytes of an output's name; most file systems allow 255, and longer names are derived from it
LARGEST_COUNT = 10**12


class InputError(Exception):
    """Bad input. The message is one line: the file, line or flag, the problem, and the way out."""


class ClosedPipe(Exception):
    """The reader of the standard output is gone."""


class Terminated(KeyboardInterrupt):
    """SIGTERM was received."""


# Flags


class OneLineParser(argparse.ArgumentParser):
    """Raises InputError where argparse would print its usage and exit.

    `-` and `_` are equivalent in flags, and the error for an unknown flag suggests the nearest one.
    """

    def __init__(self, **kwargs):
        super().__init__(**{"allow_abbrev": False} | kwargs)

    def error(self, message: str):
        raise InputError(f"{message} (see --help)")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized argument {unknown[0]}")
        return parsed

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for arg in args:
            if not is_text(arg):
                self.error(f"argument {arg}: {NOT_TEXT}")
        return super().parse_known_args([self._as_registered(arg) for arg in args], namespace)

    def _as_registered(self, arg: str) -> str:
        flag, *value = arg.split("=", 1)
        if len(flag) < 3 or flag[0] != "-" or " " in flag or _is_number(flag):
            return arg  # a value, or a flag of one letter
        registered = {_plain(option): option for option in self._option_string_actions if len(option) > 2}
        if flag.startswith("--") and _plain(flag) in registered:
            return "=".join([registered[_plain(flag)], *value])
        nearest = difflib.get_close_matches(_plain(flag), registered, 1)
        self.error(f"unrecognized argument {flag}{f'; did you mean {registered[nearest[0]]}?' if nearest else ''}")


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_text(text: str) -> bool:
    """Whether the text has no lone surrogate, which stands for a byte that is not UTF-8."""
    return text.encode(errors="ignore").decode() == text


def _whole(text: str, least: int) -> int:
    if not (text.isdecimal() and len(text) <= 100 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text[:100]!r}: must be a whole number of at least {least}")
    if int(text) > LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at most {LARGEST_COUNT:,}")
    return int(text)


def count(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    return _whole(text, 1)


def count_or_zero(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    return _whole(text, 0)


def count_or_auto(text: str) -> int | str:
    """An argparse type: a count, or "auto"."""
    try:
        return text if text == "auto" else count(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or auto") from None


def count_or_all(text: str) -> int | None:
    """An argparse type: a count, or None for "all"."""
    try:
        return None if text == "all" else count(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or all") from None


def number_or_share(text: str) -> int | str:
    """An argparse type: a whole number, or a share such as 31/32."""
    try:
        return int(text)
    except ValueError:
        return text  # H2OConfig says what is wrong with it


def counts(text: str) -> list[int]:
    """An argparse type: 1,256 is [1, 256]; "" is []."""
    return [count(part) for part in text.split(",")] if text else []


def counts_or_zeros(text: str) -> list[int]:
    """An argparse type: 0,256 is [0, 256]."""
    return [count_or_zero(part) for part in text.split(",")]


def sizes(*names: str) -> Callable[[str], list[tuple[int, ...]]]:
    """An argparse type: with names "batch" and "slots", 1x1024,32x1024 is [(1, 1024), (32, 1024)]; "" is []."""

    def parse(text: str) -> list[tuple[int, ...]]:
        try:
            parsed = [tuple(map(count, part.split("x"))) for part in text.split(",")] if text else []
        except argparse.ArgumentTypeError:
            parsed = [()]
        if not all(len(part) == len(names) for part in parsed):
            form = "x".join(names)
            raise argparse.ArgumentTypeError(f"{text!r}: must be {form},{form},… in whole numbers of at least 1")
        return parsed

    return parse


def seed(text: str) -> int:
    """An argparse type: a seed that every random generator accepts."""
    if not (text.isdecimal() and len(text) <= 10 and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"{text[:100]!r}: must be a whole number between 0 and {2**32 - 1}")
    return int(text)


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    if not (_is_number(text) and 0 < float(text) < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return float(text)


def output_file(text: str) -> Path:
    """An argparse type: a path for a regular file, checked without writing."""
    path, problem = Path(text), None
    if not text or text.endswith("/") or path.name in ("", "..") or os.path.isdir(path):
        problem = "is a folder, not a regular file; name a file"
    elif os.path.exists(path) and not os.path.isfile(path):
        problem = "is not a regular file; choose another path"
    return _output(text, problem)


def output_folder(text: str) -> Path:
    """An argparse type: a path for a folder, checked without creating it."""
    problem = None
    if not text or (os.path.exists(text) and not os.path.isdir(text)):
        problem = "is not a folder; choose another path"
    return _output(text, problem)


def _output(text: str, problem: str | None) -> Path:
    path = Path(text)
    top = Path(os.path.abspath(path)).parts[:3]
    if problem is None and top[1:2] in (("dev",), ("proc",), ("sys",)) and top[2:] != ("shm",):
        problem = f"is in /{top[1]}, which does not hold regular files; choose another path"
    elif problem is None and path.suffix.lower() in COMPRESSED:
        problem = f"would not be compressed; leave out {path.suffix}"
    elif problem is None and len(os.fsencode(path.name)) > LONGEST_NAME:
        problem = f"has a name of more than {LONGEST_NAME} bytes; choose a shorter one"
    if problem is not None:
        raise argparse.ArgumentTypeError(f"{text or repr(text)} {problem}")
    return path


# Messages


def one_line(text: str) -> str:
    """Escape characters that would break the line: a newline in a path becomes \\n."""
    return "".join(
        letter if letter.isprintable() or letter == "\xa0" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def say(text: str) -> None:
    """Print one line on stderr."""
    print(one_line(text), file=sys.stderr, flush=True)


def status_of(error: BaseException) -> int:
    """The exit status of a program that ends with this error."""
    if isinstance(error, KeyboardInterrupt):
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    return CLOSED_PIPE if isinstance(error, ClosedPipe) else INPUT_ERROR


def report(error: BaseException, interrupted: str | None = None) -> None:
    """Print one line for the error that ends a program; nothing for a closed pipe.

    `interrupted` is the message for Ctrl-C and SIGTERM, if the exception has none; None prints nothing.
    """
    if isinstance(error, InputError):
        say(f"error: {error}")
    elif isinstance(error, KeyboardInterrupt) and interrupted is not None:
        say(f"interrupted: {str(error) or interrupted}")


# Running


def begin() -> None:
    """Call before slow imports, while no work can be lost: Ctrl-C and SIGTERM end the program at once, in one line."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # else a results file could get the number of stderr, which libraries print to
            os.open(os.devnull, os.O_RDWR)

    def leave(signum: int, frame) -> None:
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, b"interrupted\n")
        os._exit(128 + signum)

    for signum in _heard():
        signal.signal(signum, leave)


def run(
    work: Callable[[], int | None],
    interrupted: str | None,
    out_of_memory: str = "use a device with more",
    leave: Callable[[int], int] = int,
) -> int:
    """Do a program's work. Returns the exit status, after at most one line on stderr.

    Args:
        work: returns 0 or None, or 1 if a benchmark found a wrong result.
        interrupted: the message after Ctrl-C and SIGTERM; None in a process that prints nothing.
        out_of_memory: the way out if memory runs out.
        leave: turns a failure's exit status into the program's, see `Processes.leave`.
    """
    with _guarded_streams(), _signals_raised() as ignore_signals:

        def ended_by(problem: BaseException) -> int:
            ignore_signals()  # so that none interrupts the last line
            report(problem, interrupted)
            with suppress(InputError, ClosedPipe):
                sys.stdout.flush()
            return leave(status_of(problem))

        try:
            return _flushed(work)
        # reported there: a live name for the exception would keep all frames alive, and the files in them locked
        except (InputError, ClosedPipe, KeyboardInterrupt) as error:
            return ended_by(error)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            return ended_by(InputError(f"too little memory on the device: {out_of_memory}"))


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # not imported here: that takes seconds
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _flushed(work: Callable[[], int | None]) -> int:
    """Flush here: a failed write at the interpreter's exit would print a traceback."""
    try:
        status = work() or 0
    except SystemExit:  # --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


class _Guarded:
    """A standard stream: passes the first failed write to `failed` and discards the rest."""

    def __init__(self, stream, failed: Callable[[OSError], None]):
        self._stream, self._failed, self._broken = stream, failed, False

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._do(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, action: Callable, *args) -> None:
        try:
            action(*args)
        except OSError as error:
            if self._broken:
                return
            self._broken = True
            with suppress(OSError):  # the stream keeps what it could not write, and the interpreter tries again at exit
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            self._failed(error)


def _stdout_failed(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise ClosedPipe from None
    raise InputError(f"the standard output cannot be written ({error.strerror}); redirect it") from None


@contextmanager
def _guarded_streams() -> Iterator[None]:
    with ExitStack() as stack:
        null = stack.enter_context(open(os.devnull, "w"))
        # print(file=None) would be the standard output
        out, err = sys.stdout or null, sys.stderr or null
        with suppress(AttributeError):  # a character that the terminal cannot print is no error
            out.reconfigure(errors="replace")
        stack.enter_context(redirect_stdout(_Guarded(out, _stdout_failed)))
        stack.enter_context(redirect_stderr(guarded := _Guarded(err, lambda error: None)))
        stack.callback(guarded.flush)
        yield


@contextmanager
def _signals_raised() -> Iterator[Callable[[], None]]:
    """Ctrl-C raises KeyboardInterrupt and SIGTERM raises Terminated, until the yielded function is called."""
    owner, deaf_until = os.getpid(), -math.inf

    def stop(signum: int, frame) -> None:
        nonlocal deaf_until
        if os.getpid() != owner and signum == signal.SIGTERM:  # this is how a pool ends its forked workers
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        if time.monotonic() >= deaf_until:
            deaf_until = time.monotonic() + TWICE
            raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt

    def ignore() -> None:
        nonlocal deaf_until
        deaf_until = math.inf

    with _handled_by(stop):
        yield ignore


def default_signals() -> AbstractContextManager[None]:
    """Ctrl-C and SIGTERM end the program at once: for code that waits without returning to Python."""
    return _handled_by(signal.SIG_DFL)


@contextmanager
def _handled_by(handler) -> Iterator[None]:
    before = {signum: signal.signal(signum, handler) for signum in _heard()}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


def _heard() -> list[int]:
    """The signals that end this program, without those it was started to ignore (nohup); none in a thread."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [signum for signum in STOPPING if signal.getsignal(signum) not in (signal.SIG_IGN, None)]
