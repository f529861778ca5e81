"""Figures and a report of an ablation: what a jsonl of scripts/ablate.py says, as PNG, SVG and Markdown in one folder.

- quality: ROUGE-2, top-1 agreement and KL divergence against the KV budget, with 95 % intervals over requests.
- frontier: ROUGE-2 against tokens/s; what no other cell beats in both is ringed.
- retention_CELL: which tokens each layer still holds while a request is decoded, for one cell (--cells).
- mass_lost: how much of the full cache's attention falls on evicted tokens, step by step, of the same request.
- report.md: the setup, what follows from the figures, the whole table, the figures.

Markers, line styles and lightness tell everything apart, so that figures can be printed in grey. The same file gives
the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli

if __name__ == "__main__":
    cli.begin()

import numpy as np

try:
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
except ImportError:  # `run` says so
    style = None

from h2optimizer import H2OConfig
from utils.ablation import FULL, figures, held_shares, of_one_setup, read_cells
from utils.ablation_report import report
from utils.cli import InputError, OneLineParser, output_folder
from utils.requests import replace_file

# How figures look. Sizes are for 900 pixels of width on a page: WIDTH inches of 100.
WIDTH, SMALL = 9.0, 8
STYLE = {
    "figure.constrained_layout.use": True, "savefig.dpi": 150, "svg.hashsalt": "H2Optimizer", "font.size": 10,
    "axes.titlesize": 10, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E2E2E2", "lines.linewidth": 1.6,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9,
    "legend.handlelength": 3.2, "figure.titlesize": 11, "hatch.linewidth": 0.5, "text.parse_math": False,
}  # fmt: skip
COLOURS = ("#0B3C6F", "#D55E00", "#009E73", "#A6611A", "#56A0D3", "#7B3294", "#B8860B")  # of policies, dark and light
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one more than colours: 56 pairs
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)))
FILLS = ("full", "left", "bottom", "right", "top")  # of intervals; the largest is not filled
HEAVY_RGB, RECENT_RGB = np.array([0.02, 0.12, 0.30]), np.array([0.96, 0.72, 0.36])
RECENT_LOOK = {"facecolor": "none", "edgecolor": "#6B3E00", "hatch": "////", "linewidth": 0.8}  # hatched over its RGB
BAND = "#D0D0D0"
APART = 0.35  # of lines of one panel, in powers of two of the budget
MOST_LINES = 6  # in one panel; more get a panel for each interval
MOST_RETENTIONS = 3  # drawn unasked


@dataclass
class Sweep:
    """The cells of one setup: `full`, and the bounded ones in the order of policy, interval, window.

    Each is a row of `utils.ablation.figures` with `source`, its cell, and `label`.
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
        model = next((str(value) for key, value in self.setup.items() if "model" in key), "")
        self.title = " · ".join([*filter(None, [Path(model).name]), plural(self.requests, "request")])

    def line(self, row: dict) -> tuple[int, int]:
        return self.policies.index(row["policy"]), self.intervals.index(row["update_interval"])

    def look(self, policy: int, interval: int = 0) -> dict:
        """How the line of a policy (by colour, marker and dashes) and interval (by fill and size) is drawn."""
        return {
            "color": COLOURS[policy % len(COLOURS)],
            "marker": MARKERS[policy % len(MARKERS)],
            "linestyle": DASHES[policy % len(DASHES)],
            "fillstyle": "none" if 0 < interval == len(self.intervals) - 1 else FILLS[interval % len(FILLS)],
            "markerfacecoloralt": "white",
            "markersize": 6 + 0.8 * interval,
        }

    def panels(self) -> list[tuple[str, list[dict]]]:
        """Rows that share axes: all, or one interval's where they would be too many lines."""
        if len({self.line(row) for row in self.rows}) <= MOST_LINES:
            return [("", self.rows)]
        by_interval = {n: [row for row in self.rows if row["update_interval"] == n] for n in self.intervals}
        return [(f"N = {n}", rows) for n, rows in by_interval.items()]


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def load(path: Path, prefix: str | None) -> Sweep:
    """The cells of one setup of a file. Raises InputError where that is not one, or has no full cache."""
    cells = of_one_setup(path, read_cells(path), prefix)
    full = next((cell for cell in cells if cell["h2o"] is None), None)
    if full is None or len(cells) == 1:
        missing = "full cache, which all else is compared with" if full is None else "bounded cache"
        raise InputError(f"{path}: the setup has no cell of a {missing}; scripts/ablate.py measures it")
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


