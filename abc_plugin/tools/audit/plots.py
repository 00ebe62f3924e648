"""The audit's pictures, as PNGs: agreement with leave-one-out, curves, and two maps of layers and heads."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from abc_plugin.tools.audit.heads import Map
from abc_plugin.tools.audit.measure import LEAVE_ONE_OUT, POINTS, RANDOM, RECENCY
from abc_plugin.tools.audit.stats import Interval, interval
from abc_plugin.tools.audit.summary import prompts

# Okabe and Ito's colours and markers, told apart by colour-blind readers; the baselines are grey.
STYLES = {
    "abc": ("#0072B2", "o"),
    "prefix": ("#009E73", "s"),
    "grad_input": ("#D55E00", "^"),
    "none": ("#CC79A7", "v"),
    LEAVE_ONE_OUT: ("#222222", "D"),
    RANDOM: ("#888888", "x"),
    RECENCY: ("#888888", "1"),
    "uniform": ("#888888", "+"),
}
OTHERS = (("#E69F00", "P"), ("#56B4E9", "X"), ("#B59F00", "<"), ("#7A5195", ">"))
# title, and what uniform credit has, of ``summary.background``
SHARES = {
    "entropy": ("Entropy, as a share of uniform's", None),
    "first": ("On the first token", "one token"),
    "last": ("On the last token", "one token"),
    "punctuation": ("On punctuation", "punctuation"),
    "special": ("On special tokens", "special"),
}
SIGNED = "PuOr_r"  # orange above 0 and purple below, for colour-blind readers too


def _style(method: str, methods: list[str]) -> tuple[str, str]:
    others = [name for name in methods if name not in STYLES]
    return STYLES[method] if method in STYLES else OTHERS[others.index(method) % len(OTHERS)]


def label(method: str) -> str:
    return method.replace("_", "-") if method == LEAVE_ONE_OUT else method


def agreement(summary: dict[str, dict[str, Interval | None]]) -> bytes:
    """Rank correlation with leave-one-out (signed, and sizes) and separation of the curves, with intervals."""
    methods = list(summary)
    figure = Figure(figsize=(10.5, 1.4 + 0.36 * len(methods)), layout="constrained")
    panels = {
        "spearman": "Rank correlation with leave-one-out",
        "size": "The same of sizes, without signs",
        "separation": "Curves apart (score units)",
    }
    for axes, (name, title) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        for place, method in enumerate(methods):
            estimate = summary[method][name]
            if estimate is None:
                axes.text(0, place, " not defined", va="center", fontsize=8, color="#666666")
                continue
            colour, marker = _style(method, methods)
            ends = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
            axes.errorbar(estimate.mean, place, xerr=ends, color=colour, marker=marker, capsize=3, linestyle="")
        axes.axvline(0, color="#222222", linewidth=0.8)
        axes.set_title(title, loc="left", fontsize=10)
        _tidy(axes)
    axes.set_yticks(range(len(methods)), labels=map(label, methods))
    axes.set_ylim(len(methods) - 0.5, -0.5)
    figure.supxlabel("mean and 95 % interval over prompts; 0 is what uniform and random credit have", fontsize=8.5)
    return _png(figure)


def curves(records: list[dict[str, Any]]) -> bytes:
    """Mean change of the score along the deletion and the insertion curve; bands: 95 % intervals of two of them."""
    methods, groups = list(records[0]["curves"]), prompts(records)
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    share = np.linspace(0, 100, POINTS + 1)
    panels = (
        ("highest", 1, "Deletion: the tokens of highest credit go first", "score minus that of the whole", "removed"),
        (
            "lowest",
            -1,
            "Insertion: the tokens of highest credit come first",
            "score minus that of the prompt",
            "put in",
        ),
    )
    for axes, (way, step, title, unit, what) in zip(figure.subplots(1, 2), panels, strict=True):
        for method in methods:
            lines = np.array([record["curves"][method][way][::step] for record in records])
            points = [interval(list(column), groups) for column in (lines - lines[:, :1]).T]
            colour, marker = _style(method, methods)
            dashed = "--" if method in (RANDOM, RECENCY, "uniform") else "-"
            means = [point.mean for point in points]
            axes.plot(share, means, dashed, color=colour, marker=marker, markersize=4.5, label=label(method))
            if method in ("abc", RANDOM):
                low, high = [point.low for point in points], [point.high for point in points]
                axes.fill_between(share, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlabel=f"share of the completion's tokens {what}, %", ylabel=unit)
        _tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(8, len(methods)), frameon=False, fontsize=9)
    figure.supxlabel(
        "means; bands: 95 % intervals over prompts of abc and random. Curves of one completion move together, so "
        "that two may differ\nmore surely than their bands suggest; “curves apart” has intervals of such pairs",
        fontsize=8.5,
    )
    return _png(figure)


def heads(found: Map) -> bytes:
    """The map, layers x heads: of reward · row with the effects, and of the row with their sizes."""
    layers, number = found.signed_LH.shape
    width = max(3.6, min(9.0, 0.34 * number + 1.6))
    figure = Figure(figsize=(2 * width + 0.8, max(3.2, min(14.0, 0.3 * layers + 1.5))), layout="constrained")
    panels = (
        (np.column_stack([found.signed_L, found.signed_LH]), "Reward · attention with the effects of removal"),
        (np.column_stack([found.size_L, found.size_LH]), "Attention with the sizes of the effects"),
    )
    bound = max(0.05, *(np.abs(np.nan_to_num(values)).max() for values, _ in panels))
    for axes, (values, title) in zip(figure.subplots(1, 2), panels, strict=True):
        image = _grid(axes, values, title, found, cmap=SIGNED, vmin=-bound, vmax=bound)
    for marked, mark in ((found.carrying, "+"), (found.against, "−")):
        for layer, head in marked:
            figure.axes[0].text(head + 1, found.layers.index(layer), mark, ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=figure.axes, label="mean rank correlation", fraction=0.04)
    figure.supxlabel(
        "all: a layer's mean row; box: the layer read now; left, + and −: the interval, widened for the number of "
        "heads, lies off 0",
        fontsize=8.5,
    )
    return _png(figure)


def shares(found: Map, scene: dict[str, Interval | None]) -> bytes:
    """Where the attention of each layer and head lies on the completion, and its entropy: a panel each."""
    layers, number = found.signed_LH.shape
    width, height = max(3.6, min(6.0, 0.2 * number + 1.8)), max(2.4, min(9.0, 0.16 * layers + 1.2))
    figure = Figure(figsize=(3 * width, 2 * height + 0.3), layout="constrained")
    *panels, rest = figure.subplots(2, 3).flat
    rest.axis("off")
    for axes, (name, (title, known)) in zip(panels, SHARES.items(), strict=True):
        values = np.column_stack([found.shares_L[name], found.shares_LH[name]])
        top = 1.0 if name == "entropy" else max(0.01, np.nan_to_num(values).max())
        image = _grid(axes, values, title, found, cmap="Blues", vmin=0, vmax=top)
        bar = figure.colorbar(image, ax=axes, fraction=0.06)
        if known and (uniform := scene[known]) is not None and uniform.mean <= top:
            bar.ax.axhline(uniform.mean, color="#D55E00", linewidth=2)
    figure.supxlabel(
        "attention of the token whose score is read, renormalised over the completion; means over prompts\n"
        "all: a layer's mean row; box: the layer read now; orange on a scale: what uniform credit has",
        fontsize=8.5,
    )
    return _png(figure)


def _grid(axes: Axes, values_LX: np.ndarray, title: str, found: Map, **colours: Any) -> AxesImage:
    """A picture of layers x (mean row, heads), the layer that is read in a box."""
    number = values_LX.shape[1] - 1
    image = axes.imshow(values_LX, aspect="auto", interpolation="nearest", **colours)
    axes.set_title(title, loc="left", fontsize=10)
    every = max(1, number // 16)
    places = [0, *range(1 if every == 1 else 1 + every, number + 1, every)]  # 0 beside "all" only where it has room
    axes.set_xticks(places, labels=["all" if place == 0 else str(place - 1) for place in places])
    every = max(1, len(found.layers) // 16)
    axes.set_yticks(range(0, len(found.layers), every), labels=map(str, found.layers[::every]))
    axes.set(xlabel="head", ylabel="layer")
    axes.axvline(0.5, color="#222222", linewidth=0.8)
    row = Rectangle((-0.47, found.configured - 0.47), number + 0.94, 0.94, fill=False, edgecolor="#222222")
    axes.add_patch(row)
    return image


def _tidy(axes: Axes) -> None:
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, metadata={"Software": None})
    return drawn.getvalue()
