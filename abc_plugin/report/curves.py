"""The curves of one or several runs, as a PNG."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from abc_plugin.report.compare import WINDOW, deviation, mean, smooth, values_of
from abc_plugin.report.scalars import KL, REWARD, Curve, Run, by_group


@dataclass(frozen=True)
class Panel:
    """One plot: its title, the unit of its y axis, and the tags it may be drawn from (first present wins)."""

    title: str
    unit: str
    tags: tuple[str, ...]
    percent: bool = False


PANELS = (
    Panel("Reward of the rollouts", "mean reward (reward model's units)", REWARD),
    Panel("KL from the starting policy", "nats per token", KL),
    Panel("Entropy of the credit", "nats (uniform over n tokens: ln n)", ("train/credit_entropy",)),
    Panel("Credit on the last token", "share of the credit", ("train/credit_last_token",), percent=True),
)

# Okabe and Ito's colours, told apart by colour-blind readers; lightened for the dark theme.
THEMES = {
    False: ("#ffffff", "#222222", "#dddddd", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#555555")),
    True: ("#16181c", "#e4e4e4", "#3a3d44", ("#6CBBEF", "#FF9A57", "#45CFA3", "#E79CC8", "#F2C14A", "#B8B8B8")),
}
LINES = ("-", "--", ":")
PANEL_INCHES = (5.2, 3.1)


def draw(runs: list[Run], *, columns: int = 2, dark: bool = False) -> bytes:
    """A PNG of the panels that some run has data for, ``columns`` panels a row.

    Runs of one group share a colour. One run: each step faint, the trailing mean over WINDOW steps bold. Several:
    the mean over seeds of their trailing means, and a band of one standard deviation, over the steps all of them have.
    """
    panels = [panel for panel in PANELS if any(run.curve(panel.tags) for run in runs)]
    background, ink, grid, colours = THEMES[dark]
    groups = by_group(runs)
    styles = list(itertools.islice(itertools.cycle(itertools.product(LINES, colours)), len(groups)))
    rows = -(-len(panels) // columns)
    theme = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    theme |= {"figure.facecolor": background, "axes.facecolor": background, "grid.color": grid, "axes.grid": True}
    theme |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    theme["text.parse_math"] = False  # a label with two $ is no formula
    with matplotlib.rc_context(theme):
        figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.6), layout="constrained")
        grid_axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(grid_axes, panels, strict=False):  # the last place may stay empty
            _draw_panel(axes, panel, groups, styles)
        for axes in grid_axes[len(panels) :]:
            axes.remove()
        if len(groups) > 1:
            handles, labels = _all_handles(grid_axes[: len(panels)])
            figure.legend(
                handles, labels, loc="outside upper center", ncols=min(len(labels), 2 * columns), frameon=False
            )
        figure.supxlabel(_caption(groups, columns), fontsize=8.5)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=150)
    return _with_palette(drawn)


def _with_palette(drawn: io.BytesIO) -> bytes:
    """The same picture in 128 colours: a third of the size, and a page embeds four of them."""
    png = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(128).save(png, format="png", optimize=True)
    return png.getvalue()


def _draw_panel(axes: Axes, panel: Panel, groups: dict[str, list[Run]], styles: list[tuple[str, str]]) -> None:
    for (group, runs), (line, colour) in zip(groups.items(), styles, strict=True):
        curves = [curve for curve in (run.curve(panel.tags) for run in runs) if curve]
        if not curves:
            continue
        steps, centre, spread = over_seeds(curves)
        label = group if len(curves) == 1 else f"{group} ({len(curves)} seeds)"
        axes.plot(steps, centre, color=colour, linestyle=line, linewidth=2, label=label, zorder=3)
        if len(curves) == 1:
            axes.plot(*zip(*curves[0], strict=True), color=colour, linewidth=1, alpha=0.35)
        else:
            low, high = np.subtract(centre, spread), np.add(centre, spread)
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set(title=panel.title, xlabel="PPO step", ylabel=panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def over_seeds(curves: list[Curve]) -> tuple[list[int], list[float], list[float]]:
    """Steps that all curves have, then mean and standard deviation (n - 1; 0 for one curve) of the smoothed curves."""
    smoothed = [dict(zip(dict(curve), smooth(values_of(curve)), strict=True)) for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in smoothed)))
    at = [[curve[step] for curve in smoothed] for step in steps]
    return steps, [mean(v) for v in at], [deviation(v) if len(v) > 1 else 0.0 for v in at]


def _all_handles(grid_axes: list[Axes]) -> tuple[list, list[str]]:
    """One legend entry per label: a group may be missing from the first panel."""
    found = {}
    for axes in grid_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _caption(groups: dict[str, list[Run]], columns: int) -> str:
    parts = [f"Bold: mean of the last {WINDOW} logged steps"]
    if any(len(runs) == 1 for runs in groups.values()):
        parts.append("faint: each step")
    if any(len(runs) > 1 for runs in groups.values()):
        parts.append("band: ± 1 standard deviation over seeds")
    return (";\n" if columns == 1 else "; ").join(parts) + "."
