"""Merged projections, and norms and activations of decode steps, against the layers that they stand for. Whole layers
are in test_fused_layers.py."""

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import recorded_steps
from conftest import (
    assert_close,
    make_llamas,
    new_cache,
    prompt,
)
from h2optimizer import H2OConfig, H2OLlamaForCausalLM
from h2optimizer.fused import MergedLinear
from h2optimizer.kernels import mlp
from h2optimizer.llama import H2OLlamaRMSNorm
from recorded_steps import run, settings

pytestmark = recorded_steps.MARKS
captured = recorded_steps.captured  # autouse
interpreted = recorded_steps.interpreted
gqa = recorded_steps.gqa
model = recorded_steps.model


# Merged projections


def merged_llama():
    llamas = make_llamas()
    llamas.h2o.h2o = H2OConfig(backend="triton")  # whose steps take the products
    llamas.h2o.merge_projections()
    return llamas


def merges(model):
    return [part.merged for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]


def one_token(model):
    with torch.no_grad():
        cache = new_cache(window_length=8, backend="sdpa")
        model(torch.tensor([prompt(4), prompt(4, 1)]), past_key_values=cache)
        return model(torch.tensor([[5], [9]]), past_key_values=cache).logits


def test_one_product_is_three(interpreted):
    """Outputs that are split at another place, weights in another order, or a merged weight with a history, which no
    model that is copied may have."""
    llamas = merged_llama()
    assert all(merge.weight.is_leaf for merge in merges(llamas.h2o))
    logits = one_token(llamas.h2o)
    for layer in llamas.h2o.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        assert attention.merged.is_current(attention.q_proj, attention.k_proj, attention.v_proj), "it is used"
        assert mlp.merged.is_current(mlp.gate_proj, mlp.up_proj)
        attention.merged.weight = mlp.merged.weight = None
    assert_close(logits, one_token(llamas.h2o), 1e-5)


def test_only_what_kernels_take_is_merged():
    """A float64 model whose activation is rounded to float32 on the way, or merged weights where nothing uses them."""
    for dtype, backend in ((torch.float64, "triton"), (torch.float32, "sdpa")):
        model = make_llamas(dtype).h2o
        model.h2o = H2OConfig(backend=backend)
        model.merge_projections()
        assert all(merge.weight is None for merge in merges(model))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 0)])
