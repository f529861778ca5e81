"""Draw the figures of an ablation and write its report, from a jsonl of scripts/ablate.py: PNG, SVG and Markdown.

- quality: ROUGE-2, top-1 agreement and KL divergence against the KV budget, with 95 % intervals over requests.
- bytes: KL divergence against the bytes held for a request, which 8-bit slots halve.
- frontier: ROUGE-2 against decode tokens/s, with the spread of timed calls; a ring marks cells that no other beats.
- retention_CELL: which tokens each layer still holds while a request is decoded, for one cell (--cells).
- mass_lost: how much of the full cache's attention falls on evicted tokens, step by step, for the same request.
- report.md: the setup, what follows from the figures, the whole table, the figures.

Markers, line styles and lightness distinguish everything, so figures can be printed in grey. The same file always gives
the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

import numpy as np

try:
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
except ImportError:  # `run` reports it
    style = None

from h2optimizer import H2OConfig
from h2optimizer.utils.ablation import FULL, figures, held_shares, of_one_setup, read_cells
from h2optimizer.utils.ablation_report import FEW, report
from h2optimizer.utils.cli import InputError, OneLineParser, output_folder
from h2optimizer.utils.figures import METADATA, SMALL, STYLE, WIDTH, line_look, plural, put_title, wrap
from h2optimizer.utils.policy_figure import PROMPT_AND_TEXT, draw_policies
from h2optimizer.utils.results import replace_file

HEAVY_RGB, RECENT_RGB = np.array([0.02, 0.12, 0.30]), np.array([0.96, 0.72, 0.36])
RECENT_LOOK = {"facecolor": "none", "edgecolor": "#6B3E00", "hatch": "////", "linewidth": 0.8}  # hatched over its RGB
BAND = "#D0D0D0"
APART = 0.35  # of lines of one panel, in powers of two of the budget
MOST_LINES = 6  # in one panel; more get a panel for each interval
MOST_RETENTIONS = 3  # drawn unasked


@dataclass
class Sweep:
    """The cells of one setup: `full`, and the bounded ones sorted by policy, interval, window.

    Each is a row of `h2optimizer.utils.ablation.figures` with `source`, its cell, and `label`.
    """

    setup: dict
    full: dict
    rows: list[dict]

    def __post_init__(self):
        self.policies = list(dict.fromkeys(row["policy"] for row in self.rows))
        self.intervals = sorted({row["update_interval"] for row in self.rows})
        self.windows = sorted({row["window_length"] for row in self.rows})
        self.rows.sort(key=lambda row: (*self.line(row), row["window_length"]))
        self.requests = len(self.full["source"]["rouge"]["rouge2"])
        model = Path(str(self.setup.get("model", ""))).name or "unnamed model"
        self.title = f"{model} · {plural(self.requests, 'request')}"

    def line(self, row: dict) -> tuple[int, int]:
        return self.policies.index(row["policy"]), self.intervals.index(row["update_interval"])

    def look(self, policy: int, interval: int = 0) -> dict:
        """How the line of a policy (by colour, marker and dashes) and interval (by fill and size) is drawn."""
        return line_look(policy, interval, len(self.intervals))

    def panels(self) -> list[tuple[str, list[dict]]]:
        """Rows that share axes: all, or one interval's where they would be too many lines."""
        if len({self.line(row) for row in self.rows}) <= MOST_LINES:
            return [("", self.rows)]
        by_interval = {n: [row for row in self.rows if row["update_interval"] == n] for n in self.intervals}
        return [(f"N = {n}", rows) for n, rows in by_interval.items()]


