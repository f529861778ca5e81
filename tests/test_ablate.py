"""The ablation lab: fidelity against the oracle, and scripts/ablate.py as its user runs it."""

import dataclasses
import itertools
import json
import math
import re
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch

import run_summarization
from checkpoints import made_up_text, make_checkpoint, make_requests, write_requests
from conftest import make_llamas, new_oracle, prompt
from h2optimizer import H2OConfig, decoding, sharing
from h2optimizer.fidelity import ForcedDecode, Recorded, compare
from h2optimizer.flags import DEMO_MODEL
from h2optimizer.utils import bench
from h2optimizer.utils.ablation import figures, policy_name, read_cells, unpack
from h2optimizer.utils.bench import Spread, prefill_and_step_ms, stock_model
from h2optimizer.utils.budgets import MeasuredBudgets, request_fingerprint
from h2optimizer.utils.requests import InputError, read_requests
from h2optimizer.utils.results import PLAN
from h2optimizer.utils.rouge import mean_with_interval
from test_benchmarks import load

ROWS = [prompt(18), prompt(14, 1), prompt(16, 2)]
TEXTS = [prompt(5, 3), prompt(9, 4), prompt(1, 5)]
FLAGS = {
    "H2O": {"update_interval": 1},
    "rotation": {"update_interval": 4},
    "rolling": {"update_interval": 3, "position_rolling": True},
    "sink": {"update_interval": 1, "score": "sink"},
    "recent only": {"update_interval": 4, "num_heavy_hitters": 0},
    "nothing is evicted": {"update_interval": 4, "window_length": 80},
}


# Fidelity


def full_attention(stock, tokens: list[int]) -> list[torch.Tensor]:
    """The whole matrix of each layer, [Hq, n, n]."""
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = stock(torch.tensor([tokens]), output_attentions=True, use_cache=False).attentions
    stock.set_attn_implementation("sdpa")
    return [attention[0].double() for attention in attentions]


