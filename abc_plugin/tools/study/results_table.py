"""The table of a study: one row per run and step, as anybody can make it, checked and sorted into conditions.

Columns: ``method, seed, step, reward`` and, where there are any, ``kl`` and ``beta``; every further column is a
setting. Runs that share all settings but those of credit are a group, and are compared with its baseline.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from abc_plugin.errors import UserError
from abc_plugin.jsonl import read_jsonl

NAME = "results.csv"  # in a study's directory
NEEDED = ("method", "seed", "step", "reward")
METRICS = ("reward", "kl")
NO_SETTINGS = {*NEEDED, *METRICS, "value_loss"}
USUAL = "the usual"  # the name of the group that has of each setting the commonest value
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
SYMBOLS = {
    "beta": "β",
    "lambda": "λ",
    "algo.advantage.gamma": "γ",
    "critic.model_name_or_path": "critic",
    "reward.model_name_or_path": "reward model",
}

Value = float | str | None  # of a setting; None: empty, it means nothing to the method


@dataclass(frozen=True)
class Condition:
    """The runs of one method with one setting of its credit (`` β 0.8``) in one group (``length 32``)."""

    method: str
    credit: str
    group: str
    curves: dict[str, pd.DataFrame]  # metric: a row per seed, a column per step; absent where some are missing

    @property
    def label(self) -> str:
        """``abc β 0.8``."""
        return self.method + self.credit

    @property
    def name(self) -> str:
        """``abc β 0.8, length 32``."""
        return ", ".join(filter(None, [self.label, self.group]))


@dataclass(frozen=True)
class Table:
    """All conditions, a group's together and its baseline first.

    usual: what groups' names leave out, empty where they have all.  together: settings that vary one to one
    with another, by which alone they are named.  known_kl: whether KL is what abc-rlhf study logs.
    """

    conditions: list[Condition]
    usual: str
    together: str
    warnings: list[str]
    known_kl: bool

    def groups(self) -> dict[str, list[Condition]]:
        """Conditions that may be compared, by the name of what they share."""
        names = dict.fromkeys(condition.group for condition in self.conditions)
        return {name: [condition for condition in self.conditions if condition.group == name] for name in names}

    def partner(self, condition: Condition, method: str) -> Condition | None:
        """The condition of another method in the same group, but for the baseline of the same credit settings."""
        credit = "" if method == BASELINE else condition.credit
        found = (each for each in self.conditions if (each.method, each.credit) == (method, credit))
        return next((each for each in found if each.group == condition.group), None)


def locate(source: str | Path) -> Path:
    """The table of a study's directory, or the file itself. Raises UserError where there is none."""
    path = Path(source) / NAME if Path(source).is_dir() else Path(source)
    if not path.is_file() or path.suffix.lower() not in (".csv", ".jsonl"):
        wrong = "is neither .csv nor .jsonl" if path.is_file() else "does not exist"
        raise UserError(f"{path} {wrong}; give a directory that abc-rlhf study wrote, or a CSV or JSONL file")
    return path


def read(path: Path) -> Table:
    """The table in a file. Raises UserError, naming file, row or run, on anything that cannot be compared."""
    cells = _cells(path)
    if missing := [name for name in NEEDED if cells.empty or name not in cells]:
        raise UserError(f"{path} has no rows with {', '.join(missing)}; it has {len(cells)} with {list(cells)}")
    # Sorted, so that neither the order of columns nor which line has which key of JSON matters.
    settings = ["method", "beta", *sorted(set(cells) - NO_SETTINGS - {"beta"})]
    rows = pd.DataFrame({name: _parsed(path, cells, name) for name in (*NEEDED, "kl") if name in cells})
    for name in settings[1:]:
        values = [setting(cell) for cell in cells[name]] if name in cells else [None] * len(rows)
        rows[name] = pd.Series(values, dtype=object)
        if name in CREDIT_SETTINGS:
            rows[name] = rows[name].where(rows["method"] != BASELINE, None)
    outside = [name for name in settings[1:] if name not in CREDIT_SETTINGS]
    rows["condition"] = list(rows[settings].itertuples(index=False, name=None))
    rows["group"] = list(rows[outside].itertuples(index=False, name=None)) if outside else [()] * len(rows)
    _check(path, rows, settings)
    return _table(rows, settings, known_kl=path.name == NAME)


