"""The table of a study: one row per run and step, as anybody can make it, checked and sorted into conditions.

Columns: ``method, seed, step, reward`` and, where there are any, ``kl``, ``value_loss``, ``beta``; every further
column is a setting. A condition is all settings (method, beta, further columns), a run a condition and a seed.
N seeds, T steps.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from abc_plugin.errors import UserError
from abc_plugin.report.jsonl import read_jsonl

NAME = "results.csv"  # in a study's directory
NEEDED = ("method", "seed", "step", "reward")
METRICS = ("reward", "kl", "value_loss")
BASELINE = "none"  # the method that the others are compared with
# Columns that say how a method spreads the reward: they mean nothing to the baseline, which spreads none.
CREDIT_SETTINGS = (
    "beta",
    "shaping.layer",
    "shaping.heads",
    "shaping.drop",
    "shaping.entropy_floor",
    "shaping.segment",
    "shaping.recovery",
)
SYMBOLS = {"beta": "β", "lambda": "λ"}

Value = float | str | None  # of a setting; None: empty, it means nothing to the method


@dataclass(frozen=True)
class Condition:
    """The runs of one condition; all have the same steps."""

    settings: dict[str, Value]
    seeds: tuple[int, ...]  # N, increasing
    steps: tuple[int, ...]  # T, increasing
    curves: dict[str, np.ndarray]  # metric: (N, T); a metric that is not wholly there is absent

    @property
    def method(self) -> str:
        return str(self.settings["method"])

    @property
    def group(self) -> tuple[tuple[str, Value], ...]:
        """All settings but the method and those of its credit: equal in a condition and in its baseline."""
        return tuple((name, value) for name, value in self.settings.items() if not is_credit(name))

    def only(self, seeds: tuple[int, ...]) -> dict[str, np.ndarray]:
        """The curves of some of its seeds."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return {metric: curves[rows] for metric, curves in self.curves.items()}


@dataclass(frozen=True)
class Table:
    """All conditions, a group's together and its baseline first; ``varied``: settings with several values."""

    conditions: list[Condition]
    varied: list[str]
    warnings: list[str]

    def label(self, condition: Condition, *, group: bool = True) -> str:
        """``abc β 0.8, λ 0.95``: method, beta, and the settings that vary; those of the group may be left out."""
        settings = condition.settings
        beta = "" if settings["beta"] is None else f" β {shown(settings['beta'])}"
        credit = self._named((name, settings[name]) for name in CREDIT_SETTINGS[1:] if name in settings)
        parts = [f"{condition.method}{beta}", credit, self.group_label(condition) if group else ""]
        return ", ".join(part for part in parts if part)

    def group_label(self, condition: Condition) -> str:
        """``λ 0.95, length 48``; empty where nothing but method and beta varies. What is ``usual`` is left out."""
        return self._named((name, value) for name, value in condition.group if self.usual.get(name) != value)

    @cached_property
    def usual(self) -> dict[str, Value]:
        """Of each setting outside the credit that varies and is never empty, its commonest value; none of at most two.

        A study of many conditions, each apart from the rest in one setting, would else name all settings each time.
        """
        names = [name for name in self.varied if not is_credit(name)]
        if len(names) <= 2:
            return {}
        counts = {name: Counter(condition.settings[name] for condition in self.conditions) for name in names}
        return {name: count.most_common(1)[0][0] for name, count in counts.items() if None not in count}

    @property
    def usual_label(self) -> str:
        """What labels leave out; empty where they have all."""
        return self._named(self.usual.items())

    def _named(self, settings: Iterable[tuple[str, Value]]) -> str:
        """``λ 0.95, length 48``: those that vary and have a value."""
        given = [(name, value) for name, value in settings if name in self.varied and value is not None]
        return ", ".join(f"{SYMBOLS.get(name, name)} {shown(value)}" for name, value in given)

    def groups(self) -> dict[tuple, list[Condition]]:
        """Conditions that may be compared, by what they share."""
        groups: dict[tuple, list[Condition]] = {}
        for condition in self.conditions:
            groups.setdefault(condition.group, []).append(condition)
        return groups

    def baseline(self, condition: Condition) -> Condition | None:
        """The condition of method none with the same settings but those of credit; None where there is none."""
        settings = {name: None if is_credit(name) else value for name, value in condition.settings.items()}
        return self._find(settings | {"method": BASELINE})

    def uniform(self, condition: Condition) -> Condition | None:
        """The condition of method uniform with all the same settings."""
        return self._find(condition.settings | {"method": "uniform"})

    def _find(self, settings: dict[str, Value]) -> Condition | None:
        return next((other for other in self.conditions if other.settings == settings), None)


