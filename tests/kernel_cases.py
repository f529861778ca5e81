"""Tests of kernels on two devices: on a CPU in Triton's interpreter, on a GPU with -m gpu."""

import os

import pytest
import torch


def cases(names, few, full):
    """Parametrize over `few` cases on a CPU and `full` ones on a GPU."""
    on_gpu = [pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in full]
    return pytest.mark.parametrize(f"device, {names}", [("cpu", *case) for case in few] + on_gpu)


def on_each_device(test):
    marked = pytest.param("cuda", marks=pytest.mark.gpu)
    return pytest.mark.parametrize("device", ["cpu", marked])(test)


@pytest.fixture(autouse=True)
def placed(request):
    """Triton interprets kernels for all devices or for none."""
    device = request.node.callspec.params.get("device") if hasattr(request.node, "callspec") else None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if (device == "cuda" and not torch.cuda.is_available()) or (
        device is not None and (device == "cpu") != interpreted
    ):
        pytest.skip(f"kernels do not run on {device} here")
