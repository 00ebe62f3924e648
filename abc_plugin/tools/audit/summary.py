"""From completions to numbers with intervals: one table of statistics, applied to every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from abc_plugin.tools.audit.measure import RANDOM
from abc_plugin.tools.audit.shares import PLACES, shares
from abc_plugin.tools.audit.stats import Interval, difference, interval, pearson, spearman

Record = dict[str, Any]
Statistic = Callable[[Record, str], float | None]


def _credit(record: Record, method: str) -> np.ndarray:
    return np.array(record["credit"][method])


def _area(record: Record, method: str, way: str) -> float:
    """Mean height of a curve over the share removed, by the trapezoidal rule."""
    curve = record["curves"][method][way]
    return float(np.trapezoid(curve) / (len(curve) - 1))


def _place(name: str) -> Statistic:
    """The entry ``name`` of PLACES, of the sizes of credit; None where all of it is zero."""

    def statistic(record: Record, method: str) -> float | None:
        value = float(PLACES[name][1](shares(np.abs(_credit(record, method))), record))
        return None if np.isnan(value) else value

    return statistic


# name: (what it says, of one completion's record and a method)
STATISTICS: dict[str, tuple[str, Statistic]] = {
    "spearman": (
        "rank correlation of credit with the effect of each token's removal",
        lambda record, method: spearman(_credit(record, method), record["effect"]),
    ),
    "pearson": (
        "linear correlation of the same",
        lambda record, method: pearson(_credit(record, method), record["effect"]),
    ),
    "size": (
        "rank correlation of the sizes of credit and effect, whatever their signs",
        lambda record, method: spearman(np.abs(_credit(record, method)), np.abs(record["effect"])),
    ),
    "gradient": (
        "rank correlation of credit with gradient x input",
        lambda record, method: record["gradient"] and spearman(_credit(record, method), record["gradient"]),
    ),
    "gradient_pearson": (
        "linear correlation of the same",
        lambda record, method: record["gradient"] and pearson(_credit(record, method), record["gradient"]),
    ),
    "deletion": (
        "area under the deletion curve, highest credit removed first, score units; lower is more faithful",
        lambda record, method: _area(record, method, "highest"),
    ),
    "insertion": (
        "area under the insertion curve, highest credit put in first, score units; higher is more faithful",
        lambda record, method: _area(record, method, "lowest"),
    ),
    "separation": (
        "insertion minus deletion area, score units; 0 in expectation for an order that knows nothing",
        lambda record, method: _area(record, method, "lowest") - _area(record, method, "highest"),
    ),
    **{name: (f"{says}, of the credit's sizes", _place(name)) for name, (says, _) in PLACES.items()},
}
COMPARED = ("spearman", "size", "separation")  # also as paired differences to the random baseline


def values(records: list[Record], method: str, statistic: str) -> list[float | None]:
    """The statistic of each completion; None where it is not defined."""
    return [STATISTICS[statistic][1](record, method) for record in records]


def prompts(records: list[Record]) -> list[str]:
    """The groups that intervals are made over."""
    return [record["prompt"] for record in records]


def summarise(records: list[Record]) -> dict[str, dict[str, Interval | None]]:
    """Per method each statistic, and for those COMPARED ``<name>_over_random``, the paired difference to random."""
    groups, summary = prompts(records), {}
    for method in records[0]["credit"]:
        own = {name: values(records, method, name) for name in STATISTICS}
        estimates = {name: interval(column, groups) for name, column in own.items()}
        for name in COMPARED:
            over = difference(own[name], values(records, RANDOM, name))
            estimates[f"{name}_over_random"] = None if method == RANDOM else interval(over, groups)
        summary[method] = estimates
    return summary


def background(records: list[Record]) -> dict[str, Interval | None]:
    """What shares are to be held against: how many tokens are of each kind, and what the renormalising removed."""
    groups = prompts(records)
    columns = {
        "punctuation": [np.mean(record["punctuation"]) for record in records],
        "special": [np.mean(record["special"]) for record in records],
        "one token": [1 / len(record["tokens"]) for record in records],
        "attention on the prompt": [record["on_prompt"] for record in records],
        "attention on the first position": [record["on_first"] for record in records],
        "tokens": [len(record["tokens"]) for record in records],
        "reward": [record["reward"] for record in records],
        "score of the prompt alone": [record["empty"] for record in records],
    }
    return {name: interval(column, groups) for name, column in columns.items()}
