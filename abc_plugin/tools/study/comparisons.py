"""A table's numbers: a Summary per condition, a Comparison per pair of conditions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from abc_plugin.tools.study import words
from abc_plugin.tools.study.curves import LAST, Steps, at_equal_kl, steps_to_rise
from abc_plugin.tools.study.statistics import (
    Estimate,
    Paired,
    Ratio,
    deviation,
    deviation_ratio,
    holm,
    paired,
    t_interval,
    two_errors,
)
from abc_plugin.tools.study.table import BASELINE, METRICS, Condition, Table

EQUAL_KL = "reward_at_equal_kl"
# One number per run: name: (words, metric, of the last LAST steps only)
MEASURES = {
    f"{metric}{'_last' if last else ''}": (
        f"{metric.replace('_', ' ').replace('kl', 'KL')} {f'of the last {LAST} steps' if last else 'over training'}",
        metric,
        last,
    )
    for metric in METRICS
    for last in (False, True)
}
COMPARED = ("reward", "reward_last", EQUAL_KL, "kl", "kl_last")
SPREAD = ("reward", "reward_last")
WORDS = {name: words for name, (words, _, _) in MEASURES.items()} | {EQUAL_KL: "reward at equal KL"}


@dataclass(frozen=True)
class Mean:
    """Over runs of a number per run: t interval, and the half-width of ± 2 standard errors."""

    estimate: Estimate
    two_errors: float | None


@dataclass(frozen=True)
class Summary:
    """A condition by itself; measures it lacks are absent."""

    condition: Condition
    means: dict[str, Mean]
    deviations: dict[str, Estimate | None]  # across seeds


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


@dataclass(frozen=True)
class Analysis:
    """All numbers of a report."""

    table: Table
    summaries: list[Summary]
    comparisons: list[Comparison]  # with their baselines first, then of abc with uniform
    warnings: list[str]


def per_run(curves: dict[str, np.ndarray], measure: str) -> np.ndarray | None:
    """(N,): the measure of each run; None where the metric was not logged."""
    _, metric, last = MEASURES[measure]
    if metric not in curves:
        return None
    return (curves[metric][:, -LAST:] if last else curves[metric]).mean(1)


def analyse(table: Table) -> Analysis:
    """Every summary and comparison; p-values corrected by Holm's method, per measure over all comparisons."""
    pairs = [(c, table.baseline(c)) for c in table.conditions if c.method != BASELINE]
    warnings = [*table.warnings]
    alone = [table.label(c) for c, other in pairs if other is None]
    if alone:
        warnings.append(
            f"Without a baseline (method {BASELINE} with the same other settings), so in the tables only: "
            f"{'; '.join(alone)}."
        )
    if short := sorted({len(c.steps) for c in table.conditions if len(c.steps) <= LAST}):
        warnings.append(f"Runs of {', '.join(map(str, short))} steps: what is said of the last {LAST} is of them all.")
    pairs += [(c, table.uniform(c)) for c in table.conditions if c.method == "abc"]
    comparisons = []
    for condition, other in pairs:
        if other is not None:
            comparison, notes = _compare(table, condition, other)
            comparisons.append(comparison)
            warnings += notes
    warnings = list(dict.fromkeys(warnings))  # what is said of a baseline, once
    return Analysis(table, [_summary(c) for c in table.conditions], _corrected(comparisons), warnings)


def _summary(condition: Condition) -> Summary:
    values = {name: per_run(condition.curves, name) for name in MEASURES}
    means = {name: Mean(t_interval(x), two_errors(x)) for name, x in values.items() if x is not None}
    return Summary(condition, means, {name: deviation(values[name]) for name in SPREAD})


def _compare(table: Table, condition: Condition, other: Condition) -> tuple[Comparison, list[str]]:
    seeds = tuple(seed for seed in condition.seeds if seed in other.seeds)
    named = f"{table.label(condition)} against {table.label(other, group=False)}"
    notes = []
    if set(condition.seeds) != set(other.seeds):
        odd = ", ".join(map(str, sorted(set(condition.seeds) ^ set(other.seeds))))
        notes.append(f"{named}: compared on the {len(seeds)} seeds that both have; only one has {odd}.")
    if not seeds:
        return Comparison(condition, other, (), {}, {}, None, None), notes
    ours, theirs = condition.only(seeds), other.only(seeds)
    both = {metric for metric in METRICS if metric in ours and metric in theirs}
    values = {
        name: (per_run(ours, name), per_run(theirs, name))
        for name, (_, metric, _) in MEASURES.items()
        if metric in both
    }
    tests = {name: paired(*values[name]) for name in COMPARED if name in values}
    found, equal_kl = _equal_kl(ours, theirs)
    if found:
        tests[EQUAL_KL] = found
    without = len(seeds) - (found.n if found else 0)
    if "kl" in both and without:
        notes.append(f"{named}: {without} of {len(seeds)} pairs share no KL: not in {WORDS[EQUAL_KL]}.")
    spread = {name: ratio for name in SPREAD if (ratio := deviation_ratio(*values[name]))}
    steps = steps_to_rise(ours["reward"], theirs["reward"], condition.steps) if other.method == BASELINE else None
    if steps and steps.late_rise and steps.late_rise.sign > 0:
        notes.append(
            f"{table.label(other)} still rises in its last {LAST} steps, by {words.estimate(steps.late_rise)} from "
            "their first half to their second: it has no plateau yet, and steps are counted to where it got."
        )
    tests = {name: tests[name] for name in COMPARED if name in tests}
    return Comparison(condition, other, seeds, tests, spread, steps, equal_kl), notes


def _equal_kl(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
) -> tuple[Paired | None, tuple[float, float] | None]:
    if "kl" not in ours or "kl" not in theirs:
        return None, None
    runs = zip(ours["kl"], ours["reward"], theirs["kl"], theirs["reward"], strict=True)
    found = [pair for run in runs if (pair := at_equal_kl(*run))]
    if not found:
        return None, None
    low, high = (float(np.mean([getattr(pair, end) for pair in found])) for end in ("low", "high"))
    return paired([pair.reward for pair in found], [pair.baseline for pair in found]), (low, high)


def _corrected(comparisons: list[Comparison]) -> list[Comparison]:
    """With Holm's p-values."""
    tests = [dict(comparison.paired) for comparison in comparisons]
    ratios = [dict(comparison.spread) for comparison in comparisons]
    for name in COMPARED:
        _correct(tests, name, "p_t")
        _correct(tests, name, "p_wilcoxon")
    for name in SPREAD:
        _correct(ratios, name, "p")
    return [replace(c, paired=t, spread=r) for c, t, r in zip(comparisons, tests, ratios, strict=True)]


def _correct(rows: list[dict], name: str, field: str) -> None:
    having = [row for row in rows if name in row]
    for row, adjusted in zip(having, holm([getattr(row[name], field) for row in having]), strict=True):
        row[name] = replace(row[name], **{f"{field}_holm": adjusted})
