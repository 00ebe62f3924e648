"""The lab's picture: four panels over beta, a line per method and kind of evidence."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from abc_plugin.tools.lab.outcome import summary
from abc_plugin.tools.lab.study import Row

# Okabe and Ito's colours, told apart by colour-blind readers: one per method; none is the grey line.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
APART = 0.008  # equal points are drawn side by side
PANELS = (
    ("cosine", "Cosine with the true gradient", False),
    ("flips", "Logits pushed the wrong way", True),
    ("gain", "Reward gained by ascent, of what there is to gain", True),
    ("noise_no_critic", "Noise of one completion without critic, to none's", False),
)


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Write the PNG. At beta = 0 every method is none, so all lines start there."""
    none = next(row for row in rows if row.case.name == "none")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.case.name != "none" and row.lambda_ == none.lambda_:
            lines.setdefault(row.case.label, []).append(row)
    methods = list(dict.fromkeys(row.case.name for mine in lines.values() for row in mine))
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    for axes, (name, heading, percent) in zip(figure.subplots(2, 2).flatten(), PANELS, strict=True):
        _panel(axes, name, none, lines, methods)
        axes.set_title(heading, loc="left", fontsize=10.5)
        if percent:
            axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=140)


def _panel(axes: Axes, name: str, none: Row, lines: dict[str, list[Row]], methods: list[str]) -> None:
    scale = summary(none, name) if name.startswith("noise") else 1.0
    start = summary(none, name) / scale
    axes.axhline(start, color="#777777", linewidth=1.2, linestyle=":", label="none", zorder=1)
    for number, (label, mine) in enumerate(lines.items()):
        place = methods.index(mine[0].case.name)
        plain = mine[0].case.kind in ("", "random")
        colour = COLOURS[place % len(COLOURS)]
        aside = APART * (number - (len(lines) - 1) / 2)
        axes.plot(
            [0.0, *(row.beta + aside for row in mine)],
            [start, *(summary(row, name) / scale for row in mine)],
            color=colour,
            marker=MARKERS[place % len(MARKERS)],
            markerfacecolor=colour if plain else "white",
            linestyle="-" if plain else "--",
            linewidth=1.8,
            markersize=6,
            label=label,
        )
    axes.set_xlabel("beta")
    axes.grid(color="#e3e3e3", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
