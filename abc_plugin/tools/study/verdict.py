"""One plain sentence per comparison, and the paper's claims as they are seen here."""

from __future__ import annotations

from collections import Counter

from abc_plugin.tools.study import words
from abc_plugin.tools.study.comparisons import EQUAL_KL, WORDS, Analysis, Comparison
from abc_plugin.tools.study.curves import LAST, SHARE
from abc_plugin.tools.study.statistics import SIGNIFICANT, Paired
from abc_plugin.tools.study.table import BASELINE, Table

SAID = ("reward", EQUAL_KL, "kl")  # measures that a sentence speaks of
YES, NO, OPPOSITE, OPEN = "seen", "not seen", "the opposite seen", "undecided"
Outcome = tuple[str, str]  # one of those, and the number behind it
CLAIMS = {
    "higher reward over training": "Table 1",
    f"at most half the steps to {100 * SHARE:.0f} % of the baseline's rise": "section 5.3",
    "less variance across seeds": "section 5.3",
    "lower KL over training": "section 5.5",
    "higher reward at equal KL": "section 5.5",
}


def significant(found: Paired) -> bool:
    """Whether a difference is seen: the paired t-test's p, after Holm's correction, is under 0.05."""
    return found.p_t_holm is not None and found.p_t_holm < SIGNIFICANT


def sentences(analysis: Analysis) -> list[str]:
    """A sentence per comparison."""
    return [sentence(analysis.table, comparison) for comparison in analysis.comparisons]


def sentence(table: Table, comparison: Comparison) -> str:
    """``abc β 0.8, λ 0.95 against none: lower reward over training by 0.21 [0.05, 0.37] (p = 0.01); …``."""
    who = f"{table.label(comparison.condition)} against {table.label(comparison.other, group=False)}"
    if not comparison.seeds:
        return f"{who}: no seed in common, so not compared."
    n = len(comparison.seeds)
    parts = [_clause(WORDS[name], comparison.paired[name]) for name in SAID if name in comparison.paired]
    why = ", so no interval and no test" if n == 1 else ""
    return f"{who} ({words.seeds(n, 'paired')}{why}): {'; '.join(parts)}."


def _clause(what: str, found: Paired) -> str:
    if found.p_t is None:
        return f"{what} differs by {words.number(found.difference.value)}"
    p = f"{words.p_equation(found.p_t_holm)} after Holm" if found.p_t_holm is not None else ""
    if significant(found):
        way = "higher" if found.difference.value > 0 else "lower"
        return f"{way} {what} by {words.size(found.difference)} ({p})"
    return f"no difference seen in {what} ({words.estimate(found.difference)}, {p})"


def headline(analysis: Analysis) -> str:
    """How many comparisons with the baseline saw what, in reward over training."""
    with_baseline = [c for c in analysis.comparisons if c.other.method == BASELINE]
    tested = [c.paired["reward"] for c in with_baseline if len(c.seeds) > 1]
    if not tested:
        return f"No comparison with {BASELINE} has two paired seeds, so nothing is tested."
    seen = [found.difference.value for found in tested if significant(found)]
    ways = Counter("higher" if value > 0 else "lower" for value in seen)
    same = len(tested) - ways.total()
    return (
        f"Reward over training against {BASELINE}, of {len(tested)} comparison{'s' * (len(tested) > 1)}: higher in "
        f"{ways['higher']}, lower in {ways['lower']}, no difference seen in {same}."
    )


def claims(analysis: Analysis) -> dict[str, list[Outcome]]:
    """By condition of abc that has a baseline: an outcome per claim of CLAIMS."""
    return {
        analysis.table.label(comparison.condition): [
            _by_test(comparison, "reward", 1),
            _half_the_steps(comparison),
            _less_variance(comparison),
            _by_test(comparison, "kl", -1),
            _by_test(comparison, EQUAL_KL, 1),
        ]
        for comparison in analysis.comparisons
        if comparison.condition.method == "abc" and comparison.other.method == BASELINE
    }


def claim_lines(analysis: Analysis) -> list[str]:
    """A line per claim: in how many comparisons it is seen, and in how many its opposite."""
    rows = list(claims(analysis).values())
    lines = []
    for (claim, where), outcomes in zip(CLAIMS.items(), zip(*rows, strict=True), strict=False):
        count = Counter(outcome for outcome, _ in outcomes)
        each = ", ".join(f"{outcome} in {count[outcome]}" for outcome in (YES, NO, OPPOSITE, OPEN) if count[outcome])
        lines.append(f"The paper's “{claim}” ({where}), of {len(rows)}: {each}.")
    return lines


def _by_test(comparison: Comparison, measure: str, way: int) -> Outcome:
    found = comparison.paired.get(measure)
    if found is None:
        return OPEN, "no KL in common" if measure == EQUAL_KL and "kl" in comparison.paired else ""
    if found.p_t is None:
        return OPEN, words.number(found.difference.value)
    number = words.estimate(found.difference)
    if not significant(found):
        return NO, number
    return (YES if found.difference.value * way > 0 else OPPOSITE), number


def _half_the_steps(comparison: Comparison) -> Outcome:
    if comparison.steps is None:
        return OPEN, f"{BASELINE} does not rise"
    ratio = comparison.steps.ratio
    number = f"{words.estimate(ratio)} of {BASELINE}'s"
    late_rise = comparison.steps.late_rise
    if late_rise and late_rise.sign > 0:
        return OPEN, f"{number}, which still rises in its last {LAST} steps"
    if ratio.low is None:
        return OPEN, number
    if ratio.high <= 0.5:
        return YES, number
    if ratio.low > 1:
        return OPPOSITE, number
    return (NO if ratio.low > 0.5 else OPEN), number


def _less_variance(comparison: Comparison) -> Outcome:
    found = comparison.spread.get("reward")
    if found is None or found.p is None:
        return OPEN, ""
    number = f"{words.estimate(found.ratio)} of {BASELINE}'s"
    if found.p_holm is None or found.p_holm >= SIGNIFICANT:
        return NO, number
    return (YES if found.ratio.value < 1 else OPPOSITE), number
