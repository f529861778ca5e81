"""Mistral, Qwen2, Qwen3 and SmolLM3, as Llama is tested: against stock models and the oracle, and in each program."""

import dataclasses
import functools
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import run_summarization
from checkpoints import made_up_text, make_checkpoint, make_requests, write_requests
from conftest import (
    BACKENDS,
    Llamas,
    assert_close,
    assert_follows_oracle,
    conversation,
    count_captured,
    generate,
    left_pad,
    make_llamas,
    new_cache,
    new_oracle,
    of_llamas,
    prompt,
    uneven,
    with_flags,
)
from h2optimizer import H2OConfig, H2OModelForCausalLM, calibration, fused, gguf_files
from h2optimizer.attention import rotate
from h2optimizer.decoder import is_replayable
from h2optimizer.decoding import FullDecoding
from h2optimizer.families import FAMILIES
from h2optimizer.loading import load_model
from h2optimizer.utils.bench import SHAPES, config_of, make_models
from h2optimizer.utils.results import checkpoint_fingerprint
from summaries import alone  # noqa: F401
from test_benchmarks import load

CONFIGS = {
    "mistral": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {"head_dim": 32, "attention_bias": True},  # twice hidden_size / heads, as in Qwen3-0.6B
    "smollm3": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
}
FLAGS = {
    "H2O": {"update_interval": 1},
    "rotation": {"update_interval": 3, "score": "value_mass"},
    "rolling": {"update_interval": 3, "position_rolling": True, "score_decay": 0.5},
    "uneven rolling": {"update_interval": 2, "head_budgets": uneven, "position_rolling": True, "prefill_chunk": 5},
    "8 bits": {"update_interval": 3, "slots": "int8"},
}
IN_PAIRS = pytest.mark.parametrize("family, variant", [
    *(("mistral", name) for name in ("H2O", "uneven rolling")),
    *(("qwen2", name) for name in ("rotation", "rolling", "8 bits")),
    *(("qwen3", name) for name in ("H2O", "rolling", "8 bits")), *(("smollm3", name) for name in FLAGS),
], indirect=["family"])  # fmt: skip
ROWS = [prompt(13), prompt(3), prompt(8)]


@functools.cache
def llamas_of(family: str) -> Llamas:
    return make_llamas(model_type=family, **CONFIGS[family])


@pytest.fixture(scope="module", params=CONFIGS)
def family(request) -> Llamas:
    return llamas_of(request.param)


# Against stock models and the oracle


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rolling", [False, True])
def test_a_wide_window_is_stock(family, backend, rolling):
    """A bias, a norm or a layer's rotation that is left out, put in another place, or there where it should not be."""
    flags = {"window_length": 40, "update_interval": 4, "backend": backend, "position_rolling": rolling}
    expected, result = (generate(model, ROWS, 12) for model in (family.stock, with_flags(family, **flags)))
    assert result.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(result.logits, expected.logits, strict=True):
        assert_close(ours, theirs, 1e-5)


@IN_PAIRS
def test_a_narrow_window_is_the_oracles(family, variant):
    """Prompt, steps, a turn and steps after it. With rolling, keys of layers without rotation that are rotated."""
    flags = of_llamas({"window_length": 8, **FLAGS[variant]}, family)
    steps = [[token] for token in prompt(8, 1)]
    caches = [new_cache(**flags, backend=backend) for backend in BACKENDS]
    rounded = 200 if "slots" in flags else 1  # a number halfway between two falls to either side
    blocks = [prompt(13), *steps[:4], prompt(5, 2), *steps[4:]]
    assert conversation(family, caches, flags, blocks, rounded).evictions >= 2


@pytest.mark.parametrize("flags", [FLAGS["rotation"], FLAGS["rolling"]], ids=["rotation", "rolling"])
def test_rows_of_a_padded_batch_are_the_oracles(family, flags):
    flags = {"window_length": 8, **flags}
    result = generate(with_flags(family, **flags), ROWS, 12)
    for b, row in enumerate(ROWS):
        assert_follows_oracle(result, b, new_oracle(family, **flags), row)


