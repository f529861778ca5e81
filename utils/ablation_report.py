"""The Markdown report of an ablation: setup, findings, table, figures.

Rows are those of `h2optimizer.utils.ablation.figures`, with `source`, their cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from h2optimizer.utils.ablation import RECENT, difference, signed, with_range
from h2optimizer.utils.rouge import ROUGE_TYPES


def with_interval(of: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    if of["low"] == of["high"]:
        return f"{scale * of['mean']:z.{digits}f}"
    mean, low, high = (f"{scale * of[key]:z.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def number(key: str, scale: float = 1.0, digits: int = 1) -> Callable[[dict], str | None]:
    return lambda row: None if row.get(key) is None else f"{scale * row[key]:.{digits}f}"


def measure(key: str, scale: float = 1.0, digits: int = 2) -> Callable[[dict], str | None]:
    return lambda row: with_interval(row[key], scale, digits) if key in row else None


def rouge(name: str) -> Callable[[dict], str]:
    def text(row: dict) -> str:
        if row["source"]["h2o"] is None:
            return with_interval(row[name])
        return f"{row[name]['mean']:.2f}, {signed(row[f'{name}_delta'])}"

    return text


FEW = 20  # requests; with fewer, bootstrap intervals are too narrow

COLUMNS: dict[str, Callable[[dict], object]] = {
    "policy": lambda row: row["policy"],
    "window": lambda row: row["window_length"],
    "N": lambda row: row["update_interval"],
    **{f"ROUGE-{name.removeprefix('rouge')}": rouge(name) for name in ROUGE_TYPES},
    "top-1, %": measure("top1", 100),
    "KL, nats per token": measure("kl", digits=4),
    "perplexity": measure("perplexity", digits=3),
    "attention lost, %": measure("mass_lost", 100),
    "first token, ms": lambda row: with_range(row, "time_to_first_token", 1e3, 1),
    "ms per step": lambda row: with_range(row, "time_per_token", 1e3),
    "decode tokens/s": lambda row: with_range(row, "tokens_per_second", digits=1),
    "slots kept": number("slots_kept"),
    "KV, MiB per request": number("kv_bytes", 2**-20, 2),
    "peak memory, GiB": number("peak_memory_bytes", 2**-30, 2),
    "cell": lambda row: f"`{row['source']['cell'][:12]}`",
}


def markdown_table(header: Iterable[str], rows: Iterable[Iterable]) -> list[str]:
    lines = [["-" if value is None else str(value).replace("|", "\\|") for value in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return [f"| {' | '.join(line)} |" for line in lines]


def listing(items: list[str], most: int = 4) -> str:
    rest = [f"and {len(items) - most} more"] if len(items) > most else []
    return "; ".join([*items[:most], *rest])


def table(rows: list[dict]) -> list[str]:
    """All rows; columns that no row has are left out."""
    cells = {name: [of(row) for row in rows] for name, of in COLUMNS.items()}
    cells = {name: column for name, column in cells.items() if any(value is not None for value in column)}
    return markdown_table(cells, zip(*cells.values(), strict=True))


def setup_lines(sweep) -> list[str]:
    lines = [f"- {key}: {value}" for key, value in sweep.setup.items()]
    lines.append(f"- requests measured: {sweep.requests}")
    time = sweep.full["source"]["time"]
    timed = f"- timed: {time['batch']} prompts of {time['prompt_tokens']} tokens, decoded together"
    if (calls := time.get("calls", 1)) > 1:
        timed += f"; the median of {calls} calls, in brackets the lowest and highest"
    return [*lines, timed]


# Findings


def smallest_budgets(rows: list[dict]) -> list[str]:
    """For each policy and interval, the smallest window from which little or nothing is lost."""
    lines: dict[tuple, list[dict]] = {}
    for row in rows:
        lines.setdefault((row["policy"], row["update_interval"]), []).append(row)

    def smallest(of: list[dict], good: Callable[[dict], bool]) -> str:
        found = None
        for row in sorted(of, key=lambda row: row["window_length"], reverse=True):
            if not good(row["rouge2_delta"]):
                break
            found = row
        if found is None:
            largest = max(of, key=lambda row: row["window_length"])
            return f"none up to {largest['window_length']}: {signed(largest['rouge2_delta'])}"
        return f"{found['window_length']}: {signed(found['rouge2_delta'])}"

    header = ["policy", "N", "interval reaches 0 from window", "surely less than 1 point lost from window"]
    body = [
        [policy, n, smallest(of, lambda delta: delta["high"] >= 0), smallest(of, lambda delta: delta["low"] > -1)]
        for (policy, n), of in lines.items()
    ]
    return markdown_table(header, body)


def against(pairs: list[tuple[dict, dict]]) -> tuple[list[str], list[str]]:
    """Rows that are worse, and better, in ROUGE-2 than their pair (the interval excludes 0), worst first."""
    worse, better = [], []
    deltas = [(row, difference(row["source"], other["source"], "rouge2")) for row, other in pairs]
    for row, delta in sorted(deltas, key=lambda pair: pair[1]["mean"]):
        where = worse if delta["high"] < 0 else better if delta["low"] > 0 else []
        where.append(f"{row['label']}: {signed(delta)}")
    return worse, better


def cautions(sweep) -> list[str]:
    """Sentences about what the findings cannot show."""
    said, own = [], sweep.full["rouge2"]["mean"]
    if sweep.requests < FEW:
        said.append(
            f"**With only {sweep.requests} request{'s' * (sweep.requests > 1)} the intervals are too narrow** (with "
            "one request they have no width), so no finding in ROUGE-2 is certain. Raise --sample_num to measure more."
        )
    if own < 1:
        said.append(
            f"**The full cache's own ROUGE-2 is {own:.2f}**: there is less than a point to lose, so finding no loss "
            "means nothing. Top-1, KL and perplexity need no references."
        )
    return said


def findings(sweep) -> list[str]:
    """Sentences that follow from the figures, favourable or not."""
    rows, full, found = sweep.rows, sweep.full, []
    at = {(row["policy"], row["window_length"], row["update_interval"]): row for row in rows}

    pairs = [(row, at.get((RECENT, *place))) for (policy, *place), row in at.items() if policy != RECENT]
    pairs = [(row, other) for row, other in pairs if other is not None]
    if pairs:
        worse, better = against(pairs)
        found.append(
            f'Against "{RECENT}" of the same window and N: better in {len(better)} of {len(pairs)}, worse in '
            f"{len(worse)}{': ' * bool(worse)}{listing(worse)}."
        )
    pairs = []
    for (policy, window, n), row in at.items():
        least = min(other[2] for other in at if other[:2] == (policy, window))
        if n > least:
            pairs.append((row, at[policy, window, least]))
    if pairs:
        worse, better = against(pairs)
        found.append(
            f"Larger N against the smallest of the same policy and window: worse in {len(worse)} of "
            f"{len(pairs)}{': ' * bool(worse)}{listing(worse)}; better in {len(better)}."
        )

    def ratio(row: dict) -> str:
        said = f"{row['tokens_per_second'] / speed:.2f}x"
        if "tokens_per_second_range" not in row or row["calls"] == 1:
            return said
        (low, high), (full_low, full_high) = (of["tokens_per_second_range"] for of in (row, full))
        return f"{said} [{low / full_high:.2f}, {high / full_low:.2f}]"

    speed = full["tokens_per_second"]
    fastest = max(rows, key=lambda row: row["tokens_per_second"])
    slower = sorted((row for row in rows if row["tokens_per_second"] < speed), key=lambda row: row["tokens_per_second"])
    slower = [f"{row['label']}: {ratio(row)}" for row in slower]
    found.append(
        f"Fastest: {fastest['label']}, {ratio(fastest)} the full cache's decode tokens/s. Slower than the full cache: "
        f"{len(slower)} of {len(rows)}{': ' * bool(slower)}{listing(slower)}. Brackets, if any, reach "
        "from its slowest call over the full cache's fastest to its fastest over the full cache's slowest."
    )
    idle = [row["label"] for row in rows if "mass_lost" in row and row["mass_lost"]["mean"] < 1e-5]
    if idle:
        found.append(f"Less than 0.001 % of attention is lost, so the policy had nothing to choose: {listing(idle)}.")
    return found


def report(sweep, source: str, drawn: dict[str, tuple[str, str]], notes: list[str]) -> str:
    """`drawn` maps the name of each figure's files to its title and how to read it."""
    over = f"{sweep.requests} request{'s' * (sweep.requests > 1)}"
    lines = [f"# Ablation: {sweep.title}", "", f"From `{source}`.", "", *setup_lines(sweep), "", "## Findings", ""]
    lines += [
        "Differences in ROUGE-2 are in points, request by request, with 95 % bootstrap intervals over "
        f"{over}. Of 40 comparisons about one looks worse, and one better, by chance. An interval "
        "that includes 0 does not mean that nothing was lost, only that this many requests do not show it.", "",
        *smallest_budgets(sweep.rows), "", *(f"- {said}" for said in [*cautions(sweep), *findings(sweep)]), "",
        "## Table", "",
        "ROUGE is F in points, followed by the difference to the full cache with its interval (for the full cache, "
        "its own interval). Top-1, KL, perplexity and attention lost are measured on the full cache's own texts. A "
        "step gives each timed prompt a token; decode tokens/s count all prompts together, without prefill.", "",
        *table([sweep.full, *sweep.rows]), "", "## Figures", "",
    ]  # fmt: skip
    for name, (title, reading) in drawn.items():
        lines += [f"![{title}]({name}.png)", "", f"**{title}** ([SVG]({name}.svg)). {reading}", ""]
    return "\n".join(lines + notes).rstrip() + "\n"
