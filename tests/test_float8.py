"""Float8 products: torchao's weights, quantised activations, and models that decode with them."""

import pytest
import torch
from torch.nn import Linear

import recorded_steps
from checkpoints import make_checkpoint
from conftest import make_llamas, prompt
from h2optimizer import H2OLlamaForCausalLM, float8, generation, loading
from h2optimizer.fused import MergedLinear
from h2optimizer.kernels import float8 as kernels
from h2optimizer.utils.cache import HHCache
from h2optimizer.utils.cli import InputError
from recorded_steps import both_ways, decoders_of, sequences

pytest.importorskip("torchao")
quant_api = pytest.importorskip("torchao.quantization.quant_api")

pytestmark = recorded_steps.MARKS
captured = recorded_steps.captured  # autouse
interpreted = recorded_steps.interpreted


@pytest.fixture
def quantize(monkeypatch):
    """quantize(module): its linear layers in float8, where torchao would ask for a GPU."""
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    return lambda module: quant_api.quantize_(module, float8.config())


def layers(*widths, inputs=32):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Linear(inputs, width, bias=False, dtype=torch.bfloat16) for width in widths))


def states(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


@torch.no_grad()
def test_merged_products_are_torchaos(quantize):
    """Numbers of one layer with another's scales; a product of all columns that ends in the wrong rows."""
    three, inputs = layers(48, 16, 16), states(2, 5, 32)
    exact = torch.cat([layer(inputs) for layer in three], dim=-1).double()
    quantize(three)
    own = [layer(inputs) for layer in three]
    merged = MergedLinear()
    merged.merge(*three)
    product = merged.product(inputs, *three)
    assert product.shape == (2, 5, 80) and product.dtype == torch.bfloat16
    for expected, ours in zip(own, product.split(merged.widths, dim=-1), strict=True):
        # torchao rounds the scales of activations to bfloat16
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.03)
    error, of_torchao = ((output.double() - exact).norm() for output in (product, torch.cat(own, dim=-1)))
    assert error < 1.1 * of_torchao
    assert all(torch.equal(layer(inputs), expected) for layer, expected in zip(three, own, strict=True)), "as before"
    last = inputs[:, -1:]  # rows that do not lie one after the other
    torch.testing.assert_close(merged.product(last, *three), product[:, -1:], rtol=0, atol=0)
    assert sum(part.untyped_storage().data_ptr() == merged.weight.data_ptr() for part in parts(three)) == 3, "one copy"


@torch.no_grad()
def test_biases_are_merged(quantize):
    """A bias that is dropped, or another layer's; one layer of two that has none."""
    two = torch.nn.Sequential(*(Linear(32, 16, dtype=torch.bfloat16) for _ in range(2)))
    inputs, merged = states(3, 32), MergedLinear()
    quantize(two)
    for layer in two:
        layer.bias.data = 10 * torch.randn(16).bfloat16()
    own = torch.cat([layer(inputs) for layer in two], dim=-1)
    merged.merge(*two)
    torch.testing.assert_close(merged.product(inputs, *two), own, rtol=0.05, atol=0.1)
    two[0].bias = None
    assert merged.product(inputs, *two) is None
    merged.merge(*two)
    assert merged.weight is None


def parts(module):
    return [layer.weight.qdata for layer in module]


@torch.no_grad()
def test_what_is_not_merged(quantize):
    """A layer that was replaced or moved; weights of other formats; a plain layer alone, to no end."""
    two, alone, plain = layers(16, 16), MergedLinear(), layers(16)
    quantize(two)
    merged = MergedLinear()
    merged.merge(*two)
    inputs = states(1, 3, 32)
    assert merged.product(inputs, *two) is not None
    two[1] = layers(16)[0]
    assert merged.product(inputs, *two) is None
    merged.merge(*two)
    assert merged.weight is None and merged.scale is None, "one of the two is plain"
    alone.merge(*plain)
    assert alone.weight is None and torch.equal(alone(inputs, plain[0]), plain[0](inputs))
    weights_only = layers(16)
    quant_api.quantize_(weights_only, quant_api.Float8WeightOnlyConfig())
    assert float8.stored(weights_only[0].weight) is None and float8.stored(plain[0].weight) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [16, 48, 1040])
def test_rows_are_quantised_by_their_maximum(interpreted, dtype, size):
    """A row's tail that is left out or read from the next row, one scale for all, or zeros divided by zero. The numbers
    are float8's own: the interpreter does not round others as a GPU does."""
    numbers = torch.randn(6, size, generator=torch.Generator().manual_seed(size)).to(torch.float8_e4m3fn).float()
    numbers[:, -1] = float8.LARGEST
    numbers[4] = 0
    exponents = torch.tensor([0, -3, 5, 1, 0, -6.0])
    rows = (numbers * exponents.exp2()[:, None]).to(dtype)
    quantised, scales = kernels.quantize_rows(rows, float8.LARGEST, float8.LEAST)
    assert quantised.dtype == torch.float8_e4m3fn and scales.shape == (6, 1) and scales.dtype == torch.float32
    assert torch.equal(quantised.float(), numbers)
    assert torch.equal(quantised.float() * scales, rows.float())


