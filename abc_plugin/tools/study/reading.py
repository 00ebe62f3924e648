"""A study's table, read from a file and checked: one row per run and step, as anybody can make it.

Columns: ``method, seed, step, reward`` and, where there are any, ``kl``, ``value_loss``, ``beta``; every further
column is a setting.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from abc_plugin.errors import UserError
from abc_plugin.tools.study.table import BASELINE, CREDIT_SETTINGS, METRICS, Condition, Table, Value, of_credit, shown

NAME = "results.csv"  # in a study's directory
NEEDED = ("method", "seed", "step", "reward")


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
        lines = list(_jsonl(path) if path.suffix.lower() == ".jsonl" else _csv(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); it must be a text file in UTF-8") from None
    if not lines:
        raise UserError(f"{path} has no rows; it needs one per run and step")
    columns = list(dict.fromkeys(name for _, cells in lines for name in cells))
    if missing := [name for name in NEEDED if name not in columns]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(columns)}")
    # Sorted, so that neither the order of columns nor which line has which key of JSON matters.
    extra = sorted(name for name in columns if name not in (*NEEDED, *METRICS, "beta"))
    runs = _runs(path, lines, ["method", "beta", *extra])
    _check_settings(path, runs, extra)
    return _table(path, runs, ["method", "beta", *extra])


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        if twice := [name for name in dict.fromkeys(header) if header.count(name) > 1 or not name]:
            raise UserError(f"{path} line 1: column {twice[0]!r} is without a name or there twice; name each once")
        for cells in reader:
            if cells and len(cells) != len(header):
                raise UserError(
                    f"{path} line {reader.line_num}: {len(cells)} cells under {len(header)} columns; a row needs a "
                    "cell, perhaps empty, per column"
                )
            if cells:
                yield reader.line_num, dict(zip(header, cells, strict=True))


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path} line {number} is not JSON ({error}); write one object per line") from None
            if not isinstance(row, dict):
                raise UserError(f'{path} line {number} is no JSON object; write {{"method": …, "seed": …}}')
            yield number, row


Run = dict[int, dict[str, float | None]]  # step: metric: value
Key = tuple[tuple[Value, ...], int]  # values of the settings, seed


def _runs(path: Path, lines: list[tuple[int, dict[str, Any]]], names: list[str]) -> dict[Key, Run]:
    runs: dict[Key, Run] = {}
    for number, cells in lines:
        where = f"{path} line {number}"
        values = [_setting(where, name, cells.get(name)) for name in names]
        if values[0] is None:
            raise UserError(f"{where}: method is empty; name the method, {BASELINE} for the sparse reward")
        if values[0] == BASELINE:
            values = [None if name in CREDIT_SETTINGS else x for name, x in zip(names, values, strict=True)]
        seed, step = (_whole(where, name, cells.get(name)) for name in ("seed", "step"))
        run = runs.setdefault((tuple(values), seed), {})
        if step in run:
            raise UserError(
                f"{where}: step {step} of {_named(names, values, seed)} is there twice; keep one, or tell the two "
                "apart by a column of their setting"
            )
        run[step] = {name: _metric(where, name, cells.get(name)) for name in METRICS}
        _check_reward(where, run[step]["reward"], f"{_named(names, values, seed)}, step {step}")
    return runs


def _named(names: list[str], values: list[Value] | tuple[Value, ...], seed: int) -> str:
    given = [f"{name} {shown(value)}" for name, value in zip(names, values, strict=True) if value is not None]
    return f"{', '.join(given)}, seed {seed}"


def _number(value: Any) -> float | None:
    """A number, or None for what is no number; a bool is none."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _setting(where: str, name: str, value: Any) -> Value:
    value = value.strip() if isinstance(value, str) else value
    if value is None or value == "":
        return None
    if not isinstance(value, str | int | float):
        raise UserError(f"{where}: {name} {json.dumps(value)[:40]} is no single value; give a number or a text")
    number = _number(value)
    return str(value) if number is None or not math.isfinite(number) or name == "method" else number


def _whole(where: str, name: str, value: Any) -> int:
    number = _number(value)
    if number is None or not number.is_integer():
        raise UserError(f"{where}: {name} {value!r} is not a whole number; write 1, 2, …")
    return int(number)


