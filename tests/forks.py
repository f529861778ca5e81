"""Forks of the test process: they have imported everything, which takes longer than all else, and they stop by
themselves where a test wants them. No test waits for a time, or races against another process."""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from h2optimizer.utils.results import JsonlFile


class Fork:
    """A process that runs `work(self)`, with files for its stdout and stderr, and ends with the status it returns.

    Whatever ends the test early, a timeout say, ends the fork where it is waited for.
    """

    def __init__(self, work: Callable[["Fork"], int | None], folder: Path, name: object = ""):
        self._paths = [folder / f"{stream}{name}" for stream in ("stdout", "stderr")]
        self._status: int | None = None
        self._reading, self._writing = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            leave_with(partial(self._run, work))
        os.close(self._writing)

    def _run(self, work) -> int | None:
        os.close(self._reading)
        for number, path in enumerate(self._paths, start=1):
            os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores it
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not forked
        tqdm.set_lock(threading.RLock())  # its own lock spans processes: a killed one would keep it
        return work(self)

    # In the fork

    def mark(self) -> None:
        """Tell the test that the fork has come so far."""
        os.write(self._writing, b".")

    def stop(self) -> None:
        """`mark`, and wait for a signal: one that kills, or whose handler raises."""
        parent = os.getppid()
        self.mark()
        while os.getppid() == parent:  # again and again: a signal just before a system call is handled after it
            time.sleep(0.02)
        os._exit(1)

    # In the test

    def await_mark(self) -> None:
        """Until the fork has called `mark` or `stop`."""
        with self._ended_if_left():
            marked = os.read(self._reading, 1) == b"."
        assert marked, f"it ended before it came so far: {self.status}, {self.stderr}"

    def send(self, number: signal.Signals) -> None:
        if self._status is None:
            os.kill(self.child, number)

    @property
    def status(self) -> int:
        """When it has ended: its exit status; that of one killed by a signal is the signal's number, negative."""
        if self._status is None:
            with self._ended_if_left():
                self._status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
            os.close(self._reading)
        return self._status

    def kill(self) -> int:
        self.send(signal.SIGKILL)
        return self.status

    @contextmanager
    def _ended_if_left(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.send(signal.SIGKILL)
            print(self.stdout, self.stderr, sep="\n")  # pytest shows it
            raise

    @property
    def stdout(self) -> str:
        return self._paths[0].read_text()

    @property
    def stderr(self) -> str:
        return self._paths[1].read_text()


def leave_with(work: Callable[[], int | None]) -> NoReturn:
    """End this process as an interpreter does that has run `work`, but at once: to take torch down takes a second."""
    status = 1
    try:
        status = work() or 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def stop_while_writing(whole: int, stop: Callable[[], None]) -> None:
    """Let this process stop in the middle of its result after `whole` of them, or after its last where there is no
    other. It is for a fork, which nobody has to put right again."""
    append, close, done = JsonlFile.append, JsonlFile.close, []

    def append_half(self, result):
        if len(done) == whole:
            self._file.write(json.dumps(result).encode()[:100])
            self._file.flush()
            stop()
        append(self, result)
        done.append(result)

    def close_after_last(self):
        if done and len(done) == whole:
            stop()
        close(self)

    JsonlFile.append, JsonlFile.close = append_half, close_after_last