def test_beams(family):
    """Slots that do not follow their beams."""
    model = with_flags(family, window_length=40, update_interval=4)
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    result, expected = (of.generate(**left_pad(ROWS), **settings) for of in (model, family.stock))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("rolling", [False, True])
def test_a_shared_prefix(family, rolling):
    model = with_flags(family, window_length=8, update_interval=3, position_rolling=rolling)
    rows = [prompt(9) + prompt(4, 1), prompt(9) + prompt(4, 2)]
    expected = model.generate(**left_pad(rows), max_new_tokens=9, do_sample=False)
    prefix = model.prefill_prefix(prompt(9))
    assert torch.equal(model.generate(**left_pad(rows), prefix=prefix, max_new_tokens=9, do_sample=False), expected)


@torch.no_grad()
def test_calibration_feeds_the_models_own_text(family):
    """Queries and keys that are rotated where the layer has no rotation, or not normalised."""
    model = with_flags(family, window_length=8)
    calibrator = calibration.Calibrator(model, calibration.head_cuts([4], "mass", 2), 6)
    _, text = calibrator._read(prompt(13))
    forced = calibrator.forced(prompt(13))
    logits = family.stock(torch.tensor([prompt(13) + text])).logits[0, 13:-1]
    assert_close(forced.logprobs, logits.log_softmax(-1), 1e-4)


# Merged products, kernels and recorded steps


def merged(model) -> list[bool]:
    return [layer.self_attn.merged.weight is not None for layer in model.model.layers]


@pytest.fixture
def doubles(monkeypatch):
    kernel_doubles = pytest.importorskip("kernel_doubles")
    kernel_doubles.install(monkeypatch)


@IN_PAIRS
def test_recorded_steps_are_the_stock_loops(family, doubles, monkeypatch, variant):
    """Products of some weights without their biases, or a step that is not recorded."""
    flags = of_llamas({"window_length": 8, **FLAGS[variant]}, family)
    expected = generate(with_flags(family, **flags), ROWS, 12).sequences
    captured = count_captured(monkeypatch)
    model = with_flags(family, **flags, backend="triton")
    sequences = model.generate(**left_pad(ROWS), max_new_tokens=12, do_sample=False)
    assert captured and is_replayable(model) and all(merged(model))
    assert torch.equal(sequences, expected)
    attention = model.model.layers[0].self_attn
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    assert attention.merged.is_current(*projections)
    assert (attention.merged.bias is not None) == (attention.q_proj.bias is not None)
    if attention.q_proj.bias is not None:
        attention.k_proj.bias = torch.nn.Parameter(attention.k_proj.bias.data.clone())
        assert not attention.merged.is_current(*projections)


@pytest.mark.parametrize(
    "kind, config, rolling", [("qwen3", {"head_dim": 16}, False), ("smollm3", {"no_rope_layers": [0]}, True)]
)
def test_triton_kernels(kind, config, rolling):
    """The kernels themselves, in Triton's interpreter: norms before rotation, and layers without rotation."""
    pytest.importorskip("triton")
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 32}
    family, row = make_llamas(model_type=kind, **shape, **config), [token % 32 for token in prompt(6)]
    flags = {"window_length": 5, "update_interval": 2, "position_rolling": rolling, "capture": False}
    expected, result = (
        generate(with_flags(family, **flags, backend=backend), [row], 3).logits for backend in ("sdpa", "triton")
    )
    assert_close(torch.stack(result), torch.stack(expected), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_of_heads(dtype):
    """A key head with the queries' weight, a value that is changed, or another rounding than the module's."""
    layer = pytest.importorskip("h2optimizer.kernels.layer")
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 24 * 9, generator=generator).to(dtype)  # 4 heads of queries, 2 of keys, 3 more
    norms = [FAMILIES["qwen3"].norm(24, eps=1e-3).to(dtype) for _ in range(2)]
    for norm in norms:
        norm.weight.data = torch.randn(24, generator=generator).to(dtype)
    parts = states.split([96, 48, 72], dim=-1)
    expected = [norm(part.unflatten(-1, (-1, 24))).flatten(-2) for norm, part in zip(norms, parts, strict=False)]
    expected = torch.cat([*expected, parts[2]], dim=-1)
    changed = layer.normalise_heads(states.clone(), norms[0].weight, norms[1].weight, 96, 48, 1e-3)
    assert_close(changed, expected.detach(), 1e-6 if dtype == torch.float32 else 1e-3)
    assert torch.equal(changed[..., 144:], states[..., 144:])


