"""Models on a CUDA device, and what tests of several files ask of them. A test file takes the fixtures by assigning
them to names of its own."""

import contextlib
import copy

import pytest
import torch

from conftest import (
    SCALING,
    Llamas,
    assert_close,
    assert_invariants,
    forward,
    make_llamas,
    make_states,
    new_cache,
    own_columns,
    plain_attention,
    prompt,
    uneven,
)
from h2optimizer.attention import Inputs, find_flash_attn
from h2optimizer.backends import ATTENTION_BACKENDS

MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA_BACKENDS = ("eager", "sdpa", "triton", "auto")
HALF_CONFIG = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.06}
FLASH_CONFIG = {"hidden_size": 512, "intermediate_size": 1024, "initializer_range": 0.04}  # a head_dim of 128


@pytest.fixture(scope="module")
def on_gpu(llamas):
    return Llamas(*(copy.deepcopy(model).to("cuda") for model in llamas))


@pytest.fixture(scope="module")
def gqa_on_gpu(gqa):
    return Llamas(*(copy.deepcopy(model).to("cuda") for model in gqa))


@pytest.fixture(scope="module")
def half_on_gpu():
    """A bf16 model with a head_dim of real Llamas, and logits that are no coin toss in bf16."""
    return Llamas(*(model.to("cuda") for model in make_llamas(**HALF_CONFIG, dtype=torch.bfloat16)))


@pytest.fixture(scope="module")
def flash_on_gpu():
    return Llamas(*(model.to("cuda") for model in make_llamas(**FLASH_CONFIG, dtype=torch.bfloat16)))


@pytest.fixture
def flash():
    """The flash-attn module."""
    try:
        return find_flash_attn()
    except ValueError as error:
        pytest.skip(str(error))


# As precise as stock Llama and eager attention


def assert_as_good_as_stock(llamas, config, **flags):
    """The logits of two rows over 12 decode steps, nothing evicted, by their error against float64."""
    rows, steps = [prompt(90), prompt(41)], prompt(12, 1)
    exact = make_llamas(**config).stock.to("cuda")
    exact.load_state_dict(llamas.stock.state_dict())
    exact.double()

    def errors(run):
        """The root mean square error of a model's logits, over both rows and all steps."""
        squares = []
        for b, row in enumerate(rows):
            with torch.no_grad():
                expected = exact(torch.tensor([row + steps], device="cuda")).logits[0, len(row) - 1 :]
            squares.append((run[b].double() - expected).square().flatten())
        return torch.cat(squares).mean().sqrt().item()

    stock = []
    for row in rows:
        with torch.no_grad():
            stock.append(llamas.stock(torch.tensor([row + steps], device="cuda")).logits[0, len(row) - 1 :])
    cache = new_cache(window_length=128, update_interval=4, **flags)
    ours = [[logits[-1]] for logits in forward(llamas.h2o, rows, cache)]
    for token in steps:
        for kept, logits in zip(ours, forward(llamas.h2o, [[token]] * 2, cache), strict=True):
            kept.append(logits[-1])
    assert cache.evictions == [0, 0] and cache.layers[0].slots.mass.dtype == torch.float32
    assert errors([torch.stack(kept) for kept in ours]) <= 2 * errors(stock)


HALF = {
    "prefill": dict(start=[0, 0], new=[300, 171]),
    "prefill, last queries": dict(start=[0, 0], new=[300, 171], score_queries=32),
    "decode": dict(start=[260, 260], new=[1, 1], decode=True),
    "ragged decode": dict(start=[260, 77], new=[1, 1], decode=True),
    "ragged turn": dict(start=[130, 64], new=[20, 33]),
}


def assert_as_good_as_eager(backends, step, kv_heads, dtype, head_dim, group_reduce):
    """An output at most twice as far from float64 as the eager reference's, and the exact mass of the states."""
    states = make_states(step, kv_heads, dtype, head_dim, device="cuda")
    exact_output, exact_mass = plain_attention(*states, step, group_reduce)
    errors = {}
    for backend in ("eager", *backends):
        output, mass = ATTENTION_BACKENDS[backend](Inputs(*states, step, SCALING, group_reduce))
        assert output.dtype == dtype
        if step.scored:
            assert mass.dtype == torch.float32
            assert_close(mass, exact_mass, 1e-4, what=backend)
            for b, (start, new) in enumerate(zip(step.start, step.new, strict=True)):
                assert not mass[b, :, start + new :].any(), "mass where the row has no slot"
        else:
            assert mass is None
        error = own_columns(output, step).double().cpu() - own_columns(exact_output, step)
        errors[backend] = error.abs().max().item()
    for backend, error in errors.items():
        assert error <= 2 * errors["eager"] + 1e-5, backend


# No wait for the device


@contextlib.contextmanager
def no_host_waits():
    """Any operation that makes the host wait for the device raises in here."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


SYNC_FLAGS = {
    "H2O": {"update_interval": 1},
    "rotation": {"update_interval": 4},
    "rolling": {"update_interval": 4, "position_rolling": True},
    "mean": {"update_interval": 4, "score_norm": "mean", "score_decay": 0.5},
    "pure attention between": {"update_interval": 4, "score_every_step": False},
    "first head": {"update_interval": 4, "group_reduce": "first"},
    "sink": {"update_interval": 4, "score": "sink"},
    "random": {"update_interval": 4, "score": "random"},
    "local": {"update_interval": 4, "num_heavy_hitters": 0},
    "uneven": {"update_interval": 4, "head_budgets": uneven, "score": "value_mass"},
    "int8": {"update_interval": 4, "slots": "int8"},
    "int8 uneven rolling": {"update_interval": 1, "slots": "int8", "head_budgets": uneven, "position_rolling": True},
    "uneven rolling": {"update_interval": 4, "head_budgets": uneven, "position_rolling": True, "score_norm": "mean"},
}


def assert_no_step_waits(model, lengths, flags):
    """Three rotations of decode steps under the guard, after as many without."""
    cache = new_cache(window_length=8, slimming="H", **flags)
    for guard in (contextlib.nullcontext, no_host_waits):  # what is set up or compiled at first use may wait
        cache.reset()
        forward(model, [prompt(length) for length in lengths], cache)
        token = torch.tensor([[5], [6]], device="cuda")
        with torch.no_grad(), guard():
            for _ in range(3 * flags["update_interval"] + 2):
                outputs = model(token, past_key_values=cache)
                token = outputs.logits[:, -1:].argmax(-1)
    assert cache.clock == 3 * flags["update_interval"] + 3
    assert_invariants(cache)
