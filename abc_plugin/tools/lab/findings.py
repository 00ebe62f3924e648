"""What the numbers say: a table of summaries over reward models, plain sentences, and the files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from abc_plugin.tools.lab.bias import VALUES, Row
from abc_plugin.tools.lab.random_processes import EXAMPLE

EXACT = 1e-6  # the shipped functions compute in fp32; anything beyond its rounding is bias


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, which value it shows, how reward models are summarised, and how written."""

    heading: str
    value: str
    summary: str  # mean, min or median (the lower of two: interpolating between infinities gives NaN)
    format: Callable[[float], str]


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _batch(x: float) -> str:
    return "always" if math.isinf(x) else "never" if x < 1 else f"{x:.0f}"


COLUMNS = {
    "cosine": Column("cosine", "cosine", "mean", "{:.3f}".format),
    "worst": Column("worst", "cosine", "min", "{:.3f}".format),
    "norm_ratio": Column("norm", "norm_ratio", "median", "{:.3f}".format),
    "flips": Column("wrong %", "flips", "mean", _percent),
    "noise": Column("noise", "noise", "median", "{:.2f}".format),
    "noise_no_critic": Column("noise, no critic", "noise_no_critic", "median", "{:.2f}".format),
    "batch": Column("closer up to", "batch", "median", _batch),
    "gain": Column("gain %", "gain", "mean", _percent),
    "best": Column("best %", "best", "mean", _percent),
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
    return [COLUMNS[name].format(line[name]) for name in names]


def verdict(summary: pd.DataFrame) -> list[str]:
    """Plain sentences: what is unbiased, what only rescales, what is biased and what that costs."""
    groups = summary.groupby("credit", sort=False)
    unbiased = groups["unbiased"].all()
    straight = ~unbiased & (groups["flips"].max() == 0)
    sentences = [
        f"{text}: {'; '.join(chosen.index[chosen])}."
        for text, chosen in (
            ("Unbiased in every setting", unbiased),
            ("Biased, but no logit is pushed the wrong way", straight),
        )
        if chosen.any()
    ]
    sentences += [_cost(lines) for label, lines in groups if not unbiased[label] and not straight[label]]
    kept = list(filter(None, (_within_one_percent(label, lines) for label, lines in groups)))
    return [*sentences, f"Gradient ascent ends within 1 % of the optimum with: {'; '.join(kept) or 'none of them'}."]


def _cost(lines: pd.DataFrame) -> str:
    """The setting of highest beta, of those the one that pushes most logits the wrong way."""
    line = lines.loc[max(lines.index, key=lambda i: (lines.beta[i], round(lines.flips[i], 6)))]
    where = f"beta {line.beta:g}, lambda {line['lambda']:g}" if line.beta else f"lambda {line['lambda']:g}"
    return (
        f"Biased: {line.credit}: at {where} the gradient's cosine with the true one is "
        f"{line.cosine:.2f}, {100 * line.flips:.0f} % of logits are pushed the wrong way, and following it gains "
        f"{100 * line.gain:.0f} % of the reward there is to gain ({100 * line.best:.0f} % on the best completion)."
    )


def _within_one_percent(label: str, lines: pd.DataFrame) -> str:
    """Up to which beta the credit ends within one per cent of the reward there is to gain; "" for none."""
    lost = lines.beta[lines.gain < 0.99]
    kept = lines.beta if lost.empty else lines.beta[lines.beta < lost.min()]
    return "" if kept.empty else label if lost.empty else f"{label} up to beta {kept.max():g}"


def skipped_line(skipped: list[str]) -> str:
    """Names the methods that the lab leaves out."""
    return f"Skipped, because the lab cannot make what they look at: {', '.join(skipped)}."


def as_json(
    rows: list[Row], setting: dict[str, Any], example: dict[float, float], skipped: list[str]
) -> dict[str, Any]:
    """Everything, with each value of each reward model."""
    summary = summarise(rows)
    keys = ["method", "evidence", "beta", "lambda", "unbiased"]
    return {
        "settings": setting,
        "example": {f"{beta:g}": value for beta, value in example.items()},
        "verdict": verdict(summary),
        "skipped": skipped,
        "values": VALUES,
        "rows": [
            {
                **{key: line[key] for key in keys},
                "summary": {name: _finite(line[name]) for name in COLUMNS},
                "values": {name: [_finite(x) for x in row.values[name].tolist()] for name in VALUES},
            }
            for row, line in zip(rows, summary.to_dict("records"), strict=True)
        ],
    }


def _finite(x: float) -> float | None:
    """JSON has no infinity; a batch without bound is null."""
    return x if math.isfinite(x) else None


def as_markdown(
    summary: pd.DataFrame, setting: dict[str, Any], example: dict[float, float], skipped: list[str]
) -> str:
    """The same for readers: settings, the example, the table, the verdict."""
    words = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in setting.items()}
    gradients = [[f"{beta:g}", f"{gradient:+.4f}"] for beta, gradient in example.items()]
    body = [[line.credit, f"{line.beta:g}", f"{line['lambda']:g}", *cells(line)] for _, line in summary.iterrows()]
    sentences = verdict(summary) + ([skipped_line(skipped)] if skipped else [])
    return "\n".join(
        [
            "# abc-rlhf lab",
            "",
            "; ".join(f"{name} {value}" for name, value in words.items()) + ".",
            "",
            EXAMPLE,
            "",
            *_table(["beta", "gradient"], gradients),
            "",
            *_table(["credit", "beta", "lambda", *(column.heading for column in COLUMNS.values())], body),
            "",
            *(f"- {c.heading} ({c.summary} over reward models): {VALUES[c.value]}" for c in COLUMNS.values()),
            "",
            *(f"- {sentence}" for sentence in sentences),
            "",
        ]
    )


def _table(header: list[str], body: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body)]