def is_credit(name: str) -> bool:
    """Whether a column is the method or a setting of its credit, in which a condition and its baseline may differ."""
    return name == "method" or name in CREDIT_SETTINGS


def shown(value: Value) -> str:
    """A setting as text: 0.8, 48, gpt2; – where it is empty."""
    return "–" if value is None else value if isinstance(value, str) else f"{value:.10g}"


def locate(source: str | Path) -> Path:
    """The table of a study's directory, or the file itself.

    Raises UserError where there is nothing, the directory is no study's, or the file is neither CSV nor JSONL.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / NAME).is_file():
            inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
            raise UserError(f"{path} is no study: it has {inside}, but no {NAME}; give what abc-rlhf study wrote")
        return path / NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a study's directory, or a CSV or JSONL file")
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"{path} is neither .csv nor .jsonl; a table has the columns {', '.join(NEEDED)}, …")
    return path


def read(path: Path) -> Table:
    """The table in a file. Raises UserError, naming file, line or run, on anything that cannot be compared."""
    try:
        cells = _jsonl(path) if path.suffix.lower() == ".jsonl" else _csv(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); it must be a text file in UTF-8") from None
    if cells.empty:
        raise UserError(f"{path} has no rows; it needs one per run and step")
    if missing := [name for name in NEEDED if name not in cells]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(cells)}")
    # Sorted, so that neither the order of columns nor which line has which key of JSON matters.
    further = sorted(set(cells) - {*NEEDED, *METRICS, "beta"})
    settings = ["method", "beta", *further]
    rows = _parsed(path, cells, settings)
    _check_rows(path, rows, settings)
    _check_settings(path, rows, settings)
    _check_lengths(path, rows, settings)
    return _table(rows, settings)


def _csv(path: Path) -> pd.DataFrame:
    """Cells as text, indexed by line; not pandas' own reader, which fills up rows that are cut short."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        if twice := [name for name in header if header.count(name) > 1 or not name]:
            raise UserError(f"{path} line 1: column {twice[0]!r} is without a name or there twice; name each once")
        rows = {}
        for cells in filter(None, reader):
            if len(cells) != len(header):
                raise UserError(
                    f"{path} line {reader.line_num}: {len(cells)} cells under {len(header)} columns; a row needs a "
                    "cell, perhaps empty, per column"
                )
            rows[reader.line_num] = cells
    return pd.DataFrame.from_dict(rows, orient="index", columns=header, dtype=object)


def _jsonl(path: Path) -> pd.DataFrame:
    """Values as they are, indexed by line; None where a line has no such key."""
    rows = {int(where.rpartition(":")[2]): row for where, row in read_jsonl(path, "write one object per run and step")}
    names = dict.fromkeys(name for row in rows.values() for name in row)
    columns = {name: [row.get(name) for row in rows.values()] for name in names}
    return pd.DataFrame(columns, index=list(rows), dtype=object)


