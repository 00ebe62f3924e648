"""A study's pictures, as PNGs; a panel per group of conditions that may be compared."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from abc_plugin.report import plots
from abc_plugin.report.plots import Look
from abc_plugin.tools.study.comparisons import MEASURES, Analysis
from abc_plugin.tools.study.learning_curves import WINDOW, centred
from abc_plugin.tools.study.paired_statistics import UPPER
from abc_plugin.tools.study.results_table import BASELINE, Condition, Table

CURVES = f"mean over seeds, smoothed over {WINDOW} steps; band: 95 % t interval over seeds at each step."
CAPTIONS = {
    "differences.png": "Paired differences with 95 % t intervals; filled: seen after Holm's correction.",
    "reward.png": f"Reward over training: {CURVES}",
    "kl.png": f"KL over training: {CURVES}",
    "frontier.png": f"Reward against KL along training, smoothed over {WINDOW} steps: bold the mean over seeds with "
    "its end marked, faint each seed.",
}
SHOWN = ("reward", "equal_kl", "kl")  # of the differences


def draw(analysis: Analysis, mark: str) -> tuple[dict[str, bytes], dict[str, str]]:
    """PNGs and captions by file name; ``mark`` is written into each as the software that made it."""
    table, figures = analysis.table, {}
    units = {"reward": "mean reward", "kl": "KL, nats per token" if table.known_kl else "KL, unit unknown"}
    with plots.style():
        if any(each.seeds for each in analysis.comparisons):
            figures["differences.png"] = _differences(analysis)
        for metric, unit in units.items():
            if any(metric in each.curves for each in table.conditions):
                curve = functools.partial(_curve, metric=metric)
                figures[f"{metric}.png"] = _grid(table, metric, curve, "PPO step", unit)
        if "kl.png" in figures:
            figures["frontier.png"] = _grid(table, "kl", _frontier, units["kl"], units["reward"])
        pictures = {name: plots.png(figure, software=mark, dpi=130) for name, figure in figures.items()}
    return pictures, {name: CAPTIONS[name] for name in pictures}


def _grid(table: Table, metric: str, draw_one: Callable[..., None], x: str, y: str) -> Figure:
    """A panel per group, on common axes, with one legend and one look per method and credit."""
    by_method = sorted(table.conditions, key=lambda each: (each.method != BASELINE, each.method))
    looks = plots.looks(each.label for each in by_method)
    shown = {group: [each for each in here if metric in each.curves] for group, here in table.groups().items()}
    shown = {group: conditions for group, conditions in shown.items() if conditions}
    columns = min(3, len(shown))
    size = {"panel": (max(plots.PANEL_INCHES[0] * 0.85, 6.4 / columns), plots.PANEL_INCHES[1]), "above": 0.9}
    figure, panels = plots.panels(len(shown), columns, **size, sharex=True, sharey=True)
    for axes, (group, conditions) in zip(panels, shown.items(), strict=True):
        for condition in conditions:
            draw_one(axes, condition, looks[condition.label])
        axes.set_title(textwrap.fill(group, 50))
    plots.legend(figure, 1 + 2 * columns)
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    return figure


def _curve(axes: Axes, condition: Condition, look: Look, metric: str) -> None:
    steps, smooth_NT = condition.curves[metric].columns, centred(condition.curves[metric].to_numpy())
    mean_T, n = smooth_NT.mean(0), len(smooth_NT)
    if n > 1:
        half_T = stats.t.ppf(UPPER, n - 1) * stats.sem(smooth_NT)
        plots.band(axes, steps, mean_T - half_T, mean_T + half_T, look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.plot(steps, mean_T, linestyle=look.line, color=look.colour, linewidth=1.8, label=condition.label)


def _frontier(axes: Axes, condition: Condition, look: Look) -> None:
    kl_NT, reward_NT = (centred(condition.curves[name].to_numpy()) for name in ("kl", "reward"))
    if len(kl_NT) > 1:
        axes.plot(kl_NT.T, reward_NT.T, color=look.colour, linewidth=0.6, alpha=0.22)
    mean_kl_T, mean_T = kl_NT.mean(0), reward_NT.mean(0)
    axes.plot(mean_kl_T[-1], mean_T[-1], look.marker, color=look.colour, markeredgecolor="white", zorder=4)
    axes.plot(mean_kl_T, mean_T, linestyle=look.line, color=look.colour, linewidth=2, zorder=3, label=condition.label)


def _differences(analysis: Analysis) -> Figure:
    """A row per comparison, a panel per measure."""
    comparisons = [each for each in analysis.comparisons if each.seeds]
    names = [f"{each.condition.name} − {each.other.label}" for each in comparisons]
    measures = [name for name in SHOWN if any(name in each.tests for each in comparisons)]
    width = max(3.1 + 0.075 * max(map(len, names)) / len(measures), 6.4 / len(measures))
    size = {"panel": (width, 0.36 * len(names)), "above": 1.1}
    figure, panels = plots.panels(len(measures), len(measures), **size, sharey=True)
    [look] = plots.looks([""]).values()
    for axes, measure in zip(panels, measures, strict=True):
        plots.rows(axes, names)
        for row, each in enumerate(comparisons):
            if test := each.tests.get(measure):
                at = test.estimate
                plots.interval(axes, row, at.value, (at.low, at.high), look, filled=test.significant)
        axes.set_title(MEASURES[measure])
        axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure
