"""The attention backends, and which of them a device can run."""

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
KERNEL_BACKENDS = ("triton", "flash_attn")  # with these, Triton kernels decode and slim


@functools.cache
def resolve_backend(name: str, device: str) -> str:
    """The backend that `name` selects on a device type.

    "auto" is triton if all visible GPUs are NVIDIA GPUs of compute capability 8 or higher, else sdpa.

    Raises: ValueError, with a remedy, for a backend that cannot run there.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "auto":
        return "triton" if device == "cuda" and has_triton and _least_capability() >= 8 else "sdpa"
    if name in KERNEL_BACKENDS:
        if not has_triton:
            raise ValueError(f"backend={name!r}: triton is not installed: pip install triton, or choose backend='sdpa'")
        if device != "cuda" and not (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError(f"backend={name!r} needs a CUDA device, but this is {device!r}: choose backend='auto'")
        if device == "cuda" and _least_capability() < 8:
            raise ValueError(f"backend={name!r} needs NVIDIA GPUs of compute capability 8+: choose backend='sdpa'")
    if name == "flash_attn":
        find_flash_attn()
    return name


def has_kernels(h2o, device: torch.device) -> bool:
    """Whether Triton kernels decode and slim on a device with these settings."""
    return resolve_backend(h2o.backend, device.type) in KERNEL_BACKENDS


def _least_capability() -> int:
    """Lowest major compute capability of the visible GPUs; 0 if there are none or they are not NVIDIA's."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return 0
    return min(torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count()))
