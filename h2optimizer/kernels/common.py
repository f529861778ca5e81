"""Helpers shared by the kernels."""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def online_softmax_update(logits, v, top, total, acc, PRECISION: tl.constexpr):
    """Extend a running softmax by more slots (Milakov and Gimelshein, arXiv 1805.02867).

    Args: logits [rows, slots] to base 2, -inf where hidden; v [slots, D]; each row's greatest logit, sum of
    exponentials and weighted sum of v [rows, D] so far, in float32. Returns: the last three, updated.
    """
    higher = tl.maximum(top, tl.max(logits, 1))
    p, shrink = tl.exp2(logits - higher[:, None]), tl.exp2(top - higher)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return higher, total * shrink + tl.sum(p, 1), acc


@triton.jit
def rotated_halves(low, high, cos, sin):
    """RoPE on both halves of heads, rounded where torch rounds: after each product and after the sum.

    cos and sin are float32, whose values have the heads' dtype.
    """
    dtype = low.dtype
    low_cos, low_sin = (low.to(tl.float32) * cos).to(dtype), (low.to(tl.float32) * sin).to(dtype)
    high_cos, high_sin = (high.to(tl.float32) * cos).to(dtype), (high.to(tl.float32) * sin).to(dtype)
    turned_low = (low_cos.to(tl.float32) - high_sin.to(tl.float32)).to(dtype)
    turned_high = (high_cos.to(tl.float32) + low_sin.to(tl.float32)).to(dtype)
    return turned_low, turned_high


def padded(head_dim: int) -> int:
    """Tile width for this head_dim: a power of two that a matrix product accepts."""
    return max(16, triton.next_power_of_2(head_dim))


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of a matrix product: float32 stays float32; for half precision it makes no difference."""
    return "ieee" if dtype == torch.float32 else "tf32"


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel can launch while the one before it runs (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


_device_count = functools.cache(torch.cuda.device_count)  # asked at each launch


def on_its_device(launch):
    """Launch on the device of the tensors: Triton uses the current device, and layers may be spread over several."""

    @functools.wraps(launch)
    def launch_there(*args, **kwargs):
        if _device_count() < 2:
            return launch(*args, **kwargs)
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(tensor):
            return launch(*args, **kwargs)

    return launch_there


class Launch:
    """A launch of a kernel of which only the tensors are still open. It is made once for some shapes, and runs often.

    `kernel[grid](…)` binds, inspects and compares all arguments in Python, each time, which takes longer than a small
    kernel runs. It returns the compiled kernel, and that one can be launched directly, as in Triton's tutorial on fused
    softmax. It fits all tensors of the same dtypes that are aligned to 16 bytes as the first ones were.

    Args:
        kernel: its parameters are tensors, then numbers, then constants.
        programs: the size of its grid.
        numbers: in the order of the kernel's parameters.
        options: of the compiler.
        constants: by name.
    """

    def __init__(self, kernel, programs: int, *numbers, options: dict, **constants):
        self._kernel, self._grid, self._options = kernel, (programs, 1, 1), options
        names = kernel.arg_names[len(kernel.arg_names) - len(constants) :]
        self._arguments = (*numbers, *(constants[name] for name in names))
        self._compiled: dict[tuple, Callable] = {}

    def __call__(self, *tensors: torch.Tensor | TensorDescriptor | None) -> None:
        """Launch on the current stream of the tensors' device. Their kinds, and which are None, may change."""
        key, addresses = [], 0
        for given in tensors:
            if given is None:
                key.append(None)
                continue
            tensor = given.base if isinstance(given, TensorDescriptor) else given
            key.append(tensor.dtype)
            addresses |= tensor.data_ptr()
        device = tensor.get_device()
        key = (device, *key) if addresses % 16 == 0 else None
        if _device_count() < 2:
            self._run(tensors, key)
        else:
            with torch.cuda.device(device):  # otherwise Triton uses the current one
                self._run(tensors, key)

    def _run(self, tensors: tuple, key: tuple | None) -> None:
        """key: what the tensors were compiled for; None if they are not aligned."""
        run = self._compiled.get(key)
        if run is not None:
            run(*tensors, *self._arguments)
            return
        compiled = self._kernel[self._grid](*tensors, *self._arguments, **self._options)
        if key is not None and compiled is not None:  # the interpreter compiles nothing
            self._compiled[key] = compiled[self._grid]