@pytest.mark.parametrize("rows, size", [(1, 5), (3, 1024), (2, 2050)])
def test_activation_of_a_merged_product(interpreted, dtype, tolerance, rows, size):
    """Gate and up exchanged, a tail left out, or half precision rounded once where torch rounds twice."""
    gate, up = 3 * torch.randn(2, rows, 1, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.nn.functional.silu(gate) * up
    output = mlp.silu_and_multiply(torch.cat([gate, up], dim=-1))
    assert output.dtype == dtype and output.shape == gate.shape
    apart = (output - expected).abs() > tolerance + torch.finfo(dtype).eps * expected.abs()
    assert not apart.any(), "by more than the last bit"


def test_merged_checkpoints_are_whole(tmp_path):
    """Weights that share memory taken for copies of each other, and left out of the file."""
    llamas = merged_llama()
    state = llamas.h2o.state_dict()
    assert state.keys() == llamas.stock.state_dict().keys()
    llamas.h2o.save_pretrained(tmp_path)
    for kind in (LlamaForCausalLM, H2OLlamaForCausalLM):
        back, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        for name, tensor in llamas.stock.state_dict().items():
            assert torch.equal(state[name], tensor) and torch.equal(back.state_dict()[name], tensor), name


def train(model, columns):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = torch.tensor([prompt(columns), prompt(columns, 1)])
    loss = model(ids, labels=ids).loss if columns > 1 else model(ids).logits.logsumexp(-1).sum()
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("columns", [7, 1])
def test_merged_weights_are_trained(columns):
    """Gradients that go to the product and not to the layers, of one column; a step that the product does not see."""
    merged, plain = merged_llama(), make_llamas()
    before = one_token(merged.h2o)
    for llamas in (merged, plain):
        train(llamas.h2o, columns)
    for (name, weight), other in zip(merged.h2o.named_parameters(), plain.h2o.parameters(), strict=True):
        assert_close(weight.detach(), other.detach(), 1e-5, name)
    assert all(merge.weight is not None for merge in merges(merged.h2o))
    assert_close(one_token(merged.h2o), one_token(plain.h2o))
    assert not torch.allclose(one_token(merged.h2o), before)


@pytest.mark.parametrize("columns", [7, 1])
def test_gradients_of_inputs_to_frozen_weights(columns):
    """A soft prompt's gradient that stops at a kernel which has none."""
    gradients = []
    for model in merged_llama():
        model.requires_grad_(False)
        embeddings = torch.randn(2, columns, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        embeddings.requires_grad_(True)
        model(inputs_embeds=embeddings, use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append(embeddings.grad)
    assert_close(gradients[0], gradients[1], 1e-5)


def edit_in_place(model, attention):
    attention.k_proj.weight.data[3].mul_(-2)


def load(model, attention):
    model.load_state_dict({name: -0.5 * tensor for name, tensor in model.state_dict().items()})


def assign(model, attention):
    model.load_state_dict({name: -0.5 * tensor for name, tensor in model.state_dict().items()}, assign=True)


class Adapter(torch.nn.Module):
    """As LoRA's: a layer around a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.weight, self.bias = layer, layer.weight, None
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, states):
        return 1.5 * self.base_layer(states)


class Scaled(torch.nn.Linear):
    def forward(self, states):
        return 1.5 * super().forward(states)


def adapt(model, attention):
    attention.q_proj = Adapter(attention.q_proj)


def subclass(model, attention):
    attention.q_proj.__class__ = Scaled


def hook(model, attention):
    attention.v_proj.register_forward_hook(lambda module, args, output: -output)


def pre_hook(model, attention):
    attention.v_proj.register_forward_pre_hook(lambda module, args: (-args[0],))


def hook_activation(model, attention):
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, output: -output)


def replace_activation(model, attention):
    model.model.layers[0].mlp.act_fn.forward = lambda states: -states


def patch(model, attention):
    original = attention.q_proj.forward
    attention.q_proj.forward = lambda states: 2 * original(states)


def bias(model, attention):
    attention.k_proj.bias = torch.nn.Parameter(torch.linspace(-3, 3, attention.k_proj.out_features))


def another_weight(model, attention):
    attention.v_proj.weight = torch.nn.Parameter(-attention.v_proj.weight.detach())


def move(model, attention):
    model.double()


EDITS = [edit_in_place, load, assign, adapt, subclass, hook, pre_hook, patch, bias, another_weight, move]


@pytest.mark.parametrize("edit", [hook_activation, replace_activation], ids=lambda edit: edit.__name__)
def test_activations_are_followed(edit):
    """A hook on the activation, or another one in its place, that the kernel passes by."""
    merged, plain = merged_llama().h2o, make_llamas().h2o
    before = one_token(merged)
    for model in (merged, plain):
        edit(model, None)
    expected = one_token(plain)
    assert not torch.allclose(expected, before), "the edit does something"
    assert_close(one_token(merged), expected, 1e-5)


@pytest.mark.parametrize("how", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_on_all_modules_are_called(how, captured):
    """Products, norms and recorded steps that a hook on every module, such as a profiler's, does not see."""
    merged, plain = merged_llama().h2o, make_llamas().h2o
    run(merged, max_new_tokens=2)
    captured.clear()
    modules = {id(model): {id(module): name for name, module in model.named_modules()} for model in (merged, plain)}
    seen = {id(model): [] for model in (merged, plain)}

    def note(module, *args):
        for of, names in modules.items():
            if id(module) in names:
                seen[of].append(names[id(module)])

    handle = getattr(torch.nn.modules.module, how)(note)
    try:
        for model in (merged, plain):
            run(model, max_new_tokens=4)
    finally:
        handle.remove()
    assert sorted(seen[id(merged)]) == sorted(seen[id(plain)]) and not captured
    run(merged, max_new_tokens=2)
    assert captured


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_the_product_follows_its_layers(edit):
    """Weights that the model has no longer, or a layer's wrapper, hook or bias passed by. Merging again, which
    `generate` does, is right as well."""
    merged, plain = merged_llama().h2o, make_llamas().h2o
    before = one_token(merged)
    for model in (merged, plain):
        edit(model, model.model.layers[0].self_attn)
    expected = one_token(plain)
    assert not torch.allclose(expected, before.to(expected.dtype)), "the edit does something"
    for _ in range(2):
        assert_close(one_token(merged), expected, 1e-5)
        merged.merge_projections()
    alone = [merge.weight is None for merge in merges(merged)]
    assert alone[0] == (edit in (adapt, subclass, hook, pre_hook, patch, bias, move))
    assert all(alone) if edit is move else not alone[1], "no kernel takes float64"


def test_merging_twice_moves_nothing():
    """Weights that are copied at each generate."""
    merge, layers = MergedLinear(), [torch.nn.Linear(8, n, bias=False) for n in (4, 2, 2)]
    merge.merge(*layers)
    at = [layer.weight.data_ptr() for layer in layers]
    assert all(isinstance(layer.weight, torch.nn.Parameter) for layer in layers)
    merge.merge(*layers)
    assert [layer.weight.data_ptr() for layer in layers] == at
    states = torch.randn(2, 1, 8)
    assert merge.product(states, *layers) is None, "gradients are the layers' own"
    with torch.no_grad():
        product = merge.product(states, *layers)
        assert_close(product, torch.cat([layer(states) for layer in layers], dim=-1), 1e-6)
        states = torch.randn(2, 3, 8)
        assert_close(merge.product(states, *layers), torch.cat([layer(states) for layer in layers], dim=-1), 1e-6)


def test_generate_merges(model, captured):
    """Products that are never used."""
    for merge in merges(model):
        merge.weight = None
    model.h2o = settings()
    run(model, max_new_tokens=2)
    assert all(merge.weight is not None for merge in merges(model))


@pytest.mark.parametrize("states_in, weight_in", [
    (torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("columns", [1, 3])
def test_norm_of_one_column(columns, states_in, weight_in):
    """Another epsilon or weight, a sum in half precision, or another dtype than stock Llama's comes out."""
    ours, stock = H2OLlamaRMSNorm(64, eps=1e-3), LlamaRMSNorm(64, eps=1e-3)
    for norm in (ours, stock):
        norm.weight.data = torch.linspace(0.1, 2, 64).to(weight_in)
    states = (torch.randn(3, columns, 64, generator=torch.Generator().manual_seed(0)) * 0.1).to(states_in)
    output, expected = ours(states), stock(states)
    assert output.dtype == expected.dtype
    eps = max(torch.finfo(states_in).eps, torch.finfo(weight_in).eps, 1e-7)  # stock sums float64 in float32
    assert_close(output.detach(), expected.detach(), 2 * eps)