def _cells(path: Path) -> pd.DataFrame:
    """The file's cells as they are; None where there is none."""
    if path.suffix.lower() == ".jsonl":
        cells = pd.DataFrame([row for _, row in read_jsonl(path, "write one object per run and step")], dtype=object)
    else:
        try:
            options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "skipinitialspace": True}
            cells = pd.read_csv(path, **options)
            names = pd.read_csv(path, header=None, nrows=1, **options).iloc[0]
        except (OSError, ValueError) as error:  # of pandas' own errors all are ValueErrors
            raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); give a CSV in UTF-8") from None
        if names.duplicated().any():  # pandas would call the second another setting
            raise UserError(f"{path} has two columns {names[names.duplicated()].iloc[0]!r}; remove one")
        if not isinstance(cells.index, pd.RangeIndex):
            raise UserError(f"{path}: its rows have more cells than the header; name every column")
    return cells.astype(object).where(cells.notna() & (cells != ""), None)


def _parsed(path: Path, cells: pd.DataFrame, name: str) -> pd.Series:
    """A column of texts (method), whole numbers (seed, step), finite ones (reward), or such as may be missing (kl)."""
    column = cells[name]
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    kind, right = {
        "method": ("text", column.notna()),
        "reward": ("finite number", np.isfinite(numbers)),
        "kl": ("number", numbers.notna() | column.isna() | (column.astype(str).str.lower() == "nan")),
    }.get(name, ("whole number", numbers % 1 == 0))
    if not right.all():
        row = right.idxmin()
        raise UserError(f"{path} row {row + 1}: {name} {column[row]!r} is no {kind}; mend it, or leave its run out")
    return column.astype(str) if name == "method" else numbers.astype(float if name in METRICS else int)


def setting(cell: Any) -> Value:
    """A finite number, else the text."""
    try:
        return float(cell) if math.isfinite(float(cell)) else str(cell)
    except (TypeError, ValueError):
        return None if cell in (None, "") else str(cell)


def sort_key(value: Value) -> tuple:
    """Nothing, then numbers, then words."""
    return value is not None, isinstance(value, str), value or 0


def _check(path: Path, rows: pd.DataFrame, settings: list[str]) -> None:
    """Refuse rows that would be compared as what they are not."""
    if (twice := rows.duplicated(["condition", "seed", "step"])).any():
        row = twice.idxmax() + 1
        raise UserError(f"{path} row {row}: this step of this run is there twice; tell runs apart by their settings")
    for name in settings[2:]:  # a further metric, taken for a setting, would cut every run to pieces of one step
        run = [*(other for other in settings if other != name), "seed"]
        for _, same in rows.groupby(run, dropna=False, sort=False):
            if same[name].nunique(dropna=False) > 1 and same["step"].is_unique:
                raise UserError(f"{path}: column {name!r} changes within a run, so it is no setting; remove it")
    for _, group in rows.groupby("group", sort=False):
        steps, lengths = group["step"].nunique(), group.groupby(["condition", "seed"], sort=False).size()
        if lengths.min() < steps:
            condition, seed = lengths.idxmin()
            run = ", ".join(f"{name} {shown(value)}" for name, value in zip(settings, condition, strict=True))
            unequal = f"runs of unequal length: {run}, seed {seed} has {lengths.min()} of {steps} steps"
            raise UserError(f"{path}: {unequal}; finish it, or leave it out of the table")


