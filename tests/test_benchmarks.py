"""The benchmark scripts at tiny sizes: they run on a CPU, end in JSON, see wrong results and refuse wrong flags."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

from h2optimizer import H2OConfig, H2OLlamaForCausalLM, float8
from h2optimizer.utils.bench import SHAPES, MatrixProducts, make_models
from h2optimizer.utils.cache import CACHE_ARGUMENT, HHCache
from h2optimizer.utils.costs import floor_ms, slots_read

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
HEADS = ("--query_heads", "2", "--kv_heads", "1", "--head_dim", "32")
ATTENTION = (
    "--prefill",
    "40",
    "--decode",
    "2x20",
    "--slimming",
    "2",
    "--window_length",
    "16",
    "--repeats",
    "1",
    *HEADS,
)
TINY = ("--shape", "tiny", "--window_length", "16", "--update_interval", "2")
DECODE = (*TINY, "--repeats", "1", "--new_tokens", "4")
REQUESTS = (*TINY, "--prompt_tokens", "24", "--new_tokens", "5", "--batch_size", "3")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_attention(capsys):
    """A system or a figure that went missing."""
    assert load("bench_attention").main([*ATTENTION]) == 0
    report = last_line(capsys)
    rows = {(row["case"], row["system"]): row for row in report["rows"]}
    assert ("prefill 40", "sdpa") in rows and ("decode 2x20", "sdpa") in rows
    pytest.importorskip("triton")
    for row in rows["decode 2x20", "ours, mass"], rows["prefill 40", "ours, mass"]:
        assert row["mass_error"] < 1e-3 and row["output_error"] < 0.02
        assert row["us"] > 0 and row["x_sdpa"] > 0 and row["TBps"] > 0 and row["TFLOPs"] > 0 and row["x_floor"] > 0
    assert {"mass pass alone", "mass pass, 40 queries"} <= {system for _, system in rows}
    assert report["wrong"] == [] and report["copy_TBps"] > 0 and report["matmul_TFLOPs"] > 0
    (slimming,) = report["slimming"]
    assert slimming["batch"] == 2 and slimming["speedup"] > 0 and slimming["ms_per_step"] > 0


def test_wrong_attention_is_seen(capsys, monkeypatch):
    """A benchmark that measures how fast a wrong answer comes."""
    decode = pytest.importorskip("h2optimizer.kernels.decode")
    right = decode.decode_attention
    monkeypatch.setattr(decode, "decode_attention", lambda *args, **kwargs: 1.1 * right(*args, **kwargs))
    cases = ("--prefill", "", "--decode", "2x20", "--slimming", "", "--repeats", "1", *HEADS)
    assert load("bench_attention").main([*cases]) == 1
    captured = capsys.readouterr()
    assert "wrong: decode 2x20, ours, mass: output_error" in captured.err
    assert len(json.loads(captured.out.splitlines()[-1])["wrong"]) == 3


def test_counted_work():
    """A diagonal counted twice, or mass that a decode step only writes: floors that no kernel could reach, or any."""
    bench = load("bench_attention")
    args = SimpleNamespace(query_heads=4, kv_heads=2, head_dim=8, dtype=torch.bfloat16)
    prefill, decode = bench.Case("", 1, 5, 5), bench.Case("", 3, 1, 7)
    states, logits = 5 * 8 * 2, sum(range(1, 6))  # bytes of a head, seen slots of its queries
    assert bench.count_work(args, prefill, bench.System("", None)) == (12 * states, 4 * logits * 4 * 8)
    moved, flops = bench.count_work(args, prefill, bench.System("", None, attends=False, scored=2))
    assert (moved, flops) == (2 * states + 4 * 2 * 8 * 2 + 4 * 4 * 2 + 4 * 2 * 5, 4 * (4 + 5) * 2 * 8)
    moved, flops = bench.count_work(args, decode, bench.System("", None, scored=1))
    assert moved == 3 * (2 * 4 * 8 * 2 + 2 * 2 * 7 * 8 * 2 + 2 * 2 * 7 * 4) and flops == 3 * 4 * 7 * 4 * 8


@pytest.mark.parametrize("flags, keys", [
    (("--backends", "sdpa", "--alone", "32"), {"prefill_ms", "decode_ms", "decode_ms_x", "x_floor"}),
    (("--prefill_only", "--backends"), {"prefill_ms", "prefill_ms_x"}),
    (("--prefill_only", "--backends", "--prefill_chunk", "5", "--position_rolling"), {"prefill_ms", "prefill_ms_x"}),
])  # fmt: skip
def test_generate(capsys, flags, keys):
    """A system or a figure that went missing."""
    assert load("bench_decode").main([*DECODE, "--prompts", "24x2", *flags]) == 0
    rows = {}
    for row in last_line(capsys)["rows"]:
        rows.setdefault((row["prompt"], row["system"]), {}).update(row)
    whole = "--prefill_only" not in flags
    assert ("24x2", "stock DynamicCache") in rows and keys <= set(rows["24x2", "H2O"])
    for row in rows.values():
        assert "prefill_ms" not in row or row["prefill_ms_low"] <= row["prefill_ms"] <= row["prefill_ms_high"]
    assert (("24x2", "stock static cache") in rows) == (("24x2", "H2O backend=sdpa") in rows) == whole
    assert (("32x1", "H2O") in rows) == whole and (("24x2", "H2O score_queries=64") in rows) != whole
    assert ("host_waits" in rows.get(("24x2", "H2O uncaptured"), {})) == whole


def test_static_cache_may_fail(capsys, monkeypatch):
    """A peer whose compiler gives up, and every figure with it."""
    bench = load("bench_decode")
    generate = bench.System.generate

    def fail(system, *args):
        if system.flags:
            raise RuntimeError("two\nlines")
        generate(system, *args)

    monkeypatch.setattr(bench.System, "generate", fail)
    assert bench.main([*DECODE, "--prompts", "24x1", "--backends"]) == 0
    captured = capsys.readouterr()
    assert "left out: stock static cache: RuntimeError: two lines\n" in captured.err
    systems = {row["system"] for row in json.loads(captured.out.splitlines()[-1])["rows"]}
    assert "H2O" in systems and "stock static cache" not in systems


def test_decode_and_first_step(capsys):
    """A system, a batch size or a figure that went missing; the largest batch is --max_batch without CUDA."""
    flags = ("--prompts", "", "--contexts", "20", "--batches", "1,2", "--max_batch", "3", "--first", "20x1")
    assert load("bench_decode").main([*DECODE, *flags]) == 0
    rows = last_line(capsys)["rows"]
    decode = {(row["system"], row["batch"]): row for row in rows if "context" in row}
    full = "stock full cache, in place, eager"
    stock = "stock DynamicCache, eager"
    assert decode.keys() >= {(name, batch) for name in (full, stock, "H2O") for batch in (1, 2, 3)}
    assert all(row["tokens_per_s_x"] > 0 and row["decode_ms_x"] > 0 for row in decode.values())
    assert decode["H2O N=1", 2]["x_interval"] > 0
    first = {row["system"]: row for row in rows if "first" in row}
    assert first.keys() == {"stock DynamicCache", "H2O"} and first["H2O"]["first_call_ms"] > 0


def test_decode_has_the_contexts_it_says():
    """Rows that are not full, or a full cache that attends to other tokens than a DynamicCache."""
    bench, (model, stock) = load("bench_decode"), make_models(H2OLlamaForCausalLM, "tiny", "cpu")
    row = bench.prefilled_row(model, H2OConfig(window_length=16), 24)
    assert row.lengths == [16] and row.seen == [24] and row.evictions == [1]

    prompt, grown = torch.randint(512, (2, 24)), DynamicCache(config=stock.config)
    stock(prompt, **{CACHE_ARGUMENT: grown})
    layers = []
    for layer in grown.layers:
        states = (torch.cat([states, torch.zeros(2, 2, 3, 16)], dim=2) for states in (layer.keys, layer.values))
        layers.append(bench.FullLayer(*states, 24))
    in_place = Cache(layers=layers)
    for position in range(24, 27):
        inputs = {"input_ids": prompt[:, :1], "position_ids": torch.tensor([[position]])}
        expected, got = (stock(**inputs, **{CACHE_ARGUMENT: cache}).logits for cache in (grown, in_place))
        torch.testing.assert_close(got, expected)


def test_floor():
    """Bytes counted twice, an embedding that no step reads, or slots that a row does not have."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES["8b"] | {"num_hidden_layers": 1})).to(torch.bfloat16)
    layer = 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    head, norm, slot = 2 * 128256 * 4096, 2 * 4096, 2 * 8 * 128 * 2
    assert floor_ms(model, 3, 1087, 1, 4.0) == pytest.approx((head + norm + layer + 3 * 1088 * slot) / 4e9)
    h2o = H2OConfig(window_length=1087)
    massed = head + norm + layer + 3 * 1088 * (slot + 2 * 8 * 4)
    assert floor_ms(model, 3, 32768, 1, 4.0, h2o) == pytest.approx(massed / 4e9)
    whole = head + norm + 32 * layer  # of the whole model, as others measured it: 3.55 and 12.1 ms at 4.27 TB/s
    for batch, ms in (1, 3.55), (256, 12.1):
        assert (whole + batch * 1088 * 32 * slot) / 4.27e9 == pytest.approx(ms, rel=0.02)

    h2o = H2OConfig(window_length=16, update_interval=4)
    (model, _), cache, slots = make_models(H2OLlamaForCausalLM, "tiny", "cpu"), HHCache(h2o), []
    with torch.no_grad():
        model(torch.randint(512, (1, 14)), past_key_values=cache)
        for _ in range(9):
            slots.append(cache.lengths[0] + 1)
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert slots_read(14, 9, h2o) == sum(slots) / 9 and slots_read(14, 9) == sum(range(15, 24)) / 9


