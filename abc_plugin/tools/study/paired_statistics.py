"""Statistics on few seeds: intervals, paired differences, spread, correction for several comparisons; and their text.

Sources: scipy.stats; E. Pitman, "A note on normal correlation", Biometrika 31 (1939), and W. Morgan, ibid.; S. Holm,
"A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from abc_plugin.report import statistics

LEVEL = 0.95
SIGNIFICANT = 0.05
UPPER = (1 + LEVEL) / 2
NOTHING = "–"


@dataclass(frozen=True)
class Estimate:
    """A value and its interval at LEVEL; ends are None where there is none, infinite where it is open."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """``0.21 [0.05, 0.37]``, two significant digits of the half-width; without an interval the value alone."""
        if self.low is None:
            return number(self.value, 3)
        width = max((abs(end - self.value) for end in (self.low, self.high) if math.isfinite(end)), default=0.0)
        places = 1 if math.isinf(self.value) else 3
        if 0 < width < math.inf:
            places = min(6, max(0, 1 - math.floor(math.log10(width))))
        value, low, high = (number(each, places) for each in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def number(value: float, places: int = 3) -> str:
    """``−0.250``, ``∞``. What rounds to 0 keeps its sign, as an interval's end."""
    return f"{value + 0.0:.{places}f}".replace("-", "−").replace("inf", "∞")


@dataclass
class Effect:
    """An estimate of ``n`` pairs with the p-value of there being no effect, and the same after Holm's correction."""

    n: int
    estimate: Estimate
    p: float | None = None  # None: too few pairs
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < SIGNIFICANT

    def __str__(self) -> str:
        """``0.46 [0.31, 0.62], p 0.003``."""
        if self.p_holm is None:
            return str(self.estimate)
        p = "< 0.001" if self.p_holm < 0.001 else f"{self.p_holm:.{3 if self.p_holm < 0.1 else 2}f}"
        return f"{self.estimate}, p {p}"


def t_interval(values: Sequence[float]) -> Estimate:
    """mean ± t_{n-1, 0.975} s / sqrt(n), s with n - 1; no interval for one value."""
    return Estimate(*statistics.t_interval(values, LEVEL))


def paired(x: Sequence[float], y: Sequence[float]) -> Effect:
    """x - y of pairs: mean with t interval, and the paired t-test, from two pairs on."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    estimate, n = t_interval(x - y), len(x)
    if n < 2:
        return Effect(n, estimate)
    if _varies(x - y):
        return Effect(n, estimate, float(stats.ttest_rel(x, y).pvalue))
    same = math.isclose(estimate.value, 0.0, abs_tol=1e-12 * np.abs(y).max())  # the test would divide by the spread
    return Effect(n, estimate, 1.0 if same else 0.0)


def deviation_ratio(x: Sequence[float], y: Sequence[float]) -> Effect | None:
    """s_x / s_y of pairs (runs of the same seed), with Pitman and Morgan's test and interval.

    Var x = Var y exactly where x + y and x - y are uncorrelated, so p is that of their correlation (t, n - 2); the
    interval inverts it: (s_x/s_y) sqrt(K ∓ sqrt(K² - 1)), K = 1 + 2 (1 - r²) t²_{n-2, 0.975} / (n - 2), r the
    correlation of x and y. Where runs of one seed are alike, a test for independent samples (Brown and Forsythe's)
    would lose power from that. None below three pairs, or where a side does not vary.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    n = len(x)
    if n < 3 or not (_varies(x) and _varies(y)):
        return None
    if not (_varies(x - y) and _varies(x + y)):
        return Effect(n, Estimate(1.0, 1.0, 1.0), 1.0)  # the same but for a shift
    ratio, r = float(x.std(ddof=1) / y.std(ddof=1)), float(np.corrcoef(x, y)[0, 1])
    k = 1 + 2 * max(0.0, 1 - r * r) * float(stats.t.ppf(UPPER, n - 2)) ** 2 / (n - 2)
    low, high = (ratio * math.sqrt(k + sign * math.sqrt(k * k - 1)) for sign in (-1, 1))
    return Effect(n, Estimate(ratio, low, high), float(stats.pearsonr(x + y, x - y).pvalue))


def _varies(values: np.ndarray) -> bool:
    """Whether values differ by more than rounding does."""
    return float(np.ptp(values)) > 1e-12 * float(np.abs(values).max())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the k-th smallest of m times m - k + 1, at least those before it, at most 1."""
    p, order = np.asarray(p_values, dtype=float), np.argsort(p_values)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted.tolist()