def _table(rows: pd.DataFrame, settings: list[str], *, known_kl: bool) -> Table:
    found = sorted(rows.groupby("condition", sort=False), key=lambda item: _order(item[0], settings))
    values = {name: [condition[place] for condition, _ in found] for place, name in enumerate(settings)}
    varied = [name for name in settings[1:] if name == "beta" or len(set(values[name])) > 1]
    # By which conditions are equal in it; settings with the same pattern vary one to one.
    patterns = {name: tuple(map(values[name].index, values[name])) for name in varied if name not in CREDIT_SETTINGS}
    outside = {pattern: name for name, pattern in patterns.items()}
    together = [f"{symbol(name)} with {symbol(outside[of])}" for name, of in patterns.items() if outside[of] != name]
    # A study of many conditions, each apart from the rest in one setting, would else name all settings each time.
    usual = {name: Counter(values[name]).most_common(1)[0][0] for name in outside.values() if len(outside) > 2}
    short = {name: _short(values[name]) for name in varied}

    def named(names: Iterable[str], given: dict[str, Value], left_out: dict[str, Value]) -> str:
        parts = [name for name in names if given[name] != left_out.get(name)]
        return ", ".join(f"{symbol(name)} {short[name][given[name]]}" for name in parts)

    conditions, warnings = [], []
    for key, runs in found:
        given = dict(zip(settings, key, strict=True))
        credit = named([name for name in varied if name in CREDIT_SETTINGS], given, {})
        group = named(outside.values(), given, usual) or (USUAL if usual else "")
        logged = [metric for metric in METRICS if metric in runs]
        curves = {metric: runs.pivot(index="seed", columns="step", values=metric) for metric in logged}
        conditions.append(Condition(given["method"], f" {credit}" if credit else "", group, curves))
        if "kl" in curves and (fault := _kl_fault(curves["kl"])) and curves.pop("kl").notna().any(axis=None):
            warnings.append(f"{conditions[-1].name}: KL is {fault}, so it is left out.")
    conditions.sort(key=lambda condition: condition.group != USUAL)
    return Table(conditions, named(usual, usual, {}), ", ".join(together), warnings, known_kl)


def _kl_fault(curve: pd.DataFrame) -> str | None:
    """Why values are no KL; an estimate of a small one may be below 0 by noise."""
    if not np.isfinite(curve).all(axis=None):
        return "missing or infinite in some steps"
    low, high = curve.min(axis=None), curve.max(axis=None)
    return f"as low as {low:.3g}, which no divergence is" if low < -0.1 and low < -0.1 * high else None


def symbol(setting: str) -> str:
    """A setting's name in texts."""
    return SYMBOLS.get(setting, setting)


def shown(value: Value) -> str:
    """A setting as text: 0.8, 48, gpt2; – where it is empty."""
    return "–" if value is None else value if isinstance(value, str) else f"{value:.10g}"


def _short(values: list[Value]) -> dict[Value, str]:
    """Each as text; of several paths only the parts in which they differ, of a single one the last."""
    texts = sorted({value for value in values if isinstance(value, str)})
    if len(texts) == 1:
        return {value: shown(value).rstrip("/").rpartition("/")[2] or shown(value) for value in values}
    parts = [text.split("/") for text in texts]
    start, end = (len(os.path.commonprefix(each)) for each in (parts, [part[::-1] for part in parts]))
    middles = {text: "/".join(part[start : len(part) - end]) for text, part in zip(texts, parts, strict=True)}
    return {value: middles.get(value) or shown(value) for value in values}


def _order(values: tuple[Value, ...], settings: list[str]) -> tuple:
    """Groups together, none first, then by method and its settings; numbers before texts."""
    keys = [sort_key(value) for value in values]
    outside = [key for key, name in zip(keys[1:], settings[1:], strict=True) if name not in CREDIT_SETTINGS]
    return outside, values[0] != BASELINE, keys