def load(path: Path, prefix: str | None) -> Sweep:
    """The cells of one setup in a file. Raises InputError if it is not unique or has no full cache."""
    cells = of_one_setup(path, read_cells(path), prefix)
    full = next((cell for cell in cells if cell["h2o"] is None), None)
    if full is None or len(cells) == 1:
        missing = "full cache, which all else is compared with" if full is None else "bounded cache"
        raise InputError(f"{path}: the setup has no cell of a {missing}; run scripts/ablate.py to measure it")
    defaults, rows = dataclasses.asdict(H2OConfig()), []
    for cell in cells:
        try:
            row = figures(cell, full, defaults) | {"source": cell, "config": cell["h2o"] and H2OConfig(**cell["h2o"])}
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(f"{path}: cell {cell['cell']} cannot be read ({error!r}); measure it again") from None
        row["label"] = f"{row['policy']}, window {row['window_length']}, N = {row['update_interval']}"
        rows.append(row)
    full = next(row for row in rows if row["source"] is full)
    return Sweep(full["source"]["setup"], full, [row for row in rows if row["config"]])


# Figures of all cells


def put_legend(fig, handles: list, labels: list[str], handle_length: float = STYLE["legend.handlelength"]) -> None:
    """Below the figure, in as many columns as the longest label leaves room for."""
    size = STYLE["legend.fontsize"]
    beside = size * (handle_length + 3) / 72  # a handle, and the space around it and its label
    longest = 0.6 * size * max(map(len, labels)) / 72
    columns = max(1, min(6, len(labels), int(WIDTH / (beside + longest))))
    labels = [wrap(label, WIDTH - beside, size) for label in labels]
    fig.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=handle_length)


def full_band(ax, full: dict | None, scale: float = 1.0) -> None:
    """The full cache: a line at its mean over the band of its interval."""
    if full is not None:
        ax.axhspan(scale * full["low"], scale * full["high"], color=BAND, alpha=0.6, linewidth=0, zorder=0.5)
        ax.axhline(scale * full["mean"], color="black", linewidth=1.2, zorder=1)


def legend(fig, sweep: Sweep, lines: bool = True, extra: tuple = (), marker: str = "") -> None:
    """Below the figure: the full cache, policies, and the intervals' fills where there are several."""
    full = {"color": "black", "linewidth": 1.2, "marker": marker, "markersize": 9}
    requests = sweep.requests
    narrow = f" (of {requests} requests: too narrow)" if requests < FEW else ""
    label = FULL if requests == 1 else f"{FULL}, 95 % interval{narrow}"
    handles = [(Patch(color=BAND, alpha=0.6), Line2D([], [], label=label, **full))]
    for i, policy in enumerate(sweep.policies):
        look = sweep.look(i) | ({} if lines else {"linestyle": "none"})
        handles.append(Line2D([], [], label=policy, **look))
    if len(sweep.intervals) > 1:
        for i, n in enumerate(sweep.intervals):
            look = sweep.look(0, i) | {"color": "#555555", "marker": "o", "linestyle": "none"}
            handles.append(Line2D([], [], label=f"N = {n}", **look))
    labels = [handle.get_label() for handle in (handles[0][1], *handles[1:], *extra)]
    put_legend(fig, [*handles, *extra], labels)


