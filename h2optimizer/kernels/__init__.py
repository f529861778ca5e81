"""Triton kernels. Nothing outside this package imports them before they are needed."""

import functools

import torch


def on_its_device(launch):
    """Triton launches on the current device: make that the first argument's, where layers are spread over several."""

    @functools.wraps(launch)
    def launch_there(first: torch.Tensor, *args, **kwargs):
        with torch.cuda.device_of(first):
            return launch(first, *args, **kwargs)

    return launch_there