def full_band(ax, full: dict | None, scale: float = 1.0) -> None:
    """The full cache: a line at its mean over the band of its interval."""
    if full is not None:
        ax.axhspan(scale * full["low"], scale * full["high"], color=BAND, alpha=0.6, linewidth=0, zorder=0.5)
        ax.axhline(scale * full["mean"], color="black", linewidth=1.2, zorder=1)


def legend(fig, sweep: Sweep, lines: bool = True, extra: tuple = (), marker: str = "") -> None:
    """Below the figure: the full cache, policies, and the intervals' fills where there are several."""
    full = {"color": "black", "linewidth": 1.2, "marker": marker, "markersize": 9}
    handles = [(Patch(color=BAND, alpha=0.6), Line2D([], [], label=f"{FULL}, 95 % interval", **full))]
    for i, policy in enumerate(sweep.policies):
        look = sweep.look(i) | ({} if lines else {"linestyle": "none"})
        handles.append(Line2D([], [], label=policy, **look))
    if len(sweep.intervals) > 1:
        for i, n in enumerate(sweep.intervals):
            look = sweep.look(0, i) | {"color": "#555555", "marker": "o", "linestyle": "none"}
            handles.append(Line2D([], [], label=f"N = {n}", **look))
    labels = [handle.get_label() for handle in (handles[0][1], *handles[1:], *extra)]
    columns = 2 if max(map(len, labels)) > 36 else 4
    fig.legend([*handles, *extra], labels, loc="outside lower center", ncols=columns)


def draw_quality(sweep: Sweep) -> Figure:
    measures = [("rouge2", "ROUGE-2 F, points", 1), ("top1", "top-1 agreement, %", 100), ("kl", "KL, nats a token", 1)]
    measures = [measure for measure in measures if measure[0] in sweep.full]
    panels = sweep.panels()
    fig = Figure(figsize=(WIDTH, 1.3 + 2.5 * len(panels)))
    grid = fig.subplots(len(panels), len(measures), squeeze=False, sharex=True, sharey="col")
    fig.suptitle(f"Quality against KV budget: {sweep.title}")
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
                # Lines stand a little beside each other, so that intervals do not cover one another.
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
    for ax in grid[-1]:
        ax.set_xlabel("KV budget: window_length, slots", fontsize=9)
    if len(measures) > 1:
        grid[0, -1].set_yscale("symlog", linthresh=0.01)  # it spans decades, and is 0 where nothing was evicted
        grid[0, -1].yaxis.set_major_formatter("{x:g}")
        grid[0, -1].set_ylim(-0.001, 1.5 * grid[0, -1].get_ylim()[1])
    legend(fig, sweep)
    return fig


def spot(row: dict) -> tuple[float, float]:
    return row["tokens_per_second"], row["rouge2"]["mean"]


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
    fig.suptitle(f"Quality against speed: {sweep.title}")
    for (title, rows), ax in zip(panels, grid, strict=True):
        ax.set_title(title, loc="left", fontsize=9)
        ax.set_ylabel("ROUGE-2 F, points")
        full_band(ax, sweep.full["rouge2"])
        ax.plot(*zip(*map(spot, best), strict=True), color="#777777", linewidth=1, linestyle=":", drawstyle="steps-pre")
        for row in [sweep.full, *rows]:
            look = {"color": "black", "marker": "h", "markersize": 10}
            look = look if row is sweep.full else sweep.look(*sweep.line(row)) | {"linestyle": "none"}
            ax.plot(*spot(row), zorder=3, label=row["label"], **look)
            if any(row is other for other in best):
                ax.plot(*spot(row), "o", color="black", fillstyle="none", markersize=15, label="ring", zorder=2)
    speeds = [row["tokens_per_second"] for row in (sweep.full, *sweep.rows)]
    beside = 0.04 * (max(speeds) - min(speeds)) or 0.05 * max(speeds)
    grid[0].set_xlim(min(speeds) - beside, max(speeds) + beside)
    grid[0].xaxis.set_major_formatter("{x:,g}")
    timed = f"batch {sweep.full['batch']}, prompts of {plural(sweep.full['prompt_tokens'], 'token')}"
    grid[-1].set_xlabel(f"tokens/s ({timed}); numbers in the figure: window_length")
    ring = Line2D([], [], color="black", marker="o", fillstyle="none", markersize=12, linestyle=":", label="frontier")
    legend(fig, sweep, lines=False, extra=(ring,), marker="h")
    fig.draw_without_rendering()  # texts are placed by pixels, which the layout decides
    for (_, rows), ax in zip(panels, grid, strict=True):
        annotate(ax, sorted(rows, key=lambda row: row not in best), [sweep.full, *rows], best)
    return fig


