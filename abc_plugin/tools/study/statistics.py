"""Statistics on few seeds: intervals, paired differences, spread, and correction for several comparisons.

Sources: scipy.stats; E. Pitman, "A note on normal correlation", Biometrika 31 (1939), and W. Morgan, ibid.; S. Holm,
"A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
SIGNIFICANT = 0.05
UPPER = (1 + LEVEL) / 2


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


def t_interval(values: Sequence[float]) -> Estimate:
    """mean ± t_{n-1, 0.975} s / sqrt(n), s with n - 1; no interval for one value."""
    values = np.asarray(values, dtype=float)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Estimate(mean)
    half = float(stats.t.ppf(UPPER, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half)


def two_errors(values: Sequence[float]) -> float | None:
    """2 s / sqrt(n), the half-width of the paper's Table 1; None for one value."""
    return None if len(values) < 2 else float(2 * np.std(values, ddof=1) / math.sqrt(len(values)))


def coverage_of_two_errors(n: int) -> float:
    """P(|t_{n-1}| < 2): how often mean ± 2 standard errors holds the truth for normal values."""
    return float(1 - 2 * stats.t.sf(2.0, n - 1))


def deviation(values: Sequence[float]) -> Estimate | None:
    """Standard deviation s with n - 1 and its interval s sqrt((n-1) / chi2_{n-1, q}), q = 0.975 and 0.025.

    None for one value. Exact for normal values, too narrow for heavy tails.
    """
    n = len(values)
    if n < 2:
        return None
    s = float(np.std(values, ddof=1))
    ends = (s * math.sqrt((n - 1) / stats.chi2.ppf(q, n - 1)) for q in (UPPER, 1 - UPPER))
    return Estimate(s, *map(float, ends))


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
    """Differences of pairs. p-values are None below two pairs; d_z also where all differences are equal."""

    n: int
    difference: Estimate
    d_z: float | None  # Cohen's: mean over standard deviation of the differences
    p_t: float | None
    p_wilcoxon: float | None
    p_t_holm: float | None = None
    p_wilcoxon_holm: float | None = None


def paired(x: Sequence[float], y: Sequence[float]) -> Paired:
    """x - y of pairs: mean with t interval, paired t-test, Wilcoxon's signed-rank test, Cohen's d_z."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    difference, n = x - y, len(x)
    estimate = t_interval(difference)
    if n < 2:
        return Paired(n, estimate, None, None, None)
    if not _varies(difference):  # the tests divide by the spread
        p = 1.0 if math.isclose(estimate.value, 0.0, abs_tol=1e-12 * np.abs(y).max()) else 0.0
        return Paired(n, estimate, None, p, _wilcoxon(difference))
    d_z = estimate.value / float(difference.std(ddof=1))
    return Paired(n, estimate, d_z, float(stats.ttest_rel(x, y).pvalue), _wilcoxon(difference))


def _wilcoxon(difference: np.ndarray) -> float:
    return 1.0 if not difference.any() else float(stats.wilcoxon(difference).pvalue)


def _varies(values: np.ndarray) -> bool:
    """Whether values differ by more than rounding does."""
    return float(np.ptp(values)) > 1e-12 * float(np.abs(values).max())


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values: the k-th smallest of m times m - k + 1, at least those before it, at most 1.

    None (no test) stays None and does not count.
    """
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, place) in enumerate(tested):
        least = adjusted[place] = max(least, min(1.0, (len(tested) - rank) * p))
    return adjusted
