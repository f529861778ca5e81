"""utils/memory.py: what is done again, and with how much, when memory runs out."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from h2optimizer.utils.memory import halving, to_device

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def limited(items: list, most: int, error: Exception, sizes: list):
    """Work that takes items, so many at a time, of which `most` fit."""

    def work(size):
        while items:
            sizes.append(size)
            if size > most:
                raise error
            yield items[:size]
            del items[:size]

    return work


def test_halves_until_it_fits_and_stays_there():
    """An item lost or done twice, a size of 0, or one that is tried again after it was too much."""
    sizes = []
    done = list(halving(limited(list(range(7)), 2, OUT_OF_MEMORY, sizes), 7))
    assert done == [[0, 1], [2, 3], [4, 5], [6]]
    assert sizes == [7, 4, 2, 2, 2, 2]


def test_one_that_does_not_fit_and_other_errors():
    """Halving for ever, or an error that is taken for memory."""
    with pytest.raises(torch.OutOfMemoryError):
        list(halving(limited([1], 0, OUT_OF_MEMORY, sizes := []), 4))
    assert sizes == [4, 2, 1]
    with pytest.raises(RuntimeError, match="shapes"):
        list(halving(limited([1], 0, RuntimeError("shapes differ"), sizes := []), 4))
    assert sizes == [4]


def test_the_caller_says_what_comes_next():
    """A caller's own size, or its own words, that are not asked for."""

    def fewer(size):
        if size == 1:
            raise ValueError("too large")
        return size - 3

    with pytest.raises(ValueError, match="too large"):
        list(halving(limited([1], 0, OUT_OF_MEMORY, sizes := []), 7, fewer))
    assert sizes == [7, 4, 1]


def test_nothing_of_what_failed_is_held():
    """A traceback that keeps the tensors of the size that did not fit beside those of the next."""
    alive = set()

    class Tensors:
        def __init__(self):
            assert not alive, "those before are still held"
            alive.add(id(self))

        def __del__(self):
            alive.discard(id(self))

    def work(size):
        held = Tensors()
        if size > 1:
            raise torch.OutOfMemoryError  # a new one: it has a traceback of its own
        yield held is not None

    assert list(halving(work, 4)) == [True]


def test_copies_to_the_host_are_complete():
    """A copy from a GPU to the host that has not ended when it is read, as of a prefix' tokens for a model on the
    CPU."""
    waits = []

    class Copies(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.to:
                waits.append(not (kwargs or {}).get("non_blocking", False))
            return func(*args, **(kwargs or {}))

    with Copies():
        to_device(torch.tensor([1, 2]), torch.device("cpu"))
        to_device(torch.tensor([1, 2]), torch.device("meta"))
    assert waits and all(waits)