def test_summarization(capsys):
    """A system or a figure that went missing."""
    flags = ("--requests", "7", "--stock_requests", "2", "--stock_batch", "2", "--mixed")
    assert load("bench_summarization").main([*REQUESTS, *flags, "--repeats", "1"]) == 0
    rows = {row["system"]: row for row in last_line(capsys)["rows"]}
    assert rows.keys() == {"stock, one by one", "stock, batches of 2", "H2O batcher"}
    assert [row["requests"] for row in rows.values()] == [2, 7, 7] and rows["H2O batcher"]["rows"] == 3
    assert all(row["requests_per_s_x"] > 0 and 0 < row["prefill_share"] < 1 for row in rows.values())
    assert all(row["decode_per_s"] > 4 / 5 * row["tokens_per_s"] for row in rows.values()), "prefill's time is left out"
    assert all(row["prefill_ms"] > 0 and row["products_ms"] > 0 for row in rows.values())
    assert rows["stock, one by one"]["prefill"].startswith("1x")


def test_workloads_of_one_run(capsys, monkeypatch):
    """Prompts that share nothing, or all, or lengths of another workload; float8 rows that ran on other weights."""
    quant_api = pytest.importorskip("torchao.quantization.quant_api")
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    bench, seen = load("bench_summarization"), []
    monkeypatch.setattr(bench, "float8_config", lambda args, model: float8.config())
    monkeypatch.setattr(H2OLlamaForCausalLM, "merge_projections", lambda model: None)
    make, prepare = bench.make_models, bench.make_batcher

    def make_batcher(args, model, requests, **flags):
        seen.append((type(model.model.layers[0].mlp.up_proj.weight).__name__, [r.prompt for r in requests]))
        return prepare(args, model, requests, **flags)

    monkeypatch.setattr(bench, "make_models", lambda *args: [model.bfloat16() for model in make(*args)])
    monkeypatch.setattr(bench, "make_batcher", make_batcher)
    flags = ("--stock_requests", "0", "--stock_batch", "0", "--requests", "3", "--quantize", "torchao-float8")
    lengths = ("--prompt_tokens", "24,9,24", "--shared_tokens", "0,0,16", "--repeats", "1")
    assert bench.main([*REQUESTS, *flags, *lengths]) == 0
    rows = last_line(capsys)["rows"]
    assert [row["system"] for row in rows] == ["H2O batcher"] * 3 + ["H2O batcher float8"] * 3
    assert [(row["prompt_tokens"], row["shared_tokens"]) for row in rows] == [(24, 0), (9, 0), (24, 16)] * 2
    assert [kind for kind, _ in seen] == ["Parameter"] * 3 + ["Float8Tensor"] * 3
    for (_, prompts), row in zip(seen, rows, strict=True):
        assert {len(prompt) for prompt in prompts} == {row["prompt_tokens"]}
        same = [len({prompt[i] for prompt in prompts}) == 1 for i in range(row["prompt_tokens"])]
        assert all(same[: row["shared_tokens"]]) and not all(same[row["shared_tokens"] :])
    assert all(row["products_ms"] > 0 for row in rows)