def draw_quality(sweep: Sweep) -> Figure:
    measures = [
        ("rouge2", "ROUGE-2 F, points", 1),
        ("top1", "top-1 agreement, %", 100),
        ("kl", "KL, nats per token", 1),
    ]
    measures = [measure for measure in measures if measure[0] in sweep.full]
    panels = sweep.panels()
    fig = Figure(figsize=(WIDTH, 1.3 + 2.5 * len(panels)))
    grid = fig.subplots(len(panels), len(measures), squeeze=False, sharex=True, sharey="col")
    put_title(fig, f"Quality against KV budget: {sweep.title}")
    for (title, rows), axes in zip(panels, grid, strict=True):
        for (name, unit, scale), ax in zip(measures, axes, strict=True):
            ax.set_title(title, loc="left", fontsize=9)
            ax.set_ylabel(unit)
            full_band(ax, sweep.full[name], scale)
            lines = sorted({sweep.line(row) for row in rows})
            for i, line in enumerate(lines):
                of_line = [row for row in rows if sweep.line(row) == line]
                mean, low, high = (
                    scale * np.array([row[name][key] for row in of_line]) for key in ("mean", "low", "high")
                )
                # Lines are shifted a little, so intervals do not cover one another.
                aside = 2 ** (APART * (i - (len(lines) - 1) / 2) / len(lines))
                budgets = [aside * row["window_length"] for row in of_line]
                errors = np.maximum([mean - low, high - mean], 0)
                ax.errorbar(budgets, mean, errors, elinewidth=0.9, capsize=2, **sweep.look(*line))
    for ax in grid.flat:
        ax.set_xscale("log", base=2)
        many = len(sweep.windows) > 5
        ax.set_xticks(sweep.windows, map(str, sweep.windows), rotation=60 if many else 0, fontsize=SMALL)
        ax.minorticks_off()
        ax.set_xlim(sweep.windows[0] / 1.4, sweep.windows[-1] * 1.4)
    for ax in grid[:, 0]:
        if np.ptp(ax.get_ylim()) < 1e-6:  # no text has a pair of words in common with its reference
            ax.set_ylim(-0.05, 1)
    for ax in grid[-1]:
        ax.set_xlabel("KV budget: window_length, slots", fontsize=9)
    if len(measures) > 1:
        grid[0, -1].set_yscale("symlog", linthresh=0.01)  # it spans decades, and is 0 where nothing was evicted
        grid[0, -1].yaxis.set_major_formatter("{x:g}")
        grid[0, -1].set_ylim(-0.001, 1.5 * grid[0, -1].get_ylim()[1])
    legend(fig, sweep)
    return fig


def draw_bytes(sweep: Sweep) -> Figure:
    """As scripts/compare_policies.py draws it."""
    held = {"window holds": PROMPT_AND_TEXT, "requests": sweep.requests}
    rows = [
        {"policy": row["policy"], "window": row["window_length"], "N": row["update_interval"], **held}
        | {"kl": row["kl"], "kv_bytes": row["kv_bytes"]}
        for row in [sweep.full, *sweep.rows]
    ]
    return draw_policies(rows, Path(str(sweep.setup.get("model", ""))).name or "unnamed model")


def spot(row: dict) -> tuple[float, float]:
    return row["tokens_per_second"], row["rouge2"]["mean"]


def speeds(row: dict) -> tuple[float, float]:
    """Tokens/s of a row's slowest and fastest call."""
    slowest, fastest = row.get("tokens_per_second_range", [row["tokens_per_second"]] * 2)
    return slowest, fastest


def frontier(rows: list[dict]) -> list[dict]:
    """The rows that no other beats in tokens/s or ROUGE-2 without being beaten in the other, the fastest last."""
    spots = [spot(row) for row in rows]
    best = [
        row
        for row, (speed, quality) in zip(rows, spots, strict=True)
        if not any(s >= speed and q >= quality and (s, q) != (speed, quality) for s, q in spots)
    ]
    return sorted(best, key=lambda row: row["tokens_per_second"])


