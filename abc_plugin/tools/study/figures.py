"""A study's pictures, as PNGs; a panel per group of conditions that may be compared."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable
from dataclasses import replace

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy import stats

from abc_plugin.report.curves import LINES, PANEL_INCHES, THEMES
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
FOREST = ("reward", EQUAL_KL, "kl")
_, INK, GRID, COLOURS = THEMES[False]
MARKERS = "osD^vPX<>"

Style = tuple[str, str, str]  # line, colour, marker
Panels = list[tuple[str, list[Condition]]]


def draw(analysis: Analysis, mark: str) -> tuple[dict[str, bytes], dict[str, str]]:
    """PNGs and captions by file name; ``mark`` is written into each as the software that made it."""
    table, styles = analysis.table, _styles(analysis.table)
    captions: dict[str, str] = {}
    figures: dict[str, Figure] = {}
    with matplotlib.rc_context(_theme()):
        for metric, (what, unit) in UNITS.items():
            if panels := _panels(table, metric):
                captions[f"{metric}.png"] = f"{what} over training: {CURVES}"
                curve = functools.partial(_curve, metric=metric)
                figures[f"{metric}.png"] = _grid(panels, styles, table, curve, "PPO step", unit)
        if panels := _panels(table, "kl"):
            captions["frontier.png"] = FRONTIER
            figures["frontier.png"] = _grid(panels, styles, table, _frontier, UNITS["kl"][1], UNITS["reward"][1])
        if any(comparison.seeds for comparison in analysis.comparisons):
            captions["differences.png"] = DIFFERENCES
            figures["differences.png"] = _forest(analysis)
        for name in table.varied:
            if figure := _sweep(table, name):
                file = f"sweep_{_file_name(name)}.png"
                captions[file], figures[file] = SWEEP.format(_swept(table, name)), figure
        return {name: _png(figure, mark) for name, figure in figures.items()}, captions


def _file_name(setting: str) -> str:
    return "".join(char if char.isalnum() and char.isascii() else "_" for char in setting)


def _theme() -> dict[str, object]:
    spines = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    return spines | {"axes.grid": True, "grid.color": GRID, "text.parse_math": False, "axes.axisbelow": True}


def _png(figure: Figure, mark: str) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130, metadata={"Software": mark})
    return drawn.getvalue()


def _styles(table: Table) -> dict[str, Style]:
    """A style per method and beta, the same in all pictures."""
    names = list(dict.fromkeys(table.label(condition, group=False) for condition in _by_method(table)))
    looks = itertools.cycle((line, colour) for line in LINES for colour in COLOURS)
    return {name: (*next(looks), MARKERS[place % len(MARKERS)]) for place, name in enumerate(names)}


def _by_method(table: Table) -> list[Condition]:
    return sorted(table.conditions, key=lambda c: (c.method != BASELINE, c.method))


def _panels(table: Table, metric: str) -> Panels:
    """Conditions with the metric, by group; of more than MOST, the baseline is in each part."""
    panels: Panels = []
    for conditions in table.groups().values():
        having = [c for c in conditions if metric in c.curves]
        base = [c for c in having if c.method == BASELINE]
        others = [c for c in having if c.method != BASELINE]
        room = MOST - len(base)
        parts = [others[i : i + room] for i in range(0, len(others), room)] or [[]]
        panels += [
            (table.group_label(conditions[0]) or table.usual_label, base + part) for part in parts if base + part
        ]
    return panels


def _grid(
    panels: Panels, styles: dict[str, Style], table: Table, draw_one: Callable[..., Line2D], x: str, y: str
) -> Figure:
    """A panel each, on common axes, with one legend."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = max(PANEL_INCHES[0] * columns * 0.85, 6.4), PANEL_INCHES[1] * rows + 0.9
    figure = Figure(figsize=(width, height), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    handles = {}
    for axes, (title, conditions) in zip(places.flatten(), panels, strict=False):
        for condition in conditions:
            name = table.label(condition, group=False)
            handles.setdefault(name, draw_one(axes, condition, styles[name]))
        axes.set_title(title, fontsize=10)
    for place, axes in enumerate(places.flatten()):
        if place >= len(panels):
            places.flatten()[place - columns].tick_params(labelbottom=True)
            axes.remove()
    ncols = min(len(handles), 1 + 2 * columns)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=ncols, frameon=False)
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    return figure


