"""Mean and its uncertainty. NaN and infinities, as of a run that diverged, come through without a warning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    with np.errstate(invalid="ignore"):
        return float(np.asarray(values, dtype=float).mean())


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error s / sqrt(n), s with n - 1; no error (None) of a single value."""
    if len(values) < 2:
        return mean(values), None
    with np.errstate(invalid="ignore"):
        return mean(values), float(np.asarray(values, dtype=float).std(ddof=1)) / math.sqrt(len(values))


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean, and the ends of Student's interval, mean ± t_{n-1, (1+level)/2} s / sqrt(n); no ends of a single value."""
    from scipy.stats import t  # takes a second to import, and the report needs no interval

    centre, error = mean_and_error(values)
    if error is None:
        return centre, None, None
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * error
    return centre, centre - half, centre + half


def with_error(values: Sequence[float], sign: str = "") -> str:
    """``mean ± standard error`` in words; with ``sign`` "+" also a positive mean has one."""
    centre, error = mean_and_error(values)
    return f"{centre:{sign}.2f}" + ("" if error is None else f" ± {error:.2f}")
