"""The audit's page: one self-contained HTML file, everything that came from data escaped."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

import numpy as np

from abc_plugin.report.page import table
from abc_plugin.report.samples import Sample, spread_over_ranks
from abc_plugin.report.style import document
from abc_plugin.report.tokens import completion, legend, visible
from abc_plugin.tools.audit.measure import LEAVE_ONE_OUT, RANDOM, RECENCY
from abc_plugin.tools.audit.stats import Interval
from abc_plugin.tools.audit.summary import COMPARED, STATISTICS

SHOWN = 6  # completions on the page
PLAIN = (LEAVE_ONE_OUT, RANDOM, RECENCY, "uniform", "none")  # yardstick, and credit that needs no picture
CAPTIONS = {
    "agreement": "Does credit follow what each token's removal does to the score?",
    "curves": "What happens to the score when tokens are removed, or put in, in the order of credit",
    "heads": "Which layers and heads follow the removals",
    "shares": "Where the attention of layers and heads lies",
}


def render(
    records: list[dict[str, Any]],
    summary: dict[str, dict[str, Interval | None]],
    scene: dict[str, Interval | None],
    sentences: list[str],
    about: dict[str, Any],
    pictures: dict[str, bytes],
    command: str,
) -> str:
    """The whole page."""
    figures = "".join(
        f"<h2>{escape(caption)}</h2><figure><img alt='{escape(caption)}' src='{_embed(pictures[name])}'></figure>"
        for name, caption in CAPTIONS.items()
    )
    notes = "".join(f"<p>{escape(visible(sentence))}</p>" for sentence in sentences[1:])
    body = f"{notes}{figures}{_numbers(summary)}{_scene(scene)}{_completions(records)}{_about(about)}"
    return document("Audit of credit", visible(sentences[0]), body, visible(command))


def _embed(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _numbers(summary: dict[str, dict[str, Interval | None]]) -> str:
    """A row per statistic, a column per method."""
    says = {name: f"{name}: {text}" for name, (text, _) in STATISTICS.items()}
    over = {f"{name}_over_random": f"{name}, more than {RANDOM}'s, paired" for name in COMPARED}
    rows = [
        [text, *(_cell(row[name], name in over) for row in summary.values())]
        + ["" if RANDOM not in summary or summary[RANDOM][name] is None else _ends(summary[RANDOM][name])]
        for name, text in (says | over).items()
    ]
    note = (
        "Means over prompts; all intervals are in audit.json. – where credit orders no tokens. * the interval of a "
        "difference lies off 0."
    )
    header = ("", *summary, f"{RANDOM}'s interval")
    return f'<h2>All numbers</h2>{table(header, rows)}<p class="muted">{note}</p>'


def _cell(estimate: Interval | None, marked: bool) -> str:
    return "–" if estimate is None else f"{estimate.mean:.3f}{'*' * (marked and estimate.sign != 0)}"


def _ends(estimate: Interval) -> str:
    return f"{estimate.low:.3f} to {estimate.high:.3f}"


def _scene(scene: dict[str, Interval | None]) -> str:
    rows = [[name, str(value)] for name, value in scene.items() if value is not None]
    note = "Tokens of each kind, as shares of a completion; ABC renormalises away what lies on the prompt."
    return f'<h2>To hold the shares against</h2>{table(("", "mean [95 % interval]"), rows)}<p class="muted">{note}</p>'


def _about(about: dict[str, Any]) -> str:
    rows = [[name, ", ".join(value) if isinstance(value, list) else str(value)] for name, value in about.items()]
    return f"<h2>What was audited</h2>{table((), rows, 2, 'pairs')}"


def _completions(records: list[dict[str, Any]]) -> str:
    """Some completions, each with the credit of every method and the effects of removal."""
    shown = spread_over_ranks(records, lambda record: record["reward"], SHOWN)
    articles = "".join(_article(rank, len(records), record) for rank, record in shown)
    how = f"{len(shown)} of {len(records)}, at evenly spaced ranks of the reward; none picked by hand."
    return f'<h2>Completions</h2><p class="muted">{how}</p>{legend(True)}{articles}'


def _article(rank: int, total: int, record: dict[str, Any]) -> str:
    names = [LEAVE_ONE_OUT, *(name for name in record["credit"] if name not in PLAIN)]
    cards = "".join(
        f'<div class="card"><h3>{escape(name)}</h3><div class="text">{completion(_sample(record, name))}</div></div>'
        for name in names
    )
    return (
        f"<article><h3>Rank {rank} of {total}, reward {record['reward']:.2f}</h3>"
        f'<div class="prompt">{escape(visible(record["prompt"]))}</div><div class="sides">{cards}</div></article>\n'
    )


def _sample(record: dict[str, Any], method: str) -> Sample:
    """Credit as signed shares that sum to 1 in absolute value."""
    credit = np.array(record["credit"][method])
    total = np.abs(credit).sum()
    shares = credit / total if total > 0 else credit
    return Sample(record["prompt"], record["tokens"], shares.tolist(), record["reward"])