def by_oracle(llamas, row: list[int], text: list[int], flags: dict):
    """Fidelity's sums, mass lost [steps][layers] and positions held before each step, by loops over oracles."""
    ours = new_oracle(llamas, **flags)
    full = new_oracle(llamas, window_length=len(row) + len(text))
    matrices = full_attention(llamas.stock, row + text)
    ours.forward(row), full.forward(row)
    sums, lost, held = {"agreed": 0, "kl": 0.0, "nll": 0.0, "mass_lost": 0.0}, [], []
    for step, token in enumerate(text[:-1]):
        held.append([ours.positions(layer) for layer in range(len(matrices))])
        at = len(row) + step
        lost.append([])
        for matrix, heads in zip(matrices, held[-1], strict=True):
            group = matrix.shape[0] // len(heads)
            gone = [1 - matrix[h, at, [*heads[h // group], at]].sum().item() for h in range(matrix.shape[0])]
            lost[-1].append(sum(gone) / len(gone))
        p, q = (oracle.forward([token])[-1].log_softmax(-1) for oracle in (full, ours))
        sums["agreed"] += int(p.argmax() == q.argmax())
        sums["kl"] += (p.exp() * (p - q)).sum().item()
        sums["nll"] -= q[text[step + 1]].item()
        sums["mass_lost"] += sum(lost[-1]) / len(lost[-1])
    return sums, lost, held


def held_after(llamas, row: list[int], text: list[int], flags: dict) -> list[int]:
    """Positions that a head of the first layer holds at the text's end, whose last token is not fed."""
    oracle = new_oracle(llamas, **flags)
    oracle.forward(row)
    for token in text[:-1]:
        oracle.forward([token])
    return oracle.positions(0)[0]


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_fidelity_is_the_oracles(gqa, flags):
    """A step or a row compared with another one's, a divergence the wrong way round, attention on padding or on the
    step's own token counted as lost, the tokens held after a step taken for those before it, another row's bytes."""
    flags = {"window_length": 12} | flags
    gqa.h2o.h2o = H2OConfig(**flags)
    fidelity, retention = compare(gqa.stock, gqa.h2o, ROWS, TEXTS, follow=1)
    for row, (tokens, text) in enumerate(zip(ROWS, TEXTS, strict=True)):
        sums, lost, held = by_oracle(gqa, tokens, text, flags)
        ours = dataclasses.asdict(fidelity[row])
        assert ours.pop("tokens") == len(text) - 1
        slots, shape = ours.pop("slots_kept"), gqa.h2o.config
        assert slots == len(held_after(gqa, tokens, text, flags))
        slot_bytes = 2 * 4 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
        assert ours.pop("kv_bytes") >= slots * slot_bytes
        assert ours == pytest.approx(sums, rel=1e-4, abs=2e-4)
        if row == 1:
            np.testing.assert_allclose(retention.mass_lost, lost, atol=1e-5)
            assert retention.prompt_tokens == len(tokens)
            assert retention.last_held.shape == (2, 2, len(tokens) + len(text) - 1)
            for step, layers in enumerate(held, start=1):
                for layer, heads in enumerate(layers):
                    for head, positions in enumerate(heads):
                        there = (retention.last_held[layer, head] >= step).nonzero()[:, 0].tolist()
                        own = len(tokens) + step - 1
                        assert [at for at in there if at <= own] == [*positions, own]


def test_full_cache_beside_itself(gqa):
    """A baseline whose own row is not exact, or that is run twice for it."""
    fidelity, retention = compare(gqa.stock, gqa.stock, ROWS, TEXTS, follow=0)
    assert retention is None
    for row, text in zip(fidelity, TEXTS, strict=True):
        assert (row.tokens, row.agreed, row.kl, row.mass_lost) == (len(text) - 1, len(text) - 1, 0.0, 0.0)
    assert [row.slots_kept for row in fidelity] == [
        len(of) + len(text) - 1 for of, text in zip(ROWS, TEXTS, strict=True)
    ]
    assert gqa.stock.config._attn_implementation == "sdpa"


def test_full_cache_that_is_recorded(gqa):
    """Rows of another order, or a second comparison that begins where the first one ended."""
    recorded = Recorded(gqa.stock, ROWS, TEXTS)
    for flags in ({"window_length": 12, "update_interval": 1}, {"window_length": 16, "update_interval": 4}):
        gqa.h2o.h2o = H2OConfig(**flags)
        for rows in ([0, 1, 2], [2, 0]):
            side = [ROWS[row] for row in rows], [TEXTS[row] for row in rows]
            wanted, _ = compare(gqa.stock, gqa.h2o, *side)
            got, _ = compare(gqa.stock, gqa.h2o, *side, recorded=recorded.of(rows))
            for of_row, other in zip(got, wanted, strict=True):
                assert dataclasses.asdict(of_row) == pytest.approx(
                    dataclasses.asdict(other) | {"mass_lost": 0.0}, rel=1e-4, abs=1e-4
                )


@pytest.mark.parametrize("which", ["stock", "h2o"])
def test_equal_prompts_are_each_their_own_row(gqa, which):
    """Rows that share a prefill and then a cache as well: each goes on with its own tokens."""
    model = getattr(gqa, which)
    if which == "h2o":
        model.h2o = H2OConfig(window_length=12, update_interval=2)
    together = ForcedDecode(model, [ROWS[0], ROWS[1], ROWS[0]])
    alone = [ForcedDecode(model, [row]) for row in (ROWS[0], ROWS[1], ROWS[0])]
    for step in range(6):
        for row, other in enumerate(alone):
            torch.testing.assert_close(together.logits[row], other.logits[0], rtol=1e-4, atol=1e-4)
        tokens = [10 + step, 20 + step, 30 + step]
        together.feed(tokens)
        for other, token in zip(alone, tokens, strict=True):
            other.feed([token])


@pytest.mark.parametrize("tied", [True, False])
def test_stock_llama_shares_the_weights(tied):
    """A second copy of the weights in memory; embeddings that come apart; another model."""
    model = make_llamas(tie_word_embeddings=tied).h2o
    stock = stock_model(model)
    ours = {name: weight.data_ptr() for name, weight in model.named_parameters(remove_duplicate=False)}
    assert {name: weight.data_ptr() for name, weight in stock.named_parameters(remove_duplicate=False)} == ours
    assert len(list(stock.parameters())) == len(list(model.parameters())), "a tied head that is a weight of its own"
    assert type(stock).__name__ == "LlamaForCausalLM" and stock.config is not model.config
    ids = torch.tensor([prompt(12)])
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, model(ids, use_cache=False).logits)


# What figures are


def test_mean_of_tokens_is_weighted_by_them():
    """Texts that count alike whatever their length, or an interval of other means than the mean is."""
    of = mean_with_interval([9, 0, 0], weights=[9, 1, 0])
    assert of["mean"] == 0.9 and of["low"] == 0.0 and of["high"] == 1.0
    same = mean_with_interval([2.0] * 5)
    assert same == {"mean": 2.0, "low": 2.0, "high": 2.0}


def test_step_time_is_what_a_token_adds():
    """Prefill that is counted into the steps, a mean in the place of the median, or a spread of other calls."""
    assert prefill_and_step_ms([(10, 74), (11, 139), (500, 564)], 65) == ((11, 10, 500), (1.0, 1.0, 2.0))


# The script


def cells_of(ablate, *flags):
    args = ablate.parse_args(list(flags))
    return ablate.cells_of(args, ablate.grids(args), torch.device("cpu"))


@pytest.fixture(scope="module")
def ablate():
    return load("ablate")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A tiny checkpoint and five requests of 10 tokens."""
    folder = tmp_path_factory.mktemp("lab")
    checkpoint = make_checkpoint(folder / "model")
    requests = make_requests(5, max_tokens=10)
    requests[3]["stop"] = ["a"]  # a text that ends before the others
    short_first = write_requests(folder / "short_first.jsonl", [requests[3], *requests[:3], requests[4]])
    written = write_requests(folder / "requests.jsonl", requests)
    return SimpleNamespace(model=checkpoint, requests=written, short_first=short_first)


@pytest.fixture
def sweep(ablate, lab, tmp_path, capsys, monkeypatch):
    """Runs the script on the lab; returns its status, lines on stderr, table and cells.

    Each time it measures is longer than the one before: on a real clock three tokens may take less than one did.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    readings = itertools.count()
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(readings) ** 2 / 1e3))

    def run(*flags, output="cells.jsonl", code=0):
        path = tmp_path / output
        common = ["--model-name", str(lab.model), "--input-path", str(lab.requests), "--output-path", str(path)]
        common += ["--batch_size", "3", "--timed_tokens", "3", "--repeats", "1", "--device", "cpu"]
        assert ablate.main([*common, *flags]) == code
        said = capsys.readouterr()
        errors = [line for line in said.err.splitlines() if line.startswith(("error", "left out", "interrupted"))]
        cells = read_cells(path) if path.exists() and path.stat().st_size else []
        table, _, units = said.out.partition("\n\n")
        return SimpleNamespace(
            errors=errors, err=said.err, table=table.splitlines(), units=units, cells=cells, path=path
        )

    return run


def quality(cells: list[dict]) -> list[dict]:
    """What does not depend on the clock."""
    return [{key: value for key, value in cell.items() if key != "time"} for cell in cells]


def test_killed_sweep_goes_on_to_the_same_cells(sweep, ablate, monkeypatch):
    """A cell that is lost, done twice or measured against other texts when the sweep was killed while writing it."""
    grid = "--window_length 8 --update_interval 4 --score mass sink random --num_heavy_hitters -1 0".split()
    whole = sweep(*grid)
    assert len(whole.cells) == 5 and len(whole.table) == 6  # the full cache, 3 policies and recent only
    append, done = ablate.JsonlFile.append, []

    def torn(self, entry):
        if len(done) == 3:
            self._file.write(json.dumps(entry).encode()[:200])
            self._file.flush()
            raise KeyboardInterrupt
        append(self, entry)
        done.append(entry["cell"])

    with monkeypatch.context() as patch:
        patch.setattr(ablate.JsonlFile, "append", torn)
        killed = sweep(*grid, output="killed.jsonl", code=130)
    (said,) = killed.errors
    assert "run the same command again" in said and [cell["cell"] for cell in killed.cells] == done
    measured, measure = [], ablate.Lab.measure
    monkeypatch.setattr(
        ablate.Lab, "measure", lambda self, h2o, texts: measured.append(h2o) or measure(self, h2o, texts)
    )
    again = sweep(*grid, output="killed.jsonl")
    assert len(measured) == 2 and "3 of 5 cells are already measured" in again.err
    assert quality(again.cells) == quality(whole.cells)
    columns = whole.table[0].index("first ms")  # before the clock's
    assert [line[:columns] for line in again.table] == [line[:columns] for line in whole.table]
    assert sweep(*grid, output="killed.jsonl").table == again.table and len(measured) == 2


def test_cells_are_what_run_summarization_gives(sweep, lab, tmp_path):
    """Another way to decode, to cut texts or to score them than the command that users run; requests out of order."""
    cells = sweep("--window_length", "12", "--update_interval", "4").cells
    for cell, flags in zip(cells, ([], ["--enable_h2o_generation", "--num_window_length", "12"]), strict=True):
        flags += ["--update_interval", "4"] * bool(flags)
        path = tmp_path / f"{len(flags)}.jsonl"
        common = ["--model-name", str(lab.model), "--input-path", str(lab.requests), "--output-path", str(path)]
        assert run_summarization.main([*common, "--greedy", "--device", "cpu", *flags]) == 0
        results = [json.loads(line) for line in path.read_text().splitlines()]
        for name, values in cell["rouge"].items():
            assert values == pytest.approx([result["rouge"][name] for result in results], abs=1e-6)
        assert cell["slots_kept"] == sum(result["cache"]["slots_kept"] for result in results) / len(results)
        if cell["h2o"] is None:
            assert list(map(len, cell["texts"])) == [result["tokens_generated"] for result in results]
            assert len(cell["texts"][3]) < 10


def test_beginnings_computed_once_change_no_cell(sweep, lab, monkeypatch, tmp_path):
    """Figures of another request, because those who share a beginning come together; other settings' snapshots."""
    monkeypatch.setattr(sharing, "LEAST_SAVED", 1)
    requests = [json.loads(line) for line in lab.requests.read_text().splitlines()]
    for i, request in enumerate(requests):
        request["article"] = made_up_text(3, seed=i % 2) + request["article"]
    flags = ["--input-path", str(write_requests(tmp_path / "requests.jsonl", requests)), "--window_length", "8", "200"]
    snapshots, snapshot = [], decoding.BoundedDecoding.snapshot
    monkeypatch.setattr(
        decoding.BoundedDecoding, "snapshot", lambda self, *args: snapshots.append(self.h2o) or snapshot(self, *args)
    )
    apart = sweep(*flags, "--no-share_prefixes", output="apart.jsonl").cells
    assert not snapshots
    shared = sweep(*flags, output="shared.jsonl").cells
    assert len(set(snapshots)) == 2
    for one, other in zip(quality(shared), quality(apart), strict=True):
        for name, sums in one.pop("fidelity").items():
            assert sums == pytest.approx(other["fidelity"][name], rel=1e-3, abs=1e-4)
        assert one.pop("retention", {}).get("last_held") == other.pop("retention", {}).get("last_held")
        del other["fidelity"]
        assert one == other


def test_figures_follow_the_cells(sweep):
    """A table whose numbers are another cell's, in other units, or not those of the file."""
    outcome = sweep("--window_length", "8", "200")
    full, narrow, wide = outcome.cells
    defaults = dataclasses.asdict(H2OConfig())
    row = figures(narrow, full, defaults)
    tokens = sum(narrow["fidelity"]["tokens"])
    assert tokens == sum(map(len, full["texts"])) - 5
    assert row["kl"]["mean"] == pytest.approx(sum(narrow["fidelity"]["kl"]) / tokens)
    assert row["perplexity"]["mean"] == pytest.approx(math.exp(sum(narrow["fidelity"]["nll"]) / tokens))
    assert 0 < row["top1"]["mean"] < 1 and 0 < row["mass_lost"]["mean"] < 1
    assert narrow["time"]["batch"] == 3 and narrow["time"]["tokens_per_second"] > 0
    timing = narrow["time"]
    assert timing["tokens_per_second"] == pytest.approx(timing["batch"] / timing["time_per_token"])
    same = figures(wide, full, defaults)
    assert same["top1"]["mean"] == 1 and same["kl"]["mean"] < 1e-5 and same["rouge2_delta"]["mean"] == 0
    assert same["perplexity"]["mean"] == pytest.approx(figures(full, full, defaults)["perplexity"]["mean"], rel=1e-5)
    held = unpack(narrow["retention"]["last_held"])
    followed = full["texts"][narrow["retention"]["index"]]
    assert held.shape == (2, 2, narrow["retention"]["prompt_tokens"] + len(followed) - 1)
    assert (held == 0).any() and held.max() == len(narrow["retention"]["mass_lost"]) == len(followed) - 1
    assert "retention" not in full
    shown = dict(zip(outcome.table[0].split("  "), outcome.table[2].split("  "), strict=False))
    assert shown["policy"].strip() == "H2O" and outcome.table[1].startswith("full cache")


def test_other_conditions_are_other_cells(sweep, monkeypatch):
    """Times of another batch size, or of fewer requests or calls, that pass for those that were asked for; cells of
    another torch that a sweep goes on with."""
    sweep("--window_length", "8")
    assert len(sweep("--window_length", "8", "--batch_size", "2").cells) == 4
    assert len(sweep("--window_length", "8", "--sample_num", "2").cells) == 6
    assert len(sweep("--window_length", "8", "--num_window_length", "8").cells) == 6
    assert len(sweep("--window_length", "8", "--repeats", "2", "--sample_num", "2").cells) == 8
    monkeypatch.setattr(torch, "__version__", "3.0.0")
    assert len(sweep("--window_length", "8", "--sample_num", "2").cells) == 10


def test_clock_and_memory_are_the_devices(sweep, ablate, monkeypatch):
    """Times of a second GPU that end when the first, which is idle, is done; peak memory of the first."""
    current, seen = [], []

    @contextmanager
    def enter(device):
        current.append(device)
        yield
        current.pop()

    load_model, prefill_and_whole_ms = ablate.load_model, ablate.prefill_and_whole_ms
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "select_device", lambda name: torch.device("cuda:1"))
        patch.setattr(
            ablate, "load_model", lambda name, h2o, _, dtype: load_model(name, h2o, torch.device("cpu"), dtype)
        )
        patch.setattr(
            ablate, "prefill_and_whole_ms", lambda *args: seen.append(current[-1]) or prefill_and_whole_ms(*args)
        )
        patch.setattr(torch.cuda, "get_device_name", str)
        patch.setattr(torch.cuda, "device", enter)
        cells = sweep("--window_length", "8", "--backend", "sdpa").cells
    assert seen == [torch.device("cuda:1")] * 2 and not current
    assert cells[0]["setup"]["device"] == "cuda:1"