def _parsed(path: Path, cells: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """Settings, ``seed``, ``step`` and metrics (NaN where not logged), and the keys ``condition`` and ``group``."""
    parsers: dict[str, Callable[[Any], Any]] = dict.fromkeys(settings, _setting)
    parsers |= {"method": str, "seed": _whole, "step": _whole} | dict.fromkeys(METRICS, _number)
    rows = pd.DataFrame(index=cells.index, dtype=object)
    for name, parse in parsers.items():
        values = []
        for line, cell in cells[name].items() if name in cells else ((line, None) for line in cells.index):
            cell = cell.strip() if isinstance(cell, str) else cell
            try:
                values.append(None if cell in (None, "") and name not in NEEDED[1:3] else parse(cell))
            except (TypeError, ValueError, OverflowError):
                raise UserError(f"{path} line {line}: {name} {cell!r} {PROBLEMS[parse]}") from None
        rows[name] = pd.Series(values, index=cells.index, dtype=float if name in METRICS else object)
    if (empty := rows.index[rows["method"].isna()]).size:
        raise UserError(f"{path} line {empty[0]}: method is empty; name the method, {BASELINE} for the sparse reward")
    for name in set(CREDIT_SETTINGS) & set(settings):
        rows[name] = rows[name].where(rows["method"] != BASELINE, None)
    outside = [name for name in settings if not is_credit(name)]
    rows["condition"] = list(rows[settings].itertuples(index=False, name=None))
    rows["group"] = list(rows[outside].itertuples(index=False, name=None)) if outside else [()] * len(rows)
    return rows


def _number(cell: Any) -> float:
    if isinstance(cell, bool):
        raise TypeError
    return float(cell)


def _whole(cell: Any) -> int:
    number = _number(cell)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _setting(cell: Any) -> Value:
    """A finite number, else the text."""
    if not isinstance(cell, str | int | float):
        raise TypeError
    try:
        number = _number(cell)
    except (TypeError, ValueError, OverflowError):
        return str(cell)
    return number if math.isfinite(number) else str(cell)


PROBLEMS = {
    _number: "is not a number; leave it empty where it was not logged",
    _whole: "is not a whole number; write 1, 2, …",
    _setting: "is no single value; give a number or a text",
    str: "is no text",
}


def _named(row: pd.Series, settings: list[str]) -> str:
    """A row's run: ``method abc, beta 0.8, seed 3``."""
    values = zip(settings, row["condition"], strict=True)
    given = [f"{name} {shown(value)}" for name, value in values if value is not None]
    return f"{', '.join(given)}, seed {row['seed']}"


def _check_rows(path: Path, rows: pd.DataFrame, settings: list[str]) -> None:
    """Every row has a reward, and is the only one of its run and step."""
    for line, row in rows[~np.isfinite(rows["reward"])].head(1).iterrows():
        reward = "empty or nan" if math.isnan(row["reward"]) else row["reward"]
        raise UserError(
            f"{path} line {line}: reward of {_named(row, settings)}, step {row['step']} is {reward}; train that run "
            "again, or leave it out of the table"
        )
    for line, row in rows[rows.duplicated(["condition", "seed", "step"])].head(1).iterrows():
        raise UserError(
            f"{path} line {line}: step {row['step']} of {_named(row, settings)} is there twice; keep one, or tell the "
            "two apart by a column of their setting"
        )


def _check_settings(path: Path, rows: pd.DataFrame, settings: list[str]) -> None:
    """A further metric, taken for a setting, would cut every run to pieces of one step: refuse it by name."""
    for name in settings[2:]:
        same_but = [other for other in settings if other != name]
        for (*_, seed), run in rows.groupby([*same_but, "seed"], dropna=False, sort=False):
            values = run[name].unique()
            if len(values) > 1 and run["step"].is_unique:
                raise UserError(
                    f"{path}: column {name!r} changes within a run (seed {seed}: {shown(values[0])}, "
                    f"{shown(values[1])}), so it is no setting; remove the column"
                )


def _check_lengths(path: Path, rows: pd.DataFrame, settings: list[str]) -> None:
    """Runs that are compared, those of a group, must have the same steps."""
    for _, group in rows.groupby("group", sort=False):
        by_run = group.groupby(["condition", "seed"], sort=False)
        runs = [(_named(run.iloc[0], settings), set(run["step"])) for _, run in by_run]
        name, steps = runs[0]
        for other, others in runs:
            if others != steps:
                raise UserError(
                    f"{path}: runs of unequal length: {other} has {len(others)} steps, {name} has {len(steps)} (step "
                    f"{min(steps ^ others)} is in one only); finish the shorter run, or leave it out of the table"
                )


def _table(rows: pd.DataFrame, settings: list[str]) -> Table:
    conditions, warnings = [], []
    for values, runs in sorted(rows.groupby("condition", sort=False), key=lambda item: _order(item[0], settings)):
        curves = {}
        for metric in METRICS:
            curve = runs.pivot(index="seed", columns="step", values=metric)
            if np.isfinite(curve).all(axis=None):
                curves[metric] = curve.to_numpy()
            elif curve.notna().any(axis=None):
                row = runs[~np.isfinite(runs[metric])].sort_values(["seed", "step"]).iloc[0]
                value = "missing or nan" if math.isnan(row[metric]) else row[metric]
                where = f"{metric} of {_named(row, settings)} is {value} at step {row['step']}"
                warnings.append(f"{where}: {metric} of this condition is left out.")
        named = dict(zip(settings, values, strict=True))
        conditions.append(Condition(named, tuple(curve.index), tuple(curve.columns), curves))
    varied = [name for name in settings if len({condition.settings[name] for condition in conditions}) > 1]
    return Table(conditions, varied, warnings)


def _order(values: tuple[Value, ...], settings: list[str]) -> tuple:
    """Groups together, none first, then by method and its settings; numbers before texts."""
    keys = [(2, 0.0, value) if isinstance(value, str) else (value is not None, value or 0.0, "") for value in values]
    group = [key for key, name in zip(keys, settings, strict=True) if not is_credit(name)]
    return group, values[0] != BASELINE, keys
