"""Figures and report of an ablation: they show what the cells say, and say in one line what they cannot be made of."""

import copy
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ablations import SETUP, made_cells, write_cells
from conftest import prompt
from h2optimizer import H2OConfig
from h2optimizer.fidelity import compare
from h2optimizer.utils.ablation import check_cell, figures, held_shares, pack, read_cells, signed
from h2optimizer.utils.ablation_report import cautions, findings, smallest_budgets, with_interval
from h2optimizer.utils.requests import InputError
from test_benchmarks import load

pytest.importorskip("matplotlib")


plot = load("plot_ablation")


@pytest.fixture(scope="module")
def cells():
    return made_cells(windows=(64, 128), requests=12, prompt=200, steps=20)


@pytest.fixture
def sweep(cells, tmp_path):
    return plot.load(write_cells(tmp_path / "cells.jsonl", cells), None)


def means(row, name, scale=1.0):
    return [scale * row[name][key] for key in ("mean", "low", "high")]


def test_quality_shows_the_figures(sweep, cells):
    """Values of another cell, measure or scale; half an interval; a band that is not the full cache's."""
    axes = plot.draw_quality(sweep).axes
    assert [ax.get_ylabel() for ax in axes] == ["ROUGE-2 F, points", "top-1 agreement, %", "KL, nats per token"]
    rows = {row["label"]: row for row in (figures(cell, cells[0], {}) | {"label": cell["cell"]} for cell in cells[1:])}
    for ax, (name, scale) in zip(axes, (("rouge2", 1), ("top1", 100), ("kl", 1)), strict=True):
        drawn = []
        for container in ax.containers:
            line, _, (bars,) = container
            for x, y, bar in zip(*line.get_data(), bars.get_segments(), strict=True):
                drawn.append([round(2 ** round(np.log2(x))), y, *sorted(bar[:, 1])])
        wanted = [[row["window_length"], *means(row, name, scale)] for row in rows.values()]
        np.testing.assert_allclose(sorted(drawn), sorted(wanted), atol=1e-9)
        mean, low, high = means(sweep.full, name, scale)
        (band,) = ax.patches
        assert band.get_y() == pytest.approx(low) and band.get_height() == pytest.approx(high - low, abs=1e-9)
        assert any(np.allclose(line.get_ydata(), mean) and len(line.get_ydata()) == 2 for line in ax.lines)
        assert list(ax.get_xticks()) == sweep.windows
    looks = {(line.get_marker(), line.get_fillstyle()) for line, *_ in axes[0].containers}
    assert len(looks) == 6, "two lines that only colour tells apart"


def test_frontier_is_what_nothing_beats():
    """A dominated cell on the frontier, or one off it because another is as good in one respect or in both."""
    spots = {"slow": (1, 9), "beaten": (1, 8), "twin": (2, 7), "twin too": (2, 7), "level": (3, 5), "below": (3, 4)}
    spots |= {"fast": (5, 1), "as good, slower": (4, 1)}
    rows = [{"name": n, "tokens_per_second": s, "rouge2": {"mean": q}} for n, (s, q) in spots.items()]
    assert [row["name"] for row in plot.frontier(rows)] == ["slow", "twin", "twin too", "level", "fast"]


def test_frontier_figure(sweep):
    """Rings around other cells than the frontier's; a cell without marker or window."""
    best = plot.frontier([sweep.full, *sweep.rows])
    (ax,) = plot.draw_frontier(sweep).axes
    at = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines}
    assert all(at[row["label"]] == plot.spot(row) for row in (sweep.full, *sweep.rows))
    rings = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_label() == "ring"]
    assert sorted(rings) == sorted(list(plot.spot(row)) for row in best)
    texts = {text.xy: text.get_text() for text in ax.texts}
    assert all(texts[plot.spot(row)] == str(row["window_length"]) for row in best if row is not sweep.full)
    assert ax.patches[0].get_y() == pytest.approx(sweep.full["rouge2"]["low"])


