"""Statistics on few numbers: correlations that may be undefined, means with an interval."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata, t

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval at ``level``; n independent values."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def sign(self) -> int:
        """1 where the whole interval lies above 0, -1 below, 0 where it holds 0."""
        return (self.low > 0) - (self.high < 0)


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """sum (x - mean x)(y - mean y) / (|x - mean x| |y - mean y|); None where either is constant or has under 3 values.

    With two values it could only be 1 or -1.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # so that squares of tiny numbers do not vanish
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation of the ranks, ties at their mean rank; None as there."""
    return pearson(rankdata(x), rankdata(y))


def interval(values: Sequence[float | None], groups: Sequence[Hashable], level: float = LEVEL) -> Interval | None:
    """Mean over groups of each group's mean, with Student's t interval over the groups.

    mean ± t_{n-1, (1+level)/2} · s / sqrt(n)

    groups: completions of one prompt resemble each other, so that they count as one. None among the values is left
    out (an undefined correlation); None is returned where fewer than two groups have a value.
    """
    by_group: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        if value is not None:
            by_group.setdefault(group, []).append(value)
    means = np.array([np.mean(members) for members in by_group.values()])
    n = len(means)
    if n < 2:
        return None
    half = float(t.ppf((1 + level) / 2, n - 1) * means.std(ddof=1) / math.sqrt(n))
    return Interval(float(means.mean()), float(means.mean()) - half, float(means.mean()) + half, n)


def difference(x: Sequence[float | None], y: Sequence[float | None]) -> list[float | None]:
    """x - y, None where either is."""
    return [None if a is None or b is None else a - b for a, b in zip(x, y, strict=True)]


def needed(estimate: Interval, half_width: float) -> int:
    """How many values would make the 95 % interval's half as wide as that: (1.96 s / half_width)^2, rounded up."""
    spread = (estimate.high - estimate.low) / 2 / t.ppf((1 + LEVEL) / 2, estimate.n - 1) * math.sqrt(estimate.n)
    return math.ceil((1.96 * spread / half_width) ** 2)
