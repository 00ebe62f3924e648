"""The report's curves and its page: what is drawn, counted and shown; templates/report.html says how."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from abc_plugin.report import html_templates, plots
from abc_plugin.report.logged_runs import FOOTNOTE, KL, LAST, REWARD, WINDOW, Curve, Run, by_group, comparison, smooth
from abc_plugin.report.recorded_completions import Record
from abc_plugin.report.recorded_steps_html import section
from abc_plugin.report.samples_file import Sample, pair_up, spread_over_ranks
from abc_plugin.report.statistics import mean, with_error

SHOWN = 12  # completions on the page
SCREENS = (  # media query, columns of panels, dark: the browser picks
    ("(max-width: 640px) and (prefers-color-scheme: dark)", 1, True),
    ("(max-width: 640px)", 1, False),
    ("(prefers-color-scheme: dark)", 2, True),
)

# (what, unit, tags) of the table of first and last steps.
METRICS = (
    ("Reward of the rollouts", "reward model's units", REWARD),
    ("Reward's standard deviation", "reward model's units", ("train/rollout/reward_std",)),
    ("Return (reward − KL penalty)", "reward model's units", ("train/return",)),
    ("KL from the starting policy", "nats per token", ("train/kl",)),
    ("Policy loss", "", ("train/policy_loss",)),
    ("Critic loss", "", ("train/critic_loss",)),
    ("Entropy of the credit", "nats", ("train/credit_entropy",)),
    ("Credit on the last token", "share", ("train/credit_last_token",)),
    ("Credit on special tokens", "share", ("train/credit_special_tokens",)),
    ("Error of the reward's sum", "reward model's units", ("train/credit_conservation_error",)),
    ("Time to generate", "s per step", ("train/timing/generation",)),
    ("Time to score", "s per step", ("train/timing/make_experience",)),
    ("Time to train", "s per step", ("train/timing/ppo_train",)),
)

SHARE = "share of the credit"
PANELS = (  # title, unit, tags of which the first present is drawn
    ("Reward of the rollouts", "mean reward (reward model's units)", REWARD),
    ("KL from the starting policy", "nats per token", KL),
    ("Entropy of the credit", "nats (uniform over n tokens: ln n)", ("train/credit_entropy",)),
    ("Credit on the last token", SHARE, ("train/credit_last_token",)),
)


@dataclass(frozen=True)
class Content:
    """What a page is made of."""

    run: Run
    runs: list[Run]  # with it, those it is compared with; [run] if none
    before: list[Sample]  # empty: not given
    after: list[Sample]
    summary: dict[str, Any]  # empty: no summary.json
    command: str  # what made the page, for its footer
    records: list[Record] = field(default_factory=list)  # completions recorded in training
    notes: list[str] = field(default_factory=list)  # on how the records were read


def headline(content: Content) -> str:
    """One sentence: mean reward before and after with standard errors; the training reward if there are no samples."""
    named = [(samples, name) for samples, name in ((content.before, "before"), (content.after, "after")) if samples]
    if not named:
        reward = content.run.curve(REWARD)
        n = min(LAST, len(reward))
        first, last = mean(reward[:n]), mean(reward[-n:])
        return f"Mean reward in training: {first:.2f} over the first {n} steps, {last:.2f} over the last {n}."
    prompts = [sorted(sample.prompt for sample in samples) for samples, _ in named]
    same = prompts[0] == prompts[-1]
    parts = []
    for samples, name in named:
        count = "" if same else f" (n = {len(samples)})"
        parts.append(f"{with_error([sample.reward for sample in samples])} {name}{count}")
    return f"Mean reward{_sample_size(prompts[0]) if same else ''}: {', '.join(parts)}."


def _sample_size(prompts: list[str]) -> str:
    n, distinct = len(prompts), len(set(prompts))
    if n == distinct:
        return f" on {n} held-out prompt{'s' * (n > 1)}"
    return f" of {n} completions of {distinct} held-out prompt{'s' * (distinct > 1)}"


def render(content: Content) -> str:
    """The whole page."""
    run, runs = content.run, content.runs
    body = html_templates.render(
        "report/templates/report.html",
        change=_change(content.before, content.after),
        summary=[[name, _plain(value)] for name, value in content.summary.items()],
        comparison=comparison(runs) if len(runs) > 1 else None,
        footnote=FOOTNOTE,
        curves=draw_curves(runs),
        sources=[(media, draw_curves(runs, columns=columns, dark=dark)) for media, columns, dark in SCREENS],
        metrics=_metrics(run),
        metrics_header=("", "unit", f"first {LAST} steps", f"last {LAST} steps"),
        completions=_completions(content.before, content.after),
        training=section(content.records, content.notes),
    )
    return html_templates.document(f"{run.label}: report", headline(content), body, content.command)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _change(before: list[Sample], after: list[Sample]) -> str:
    """The mean change of paired samples with its error, and what ± means."""
    if not (before or after):
        return ""
    note = "± is one standard error over completions."
    if before and after:
        changes = [new.reward - old.reward for old, new in pair_up(before, after)]
        note = f"Change on the same prompts: {with_error(changes, '+')} ({len(changes)} pairs). {note}"
    return note


def _metrics(run: Run) -> list[list[str]]:
    curves = [(what, unit, run.curve(tags)) for what, unit, tags in METRICS]
    return [
        [what, unit, f"{mean(curve[:LAST]):.3g}", f"{mean(curve[-LAST:]):.3g}"]
        for what, unit, curve in curves
        if len(curve)
    ]


def _completions(before: list[Sample], after: list[Sample]) -> dict[str, Any]:
    """Some completions, by rank: of pairs with the reward before and after, or of one file; {} without samples."""
    if before and after:
        named = [[("before", old), ("after", new)] for old, new in pair_up(before, after)]
        what = "pairs, at evenly spaced ranks of the reward change (rank 1: largest gain)"
    elif before or after:
        named = [[("before" if before else "after", sample)] for sample in before or after]
        what = "completions, at evenly spaced ranks of the reward (rank 1: highest)"
    else:
        return {}

    def gain(sides: list[tuple[str, Sample]]) -> float:
        return sides[-1][1].reward - (sides[0][1].reward if len(sides) == 2 else 0.0)

    ranked = spread_over_ranks(named, gain, SHOWN)
    return {
        "how": f"{len(ranked)} of {len(named)} {what}, the first and the last among them; none picked by hand.",
        "signed": any(sample.signed for _, sides in ranked for _, sample in sides),
        "total": len(named),
        "ranked": [(rank, gain(sides), sides) for rank, sides in ranked],
    }


def draw_curves(runs: list[Run], *, columns: int = 2, dark: bool = False) -> bytes:
    """A PNG of the panels that some run has data for, ``columns`` panels a row.

    Runs of one group share a colour. One run: each step faint, the trailing mean over WINDOW steps bold. Several:
    the mean over seeds of their trailing means, and a band of one standard deviation, over the steps all of them have.
    """
    shown = [panel for panel in PANELS if any(len(run.curve(panel[-1])) for run in runs)]
    groups = by_group(runs)
    looks = plots.looks(groups, dark=dark)
    with plots.style(dark):
        figure, grid = plots.panels(len(shown), columns, keep_columns=True)
        for axes, (title, unit, tags) in zip(grid, shown, strict=True):
            for group, seeds in groups.items():
                curves = [curve for run in seeds if len(curve := run.curve(tags))]
                _draw_group(axes, group, curves, looks[group])
            axes.set(title=title, xlabel="PPO step", ylabel=unit)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if unit == SHARE:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if len(groups) > 1:
            plots.legend(figure, 2 * columns)
        plots.caption(figure, _caption(groups, columns))
        return plots.png(figure)


def _draw_group(axes: Axes, group: str, curves: list[Curve], look: plots.Look) -> None:
    if not curves:
        return
    centre, spread = over_seeds(curves)
    label = group if len(curves) == 1 else f"{group} ({len(curves)} seeds)"
    axes.plot(centre, color=look.colour, linestyle=look.line, linewidth=2, label=label, zorder=3)
    if len(curves) == 1:
        axes.plot(curves[0], color=look.colour, linewidth=1, alpha=0.35)
    else:
        plots.band(axes, centre.index, centre - spread, centre + spread, look)


def over_seeds(curves: list[Curve]) -> tuple[Curve, Curve]:
    """Mean and standard deviation (n - 1) over seeds of the smoothed curves, at the steps that all curves have."""
    smoothed = pd.concat([smooth(curve) for curve in curves], axis=1, join="inner").sort_index()
    return smoothed.mean(axis=1, skipna=False), smoothed.std(axis=1, skipna=False)


def _caption(groups: dict[str, list[Run]], columns: int) -> str:
    parts = [f"Bold: mean of the last {WINDOW} logged steps"]
    if any(len(runs) == 1 for runs in groups.values()):
        parts.append("faint: each step")
    if any(len(runs) > 1 for runs in groups.values()):
        parts.append("band: ± 1 standard deviation over seeds")
    return (";\n" if columns == 1 else "; ").join(parts) + "."
