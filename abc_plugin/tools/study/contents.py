"""What a report says, section by section; every number is defined in a sentence beside it."""

from __future__ import annotations

from abc_plugin.tools.study import verdict, words
from abc_plugin.tools.study.comparisons import COMPARED, EQUAL_KL, SPREAD, WORDS, Analysis, Comparison, Summary
from abc_plugin.tools.study.curves import FEWEST, HELD, LAST, RESAMPLES, SHARE, TOP, WINDOW
from abc_plugin.tools.study.document import Grid, Section
from abc_plugin.tools.study.statistics import coverage_of_two_errors
from abc_plugin.tools.study.table import BASELINE, Table, shown

MEANS = ("condition", "seeds", "reward over training ± 2 SE", "95 % by Student's t", f"reward, last {LAST} steps")
MEANS_KL = ("KL over training", f"KL, last {LAST} steps")


def means_grid(analysis: Analysis) -> Grid:
    """The main table."""
    with_kl = any("kl" in summary.means for summary in analysis.summaries)
    rows = [_means_row(analysis.table, summary, with_kl) for summary in analysis.summaries]
    return Grid(MEANS + (MEANS_KL if with_kl else ()), rows)


def short_grid(analysis: Analysis) -> Grid:
    """The main table for a terminal: without the intervals of all but its first number."""
    grid = means_grid(analysis)
    last = [words.number(summary.means["reward_last"].estimate.value) for summary in analysis.summaries]
    kl = [words.number(s.means["kl"].estimate.value if "kl" in s.means else None) for s in analysis.summaries]
    rows = [[*row[:4], *more] for row, *more in zip(grid.rows, last, kl, strict=True)]
    return Grid((*MEANS, "KL over training"), rows)


def _means_row(table: Table, summary: Summary, with_kl: bool) -> list[str]:
    reward = summary.means["reward"]
    names = ("reward_last", *(("kl", "kl_last") if with_kl else ()))
    return [
        table.label(summary.condition),
        str(len(summary.condition.seeds)),
        words.plus_minus(reward.estimate.value, reward.two_errors),
        words.ends(reward.estimate),
        *(words.estimate(summary.means[name].estimate) if name in summary.means else words.NOTHING for name in names),
    ]


def sections(analysis: Analysis, pictures: dict[str, str], source: str) -> list[Section]:
    """The whole report; ``pictures`` are captions by file name, those of the analysis only."""

    def drawn(*names: str) -> list[tuple[str, str]]:
        return [(name, caption) for name, caption in pictures.items() if name.startswith(names)]

    found = [
        _verdicts(analysis),
        _claims(analysis),
        Section(
            "Mean reward over training", _about_means(analysis), [], [means_grid(analysis)], drawn("reward", "kl")
        ),
        _differences(analysis, drawn("differences")),
        _steps(analysis),
        _spread(analysis),
        _frontier(analysis, drawn("frontier")),
        _value_loss(analysis, drawn("value_loss")),
        _sweeps(drawn("sweep")),
        _read(analysis, source),
    ]
    return [section for section in found if section is not None]


def _verdicts(analysis: Analysis) -> Section:
    about = (
        "A difference is called seen where the paired t-test's p-value, corrected by Holm's method over all "
        "comparisons of this report (for each measure by itself), is under 0.05. The brackets, 95 % intervals without "
        "that correction, say how large a difference could be and yet not be seen."
    )
    nothing = f"No condition has a baseline (method {BASELINE}, otherwise equal settings): nothing is compared."
    warnings = [f"Mind: {warning}" for warning in analysis.warnings]
    abouts = [about] + [f"Where not said otherwise: {usual}." for usual in [analysis.table.usual_label] if usual]
    return Section("Verdicts", abouts, warnings + (verdict.sentences(analysis) or [nothing]))


def _claims(analysis: Analysis) -> Section | None:
    found = verdict.claims(analysis)
    about = (
        f"As seen here, for each condition of abc against {BASELINE}: by the paired tests after Holm, by Pitman and "
        "Morgan's of standard deviations after Holm, and for steps by the interval of their ratio: seen up to a half, "
        "not seen above a half, its opposite above 1, undecided where it holds a half, or where the baseline still "
        f"rises in its last {LAST} steps. The numbers are differences, and for steps and standard deviations ratios."
    )
    rows = [[who, *(f"{said}: {number}" if number else said for said, number in row)] for who, row in found.items()]
    grid = Grid(("condition", *verdict.CLAIMS), rows, numbers=1 + len(verdict.CLAIMS))
    return Section("The paper's claims", [about], verdict.claim_lines(analysis), [grid]) if found else None