def test_frontier_shows_the_spread_of_calls(sweep):
    """Bars of another cell, or a speed without end, of a call within the clock's noise, that decides the scale."""
    for row in sweep.rows:
        assert row["tokens_per_second_range"] == pytest.approx([row["tokens_per_second"] * by for by in (0.8, 1 / 0.9)])
    noisy = sweep.rows[0]
    noisy["tokens_per_second_range"][1] = math.inf
    (ax,) = plot.draw_frontier(sweep).axes
    bars = [bar.get_segments()[0].tolist() for bar in ax.collections]
    fastest = 1.5 * max(row["tokens_per_second"] for row in (sweep.full, *sweep.rows))
    assert len(bars) == 1 + len(sweep.rows) and max(bar[1][0] for bar in bars) <= ax.get_xlim()[1] < 1.1 * fastest
    for row, ((slowest, y), (end, _)) in zip((sweep.full, *sweep.rows), bars, strict=True):
        assert (slowest, y) == (row["tokens_per_second_range"][0], row["rouge2"]["mean"])
        assert end == row["tokens_per_second_range"][1] or row is noisy
    assert "median of 3 calls" in ax.get_xlabel() and "8 prompts of 200 tokens together" in ax.get_xlabel()
    for row in (sweep.full, *sweep.rows):
        row["calls"] = 1
    assert not plot.draw_frontier(sweep).axes[0].collections


def test_rouge_of_no_match_has_a_scale(cells, tmp_path):
    """Ticks of 1e-17 points, where no text has a pair of words in common with its reference."""
    none = {name: [0.0] * len(values) for name, values in cells[0]["rouge"].items()}
    cells = [cell | {"rouge": none} for cell in cells]
    rouge = plot.draw_quality(plot.load(write_cells(tmp_path / "cells.jsonl", cells), None)).axes[0]
    assert rouge.get_ylim() == (-0.05, 1)


