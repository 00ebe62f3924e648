"""The curves of one or several runs, as a PNG."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from abc_plugin.report import plots
from abc_plugin.report.runs import KL, REWARD, WINDOW, Curve, Run, by_group, smooth

SHARE = "share of the credit"
PANELS = (  # title, unit, tags of which the first present is drawn
    ("Reward of the rollouts", "mean reward (reward model's units)", REWARD),
    ("KL from the starting policy", "nats per token", KL),
    ("Entropy of the credit", "nats (uniform over n tokens: ln n)", ("train/credit_entropy",)),
    ("Credit on the last token", SHARE, ("train/credit_last_token",)),
)


def draw(runs: list[Run], *, columns: int = 2, dark: bool = False) -> bytes:
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