def test_all_matrix_products_are_repeated():
    """Products left out or of another shape, and so a prefill that seems to be far from their time."""
    model, _ = make_models(H2OLlamaForCausalLM, "tiny", "cpu")
    for mode in torch.no_grad, torch.inference_mode:
        with mode(), MatrixProducts() as products:
            model(torch.ones(3, 10, dtype=torch.long), logits_to_keep=1)
        assert len(products) == 2 * 7 + 1
        with FlopCounterMode(display=False) as counter:
            products.run()
        layer = 3 * 64 * 128 + 2 * 64 * 64 + 2 * 64 * 32
        assert counter.get_total_flops() == 2 * (30 * 2 * layer + 3 * 64 * 512)


def test_soak_sees_lost_tokens_and_requests(capsys, monkeypatch):
    """A soak that is content with whatever comes back."""
    bench = load("bench_summarization")
    assert bench.main([*REQUESTS, "--soak", "--requests", "40"]) == 0
    report = last_line(capsys)
    assert report["requests"] == 40 and report["wrong"] == [] and len(report["memory_MiB"]) == 10

    class Losing(bench.Batcher):
        def run(self, sequences):
            for i, sequence in enumerate(super().run(sequences)):
                if i % 3 == 0:
                    sequence.tokens.pop()
                if i != 4:
                    yield sequence

    monkeypatch.setattr(bench, "Batcher", Losing)
    assert bench.main([*REQUESTS, "--soak", "--requests", "9"]) == 1
    wrong = last_line(capsys)["wrong"]
    assert len(wrong) == 4 and sum("came back 0 times" in line for line in wrong) == 1