@pytest.mark.parametrize(
    ("grid", "cells"),
    [
        ("window_length: [8, 16]\nscore: sink\n", [(8, "sink"), (16, "sink")]),
        ("- window_length: 8\n- {score: [mass, random], window_length: 8}\n", [(8, "mass"), (8, "random")]),
        ("- {num_heavy_hitters: 0, score: [mass, sink], score_decay: [0.5, 1.0]}\n", [(256, "mass")]),
        ("{window_length: 8, num_heavy_hitters: [-1, 4], score_seed: [0, 1]}\n", [(8, "mass")]),
        ("{window_length: 8, score: random, score_seed: [0, 1]}\n", [(8, "random"), (8, "random")]),
        ("{window_length: 8, backend: [auto, sdpa], capture: [true, false]}\n", [(8, "mass")]),
        ("{window_length: 8, score_decay: [1, 1.0]}\n", [(8, "mass")]),
        ("{window_length: 20, score: [sink, streaming_llm], num_heavy_hitters: 4}\n", [(20, "streaming_llm")]),
        (
            "{window_length: 20, score: [streaming_llm, sink], num_heavy_hitters: [-1, 10]}\n",
            [(20, "streaming_llm"), (20, "sink")],
        ),
        (
            "{window_length: 20, score: [streaming_llm, sink], num_heavy_hitters: [0, 7]}\n",
            [(20, "mass"), (20, "sink")],
        ),
        ("{window_length: [8, 9], score: [streaming_llm, sink]}\n", [(8, "sink"), (9, "sink")]),
    ],
)
def test_grid_as_yaml(ablate, tmp_path, grid, cells):
    """A field that is lost, a product that is not taken, settings that mean the same and are measured twice."""
    path = tmp_path / "grid.yaml"
    path.write_text(grid)
    made = cells_of(ablate, "--grid", str(path))
    assert [(h2o.window_length, h2o.score) for h2o in made] == cells


