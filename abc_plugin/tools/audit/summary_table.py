"""From completions to numbers with intervals: one table of statistics, for every method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from abc_plugin.tools.audit.correlations import LEVEL, Interval, intervals, spearman

Record = dict[str, Any]  # of one completion, as ``completion_measures`` writes it
Tables = dict[str, pd.DataFrame]  # by method: a line per completion, its prompt as the index, a column per statistic
Estimates = dict[str, Interval | None]  # by statistic
Summary = dict[str, Estimates]  # by method

RANDOM, RECENCY, LEAVE_ONE_OUT = "random", "recency", "leave_one_out"
STATISTICS = {
    "spearman": "rank correlation of credit with the effect of each token's removal",
    "size": "rank correlation of the sizes of credit and effect, whatever their signs",
    "deletion": "area under the deletion curve, highest credit removed first, score units; lower is more faithful",
    "insertion": "area under the insertion curve, highest credit put in first, score units; higher is more faithful",
    "separation": "insertion minus deletion area, score units; 0 in expectation for an order that knows nothing",
}


def statistics(record: Record, method: str) -> dict[str, float]:
    """STATISTICS of one completion's credit by ``method``; NaN where not defined."""
    credit, effect = np.array(record["credit"][method]), np.array(record["effect"])
    # Mean height of a curve over the share removed, by the trapezoidal rule.
    area = {way: float(np.trapezoid(curve)) / (len(curve) - 1) for way, curve in record["curves"][method].items()}
    return {
        "spearman": spearman(credit, effect),
        "size": spearman(np.abs(credit), np.abs(effect)),
        "deletion": area["highest"],
        "insertion": area["lowest"],
        "separation": area["lowest"] - area["highest"],
    }


def prompts(records: list[Record]) -> pd.Index:
    """What intervals are made over: completions of one prompt count as one."""
    return pd.Index([record["prompt"] for record in records])


def tabulate(records: list[Record]) -> Tables:
    """The statistics of every method."""
    return {
        method: pd.DataFrame([statistics(record, method) for record in records], prompts(records))
        for method in records[0]["credit"]
    }


def gain(tables: Tables, method: str, other: str, names: Iterable[str], level: float = LEVEL) -> Estimates:
    """The paired differences of two methods in these statistics."""
    return intervals((tables[method] - tables[other])[list(names)], level)


def summarise(tables: Tables) -> Summary:
    """Per method each statistic."""
    return {method: intervals(table) for method, table in tables.items()}
