"""Decode steps under torch.compile."""

import contextlib

import pytest
import torch

import recorded_steps
from conftest import make_llamas
from h2optimizer import H2OConfig
from h2optimizer.utils.cache import HHCache
from recorded_steps import ROWS, run, sequences, settings

pytestmark = recorded_steps.MARKS
captured = recorded_steps.captured  # autouse


@pytest.mark.parametrize("versions, flags", [
    (1, {"position_rolling": True, "score_norm": "mean"}), (2, {"score_every_step": False}),
], ids=str)  # fmt: skip
def test_compiled_tokens(captured, versions, flags):
    """A step that does not compile as one graph or is compiled once more when slimming is due, which may be when it is
    recorded; the compiler's error after so many versions of one function (eight), which every batch size adds to."""
    model = make_llamas(hidden_size=32, intermediate_size=32, num_hidden_layers=1).h2o
    for n in (2, 1)[: 3 - versions]:
        tokens = []
        for how in ({"compile": True}, {"capture": False}):
            model.h2o = settings(update_interval=2, **flags, **how)
            with torch._dynamo.config.patch(recompile_limit=versions):
                tokens.append(sequences(run(model, ROWS[:n], max_new_tokens=7)))
        assert tokens[0] == tokens[1]
    assert len(captured) == 3 - versions


def test_a_step_is_compiled_once_inside_inference_mode_and_outside(captured):
    """A compilation while a graph is recorded, whose measurements CUDA refuses there."""
    model = make_llamas(hidden_size=32, intermediate_size=32, num_hidden_layers=1).h2o
    model.h2o, graphs = settings(compile=True), []
    for mode in (contextlib.nullcontext, torch.inference_mode):
        with mode():
            run(model, max_new_tokens=7)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(captured) == 2 and graphs[0] == graphs[1]


def test_a_compiled_step_asks_whether_layers_are_still_the_merged_ones(captured):
    """Weights that the layers have no longer, under a cache of the user's own, for which generate merges nothing."""
    model = make_llamas(hidden_size=32, intermediate_size=32, num_hidden_layers=1).h2o
    model.h2o, tokens = settings(compile=True), []
    run(model, max_new_tokens=3)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = torch.nn.Parameter(-1.5 * mlp.up_proj.weight.detach())
    for flags in ({"compile": True}, {"capture": False}):
        tokens.append(sequences(run(model, past_key_values=HHCache(settings(**flags)))))
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("flags", [
    {"capture": False}, {"slimming": "mask"}, {"backend": "sdpa"}, {"backend": "eager"},
    {"backend": "flash_attn", "score_every_step": False},
], ids=str)  # fmt: skip
def test_compile_needs_captured_kernels(flags):
    """A flag that is taken and does nothing."""
    with pytest.raises(ValueError, match="compile=True compiles captured Triton steps"):
        H2OConfig(compile=True, **flags)
    assert H2OConfig(compile=True).compile and H2OConfig(compile=True, backend="triton").compile
    with pytest.raises(ValueError, match="compile=1"):
        H2OConfig(compile=1)
