"""Decode steps of a few rows in half precision, whose norms and residual sums are parts of products. Torch stands for
the kernels (kernel_doubles.py) except where a test says `interpreted`."""

import pytest
import torch

import recorded_steps
from conftest import GROUPS, forward, make_llamas, new_cache, prompt
from h2optimizer import H2OConfig, fused
from h2optimizer.kernels import products
from recorded_steps import run, settings

pytestmark = recorded_steps.MARKS
captured = recorded_steps.captured  # autouse
interpreted = recorded_steps.interpreted

BF16, FP16 = torch.bfloat16, torch.float16
WIDE = {"window_length": 64, "update_interval": 4, "backend": "triton"}
STEP = [[5], [9], [3]]


def merged_llama(dtype=BF16, **config):
    model = make_llamas(dtype, initializer_range=0.1, **config).h2o
    model.h2o = H2OConfig(backend="triton")
    model.merge_projections()
    return model


@pytest.fixture
def launched(monkeypatch):
    """What surrounded each product of few rows, in order."""
    kinds = []

    def launch(inputs, weight, run=products.product, **given):
        present = {name for name, each in given.items() if isinstance(each, torch.Tensor) or each is True}
        kinds.append("+".join(name for name in ("norm", "bias", "gated", "residual") if name in present))
        return run(inputs, weight, **given)

    monkeypatch.setattr(products, "product", launch)
    return kinds


def step_logits(model, rows=3, **flags):
    """Logits of a decode step after prompts of several lengths."""
    cache = new_cache(**{**WIDE, **flags})
    forward(model, [prompt(19), prompt(6), prompt(11)][:rows], cache)
    return torch.cat(forward(model, STEP[:rows], cache))


def unfused(monkeypatch, model, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(products, "MOST_ROWS", 0)
        return step_logits(model, **kwargs)


LAYER = ["norm", "residual", "norm+gated", "residual"]


@pytest.mark.parametrize("flags", [{}, {"position_rolling": True, "score_norm": "mean"}], ids=str)
@pytest.mark.parametrize("heads", GROUPS)
def test_a_step_is_as_exact_as_the_unfused_one(heads, flags, launched, monkeypatch):
    """A norm that is applied twice or never, a sum without its residual, or the residual of another place."""
    model = merged_llama(num_key_value_heads=GROUPS[heads])
    logits = step_logits(model, **flags)
    assert launched == LAYER * model.config.num_hidden_layers
    plain = unfused(monkeypatch, model, **flags)
    assert len(launched) == len(LAYER) * model.config.num_hidden_layers, "nothing was launched once more"
    exact = step_logits(model.double(), **{**flags, "backend": "eager"})
    error, allowed = ((each.double() - exact).abs().max() for each in (logits, plain))
    assert 0 < error <= 2 * allowed


def test_a_step_on_the_kernels_themselves(interpreted, launched, monkeypatch):
    """Arguments that the kernel takes otherwise."""
    model = merged_llama(FP16, num_hidden_layers=1)
    logits, plain = step_logits(model, rows=2), unfused(monkeypatch, model, rows=2)
    assert launched == LAYER
    exact = step_logits(model.double(), rows=2, backend="eager")
    error, allowed = ((each.double() - exact).abs().max() for each in (logits, plain))
    assert error <= 2 * allowed


def test_prompts_and_many_rows_take_other_products(launched):
    """Kernels for memory's speed where arithmetic bounds, or more rows than a tile has."""
    model = merged_llama()
    forward(model, [prompt(4)], new_cache(**WIDE))
    cache = new_cache(**WIDE)
    forward(model, [prompt(3)] * 9, cache)
    forward(model, [[5]] * 9, cache)
    assert not launched


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_other_backends_take_the_familys_layers(backend, launched):
    step_logits(merged_llama(), backend=backend)
    assert not launched


def test_float32_and_gradients(launched):
    """Full precision by a kernel for half, or a loss that reaches no weight."""
    step_logits(make_llamas().h2o)
    model = merged_llama()
    for weight in model.parameters():
        weight.requires_grad_(True)
    cache = new_cache(**WIDE)
    forward(model, [prompt(4)], cache)
    model(torch.tensor([[5]]), past_key_values=cache).logits.float().logsumexp(-1).sum().backward()
    assert not launched and model.model.layers[1].mlp.down_proj.weight.grad.abs().max() > 0


# Hooks and edits


def double(module, args, output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def hook(name):
    def edit(layer):
        layer.get_submodule(name).register_forward_hook(double)

    edit.__name__ = f"hook_{name}"
    return edit


def shift_input(layer):
    layer.mlp.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))


