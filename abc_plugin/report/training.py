"""Recorded completions as HTML: one fold per step, each completion with its heat map and its value and advantage."""

from __future__ import annotations

from html import escape

from abc_plugin.report.records import Record, by_step
from abc_plugin.report.style import CSS
from abc_plugin.report.tokens import completion, legend, visible

TOKENS = 20_000  # on a page, about 8 MB: of more, evenly spaced steps are shown
CHARTS = (("value", "critic's value, reward units"), ("advantage", "advantage, as the policy's loss gets it"))
WIDTH, HEIGHT = 600, 60  # of a chart, in its own units; it is stretched to the card


def section(records: list[Record], notes: list[str]) -> str:
    """The page's part on training: the recorded steps, all or evenly spaced, the last one open."""
    if not records:
        return ""
    steps = by_step(records)
    shown = _fitting(steps)
    what = f"all {len(steps)}" if len(shown) == len(steps) else f"{len(shown)} evenly spaced ones of {len(steps)}"
    how = (
        f"Completions of the rollouts, as the policy was trained on them; {what} recorded steps, and of each the "
        "completions at evenly spaced ranks of the score, the best and the worst among them."
    )
    warnings = "".join(f'<p class="muted">{escape(visible(note))}</p>' for note in notes)
    folds = "".join(_fold(step, steps[step], opened=step == shown[-1]) for step in shown)
    key = legend(any(record.signed for step in shown for record in steps[step]))
    return f'<h2>Completions in training</h2><p class="muted">{how}</p>{warnings}{key}{folds}'


def fragment(records: list[Record]) -> str:
    """Some records as a page of their own, for trackers."""
    key = legend(any(record.signed for record in records))
    return f'<meta charset="utf-8"><style>{CSS}</style>{key}{"".join(map(_article, records))}'


def _fitting(steps: dict[int, list[Record]]) -> list[int]:
    """As many evenly spaced steps as have about TOKENS tokens, the first and the last among them."""
    numbers = list(steps)
    total = sum(len(record.tokens) for records in steps.values() for record in records)
    count = min(len(numbers), max(2, len(numbers) * TOKENS // max(total, 1)))
    if count < 2 or count == len(numbers):
        return numbers
    return [numbers[i * (len(numbers) - 1) // (count - 1)] for i in range(count)]


def _fold(step: int, records: list[Record], *, opened: bool) -> str:
    scores = ", ".join(f"{record.reward:.2f}" for record in records)
    head = f"Step {step}: {len(records)} completion{'s' * (len(records) > 1)} with scores {scores}"
    articles = "".join(map(_article, records))
    return f"<details{' open' * opened}><summary>{head}</summary>{articles}</details>\n"


def _article(record: Record) -> str:
    charts = "".join(_chart(record, field, what) for field, what in CHARTS if field in record.columns)
    return (
        f"<article><h3>{escape(visible(record.caption))}</h3>"
        f'<div class="prompt">{escape(visible(record.prompt))}</div>'
        f'<div class="card"><div class="text">{completion(record)}</div>{charts}</div></article>\n'
    )


def _chart(record: Record, field: str, what: str) -> str:
    """One bar per token from zero, orange above and blue below; the largest and the smallest value in words."""
    values = record.columns[field]
    finite = [value for value in values if value is not None and abs(value) < float("inf")]
    if len(finite) < 2:
        return ""
    low, high = min(0.0, *finite), max(0.0, *finite)
    scale = HEIGHT / ((high - low) or 1.0)
    wide = WIDTH / len(values)
    bars = "".join(
        f'<rect class="{"neg" if value < 0 else "pos"}" '
        f'x="{at * wide:.1f}" y="{(high - max(value, 0.0)) * scale:.1f}" '
        f'width="{0.85 * wide:.1f}" height="{abs(value) * scale:.1f}"/>'
        for at, value in enumerate(values)
        if value is not None and abs(value) < float("inf")
    )
    zero = f'<line x1="0" x2="{WIDTH}" y1="{high * scale:.1f}" y2="{high * scale:.1f}"/>'
    words = f"{what}, per token in order: {min(finite):+.2f} to {max(finite):+.2f}"
    return (
        f'<figure class="chart"><figcaption>{words}</figcaption><svg role="img" aria-label="{words}" '
        f'style="width:min(100%,{1.4 * len(values):.1f}rem)" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none">{bars}{zero}</svg></figure>'
    )
