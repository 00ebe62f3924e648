"""A study's numbers: every condition against its group's baseline, and methods of attention against uniform."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from abc_plugin.tools.study.learning_curves import LAST, SHARE, Steps, at_equal_kl, change, rises, steps_to_rise
from abc_plugin.tools.study.paired_statistics import Effect, deviation_ratio, holm, paired
from abc_plugin.tools.study.results_table import BASELINE, Condition, Table

# What is compared, and its name in texts; all but the last are differences.
MEASURES = {
    "reward": "reward over training",
    "reward_last": f"reward of the last {LAST} steps",
    "equal_kl": "reward at equal KL",
    "kl": "KL over training",
    "kl_last": f"KL of the last {LAST} steps",
    "spread": "ratio of standard deviations over seeds",
}
ATTENTION = "abc"  # with it the names of the methods begin that the paper's claims are about: abc, abc_d, abc_signed …
USUAL_BASELINES = ("rlhf", "ppo", "sparse", "baseline", "vanilla")  # what others call the sparse reward
YES, NO, OPPOSITE, OPEN = "seen", "not seen", "the opposite seen", "undecided"
# The paper's claims: measure, and the way that it must differ.
CLAIMS = {
    "higher reward over training (Table 1)": ("reward", 1),
    f"at most half the steps to {100 * SHARE:.0f} % of the baseline's rise (section 5.3)": ("steps", -1),
    "less variance across seeds (section 5.3)": ("spread", -1),
    "lower KL over training (section 5.5)": ("kl", -1),
    "higher reward at equal KL (section 5.5)": ("equal_kl", 1),
}


@dataclass
class Comparison:
    """A condition against another on the seeds that both have; measures that were not logged are absent."""

    condition: Condition
    other: Condition
    seeds: list[int]
    tests: dict[str, Effect] = field(default_factory=dict)
    steps: Steps | None = None  # None: no rise of the baseline is established, or the other is none
    shared_kl: tuple[float, float] | None = None  # from and to, means over the pairs that share some

    @property
    def with_baseline(self) -> bool:
        return self.other.method == BASELINE

    def claims(self) -> dict[str, tuple[str, str]]:
        """An outcome per claim of CLAIMS, and the number behind it."""
        return {claim: self._judge(measure, way) for claim, (measure, way) in CLAIMS.items()}

    def _judge(self, measure: str, way: int) -> tuple[str, str]:
        if measure == "steps":
            return self._half_the_steps()
        test = self.tests.get(measure)
        if test is None and measure in ("kl", "equal_kl"):
            return OPEN, "no KL in common" if "kl" in self.tests else "KL was not logged, or left out"
        if test is None or test.p_holm is None:
            return OPEN, "no test of so few seeds"
        above = test.estimate.value > (measure == "spread")
        return ((YES if above == (way > 0) else OPPOSITE) if test.significant else NO), str(test.estimate)

    def _half_the_steps(self) -> tuple[str, str]:
        if self.steps is None:
            return OPEN, f"no rise of {self.other.method} is established"
        ratio = self.steps.ratio
        if rises(change(self.other.curves["reward"].to_numpy(), late=True)):
            return OPEN, f"{ratio} of {self.other.method}'s, which still rises"
        if ratio.low is None or ratio.low <= 0.5 < ratio.high:
            return OPEN, str(ratio)
        return (YES if ratio.high <= 0.5 else OPPOSITE if ratio.low > 1 else NO), str(ratio)


@dataclass(frozen=True)
class Analysis:
    """All numbers of a report."""

    table: Table
    comparisons: list[Comparison]  # with their baselines first, then with uniform
    warnings: list[str]

    def headline(self) -> str:
        """How many comparisons with the baseline see what, in reward over training."""
        tests = [each.tests["reward"] for each in self.comparisons if each.with_baseline and len(each.seeds) > 1]
        if not any(each.method == BASELINE for each in self.table.conditions):
            return f"No method is called {BASELINE}, so nothing is compared with a baseline."
        if not tests:
            return f"No comparison with {BASELINE} has two paired seeds, so nothing is tested."
        ways = Counter("higher" if test.estimate.value > 0 else "lower" for test in tests if test.significant)
        return (
            f"Reward over training against {BASELINE}, of {len(tests)} comparison{'s' * (len(tests) > 1)}: higher in "
            f"{ways['higher']}, lower in {ways['lower']}, no difference seen in {len(tests) - ways.total()}."
        )


def per_run(curves: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row per seed: mean over all steps and over the last LAST of each metric that was logged."""
    last = {f"{metric}_last": curve.iloc[:, -LAST:] for metric, curve in curves.items()}
    means = {name: curve.mean(axis=1) for name, curve in (curves | last).items()}
    return pd.DataFrame({name: means[name] for name in MEASURES if name in means})