def annotate(ax, rows: list[dict], drawn: list[dict], always: list[dict]) -> None:
    """Each row's window at the first place by its marker where it covers nothing; without one only `always`."""

    def to_points(row: dict) -> np.ndarray:
        return ax.transData.transform(spot(row)) * 72 / ax.figure.dpi

    marks, texts = [to_points(row) for row in drawn], []
    places = [(dx, dy) for r in (11, 15) for dx, dy in ((r, 0), (0, r), (0, -r), (-r, 0), (r, r), (r, -r), (-r, r))]
    for row in rows:
        text, (x, y) = str(row["window_length"]), to_points(row)
        width, height = 0.66 * SMALL * len(text), SMALL
        for dx, dy in places:
            left, low = x + dx - width * (1 - np.sign(dx)) / 2, y + dy - height / 2
            right, high = left + width, low + height
            on_mark = any(left - 4 < a < right + 4 and low - 4 < b < high + 4 for a, b in marks)
            if not on_mark and not any(left < r and a < right and low < h and b < high for a, b, r, h in texts):
                break
        else:
            if row not in always:
                continue
            dx, dy = places[0]
        texts.append((left, low, right, high))
        side = "left" if dx > 0 else "right" if dx < 0 else "center"
        where = {"textcoords": "offset points", "ha": side, "va": "center"}
        ax.annotate(text, spot(row), (dx, dy), **where, fontsize=SMALL, zorder=4).set_in_layout(False)


# Figures of one request


def followed(sweep: Sweep, chosen: list[str]) -> list[dict]:
    """The rows whose retention is drawn: the chosen ones, else each policy's nearest to a budget and interval amid all.

    Of a budget below the prompt, where there is one: others evict little. All are of the first row's request.
    """
    rows = [row for row in sweep.rows if (row["source"].get("retention") or {}).get("mass_lost")]
    rows = [row for row in rows if row["source"]["retention"]["index"] == rows[0]["source"]["retention"]["index"]]
    for prefix in chosen:
        matches = sum(row["source"]["cell"].startswith(prefix) for row in rows)
        if matches != 1:
            meant = f"{matches} cells" if matches else "no cell whose tokens were followed"
            raise InputError(
                f"--cells {prefix}: means {meant}; the table of report.md names them, leave it out to see it"
            )
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
    """RGB of a share of heads: its root, so that the few of a long prompt can be seen."""
    return 1 - np.sqrt(share)[..., None] * (1 - HEAVY_RGB)