@pytest.mark.parametrize("flags", [{}, {"position_rolling": True}, {"score": "value_mass"}], ids=str)
def test_a_quantised_model_decodes_from_graphs(quantize, captured, flags):
    """A step recorded over torchao's own products, or rows whose padding, all zeros, becomes NaN."""
    model = make_llamas(dtype=torch.bfloat16, initializer_range=0.06).h2o
    quantize(model.model)
    model.h2o = recorded_steps.settings()
    model.merge_projections()
    outputs, caches = both_ways(model, captured, [prompt(13), prompt(3), prompt(8)], flags, own=True)
    assert sequences(outputs[0]) == sequences(outputs[1])
    for layer in caches[0].layers:
        assert layer.keys.isfinite().all() and layer.values.isfinite().all() and layer.slots.mass.isfinite().all()
    for layer in model.model.layers:
        for merged in (layer.self_attn.merged, layer.self_attn.output, layer.mlp.merged, layer.mlp.down):
            assert merged.scale is not None
    assert type(model.lm_head.weight) is torch.nn.Parameter
    model.kept_caches = generation.KeptCaches()


def test_steps_of_weights_that_have_moved_are_not_replayed(quantize, captured):
    """A graph that reads the layers' own numbers, which merging has freed."""
    model = make_llamas(dtype=torch.bfloat16, hidden_size=32, intermediate_size=32, num_hidden_layers=1).h2o
    quantize(model.model)
    model.h2o = recorded_steps.settings()
    cache = HHCache(model.h2o)
    recorded_steps.run(model, max_new_tokens=3, past_key_values=cache)
    (decoder,) = decoders_of(model, cache)
    assert decoder.is_current()
    model.merge_projections()
    assert not decoder.is_current()


def test_checkpoint_loaded_in_float8(quantize, monkeypatch, tmp_path):
    """Logits from 8 bits, a format that a saved checkpoint does not name, or merged weights that are saved twice."""
    path, gpu = make_checkpoint(tmp_path / "model", hidden_size=64), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    options = loading.quantization("torchao-float8", loading.load_config(str(path)), gpu, "auto")
    model = H2OLlamaForCausalLM.from_pretrained(path, h2o=recorded_steps.settings(), **options)
    model.merge_projections()
    model.save_pretrained(tmp_path / "saved")
    saved = H2OLlamaForCausalLM.from_pretrained(tmp_path / "saved", h2o=model.h2o, device_map="cpu")
    saved.merge_projections()
    ids = torch.tensor([prompt(20)])
    with torch.no_grad():
        assert torch.equal(saved(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            assert (float8.stored(layer.weight) is None) == (name == "lm_head")
    quantised = sum(path.stat().st_size for path in (tmp_path / "saved").glob("*.safetensors"))
    assert quantised < sum(weight.nbytes for weight in H2OLlamaForCausalLM.from_pretrained(path).parameters())


@pytest.mark.parametrize("device, dtype, capability, words", [
    ("cpu", "auto", (9, 0), ["GPU", "bfloat16"]),
    ("cuda", "float16", (9, 0), ["GPU", "bfloat16"]),
    ("cuda", "auto", (8, 6), ["8.9 or higher", "this one has 8.6, so choose", "torchao-int8"]),
], ids=str)  # fmt: skip
def test_float8_that_cannot_be(monkeypatch, device, dtype, capability, words):
    """An assertion of torchao's, after minutes of loading."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(InputError) as refused:
        loading.quantization("torchao-float8", make_llamas().stock.config, torch.device(device), dtype)
    assert all(word in str(refused.value) for word in ["--quantize torchao-float8", *words])


def test_torchao_that_is_missing_or_old(monkeypatch):
    """An ImportError from the depths of transformers."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config, gpu = make_llamas().stock.config, torch.device("cuda")
    monkeypatch.setattr(loading, "is_torchao_available", lambda: False)
    with pytest.raises(InputError, match="a newer torchao; pip install --upgrade torchao"):
        loading.quantization("torchao-float8", config, gpu, "auto")
    monkeypatch.setattr(loading, "is_installed", lambda library: False)
    with pytest.raises(InputError, match="needs torchao; pip install torchao"):
        loading.quantization("torchao-float8", config, gpu, "auto")
