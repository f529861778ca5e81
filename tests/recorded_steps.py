"""Fixtures and checks for tests whose steps a GPU would record. A test file takes the fixtures by assigning them to
names of its own.

There are no graphs on a CPU: the same static steps are run there. Most tests let torch stand for the kernels
(kernel_doubles.py); those with `interpreted` run them in Triton's interpreter.
"""

import os

import pytest
import torch

from conftest import GROUPS, count_captured, left_pad, make_llamas, prompt
from h2optimizer import H2OConfig, generation
from h2optimizer.utils.cache import HHCache

pytest.importorskip("triton")

import kernel_doubles

MARKS = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU: test_gpu_graphs.py"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero|All-NaN slice):RuntimeWarning"),
]

SMALL = {"window_length": 8, "update_interval": 3, "backend": "triton"}
ROWS = [prompt(13), prompt(3), prompt(8)]


@pytest.fixture(autouse=True)
def captured(monkeypatch, request):
    """The steps of a graph, run; a list that grows by one with each generate that took them."""
    if "interpreted" not in request.fixturenames:
        kernel_doubles.install(monkeypatch)
    return count_captured(monkeypatch)


@pytest.fixture
def interpreted():
    """Triton's own kernels."""


@pytest.fixture(scope="module", params=GROUPS)
def llamas(request):
    """The session's as no other test has left them: a hook or training mode would end capture."""
    return make_llamas(num_key_value_heads=GROUPS[request.param])


@pytest.fixture(scope="module")
def gqa():
    return make_llamas()


@pytest.fixture
def model(gqa):
    """With no cache of an earlier test."""
    gqa.h2o.kept_caches = generation.KeptCaches()
    return gqa.h2o


def settings(**flags) -> H2OConfig:
    return H2OConfig(**{**SMALL, **flags})


def run(model, rows=ROWS, **kwargs):
    """Greedy unless told, with a seeded sampler; sequences, or the output object."""
    torch.manual_seed(7)
    return model.generate(**left_pad(rows), **{"max_new_tokens": 21, "do_sample": False, **kwargs})


def sequences(output) -> list[list[int]]:
    return (output if isinstance(output, torch.Tensor) else output.sequences).tolist()


def both_ways(model, captured, rows=ROWS, flags=None, own=False, **kwargs):
    """The outputs of a captured and of transformers' own loop, and the caches that were passed, if `own`."""
    outputs, caches = [], []
    for capture in (True, False):
        model.h2o = settings(capture=capture, **(flags or {}))
        caches.append(HHCache(model.h2o))
        before = len(captured)
        passed = {"past_key_values": caches[-1]} if own else {}
        outputs.append(run(model, rows, **{**kwargs, **passed}))
        assert (len(captured) > before) == capture
    return outputs, caches


def eos_cases(model):
    """Tokens that end some rows, all rows at different steps, or none."""
    model.h2o = settings(capture=False, backend="sdpa")
    base = run(model, max_new_tokens=20)[:, 13:]
    first, later, last = base[0, 5].item(), base[1, 9].item(), base[2, 19].item()
    return {"one": first, "each": [first, later, last], "late": base[2, 17].item(), "at once": base[:, 0].tolist()}


def decoders_of(model, cache) -> list:
    """What decodes over the cache's slots, the last used last."""
    return list(model.kept_caches.decoders[cache].values())
