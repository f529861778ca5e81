"""The figure of scripts/compare_policies.py: what each policy loses against the bytes it holds."""

from __future__ import annotations

import math
from pathlib import Path

from h2optimizer.utils.cli import InputError
from h2optimizer.utils.figures import METADATA, SMALL, STYLE, WIDTH, line_look, plural, put_title, spread, wrap

LEAST_KL = 1e-6  # nats a token; smaller means are rounding, and a log scale has no 0
PROMPT_AND_TEXT, PROMPT_ALONE = "prompt + text", "prompt"  # what a window holds
LABELS = 2.5  # inches beside the axes
FONT = 9


def lines_of(rows: list[dict]) -> dict[tuple[str, int | None], list[dict]]:
    """Rows that share a line, by policy and N, in the order of their first; each line by window.

    The full cache and rows whose texts have no token to predict are left out.
    """
    lines: dict[tuple[str, int | None], list[dict]] = {}
    for row in rows:
        if row["window"] is not None and "kl" in row:
            lines.setdefault((row["policy"], row["N"]), []).append(row)
    return {line: sorted(of, key=lambda row: row["window"]) for line, of in lines.items()}


def label_of(policy: str, interval: int | None, several: bool) -> str:
    """A policy without the folders of its plan, and its N where the figure has several."""
    parts = (part.strip().partition("=") for part in policy.split(","))
    flags = [f"{flag}={Path(value).name}" if value else flag for flag, _, value in parts]
    return ", ".join(flags + ([f"N = {interval}"] if several and interval else []))


def storage_of(policy: str) -> tuple[str, str]:
    """A policy without how its slots are stored, and that: "slots=int8", or nothing."""
    parts = [part.strip() for part in policy.split(",")]
    of_slots = [part for part in parts if part.startswith("slots=")]
    return ",".join(part for part in parts if part not in of_slots), ",".join(of_slots)


def draw_policies(rows: list[dict], model: str):
    """KL to the full cache, on a log scale, against the MiB held for a request: a line for each policy and N.

    Args:
        rows: of the metrics JSON of scripts/compare_policies.py, with at least one of a bounded cache.
        model: its name, for the title.

    Returns: a matplotlib Figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    lines = lines_of(rows)
    intervals = sorted({interval for _, interval in lines if interval})
    policies = list(dict.fromkeys(storage_of(policy)[0] for policy, _ in lines))
    labels = [wrap(label_of(*line, len(intervals) > 1), LABELS, FONT) for line in lines]
    apart = 1.35 * FONT * max(label.count("\n") + 1 for label in labels)  # points
    fig = Figure(figsize=(WIDTH, max(4.6, 1.2 + len(labels) * apart / 72)))
    ax = fig.subplots()
    drawn = [row for of in lines.values() for row in of]
    requests = plural(drawn[0]["requests"], "request")
    put_title(fig, f"What a bounded cache loses: {model} · {requests}{f', N = {intervals[0]}' * (len(intervals) == 1)}")
    for (policy, interval), of in lines.items():
        mean, low, high = ([max(row["kl"][key], LEAST_KL) for row in of] for key in ("mean", "low", "high"))
        below, above = ([abs(a - b) for a, b in zip(mean, ends, strict=True)] for ends in (low, high))
        name, stored = storage_of(policy)
        look = line_look(policies.index(name), intervals.index(interval) if interval else 0, len(intervals))
        look |= {"markerfacecolor": "white", "linewidth": 0.9} if stored else {}
        ax.errorbar(list(map(mebibytes, of)), mean, [below, above], elinewidth=0.9, capsize=2, **look)
    ax.set(xscale="log", yscale="log", ylabel="KL to the full cache, nats a token")
    full = [row for row in rows if row["window"] is None]
    held = f" (full cache: {mebibytes(full[0]):.3g})" if full else ""
    ax.set_xlabel(f"KV MiB held for a request at the end of a text{held}\nnumbers in the figure: windows, in slots")
    least, most = min(map(mebibytes, drawn)), max(map(mebibytes, drawn))
    ticks = ticks_between(least / 1.15, most * 1.15)
    ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    ax.set_xlim(least / 1.15, most * 1.15)
    ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.margins(y=0.1)
    name_windows(ax, drawn)
    name_lines(ax, labels, [of[-1] for of in lines.values()], apart)
    return fig


def mebibytes(row: dict) -> float:
    return row["kv_bytes"] / 2**20


def ticks_between(least: float, most: float) -> list[float]:
    """Powers of two in a range, and 1.5 times as much where they would be few."""
    octaves = range(math.floor(math.log2(least)), math.ceil(math.log2(most)) + 1)
    parts = (1,) if len(octaves) > 5 else (1, 1.5)
    return [tick for octave in octaves for part in parts if least <= (tick := part * 2.0**octave) <= most]


def name_windows(ax, drawn: list[dict]) -> None:
    """Each window's number: below the lowest of its markers, or above the highest of presses, which hold more bytes.

    Slots that are stored in another way hold other bytes, so their markers have numbers of their own.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in drawn:
        groups.setdefault((row["window"], row["window holds"], storage_of(row["policy"])[1]), []).append(row)
    for (window, holds, _), alike in sorted(groups.items(), key=lambda group: group[0]):
        above = holds == PROMPT_ALONE
        at = max(alike, key=lambda row: row["kl"]["high"]) if above else min(alike, key=lambda row: row["kl"]["low"])
        spot = mebibytes(at), max(at["kl"]["high" if above else "low"], LEAST_KL)
        where = {"textcoords": "offset points", "ha": "center", "va": "bottom" if above else "top"}
        over_lines = {"zorder": 5, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.8}}
        ax.annotate(f"{window}", spot, (0, 8 if above else -5), fontsize=SMALL, color="#444444", **where, **over_lines)


def name_lines(ax, labels: list[str], last: list[dict], apart: float) -> None:
    """A label beside the axes for each line, at the height of its last marker or as near as others leave room.

    Args:
        labels: of the lines, in the order in which they were drawn.
        last: their last rows.
        apart: points from one label to the next.
    """
    fig = ax.figure
    fig.draw_without_rendering()  # heights are in pixels, which the layout decides
    width, height = ax.get_window_extent().size * 72 / fig.dpi
    ends = [ax.transData.transform((mebibytes(row), max(row["kl"]["mean"], LEAST_KL))) for row in last]
    ends = [ax.transAxes.inverted().transform(end) for end in ends]
    heights = spread([y for _, y in ends], apart / height, 0.0, 1.0)
    for text, end, y, bars in zip(labels, ends, heights, ax.containers, strict=True):
        colour = bars.lines[0].get_color()
        # dotted, because one from the middle of the axes would look like data
        link = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.6,
            "linestyle": ":",
            "shrinkA": 2,
            "shrinkB": 6,
            "relpos": (0, 0.5),
        }
        at = {"xycoords": "axes fraction", "textcoords": "axes fraction", "annotation_clip": False}
        ax.annotate(text, end, (1 + 14 / width, y), va="center", fontsize=FONT, color=colour, arrowprops=link, **at)


def save_policies(rows: list[dict], model: str, path: Path) -> None:
    """Draw the figure to a file. Raises InputError if it cannot be written."""
    from matplotlib import style

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with style.context(["default", STYLE]):
            draw_policies(rows, model).savefig(path, metadata=METADATA[path.suffix.lower()])
    except OSError as error:
        raise InputError(f"--figure {path}: cannot be written ({error.strerror}); results are kept") from None
