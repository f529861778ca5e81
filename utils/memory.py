"""Device memory: what is allocated, the peak, and how to continue when it runs out."""

import gc
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")
AT_ONCE = 2**16  # bytes of pageable memory that CUDA takes without waiting


def free_memory(compiled: bool = True) -> None:
    """Free unused GPU memory: reference cycles, `compiled` functions with their graphs, and cached blocks."""
    if not torch.cuda.is_available():
        return
    if compiled and "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def to_device(numbers, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """torch.tensor(numbers, dtype=dtype, device=device), but the host does not wait until the GPU has come so far."""
    tensor = torch.as_tensor(numbers, dtype=dtype)
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes > AT_ONCE:
        tensor = tensor.pin_memory()
    # to the host, the copy must have ended
    return tensor.to(device, non_blocking=device.type == "cuda")


def allocated() -> int:
    """Bytes of tensors on the GPU; 0 without a GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak_allocated(run: Callable) -> int:
    """Peak bytes of tensors on the GPU during `run`, including earlier tensors; 0 without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def peak_memory(device: torch.device) -> int:
    """The process's peak bytes so far, on the GPU or, without one, on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory or, for a CPU, of the host's; 0 if the host does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not Linux
        return 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def halving(work: Callable[[int], Iterable[T]], size: int, fewer: Callable[[int], int] | None = None) -> Iterator[T]:
    """Yield from `work(size)`; if memory runs out, call it again with half the size.

    `work` must remember what it has yielded and skip that when it is called again.

    Args:
        fewer: returns the next size in place of half, or raises an error of its own.

    Raises: torch's error if a size of 1 is too large, unless `fewer` is given.
    """
    while True:
        try:
            yield from work(size)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error) or (size == 1 and fewer is None):
                raise
        # outside the handler, where the traceback no longer holds the tensors
        free_memory(compiled=False)
        size = half(size) if fewer is None else fewer(size)


def half(size: int) -> int:
    return (size + 1) // 2
