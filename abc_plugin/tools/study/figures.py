"""A study's pictures, as PNGs; a panel per group of conditions that may be compared."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from abc_plugin.report import plots
from abc_plugin.report.plots import Look
from abc_plugin.tools.study.comparisons import EQUAL_KL, WORDS, Analysis, per_run
from abc_plugin.tools.study.inference import UPPER
from abc_plugin.tools.study.learning_curves import WINDOW, centred
from abc_plugin.tools.study.table import BASELINE, SYMBOLS, Condition, Table

MOST = 8  # conditions in one panel
UNITS = {
    "reward": ("Reward", "mean reward"),
    "kl": ("KL", "KL, nats per token"),
    "value_loss": ("Value loss", "value loss"),
}
CURVES = f"mean over seeds, smoothed over {WINDOW} steps; band: 95 % t interval over seeds at each step."
FRONTIER = (
    f"Reward against KL along training, smoothed over {WINDOW} steps: bold the mean over seeds with its end marked, "
    "faint each seed."
)
DIFFERENCES = "Paired differences with 95 % t intervals; filled: seen after Holm's correction."
SWEEP = "Reward over training against {}: mean ± standard deviation over seeds."
MEASURES = ("reward", EQUAL_KL, "kl")  # of the differences
Points = dict[float, np.ndarray]  # a setting's value: a number per run


def draw(analysis: Analysis, mark: str) -> tuple[dict[str, bytes], dict[str, str]]:
    """PNGs and captions by file name; ``mark`` is written into each as the software that made it."""
    table = analysis.table
    figures: dict[str, tuple[Figure, str]] = {}
    with plots.style():
        for metric, (title, unit) in UNITS.items():
            if parts := _panels(table, metric):
                curve = functools.partial(_curve, metric=metric)
                figures[metric] = _grid(table, parts, curve, "PPO step", unit), f"{title} over training: {CURVES}"
        if parts := _panels(table, "kl"):
            figures["frontier"] = _grid(table, parts, _frontier, UNITS["kl"][1], UNITS["reward"][1]), FRONTIER
        if any(comparison.seeds for comparison in analysis.comparisons):
            figures["differences"] = _differences(analysis), DIFFERENCES
        for name in table.varied:
            if lines := _sweep_lines(table, name):
                setting = _with_companions(table, name)
                figures[f"sweep_{re.sub('[^A-Za-z0-9]', '_', name)}"] = _sweep(lines, setting), SWEEP.format(setting)
        pictures = {f"{name}.png": plots.png(figure, software=mark, dpi=130) for name, (figure, _) in figures.items()}
    return pictures, {f"{name}.png": caption for name, (_, caption) in figures.items()}


def _looks(table: Table) -> dict[str, Look]:
    """A look per method and beta, the same in all pictures."""
    by_method = sorted(table.conditions, key=lambda condition: (condition.method != BASELINE, condition.method))
    return plots.looks(table.label(condition, group=False) for condition in by_method)


def _panels(table: Table, metric: str) -> list[tuple[str, list[Condition]]]:
    """Conditions with the metric, by group; of more than MOST, the baseline is in each part."""
    panels = []
    for conditions in table.groups().values():
        title = table.group_label(conditions[0]) or table.usual_label
        logged = [condition for condition in conditions if metric in condition.curves]
        base = [condition for condition in logged if condition.method == BASELINE]
        others = [condition for condition in logged if condition.method != BASELINE]
        room = MOST - len(base)
        parts = [others[i : i + room] for i in range(0, len(others), room)] or [[]]
        panels += [(title, base + part) for part in parts if base + part]
    return panels


def _grid(
    table: Table, parts: list[tuple[str, list[Condition]]], draw_one: Callable[..., None], x: str, y: str
) -> Figure:
    """A panel each, on common axes, with one legend."""
    columns, looks = min(3, len(parts)), _looks(table)
    width = max(plots.PANEL_INCHES[0] * 0.85, 6.4 / columns)
    size = {"panel": (width, plots.PANEL_INCHES[1]), "above": 0.9}
    figure, panels = plots.panels(len(parts), columns, **size, sharex=True, sharey=True)
    for axes, (title, conditions) in zip(panels, parts, strict=True):
        for condition in conditions:
            name = table.label(condition, group=False)
            draw_one(axes, condition, looks[name], name)
        axes.set_title(title)
    plots.legend(figure, 1 + 2 * columns)
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    return figure


def _curve(axes: Axes, condition: Condition, look: Look, label: str, metric: str) -> None:
    smooth_NT = centred(condition.curves[metric])
    mean_T, n = smooth_NT.mean(0), len(smooth_NT)
    if n > 1:
        half_T = stats.t.ppf(UPPER, n - 1) * smooth_NT.std(0, ddof=1) / np.sqrt(n)
        plots.band(axes, condition.steps, mean_T - half_T, mean_T + half_T, look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.plot(condition.steps, mean_T, linestyle=look.line, color=look.colour, linewidth=1.8, label=label)


def _frontier(axes: Axes, condition: Condition, look: Look, label: str) -> None:
    kl_NT, reward_NT = centred(condition.curves["kl"]), centred(condition.curves["reward"])
    if len(kl_NT) > 1:
        axes.plot(kl_NT.T, reward_NT.T, color=look.colour, linewidth=0.6, alpha=0.22)
    mean_kl_T, mean_T = kl_NT.mean(0), reward_NT.mean(0)
    axes.plot(mean_kl_T[-1], mean_T[-1], look.marker, color=look.colour, markeredgecolor="white", zorder=4)
    axes.plot(mean_kl_T, mean_T, linestyle=look.line, color=look.colour, linewidth=2, zorder=3, label=label)


def _differences(analysis: Analysis) -> Figure:
    """A row per comparison, a panel per measure."""
    comparisons = [comparison for comparison in analysis.comparisons if comparison.seeds]
    names = [" − ".join(analysis.names(comparison)) for comparison in comparisons]
    measures = [name for name in MEASURES if any(name in comparison.paired for comparison in comparisons)]
    width = 3.1 + 0.075 * max(map(len, names)) / len(measures)
    size = {"panel": (max(width, 6.4 / len(measures)), 0.36 * len(names)), "above": 1.1}
    figure, panels = plots.panels(len(measures), len(measures), **size, sharey=True)
    [look] = plots.looks([""]).values()
    for axes, name in zip(panels, measures, strict=True):
        plots.rows(axes, names)
        for row, comparison in enumerate(comparisons):
            if test := comparison.paired.get(name):
                at = test.difference
                plots.interval(axes, row, at.value, (at.low, at.high), look, filled=test.significant)
        axes.set_title(WORDS[name])
        axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def _sweep(lines: dict[str, Points], setting: str) -> Figure:
    """Mean ± standard deviation of reward over training against one numeric setting, a line per what else is equal."""
    names, looks = list(lines), plots.looks(lines)
    parts = [names[i : i + MOST] for i in range(0, len(names), MOST)]
    figure, panels = plots.panels(len(parts), 1, panel=(6.4, 3.4), above=0.3 * min(len(names), MOST))
    for axes, part in zip(panels, parts, strict=True):
        ticks = sorted({x for label in part for x in lines[label]})
        for number, label in enumerate(part):
            xs, look = sorted(lines[label]), looks[label]
            values = [lines[label][x] for x in xs]
            axes.errorbar(
                plots.side_by_side(xs, number, len(part), 0.012 * (ticks[-1] - ticks[0])),
                [runs.mean() for runs in values],
                yerr=[runs.std(ddof=1) if len(runs) > 1 else 0.0 for runs in values],
                fmt=look.marker,
                linestyle=look.line,
                color=look.colour,
                capsize=3,
                label=label,
            )
        axes.set_xticks(ticks)
        axes.set(xlabel=setting, ylabel="mean reward over training")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1 + (len(part) > 3))
    return figure


def _sweep_lines(table: Table, name: str) -> dict[str, Points]:
    """Lines with two or more values of the setting, by what else varies."""
    companions = _companions(table, name)
    ignored = dict.fromkeys([name, *companions])
    lines: dict[str, Points] = {}
    for condition in table.conditions:
        if isinstance(condition.settings[name], float):
            label = table.label(replace(condition, settings=condition.settings | ignored))
            lines.setdefault(label, {})[condition.settings[name]] = per_run(condition.curves, "reward")
    lines = {label: points for label, points in lines.items() if len(points) > 1}
    if name == "beta" and not companions:
        for condition in table.conditions:
            label, base = (
                table.label(replace(condition, settings=condition.settings | ignored)),
                table.baseline(condition),
            )
            if label in lines and base is not None:
                lines[label].setdefault(0.0, per_run(base.curves, "reward"))
    return lines


def _companions(table: Table, name: str) -> list[str]:
    """Settings that vary one to one with this one, such as a KL target per length: no line could be of one of them."""
    numeric = [condition.settings for condition in table.conditions if isinstance(condition.settings[name], float)]
    companions = []
    for other in table.varied:
        both = {(settings[name], settings[other]) for settings in numeric}
        if other not in ("method", name) and len(both) == len({x for x, _ in both}) == len({y for _, y in both}):
            companions.append(other)
    return companions


def _with_companions(table: Table, name: str) -> str:
    """``length (with algo.kl.target)``."""
    companions = ", ".join(SYMBOLS.get(other, other) for other in _companions(table, name))
    return SYMBOLS.get(name, name) + (f" (with {companions})" if companions else "")