@pytest.mark.parametrize(("flags", "name"), [
    ({}, "H2O"), ({"num_heavy_hitters": 5}, "H2O, 5 heavy"), ({"num_heavy_hitters": 0}, "recent only"),
    ({"score": "sink"}, "sink + recent"), ({"score": "sink", "num_heavy_hitters": 4}, "StreamingLLM (4 sinks)"),
    ({"score": "streaming_llm"}, "StreamingLLM (4 sinks)"), ({"score": "sink", "num_heavy_hitters": 9}, "9 sinks"),
    ({"score": "streaming_llm", "num_heavy_hitters": 9}, "9 sinks"), ({"score": "random"}, "random + recent"),
], ids=str)  # fmt: skip
def test_policies_have_their_own_names(flags, name):
    """Half a window of sinks that is drawn as StreamingLLM, which keeps four."""
    assert policy_name(dataclasses.asdict(H2OConfig(**flags)), dataclasses.asdict(H2OConfig())) == name


def test_tokens_of_a_long_text_are_followed(sweep, lab, ablate):
    """A map of request 0, whose text ends after a few tokens; another request in each cell, or none recorded."""
    prompts = [SimpleNamespace(tokens=[1] * n) for n in (50, 7, 9, 9, 9)]
    assert ablate.longest([[1] * n for n in (4, 9, 9, 9, 8)], prompts) == 2
    full, *cells = sweep("--window_length", "8", "16", "--input-path", str(lab.short_first)).cells
    (index,) = {cell["retention"]["index"] for cell in cells}
    assert len(full["texts"][0]) < 9 and len(full["texts"][index]) == 10 and index > 0
    assert full["setup"]["retention_request"] == "longest text"
    cell = sweep("--window_length", "8", "--retention_request", "3").cells[-1]
    assert cell["retention"]["index"] == cell["setup"]["retention_request"] == 3


def test_spread_of_times_is_recorded_and_shown(sweep, ablate, monkeypatch):
    """A median alone, which says nothing of how far calls differ."""
    times = [(10.0, 12.0), (11.0, 15.0), (12.0, 20.0)] * 2
    monkeypatch.setattr(ablate, "prefill_and_whole_ms", lambda generate, tokens: times.pop())
    outcome = sweep("--window_length", "8", "--repeats", "3")
    timing = outcome.cells[1]["time"]
    assert timing["calls"] == 3 and timing["time_to_first_token_range"] == pytest.approx([0.010, 0.012])
    assert timing["time_per_token"] == pytest.approx(0.002)
    assert timing["time_per_token_range"] == pytest.approx([0.001, 0.004])
    row = figures(outcome.cells[1], outcome.cells[0], {})
    assert row["tokens_per_second_range"] == pytest.approx([750, 3000])
    for shown in "11.0 [10.0, 12.0]", "2.00 [1.00, 4.00]", "1500 [750, 3000]":
        assert shown in outcome.table[2]
    assert "Median [lowest, highest] of 3 calls with 3 prompts" in outcome.units and "5 requests" in outcome.units
    monkeypatch.setattr(ablate, "prefill_and_whole_ms", lambda generate, tokens: (10.0, 12.0))
    once = sweep("--window_length", "8", "--sample_num", "1")
    assert "One call" in once.units and "one request: no interval" in once.units


