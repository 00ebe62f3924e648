"""A table's numbers: a Summary per condition, a Comparison per pair of conditions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from abc_plugin.tools.study.inference import Mean, Paired, Ratio, deviation_ratio, holm, mean, paired
from abc_plugin.tools.study.learning_curves import LAST, AtEqualKL, Steps, at_equal_kl, steps_to_rise
from abc_plugin.tools.study.table import BASELINE, Condition, Table

EQUAL_KL = "reward_at_equal_kl"
# One number per run, and its name in texts
MEASURES = {
    "reward": "reward over training",
    "reward_last": f"reward of the last {LAST} steps",
    "kl": "KL over training",
    "kl_last": f"KL of the last {LAST} steps",
    "value_loss": "value loss over training",
    "value_loss_last": f"value loss of the last {LAST} steps",
}
WORDS = MEASURES | {EQUAL_KL: "reward at equal KL"}
COMPARED = ("reward", "reward_last", EQUAL_KL, "kl", "kl_last")
SPREAD = ("reward", "reward_last")


@dataclass(frozen=True)
class Summary:
    """A condition by itself; measures it lacks are absent."""

    condition: Condition
    means: dict[str, Mean]


@dataclass(frozen=True)
class Comparison:
    """A condition against another on the seeds that both have."""

    condition: Condition
    other: Condition
    seeds: tuple[int, ...]
    paired: dict[str, Paired]
    spread: dict[str, Ratio]
    steps: Steps | None  # None: the other does not rise, or is no baseline
    equal_kl: tuple[float, float] | None  # from and to, nats per token, means over pairs

    @property
    def with_baseline(self) -> bool:
        return self.other.method == BASELINE


@dataclass(frozen=True)
class Analysis:
    """All numbers of a report."""

    table: Table
    summaries: list[Summary]
    comparisons: list[Comparison]  # with their baselines first, then of abc with uniform
    warnings: list[str]

    def names(self, comparison: Comparison) -> tuple[str, str]:
        """The labels of the two conditions; of the other without what they share."""
        return self.table.label(comparison.condition), self.table.label(comparison.other, group=False)


def per_run(curves: dict[str, np.ndarray], measure: str) -> np.ndarray | None:
    """(N,): the measure of each run; None where the metric was not logged."""
    metric = measure.removesuffix("_last")
    if metric not in curves:
        return None
    return (curves[metric] if metric == measure else curves[metric][:, -LAST:]).mean(1)


def analyse(table: Table) -> Analysis:
    """Every summary and comparison; p-values corrected by Holm's method, per measure over all comparisons."""
    with_none = [(each, table.baseline(each)) for each in table.conditions if each.method != BASELINE]
    with_uniform = [(each, table.uniform(each)) for each in table.conditions if each.method == "abc"]
    comparisons = [_compare(each, other) for each, other in with_none + with_uniform if other is not None]
    alone = [each for each, other in with_none if other is None]
    analysis = Analysis(table, [_summary(condition) for condition in table.conditions], _corrected(comparisons), [])
    return replace(analysis, warnings=[*table.warnings, *_warnings(analysis, alone)])


def _summary(condition: Condition) -> Summary:
    values = {name: per_run(condition.curves, name) for name in MEASURES}
    means = {name: mean(runs) for name, runs in values.items() if runs is not None}
    return Summary(condition, means)


def _compare(condition: Condition, other: Condition) -> Comparison:
    seeds = tuple(seed for seed in condition.seeds if seed in other.seeds)
    if not seeds:
        return Comparison(condition, other, (), {}, {}, None, None)
    ours, theirs = condition.only(seeds), other.only(seeds)
    values = {
        name: (per_run(ours, name), per_run(theirs, name))
        for name in MEASURES
        if name.removesuffix("_last") in ours.keys() & theirs.keys()
    }
    tests = {name: paired(*values[name]) for name in COMPARED if name in values}
    pairs = _at_equal_kl(ours, theirs)
    if pairs:
        tests[EQUAL_KL] = paired([pair.reward for pair in pairs], [pair.baseline for pair in pairs])
    return Comparison(
        condition,
        other,
        seeds,
        paired={name: tests[name] for name in COMPARED if name in tests},
        spread={name: ratio for name in SPREAD if (ratio := deviation_ratio(*values[name]))},
        steps=steps_to_rise(ours["reward"], theirs["reward"], condition.steps) if other.method == BASELINE else None,
        equal_kl=tuple(np.mean([(pair.low, pair.high) for pair in pairs], 0).tolist()) if pairs else None,
    )


def _at_equal_kl(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[AtEqualKL]:
    if "kl" not in ours or "kl" not in theirs:
        return []
    runs = zip(ours["kl"], ours["reward"], theirs["kl"], theirs["reward"], strict=True)
    return [pair for run in runs if (pair := at_equal_kl(*run))]


def _warnings(analysis: Analysis, alone: list[Condition]) -> list[str]:
    """What is missing, or limits what the numbers can mean; each once."""
    table, warnings = analysis.table, []
    if alone:
        warnings.append(
            f"Without a baseline (method {BASELINE} with the same other settings), so in the tables only: "
            f"{'; '.join(map(table.label, alone))}."
        )
    if short := sorted({len(condition.steps) for condition in table.conditions if len(condition.steps) <= LAST}):
        warnings.append(f"Runs of {', '.join(map(str, short))} steps: the last {LAST} are all of them.")
    for comparison in analysis.comparisons:
        who, n = " against ".join(analysis.names(comparison)), len(comparison.seeds)
        if odd := sorted(set(comparison.condition.seeds) ^ set(comparison.other.seeds)):
            warnings.append(
                f"{who}: compared on the {n} seeds that both have; only one has {', '.join(map(str, odd))}."
            )
        apart = n - (comparison.paired[EQUAL_KL].n if EQUAL_KL in comparison.paired else 0)
        if "kl" in comparison.paired and apart:
            warnings.append(f"{who}: {apart} of {n} pairs share no KL: not in {WORDS[EQUAL_KL]}.")
        if comparison.steps and comparison.steps.still_rises:
            warnings.append(
                f"{table.label(comparison.other)} still rises in its last {LAST} steps, by "
                f"{comparison.steps.late_rise} from their first half to their second: it has no plateau yet, and "
                "steps are counted to where it got."
            )
    return list(dict.fromkeys(warnings))


def _corrected(comparisons: list[Comparison]) -> list[Comparison]:
    """With Holm's p-values."""
    for kind in ("paired", "spread"):
        tests = [dict(getattr(comparison, kind)) for comparison in comparisons]
        for name in COMPARED:
            rows = [row for row in tests if name in row]
            for row, p in zip(rows, holm([row[name].p for row in rows]), strict=True):
                row[name] = replace(row[name], p_holm=p)
        comparisons = [replace(each, **{kind: row}) for each, row in zip(comparisons, tests, strict=True)]
    return comparisons
