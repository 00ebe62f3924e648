"""Statistics on few numbers: correlations that may be undefined (NaN), means with an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from abc_plugin.report.statistics import t_interval

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval; n independent values."""

    mean: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec or '.3f'}} [{self.low:{spec or '.3f'}}, {self.high:{spec or '.3f'}}]"

    @property
    def sign(self) -> int:
        """1 where the whole interval lies above 0, -1 below, 0 where it holds 0."""
        return (self.low > 0) - (self.high < 0)


def intervals(table: pd.DataFrame, level: float = LEVEL) -> dict[Any, Interval | None]:
    """By column the mean over prompts (the index) of each prompt's mean, with Student's t interval over the prompts.

    mean ± t_{n-1, (1+level)/2} · s / sqrt(n)

    Completions of one prompt resemble each other, so that they count as one. NaN is left out (an undefined
    correlation); None where fewer than two prompts have a value. Not a bootstrap: of ten prompts at the level of 126
    heads (99.96 %) percentile and BCa intervals miss the mean in 2 to 3 % of samples.
    """
    means = table.groupby(level=0, sort=False).mean()
    columns = {name: column.dropna().to_numpy() for name, column in means.items()}
    return {
        name: Interval(*t_interval(values, level), len(values)) if len(values) > 1 else None
        for name, values in columns.items()
    }


def interval(values: pd.Series, level: float = LEVEL) -> Interval | None:
    """``intervals`` of one column."""
    return intervals(values.to_frame(0), level)[0]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Linear correlation of the ranks, ties at their mean rank.

    NaN where either is constant, or has under 3 values: of two it could only be 1 or -1.
    """
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
