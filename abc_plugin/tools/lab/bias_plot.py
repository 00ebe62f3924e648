"""The lab's picture: four panels over beta, a line per method and kind of evidence."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from abc_plugin.report import plots

APART = 0.008  # equal points are drawn side by side
PANELS = (
    ("cosine", "Cosine with the true gradient", False),
    ("flips", "Logits pushed the wrong way", True),
    ("gain", "Reward gained by ascent, of what there is to gain", True),
    ("noise_no_critic", "Noise of one completion without critic, to none's", False),
)


@plots.style()
def draw(summary: pd.DataFrame, title: str) -> bytes:
    """The PNG. At beta = 0 every method is none, so all lines start there."""
    first = summary[summary["lambda"] == summary["lambda"].iloc[0]]
    none, dense = first[first.method == "none"].iloc[0], first[first.method != "none"]
    figure, axes = plots.panels(4)
    for axis, (name, heading, percent) in zip(axes, PANELS, strict=True):
        scale = none[name] if name.startswith("noise") else 1.0
        _panel(axis, none[name] / scale, dense.assign(value=dense[name] / scale))
        axis.set(title=heading, xlabel="beta")
        if percent:
            axis.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    plots.legend(figure, columns=1, where="outside right center")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return plots.png(figure)


def _panel(axis: Axes, start: float, dense: pd.DataFrame) -> None:
    """Colours tell methods apart; filled markers and whole lines: random evidence, or none needed."""
    axis.axhline(start, color=plots.GREY, linestyle=":", label="none", zorder=1)
    looks, labels = plots.looks(dense.method), list(dense.credit.unique())
    for number, (label, lines) in enumerate(dense.groupby("credit", sort=False)):
        look, plain = looks[lines.method.iloc[0]], lines.evidence.iloc[0] in ("", "random")
        axis.plot(
            [0.0, *plots.side_by_side(lines.beta, number, len(labels), APART)],
            [start, *lines.value],
            color=look.colour,
            marker=look.marker,
            markerfacecolor=look.colour if plain else "white",
            linestyle="-" if plain else "--",
            label=label,
        )
