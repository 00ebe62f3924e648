"""The audit's pictures, as PNGs: agreement with leave-one-out, curves, and a map of layers and heads."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from abc_plugin.report import plots
from abc_plugin.tools.audit.completion_measures import POINTS
from abc_plugin.tools.audit.correlations import intervals
from abc_plugin.tools.audit.head_map import HeadMap
from abc_plugin.tools.audit.summary_table import LEAVE_ONE_OUT, RANDOM, RECENCY, Record, Summary, prompts

GREY = (RANDOM, RECENCY, "uniform")
AGREEMENT = {
    "spearman": "Rank correlation with leave-one-out",
    "size": "The same of sizes, without signs",
    "separation": "Curves apart (score units)",
}
CURVES = {  # in the order of the share: removed from the whole, or, read backwards, put into the prompt
    "highest": ("Deletion: the tokens of highest credit go first", "score minus that of the whole", "removed", 1),
    "lowest": ("Insertion: the tokens of highest credit come first", "score minus that of the prompt", "put in", -1),
}


def label(method: str) -> str:
    """leave-one-out, in words."""
    return method.replace("_", "-") if method == LEAVE_ONE_OUT else method


@plots.style()
def agreement(summary: Summary) -> bytes:
    """Rank correlation with leave-one-out (signed, and sizes) and separation of the curves, with intervals."""
    looks = plots.looks(summary, grey=GREY)
    figure, axes = plots.panels(3, 3, panel=(3.5, 0.8 + 0.36 * len(summary)), sharey=True)
    for axis, (name, title) in zip(axes, AGREEMENT.items(), strict=True):
        plots.rows(axis, map(label, summary))
        axis.set_title(title)
        for row, (method, estimates) in enumerate(summary.items()):
            if estimate := estimates[name]:
                plots.interval(axis, row, estimate.mean, (estimate.low, estimate.high), looks[method])
            else:
                axis.text(0, row, " not defined", va="center", fontsize=plots.SMALL)
    plots.caption(figure, "mean and 95 % interval over prompts; 0 is what uniform and random credit have")
    return plots.png(figure)


@plots.style()
def curves(records: list[Record]) -> bytes:
    """Mean change of the score along the deletion and the insertion curve; bands: 95 % intervals of two of them."""
    methods, index = list(records[0]["curves"]), prompts(records)
    looks, share = plots.looks(methods, grey=GREY), np.linspace(0, 100, POINTS + 1)
    figure, axes = plots.panels(2, panel=(5.2, 3.6))
    for axis, (way, (title, unit, what, step)) in zip(axes, CURVES.items(), strict=True):
        for method in methods:
            scores = pd.DataFrame([record["curves"][method][way][::step] for record in records], index)
            points = list(intervals(scores.sub(scores[0], axis=0)).values())
            look, means = looks[method], [point.mean for point in points]
            axis.plot(share, means, look.line, color=look.colour, marker=look.marker, ms=4.5, label=label(method))
            if method in ("abc", RANDOM):
                plots.band(axis, share, [point.low for point in points], [point.high for point in points], look)
        axis.set(title=title, xlabel=f"share of the completion's tokens {what}, %", ylabel=unit)
    plots.legend(figure, columns=8)
    plots.caption(
        figure,
        "means; bands: 95 % intervals over prompts of abc and random. Curves of one completion move together, so "
        "that two may differ\nmore surely than their bands suggest; “curves apart” has intervals of such pairs",
    )
    return plots.png(figure)


@plots.style()
def heads(head_map: HeadMap) -> bytes:
    """Layers x (mean row, heads): rank correlation of reward · row with the effects; the layer read in a box."""
    layers, number = head_map.signed_LH.shape
    panel = (max(4.8, min(9.4, 0.34 * number + 2.0)), max(2.6, min(13.4, 0.3 * layers + 0.9)))
    figure, [axis] = plots.panels(1, panel=panel)
    values_LX = np.column_stack([head_map.signed_L, head_map.signed_LH])
    bound = max(0.05, np.abs(np.nan_to_num(values_LX)).max())
    image = axis.imshow(values_LX, aspect="auto", interpolation="nearest", cmap=plots.SIGNED, vmin=-bound, vmax=bound)
    every = max(1, number // 16)
    ticks = [0, *range(1 if every == 1 else 1 + every, number + 1, every)]  # 0 beside "all" only where it has room
    axis.set_xticks(ticks, labels=["all" if tick == 0 else str(tick - 1) for tick in ticks])
    every = max(1, layers // 16)
    axis.set_yticks(range(0, layers, every), labels=map(str, head_map.layers[::every]))
    axis.set(title="Reward · attention with the effects of removal", xlabel="head", ylabel="layer")
    axis.grid(False)
    axis.axvline(0.5, color=plots.LIGHT.ink, linewidth=0.8)
    corner = (-0.47, head_map.configured - 0.47)
    axis.add_patch(Rectangle(corner, number + 0.94, 0.94, fill=False, edgecolor=plots.LIGHT.ink))
    for marked, mark in ((head_map.carrying, "+"), (head_map.against, "−")):
        for layer, head in marked:
            axis.text(head + 1, head_map.layers.index(layer), mark, ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=axis, label="mean rank correlation", fraction=0.04)
    plots.caption(
        figure,
        "all: a layer's mean row; box: the layer read now; + and −: the interval, widened for the number of heads,\n"
        "lies off 0",
    )
    return plots.png(figure)
