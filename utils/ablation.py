"""The file that `scripts/ablate.py` writes: a jsonl with one line per cell, that is, per cache setting.

Units are seconds, bytes and nats; values per request are in the order of the file of requests. A line holds:

- `cell`: a hash of the next two; `setup`: what all cells of one comparison share (model, requests, dtype, batch size,
  device, versions, …); `h2o`: every field of H2OConfig, or null for the full cache.
- `rouge`: by type, each request's F-measure, from 0 to 1. `texts`, of the full cache only: each request's tokens.
- `fidelity`: by name in `h2optimizer.fidelity.SUMS`, each request's sum.
- `time`: for `batch` prompts of `prompt_tokens` each, decoded together: `time_to_first_token`; `time_per_token`, of a
  step that gives each prompt a token; `tokens_per_second` of all prompts, without prefill. Medians of `calls`; the
  first two with `…_range`, [lowest, highest].
- `kv_bytes`, `slots_kept`: means per request; `peak_memory_bytes`: of the timed calls, null without a GPU.
- `retention`, not for the full cache: for one request (`index`; `setup` names the rule that chose it),
  `prompt_tokens`, `last_held` (`pack`ed int16 [layers, KV heads, tokens]: the last decode step, from 1, that could
  attend to a token; 0: none) and `mass_lost` [steps][layers].
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np

from h2optimizer.utils.cli import InputError
from h2optimizer.utils.policies import POLICIES, RECENT_ONLY, STREAMING_LLM
from h2optimizer.utils.requests import read_lines
from h2optimizer.utils.results import read_entries
from h2optimizer.utils.rouge import ROUGE_TYPES, mean_with_interval

FULL, RECENT = "full cache", RECENT_ONLY.label
# Fields that a policy's name covers; others that differ from their defaults are appended to it.
NAMED = ("window_length", "update_interval", "score", "num_heavy_hitters", "head_budgets")


def pack(array: np.ndarray) -> dict:
    """An integer array as JSON: its shape, dtype and compressed bytes."""
    data = base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "zlib": data}


def unpack(packed: dict) -> np.ndarray:
    data = zlib.decompress(base64.b64decode(packed["zlib"]))
    return np.frombuffer(data, dtype=packed["dtype"]).reshape(packed["shape"])


def held_shares(retention: dict, layer: int, h2o) -> tuple[np.ndarray, np.ndarray]:
    """Shares [steps, tokens] of a layer's KV heads that hold a token, at steps from 1: heavy hitters, recent tokens.

    Recent tokens are the `recent` newest at the last slimming before the step, and all later ones; none of these has
    had to be a heavy hitter yet.
    """
    last_held, prompt = unpack(retention["last_held"])[layer], retention["prompt_tokens"]
    step, token = np.arange(1, len(retention["mass_lost"]) + 1)[:, None], np.arange(last_held.shape[-1])
    held = np.mean([(last >= step) & (token < prompt + step) for last in last_held], axis=0)
    recent = token >= prompt + h2o.schedule.last_due(step - 1) - h2o.recent
    return held * ~recent, held * recent


def setup_id(setup: dict) -> str:
    """A short hash that identifies a setup in messages and flags."""
    return hashlib.sha256(json.dumps(setup, sort_keys=True).encode()).hexdigest()[:6]


def of_one_setup(path: Path, cells: list[dict], prefix: str | None) -> list[dict]:
    """The cells of the setup whose id begins with `prefix`, or of the only setup; the latest line of each cell.

    Raises: InputError unless exactly one setup matches; it lists the setups by id and by how they differ.
    """
    setups = {setup_id(cell["setup"]): cell["setup"] for cell in cells}
    chosen = [name for name in setups if name.startswith(prefix or "")]
    if len(chosen) != 1:
        keys = dict.fromkeys(key for setup in setups.values() for key in setup)
        keys = [key for key in keys if len({repr(setup.get(key)) for setup in setups.values()}) > 1]
        named = {name: ", ".join(f"{key}={setup.get(key)}" for key in keys) for name, setup in setups.items()}
        listed = "; ".join(f"{name}: {what}" if what else name for name, what in named.items())
        problem = f"--setup {prefix} matches {len(chosen)} of its setups" if prefix else "holds several setups"
        raise InputError(f"{path}: {problem} ({listed}); choose one with --setup")
    return list({cell["cell"]: cell for cell in cells if setup_id(cell["setup"]) == chosen[0]}.values())


def policy_name(h2o: dict | None, defaults: dict) -> str:
    """A policy in words, without window and interval. `defaults`: H2OConfig's."""
    if h2o is None:
        return FULL
    score, heavy = h2o["score"], h2o["num_heavy_hitters"]
    if heavy == 0:
        name = RECENT
    elif (policy := POLICIES[score]).keeps_oldest:
        sinks = policy.heavy if heavy == -1 and policy.heavy is not None else heavy
        name = "sink + recent" if sinks == -1 else f"{sinks} sinks"
        name = f"{STREAMING_LLM.label} ({name})" if sinks == STREAMING_LLM.heavy else name
    else:
        name = policy.label + (f", {heavy} heavy" if heavy != -1 else "")
    others = [f"{key}={value}" for key, value in h2o.items() if key not in NAMED and value != defaults.get(key)]
    if h2o.get("head_budgets", "even") != "even":
        others.append("measured budgets")
    return ", ".join([name, *others])


