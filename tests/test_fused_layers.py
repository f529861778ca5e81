"""Whole layers on the fused kernels, which torch stands for (kernel_doubles.py) except where a test says `interpreted`:
what they give is the family's own, and hooks, gradients and edits of modules are followed."""

import copy
import itertools

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

import recorded_steps
from conftest import GROUPS, assert_close, forward, left_pad, make_llamas, new_cache, prompt
from h2optimizer import H2OConfig, H2OLlamaForCausalLM, fused
from h2optimizer.kernels import layer, mlp
from h2optimizer.utils.cache import HHCache

pytestmark = recorded_steps.MARKS
captured = recorded_steps.captured  # autouse
interpreted = recorded_steps.interpreted

WIDE = {"window_length": 64, "update_interval": 4}
ROWS, TURN = [prompt(19), prompt(6), prompt(11)], [prompt(4, 1), prompt(7, 1), prompt(1, 1)]


def fused_llamas(dtype=torch.float32, **config):
    llamas = make_llamas(dtype, **config)
    llamas.h2o.h2o = H2OConfig(backend="triton")
    llamas.h2o.merge_projections()
    return llamas


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that ran, in order."""
    names = []
    for module, name in ((layer, "add_and_normalise"), (layer, "rotate"), (mlp, "silu_and_multiply")):
        run = getattr(module, name)

        def launch(*args, run=run, name=name, **kwargs):
            names.append(name)
            return run(*args, **kwargs)

        monkeypatch.setattr(module, name, launch)
    return names


def stock_logits(stock, row):
    with torch.no_grad():
        return stock(torch.tensor([row])).logits[0]


# What a forward gives


@pytest.mark.parametrize("rows, chunk", [([prompt(19), prompt(19, 1)], None), (ROWS, None), (ROWS, 5)], ids=str)
def test_the_last_layer_computes_what_is_wanted(monkeypatch, rows, chunk):
    """Padding taken for a row's last token, a chunk without tokens of a row that replaces its logits, or columns that
    somebody watches and that are missing."""
    llamas = fused_llamas()
    model, columns = llamas.h2o, []
    run = type(model.model.layers[0].mlp).forward

    def watch(self, x, *args):
        columns.append(x.shape[1])
        return run(self, x, *args)

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", watch)

    def last(**flags):
        columns.clear()
        with torch.no_grad():
            cache = new_cache(backend="triton", prefill_chunk=chunk, **WIDE)
            return model(**left_pad(rows), past_key_values=cache, logits_to_keep=1, **flags)

    logits, layers = last().logits, len(model.model.layers)
    assert columns[layers - 1 :: layers] == [1] * len(columns[::layers]) and min(columns[::layers]) > 1
    assert logits.shape[1] == 1
    for row, text in enumerate(rows):
        assert_close(logits[row, 0], stock_logits(llamas.stock, text)[-1])
    widest = max(map(len, rows))
    assert [states.shape[1] for states in last(output_hidden_states=True).hidden_states] == [widest] * (layers + 1)
    seen = []
    handle = model.model.norm.register_forward_hook(lambda *args: seen.append(args[-1].shape[1]))
    watched = last().logits
    handle.remove()
    assert sum(seen) == widest
    assert_close(watched, logits)


class Watched(torch.nn.Module):
    """A module around another one that keeps how many columns come out of it."""

    def __init__(self, inner, columns):
        super().__init__()
        self.inner, self.columns = inner, columns

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        self.columns.append(output.shape[1])
        return output


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("part", ["layer", "mlp", "post_attention_layernorm", "norm", "gradients"])
def test_the_last_layer_computes_all_for_other_modules(part, backend):
    """Columns that are missing for a module in the place of one of the family's, or for a hook on gradients; or an
    attribute that such a module lacks."""
    model, columns, ids = fused_llamas().h2o, [], torch.tensor([prompt(19)])

    def last():
        cache = new_cache(backend=backend, **WIDE)
        return model(ids, past_key_values=cache, logits_to_keep=1).logits

    expected, layers = last(), model.model.layers
    if part == "layer":
        layers[-1] = Watched(layers[-1], columns)
    elif part == "gradients":
        layers[-1].mlp.register_full_backward_hook(lambda module, given, out: columns.append(out[0].shape[1]))
    else:
        of = model.model if part == "norm" else layers[-1]
        setattr(of, part, Watched(getattr(of, part), columns))
    logits = last()
    if part == "gradients":
        logits.sum().backward()
    assert columns == [19]
    assert_close(logits, expected)


@pytest.mark.parametrize("flags", [
    {}, {"position_rolling": True}, {"prefill_chunk": 5}, {"prefill_chunk": 5, "position_rolling": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("heads", GROUPS)
def test_prompts_and_turns_are_stock_llamas(heads, flags, launched):
    """Rows padded on the left, in one piece and in chunks, then a turn: a key that is rotated twice or never, a query
    that is turned by another row's angle, or values that were rotated with the product that holds them."""
    llamas = fused_llamas(num_key_value_heads=GROUPS[heads])
    cache, seen = new_cache(**WIDE, **flags, backend="triton"), [[], [], []]
    for block in (ROWS, TURN, [[3], [4], [5]]):
        logits = forward(llamas.h2o, block, cache)
        for b, row in enumerate(block):
            seen[b] += row
            assert_close(logits[b], stock_logits(llamas.stock, seen[b])[-len(row) :], what=f"row {b}, {len(seen[b])}")
    chunks = [4, 2, 1] if "prefill_chunk" in flags else [1, 1, 1]
    forwards, layers = sum(chunks), llamas.h2o.config.num_hidden_layers
    assert launched.count("add_and_normalise") == 2 * layers * forwards
    assert launched.count("silu_and_multiply") == layers * forwards
    # one launch turns a product's queries and keys; the step's are the decode kernel's
    assert launched.count("rotate") == layers * (forwards - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_ragged_prompt_in_the_interpreter(interpreted, dtype):
    """The kernels as they are: logits, keys and values of prompts and a turn, within twice eager's error against
    float64 in half precision."""
    config = {"initializer_range": 0.1, "num_hidden_layers": 1}
    llamas, exact, errors = fused_llamas(dtype, **config), make_llamas(torch.float64, **config).stock, {}
    exact.load_state_dict(llamas.stock.state_dict())
    for backend, model in (("triton", llamas.h2o), ("eager", make_llamas(dtype, **config).h2o)):
        cache, seen, errors[backend] = new_cache(**WIDE, slimming="mask", backend=backend), [[], []], []
        for block in ([prompt(9), prompt(4)], [prompt(2, 1), prompt(3, 1)]):
            for b, (row, logits) in enumerate(zip(block, forward(model, block, cache), strict=True)):
                seen[b] += row
                errors[backend].append((logits.double() - stock_logits(exact, seen[b])[-len(row) :]).abs().max().item())
    assert max(errors["triton"]) <= 2 * max(errors["eager"])


def test_heads_of_a_merged_product():
    """Outputs that are split at another place than the layers', for who calls the parts of a layer one by one."""
    states, found = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)), []
    for model in (fused_llamas().h2o, make_llamas().h2o):
        attention = model.model.layers[1].self_attn
        with torch.no_grad():
            projected = attention.project(states)
            found.append((len(projected), attention.heads_of(projected)))
    (parts, merged), (parts_apart, apart) = found
    assert (parts, parts_apart) == (1, 3)
    for ours, theirs, heads in zip(merged, apart, (4, 2, 2), strict=True):
        assert ours.shape == (2, heads, 5, 16)
        assert_close(ours, theirs, 1e-6)


