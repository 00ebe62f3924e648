"""Several runs side by side: one row of numbers per label group (the seeds of one method)."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np

from abc_plugin.report.scalars import KL, REWARD, SECONDS, Curve, Run, by_group

WINDOW = 5  # steps in the trailing mean that smooths a curve
LAST = 10  # steps that count as the end of a run
BASELINE = "none"  # the group whose final reward the others are timed against

HEADER = (
    "label",
    "seeds",
    "steps",
    "reward over training",
    "KL over training",
    f"reward, last {LAST} steps",
    f"steps to {BASELINE}'s final reward",
    "reward / √KL at the end",
    "s per step",
)

FOOTNOTE = (
    "Over training: mean over all logged steps of a seed, then mean ± standard deviation (n − 1) over seeds. "
    "KL: nats per token, as the host logs it. "
    f"Last {LAST} steps: mean over a seed's last {LAST} logged steps (all, if fewer), then as before. "
    f"Steps to {BASELINE}'s final reward: first step at which the mean reward of the last {WINDOW} logged steps is at "
    f"least the mean reward of the last {LAST} steps of the seeds of {BASELINE}; median over seeds, a seed that never "
    "gets there counts as infinite. "
    f"Reward / √KL at the end: a seed's reward over the square root of its KL, both of its last {LAST} steps, then "
    "mean over seeds; – where the KL of a seed is not positive or was not logged. "
    "s per step: median over a seed's steps but the first, wall time as the host logs it, then as before."
)


def mean(values: list[float]) -> float:
    """Arithmetic mean; NaN and infinities of a run that diverged come through, without a warning."""
    with np.errstate(invalid="ignore"):
        return float(np.mean(values))


def deviation(values: list[float]) -> float:
    """Standard deviation with n - 1; NaN and infinities as in ``mean``."""
    with np.errstate(invalid="ignore"):
        return float(np.std(values, ddof=1))


def smooth(values: list[float]) -> list[float]:
    """Trailing mean over WINDOW values; the first WINDOW - 1 entries average what there is."""
    return [mean(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)]


def values_of(curve: Curve) -> list[float]:
    """A curve without its steps."""
    return [value for _, value in curve]


def last_mean(curve: Curve) -> float:
    """Mean over the last LAST logged steps, all of them if fewer."""
    return mean(values_of(curve)[-LAST:])


def steps_to_reach(curve: Curve, target: float) -> float:
    """First step whose mean over a full window of WINDOW logged steps is >= target; infinity if there is none."""
    smoothed = smooth(values_of(curve))
    reached = (curve[i][0] for i in range(WINDOW - 1, len(curve)) if smoothed[i] >= target)
    return next(reached, math.inf)


@dataclass(frozen=True)
class Row:
    """The numbers of one group; a list has one entry per seed. HEADER names the columns, FOOTNOTE defines them."""

    group: str
    steps: list[int]  # the last logged step
    reward: list[float]  # reward units, mean over training
    kl: list[float]  # nats per token, mean over training; shorter than the others where KL was not logged
    last_reward: list[float]  # reward units
    steps_to_baseline: list[float]  # infinity: not reached; empty without a group BASELINE
    reward_per_sqrt_kl: list[float]  # empty where a seed's KL at the end is not positive or not logged
    seconds: list[float]  # per step; the first, which warms up, is left out; empty where it was not logged

    def cells(self) -> list[str]:
        """The row as text, in the order of HEADER."""
        low, high = min(self.steps), max(self.steps)
        return [
            self.group,
            str(len(self.steps)),
            str(low) if low == high else f"{low}–{high}",
            _spread(self.reward),
            _spread(self.kl),
            _spread(self.last_reward),
            _median_steps(self.steps_to_baseline),
            f"{mean(self.reward_per_sqrt_kl):.3f}" if self.reward_per_sqrt_kl else "–",
            _spread(self.seconds),
        ]


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    around = f" ± {deviation(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{around}"


def _median_steps(steps: list[float]) -> str:
    """``23``, ``23 (1 of 3 not reached)`` or ``not reached (2 of 3)``."""
    if not steps:
        return "–"
    missed = f"{steps.count(math.inf)} of {len(steps)}"
    median = statistics.median(steps)
    if math.isinf(median):
        return f"not reached ({missed})"
    return f"{median:g} ({missed} not reached)" if math.inf in steps else f"{median:g}"


def summarise(runs: list[Run]) -> list[Row]:
    """One Row per group, in the order of the groups' first runs."""
    groups = by_group(runs)
    baseline = [last_mean(run.curve(REWARD)) for run in groups.get(BASELINE, [])]
    target = mean(baseline) if baseline else None
    return [_row(group, seeds, target) for group, seeds in groups.items()]


def _row(group: str, seeds: list[Run], target: float | None) -> Row:
    rewards = [run.curve(REWARD) for run in seeds]
    kls = [run.curve(KL) for run in seeds]
    usable = all(kl and last_mean(kl) > 0 for kl in kls)
    return Row(
        group=group,
        steps=[reward[-1][0] for reward in rewards],
        reward=[mean(values_of(reward)) for reward in rewards],
        kl=[mean(values_of(kl)) for kl in kls if kl],
        last_reward=[last_mean(reward) for reward in rewards],
        steps_to_baseline=[] if target is None else [steps_to_reach(reward, target) for reward in rewards],
        reward_per_sqrt_kl=[last_mean(run.curve(REWARD)) / math.sqrt(last_mean(run.curve(KL))) for run in seeds]
        if usable
        else [],
        seconds=[float(np.median(values_of(curve)[1:])) for run in seeds if len(curve := run.curve(SECONDS)) > 1],
    )