def draw_retention(sweep: Sweep, row: dict) -> Figure:
    retention = row["source"]["retention"]
    layers, _, tokens = retention["last_held"]["shape"]
    steps, prompt = len(retention["mass_lost"]), retention["prompt_tokens"]
    columns = 1 if layers <= 8 else 4
    per_bin = math.ceil(tokens / (1000 // columns))  # tokens of a column of pixels
    begins = np.arange(0, tokens, per_bin)
    fig = Figure(figsize=(WIDTH, 1.6 + (1.1 if columns == 1 else 1.25) * math.ceil(layers / columns)))
    grid = fig.subplots(math.ceil(layers / columns), columns, squeeze=False, sharex=True, sharey=True)
    fig.suptitle(f"Tokens held: {row['label']}\n{sweep.title}, here request {retention['index']} (from 0)")
    for ax in grid.flat[layers:]:
        ax.set_axis_off()
    slimmed = np.arange(steps) // row["update_interval"] * row["update_interval"]
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
    for ax in grid[-1]:
        ax.set_xlabel("token position", fontsize=9)
    shades = (("older token, in all KV heads", 1.0), ("in 1/2", 0.5), ("in 1/8", 0.125))
    patches = [Patch(facecolor=heavy_shade(share), edgecolor="black", label=name) for name, share in shades]
    patches.append(Patch(**RECENT_LOOK | {"facecolor": RECENT_RGB}, label="recent"))
    patches.append(Patch(facecolor="white", edgecolor="black", label="evicted"))
    patches.append(Line2D([], [], color="black", linewidth=1, linestyle=(0, (4, 2)), label="end of the prompt"))
    fig.legend(handles=patches, loc="outside lower center", ncols=6, handlelength=1.4)
    return fig


def draw_mass_lost(sweep: Sweep, rows: list[dict]) -> Figure:
    """All means in the first panel; then each with its layers."""
    several = len(rows) > 1
    panels = [None, *rows] if several else rows
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    fig = Figure(figsize=(WIDTH, 1.4 + 2.2 * math.ceil(len(panels) / columns)))
    grid = fig.subplots(math.ceil(len(panels) / columns), columns, squeeze=False, sharex=True, sharey=True)
    index = rows[0]["source"]["retention"]["index"]
    fig.suptitle(f"Attention that falls on evicted tokens: {sweep.title}, here request {index} (from 0)")
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
                if shares.shape[1] <= 8:  # more would be a thicket
                    ax.plot(at, shares, color="#888888", linewidth=0.4)
            ax.plot(at, shares.mean(axis=1), markevery=max(1, len(at) // 8), **look)
        title = row_title(panel) if panel else "all, mean of layers"
        ax.set_title(title, loc="left", fontsize=SMALL if panel else 9)
    for ax in grid.flat[len(panels) :]:
        ax.set_axis_off()
    grid[0, 0].set_ylim(bottom=0)
    for ax in grid[:, 0]:
        ax.set_ylabel("attention lost, %")
    for ax in grid.flat[: len(panels)]:
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.set_xlabel("decode step", fontsize=9)
    handles = [Line2D([], [], **look) for look in looks]
    handles.append(Patch(color=BAND, label="from the lowest to the highest layer"))
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
    return fig


def row_title(row: dict) -> str:
    """A label on lines that fit a third of the width."""
    return f"{row['policy']},\nwindow {row['window_length']}, N = {row['update_interval']}"


# The script


READING = {
    "quality": "Each panel: the mean over requests and its 95 % interval, the full cache as a band; the closer a line "
    "stays to the band towards small budgets, the better. Requests differ more from one another than caches do, so "
    "judge small differences by the paired ones of the table.",
    "frontier": "Up is better, right is faster; a ringed cell is one that no other equals or beats in both, and a cell "
    "inside the full cache's band need not be better than another there.",
    "retention": "Each row of pixels is a decode step; the darker an older token, the more KV heads still hold it (the "
    "mean of neighbours where a pixel has several tokens); hatched are the newest tokens, which are kept whatever "
    "their mass, and those that wait for the next slimming; white is evicted or, to the right, not there yet.",
    "mass_lost": "What the full cache attends to, at the same step of the same text, among tokens that this cache has "
    "dropped; 0 means that nothing which mattered is missing.",
}


def draw(sweep: Sweep, rows: list[dict], all_retentions: bool) -> tuple[dict[str, tuple[Figure, str, str]], list[str]]:
    """By name of its files, each figure, its title and how to read it; and notes on what is not drawn."""
    drawn = {
        "quality": (draw_quality(sweep), "Quality against KV budget", READING["quality"]),
        "frontier": (draw_frontier(sweep), "Quality against speed", READING["frontier"]),
    }
    if not rows:
        return drawn, ["No cell followed a request's tokens: its text was of one token, which evicts nothing."]
    drawn["mass_lost"] = draw_mass_lost(sweep, rows), "Attention on evicted tokens", READING["mass_lost"]
    for row in rows if all_retentions else rows[:MOST_RETENTIONS]:
        name = f"retention_{row['source']['cell'][:12]}"
        drawn[name] = draw_retention(sweep, row), f"Tokens held: {row['label']}", READING["retention"]
    return drawn, ["Other cells' tokens: `--cells` with what the table's last column says, comma-separated."]


def write(folder: Path, drawn: dict[str, tuple[Figure, str, str]], text: str) -> None:
    for name, (figure, _, _) in drawn.items():
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        figure.set_layout_engine("none")  # it stays as it is: laying out takes as long as drawing
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    replace_file(folder / "report.md", [text])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input-path", type=Path, required=True, help="jsonl of scripts/ablate.py")
    parser.add_argument(
        "--output-path",
        type=output_folder,
        help="folder of figures; NAME_figures beside NAME.jsonl by default, NAME_SETUP_figures with --setup",
    )
    parser.add_argument("--setup", help="which setup, by the beginning of its hash, where the file holds several")
    parser.add_argument(
        "--cells", type=lambda text: [part for part in text.split(",") if part], default=[],
        help="whose tokens to follow, comma-separated beginnings of cells' hashes; one a policy by default",
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
