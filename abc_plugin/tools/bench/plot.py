"""The ratios of ``abc-rlhf bench recovery`` as a picture; the only module here that needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from abc_plugin.errors import UserError

if TYPE_CHECKING:
    from abc_plugin.tools.bench.cost import Cost

# Okabe and Ito's colours, told apart by colour-blind readers.
STYLES = {
    "credit": ("#0072B2", "o"),
    "eager re-run": ("#009E73", "s"),
    "eager, all layers": ("#D55E00", "^"),
}
LINES = ("-", "--", ":", "-.")  # one per batch size


def draw(costs: list[Cost], path: str) -> None:
    """Two panels over tokens: time and peak memory over the plain forward's; one line per variant and batch size."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'abc-plugin[report]'") from None
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    time, memory = figure.subplots(1, 2)
    batches = sorted({cost.batch for cost in costs})
    for variant, (colour, marker) in STYLES.items():
        for place, batch in enumerate(batches):
            mine = [cost for cost in costs if cost.batch == batch and variant in cost.peak]
            mine.sort(key=lambda cost: cost.tokens)
            if not mine:
                continue
            tokens = [cost.tokens for cost in mine]
            look = {"color": colour, "marker": marker, "linestyle": LINES[place % len(LINES)]}
            low, middle, high = zip(*(cost.time_ratios(variant) for cost in mine), strict=True)
            label = variant if len(batches) == 1 else f"{variant}, batch {batch}"
            time.plot(tokens, middle, label=label, **look)
            time.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
            memory.plot(tokens, [cost.memory_ratio(variant) for cost in mine], **look)
    for axes, title in ((time, "Time"), (memory, "Peak memory above the model")):
        axes.set_title(f"{title}, ratio to the plain forward", loc="left", fontsize=10)
        axes.set_xlabel("tokens")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({cost.tokens for cost in costs}), labels=sorted({cost.tokens for cost in costs}))
        axes.minorticks_off()
        axes.axhline(1.0, color="#222222", linewidth=0.8)
        axes.grid(color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    memory.set_yscale("log")
    memory.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--png {path} cannot be written: {error}") from None
