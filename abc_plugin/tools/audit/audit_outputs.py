"""What an audit leaves: a self-contained page, audit.json and pictures; and what it prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from abc_plugin.report import html_templates
from abc_plugin.report.samples_file import Sample, spread_over_ranks
from abc_plugin.tools.audit import pictures
from abc_plugin.tools.audit.advice import Advice, closing, verdict
from abc_plugin.tools.audit.audited_texts import ADVISED
from abc_plugin.tools.audit.head_map import HeadMap
from abc_plugin.tools.audit.summary_table import LEAVE_ONE_OUT, RANDOM, RECENCY, STATISTICS, Record, Summary

SHOWN = 6  # completions on the page
PLAIN = (LEAVE_ONE_OUT, RANDOM, RECENCY, "uniform", "none")  # yardstick, and credit that needs no picture
CAPTIONS = {
    "agreement": "Does credit follow what each token's removal does to the score?",
    "curves": "What happens to the score when tokens are removed, or put in, in the order of credit",
    "heads": "Which layers and heads follow the removals",
}
COLUMNS = {"rank correlation": "spearman", "of sizes only": "size", "curves apart": "separation"}
WIDTH = 108  # of the printed table


class Outcome(NamedTuple):
    """An audit of completions of one length."""

    records: list[Record]
    summary: Summary
    head_map: HeadMap
    advice: Advice
    audited: dict[str, Any]  # what was audited, and how


def write(out: Path, outcome: Outcome, command: str) -> None:
    """audit.json, audit.html and the pictures; ``command`` made them."""
    pngs = {
        "agreement": pictures.agreement(outcome.summary),
        "curves": pictures.curves(outcome.records),
        "heads": pictures.heads(outcome.head_map),
    }
    everything = {
        "advice": outcome.advice._asdict(),
        "about": outcome.audited,
        "statistics": STATISTICS,
        "methods": outcome.summary,
        "heads": outcome.head_map,
    }
    (out / "audit.json").write_text(json.dumps(everything, indent=1, default=_jsonable) + "\n", encoding="utf-8")
    (out / "audit.html").write_text(render(outcome, pngs, command), encoding="utf-8")
    for name, png in pngs.items():
        (out / f"{name}.png").write_bytes(png)


def _jsonable(value: Any) -> Any:
    """Dataclasses as objects, arrays as lists with null for NaN."""
    if dataclasses.is_dataclass(value):
        return vars(value)
    return np.where(np.isnan(value), None, value).tolist()


def tell(outcomes: dict[int | None, Outcome], out: Path) -> None:
    """Print a table, a row per length and method, the sentences, and last the command to run."""
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, WIDTH)
    console.print(_table(outcomes))
    for length, outcome in outcomes.items():
        for sentence in outcome.advice.sentences:
            console.print(f"{length} tokens: {sentence}" if length else sentence, soft_wrap=True)
        number = outcome.summary[RANDOM]["separation"].n
        if number < ADVISED:
            console.print(f"Only {number} prompts: take {ADVISED} or more for a verdict to rely on.")
    pages = ", ".join(str(out / str(length or "") / "audit.html") for length in outcomes)
    console.print(f"Pages: {pages}; beside them audit.json and pictures.", soft_wrap=True)
    for line in closing({length: outcome.advice for length, outcome in outcomes.items()}):
        console.print(line, soft_wrap=True)


def _table(outcomes: dict[int | None, Outcome]) -> Table:
    table = Table(title="Credit against what removing each token does to the score", box=None, padding=(0, 2, 0, 0))
    for heading in ("tokens", "method", *COLUMNS, "against uniform"):
        table.add_column(heading, no_wrap=True)
    for length, outcome in outcomes.items():
        for method, estimates in outcome.summary.items():
            cells = (f"{estimates[name]:.2f}" if estimates[name] else "–" for name in COLUMNS.values())
            table.add_row(str(length or "all"), pictures.label(method), *cells, verdict(estimates))
    return table


def render(outcome: Outcome, pngs: dict[str, bytes], command: str) -> str:
    """The whole page: the first sentence is its heading, ``command`` made it."""
    records, summary = outcome.records, outcome.summary
    settings = [
        [name, ", ".join(value) if isinstance(value, list) else value] for name, value in outcome.audited.items()
    ]
    conclusion, *sentences = outcome.advice.sentences
    shown = spread_over_ranks(records, lambda record: record["reward"], SHOWN)
    body = html_templates.render(
        "tools/audit/templates/audit.html",
        sentences=[*sentences, *closing({None: outcome.advice})],
        pictures=[(caption, pngs[name]) for name, caption in CAPTIONS.items()],
        numbers=_numbers(summary),
        methods=("", *summary),
        completions=[(rank, record, _credits(record)) for rank, record in shown],
        total=len(records),
        audited=settings,
    )
    return html_templates.document("Audit of credit", conclusion, body, command)


def _numbers(summary: Summary) -> list[list[str]]:
    """A row per statistic, a column per method."""
    return [
        [f"{name}: {meaning}", *(f"{own[name].mean:.3f}" if own[name] else "–" for own in summary.values())]
        for name, meaning in STATISTICS.items()
    ]


def _credits(record: Record) -> list[tuple[str, Sample]]:
    """The completion with each method's credit: signed shares, 1 in absolute sum."""
    credits = []
    for method in (LEAVE_ONE_OUT, *(name for name in record["credit"] if name not in PLAIN)):
        credit = np.array(record["credit"][method])
        share = (credit / (np.abs(credit).sum() or 1.0)).tolist()
        credits.append((method, Sample(record["prompt"], record["tokens"], share, record["reward"])))
    return credits
