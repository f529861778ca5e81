"""The cache's settings beside a checkpoint, in a file of their own: config.json stays the family's."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.hub import cached_file

from h2optimizer.gguf_files import is_gguf
from h2optimizer.utils.budgets import GivenBudgets, HeadBudgets, shape_fault
from h2optimizer.utils.requests import LONGEST_LINE, json_object
from h2optimizer.utils.results import SETTINGS, replace_file, to_json


def save_settings(h2o, folder: str | Path) -> None:
    """Write an H2OConfig, all fields of it, into a checkpoint's folder. Raises OSError."""
    lines = [f"  {to_json(name)}: {to_json(value, default=str)}" for name, value in dataclasses.asdict(h2o).items()]
    replace_file(Path(folder, SETTINGS), ["{\n", ",\n".join(lines), "\n}\n"])


class SettingsError(ValueError):
    """A file of settings cannot be used. The message is one line that names it, and the field."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field  # of H2OConfig, that does not go with the others


class HeadsError(ValueError):
    """Head budgets of another shape than the model's."""


def check_heads(h2o, config) -> None:
    """Raises HeadsError for head budgets of an H2OConfig that are not for a model of this transformers config."""
    if not h2o.head_windows.even and (fault := shape_fault(h2o.head_windows.index.shape, config)):
        raise HeadsError(f"head_budgets: {fault}")


@dataclass(frozen=True)
class SavedSettings:
    """The fields of an H2OConfig that a file beside a checkpoint holds."""

    path: Path
    fields: dict

    @staticmethod
    def find(name: str | Path, subfolder: str = "", **finding) -> SavedSettings | None:
        """Those of a checkpoint, given its folder, file or hub name; None if it has none.

        `subfolder` and `finding` are arguments of from_pretrained, those that say where files are.

        Raises: SettingsError if it does not hold a JSON object.
        """
        # os.path: pathlib raises an error for a name that no file can have
        folder = Path(name).parent if os.path.isfile(name) else Path(name)
        path = folder / (subfolder or "") / SETTINGS
        if is_gguf(name) and not os.path.exists(name):  # no name on the hub: loading reports that there is no such file
            return None
        if not os.path.isdir(folder):
            path = _on_hub(str(name), subfolder=subfolder or "", **finding)
        if path is None or not os.path.lexists(path):
            return None
        try:
            with path.open("rb") as file:
                raw = file.read(LONGEST_LINE + 1)
            if len(raw) > LONGEST_LINE:
                raise ValueError(f"larger than {LONGEST_LINE >> 20} MiB")
            return SavedSettings(path, json_object(raw))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise SettingsError(f"{path}: not settings of a cache ({reason}); correct or delete it") from None

    def config(self, kind: type, given: dict | None = None):
        """An H2OConfig, which is `kind`, of these fields; those `given` replace them.

        Raises: SettingsError for a bad field, or one that does not go with those given; the ValueError of H2OConfig for
            a bad one among those given.
        """
        given = given or {}
        names = [field.name for field in dataclasses.fields(kind)]
        if unknown := [name for name in self.fields if name not in names]:
            raise SettingsError(
                f"{self.path}: {unknown[0]!r:.60} is not a field of H2OConfig; delete it, or name one of "
                f"{', '.join(names)}"
            )
        values = self.fields | given
        plan = self.fields.get("head_budgets", "even")
        if isinstance(plan, str) and plan != "even" and "head_budgets" not in given:
            values["head_budgets"] = str(self.path.parent / plan)  # a file beside this one
        try:
            return kind(**values)
        except ValueError as error:
            message = str(error)
            field = re.match(r"\w*", message)[0]
            if field in given and not self._works(kind, given):
                raise
        raise SettingsError(f"{self.path}: {message}", field if field in names else None)

    @staticmethod
    def _works(kind: type, fields: dict) -> bool:
        try:
            kind(**fields)
        except ValueError:
            return False
        return True

    def budgets(self) -> HeadBudgets | None:
        """The saved head budgets, as a plan; None if they are even. Raises ValueError as `HeadBudgets.load`."""
        budgets = self.fields.get("head_budgets", "even")
        if budgets == "even":
            return None
        if isinstance(budgets, str):
            return HeadBudgets.load(self.path.parent / budgets)
        return GivenBudgets(path=self.path, shares=tuple(map(tuple, budgets)))


def _on_hub(name: str, **finding) -> Path | None:
    """The file of a hub name, or None: loading the checkpoint reports what is wrong with the name."""
    try:
        return Path(cached_file(name, SETTINGS, **finding))
    except (OSError, ValueError):
        return None