def _about_means(analysis: Analysis) -> list[str]:
    counts = sorted({len(summary.condition.seeds) for summary in analysis.summaries})
    covered = ", ".join(f"{100 * coverage_of_two_errors(n):.1f} % with {n} seeds" for n in counts if n > 1)
    about = (
        "Over training: mean over the steps of a run, then over runs, ± 2 standard errors over runs, as in the "
        "paper's Table 1. With few seeds that is no 95 % interval: it holds the truth in "
        f"{covered}; the brackets are 95 % intervals by Student's t over runs. Last {LAST} steps: of their mean, "
        "likewise. KL: nats per token from the starting policy, as the host logs it."
    )
    if not covered:
        about = (
            "Over training: mean over the steps of the run. One seed per condition: no interval and no test is "
            f"possible. Last {LAST} steps: of their mean. KL: nats per token from the starting policy."
        )
    lone = [analysis.table.label(s.condition) for s in analysis.summaries if len(s.condition.seeds) == 1]
    lone_ones = [f"One seed only, so without any interval or test: {'; '.join(lone)}."] if covered and lone else []
    return [about, *lone_ones]


def _pair(table: Table, comparison: Comparison) -> list[str]:
    return [table.label(comparison.condition), table.label(comparison.other, group=False)]


def _differences(analysis: Analysis, pictures: list[tuple[str, str]]) -> Section | None:
    if not analysis.comparisons:
        return None
    about = (
        "Runs of one seed are paired (with abc-rlhf local they share prompts, their order and the random numbers of "
        f"sampling), so each seed gives one difference, to {BASELINE} with otherwise the same settings, and for abc "
        "to uniform of the same β: mean with its 95 % t interval; p of the "
        "paired t-test and of Wilcoxon's signed-rank test (which cannot fall under 0.05 with fewer than 6 pairs), "
        "after Holm's correction over the rows of a table; d_z is the mean over the standard deviation of the "
        "differences."
    )
    header = ("condition", "against", "pairs", "difference", "p, t-test", "p, Wilcoxon", "d_z")
    measures = [name for name in COMPARED if any(name in c.paired for c in analysis.comparisons)]
    grids = []
    for name in measures:
        rows = [_paired_row(analysis.table, c, name) for c in analysis.comparisons if name in c.paired]
        grids.append(Grid(header, rows, 2, WORDS[name]))
    return Section("Paired differences", [about], [], grids, pictures)


def _paired_row(table: Table, comparison: Comparison, name: str) -> list[str]:
    found = comparison.paired[name]
    return [
        *_pair(table, comparison),
        str(found.n),
        words.estimate(found.difference),
        words.p_value(found.p_t_holm),
        words.p_value(found.p_wilcoxon_holm),
        words.number(found.d_z, 2),
    ]


def _steps(analysis: Analysis) -> Section | None:
    timed = [c for c in analysis.comparisons if c.other.method == BASELINE and c.seeds]
    if not timed:
        return None
    held = " and ".join(f"{low} to {high} % with {n} seeds" for n, (low, high) in HELD.items())
    about = (
        f"The step at which the mean curve over seeds (smoothed: mean of the {WINDOW} steps around each; linear "
        f"between steps) first reaches {100 * SHARE:.0f} % of the baseline's rise: of the way from its first step to "
        f"the mean of its last {LAST} steps, whether or not it has come to a plateau there; a share of the way, so "
        f"that it means the same for negative rewards. Intervals: bootstrap of {RESAMPLES:,} resamples of seeds, "
        "baseline and condition together, with percentiles widened for few seeds (Hesterberg 2015); they are "
        f"approximate: in simulated studies of methods slower, as fast and faster they held the truth in {held}; of "
        f"fewer than {FEWEST} seeds none is given. A condition that does not reach it has ∞; “never” is the share of "
        "resamples that do not."
    )
    rows = [_steps_row(analysis.table, comparison) for comparison in timed]
    header = ("condition", "reward to reach", "steps", "never", f"steps of {BASELINE}", "ratio")
    return Section(f"Steps to {100 * SHARE:.0f} % of the baseline's rise", [about], [], [Grid(header, rows)])


def _steps_row(table: Table, comparison: Comparison) -> list[str]:
    name, found = table.label(comparison.condition), comparison.steps
    if found is None:
        return [name, f"{BASELINE} does not rise", *[words.NOTHING] * 4]
    never = words.NOTHING if found.never is None else f"{100 * found.never:.1f} %"
    return [
        name,
        words.number(found.target),
        words.estimate(found.steps),
        never,
        words.estimate(found.baseline_steps),
        words.estimate(found.ratio),
    ]


