"""The audit's page: one self-contained HTML file."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from abc_plugin.report import html
from abc_plugin.report.samples import Sample, spread_over_ranks
from abc_plugin.tools.audit.summary import LEAVE_ONE_OUT, RANDOM, RECENCY, STATISTICS, Record, Summary

SHOWN = 6  # completions on the page
PLAIN = (LEAVE_ONE_OUT, RANDOM, RECENCY, "uniform", "none")  # yardstick, and credit that needs no picture
CAPTIONS = {
    "agreement": "Does credit follow what each token's removal does to the score?",
    "curves": "What happens to the score when tokens are removed, or put in, in the order of credit",
    "heads": "Which layers and heads follow the removals",
}


def render(
    records: list[Record],
    summary: Summary,
    sentences: list[str],
    audited: dict[str, Any],
    pictures: dict[str, bytes],
    command: str,
) -> str:
    """The whole page: the first sentence is its heading, ``command`` made it."""
    settings = [[name, ", ".join(value) if isinstance(value, list) else value] for name, value in audited.items()]
    shown = spread_over_ranks(records, lambda record: record["reward"], SHOWN)
    body = html.render(
        "tools/audit/templates/audit.html",
        sentences=sentences[1:],
        pictures=[(caption, pictures[name]) for name, caption in CAPTIONS.items()],
        numbers=_numbers(summary),
        completions=[(rank, record, _credits(record)) for rank, record in shown],
        total=len(records),
        legend=html.legend(signed=True),
        audited=html.table(settings, numbers=2, kind="pairs"),
    )
    return html.document("Audit of credit", sentences[0], body, command)


def _numbers(summary: Summary) -> Markup:
    """A row per statistic, a column per method."""
    rows = [
        [f"{name}: {meaning}", *(f"{own[name].mean:.3f}" if own[name] else "–" for own in summary.values())]
        for name, meaning in STATISTICS.items()
    ]
    return html.table(rows, ("", *summary))


def _credits(record: Record) -> list[tuple[str, Markup]]:
    """The completion by method, its tokens on backgrounds of their credit: signed shares, 1 in absolute sum."""
    credits = []
    for method in (LEAVE_ONE_OUT, *(name for name in record["credit"] if name not in PLAIN)):
        credit = np.array(record["credit"][method])
        share = (credit / (np.abs(credit).sum() or 1.0)).tolist()
        credits.append((method, html.completion(Sample(record["prompt"], record["tokens"], share, record["reward"]))))
    return credits
