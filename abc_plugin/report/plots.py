"""The one style of all figures: light and dark, Okabe and Ito's colours, panels, intervals, and PNGs that stay small.

with plots.style(dark):
    figure, axes = plots.panels(4, columns=2)
    ...
    return plots.png(figure)
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo


class Theme(NamedTuple):
    background: str
    ink: str
    grid: str
    colours: tuple[str, ...]  # Okabe and Ito's, told apart by colour-blind readers; lightened for the dark theme


LIGHT = Theme(
    "#ffffff",
    "#222222",
    "#dddddd",
    ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#555555"),
)
DARK = Theme(
    "#16181c",
    "#e4e4e4",
    "#3a3d44",
    ("#6CBBEF", "#FF9A57", "#45CFA3", "#E79CC8", "#F2C14A", "#9AD4F5", "#B79BD0", "#B8B8B8"),
)
GREY = "#888888"  # baselines
LINES = ("-", "--", ":", "-.")
MARKERS = "os^DvPX<>"
SIGNED = "PuOr_r"  # colour map: orange above 0 and purple below
PANEL_INCHES = (5.2, 3.1)
SMALL = 8.5  # points, of captions


class Look(NamedTuple):
    """How one method, variant or group is drawn, the same in all panels."""

    colour: str
    line: str
    marker: str


@contextmanager
def style(dark: bool = False) -> Iterator[Theme]:
    """Figures drawn and saved within have the package's style. Also a decorator: ``@plots.style()``."""
    theme = DARK if dark else LIGHT
    settings: dict[str, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), theme.ink
    )
    settings |= {"figure.facecolor": theme.background, "axes.facecolor": theme.background, "grid.color": theme.grid}
    settings |= {"axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"axes.titlelocation": "left", "axes.titlesize": 10.5, "legend.frameon": False, "legend.fontsize": 9}
    settings["text.parse_math"] = False  # a label with two $ is no formula
    with matplotlib.rc_context(settings):
        yield theme


def looks(names: Iterable[str], *, grey: Collection[str] = (), dark: bool = False) -> dict[str, Look]:
    """A look per name, in order; those in ``grey``, the baselines, are grey and dashed, told apart by markers."""
    colours = (DARK if dark else LIGHT).colours
    styles: dict[str, Look] = {}
    for name in dict.fromkeys(names):
        of_kind = sum((other in grey) == (name in grey) for other in styles)
        if name in grey:
            styles[name] = Look(GREY, "--", "x1+|2"[of_kind % 5])
        else:
            line = LINES[of_kind // len(colours) % len(LINES)]
            styles[name] = Look(colours[of_kind % len(colours)], line, MARKERS[of_kind % len(MARKERS)])
    return styles


def panels(
    count: int,
    columns: int = 2,
    *,
    panel: tuple[float, float] = PANEL_INCHES,
    above: float = 0.6,
    keep_columns: bool = False,
    **shared: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels in rows of ``columns``, ``panel`` inches each and ``above`` inches for a legend.

    keep_columns: also where there are fewer panels, so that those of two figures are as wide.
    shared: e.g. sharex=True, as of ``Figure.subplots``.
    """
    columns = columns if keep_columns else min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows + above), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for empty in range(count, rows * columns):
        axes[max(0, empty - columns)].tick_params(labelbottom=True)  # with a shared axis only the last row has labels
        axes[empty].remove()
    return figure, axes[:count]


def legend(figure: Figure, columns: int = 4, where: str = "outside upper center") -> None:
    """One legend for all panels, an entry per label: a label may be missing from the first panel."""
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc=where, ncols=max(1, min(len(handles), columns)))


def caption(figure: Figure, text: str) -> None:
    """What the figure shows, in small letters under it."""
    figure.supxlabel(text, fontsize=SMALL)


def band(axes: Axes, x: Any, low: Any, high: Any, look: Look) -> None:
    """The interval of a curve."""
    axes.fill_between(x, low, high, color=look.colour, alpha=0.16, linewidth=0)


def interval(
    axes: Axes, row: float, value: float, ends: tuple[float | None, float | None], look: Look, filled: bool = True
) -> None:
    """A value with its interval on a row of a forest plot; ends of None: without one."""
    low, high = ends
    error = None if low is None or high is None else [[value - low], [high - value]]
    fill = look.colour if filled else matplotlib.rcParams["axes.facecolor"]
    axes.errorbar(
        value, row, xerr=error, color=look.colour, marker=look.marker, markerfacecolor=fill, linestyle="", capsize=3
    )


def rows(axes: Axes, labels: Iterable[str]) -> None:
    """The rows of a forest plot, the first on top, with a line at 0."""
    labels = list(labels)
    axes.axvline(0, color=matplotlib.rcParams["axes.edgecolor"], linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels=labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def side_by_side(x: Iterable[float], number: int, count: int, apart: float) -> np.ndarray:
    """x moved for the ``number``-th of ``count`` lines, so that equal points do not hide each other."""
    return np.asarray(list(x), dtype=float) + apart * (number - (count - 1) / 2)


def png(figure: Figure, *, software: str | None = None, dpi: int = 150) -> bytes:
    """The picture in 256 colours, a third of the size; the same bytes for the same figure.

    software: written into the file as what made it.
    """
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    info = PngInfo()
    if software is not None:
        info.add_text("Software", software)
    Image.open(drawn).convert("RGB").quantize(256).save(small, format="png", optimize=True, pnginfo=info)
    return small.getvalue()