def patch_attention(layer):
    original = layer.self_attn.forward

    def patched(hidden_states, **kwargs):
        output, weights = original(hidden_states, **kwargs)
        return 2 * output, weights

    layer.self_attn.forward = patched


def override_mlp(layer):
    class Doubled(type(layer.mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.mlp.__class__ = Doubled


def replace_norm(layer):
    layer.input_layernorm = torch.nn.RMSNorm(64, eps=1e-3, dtype=BF16)
    layer.input_layernorm.weight.data.fill_(-0.5)


def adapt(name):
    class Adapter(torch.nn.Module):
        """As LoRA's: a layer around a layer."""

        def __init__(self, layer):
            super().__init__()
            self.base_layer, self.weight, self.bias = layer, layer.weight, None

        def forward(self, states):
            return 1.5 * self.base_layer(states)

    def edit(layer):
        path, _, last = name.rpartition(".")
        parent = layer.get_submodule(path)
        setattr(parent, last, Adapter(getattr(parent, last)))

    edit.__name__ = f"adapt_{name}"
    return edit


def bias(layer):
    layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.ones(64, dtype=BF16))


WHOLE, REST = (
    [],
    {"q_proj": LAYER[1:], "o_proj": [*LAYER[:1], *LAYER[2:]], "up_proj": LAYER[:2], "down_proj": LAYER[:3]},
)
EDITS = [
    *((hook(name), WHOLE) for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")),
    *((edit, WHOLE) for edit in (shift_input, patch_attention, override_mlp, replace_norm)),
    *((edit(f"self_attn.{name}"), REST[name]) for name in ("q_proj", "o_proj") for edit in (hook, adapt)),
    *((edit(f"mlp.{name}"), REST[name]) for name in ("up_proj", "down_proj") for edit in (hook, adapt)),
    (bias, [LAYER[0], "bias+residual", *LAYER[2:]]),
]  # fmt: skip


@pytest.mark.parametrize("edit, of_its_layer", EDITS, ids=lambda value: getattr(value, "__name__", ""))
def test_hooks_and_adapters_are_followed(edit, of_its_layer, launched, monkeypatch):
    """A hook that is passed by or sees another tensor than the family's, an adapter whose layer's weight is taken, or a
    norm that stays for the next forward; and one edit that slows all layers down."""
    model = merged_llama()
    before = step_logits(model)
    launched.clear()
    edit(model.model.layers[1])
    logits = step_logits(model)
    assert launched == [*LAYER, *of_its_layer]
    assert not torch.allclose(logits, before, atol=0.1), "the edit does something"
    plain = unfused(monkeypatch, model)
    exact = step_logits(model.double(), backend="eager")
    error, allowed = ((each.double() - exact).abs().max() for each in (logits, plain))
    assert error <= 2 * allowed
    norms = [module for module in model.modules() if isinstance(module, fused.FusedRMSNorm)]
    assert all(norm._ready is None for norm in norms)


def test_an_edit_after_a_step(launched, monkeypatch):
    """The sum that an unfused layer leaves to the norm of one whose product normalises it."""
    model = merged_llama(num_hidden_layers=3)
    hook("mlp")(model.model.layers[0])
    step_logits(model)
    assert launched == LAYER * 2
    assert all(each.input_layernorm._ready is None for each in model.model.layers)


def test_layers_see_what_stock_layers_see(launched):
    """A hook on a layer that stands between two sums."""
    model, seen = merged_llama(), []
    for each in model.model.layers:
        each.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    step_logits(model)
    assert launched == LAYER * 2 and len(seen) == 4
    (_, first), (args, second) = seen[2:]
    assert all(isinstance(states, torch.Tensor) and states.shape == (3, 1, 64) for states in (first, second))
    assert args[0] is first


def test_a_request_for_outputs_leaves_the_next_steps_alone(launched):
    """Hooks that transformers leaves, taken for somebody's: every later step is slower, and nothing says so."""
    model = merged_llama(attn_implementation="eager")
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), use_cache=False, output_attentions=True, output_hidden_states=True)
    assert model.model.layers[0].self_attn._forward_hooks
    step_logits(model)
    assert launched == LAYER * 2


def test_recorded_steps_take_them(captured, launched):
    """Texts of recorded steps that are not those of the model's own loop."""
    model, tokens = merged_llama(), []
    for capture in (True, False):
        model.h2o = settings(capture=capture)
        tokens.append(run(model).tolist())
    assert captured and tokens[0] == tokens[1] and len(launched) == 2 * 20 * 2 * len(LAYER)