def test_all_hidden_states_are_stock_llamas(launched):
    """A state before the residual sum, or one that its norm has replaced; twice, for hooks stay after the first."""
    llamas = fused_llamas()
    ids = torch.tensor([prompt(9), prompt(9, 1)])
    with torch.no_grad():
        expected = llamas.stock(ids, output_hidden_states=True).hidden_states
        for _ in range(2):
            cache = new_cache(**WIDE, backend="triton")
            states = llamas.h2o(ids, past_key_values=cache, output_hidden_states=True).hidden_states
            for number, (ours, theirs) in enumerate(zip(states, expected, strict=True)):
                assert_close(ours, theirs, what=f"state {number}")
    assert launched.count("add_and_normalise") == 2 * 2 * 2


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_other_backends_run_the_familys_layers(launched, backend):
    """Kernels where the settings ask for torch."""
    model = make_llamas().h2o
    forward(model, ROWS, new_cache(**WIDE, backend=backend))
    with torch.no_grad():
        model(torch.tensor([prompt(5)]), use_cache=False)
    assert not launched


@pytest.mark.parametrize("states_in", [torch.float64, torch.bfloat16])
def test_sums_that_the_kernel_does_not_take(launched, states_in):
    """Dtypes that differ, or that are rounded to float32 on the way."""
    norm = fused_llamas().h2o.model.norm
    residual, branch = torch.randn(2, 1, 3, 64, dtype=states_in)
    assert torch.equal(norm.add(residual, branch), residual + branch)
    assert torch.equal(norm.add(residual.float(), branch), residual.float() + branch)
    assert not launched


