"""Budgets per KV head: how many slots each head keeps, from what a cut of that head alone costs a model.

All heads keep the same number of newest tokens. A plan divides the slots that remain.

A plan is a JSON file. `scripts/calibrate.py` writes one with measured losses, which serves any window. A plan made by
hand is {"windows": [[96, 32], …]}, a list of layers with a number for each KV head. Only the ratios of these numbers
count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from h2optimizer.utils.requests import LONGEST_LINE, Request, json_object
from h2optimizer.utils.results import fingerprint, replace_file, to_json

FORM = 1  # version of the file
HASH = 16  # hexadecimal digits of a fingerprint
LEAST = 2  # slots of a head, beside the newest
UNIT = 4  # budgets from losses are multiples of so many slots, but for one head that takes the remainder
KNOTS_PER_OCTAVE = 8
MOST_SLOTS = 2**31
NOISE = 1e-6  # nats per token; smaller losses are not told apart
FALL = 2.0  # beyond the measured widths, a loss falls with this power of the slots
RISE = 2.0  # below them, it rises by this multiple of itself for each e-fold of fewer slots

Windows = tuple[tuple[int, ...], ...]  # [layers][KV heads]


def shape_fault(shape: tuple[int, int], config) -> str | None:
    """Why budgets of so many layers and KV heads are not for a model of this transformers config; None if they are."""
    there = config.num_hidden_layers, config.num_key_value_heads
    if tuple(shape) == there:
        return None
    ours, theirs = (f"{layers} layers of {heads} KV heads" for layers, heads in (shape, there))
    return f"budgets for {ours}, but the model has {theirs}; run scripts/calibrate.py on this model"


@dataclass(frozen=True, kw_only=True)
class HeadBudgets:
    """A plan: `windows` divides the slots of all heads. `load` reads either kind of file."""

    path: Path | None = None  # for messages

    @staticmethod
    def load(path: str | Path) -> HeadBudgets:
        """The plan in a file. Raises ValueError, in one line that names the file and the way out, if it holds none."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                raw = file.read(LONGEST_LINE + 1)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); scripts/calibrate.py writes plans") from None
        try:
            return _parsed(raw, path)
        except ValueError as error:
            raise ValueError(f"{path}: not a plan of head budgets ({error}); run scripts/calibrate.py again") from None

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads."""
        raise NotImplementedError

    def windows(self, window_length: int, recent: int = 0) -> Windows:
        """Slots of each head, `recent` of them for the newest tokens, with a mean of exactly `window_length`.

        The other slots are divided, at least 2 to each head. No head's budget falls as `window_length` grows. Raises
        ValueError where there are fewer.
        """
        if window_length - recent < LEAST:
            raise ValueError(
                f"window_length={window_length}: {recent} of its slots hold the newest tokens, so a plan has too "
                f"few to divide; give at least {recent + LEAST}, or raise num_heavy_hitters"
            )
        layers, heads = self.shape
        slots = recent + self._divide(window_length - recent)
        return tuple(map(tuple, slots.reshape(layers, heads).tolist()))

    def _divide(self, mean: int) -> np.ndarray:
        """int64 [layers * heads], with this mean."""
        raise NotImplementedError

    def check_model(self, config, weights: str | None = None) -> None:
        """Raises ValueError, in one line, unless the plan is for a model of this transformers config and fingerprint.

        Args:
            config: gives num_hidden_layers and num_key_value_heads.
            weights: `h2optimizer.utils.results.checkpoint_fingerprint`; None where it is not known.
        """
        if fault := shape_fault(self.shape, config):
            raise ValueError(f"{self._name}: {fault}")

    def calibrated_on(self, requests: Iterable[Request]) -> int:
        """How many of these requests the losses were measured on. They are no fair test of the plan."""
        return 0

    @property
    def _name(self) -> str:
        return "head_budgets" if self.path is None else str(self.path)


@dataclass(frozen=True, kw_only=True)
class GivenBudgets(HeadBudgets):
    """A plan made by hand: `shares` [layers][KV heads], in any unit."""

    shares: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        _check_table(self.shares, "windows")

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.shares), len(self.shares[0])

    def _divide(self, mean: int) -> np.ndarray:
        shares = np.array(self.shares, dtype=np.float64).ravel()
        return _apportioned(shares, mean * shares.size, LEAST)


@dataclass(frozen=True, kw_only=True)
class MeasuredBudgets(HeadBudgets):
    """A measured plan: slots go where they save most.

    A head's loss at any width is interpolated between the measured widths, over logarithms of both, and made convex.
    Each head gets `UNIT` slots; the others are given out in the order of what they save. Losses of single heads do not
    add up in narrow windows, where many heads are cut: `refined` windows were measured together, and take over there.
    """

    widths: tuple[int, ...]  # slots, ascending
    # Mean KL divergence from the full cache, in nats per token, when this head alone keeps so many slots beside its
    # newest: [layers][KV heads][widths].
    losses: tuple[tuple[tuple[float, ...], ...], ...]
    score: str = "mass"  # H2OConfig's, of the measurement
    recent: int = 0  # newest slots that each head kept beside those that a width counts
    model: str | None = None  # its name
    weights: str | None = None  # its fingerprint
    texts: tuple[str, ...] = ()  # fingerprints of the requests
    prompt_tokens: float = 0.0  # mean length of the prompts
    refined: tuple[Windows, ...] = ()  # of growing means; the last is what the losses give
    settings: dict = dataclasses.field(default_factory=dict)  # what else the measurement depends on

    FIELDS: ClassVar = (
        "score",
        "recent",
        "model",
        "weights",
        "texts",
        "prompt_tokens",
        "refined",
        "settings",
    )

    def __post_init__(self):
        if not self.widths or list(self.widths) != sorted(set(self.widths)) or not _all(self.widths, int, least=1):
            raise ValueError("its widths are not ascending numbers of slots")
        _check_table(self.losses, "losses", len(self.widths))
        self._check_refined()

    def _check_refined(self) -> None:
        """Raises ValueError."""
        before = np.full(self.shape[0] * self.shape[1], LEAST)
        for table in self.refined if isinstance(self.refined, tuple) else (None,):
            _check_table(table, "refined windows")
            slots = np.array(table).ravel()
            if slots.dtype != np.int64 or slots.shape != before.shape or slots.sum() % slots.size:
                raise ValueError("its refined windows are not whole numbers of slots with a whole mean")
            if (slots < before).any():
                raise ValueError("its refined windows do not grow")
            before = slots

    def save(self, path: str | Path) -> None:
        """Write the plan, in one rename. Raises OSError."""
        fields = {"form": FORM} | {name: getattr(self, name) for name in (*self.FIELDS, "widths")}
        lines = [f"  {to_json(name)}: {to_json(value)},\n" for name, value in fields.items()]
        layers = ",\n".join(f"    {to_json(layer)}" for layer in self.losses)
        replace_file(Path(path), ["{\n", *lines, f'  "losses": [\n{layers}\n  ]\n', "}\n"])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.losses), len(self.losses[0])

    def check_model(self, config, weights: str | None = None) -> None:
        super().check_model(config)
        if None not in (self.weights, weights) and self.weights != weights[:HASH]:
            raise ValueError(
                f"{self._name}: measured on another model ({self.model}, weights {self.weights}; these are "
                f'{weights[:HASH]}); run scripts/calibrate.py on this model, or delete "weights" from the file to use '
                "it all the same"
            )

    def calibrated_on(self, requests: Iterable[Request]) -> int:
        return sum(request_fingerprint(request) in self.texts for request in requests)

    def _divide(self, mean: int) -> np.ndarray:
        heads = self.shape[0] * self.shape[1]
        lower, total = np.full(heads, min(LEAST, mean)), mean * heads
        for table in self.refined:
            upper = np.array(table).ravel()
            if total <= upper.sum():
                return lower + _apportioned(upper - lower, total - lower.sum())
            lower = upper
        least = min(UNIT, mean)
        owner, length = self._order
        taken = np.clip(total - least * heads - (np.cumsum(length) - length), 0, length)
        slots = np.full(heads, least, dtype=np.int64)
        np.add.at(slots, owner, taken)
        return slots

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """Whose slots are given out next, and how many: int64 [segments] each.

        It depends on no window, so that a larger window only goes further.
        """
        octaves = KNOTS_PER_OCTAVE * int(math.log2(MOST_SLOTS / UNIT))
        knots = UNIT * np.unique(np.round(2.0 ** (np.arange(octaves + 1) / KNOTS_PER_OCTAVE)).astype(np.int64))
        losses = np.array(self.losses, dtype=np.float64).reshape(-1, len(self.widths))
        owner, length, saved = [], [], []
        for head, curve in enumerate(_curves(losses, np.array(self.widths, dtype=np.float64), knots)):
            at = _convex(knots, curve)
            owner.append(np.full(len(at) - 1, head))
            length.append(np.diff(knots[at]))
            saved.append(-np.diff(curve[at]) / length[-1])
        order = np.argsort(-np.concatenate(saved), kind="stable")
        return np.concatenate(owner)[order], np.concatenate(length)[order]


def _apportioned(parts: np.ndarray, total: int, least: int = 0) -> np.ndarray:
    """Whole numbers in the ratios of `parts`, with a sum of `total` and each at least `least`: int64.

    By D'Hondt's method, so that none falls as the total grows.
    """

    def at(scale: float) -> np.ndarray:
        return np.maximum(np.floor(parts * scale), least).astype(np.int64)

    if not parts.any():
        return at(0.0)
    low, high = 0.0, (total + parts.size) / float(parts.sum())  # too few or just enough; enough or too many
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).sum() <= total else (low, middle)
    numbers = at(low)
    with np.errstate(divide="ignore"):
        next_at = (numbers + 1) / parts  # the scale at which each would grow
    numbers[np.argsort(next_at, kind="stable")[: total - numbers.sum()]] += 1
    return numbers


def request_fingerprint(request: Request) -> str:
    return fingerprint([request])[:HASH]


def own_texts(plans: Iterable[HeadBudgets], requests: list[Request]) -> Iterator[str]:
    """A warning for each plan that was measured on some of these requests."""
    for plan in plans:
        if seen := plan.calibrated_on(requests):
            yield (
                f"warning: {plan.path} was measured on {seen} of these {len(requests)} requests; a plan is no fair "
                "test on its own texts"
            )


def _curves(losses: np.ndarray, widths: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """Losses [heads, widths] at the knots: [heads, knots], never rising."""
    losses = np.minimum.accumulate(np.maximum(losses, NOISE), axis=1)
    x, at = np.log(widths), np.log(knots)
    curves = np.stack([np.exp(np.interp(at, x, np.log(of))) for of in losses])
    curves *= 1 + RISE * np.maximum(x[0] - at, 0)
    return curves * np.exp(-FALL * np.maximum(at - x[-1], 0))


def _convex(x: np.ndarray, y: np.ndarray) -> list[int]:
    """The corners of the greatest convex function below the points."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return corners