def _spread(analysis: Analysis) -> Section | None:
    spreads = [s for s in analysis.summaries if s.deviations["reward"]]
    if not spreads:
        return None
    about = (
        "Standard deviation (n − 1) over seeds of a run's mean reward, with its 95 % interval by chi-square; against "
        "the baseline as a ratio of standard deviations, with Pitman and Morgan's interval and test for pairs (p "
        "after Holm), since runs of one seed are paired. All three take runs for normally distributed."
    )
    label = analysis.table.label
    rows = [[label(s.condition), *(words.estimate(s.deviations[name]) for name in SPREAD)] for s in spreads]
    ratios = [_ratio_row(analysis.table, c) for c in analysis.comparisons if c.spread]
    header = ("condition", "against")
    for name in SPREAD:
        header += (f"ratio, {WORDS[name]}", "p")
    grids = [Grid(("condition", *(WORDS[name] for name in SPREAD)), rows)]
    return Section("Spread across seeds", [about], [], grids + ([Grid(header, ratios, 2)] if ratios else []))


def _ratio_row(table: Table, comparison: Comparison) -> list[str]:
    row = _pair(table, comparison)
    for name in SPREAD:
        found = comparison.spread.get(name)
        row += [words.estimate(found.ratio), words.p_value(found.p_holm)] if found else [words.NOTHING] * 2
    return row


def _frontier(analysis: Analysis, pictures: list[tuple[str, str]]) -> Section | None:
    if not pictures:
        return None
    about = (
        f"Reward at equal KL: both curves of a run are smoothed (mean of the {WINDOW} steps around each); its reward "
        "as a function of KL is what it had when it first reached that KL (linear between); of each pair of runs that "
        f"function's mean is taken over the upper {100 * TOP:.0f} % of the KL that both reach, and the difference is "
        "among the paired differences above. A method that is only slower has the same reward at equal KL."
    )
    rows = []
    for c in analysis.comparisons:
        if c.equal_kl and EQUAL_KL in c.paired:
            low, high = c.equal_kl
            where = f"{words.number(low)} to {words.number(high)}"
            rows.append([*_pair(analysis.table, c), where, words.estimate(c.paired[EQUAL_KL].difference)])
    header = ("condition", "against", "compared at KL (mean over pairs)", "difference of reward")
    return Section("Reward against KL", [about], [], [Grid(header, rows, 2)] if rows else [], pictures)


def _value_loss(analysis: Analysis, pictures: list[tuple[str, str]]) -> Section | None:
    having = [s for s in analysis.summaries if "value_loss" in s.means]
    if not having:
        return None
    about = (
        "The critic's loss as the host logs it, mean with its 95 % t interval over runs. It is not comparable between "
        "methods as it stands: it grows with the variance of the returns, which dense reward changes by itself, so a "
        "lower loss is no sign of a better critic."
    )
    rows = [
        [
            analysis.table.label(s.condition),
            *(words.estimate(s.means[name].estimate) for name in ("value_loss", "value_loss_last")),
        ]
        for s in having
    ]
    grid = Grid(("condition", WORDS["value_loss"], WORDS["value_loss_last"]), rows)
    return Section("Value loss", [about], [], [grid], pictures)


def _sweeps(pictures: list[tuple[str, str]]) -> Section | None:
    if not pictures:
        return None
    about = (
        "Reward over training against one setting, mean ± standard deviation over seeds. At β = 0 every method is the "
        f"sparse reward, so {BASELINE} stands there for a method without a run of its own."
    )
    return Section("Sweeps", [about], [], [], pictures)


def _read(analysis: Analysis, source: str) -> Section:
    table = analysis.table
    runs = sum(len(condition.seeds) for condition in table.conditions)
    items = [f"{runs} runs of {len(table.conditions)} conditions, from {source}."]
    first = table.conditions[0].settings
    same = [f"{name} {shown(first[name])}" for name in first if name not in table.varied and first[name] is not None]
    if same:
        items.append(f"In all of them: {', '.join(same)}.")
    alike: dict[str, list[str]] = {}
    for condition in table.conditions:
        steps = f"{len(condition.steps)} steps ({condition.steps[0]}–{condition.steps[-1]})"
        alike.setdefault(f"{steps} of seeds {_ranges(condition.seeds)}", []).append(table.label(condition))
    items += [f"{what}: {'; '.join(names)}." for what, names in alike.items()]
    return Section("What was read", [], items)


def _ranges(numbers: tuple[int, ...]) -> str:
    """``1–4, 7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)
