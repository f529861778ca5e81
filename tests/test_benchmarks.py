"""The benchmark scripts at tiny sizes: they run on a CPU, end in JSON, see wrong results and refuse wrong flags."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
ATTENTION = ("--prefill", "40", "--decode", "2x20", "--slimming", "2", "--window_length", "16", "--repeats", "1")
MODEL = ("--shape", "tiny", "--prompts", "24x2", "--window_length", "16", "--update_interval", "2", "--repeats", "1")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
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
    assert load("bench_attention").main(["--prefill", "", "--decode", "2x20", "--slimming", "", "--repeats", "1"]) == 1
    captured = capsys.readouterr()
    assert "wrong: decode 2x20, ours, mass: output_error" in captured.err
    assert len(json.loads(captured.out.splitlines()[-1])["wrong"]) == 2


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
    (("--new_tokens", "4", "--backends", "sdpa", "--alone", "32"), {"prefill_ms", "decode_ms", "decode_ms_x"}),
    (("--prefill_only", "--backends"), {"prefill_ms", "prefill_ms_x"}),
])  # fmt: skip
def test_decode(capsys, flags, keys):
    """A system or a figure that went missing."""
    assert load("bench_decode").main([*MODEL, *flags]) == 0
    rows = {(row["prompt"], row["system"]): row for row in last_line(capsys)["rows"]}
    assert ("24x2", "stock DynamicCache") in rows and keys <= set(rows["24x2", "H2O"])
    assert (("32x1", "H2O") in rows) == ("--alone" in flags)
    assert (("24x2", "H2O score_queries=64") in rows) == ("--prefill_only" in flags)


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
], ids=str)  # fmt: skip
def test_wrong_flags_get_one_line(capsys, script, flags):
    assert load(script).main([*flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
