"""Mean and its uncertainty. NaN and infinities, as of a run that diverged, come through without a warning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error s / sqrt(n), s with n - 1; no error (None) of a single value."""
    values_N = np.asarray(values, dtype=float)
    with np.errstate(invalid="ignore"):
        mean = float(values_N.mean())
        return mean, float(values_N.std(ddof=1)) / math.sqrt(len(values_N)) if len(values_N) > 1 else None


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean, and the ends of Student's interval, mean ± t_{n-1, (1+level)/2} s / sqrt(n); no ends of a single value."""
    from scipy.stats import t  # takes a second to import, and the report needs no interval

    mean, error = mean_and_error(values)
    if error is None:
        return mean, None, None
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * error
    return mean, mean - half, mean + half


def with_error(values: Sequence[float], digits: int = 2) -> str:
    """``mean ± standard error`` in words."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