def _curve(axes: Axes, condition: Condition, style: Style, metric: str) -> Line2D:
    line, colour, _ = style
    smooth_NT = centred(condition.curves[metric])
    mean_T, n = smooth_NT.mean(0), len(smooth_NT)
    if n > 1:
        half_T = stats.t.ppf(UPPER, n - 1) * smooth_NT.std(0, ddof=1) / np.sqrt(n)
        axes.fill_between(condition.steps, mean_T - half_T, mean_T + half_T, color=colour, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes.plot(condition.steps, mean_T, linestyle=line, color=colour, linewidth=1.8)[0]


def _frontier(axes: Axes, condition: Condition, style: Style) -> Line2D:
    line, colour, marker = style
    kl_NT, reward_NT = centred(condition.curves["kl"]), centred(condition.curves["reward"])
    if len(kl_NT) > 1:
        axes.plot(kl_NT.T, reward_NT.T, color=colour, linewidth=0.6, alpha=0.22)
    mean_kl_T, mean_T = kl_NT.mean(0), reward_NT.mean(0)
    axes.plot(mean_kl_T[-1], mean_T[-1], marker, color=colour, markersize=7, markeredgecolor="white", zorder=4)
    return axes.plot(mean_kl_T, mean_T, linestyle=line, color=colour, linewidth=2, zorder=3)[0]


def _forest(analysis: Analysis) -> Figure:
    """A row per comparison, a panel per measure."""
    comparisons = [c for c in analysis.comparisons if c.seeds]
    names = [
        f"{analysis.table.label(c.condition)} − {analysis.table.label(c.other, group=False)}" for c in comparisons
    ]
    measures = [name for name in FOREST if any(name in c.paired for c in comparisons)]
    width = 3.1 * len(measures) + 0.075 * max(map(len, names))
    figure = Figure(figsize=(max(width, 6.4), 1.1 + 0.36 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(measures), sharey=True, squeeze=False)[0], measures, strict=True):
        for place, comparison in enumerate(comparisons):
            if found := comparison.paired.get(name):
                at = found.difference
                error = None if at.low is None else [[at.value - at.low], [at.high - at.value]]
                fill = COLOURS[0] if found.significant else "white"
                axes.errorbar(at.value, place, xerr=error, fmt="o", color=COLOURS[0], markerfacecolor=fill, capsize=3)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_title(WORDS[name], fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_yticks(range(len(names)), labels=names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return figure


def _sweep(table: Table, name: str) -> Figure | None:
    """Mean ± standard deviation of reward over training against one numeric setting, a line per what else is equal."""
    lines = _sweep_lines(table, name)
    if not lines:
        return None
    names = list(lines)
    parts = [names[i : i + MOST] for i in range(0, len(names), MOST)]
    figure = Figure(figsize=(6.4, 3.4 * len(parts) + 0.3 * min(len(names), MOST)), layout="constrained")
    looks = itertools.cycle((line, colour) for line in LINES for colour in COLOURS)
    for axes, part in zip(figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts, strict=True):
        ticks = sorted({x for label in part for x in lines[label]})
        apart = 0.012 * (ticks[-1] - ticks[0])  # equal points are drawn side by side
        for place, label in enumerate(part):
            points = sorted(lines[label].items())
            x = [x + apart * (place - (len(part) - 1) / 2) for x, _ in points]
            line, colour = next(looks)
            style = {"fmt": MARKERS[place], "linestyle": line, "color": colour, "capsize": 3, "label": label}
            axes.errorbar(x, [v.mean() for _, v in points], yerr=[_deviation(v) for _, v in points], **style)
        axes.set_xticks(ticks)
        axes.set(xlabel=_swept(table, name), ylabel="mean reward over training")
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1 + (len(part) > 3), frameon=False, fontsize=9
        )
    return figure


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _sweep_lines(table: Table, name: str) -> dict[str, dict[float, np.ndarray]]:
    """Lines with two or more values of the setting: what else varies as label, then x and a number per run."""
    along = _along(table, name)
    left_out = dict.fromkeys([name, *along])
    lines: dict[str, dict[float, np.ndarray]] = {}
    for condition in table.conditions:
        x = condition.settings[name]
        if isinstance(x, float):
            label = table.label(replace(condition, settings=condition.settings | left_out))
            lines.setdefault(label, {})[x] = per_run(condition.curves, "reward")
    lines = {label: points for label, points in lines.items() if len(points) > 1}
    if name == "beta" and not along:
        for condition in table.conditions:
            label = table.label(replace(condition, settings=condition.settings | left_out))
            base = table.baseline(condition)
            if label in lines and base is not None:
                lines[label].setdefault(0.0, per_run(base.curves, "reward"))
    return lines


def _along(table: Table, name: str) -> list[str]:
    """Settings that vary one to one with this one, such as a KL target per length: no line could be of one of them."""
    having = [c.settings for c in table.conditions if isinstance(c.settings[name], float)]
    found = []
    for other in table.varied:
        both = {(settings[name], settings[other]) for settings in having}
        if other not in ("method", name) and len(both) == len({x for x, _ in both}) == len({y for _, y in both}):
            found.append(other)
    return found


def _swept(table: Table, name: str) -> str:
    """The setting, and what varies along with it: ``length (with algo.kl.target)``."""
    along = _along(table, name)
    return SYMBOLS.get(name, name) + (f" (with {', '.join(SYMBOLS.get(x, x) for x in along)})" if along else "")
