"""The memory of devices: what is held, what the peak was, and how work goes on where it runs out."""

import gc
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


def free_memory(compiled: bool = True) -> None:
    """Give back the GPU's memory that nothing needs: cycles, `compiled` functions and their graphs, blocks."""
    if not torch.cuda.is_available():
        return
    if compiled and "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def allocated() -> int:
    """Bytes of tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak_allocated(run: Callable) -> int:
    """The most bytes of tensors on the GPU during `run`, those from before it counted in; 0 without one."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def peak_memory(device: torch.device) -> int:
    """Bytes at the process's peak so far: of the GPU, or without one of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def halving(work: Callable[[int], Iterable[T]], size: int, fewer: Callable[[int], int] | None = None) -> Iterator[T]:
    """What `work(size)` yields; where memory runs out, what it yields when it is called again with half the size.

    `work` keeps account of what it has yielded, and leaves that out when it is called again.

    Args:
        fewer: gives the size to go on with, in place of half, or raises what there is to say.

    Raises: torch's error where a size of 1 is too much, unless `fewer` says more.
    """
    while True:
        try:
            yield from work(size)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error) or (size == 1 and fewer is None):
                raise
        # out here, where the traceback no longer holds the tensors
        free_memory(compiled=False)
        size = half(size) if fewer is None else fewer(size)


def half(size: int) -> int:
    return (size + 1) // 2
