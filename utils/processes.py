"""The processes of one run, started by torchrun or `accelerate launch`: how they agree, and how they fail."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed
from tqdm import tqdm

from h2optimizer.utils.cli import ClosedPipe, InputError, default_signals, one_line, report, say, status_of

MEETING = timedelta(minutes=2)  # for all processes to start
PATIENCE = timedelta(days=30)  # a process waits for another that is still decoding; a dead one is noticed at once
GLANCE = 0.2  # seconds between two looks at whether another process has failed


@dataclass
class Processes:
    """This process among those of its run; the only one if no launcher started it.

    With `tensor_parallel` all processes hold one model and decode in lockstep. Otherwise each holds a whole model.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine
    tensor_parallel: bool = False

    def __post_init__(self):
        self._store = None
        self._finished = threading.Event()

    @classmethod
    def launched(cls) -> Processes:
        """The processes that the environment describes; `join` makes them a group."""
        try:
            rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except (KeyError, ValueError):
            return cls()
        return cls(rank, size, local) if size > 1 and 0 <= rank < size else cls()

    @staticmethod
    def started_by_launcher() -> bool:
        """Whether torchrun or accelerate started this process, even as the only one."""
        return "LOCAL_RANK" in os.environ

    @property
    def first(self) -> bool:
        """Whether this process reads and writes the files and prints."""
        return self.rank == 0

    @property
    def shares(self) -> int:
        """How many processes split the requests."""
        return 1 if self.tensor_parallel else self.size

    @property
    def splits(self) -> int:
        """How many processes the model is divided among."""
        return self.size if self.tensor_parallel else 1

    def join(self) -> None:
        """Connect to the others. Raises InputError if accelerate is missing or they do not appear."""
        if self.size == 1:
            return
        try:
            from accelerate import PartialState
        except ImportError:
            if not self.first:  # the first reports it, unless the launcher ends it because this one has exited
                time.sleep(25 * GLANCE)
                self.leave(2)
            raise InputError(
                f"{self.size} processes: need accelerate: pip install accelerate, or start one process"
            ) from None
        on_gpu = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"  # NCCL starts when a GPU tensor needs it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the launcher decides on threads
            try:
                store = self._meet()  # kept until the group has its own
                PartialState(cpu=not on_gpu, backend=backend, timeout=PATIENCE)
                del store
            except NotImplementedError as error:  # GPUs that cannot talk to each other
                raise InputError(" ".join(str(error).split())) from None

    def _meet(self) -> distributed.Store:
        """Wait for all processes. With a stale environment, torch would wait forever."""
        try:
            with default_signals():  # torch does not return to Python while it waits
                return next(distributed.rendezvous("env://", self.rank, self.size, timeout=MEETING))[0]
        except (ValueError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise InputError(
                f"{self.size} processes: they did not meet ({reason}); start them with torchrun, or one with RANK, "
                "LOCAL_RANK and WORLD_SIZE unset"
            ) from None

    # Agreeing

    def gather(self, value) -> list:
        """All processes' values, on each of them. Raises InputError if a process has ended."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with self._hearing():
            distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """Process 0's value. Raises InputError if a process has ended."""
        values = [value]
        if self.size > 1:
            with self._hearing():
                distributed.broadcast_object_list(values, src=0)
        return values[0]

    def agree_on(self, tokens: torch.Tensor) -> torch.Tensor:
        """Process 0's choice, in place: different rounding must not make the parts of the model diverge."""
        distributed.broadcast(tokens, src=0)
        return tokens

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise InputError(ENDED) from error

    # Failing

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error in one process ends all of them here, with one line and its exit status.

        Raises: what was raised inside. With several processes, InputErrors and closed pipes are not raised: the
        processes end here. A process that raises something else ends, and the others notice it here.
        """
        problem = None
        try:
            yield
        except (InputError, ClosedPipe) as error:
            if self.size == 1:
                raise
            problem = error
        problems = [problem for problem in self.gather(problem) if problem is not None]
        if problems:
            if self.first:
                report(problems[0])
            with suppress(InputError):
                self.gather(None)  # a launcher ends the others as soon as one has exited
            self.leave(status_of(problems[0]))

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """An error in one process, in the middle of a step in which the others wait, ends all of them.

        They cannot agree on anything there. A failing process sets a flag in the store, and the others poll it.
        """
        if self.size == 1:
            yield
            return
        server = distributed.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False) if self.first else None
        host, port = os.environ.get("MASTER_ADDR", "localhost"), self.broadcast(server and server.port)
        self._store = distributed.TCPStore(host, port, timeout=timedelta(seconds=60))
        watched = distributed.TCPStore(host, port, timeout=timedelta(seconds=60))
        watcher = threading.Thread(target=self._watch, args=(watched,), daemon=True)
        watcher.start()
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception) and _is_from_a_collective(error):
                time.sleep(10 * GLANCE)  # the failed process reports why, and the watcher ends this one
                error = InputError(ENDED)
            if not isinstance(error, InputError):
                self._leave_word()
                raise
            if self._store_add("claimed") == 1:
                report(error)
            self._leave_word()
            if self.first:
                time.sleep(5 * GLANCE)  # the others poll the store here
            self.leave(2)
        self._finished.set()
        watcher.join()
        with suppress(InputError):
            self.gather(None)  # process 0 holds the store that the others poll

    def _watch(self, store) -> None:
        while not self._finished.wait(GLANCE):
            try:
                failed = store.check(["failed"])
            except RuntimeError:  # process 0 has ended without setting the flag
                failed = True
                if self.rank == 1 and not self._finished.is_set():
                    say(f"error: {ENDED}")
            if failed and not self._finished.is_set():
                self.leave(2)

    def _store_add(self, key: str) -> int:
        try:
            return self._store.add(key, 1)
        except RuntimeError:  # process 0 has ended
            return self.rank

    def _leave_word(self) -> None:
        self._finished.set()
        self._store_add("failed")

    def close(self, status: int) -> int:
        """Return the exit status. If there are several processes, exit with it here, once all have come.

        The group is not destroyed first: an NCCL communicator waits for every CUDA graph that holds its calls, forever
        if one is still referenced.
        """
        if self.size > 1:
            with suppress(InputError):
                self.gather(None)
        return self.leave(status)

    def leave(self, status: int) -> int:
        """Return the exit status. One of several processes exits with it at once, without waiting for the others."""
        if self.size > 1:
            with suppress(InputError, ClosedPipe):
                sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status

    def say(self, text: str) -> None:
        """Print a line on stderr, above the progress bar, in process 0 only."""
        if self.first:
            tqdm.write(one_line(text), file=sys.stderr)


ENDED = (
    "another process has ended before its work was done; results so far are kept, run the same command again to resume"
)


def _is_from_a_collective(error: Exception) -> bool:
    return isinstance(error, distributed.DistError) or "gloo" in str(error)