# Files


def _parsed(raw: bytes, path: Path) -> HeadBudgets:
    """Raises ValueError with the reason."""
    if len(raw) > LONGEST_LINE:
        raise ValueError(f"larger than {LONGEST_LINE >> 20} MiB")
    plan = json_object(raw)
    if plan.get("form", FORM) != FORM:
        raise ValueError(f"its form is {plan['form']!r:.20}, this version reads {FORM}")
    if "windows" in plan:
        return GivenBudgets(path=path, shares=_frozen(plan["windows"]))
    if missing := [name for name in ("widths", "losses") if name not in plan]:
        raise ValueError(f"it has no {missing[0]!r}")
    known = {name: _frozen(plan[name]) for name in MeasuredBudgets.FIELDS if plan.get(name) is not None}
    return MeasuredBudgets(path=path, widths=_frozen(plan["widths"]), losses=_frozen(plan["losses"]), **known)


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _all(values, kind, least: float) -> bool:
    return all(isinstance(of, kind) and not isinstance(of, bool) and least <= of < math.inf for of in values)


def _check_table(table, name: str, widths: int | None = None) -> None:
    """Raises ValueError unless a table is [layers][KV heads] above 0, or [layers][KV heads][widths] not below 0."""
    rows = list(table) if isinstance(table, tuple) else []
    if not rows or not all(isinstance(row, tuple) and row and len(row) == len(rows[0]) for row in rows):
        raise ValueError(f"its {name} are not a table of layers and KV heads")
    values = [value for row in rows for value in row]
    if widths is not None:
        if not all(isinstance(of, tuple) and len(of) == widths for of in values):
            raise ValueError(f"its {name} are not {widths} numbers for each KV head, one for each width")
        values = [value for of in values for value in of]
    if not _all(values, int | float, least=0) or (widths is None and 0 in values):
        raise ValueError(f"its {name} hold a value that is not a number {'of at least' if widths else 'above'} 0")
