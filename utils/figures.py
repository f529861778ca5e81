"""How figures look, for every program that draws one. matplotlib is not needed to import this."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from pathlib import Path

from h2optimizer.utils.cli import output_file

# Sizes are for 900 pixels of width on a page: WIDTH inches of 100.
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
FORMATS = (".png", ".svg", ".pdf")
# Without dates and versions, the same results give the same bytes.
METADATA = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def figure_file(text: str) -> Path:
    """An argparse type: a path for a figure."""
    path = output_file(text)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text}: must end in {', '.join(FORMATS)}")
    return path


def line_look(policy: int, interval: int, intervals: int) -> dict:
    """How the line of a policy (by colour, marker and dashes) and interval (by fill and size) is drawn.

    Each is given by its place among those of the figure, which has `intervals` of the latter.
    """
    return {
        "color": COLOURS[policy % len(COLOURS)],
        "marker": MARKERS[policy % len(MARKERS)],
        "linestyle": DASHES[policy % len(DASHES)],
        "fillstyle": "none" if 0 < interval == intervals - 1 else FILLS[interval % len(FILLS)],
        "markerfacecoloralt": "white",
        "markersize": 6 + 0.8 * interval,
    }


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def wrap(text: str, width: float, size: float) -> str:
    """Text in lines that fit `width` inches at a font size in points."""
    letters = int(width * 72 / (0.6 * size))  # on average a letter of this font is a little narrower
    return "\n".join(textwrap.fill(line, letters) for line in text.split("\n"))


def put_title(fig, text: str) -> None:
    fig.suptitle(wrap(text, WIDTH, STYLE["figure.titlesize"]))


def spread(wanted: list[float], apart: float, low: float, high: float) -> list[float]:
    """Heights for labels: near the wanted ones, in their order, at least `apart` and, if there is room, in range."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    heights = [min(max(height, low), high) for height in wanted]
    for below, above in itertools.pairwise(order):
        heights[above] = max(heights[above], heights[below] + apart)
    limit = high
    for place in reversed(order):
        heights[place] = min(heights[place], limit)
        limit = heights[place] - apart
    return heights
