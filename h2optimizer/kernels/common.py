"""Helpers shared by the kernels."""

import functools

import torch
import triton
import triton.language as tl

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