def draw_frontier(sweep: Sweep) -> Figure:
    panels, best = sweep.panels(), frontier([sweep.full, *sweep.rows])
    fig = Figure(figsize=(WIDTH, 1.6 + (3.9 if len(panels) == 1 else 3.0) * len(panels)))
    grid = fig.subplots(len(panels), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    drawn = [sweep.full, *sweep.rows]
    several = all(row.get("calls", 1) > 1 for row in drawn)
    # A call within the clock's noise has an arbitrary speed, so it must not decide the scale.
    least = min(speeds(row)[0] for row in drawn)
    limit = max(min(speeds(row)[1], 1.5 * row["tokens_per_second"]) for row in drawn)
    put_title(fig, f"Quality against speed: {sweep.title}")
    for (title, rows), ax in zip(panels, grid, strict=True):
        ax.set_title(title, loc="left", fontsize=9)
        ax.set_ylabel("ROUGE-2 F, points")
        full_band(ax, sweep.full["rouge2"])
        ax.plot(*zip(*map(spot, best), strict=True), color="#777777", linewidth=1, linestyle=":", drawstyle="steps-pre")
        for row in [sweep.full, *rows]:
            look = {"color": "black", "marker": "h", "markersize": 10}
            look = look if row is sweep.full else sweep.look(*sweep.line(row)) | {"linestyle": "none"}
            ax.plot(*spot(row), zorder=3, label=row["label"], **look)
            if several:
                slowest, fastest = speeds(row)
                width = 3 if row is sweep.full else 0.9  # beside the line of its mean
                ax.hlines(spot(row)[1], slowest, min(fastest, limit), color=look["color"], linewidth=width, zorder=2)
            if any(row is other for other in best):
                ax.plot(*spot(row), "o", color="black", fillstyle="none", markersize=15, label="ring", zorder=2)
    beside = 0.04 * (limit - least) or 0.05 * limit
    grid[0].set_xlim(least - beside, limit + beside)
    grid[0].xaxis.set_major_formatter("{x:,g}")
    timed = f"{plural(sweep.full['batch'], 'prompt')} of {plural(sweep.full['prompt_tokens'], 'token')}"
    median = f", median of {sweep.full['calls']} calls" if several else ""
    grid[-1].set_xlabel(f"decode tokens/s, {timed} together{median}\nnumbers in the figure: window_length")
    extra = [
        Line2D([], [], color="black", marker="o", fillstyle="none", markersize=12, linestyle=":", label="frontier")
    ]
    if several:
        extra.append(Line2D([], [], color="#555555", linewidth=0.9, label="slowest to fastest call"))
    legend(fig, sweep, lines=False, extra=tuple(extra), marker="h")
    fig.draw_without_rendering()  # texts are placed by pixels, which the layout decides
    for (_, rows), ax in zip(panels, grid, strict=True):
        annotate(ax, sorted(rows, key=lambda row: row not in best), [sweep.full, *rows], best)
    return fig


def annotate(ax, rows: list[dict], drawn: list[dict], always: list[dict]) -> None:
    """Write each row's window at the first place near its marker that is inside the axes and free.

    Rows without such a place are left out, unless they are in `always`."""

    def to_points(row: dict) -> np.ndarray:
        return ax.transData.transform(spot(row)) * 72 / ax.figure.dpi

    marks, texts = [to_points(row) for row in drawn], []
    (x0, y0), (x1, y1) = ax.get_window_extent().get_points() * 72 / ax.figure.dpi
    places = [(dx, dy) for r in (11, 15) for dx, dy in ((0, r), (0, -r), (r, r), (r, -r), (-r, r), (r, 0), (-r, 0))]
    for row in rows:
        text, (x, y) = str(row["window_length"]), to_points(row)
        width, height = 0.66 * SMALL * len(text), SMALL
        inside = []
        for dx, dy in places:
            left, low = x + dx - width * (1 - np.sign(dx)) / 2, y + dy - height / 2
            right, high = left + width, low + height
            if left < x0 or right > x1 or low < y0 or high > y1:
                continue
            inside.append((dx, dy, left, low, right, high))
            on_mark = any(left - 4 < a < right + 4 and low - 4 < b < high + 4 for a, b in marks)
            if not on_mark and not any(left < r and a < right and low < h and b < high for a, b, r, h in texts):
                break
        else:
            if row not in always or not inside:
                continue
            dx, dy, left, low, right, high = inside[0]
        texts.append((left, low, right, high))
        side = "left" if dx > 0 else "right" if dx < 0 else "center"
        where = {"textcoords": "offset points", "ha": side, "va": "center"}
        ax.annotate(text, spot(row), (dx, dy), **where, fontsize=SMALL, zorder=4).set_in_layout(False)


# Figures of one request


def followed(sweep: Sweep, chosen: list[str]) -> list[dict]:
    """The rows whose retention is drawn: the chosen ones, or each policy's nearest to the middle budget and interval.

    Budgets below the prompt come first, because others evict little. All rows follow the first row's request.
    """
    rows = [row for row in sweep.rows if (row["source"].get("retention") or {}).get("mass_lost")]
    rows = [row for row in rows if row["source"]["retention"]["index"] == rows[0]["source"]["retention"]["index"]]
    for prefix in chosen:
        matches = sum(row["source"]["cell"].startswith(prefix) for row in rows)
        if matches != 1:
            meant = f"{matches} cells" if matches else "no cell whose tokens were followed"
            raise InputError(f"--cells {prefix}: means {meant}; report.md lists them; run without --cells to see it")
    if chosen or not rows:
        return [row for row in rows if row["source"]["cell"].startswith(tuple(chosen))]
    prompt = rows[0]["source"]["retention"]["prompt_tokens"]
    windows = [window for window in sweep.windows if window < prompt] or sweep.windows
    window, interval = (values[(len(values) - 1) // 2] for values in (windows, sweep.intervals))

    def distance(row: dict) -> tuple[float, float]:
        return abs(math.log2(row["window_length"] / window)), abs(math.log2(row["update_interval"] / interval))

    by_policy = [[row for row in rows if row["policy"] == policy] for policy in sweep.policies]
    return [min(of_policy, key=distance) for of_policy in by_policy if of_policy]


def heavy_shade(share) -> np.ndarray:
    """RGB of a share of heads. The root makes the few heads of a long prompt visible."""
    return 1 - np.sqrt(share)[..., None] * (1 - HEAVY_RGB)


def draw_retention(sweep: Sweep, row: dict) -> Figure:
    retention = row["source"]["retention"]
    layers, heads, tokens = retention["last_held"]["shape"]
    steps, prompt = len(retention["mass_lost"]), retention["prompt_tokens"]
    columns = 1 if layers <= 8 else 4
    per_bin = math.ceil(tokens / (1000 // columns))  # tokens of a column of pixels
    begins = np.arange(0, tokens, per_bin)
    fig = Figure(figsize=(WIDTH, 1.6 + (1.1 if columns == 1 else 1.25) * math.ceil(layers / columns)))
    grid = fig.subplots(math.ceil(layers / columns), columns, squeeze=False, sharex=True, sharey=True)
    put_title(fig, f"Tokens held: {row['label']}\n{sweep.title}, here request {retention['index']} (from 0)")
    for ax in grid.flat[layers:]:
        ax.set_axis_off()
    slimmed = row["config"].schedule.last_due(np.arange(steps))
    for layer, ax in enumerate(grid.flat[:layers]):
        heavy, recent = (
            np.add.reduceat(share, begins, axis=1) / np.diff([*begins, tokens])
            for share in held_shares(retention, layer, row["config"])
        )
        rgb = heavy_shade(heavy) - recent[..., None] * (1 - RECENT_RGB)
        extent = (-0.5, len(begins) * per_bin - 0.5, steps + 0.5, 0.5)
        ax.imshow(rgb.clip(0, 1), extent=extent, aspect="auto", interpolation="nearest")
        edges = np.repeat(np.arange(steps + 1) + 0.5, 2)[1:-1]
        bounds = (prompt + slimmed - row["config"].recent, prompt + 1 + np.arange(steps))
        ax.fill_betweenx(edges, *(np.repeat(bound, 2) - 0.5 for bound in bounds), **RECENT_LOOK)
        ax.axvline(prompt - 0.5, color="black", linewidth=1, linestyle=(0, (4, 2)))
        ax.set_xlim(-0.5, tokens - 0.5)
        ax.grid(False)
        ax.set_title(f"layer {layer}", loc="left", fontsize=9, pad=2)
    fig.supylabel("decode step", fontsize=10)
    for ax in grid.flat[max(0, layers - columns) : layers]:  # the lowest of each column, where the last row is not full
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.set_xlabel("token position", fontsize=9)
    patches = [Patch(facecolor=heavy_shade(n / heads), edgecolor="black", label=name) for n, name in shades(heads)]
    patches.append(Patch(**RECENT_LOOK | {"facecolor": RECENT_RGB}, label="recent"))
    patches.append(Patch(facecolor="white", edgecolor="black", label="evicted"))
    patches.append(Line2D([], [], color="black", linewidth=1, linestyle=(0, (4, 2)), label="end of the prompt"))
    put_legend(fig, patches, [patch.get_label() for patch in patches], handle_length=1.4)
    return fig


def shades(heads: int) -> list[tuple[int, str]]:
    """For the legend: in how many of a layer's KV heads an older token is, and the label."""
    if heads == 1:
        return [(1, "older token, in the KV head")]
    some = sorted({max(1, heads // 2), 1}, reverse=True)
    return [(heads, f"older token, in all {heads} KV heads"), *((n, f"in {n} of {heads}") for n in some)]


def draw_mass_lost(sweep: Sweep, rows: list[dict]) -> Figure:
    """All means in the first panel; then each with its layers."""
    several = len(rows) > 1
    panels = [None, *rows] if several else rows
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    fig = Figure(figsize=(WIDTH, 1.4 + 2.2 * math.ceil(len(panels) / columns)))
    grid = fig.subplots(math.ceil(len(panels) / columns), columns, squeeze=False, sharex=True, sharey=True)
    index = rows[0]["source"]["retention"]["index"]
    put_title(fig, f"Attention that falls on evicted tokens: {sweep.title}, here request {index} (from 0)")
    lost = [100 * np.array(row["source"]["retention"]["mass_lost"]) for row in rows]
    looks = [sweep.look(sweep.policies.index(row["policy"])) | {"label": row["label"]} for row in rows]
    steps = np.arange(1, max(map(len, lost)) + 1)
    for panel, ax in zip(panels, grid.flat[: len(panels)], strict=True):
        for row, shares, look in zip(rows, lost, looks, strict=True):
            if panel not in (None, row):
                continue
            at = steps[: len(shares)]
            if panel is row:
                ax.fill_between(at, shares.min(axis=1), shares.max(axis=1), color=BAND, linewidth=0)
                if shares.shape[1] <= 8:  # more lines would be unreadable
                    ax.plot(at, shares, color="#888888", linewidth=0.4)
            ax.plot(at, shares.mean(axis=1), markevery=max(1, len(at) // 8), **look)
        title = row_title(panel) if panel else "all, mean of layers"
        ax.set_title(wrap(title, WIDTH / columns - 0.4, SMALL), loc="left", fontsize=SMALL)
    for ax in grid.flat[len(panels) :]:
        ax.set_axis_off()
    grid[0, 0].set_ylim(bottom=0)
    for ax in grid[:, 0]:
        ax.set_ylabel("attention lost, %")
    for ax in grid.flat[: len(panels)]:
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.set_xlabel("decode step", fontsize=9)
    handles = [Line2D([], [], **look) for look in looks]
    if lost[0].shape[1] > 1:
        handles.append(Patch(color=BAND, label="from the lowest to the highest layer"))
    put_legend(fig, handles, [handle.get_label() for handle in handles])
    return fig


def row_title(row: dict) -> str:
    """A label in lines that fit a third of the width."""
    return f"{row['policy']},\nwindow {row['window_length']}, N = {row['update_interval']}"


# The script


READING = {
    "quality": "Each panel shows the mean over requests with its 95 % interval; the band is the full cache. The closer "
    "a line stays to the band towards small budgets, the better. Requests differ more than caches do, so judge small "
    "differences by the paired ones in the table.",
    "bytes": "Further down is better, further left is smaller. Of two caches that hold the same bytes, the lower one "
    "keeps more of the full cache's predictions. The numbers are windows, in slots.",
    "frontier": "Up is better, right is faster. A bar reaches from the slowest to the fastest timed call; cells whose "
    "bars overlap may not differ in speed. A ring marks a cell that no other equals or beats in both, by medians and "
    "means. Cells inside the full cache's band may not differ in quality.",
    "retention": "Each row of pixels is a decode step. The darker an older token, the more KV heads still hold it (the "
    "mean of neighbours if a pixel covers several tokens). Hatched: the newest tokens, which are kept whatever their "
    "mass, and those that wait for the next slimming. White: evicted or, to the right, not generated yet.",
    "mass_lost": "The share of the full cache's attention, at the same step of the same text, that falls on tokens "
    "which this cache has dropped. 0 means that nothing relevant is missing.",
}


def draw(sweep: Sweep, rows: list[dict], all_retentions: bool) -> tuple[dict[str, tuple[Figure, str, str]], list[str]]:
    """Each figure with its title and how to read it, by the name of its files; and notes on what is not drawn."""
    drawn = {
        "quality": (draw_quality(sweep), "Quality against KV budget", READING["quality"]),
    }
    if "kl" in sweep.full and all(row["kv_bytes"] for row in [sweep.full, *sweep.rows]):
        drawn["bytes"] = draw_bytes(sweep), "Quality per byte", READING["bytes"]
    drawn |= {
        "frontier": (draw_frontier(sweep), "Quality against speed", READING["frontier"]),
    }
    if not rows:
        return drawn, ["No cell followed a request's tokens: its text has one token, so nothing is evicted."]
    drawn["mass_lost"] = draw_mass_lost(sweep, rows), "Attention on evicted tokens", READING["mass_lost"]
    for row in rows if all_retentions else rows[:MOST_RETENTIONS]:
        name = f"retention_{row['source']['cell'][:12]}"
        drawn[name] = draw_retention(sweep, row), f"Tokens held: {row['label']}", READING["retention"]
    return drawn, [
        "To see other cells' tokens, pass `--cells` with names from the table's last column, comma-separated."
    ]


def write(folder: Path, drawn: dict[str, tuple[Figure, str, str]], text: str) -> None:
    for name, (figure, _, _) in drawn.items():
        figure.savefig(folder / f"{name}.png", metadata=METADATA[".png"])
        figure.set_layout_engine("none")  # the layout is final, and takes as long as drawing
        figure.savefig(folder / f"{name}.svg", metadata=METADATA[".svg"])
    replace_file(folder / "report.md", [text])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input-path", type=Path, required=True, help="jsonl written by scripts/ablate.py (required)")
    parser.add_argument(
        "--output-path",
        type=output_folder,
        help="folder for the figures (default: NAME_figures beside NAME.jsonl, or NAME_SETUP_figures with --setup)",
    )
    parser.add_argument("--setup", help="which setup to draw if the file holds several, by the beginning of its hash")
    parser.add_argument(
        "--cells", type=lambda text: [part for part in text.split(",") if part], default=[],
        help="cells whose tokens to draw, as comma-separated beginnings of their hashes (default: one per policy)",
    )  # fmt: skip
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if style is None:
        raise InputError("matplotlib is not installed: pip install matplotlib")
    sweep = load(args.input_path, args.setup)
    rows = followed(sweep, args.cells)
    name = f"{args.input_path.stem}{f'_{args.setup}' if args.setup else ''}_figures"
    folder = args.output_path or args.input_path.with_name(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with style.context(["default", STYLE]):
            drawn, notes = draw(sweep, rows, bool(args.cells))
            said = {name: (title, reading) for name, (_, title, reading) in drawn.items()}
            write(folder, drawn, report(sweep, args.input_path.name, said, notes))
    except OSError as error:
        raise InputError(f"--output-path {folder}: cannot be written ({error.strerror})") from None
    print(folder / "report.md")


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    return cli.run(lambda: run(parse_args(argv)), "run the same command again to draw all figures")


if __name__ == "__main__":
    sys.exit(main())