def test_number_written_otherwise_is_the_same_cell(ablate):
    """score_decay 1 and 1.0, or 0 and 0.0, of two commands: the same cache measured twice, under two names."""
    names = set()
    for decay in ("0", "0.0"):
        (h2o,) = cells_of(ablate, "--score_decay", decay)
        names.add(ablate.cell_name({}, h2o))
    assert len(names) == 1


def test_fault_is_told_once(ablate, tmp_path, capsys):
    """The same left-out line again and again, for a value that a grid names twice."""
    path = tmp_path / "grid.yaml"
    path.write_text("window_length: [8, 8]\nupdate_interval: [1, 1.0]\n")
    cells_of(ablate, "--grid", str(path))
    assert capsys.readouterr().err.count("left out") == 1


def test_plan_that_saw_the_requests(sweep, lab, tmp_path):
    """A plan judged on its own texts without a word, or not taken at all."""
    requests, _ = read_requests(lab.requests, None, None)
    plan = MeasuredBudgets(
        widths=(4, 8),
        losses=(((1.0, 0.5), (0.1, 0.0)), ((0.1, 0.1), (0.2, 0.0))),
        texts=tuple(map(request_fingerprint, requests[1:])),
    )
    plan.save(tmp_path / "plan.json")
    of = sweep("--window_length", "12", "--head_budgets", str(tmp_path / "plan.json"), "--sample_num", "2")
    assert f"{tmp_path}/plan.json was measured on 1 of these 2 requests; a plan is no fair test" in of.err
    assert of.cells[1]["h2o"]["head_budgets"] == [list(row) for row in plan.windows(12, 6)]