def check_cell(cell: dict) -> None:
    """Raises ValueError, with the reason, for a line that is not a cell: missing fields, or unusable values."""

    def be(accepts: bool, what: str) -> None:
        if not accepts:
            raise ValueError(what)

    def numbers(of, name: str, shape: tuple = (), low: float = -math.inf, high: float = math.inf) -> None:
        array = np.asarray(of)  # ValueError for rows of several lengths
        finite = array.dtype.kind in "iuf" and bool(np.isfinite(array).all())
        number = f"{'x'.join(map(str, shape))} numbers" if shape else "a number"
        bounds = "" if low == -math.inf else f", at least {low:g}" if high == math.inf else f", {low:g} to {high:g}"
        fits = finite and array.shape == shape and bool(((low <= array) & (array <= high)).all())
        be(fits, f"{name} must be {number}{bounds}")

    try:
        be(isinstance(cell["cell"], str), "cell must be a hash")
        be(isinstance(cell["setup"], dict), "setup must be an object")
        be(isinstance(cell["h2o"], dict | None), "h2o must be an object, or null")
        requests = len(cell["rouge"]["rouge2"])
        be(requests > 0, "it has no requests")
        for name in ROUGE_TYPES:
            numbers(cell["rouge"][name], name, (requests,), 0, 1)
        for name in ("tokens", "agreed", "kl", "nll", "mass_lost"):
            numbers(cell["fidelity"][name], name, (requests,), -math.inf if name in ("kl", "nll") else 0)
        for name in ("time_to_first_token", "time_per_token", "tokens_per_second", "batch", "prompt_tokens"):
            numbers(cell["time"][name], name, (), 1e-12)
        for name in ("time_to_first_token", "time_per_token"):
            if (measured := cell["time"].get(f"{name}_range")) is not None:  # earlier files have none
                numbers(measured, f"{name}_range", (2,))
                be(measured[0] <= cell["time"][name] <= measured[1], f"{name}_range must hold {name}")
                numbers(cell["time"]["calls"], "calls", (), 1)
        for name in ("kv_bytes", "slots_kept", "peak_memory_bytes"):
            be(name in cell, f"{name} is missing")
            if cell[name] is not None:
                numbers(cell[name], name, (), 0)
        if (retention := cell.get("retention")) is not None:
            for name in ("index", "prompt_tokens"):
                numbers(retention[name], f"retention's {name}", (), 0)
            layers, _, tokens = unpack(retention["last_held"]).shape
            if steps := tokens - retention["prompt_tokens"]:
                numbers(retention["mass_lost"], "retention's mass_lost", (steps, layers), 0, 1)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    except (TypeError, AttributeError, zlib.error):
        raise ValueError("a field has the wrong form") from None


def read_cells(path: Path) -> list[dict]:
    """The cells of a file, in order, without a last line that a crash cut short. Raises InputError."""
    lines = (line for _, line in read_lines(path, "--input-path"))
    try:
        cells = [cell for cell, _ in read_entries(lines, "cell", check_cell)]
    except ValueError as error:
        raise InputError(f"{path}, {error}: not a cell of scripts/ablate.py; fix the line, or remove it") from None
    if not cells:
        raise InputError(f"{path}: holds no cells; run scripts/ablate.py to make some")
    return cells


def difference(cell: dict, other: dict, name: str) -> dict[str, float]:
    """ROUGE points of a cell minus another's, request by request: the mean and its interval."""
    ours, theirs = (100 * np.asarray(of["rouge"][name]) for of in (cell, other))
    return mean_with_interval(ours - theirs)


def signed(of: dict[str, float]) -> str:
    """A mean difference with its interval."""
    mean, low, high = (f"{of[key]:+z.2f}" for key in ("mean", "low", "high"))  # z: no -0.00
    return f"{mean} [{low}, {high}]"


def with_range(row: dict, key: str, scale: float = 1.0, digits: int = 2) -> str:
    """A measured figure of a row, with the lowest and highest of its calls if there are several."""
    median = f"{scale * row[key]:.{digits}f}"
    if f"{key}_range" not in row or row["calls"] == 1:
        return median
    low, high = (f"{scale * bound:.{digits}f}" for bound in row[f"{key}_range"])
    return f"{median} [{low}, {high}]"


def figures(cell: dict, full: dict, defaults: dict) -> dict:
    """A row of the table: means over requests, each quality as {mean, low, high} (95 % bootstrap over requests).

    ROUGE is in points of 100; `_delta` is its difference to the full cache, request by request. `top1` and `mass_lost`
    are shares, `kl` is in nats per token.

    Raises: ValueError if the two were measured on different texts.
    """
    if cell["fidelity"]["tokens"] != full["fidelity"]["tokens"]:
        raise ValueError("it was measured on texts other than the full cache's")
    h2o, sums = cell["h2o"], {name: np.asarray(values) for name, values in cell["fidelity"].items()}
    row = {"policy": policy_name(h2o, defaults)}
    row |= {key: h2o and h2o[key] for key in ("window_length", "update_interval")}
    for name in ROUGE_TYPES:
        row[name] = mean_with_interval(100 * np.asarray(cell["rouge"][name]))
        row[f"{name}_delta"] = difference(cell, full, name)
    tokens = sums["tokens"]
    if tokens.sum():
        for name, of in (("top1", "agreed"), ("kl", "kl"), ("mass_lost", "mass_lost"), ("nll", "nll")):
            row[name] = mean_with_interval(sums[of], tokens)
        row["perplexity"] = {key: float(np.exp(value)) for key, value in row.pop("nll").items()}
    row |= cell["time"]
    if "time_per_token_range" in row:
        least, most = row["time_per_token_range"]
        # a step within the clock's noise gives no upper bound
        row["tokens_per_second_range"] = [row["batch"] / most, row["batch"] / least if least > 0 else math.inf]
    return row | {key: cell[key] for key in ("kv_bytes", "slots_kept", "peak_memory_bytes")}
