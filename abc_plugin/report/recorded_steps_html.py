"""Recorded completions as HTML: one fold per step, each completion with its heat map and its value and advantage."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from abc_plugin.report import html_templates
from abc_plugin.report.recorded_completions import Record, by_step
from abc_plugin.report.samples_file import evenly_spaced

TOKENS = 20_000  # on a page, about 8 MB: of more, evenly spaced steps are shown
CHARTS = (("value", "critic's value, reward units"), ("advantage", "advantage, as the policy's loss gets it"))
WIDTH, HEIGHT = 600, 60  # of a chart, in its own units; it is stretched to the card


def section(records: list[Record], notes: list[str]) -> Markup:
    """The page's part on training: the recorded steps, all or evenly spaced, the last one open."""
    if not records:
        return html_templates.render("report/templates/training.html", notes=notes, steps={}) if notes else Markup()
    steps = by_step(records)
    tokens = sum(len(record.tokens) for record in records)
    shown = evenly_spaced(list(steps), max(2, len(steps) * TOKENS // max(tokens, 1)))
    return html_templates.render(
        "report/templates/training.html",
        what=f"all {len(steps)}" if len(shown) == len(steps) else f"{len(shown)} evenly spaced ones of {len(steps)}",
        notes=notes,
        steps={step: steps[step] for step in shown},
        signed=any(record.signed for step in shown for record in steps[step]),
        charts=charts,
    )


def fragment(records: list[Record]) -> Markup:
    """Some records as a page of their own, for trackers."""
    signed = any(record.signed for record in records)
    return html_templates.render("report/templates/fragment.html", records=records, signed=signed, charts=charts)


def charts(record: Record) -> list[dict[str, Any]]:
    """Of the value and the advantage, what both need for an SVG: a bar per token from zero, colour by sign."""
    drawn = ((record.columns.get(name, []), what) for name, what in CHARTS)
    return [chart(values, what) for values, what in drawn if len(values) - values.count(None) > 1]


def chart(values: list[float | None], what: str) -> dict[str, Any]:
    """Bars (class, x, y, width, height) of the values, the y of zero, and the smallest and the largest in words."""
    known = [value for value in values if value is not None]
    low, high = min(0.0, *known), max(0.0, *known)
    scale = HEIGHT / ((high - low) or 1.0)
    wide = WIDTH / len(values)
    bars = [
        ("neg" if value < 0 else "pos", at * wide, (high - max(value, 0.0)) * scale, 0.85 * wide, abs(value) * scale)
        for at, value in enumerate(values)
        if value is not None
    ]
    return {
        "words": f"{what}, per token in order: {min(known):+.2f} to {max(known):+.2f}",
        "bars": bars,
        "zero": high * scale,
        "rem": 1.4 * len(values),
        "width": WIDTH,
        "height": HEIGHT,
    }