def test_figures_that_are_no_numbers_are_not_written(sweep, ablate, monkeypatch):
    """Logits that overflow: a cell of NaN that no reader can use, and that is never measured again."""
    fidelity = ablate.Lab._fidelity

    def overflowing(self, model, texts):
        measured = fidelity(self, model, texts)
        if model is not self.stock:
            measured["fidelity"]["kl"][0] = math.nan
        return measured

    monkeypatch.setattr(ablate.Lab, "_fidelity", overflowing)
    outcome = sweep("--window_length", "8", code=2)
    (line,) = outcome.errors
    assert "--dtype auto" in line and "kl" in line and "H2O, 8, 16" in line and len(outcome.cells) == 1


def test_clock_that_runs_backwards(sweep, ablate, monkeypatch):
    """Two timed tokens and a noisy machine: negative tokens/s in the table."""
    calls = []
    monkeypatch.setattr(
        ablate,
        "prefill_and_step_ms",
        lambda times, tokens: calls.append(len(times)) or (Spread.of([5.0]), Spread.of([len(times) - 2.5])),
    )
    outcome = sweep("--window_length", "8")
    assert calls == [1, 2, 3] * 2 and all(cell["time"]["time_per_token"] > 0 for cell in outcome.cells)
    monkeypatch.setattr(ablate, "prefill_and_step_ms", lambda times, tokens: (Spread.of([5.0]), Spread.of([-0.1])))
    (line,) = sweep("--window_length", "16", code=2).errors
    assert "--timed_tokens 3" in line


def test_edited_cell_is_refused(sweep):
    """A line that was edited by hand, and a traceback where the table is printed."""
    path = sweep("--window_length", "8").path
    path.write_text(path.read_text().replace('"agreed": [', '"agreed": [null, '))
    before = path.read_bytes()
    assert ablate_error(sweep, "line 1 (agreed must be 5 numbers, at least 0)") and path.read_bytes() == before


def ablate_error(sweep, words: str) -> bool:
    with pytest.raises(InputError, match=re.escape(words)):  # the fixture reads the cells afterwards
        sweep("--window_length", "8", code=2)
    return True


def test_values_are_of_the_fields_types(ablate):
    """A window of "64", a score_every_step of "false" that is true."""
    flags = "--window_length 64 --score_decay 0.5 --score_queries 8 all --score_every_step false True"
    made = cells_of(ablate, *flags.split())
    seen = {(h2o.window_length, h2o.score_decay, h2o.score_queries, h2o.score_every_step) for h2o in made}
    assert seen == {(64, 0.5, queries, every) for queries in (8, None) for every in (True, False)}