def test_autocast(launched):
    """Products in half precision beside float32 states: tables and states of two dtypes."""
    llamas, logits = fused_llamas(), []
    for backend in ("triton", "sdpa"):
        with torch.autocast("cpu", torch.bfloat16):
            logits.append(torch.cat(forward(llamas.h2o, ROWS, new_cache(**WIDE, backend=backend))))
    assert_close(logits[0], logits[1], 0.05)
    assert "rotate" not in launched


# Gradients


def gradients(model, backend):
    """Of the input embeddings, and of the weights that take part."""
    embeddings = torch.randn(2, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    embeddings.requires_grad_(True)
    cache = new_cache(**WIDE, backend=backend)
    model(inputs_embeds=embeddings, past_key_values=cache).logits.logsumexp(-1).sum().backward()
    return [embeddings.grad, *(weight.grad for weight in model.parameters() if weight.requires_grad)]


@pytest.mark.parametrize("trained", ["all", "norms", "v_proj", "inputs only"])
def test_gradients_of_a_prompt(trained):
    """A kernel without a gradient between the loss and what is trained."""
    found = []
    for model, backend in ((fused_llamas().h2o, "triton"), (make_llamas().h2o, "sdpa")):
        for name, weight in model.named_parameters():
            wanted = trained == "all" or trained.rstrip("s") in name
            weight.requires_grad_(wanted and "embed" not in name)
        found.append(gradients(model, backend))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, 1e-4)


# Hooks and edits


def double(module, args, output):
    return 2 * output


def double_in_place(module, args, output):
    output.mul_(2)


def shift_input(module, args):
    return (args[0] + 0.5, *args[1:])


def shift_input_in_place(module, args):
    args[0].add_(0.5)


def edit_norm(model, norm):
    norm.weight.data[::2] = 3.0


def patch(model, norm):
    original = norm.forward
    norm.forward = lambda states: 2 * original(states)


def replace(model, norm):
    other = LlamaRMSNorm(64, eps=1e-3)
    other.weight.data.copy_(-0.5 * norm.weight.data)
    for module in (model.model, model.model.layers[1]):
        for name, child in list(module.named_children()):
            if child is norm:
                setattr(module, name, other)


def hook(way):
    def edit(model, module):
        if way in (shift_input, shift_input_in_place):
            module.register_forward_pre_hook(way)
        else:
            module.register_forward_hook(way)

    edit.__name__ = f"hook_{way.__name__}"
    return edit


def hook_layer(way):
    def edit(model, norm):
        for module in model.model.layers:
            hook(way)(model, module)

    edit.__name__ = f"layer_{way.__name__}"
    return edit


EDITS = [
    edit_norm, patch, replace, *(hook(way) for way in (double, double_in_place, shift_input, shift_input_in_place)),
    *(hook_layer(way) for way in (double, double_in_place, shift_input)),
]  # fmt: skip


NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


@pytest.mark.parametrize("which, edit, mode", [
    *(("input_layernorm", edit, torch.no_grad) for edit in EDITS),
    *((which, edit, torch.no_grad) for which in NORMS[1:] for edit in EDITS[::2]),
    *((NORMS[i % 3], edit, torch.inference_mode) for i, edit in enumerate(EDITS[1::2])),
], ids=lambda value: getattr(value, "__name__", value))  # fmt: skip
def test_norms_follow_hooks_and_edits(edit, which, mode):
    """The norm of a sum that a hook has replaced or changed in place, that another module computes, or whose own hook
    is passed by."""
    logits = []
    for model, backend in ((fused_llamas().h2o, "triton"), (make_llamas().h2o, "sdpa")):
        norm = model.model.norm if which == "norm" else getattr(model.model.layers[1], which)
        with mode():
            before = model(torch.tensor([prompt(9)]), past_key_values=new_cache(**WIDE, backend="sdpa")).logits
            edit(model, norm)
            for ids in (prompt(9), prompt(9)):  # twice: nothing is left over
                cache = new_cache(**WIDE, backend=backend)
                logits.append(model(torch.tensor([ids]), past_key_values=cache).logits)
        assert not torch.allclose(logits[-1], before), "the edit does something"
    for ours in logits[:2]:
        assert_close(ours, logits[-1], 1e-4)
    assert all(module._ready is None for module in (norm, *norms(model)))