@pytest.mark.parametrize("script, flags", [
    ("bench_attention", ("--decode", "1024")),
    ("bench_attention", ("--prefill", "0")),
    ("bench_attention", ("--query_heads", "4", "--kv_heads", "3")),
    ("bench_attention", ("--head_dim", "12")),
    ("bench_attention", ("--repeats", "-1")),
    ("bench_decode", ("--prompts", "2048")),
    ("bench_decode", ("--window_length", "1")),
    ("bench_decode", ("--backends", "flash")),
    ("bench_decode", ("--slimming", "1")),
    ("bench_decode", ("--contexts", "32768x1")),
    ("bench_decode", ("--bandwidth", "0")),
    ("bench_decode", ("--prefill_only", "--contexts", "64")),
    ("bench_decode", ("--prompts", "")),
    ("bench_summarization", ("--batch_size", "many")),
    ("bench_summarization", ("--requests", "0")),
    ("bench_summarization", ("--window_length", "1")),
    ("bench_summarization", ("--prompt_tokens", "")),
    ("bench_summarization", ("--prompt_tokens", "64", "--shared_tokens", "65")),
    ("bench_summarization", ("--prompt_tokens", "64,32", "--shared_tokens", "1,2,3")),
    ("bench_summarization", ("--prompt_tokens", "64,32", "--soak")),
    ("bench_summarization", ("--quantize", "torchao-float8", "--shape", "tiny")),
], ids=str)  # fmt: skip
def test_wrong_flags_get_one_line(capsys, script, flags):
    assert load(script).main([*flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize("name", ["bench_attention", "bench_decode", "bench_summarization"])
def test_interruption_takes_one_line(name, monkeypatch, capsys):
    """A traceback over the results that are there."""
    script = load(name)
    monkeypatch.setattr(script, "run", lambda args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert script.main([]) == 130
    assert capsys.readouterr().err == "interrupted: the results so far are printed above\n"