def test_cells_that_cannot_work_are_left_out(sweep):
    """One bad pair in a grid that ends the sweep, or that is dropped without a word."""
    outcome = sweep("--window_length", "8", "64", "--num_heavy_hitters", "16", "--backend", "sdpa", "flash_attn")
    assert [cell["h2o"] and cell["h2o"]["window_length"] for cell in outcome.cells] == [None, 64]
    few, *slow = outcome.errors
    assert few.startswith("left out: ") and "window_length=8" in few and "num_heavy_hitters=16" in few
    assert len(slow) == 2 and "flash_attn" in slow[1] and "score_every_step" in slow[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--window_length 1", ["window_length=1", "at least 2"]),
        ("--window_length 8 --num_heavy_hitters 9", ["num_heavy_hitters=9"]),
        ("--head_budgets nosuch.json", ["--head_budgets nosuch.json", "cannot be read"]),
        (f"--head_budgets {DEMO_MODEL / PLAN}", [f"--head_budgets {DEMO_MODEL / PLAN}: budgets for 5 layers of 4 KV"]),
        ("--score mas", ["score", "'mas'", "mass"]),
        ("--window_length 99999999999999999999", ["window_length=99999999999999999999", "2**31"]),
        ("--score_every_step maybe", ["score_every_step='maybe'", "True or False"]),
        ("--windows 8", ["--windows"]),
        ("--grid nowhere.yaml", ["--grid nowhere.yaml", "cannot be read"]),
        ("--grid nowhere.yaml --score sink", ["--score", "--grid nowhere.yaml"]),
        ("--input-path nowhere.jsonl", ["--input-path nowhere.jsonl"]),
        ("--model-name nowhere", ["--model-name nowhere"]),
        ("--device nowhere", ["--device nowhere"]),
        ("--retention_request 5", ["--retention_request 5", "0 to 4"]),
        ("--timed_tokens 1", ["--timed_tokens", "at least 2"]),
        ("--batch_size 0", ["--batch_size"]),
        ("--output-path /dev/null", ["--output-path: /dev/null"]),
        ("--output-path {requests}", ["--output-path", "is the --input-path"]),
    ],
)
def test_bad_flags_take_one_line(sweep, lab, flags, words):
    """A traceback, a flag that is ignored, or a run that begins and only then finds out."""
    outcome = sweep(*flags.format(requests=lab.requests).split(), code=2)
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


@pytest.mark.parametrize(
    "grid", ["- 3\n", "3\n", "", "[]\n", "{window: 8}\n", "a: [b\n", "window_length: []\n", "[" * 3000]
)
def test_bad_grids_take_one_line(sweep, tmp_path, grid):
    """A YAML file of another form that ends in a traceback or in a sweep of defaults."""
    path = tmp_path / "grid.yaml"
    path.write_text(grid)
    (line,) = sweep("--grid", str(path), code=2).err.splitlines()
    assert line.startswith("error: ") and str(path) in line


def test_file_of_something_else(sweep, lab):
    """A file of requests that cells are appended to."""
    copy = lab.requests.with_name("copy.jsonl")
    shutil.copy(lab.requests, copy)
    outcome = None
    with pytest.raises(InputError):
        read_cells(copy)
    before = copy.read_bytes()
    outcome = sweep("--output-path", str(copy), code=2)
    assert "line 1" in outcome.err and "choose another --output-path" in outcome.err and copy.read_bytes() == before


def test_quantised_checkpoints_are_refused(sweep, ablate, monkeypatch):
    """A traceback about weights that stock Llama cannot share."""
    load_model = ablate.load_model

    def quantised(*args):
        model, tokenizer = load_model(*args)
        model.hf_quantizer = object()
        return model, tokenizer

    monkeypatch.setattr(ablate, "load_model", quantised)
    (line,) = sweep(code=2).errors
    assert "--model-name" in line and "is quantised" in line


def test_out_of_memory(sweep, ablate, monkeypatch):
    """A batch whose logits do not fit beside each other: halved where that helps, else one line that says so."""
    compare, sizes = ablate.compare, []

    def limited(stock, model, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return compare(stock, model, prompts, *rest)

    expected = sweep("--window_length", "8", output="expected.jsonl").cells
    monkeypatch.setattr(ablate, "compare", limited)
    halved = sweep("--window_length", "8")
    assert sizes[:4] == [3, 2, 2, 1]
    for cell, other in zip(halved.cells, expected, strict=True):
        for name, values in cell["fidelity"].items():
            assert values == pytest.approx(other["fidelity"][name], abs=1e-4)

    def never(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ablate, "compare", never)
    outcome = sweep("--window_length", "16", code=2)
    (line,) = outcome.errors
    assert "--batch_size 3" in line and "cells so far are kept" in line and len(outcome.cells) == 2
