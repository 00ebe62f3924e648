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
POWER = 0.8
UPPER = (1 + LEVEL) / 2
NOTHING = "–"


@dataclass(frozen=True)
class Estimate:
    """A value and its interval at LEVEL; ends are None where there is none, infinite where it is open."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def sign(self) -> int:
        """1 where the interval lies above 0, -1 below, 0 where it holds 0 or there is none."""
        return 0 if self.low is None else (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        """``0.21 [0.05, 0.37]``; without an interval the value alone."""
        return number(self.value, self._decimals) + (f" {self.interval}" if self.low is not None else "")

    def __abs__(self) -> Estimate:
        """A difference without its sign: of −0.21 [−0.37, −0.05] 0.21 [0.05, 0.37]."""
        if self.value >= 0:
            return self
        return Estimate(-self.value) if self.low is None else Estimate(-self.value, -self.high, -self.low)

    @property
    def interval(self) -> str:
        """``[0.05, 0.37]``."""
        if self.low is None:
            return NOTHING
        return f"[{number(self.low, self._decimals)}, {number(self.high, self._decimals)}]"

    @property
    def _decimals(self) -> int:
        if self.low is None or not math.isfinite(self.value):
            return 3 if self.low is None else 1
        return decimals(max((abs(end - self.value) for end in (self.low, self.high) if math.isfinite(end)), default=0))


def number(value: float | None, places: int = 3) -> str:
    """``−0.250``; – for None, ∞ for infinity. What rounds to 0 keeps its sign, as an interval's end."""
    if value is None:
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value + 0.0:.{places}f}".replace("-", "−")


def decimals(width: float) -> int:
    """So that ``width`` has two significant digits; 3 where it is nothing to go by."""
    return 3 if not math.isfinite(width) or width <= 0 else min(6, max(0, 1 - math.floor(math.log10(width))))


def p_text(p: float | None) -> str:
    """``0.037``, ``< 0.001``."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.{3 if p < 0.1 else 2}f}"


@dataclass(frozen=True)
class Mean:
    """Of a number per run: t interval, and the half-width of ± 2 standard errors, as in the paper's Table 1."""

    estimate: Estimate
    two_errors: float | None

    def __str__(self) -> str:
        """``3.90 ± 0.18``."""
        value, half = self.estimate.value, self.two_errors
        return number(value) if half is None else f"{number(value, decimals(half))} ± {number(half, decimals(half))}"


def mean(values: Sequence[float]) -> Mean:
    """The mean with t_interval and 2 s / sqrt(n), which is None for one value."""
    _, error = statistics.mean_and_error(values)
    return Mean(t_interval(values), None if error is None else 2 * error)


def t_interval(values: Sequence[float]) -> Estimate:
    """mean ± t_{n-1, 0.975} s / sqrt(n), s with n - 1; no interval for one value."""
    return Estimate(*statistics.t_interval(values, LEVEL))


def coverage_of_two_errors(n: int) -> float:
    """P(|t_{n-1}| < 2): how often mean ± 2 standard errors holds the truth for normal values."""
    return float(1 - 2 * stats.t.sf(2.0, n - 1))


@dataclass(frozen=True)
class Ratio:
    """Of two standard deviations, with the p-value of their equality; p is None where it has no test."""

    ratio: Estimate
    p: float | None
    p_holm: float | None = None


def deviation_ratio(x: Sequence[float], y: Sequence[float]) -> Ratio | None:
    """s_x / s_y of pairs (runs of the same seed), with Pitman and Morgan's test and interval.

    Var x = Var y exactly where x + y and x - y are uncorrelated, so p is that of their correlation (t, n - 2); the
    interval inverts it: (s_x/s_y) sqrt(K ∓ sqrt(K² - 1)), K = 1 + 2 (1 - r²) t²_{n-2, 0.975} / (n - 2), r the
    correlation of x and y. Where runs of one seed are alike, a test for independent samples (Brown and Forsythe's)
    would lose power from that. None where fewer than two pairs or s_y = 0; no test below three pairs or where s_x = 0.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    n = len(x)
    if n < 2 or not _varies(y):
        return None
    ratio = float(x.std(ddof=1) / y.std(ddof=1))
    if n < 3 or not _varies(x):
        return Ratio(Estimate(ratio), None)
    if not (_varies(x - y) and _varies(x + y)):
        return Ratio(Estimate(ratio, ratio, ratio), 1.0)  # the same but for a shift
    p = float(stats.pearsonr(x + y, x - y).pvalue)
    r = float(np.corrcoef(x, y)[0, 1])
    k = 1 + 2 * max(0.0, 1 - r * r) * float(stats.t.ppf(UPPER, n - 2)) ** 2 / (n - 2)
    root = math.sqrt(k * k - 1)
    return Ratio(Estimate(ratio, ratio * math.sqrt(k - root), ratio * math.sqrt(k + root)), p)


@dataclass(frozen=True)
class Paired:
    """Differences of pairs; no test and no power below two pairs."""

    n: int
    difference: Estimate
    detectable: float | None = None  # the true difference that POWER of such studies would see, before correction
    p: float | None = None  # of the paired t-test
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        """Whether a difference is seen: p after Holm's correction is under SIGNIFICANT."""
        return self.p_holm is not None and self.p_holm < SIGNIFICANT


def paired(x: Sequence[float], y: Sequence[float]) -> Paired:
    """x - y of pairs: mean with t interval, paired t-test, and (t_{n-1, 0.975} + t_{n-1, POWER}) s / sqrt(n)."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    difference, n = x - y, len(x)
    estimate = t_interval(difference)
    if n < 2:
        return Paired(n, estimate)
    detectable = float(stats.t.ppf([UPPER, POWER], n - 1).sum() * difference.std(ddof=1) / math.sqrt(n))
    if _varies(difference):
        return Paired(n, estimate, detectable, float(stats.ttest_rel(x, y).pvalue))
    same = math.isclose(estimate.value, 0.0, abs_tol=1e-12 * np.abs(y).max())  # the test would divide by the spread
    return Paired(n, estimate, detectable, 1.0 if same else 0.0)


def _varies(values: np.ndarray) -> bool:
    """Whether values differ by more than rounding does."""
    return float(np.ptp(values)) > 1e-12 * float(np.abs(values).max())


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values: the k-th smallest of m times m - k + 1, at least those before it, at most 1.

    None (no test) stays None and does not count.
    """
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, index) in enumerate(tested):
        least = adjusted[index] = max(least, min(1.0, (len(tested) - rank) * p))
    return adjusted