def analyse(table: Table) -> Analysis:
    """Every comparison; p-values corrected by Holm's method, per measure over all comparisons."""
    others = [each for each in table.conditions if each.method != BASELINE]
    pairs = [(each, table.partner(each, BASELINE)) for each in others]
    alone = [each.name for each, baseline in pairs if baseline is None]
    pairs += [(each, table.partner(each, "uniform")) for each in others if each.method.startswith(ATTENTION)]
    comparisons = [_compare(each, other) for each, other in pairs if other is not None]
    for measure in MEASURES:
        tests = [each.tests[measure] for each in comparisons if measure in each.tests]
        tests = [test for test in tests if test.p is not None]
        for test, p in zip(tests, holm([test.p for test in tests]), strict=True):
            test.p_holm = p
    return Analysis(table, comparisons, [*table.warnings, *_warnings(table, comparisons, alone)])


def _compare(condition: Condition, other: Condition) -> Comparison:
    seeds = condition.curves["reward"].index.intersection(other.curves["reward"].index)
    found = Comparison(condition, other, seeds.tolist())
    if not found.seeds:
        return found
    curves, base = ({name: curve.loc[seeds] for name, curve in each.curves.items()} for each in (condition, other))
    ours, theirs = per_run(curves), per_run(base)
    tests = {name: paired(ours[name], theirs[name]) for name in ours if name in theirs}
    if spread := deviation_ratio(ours["reward"], theirs["reward"]):
        tests["spread"] = spread
    curves, base = ({name: curve.to_numpy() for name, curve in each.items()} for each in (curves, base))
    if "kl" in tests:
        runs = zip(curves["kl"], curves["reward"], base["kl"], base["reward"], strict=True)
        if pairs := [pair for run in runs if (pair := at_equal_kl(*run))]:
            reward, base_reward, low, high = np.transpose(pairs)
            tests["equal_kl"] = paired(reward, base_reward)
            found.shared_kl = float(low.mean()), float(high.mean())
    if found.with_baseline:
        steps_T = condition.curves["reward"].columns.to_numpy(float)
        found.steps = steps_to_rise(curves["reward"], base["reward"], steps_T)
    found.tests = {name: tests[name] for name in MEASURES if name in tests}
    return found


def _warnings(table: Table, comparisons: list[Comparison], alone: list[str]) -> list[str]:
    """What is missing, or limits what the numbers can mean."""
    warnings = []
    methods = list(dict.fromkeys(each.method for each in table.conditions))
    if BASELINE not in methods:
        now = next((name for name in methods if name.lower() in USUAL_BASELINES), "one of " + ", ".join(methods))
        warnings.append(
            f"No method is called {BASELINE}, the sparse reward's name here; if it is {now}, write {BASELINE} for it "
            "in the column method."
        )
    elif alone:
        warnings.append(f"Without a baseline (method {BASELINE} with the same settings): {'; '.join(alone)}.")
    if any(each.curves["reward"].shape[1] <= LAST for each in table.conditions):
        warnings.append(f"Some runs have at most {LAST} steps: the last {LAST} are all of them.")
    for each in comparisons:
        who, n = f"{each.condition.name} against {each.other.label}", len(each.seeds)
        if odd := sorted({*each.condition.curves["reward"].index} ^ {*each.other.curves["reward"].index}):
            only = ", ".join(map(str, odd))
            warnings.append(f"{who}: compared on the {n} seeds that both have; only one has {only}.")
        apart = n - (each.tests["equal_kl"].n if "equal_kl" in each.tests else 0)
        if "kl" in each.tests and apart:
            warnings.append(f"{who}: {apart} of {n} pairs share no KL: not in {MEASURES['equal_kl']}.")
    baselines = [each for each in table.conditions if each.method == BASELINE]
    late = {each.name: change(each.curves["reward"].to_numpy(), late=True) for each in baselines}
    if rising := [f"{name} by {by}" for name, by in late.items() if rises(by)]:
        warnings.append(
            "No plateau yet, so steps are counted to where it got; the second half of its last "
            f"{LAST} is above their first: {'; '.join(rising)}."
        )
    return warnings
