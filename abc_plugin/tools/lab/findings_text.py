"""What the numbers say: a table of summaries over reward models, plain sentences, and the text of lab.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd

from abc_plugin.tools.lab.gradient_bias import Row
from abc_plugin.tools.lab.random_processes import EXAMPLE

EXACT = 1e-6  # the shipped functions compute in fp32; anything beyond its rounding is bias


class Column(NamedTuple):
    """A column of the table: which value it shows, how reward models are summarised, how it is written."""

    heading: str
    value: str
    summary: str  # mean, min or median
    format: str
    meaning: str


COLUMNS = {
    "cosine": Column("cosine", "cosine", "mean", "{:.3f}", "between the gradient followed and the true one"),
    "worst": Column("worst", "cosine", "min", "{:.3f}", "the same"),
    "norm_ratio": Column("norm", "norm_ratio", "median", "{:.3f}", "length of the gradient followed, over the true's"),
    "flips": Column("wrong %", "flips", "mean", "{:.1%}", "logits that it pushes against the true gradient"),
    "noise": Column("noise", "noise", "median", "{:.2f}", "sqrt(trace of one completion's covariance) over length"),
    "noise_no_critic": Column("noise, no critic", "noise_no_critic", "median", "{:.2f}", "the same where V = 0"),
    "gain": Column("gain %", "gain", "mean", "{:.1%}", "reward that ascent gains, of what there is to gain"),
    "best": Column("best %", "best", "mean", "{:.1%}", "probability of the best completion after the ascent"),
}


def is_unbiased(row: Row) -> bool:
    """Whether the gradient followed is the true one for every reward model, to the rounding of fp32."""
    values = row.values
    return bool((values["cosine"] > 1 - EXACT).all() and ((values["norm_ratio"] - 1).abs() < 10 * EXACT).all())


def summarise(rows: Iterable[Row]) -> pd.DataFrame:
    """A line per setting: credit (the label), method, evidence, beta, lambda, unbiased, and COLUMNS."""
    return pd.DataFrame(
        {
            "credit": row.case.label,
            "method": row.case.name,
            "evidence": row.case.kind,
            "beta": row.beta,
            "lambda": row.lambda_,
            "unbiased": is_unbiased(row),
            **{name: float(getattr(row.values[c.value], c.summary)()) for name, c in COLUMNS.items()},
        }
        for row in rows
    )


def cells(line: pd.Series, names: Iterable[str] = COLUMNS) -> list[str]:
    """Some of a line's summaries as text."""
    return [COLUMNS[name].format.format(line[name]).removesuffix("%") for name in names]


def verdict(summary: pd.DataFrame) -> list[str]:
    """Plain sentences: what is unbiased, what only rescales, what pushes logits back, and what reaches the optimum."""
    groups = summary.groupby("credit", sort=False)
    unbiased, flips = groups["unbiased"].all(), groups["flips"].max()
    sorted_ = {
        "Unbiased in every setting": unbiased,
        "Biased, but no logit is pushed the wrong way": ~unbiased & (flips == 0),
        "Biased, and some logits are pushed the wrong way": ~unbiased & (flips > 0),
    }
    sentences = [f"{text}: {'; '.join(which.index[which])}." for text, which in sorted_.items() if which.any()]
    kept = [words for label, lines in groups if (words := _within_one_percent(label, lines))]
    return [*sentences, f"Gradient ascent ends within 1 % of the optimum with: {'; '.join(kept) or 'none of them'}."]


def _within_one_percent(label: str, lines: pd.DataFrame) -> str:
    """Up to which beta the credit ends within one per cent of the reward there is to gain; "" for none."""
    lost = lines.beta[lines.gain < 0.99]
    kept = lines.beta if lost.empty else lines.beta[lines.beta < lost.min()]
    return "" if kept.empty else label if lost.empty else f"{label} up to beta {kept.max():g}"


def as_markdown(
    summary: pd.DataFrame, setting: dict[str, Any], example: dict[float, float], sentences: list[str]
) -> str:
    """Settings, the example, the table, what its columns mean, the sentences."""
    words = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in setting.items()}
    gradients = [[f"{beta:g}", f"{gradient:+.4f}"] for beta, gradient in example.items()]
    body = [[line.credit, f"{line.beta:g}", f"{line['lambda']:g}", *cells(line)] for _, line in summary.iterrows()]
    parts = (
        ["# abc-rlhf lab"],
        ["; ".join(f"{name} {value}" for name, value in words.items()) + "."],
        [EXAMPLE],
        _table(["beta", "gradient"], gradients),
        _table(["credit", "beta", "lambda", *(column.heading for column in COLUMNS.values())], body),
        [f"- {c.heading} ({c.summary} over reward models): {c.meaning}" for c in COLUMNS.values()],
        [f"- {sentence}" for sentence in sentences],
    )
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _table(header: list[str], body: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body)]