LONG_NAME = "someone/A-Model-Whose-Name-" + "-".join(["says", "how", "it", "was", "made"] * 6)
SHAPES = {
    "one of each": dict(policies=("H2O",), windows=(64,), intervals=(16,), requests=1, layers=1, heads=1),
    "long names": dict(policies=("H2O", "decay", "rolling", "StreamingLLM (4 sinks)"), windows=(64,),
                       intervals=(16,), heads=8, setup=SETUP | {"model": LONG_NAME}),
    "a row that is not full": dict(policies=("H2O",), windows=(64,), intervals=(16,), layers=9, heads=2),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_figures_of_any_shape_are_whole(tmp_path, shape):
    """Words beyond the edge, columns of panels whose positions nobody can read, a model that is not named."""
    cells = made_cells(**{"requests": 20, "layers": 2, "prompt": 150, "steps": 12} | shape)
    sweep = plot.load(write_cells(tmp_path / "cells.jsonl", cells), None)
    rows = plot.followed(sweep, [])
    with plot.style.context(["default", plot.STYLE]):
        for fig in (
            plot.draw_quality(sweep), plot.draw_frontier(sweep), plot.draw_mass_lost(sweep, rows),
            plot.draw_retention(sweep, rows[-1]),
        ):  # fmt: skip
            fig.draw_without_rendering()
            whole = fig.bbox.padded(1)
            ticks = {id(label) for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for label in axis.get_ticklabels()}
            words = [of for of in fig.findobj(lambda of: hasattr(of, "get_text")) if id(of) not in ticks]
            corners = {of.get_text(): of.get_window_extent().corners() for of in words if of.get_text().strip()}
            cut = [said for said, of_text in corners.items() if not all(whole.contains(*at) for at in of_text)]
            assert not cut
            title = re.sub(r"\s", "", fig.get_suptitle())
            assert sweep.setup["model"].split("/")[-1] in title
            lowest = {}
            for ax in fig.axes:
                if ax.axison:
                    lowest[round(ax.get_position().x0, 2)] = ax
            assert all(ax.get_xlabel() and ax.xaxis.get_tick_params()["labelbottom"] for ax in lowest.values())


@pytest.mark.parametrize(("heads", "said"), [
    (1, ["older token, in the KV head"]),
    (2, ["older token, in all 2 KV heads", "in 1 of 2"]),
    (3, ["older token, in all 3 KV heads", "in 1 of 3"]),
    (4, ["older token, in all 4 KV heads", "in 2 of 4", "in 1 of 4"]),
    (8, ["older token, in all 8 KV heads", "in 4 of 8", "in 1 of 8"]),
])  # fmt: skip
def test_legend_has_the_models_heads(heads, said):
    """An eighth of the heads of a model that has four."""
    assert [name for _, name in plot.shades(heads)] == said


def test_many_lines_get_a_panel_for_each_interval(cells, tmp_path):
    """Eight policies in three intervals, 24 lines in one panel; policies that look the same."""
    template, many = cells[1], [cells[0]]
    for decay in range(8):
        for n in (1, 4, 16):
            h2o = template["h2o"] | {"score_decay": decay / 10, "update_interval": n}
            many.append(template | {"cell": f"{decay}-{n}", "h2o": h2o})
    sweep = plot.load(write_cells(tmp_path / "many.jsonl", many), None)
    panels = sweep.panels()
    assert [title for title, _ in panels] == ["N = 1", "N = 4", "N = 16"]
    assert [len(rows) for _, rows in panels] == [8, 8, 8]
    looks = [sweep.look(policy) for policy in range(8)]
    assert len({(look["marker"], str(look["linestyle"])) for look in looks}) == 8
    assert len({sweep.look(0, n)["fillstyle"] for n in range(3)}) == 3


def test_heavy_hitters_and_recent_tokens_by_hand():
    """A token that is its own step's, waits for the next slimming or is not there yet, taken for a heavy hitter."""
    h2o = H2OConfig(window_length=3, num_heavy_hitters=1, update_interval=2)
    # Prompt of 4, 3 steps; slimmed after prefill to {1, 2, 3} and {0, 2, 3}, after step 2 to {3, 4, 5} and {0, 4, 5}.
    last_held = np.array([[[0, 2, 2, 3, 3, 3, 3], [3, 0, 2, 2, 3, 3, 3]]], np.int16)
    retention = {"prompt_tokens": 4, "last_held": pack(last_held), "mass_lost": [[0.0]] * 3}
    heavy, recent = held_shares(retention, 0, h2o)
    assert heavy.tolist() == [[0.5, 0.5, 0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0, 0], [0.5, 0, 0, 0.5, 0, 0, 0]]
    assert recent.tolist() == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("interval", [1, 4])
def test_heavy_hitters_of_a_cache(gqa, interval):
    """More or fewer heavy hitters than a real cache keeps, or a recent token that is not held."""
    gqa.h2o.h2o = H2OConfig(window_length=12, num_heavy_hitters=5, update_interval=interval)
    _, of = compare(gqa.stock, gqa.h2o, [prompt(20)], [prompt(12, seed=1)], follow=0)
    retention = {"prompt_tokens": 20, "last_held": pack(of.last_held.numpy()), "mass_lost": of.mass_lost}
    for layer in range(2):
        heavy, recent = held_shares(retention, layer, gqa.h2o.h2o)
        assert np.allclose(heavy.sum(axis=1), 5) and set(np.unique(recent)) == {0, 1}
        assert recent.sum(axis=1).tolist() == [7 + (step - 1) % interval + 1 for step in range(1, 12)]


def test_retention_figure(sweep):
    """A layer's tokens in another layer's panel, an image upside down or shifted, the prompt's end elsewhere."""
    row = sweep.rows[0]
    axes = plot.draw_retention(sweep, row).axes
    assert [ax.get_title(loc="left") for ax in axes] == [f"layer {layer}" for layer in range(5)]
    for layer, ax in enumerate(axes):
        heavy, recent = held_shares(row["source"]["retention"], layer, row["config"])
        (image,) = ax.images
        assert image.get_extent() == [-0.5, 219.5, 20.5, 0.5] and image.origin == "upper"
        rgb = np.asarray(image.get_array())
        assert np.allclose(rgb[recent == 1], plot.RECENT_RGB) and np.allclose(rgb[heavy + recent == 0], 1)
        lightness = rgb.mean(axis=-1)[heavy > 0]
        assert (np.diff(lightness[np.argsort(heavy[heavy > 0], kind="stable")]) <= 1e-9).all() and lightness.max() < 0.7
        assert any(list(line.get_xdata()) == [199.5, 199.5] for line in ax.lines)


def test_mass_lost_figure(sweep):
    """A line that is not the mean of layers, or a band that leaves layers out; policies at different settings."""
    rows = plot.followed(sweep, [])
    assert [row["policy"] for row in rows] == sweep.policies
    assert len({(row["window_length"], row["update_interval"]) for row in rows}) == 1
    together, *axes = plot.draw_mass_lost(sweep, rows).axes
    assert len(together.lines) == 3
    for row, line, ax in zip(rows, together.lines, axes, strict=True):
        shares = 100 * np.array(row["source"]["retention"]["mass_lost"])
        assert np.allclose(line.get_ydata(), shares.mean(axis=1)) and line.get_xdata()[0] == 1
        edges = ax.collections[0].get_paths()[0].vertices[:, 1]
        assert edges.min() == pytest.approx(shares.min()) and edges.max() == pytest.approx(shares.max())


def test_files_and_report(tmp_path, capsys, monkeypatch):
    """A figure or format that is not written, a link to nothing, a cell that the table lacks, NaN; a file that differs
    from run to run."""
    monkeypatch.setitem(plot.STYLE, "savefig.dpi", 50)  # it takes long enough
    cells = made_cells(("H2O", "recent only"), windows=(64, 128), requests=12, layers=2, prompt=200, steps=20)
    path = write_cells(tmp_path / "cells.jsonl", cells)
    chosen = cells[3]["cell"][:8]
    assert plot.main(["--input-path", str(path), "--cells", chosen]) == 0
    folder = tmp_path / "cells_figures"
    assert capsys.readouterr().out == f"{folder / 'report.md'}\n"
    text = (folder / "report.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    names = {"quality", "bytes", "frontier", "mass_lost", f"retention_{cells[3]['cell'][:12]}"}
    assert set(links) == {f"{name}.{form}" for name in names for form in ("png", "svg")}
    assert {file.name for file in folder.iterdir()} == {*links, "report.md"}
    assert all((folder / link).stat().st_size > 1000 for link in links)
    assert text.startswith("# Ablation: demo_model · 12 requests\n") and "nan" not in text.lower().split()
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line.endswith("` |")]
    assert [line[-1] for line in table] and {line[-1].strip("`| ") for line in table} == {c["cell"][:12] for c in cells}
    row = figures(cells[3], cells[0], {})
    (line,) = (line for line in table if line[-1].strip("`| ") == cells[3]["cell"][:12])
    assert f"{row['rouge2']['mean']:.2f}, {row['rouge2_delta']['mean']:+.2f} [" in line[4]
    assert line[6].startswith(f"{100 * row['top1']['mean']:.2f} [") and f"{row['tokens_per_second']:.1f} [" in line[12]
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert plot.main(["--input-path", str(path), "--cells", chosen]) == 0
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_texts_of_one_token(tmp_path):
    """A figure of nothing, or a division by it, where no step was compared and nothing followed; a single setting."""
    path = write_cells(tmp_path / "cells.jsonl", made_cells(("H2O",), (64,), (1,), requests=1, steps=0))
    assert plot.main(["--input-path", str(path), "--output-path", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "top-1, %" not in text and "its text has one token" in text and "mass_lost" not in text


def scored(policy, window, n, scores, speed=1.0):
    source = {"h2o": {}, "rouge": {"rouge2": [score / 100 for score in scores]}}
    row = {"policy": policy, "window_length": window, "update_interval": n, "source": source}
    return row | {"label": f"{policy} {window} {n}", "tokens_per_second": speed}


def test_findings_by_hand():
    """A budget that a larger one contradicts, a comparison between other settings, worse told as better."""
    full = scored("full cache", None, None, [10, 20, 30], speed=2.0)
    lost = {("H2O", 32, 1): 0, ("H2O", 64, 1): 5, ("H2O", 128, 1): 0.5, ("H2O", 256, 1): 0, ("H2O", 32, 16): 9}
    lost |= {("recent only", 64, 1): 2, ("recent only", 128, 1): 7}
    rows = [scored(*key, [10 - by, 20 - by, 30 - by], speed=3.0 - key[2] / 8) for key, by in lost.items()]
    for row, by in zip(rows, lost.values(), strict=True):
        row["rouge2_delta"] = {"mean": -by, "low": -by, "high": -by}
    table = smallest_budgets(rows)
    assert table[2] == "| H2O | 1 | 256: +0.00 [+0.00, +0.00] | 128: -0.50 [-0.50, -0.50] |"
    assert table[4].startswith("| recent only | 1 | none up to 128: -7.00")
    recent, larger, fastest = findings(SimpleNamespace(rows=rows, full=full))
    assert "better in 1 of 2, worse in 1: H2O 64 1: -3.00" in recent
    assert "worse in 1 of 1: H2O 32 16: -9.00" in larger and "better in 0" in larger
    assert "1.44x the" in fastest and "Slower than the full cache: 1 of 7: H2O 32 16: 0.50x" in fastest
    for row in (full, *rows):
        row |= {"calls": 3, "tokens_per_second_range": [0.5 * row["tokens_per_second"], 2 * row["tokens_per_second"]]}
    assert "1.44x [0.36, 5.75] the" in findings(SimpleNamespace(rows=rows, full=full))[-1]


def other_setup(cells):
    other = copy.deepcopy(cells)
    for cell in other:
        cell["setup"], cell["cell"] = SETUP | {"batch_size": 16}, cell["cell"][::-1]
    return other


def test_setups_are_not_mixed(cells, tmp_path, capsys):
    """Cells of two batch sizes in one figure."""
    path = write_cells(tmp_path / "cells.jsonl", cells + other_setup(cells))
    assert plot.main(["--input-path", str(path)]) == 2
    said = capsys.readouterr().err
    assert "batch_size=8" in said and "batch_size=16" in said and "dtype" not in said and said.count("\n") == 1
    (name,) = re.findall(r"(\w+): batch_size=16", said)
    sweep = plot.load(path, name)
    assert len(sweep.rows) == len(cells) - 1 and sweep.setup["batch_size"] == 16
    assert plot.main(["--input-path", str(path), "--setup", "nothing"]) == 2
    assert "--setup nothing matches 0 of" in capsys.readouterr().err


@pytest.mark.parametrize("lines, flags, said", [
    (lambda cells: [], (), "holds no cells"),
    (lambda cells: [{"article": "a", "summary_gt": "b"}], (), "line 1: not a cell of scripts/ablate.py"),
    (lambda cells: cells[1:], (), "no cell of a full cache"),
    (lambda cells: cells[:1], (), "no cell of a bounded cache"),
    (lambda cells: [cells[0], cells[1] | {"h2o": {"window": 3}}], (), "cannot be read"),
    (lambda cells: [cells[0], cells[1] | {"rouge": {"rouge1": []}}], (), "line 2 (rouge2 is missing)"),
    (lambda cells: cells, ("--cells", "nothing"), "--cells nothing: means no cell"),
    (lambda cells: cells, ("--setup", "nothing"), "--setup nothing matches 0 of"),
    (lambda cells: cells, ("--output-path", "cells.jsonl/below"), "cannot be written"),
    (lambda cells: cells, ("--output-path", "cells.jsonl"), "is not a folder"),
    (lambda cells: cells, ("--input-path", "gone.jsonl"), "gone.jsonl: cannot be read"),
    (lambda cells: cells, ("--cell", "a"), "--help"),
])  # fmt: skip
def test_what_cannot_be_drawn_gets_one_line(cells, tmp_path, monkeypatch, capsys, lines, flags, said):
    """A traceback, a picture of something else, or an exit status that says that all went well."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in lines(cells)))
    assert plot.main(["--input-path", "cells.jsonl", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and said in captured.err and captured.err.count("\n") == 1


def edited(*path_and_value):
    *path, name, value = path_and_value

    def edit(cell):
        for key in path:
            cell = cell[key]
        cell[name] = value

    return edit


@pytest.mark.parametrize("edit, said", [
    (edited("rouge", "rouge2", 2, math.nan), "rouge2 must be 12 numbers, 0 to 1"),
    (edited("rouge", "rouge2", [0.5]), "rouge1 must be 1 numbers"),
    (edited("rouge", "rougeL", 0, 44.0), "rougeL must be"),
    (edited("rouge", "rouge2", []), "no requests"),
    (edited("fidelity", "kl", 1, math.inf), "kl must be"),
    (edited("fidelity", "kl", [0.1]), "kl must be 12 numbers"),
    (edited("fidelity", "tokens", "12"), "tokens must be"),
    (edited("time", "tokens_per_second", None), "tokens_per_second must be a number"),
    (edited("time", "time_per_token", -0.001), "time_per_token must be a number"),
    (edited("time", []), "wrong form"),
    (edited("time", "time_per_token_range", [0.001]), "time_per_token_range must be 2 numbers"),
    (edited("time", "time_per_token_range", [1.0, 2.0]), "time_per_token_range must hold time_per_token"),
    (edited("time", "calls", 0), "calls must be a number, at least 1"),
    (edited("setup", None), "setup must be an object"),
    (edited("setup", ["a"]), "setup must be an object"),
    (edited("cell", 7), "cell must be a hash"),
    (edited("slots_kept", "12"), "slots_kept must be a number"),
    (edited("retention", "x"), "wrong form"),
    (edited("retention", "last_held", "zlib", "!!!"), "wrong form"),
    (edited("retention", "last_held", "shape", [1, 2, 3]), ""),
    (edited("retention", "mass_lost", 0, [1]), ""),
    (edited("retention", "mass_lost", 0, 0, math.nan), "mass_lost must be 20x5 numbers, 0 to 1"),
    (lambda cell: cell["retention"].pop("index"), "index is missing"),
    (lambda cell: cell.pop("kv_bytes"), "kv_bytes is missing"),
])  # fmt: skip
def test_edited_cell_is_named_by_its_line(cells, tmp_path, edit, said):
    """A hand-edited figure, NaN or another type: a traceback of the drawing, or a nan in the report."""
    check_cell(cells[1])
    broken = copy.deepcopy(cells[1])
    edit(broken)
    path = write_cells(tmp_path / "cells.jsonl", [cells[0], broken])
    with pytest.raises(InputError, match=r"cells\.jsonl, line 2 ") as error:
        read_cells(path)
    assert said in str(error.value)


def test_deep_line_takes_one_line(tmp_path):
    """A RecursionError of the JSON parser."""
    path = tmp_path / "cells.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match="line 1: not a cell"):
        read_cells(path)


def test_last_cell_without_its_end_of_line_counts(cells, tmp_path):
    """An editor that leaves the last end of line out, and a report that silently misses a cell."""
    path = write_cells(tmp_path / "cells.jsonl", cells)
    path.write_bytes(path.read_bytes()[:-1])
    assert len(read_cells(path)) == len(cells)
    path.write_bytes(path.read_bytes()[:-9])
    assert len(read_cells(path)) == len(cells) - 1


def test_cells_of_other_texts_are_not_compared(cells, tmp_path, capsys):
    """A full cache measured again, with other libraries, whose texts are not those of the other cells."""
    other = copy.deepcopy(cells)
    other[0]["fidelity"]["tokens"][0] += 1
    assert plot.main(["--input-path", str(write_cells(tmp_path / "cells.jsonl", other))]) == 2
    assert "texts other than" in capsys.readouterr().err


def test_report_says_what_its_requests_cannot_show():
    """ "Surely less than a point lost" of two requests, or of a full cache that has no point to lose."""
    full = {"rouge2": {"mean": 0.3}}
    few, nothing = cautions(SimpleNamespace(requests=2, full=full))
    assert "only 2 requests" in few and "ROUGE-2 is 0.30" in nothing
    assert cautions(SimpleNamespace(requests=200, full={"rouge2": {"mean": 12.0}})) == []


def test_no_negative_zero():
    """-0.00, which reads as a loss."""
    tiny = {"mean": -1e-6, "low": -0.004, "high": 0.0}
    assert signed(tiny) == "+0.00 [+0.00, +0.00]" and with_interval(tiny) == "0.00 [0.00, 0.00]"


def test_without_matplotlib(monkeypatch, capsys):
    """A traceback on a machine that measures only."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert load("plot_ablation").main(["--input-path", "cells.jsonl"]) == 2
    assert capsys.readouterr().err == "error: matplotlib is not installed: pip install matplotlib\n"