def _metric(where: str, name: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    number = _number(value)
    if number is None:
        raise UserError(f"{where}: {name} {value!r} is not a number; leave it empty where it was not logged")
    return number


def _check_reward(where: str, reward: float | None, run: str) -> None:
    if reward is None or not math.isfinite(reward):
        said = "empty" if reward is None else reward
        raise UserError(f"{where}: reward of {run} is {said}; train that run again, or leave it out of the table")


def _check_settings(path: Path, runs: dict[Key, Run], extra: list[str]) -> None:
    """A further metric, taken for a setting, would cut every run to pieces of one step: refuse it by name."""
    for place, name in enumerate(extra, 2):
        merged: dict[Key, list[tuple[Value, Run]]] = {}
        for (values, seed), run in runs.items():
            merged.setdefault((values[:place] + values[place + 1 :], seed), []).append((values[place], run))
        for (_, seed), pieces in merged.items():
            steps = [step for _, run in pieces for step in run]
            if len(pieces) > 1 and len(set(steps)) == len(steps):
                raise UserError(
                    f"{path}: column {name!r} changes within a run (seed {seed}: {shown(pieces[0][0])}, "
                    f"{shown(pieces[1][0])}), so it is no setting; remove the column"
                )


def _table(path: Path, runs: dict[Key, Run], names: list[str]) -> Table:
    by_values: dict[tuple[Value, ...], dict[int, Run]] = {}
    for (values, seed), run in sorted(runs.items(), key=lambda item: item[0][1]):
        by_values.setdefault(values, {})[seed] = run
    _check_lengths(path, by_values, names)
    conditions, warnings = [], []
    for values in sorted(by_values, key=lambda values: _order(values, names)):
        seeds = by_values[values]
        steps = tuple(sorted(next(iter(seeds.values()))))
        curves = {}
        for metric in METRICS:
            found = [[seeds[seed][step][metric] for step in steps] for seed in seeds]
            gap = _gap(found, list(seeds), steps)
            if gap is None:
                curves[metric] = np.array(found, dtype=float)
            elif gap:
                where = f"{metric} of {_named(names, values, gap[0])} is {gap[2]} at step {gap[1]}"
                warnings.append(f"{where}: {metric} of this condition is left out.")
        conditions.append(Condition(dict(zip(names, values, strict=True)), tuple(seeds), steps, curves))
    varied = [name for place, name in enumerate(names) if len({values[place] for values in by_values}) > 1]
    return Table(conditions, varied, warnings)


def _order(values: tuple[Value, ...], names: list[str]) -> tuple:
    """Groups together, none first, then by method and its settings; numbers before texts."""
    keys = [(2, 0.0, value) if isinstance(value, str) else (value is not None, value or 0.0, "") for value in values]
    group = [key for key, name in zip(keys, names, strict=True) if not of_credit(name)]
    return group, values[0] != BASELINE, keys


def _gap(rows: list[list[float | None]], seeds: list[int], steps: tuple[int, ...]) -> tuple | None:
    """The first seed and step without a finite value, and what is there; None: all there; (): nothing at all."""
    if all(value is None for row in rows for value in row):
        return ()
    for seed, row in zip(seeds, rows, strict=True):
        for step, value in zip(steps, row, strict=True):
            if value is None or not math.isfinite(value):
                return seed, step, "missing" if value is None else value
    return None


def _check_lengths(path: Path, by_values: dict[tuple[Value, ...], dict[int, Run]], names: list[str]) -> None:
    """Runs that are compared, those of a group, must have the same steps."""
    first: dict[tuple, tuple[str, set[int]]] = {}
    for values, seeds in by_values.items():
        for seed, run in seeds.items():
            named = _named(names, values, seed)
            group = tuple(value for name, value in zip(names, values, strict=True) if not of_credit(name))
            other, steps = first.setdefault(group, (named, set(run)))
            if steps != set(run):
                odd = min(steps ^ set(run))
                raise UserError(
                    f"{path}: runs of unequal length: {named} has {len(run)} steps, {other} has {len(steps)} (step "
                    f"{odd} is in one only); finish the shorter run, or leave it out of the table"
                )
