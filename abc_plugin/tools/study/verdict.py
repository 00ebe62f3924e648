"""What the numbers say: one plain sentence per comparison, and the paper's claims as they are seen here."""

from __future__ import annotations

from collections import Counter

from abc_plugin.tools.study.comparisons import EQUAL_KL, WORDS, Analysis, Comparison
from abc_plugin.tools.study.inference import SIGNIFICANT, Paired, number, p_text
from abc_plugin.tools.study.learning_curves import LAST, SHARE
from abc_plugin.tools.study.table import BASELINE

IN_SENTENCES = ("reward", EQUAL_KL, "kl")
YES, NO, OPPOSITE, OPEN = "seen", "not seen", "the opposite seen", "undecided"
Outcome = tuple[str, str]  # one of those, and the number behind it


def headline(analysis: Analysis) -> str:
    """How many comparisons with the baseline see what, in reward over training."""
    with_baseline = [each for each in analysis.comparisons if each.with_baseline]
    tested = [each.paired["reward"] for each in with_baseline if len(each.seeds) > 1]
    if not tested:
        return f"No comparison with {BASELINE} has two paired seeds, so nothing is tested."
    ways = Counter("higher" if test.difference.value > 0 else "lower" for test in tested if test.significant)
    return (
        f"Reward over training against {BASELINE}, of {len(tested)} comparison{'s' * (len(tested) > 1)}: higher in "
        f"{ways['higher']}, lower in {ways['lower']}, no difference seen in {len(tested) - ways.total()}."
    )


def sentences(analysis: Analysis) -> list[str]:
    """``abc β 0.8, λ 0.95 against none (10 paired seeds): lower reward over training by 0.21 [0.05, 0.37] (p …)``."""
    lines = []
    for comparison in analysis.comparisons:
        n = len(comparison.seeds)
        clauses = [_clause(WORDS[name], comparison.paired[name]) for name in IN_SENTENCES if name in comparison.paired]
        seeds = f"{n} paired seed{'s' * (n > 1)}{', so no interval and no test' if n == 1 else ''}"
        outcome = f" ({seeds}): {'; '.join(clauses)}" if n else ": no seed in common, so not compared"
        lines.append(f"{' against '.join(analysis.names(comparison))}{outcome}.")
    return lines


def _clause(measure: str, test: Paired) -> str:
    if test.p is None:
        return f"{measure} differs by {number(test.difference.value)}"
    p = p_text(test.p_holm)
    p = f"p {p if p.startswith('<') else f'= {p}'} after Holm"
    if test.significant:
        return f"{'higher' if test.difference.value > 0 else 'lower'} {measure} by {abs(test.difference)} ({p})"
    return f"no difference seen in {measure} ({test.difference}, {p})"


def claims(analysis: Analysis) -> dict[str, list[Outcome]]:
    """By condition of abc that has a baseline: an outcome per claim of CLAIMS."""
    return {
        analysis.table.label(comparison.condition): [judge(comparison) for _, judge in CLAIMS.values()]
        for comparison in analysis.comparisons
        if comparison.condition.method == "abc" and comparison.with_baseline
    }


def claim_lines(analysis: Analysis) -> list[str]:
    """A line per claim: in how many comparisons it is seen, and in how many its opposite."""
    rows = list(claims(analysis).values())
    lines = []
    for (claim, (section, _)), outcomes in zip(CLAIMS.items(), zip(*rows, strict=True), strict=False):
        counts = Counter(outcome for outcome, _ in outcomes)
        each = ", ".join(f"{outcome} in {counts[outcome]}" for outcome in (YES, NO, OPPOSITE, OPEN) if counts[outcome])
        lines.append(f"The paper's “{claim}” ({section}), of {len(rows)}: {each}.")
    return lines


def _by_test(comparison: Comparison, measure: str, way: int) -> Outcome:
    test = comparison.paired.get(measure)
    if test is None:
        return OPEN, "no KL in common" if measure == EQUAL_KL and "kl" in comparison.paired else ""
    if test.p is None or not test.significant:
        return OPEN if test.p is None else NO, str(test.difference)
    return (YES if test.difference.value * way > 0 else OPPOSITE), str(test.difference)


def _half_the_steps(comparison: Comparison) -> Outcome:
    steps = comparison.steps
    if steps is None:
        return OPEN, f"{BASELINE} does not rise"
    ratio, ratio_text = steps.ratio, f"{steps.ratio} of {BASELINE}'s"
    if steps.still_rises:
        return OPEN, f"{ratio_text}, which still rises in its last {LAST} steps"
    if ratio.low is None or ratio.low <= 0.5 < ratio.high:
        return OPEN, ratio_text
    return (YES if ratio.high <= 0.5 else OPPOSITE if ratio.low > 1 else NO), ratio_text


def _less_variance(comparison: Comparison) -> Outcome:
    spread = comparison.spread.get("reward")
    if spread is None or spread.p is None:
        return OPEN, ""
    if spread.p_holm >= SIGNIFICANT:
        return NO, f"{spread.ratio} of {BASELINE}'s"
    return (YES if spread.ratio.value < 1 else OPPOSITE), f"{spread.ratio} of {BASELINE}'s"


CLAIMS = {
    "higher reward over training": ("Table 1", lambda pair: _by_test(pair, "reward", 1)),
    f"at most half the steps to {100 * SHARE:.0f} % of the baseline's rise": ("section 5.3", _half_the_steps),
    "less variance across seeds": ("section 5.3", _less_variance),
    "lower KL over training": ("section 5.5", lambda pair: _by_test(pair, "kl", -1)),
    "higher reward at equal KL": ("section 5.5", lambda pair: _by_test(pair, EQUAL_KL, 1)),
}
