"""What is read off whole curves: steps to most of the baseline's rise, and reward at equal KL.

Dimensions: N seeds, T steps, B resamples of the seeds.

Sources: T. Hesterberg, "What teachers should know about the bootstrap", Am. Statistician 69 (2015), for the widened
percentiles; the paper's section 5.3 for steps, its figure 5 for reward against KL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from abc_plugin.tools.study.paired_statistics import UPPER, Estimate, t_interval

WINDOW = 5  # steps of the centred mean that smooths a curve
LAST = 10  # steps that count as the end of a run
SHARE = 0.9  # of the baseline's rise, from its first step to the mean of its last LAST steps
RESAMPLES = 10_000
FEWEST = 5  # seeds for a bootstrap interval: of 3 seeds' intervals only about 75 % held the truth in simulations
TOP = 0.25  # of the range of KL that two runs share: where their rewards are compared


def centred(curve_T: np.ndarray) -> np.ndarray:
    """Mean over the WINDOW steps around each, along the last axis; near the ends over 3, then 1.

    As many before as after, so that a straight line stays itself: a trailing mean delays every curve by the same
    steps, which hides ratios of steps, and a mean cut off at the start begins too high.
    """
    length = curve_T.shape[-1]
    sums = np.insert(np.cumsum(curve_T, axis=-1), 0, 0.0, axis=-1)
    at = np.arange(length)
    reach = np.minimum(np.minimum(at, length - 1 - at), WINDOW // 2)
    return (sums[..., at + reach + 1] - sums[..., at - reach]) / (2 * reach + 1)


def crossing(curve_BT: np.ndarray, steps_T: np.ndarray, target_B: np.ndarray) -> np.ndarray:
    """(B,): where the smoothed curve first reaches the target, linear between steps; infinite where it never does."""
    smooth_BT = centred(curve_BT)
    reached_BT = smooth_BT >= target_B[:, None]
    at_B, row_B = reached_BT.argmax(1), np.arange(len(smooth_BT))
    before_B = np.maximum(at_B - 1, 0)
    low_B, rise_B = smooth_BT[row_B, before_B], smooth_BT[row_B, at_B] - smooth_BT[row_B, before_B]
    share_B = np.divide(target_B - low_B, rise_B, out=np.zeros_like(rise_B), where=rise_B > 0)
    crossed_B = steps_T[before_B] + share_B * (steps_T[at_B] - steps_T[before_B])
    return np.where(reached_BT.any(1), crossed_B, math.inf)


@dataclass(frozen=True)
class Steps:
    """Steps to SHARE of the baseline's rise; infinite where it is not reached."""

    target: float
    steps: Estimate
    baseline_steps: Estimate
    ratio: Estimate  # steps over baseline_steps


def change(curve_NT: np.ndarray, *, late: bool = False) -> Estimate:
    """Mean of the last LAST steps minus the first step; ``late``: within the last LAST, second half minus first."""
    last_NT = curve_NT[:, -LAST:]
    half = max(1, last_NT.shape[1] // 2)
    ends_N, starts_N = (last_NT[:, -half:], last_NT[:, :half]) if late else (last_NT, curve_NT[:, :1])
    return t_interval(ends_N.mean(1) - starts_N.mean(1))


def rises(change: Estimate) -> bool:
    """Whether a change is one upwards, by its interval (by value for one seed)."""
    return (change.value if change.low is None else change.low) > 0


def steps_to_rise(curves_NT: np.ndarray, baseline_NT: np.ndarray, steps_T: np.ndarray) -> Steps | None:
    """Step at which the mean curve over seeds, smoothed, reaches start + SHARE (end - start) of the baseline.

    start: the baseline's first step, where no policy has been updated; end: its last LAST steps; both means over
    seeds. The way from the start is taken, since 90 % of a reward means nothing where rewards may be negative. The
    mean curve is read, since a single seed's crosses early by noise. Rows of both are the same seeds, which are
    resampled together, target included, with RESAMPLES fixed draws. None where no rise of the baseline is established.
    """
    if not rises(change(baseline_NT)):
        return None
    n = len(curves_NT)
    draws = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=RESAMPLES)
    weights_BN = np.concatenate([np.full((1, n), 1 / n), draws / n])  # the seeds themselves, then resamples
    base_BT, curve_BT = weights_BN @ baseline_NT, weights_BN @ curves_NT
    start_B, end_B = base_BT[:, 0], base_BT[:, -LAST:].mean(1)
    target_B = start_B + SHARE * (end_B - start_B)
    ours_B, theirs_B = (crossing(each_BT, steps_T, target_B) for each_BT in (curve_BT, base_BT))
    with np.errstate(invalid="ignore"):
        ratio_B = np.nan_to_num(ours_B / theirs_B, nan=math.inf, posinf=math.inf)  # NaN: neither reaches it
    return Steps(float(target_B[0]), *(_bootstrap(values_B, n) for values_B in (ours_B, theirs_B, ratio_B)))


def _bootstrap(values_B: np.ndarray, n: int) -> Estimate:
    """The first value with percentiles of the rest, widened for n seeds: Φ(± sqrt(n / (n-1)) t_{n-1, 0.975}).

    Plain percentiles take n seeds' spread, with n in the denominator and normal tails, for the truth: too narrow. No
    interval of fewer than FEWEST seeds.
    """
    value = float(values_B[0])
    if n < FEWEST:
        return Estimate(value)
    tail = float(stats.norm.sf(math.sqrt(n / (n - 1)) * stats.t.ppf(UPPER, n - 1)))
    ordered = np.sort(values_B[1:])  # not scipy's bootstrap, whose interpolation between infinite values is NaN
    rank = min(int(tail * len(ordered)), len(ordered) - 1)
    return Estimate(value, float(ordered[rank]), float(ordered[-1 - rank]))


def frontier(kl_T: np.ndarray, reward_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed KL and reward at the steps at which KL is larger than ever before: reward as a function of KL."""
    kl_T, reward_T = centred(kl_T), centred(reward_T)
    keep_T = kl_T > np.concatenate([[-math.inf], np.maximum.accumulate(kl_T)[:-1]])
    return kl_T[keep_T], reward_T[keep_T]


def at_equal_kl(
    kl_T: np.ndarray, reward_T: np.ndarray, base_kl_T: np.ndarray, base_reward_T: np.ndarray
) -> tuple[float, float, float, float] | None:
    """Mean of each run's reward as a function of KL (``frontier``) over KL from low to high; then low and high.

    high: the largest KL that both reach; low: TOP of the range from the first KL that both have, below it. Not the
    whole range: where KL rises fast at first, its first steps are few and smoothed flat, and a slower run of the same
    frontier would seem better. Not the point ``high`` itself, which is noisier. None where the runs share no KL.
    """
    (kl, reward), (base_kl, base_reward) = frontier(kl_T, reward_T), frontier(base_kl_T, base_reward_T)
    first, high = max(kl[0], base_kl[0]), min(kl[-1], base_kl[-1])
    if high <= first:
        return None
    low = high - TOP * (high - first)
    grid = np.linspace(low, high, 65)
    curves = ((kl, reward), (base_kl, base_reward))
    means = (float(np.trapezoid(np.interp(grid, x, y), grid) / (high - low)) for x, y in curves)
    return *means, float(low), float(high)