def norms(model):
    return [module for module in model.modules() if isinstance(module, fused.FusedRMSNorm)]


def test_an_adapter_between_merged_layers(launched):
    """A product that passes an adapter by, or a rotation over what the adapter still holds."""
    kept, logits = [], []
    for model, backend in ((fused_llamas().h2o, "triton"), (make_llamas().h2o, "sdpa")):
        for decoder_layer in model.model.layers:
            decoder_layer.self_attn.q_proj.register_forward_hook(
                lambda module, args, output: kept.append((output, output.clone()))
            )
        logits.append(torch.cat(forward(model, ROWS, new_cache(**WIDE, backend=backend))))
    assert_close(logits[0], logits[1])
    assert "rotate" in launched and all(torch.equal(output, before) for output, before in kept)


def test_layers_of_a_copy_are_its_own():
    """A copy whose layers normalise with the weights of the model it was made of, or parameters that count twice."""
    llamas = fused_llamas()
    expected = torch.cat(forward(llamas.h2o, ROWS, new_cache(**WIDE, backend="triton")))
    copied = copy.deepcopy(llamas.h2o)
    layers = copied.model.layers
    followers = [layer.input_layernorm for layer in layers][1:] + [copied.model.norm]
    assert all(layer.next_norm is norm for layer, norm in zip(layers, followers, strict=True))
    for norm in norms(llamas.h2o):
        norm.weight.data.zero_()
    assert_close(torch.cat(forward(copied, ROWS, new_cache(**WIDE, backend="triton"))), expected, 1e-6)
    names = [name for name, _ in copied.named_parameters()]
    assert names == [name for name, _ in llamas.stock.named_parameters()]


def test_placement_keeps_layers_whole():
    """A layer under another name than its family's, which a device map would split between two devices."""
    model = make_llamas().h2o
    assert all(isinstance(layer, LlamaDecoderLayer) for layer in model.model.layers)
    assert {type(layer).__name__ for layer in model.model.layers} == model._no_split_modules
    accelerate = pytest.importorskip("accelerate")
    size = sum(weight.nbytes for weight in model.model.layers[0].parameters())
    limits = {0: int(3.5 * size), 1: 10 * size}
    placed = accelerate.infer_auto_device_map(model, limits, no_split_module_classes=model._no_split_modules)
    assert not [name for name in placed if name.count(".") > 2], "a part of a layer"


# Around it


def test_no_norm_outlives_a_forward(captured):
    """Two tensors of a prompt's size that stay with the model."""
    model = fused_llamas().h2o
    model.h2o = H2OConfig(**WIDE, backend="triton")
    model.generate(**left_pad(ROWS), max_new_tokens=5, do_sample=False)
    assert captured and all(norm._ready is None for norm in norms(model))


def test_generated_tokens_are_stock_llamas():
    """Any difference that shows in a text: prompts of several lengths, and chunks of them."""
    llamas = fused_llamas()
    expected = llamas.stock.generate(**left_pad(ROWS), max_new_tokens=12, do_sample=False).tolist()
    for chunk, rolling in itertools.product((None, 7), (False, True)):
        llamas.h2o.h2o = H2OConfig(**WIDE, backend="triton", prefill_chunk=chunk, position_rolling=rolling)
        assert llamas.h2o.generate(**left_pad(ROWS), max_new_tokens=12, do_sample=False).tolist() == expected


def test_a_checkpoint_of_fused_layers_is_whole(tmp_path):
    llamas = fused_llamas()
    llamas.h2o.save_pretrained(tmp_path)
    back, info = H2OLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    rows = [forward(model, ROWS, HHCache(H2OConfig(**WIDE, backend="triton"))) for model in (llamas.h2o, back)]
    assert_close(torch.cat(rows[0]), torch.cat(rows[1]), 1e-5)