def test_replaced_norms_are_called():
    """A hook, or another module in the place of a norm, that the kernel passes over."""
    family = FAMILIES["qwen3"]
    norms = [family.norm(8) for _ in range(2)]
    states = torch.randn(1, 2, 32)
    assert fused._normalises(norms[0], states.detach()) is False  # its weight wants a gradient
    with torch.no_grad():
        assert fused._normalises(norms[0], states)
        norms[1].register_forward_hook(lambda module, args, output: output * 2)
        assert not fused._normalises(norms[1], states) and not fused._normalises(torch.nn.Identity(), states)
        query, key, value = fused.normalise_heads([states.clone()], *norms, [16, 8, 8])
    assert_close(key, 2 * family.norm(8)(states[..., 16:24]).detach())
    assert torch.equal(value, states[..., 24:]) and query.shape[-1] == 16


def test_appended_without_rotation():
    """cos and sin that are read where there are none."""
    decode = pytest.importorskip("h2optimizer.kernels.decode")
    query, key, value = (torch.randn(2, heads, 1, 16) for heads in (4, 2, 2))
    keys, values = torch.zeros(2, 2, 2, 5, 16)
    lengths = torch.tensor([[2, 2], [5, 5]], dtype=torch.int32)
    rotated = decode.append(query, key, value, None, None, keys, values, lengths, False)
    assert torch.equal(rotated, query)
    for b, slot in enumerate((1, 4)):
        assert torch.equal(keys[b, :, slot], key[b, :, 0]) and torch.equal(values[b, :, slot], value[b, :, 0])
    cos, sin = torch.randn(2, 2, 8).repeat(1, 1, 2)
    turned = decode.append(query, key, value, cos, sin, keys, values, lengths, False)
    assert_close(turned, rotate(query, cos[:, None, None], sin[:, None, None]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("rolling", [False, True])
def test_graphs(monkeypatch, model_type, rolling):
    """Recorded steps in bfloat16: the loop's tokens, and as precise as eager attention."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.06}
    family = make_llamas(torch.bfloat16, model_type=model_type, **shape | CONFIGS[model_type])
    family = Llamas(*(model.to("cuda") for model in family))
    captured = count_captured(monkeypatch)
    flags = {"window_length": 8, "update_interval": 3, "position_rolling": rolling}
    tokens = [
        with_flags(family, **flags, capture=capture).generate(
            **left_pad(ROWS, "cuda"), max_new_tokens=24, do_sample=False
        )
        for capture in (True, False)
    ]
    assert torch.equal(*tokens) and len(captured) == 1 and all(merged(family.h2o))
    wide = {"window_length": 40, "update_interval": 4, "position_rolling": rolling}
    exact = Llamas(*(model.float() for model in make_llamas(model_type=model_type, **shape | CONFIGS[model_type])))
    exact.stock.load_state_dict(family.stock.state_dict())
    ids = torch.tensor([ROWS[0]], device="cuda")
    with torch.no_grad():
        expected = exact.stock.to("cuda").double()(ids).logits
        stock = (family.stock(ids).logits.double() - expected).square().mean().sqrt()
        ours = with_flags(family, **wide)(ids, past_key_values=new_cache(**wide)).logits
    assert (ours.double() - expected).square().mean().sqrt() <= 2 * stock


# Two processes


def test_two_processes_are_one(tmp_path):
    """Biases of all heads added to a process's own, or its heads normalised with others' weights."""
    from test_processes import Group, Processes, loading

    kernel_doubles = pytest.importorskip("kernel_doubles")
    h2o = H2OConfig(window_length=16, update_interval=4)
    ids = torch.arange(5, 45).view(2, 20)
    inputs = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False}
    expected = {}
    for kind, config in CONFIGS.items():
        make_checkpoint(tmp_path / kind, model_type=kind, **config)
        whole = H2OModelForCausalLM.from_pretrained(tmp_path / kind, h2o=h2o, dtype=torch.float32)
        expected[kind] = whole.generate(**inputs)

    def work(rank):
        group = Processes.launched()
        group.tensor_parallel = True
        group.join()
        for kind in CONFIGS:
            place = loading.loading_options(tmp_path / kind, torch.device("cpu"), "auto", group)
            model = H2OModelForCausalLM.from_pretrained(tmp_path / kind, h2o=h2o, dtype=torch.float32, **place)
            assert torch.equal(model.generate(**inputs), expected[kind]), kind
            with pytest.MonkeyPatch.context() as patch:
                kernel_doubles.install(patch)
                model.h2o = dataclasses.replace(h2o, backend="triton")
                model.capture_sharded = True
                assert torch.equal(model.generate(**inputs), expected[kind]) and all(merged(model)), kind
            model.save_pretrained(tmp_path / "saved" / kind, is_main_process=rank == 0)
        return group.close(0)

    for process in Group(2, work, tmp_path).wait():
        assert process.status == 0, process.stderr
    for kind in CONFIGS:
        saved, whole = (
            H2OModelForCausalLM.from_pretrained(of / kind).state_dict() for of in (tmp_path / "saved", tmp_path)
        )
        assert all(map(torch.equal, saved.values(), whole.values())), kind


# Checkpoints and programs


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    config = {key: value for key, value in CONFIGS[request.param].items() if key != "sliding_window"}
    return make_checkpoint(tmp_path_factory.mktemp(request.param), model_type=request.param, **config)


def test_checkpoints_stay_the_familys_own(checkpoint, tmp_path):
    model = H2OModelForCausalLM.from_pretrained(checkpoint, h2o=H2OConfig(window_length=8))
    assert type(model) is FAMILIES[model.config.model_type] and model.h2o.window_length == 8
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is model.stock_class() and json.loads((tmp_path / "config.json").read_text())[
        "architectures"
    ] == [type(stock).__name__]
    assert all(map(torch.equal, stock.state_dict().values(), model.state_dict().values()))
    again = H2OModelForCausalLM.from_config(stock.config, h2o={"window_length": 9})
    assert type(again) is type(model) and again.h2o.window_length == 9


def test_unknown_families(tmp_path):
    """A family that runs as another, or an error that leaves its reader alone."""
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}: a gpt2 checkpoint; H2Optimizer runs llama, mistral, .*copy"):
        H2OModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("shape, parameters", [("mistral-7b", 7_248_023_552), ("qwen3-8b", 8_190_735_360)])
def test_shapes_of_benchmarks(monkeypatch, shape, parameters):
    """A shape of another size than the published model's, or run as a Llama."""
    config = config_of(shape)
    with torch.device("meta"):
        model = H2OModelForCausalLM.from_config(config)
    assert model.num_parameters() == parameters and type(model) is FAMILIES[shape.split("-")[0]]
    small = SHAPES["tiny"] | {"model_type": config.model_type, "head_dim": 32}
    monkeypatch.setitem(SHAPES, "small", small)
    ours, stock = make_models(H2OModelForCausalLM.from_config, "small", "cpu")
    assert type(stock) is ours.stock_class() and isinstance(ours, type(stock))
    assert stock.lm_head.weight.data_ptr() == ours.lm_head.weight.data_ptr()


SLIDING = {
    "mistral": {"sliding_window": 40},
    "qwen2": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "sliding_window": 40, "no_rope_layers": [1, 0]},
}


@pytest.mark.parametrize("kind", SLIDING)
def test_sliding_windows(kind):
    """A window of tokens that the model's own attention does not reach; or a layer type that is not looked at."""
    family = make_llamas(model_type=kind, **SLIDING[kind])
    words = r"slides over 40 tokens, fewer than window_length=37 \+ update_interval=4: give a smaller window_length"
    with pytest.raises(ValueError, match=words):
        family.h2o.h2o = H2OConfig(window_length=37, update_interval=4)
    with pytest.raises(ValueError, match=words):
        family.h2o(torch.tensor([[1]]), past_key_values=new_cache(window_length=37, update_interval=4))
    expected, result = (
        generate(model, ROWS, 12) for model in (family.stock, with_flags(family, window_length=36, update_interval=4))
    )
    assert_close(torch.stack(result.logits), torch.stack(expected.logits), 1e-5)


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_the_full_cache_slides(kind):
    """Tokens out of reach that a cache without sliding layers lets a step see, or rows of several lengths."""
    stock = make_llamas(model_type=kind, **SLIDING[kind] | {"sliding_window": 6}).stock
    rows = [prompt(15), prompt(12)]
    expected = stock.generate(**left_pad(rows), max_new_tokens=5, do_sample=False)[:, 15:]
    decoding = FullDecoding(stock)
    with torch.no_grad():
        first = decoding.prefill(rows).argmax(-1)
    decoding.start(first, [0, 1])
    assert torch.equal(torch.cat([first[:, None], decoding.decode(4)[0]], dim=1), expected)
    assert not decoding.can_share and FullDecoding(make_llamas().stock).can_share


SMALL = ["--device", "cpu", "--model-name"]


@pytest.fixture
def work(tmp_path, capsys):
    """work(program, *flags) runs a program in this process, on two requests; returns what it printed."""
    requests = write_requests(tmp_path / "requests.jsonl", make_requests(2, max_tokens=6))

    def work(program, *flags, code=0):
        begin = [] if program.__name__ == "advise" else ["--input-path", requests]
        status = program.main([*map(str, [*begin, *flags])])
        said = capsys.readouterr()
        assert status == code, said.err
        return said.err if code else said.out

    return work


def test_summaries_of_checkpoints(checkpoint, work, tmp_path):
    """A cache, or weights that are spread over devices, that change what a family says while nothing is dropped."""
    model, out = [*SMALL, checkpoint], lambda name: ["--output-path", tmp_path / name]
    wide = ["--enable_h2o_generation", "--num_window_length", 250]
    for name, flags in {"full": [], "h2o": wide, "auto": ["--device_map", "auto", *wide]}.items():
        placed = [*flags, *(model[2:] if name == "auto" else model)]
        work(run_summarization, *placed, *out(f"{name}.jsonl"), "--greedy", "--batch_size", 2)
    texts = [
        [json.loads(line)["result"]["choices"] for line in (tmp_path / f"{name}.jsonl").open()]
        for name in ("full", "h2o", "auto")
    ]
    tokens = [[choice["logprobs"]["tokens"] for choices in of for choice in choices] for of in texts]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("checkpoint", ["qwen3", "smollm3"], indirect=True)
def test_programs_take_checkpoints(checkpoint, work, tmp_path):
    """A program that loads Llamas alone, or compares with a baseline of another family."""
    model, out = [*SMALL, checkpoint], lambda name: ["--output-path", tmp_path / name]
    plan = ["--widths", "4,8", "--recent", 4, "--texts", 1, "--max_new_tokens", 4]
    work(load("calibrate"), *model, *out("plan.json"), *plan)
    budgets = ["--enable_h2o_generation", "--num_window_length", 16, "--head_budgets", tmp_path / "plan.json"]
    work(run_summarization, *model, *out("plan.jsonl"), *budgets)
    once = ["--batch_size", 2, "--timed_tokens", 2, "--repeats", 1, "--window_length", 12, "--update_interval", 4]
    work(load("ablate"), *model, *out("cells.jsonl"), *once)
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").open()]
    assert len(cells) >= 2
    once = ["--window_length", 12, "--policies", "mass", "--batch_size", 2]
    work(load("compare_policies"), *model, *out("policies.jsonl"), *once)
    work(load("show_kept"), *model, *out("kept.html"), "--num_window_length", 12)
    stream = ["--max_tokens", 4, "--enable_h2o_generation", "--num_window_length", 12, "--enable_position_rolling"]
    work(load("run_streaming"), *model, *stream)
    said = work(load("advise"), "--model-name", checkpoint, "--json", "--context", 100)
    assert json.loads(said)["model"] == str(checkpoint)


def test_lm_eval_takes_checkpoints(checkpoint):
    lm_eval_model = pytest.importorskip("h2optimizer.lm_eval_model")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    pairs = [(made_up_text(3), " " + made_up_text(1, seed=9)), (made_up_text(2), " " + made_up_text(1, seed=8))]
    asked = [instance("loglikelihood", {}, pair, i, metadata=("task", i, 1)) for i, pair in enumerate(pairs)]
    answers = []
    for h2o in (None, H2OConfig(window_length=250)):
        loaded = load_model(str(checkpoint), h2o, torch.device("cpu"))
        answers.append(lm_eval_model.CacheLM(*loaded, True, batch_size=1, max_batch_size=64).loglikelihood(asked))
    for (ours, greedy), (theirs, same) in zip(*answers, strict=True):
        assert abs(ours - theirs) < 1e-3 * abs(theirs) and greedy == same


@pytest.mark.parametrize("checkpoint", ["mistral", "smollm3"], indirect=True)  # without layer types, and with them
def test_short_sliding_windows_get_one_line(checkpoint, work, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    slides = SLIDING[config["model_type"]] | {"sliding_window": 16}
    folder = shutil.copytree(checkpoint, tmp_path / "slides")
    if "layer_types" in config:
        slides["layer_types"] = ["full_attention"] * (config["num_hidden_layers"] - 1) + ["sliding_attention"]
    slides.pop("no_rope_layers", None)  # as many as before
    (folder / "config.json").write_text(json.dumps(config | slides))
    flags = [*SMALL, folder, "--output-path", tmp_path / "out.jsonl", "--num_window_length", 14]
    said = work(run_summarization, *flags, "--enable_h2o_generation", "--update_interval", 3, code=2)
    words = f"error: --model-name {folder}: its attention slides over 16 tokens, fewer than window_length=14 + update"
    assert said.count("\n") == 1 and said.startswith(words)
    words = f"error: --model-name {folder}: its attention slides over 16 tokens"
    flags = [*SMALL, folder, "--output-path", tmp_path / "cells.jsonl", "--window_length", 9, 16]
    for program in ("ablate", "compare_policies"):
        assert work(load(program), *flags, code=2).startswith(words)
    once = ["--timed_tokens", 2, "--repeats", 1, "--sample_num", 1, "--update_interval", 2]
    for program, more in {"ablate": once, "compare_policies": ["--sample_num", 1]}.items():
        fitting = [*SMALL, folder, "--output-path", tmp_path / f"{program}.jsonl", "--window_length", 9]
        work(load(program), *fitting, *more)
    slides["sliding_window"] = 280
    (folder / "config.json").write_text(json.dumps(config | slides))
    plan = ["--output-path", tmp_path / "plan.json", "--max_new_tokens", 135, "--texts", 1]
    said = work(load("calibrate"), *SMALL, folder, *plan, code=2)
    assert said.startswith(f"error: --model-name {folder}: its attention slides over 280 tokens, and a prompt has")
    slides["sliding_window"] = 200  # shorter than the default window, which no head is cut to
    (folder / "config.json").write_text(json.dumps(config | slides))
    plan[3:] = [4, "--texts", 1, "--widths", "4,8", "--recent", 4]
    work(load("calibrate"), *SMALL, folder, *plan)


# GGUF


def test_what_a_gguf_file_needs(work, tmp_path, monkeypatch):
    """ImportError from the depths of transformers, or a search of the hub for a path."""
    path = tmp_path / "model.gguf"
    flags = [*SMALL, path, "--output-path", tmp_path / "out.jsonl"]
    said = work(run_summarization, *flags, code=2)
    assert said.startswith(f"error: --model-name {path}: no such file") and said.count("\n") == 1
    path.write_bytes(b"GGUF" + bytes(60))
    monkeypatch.setattr(gguf_files, "is_gguf_available", lambda: False)
    said = work(run_summarization, *flags, code=2)
    assert "pip install --upgrade gguf accelerate" in said and said.count("\n") == 1
    monkeypatch.undo()
    before = checkpoint_fingerprint(path)
    assert before == checkpoint_fingerprint(path.rename(tmp_path / "moved.gguf"))
    (tmp_path / "moved.gguf").write_bytes(b"GGUF" + bytes(59) + b"1")
    assert before != checkpoint_fingerprint(tmp_path / "moved.gguf")


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(gguf, checkpoint, path, scaling=None):
    """A checkpoint's weights, settings and tokenizer as one file."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    config, writer = model.config, gguf.GGUFWriter(path, model.config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in words["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, weight in model.state_dict().items():
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files_are_checkpoints(work, tmp_path):
    """Weights that stay packed, which no merged product takes; or a file that results do not know."""
    gguf = pytest.importorskip("gguf")
    folder = make_checkpoint(tmp_path / "model", model_type="qwen2")
    path = tmp_path / "model.gguf"
    write_gguf(gguf, folder, path)
    model = H2OModelForCausalLM.from_pretrained(path, h2o={"window_length": 8}, dtype=torch.float32)
    expected = H2OModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is type(expected) and not hasattr(model, "hf_quantizer")
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    model.save_pretrained(tmp_path / "saved")
    assert "quantization" not in (tmp_path / "saved" / "config.json").read_text()
    h2o = ["--enable_h2o_generation", "--num_window_length", 16, "--update_interval", 4]
    texts = {}
    for cache, flags in {"full": [], "h2o": h2o}.items():
        for name in (folder, path):
            flags = [*flags, *SMALL, name, "--greedy", "--overwrite"]
            output = tmp_path / f"{cache}-{name.name}.jsonl"
            work(run_summarization, *flags, "--output-path", output)
            texts[cache, name.suffix] = [json.loads(line)["result"]["choices"][0]["text"] for line in output.open()]
        assert texts[cache, ""] == texts[cache, ".gguf"]
    metrics = json.loads((tmp_path / "h2o-model.gguf.metrics.json").read_text())
    assert checkpoint_fingerprint(path)[:16] in json.dumps(metrics["settings"])
    quantised = ["--output-path", tmp_path / "q.jsonl", "--quantize", "torchao-int8"]
    assert "unpacked; leave the flag out" in work(run_summarization, *SMALL, path, *quantised, code=2)
    said = work(load("advise"), "--model-name", path, "--json", "--context", 100)
    assert json.loads(said)["dtype"] == "bfloat16"
    write_gguf(gguf, folder, path, gguf.RopeScalingType.YARN)
    output = ["--output-path", tmp_path / "y.jsonl"]
    assert "its RoPE is scaled (qwen2.rope.scaling.type)" in work(run_summarization, *SMALL, path, *output, code=2)
