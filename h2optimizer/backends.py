"""Which attention backends there are, and which of them a device runs."""

import functools
import importlib.util
import os

import torch

from h2optimizer.attention import (
    eager_attention,
    find_flash_attn,
    flash_attention,
    sdpa_attention,
    triton_attention,
)

ATTENTION_BACKENDS = {
    "eager": eager_attention,
    "sdpa": sdpa_attention,
    "triton": triton_attention,
    "flash_attn": flash_attention,
}
KERNEL_BACKENDS = ("triton", "flash_attn")  # of which Triton kernels decode and slim


@functools.cache
def resolve_backend(name: str, device: str) -> str:
    """The backend that `name` means on a device type.

    "auto" is triton where all visible GPUs are NVIDIA's of compute capability 8 or more, else sdpa.

    Raises: ValueError, with the way out, for one that cannot run there.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "auto":
        return "triton" if device == "cuda" and has_triton and _least_capability() >= 8 else "sdpa"
    if name in KERNEL_BACKENDS:
        if not has_triton:
            raise ValueError(f"backend={name!r}: triton is not installed: pip install triton, or choose backend='sdpa'")
        if device != "cuda" and not (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError(f"backend={name!r} needs a CUDA device, this is {device!r}: choose backend='auto'")
        if device == "cuda" and _least_capability() < 8:
            raise ValueError(f"backend={name!r} needs NVIDIA GPUs of compute capability 8: choose backend='sdpa'")
    if name == "flash_attn":
        find_flash_attn()
    return name


def has_kernels(h2o, device: torch.device) -> bool:
    """Whether, with these settings, Triton kernels decode and slim on a device."""
    return resolve_backend(h2o.backend, device.type) in KERNEL_BACKENDS


def _least_capability() -> int:
    """Major compute capability of the least of the visible GPUs; 0 where they are not NVIDIA's or there is none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return 0
    return min(torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count()))
