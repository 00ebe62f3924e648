"""What the numbers say: summaries of rows, plain sentences, and the files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from abc_plugin.tools.lab.example import TEXT
from abc_plugin.tools.lab.study import VALUES, Row

EXACT = 1e-6  # the shipped functions compute in fp32; anything beyond its rounding is bias


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, which value it shows, how reward models are summarised, and how written."""

    heading: str
    value: str
    summary: str  # mean, min or median
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


def summary(row: Row, name: str) -> float:
    """The column's mean, least or median value over the reward models."""
    values_M, how = row.values[COLUMNS[name].value], COLUMNS[name].summary
    if how == "median":
        return float(values_M.median())  # the lower of two: quantile() would interpolate between infinities
    return float(values_M.mean() if how == "mean" else values_M.min())


def cells(row: Row, names: Iterable[str] = COLUMNS) -> list[str]:
    """The row's summaries as text."""
    return [COLUMNS[name].format(summary(row, name)) for name in names]


def is_unbiased(row: Row) -> bool:
    """Whether the gradient followed is the true one for every reward model, to the rounding of fp32."""
    values = row.values
    return bool((values["cosine"] > 1 - EXACT).all() and ((values["norm_ratio"] - 1).abs() < 10 * EXACT).all())


def verdict(rows: list[Row]) -> list[str]:
    """Plain sentences: who is unbiased, who only rescales, who is biased and what that costs."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case.label, []).append(row)
    unbiased = [label for label, mine in groups.items() if all(map(is_unbiased, mine))]
    biased = {label: mine for label, mine in groups.items() if label not in unbiased}
    straight = [label for label, mine in biased.items() if all(not row.values["flips"].any() for row in mine)]
    found = [f"Unbiased in every setting: {'; '.join(unbiased)}."] if unbiased else []
    if straight:
        found.append(f"Biased, but no logit is pushed the wrong way: {'; '.join(straight)}.")
    found += [_cost(label, mine) for label, mine in biased.items() if label not in straight]
    return [*found, _kept(groups)]


def _cost(label: str, mine: list[Row]) -> str:
    row = max(mine, key=lambda row: (row.beta, round(summary(row, "flips"), 6)))
    cosine, flips, gain, best = (summary(row, name) for name in ("cosine", "flips", "gain", "best"))
    at = f"beta {row.beta:g}, lambda {row.lambda_:g}" if row.beta else f"lambda {row.lambda_:g}"
    return (
        f"Biased: {label}: at {at} the gradient's cosine with the true one is "
        f"{cosine:.2f}, {100 * flips:.0f} % of logits are pushed the wrong way, and following it gains "
        f"{100 * gain:.0f} % of the reward there is to gain ({100 * best:.0f} % on the best completion)."
    )


def _kept(groups: dict[str, list[Row]]) -> str:
    """Up to which beta each credit ends within one per cent of the reward there is to gain."""
    parts = []
    for label, mine in groups.items():
        lost = [row.beta for row in mine if summary(row, "gain") < 0.99]
        kept = [row.beta for row in mine if not lost or row.beta < min(lost)]
        if kept:
            parts.append(f"{label} up to beta {max(kept):g}" if lost else label)
    return f"Gradient ascent ends within 1 % of the optimum with: {'; '.join(parts) or 'none of them'}."


def as_json(
    rows: list[Row], setting: dict[str, Any], example: dict[float, float], skipped: list[str]
) -> dict[str, Any]:
    """Everything, with each value of each reward model."""
    return {
        "settings": setting,
        "example": {f"{beta:g}": value for beta, value in example.items()},
        "verdict": verdict(rows),
        "skipped": skipped,
        "values": VALUES,
        "rows": [
            {
                "method": row.case.name,
                "evidence": row.case.kind,
                "beta": row.beta,
                "lambda": row.lambda_,
                "unbiased": is_unbiased(row),
                "summary": {name: _finite(summary(row, name)) for name in COLUMNS},
                "values": {name: [_finite(x) for x in row.values[name].tolist()] for name in VALUES},
            }
            for row in rows
        ],
    }


def _finite(x: float) -> float | None:
    """JSON has no infinity; a batch without bound is null."""
    return x if math.isfinite(x) else None


def as_markdown(rows: list[Row], setting: dict[str, Any], example: dict[float, float], skipped: list[str]) -> str:
    """The same for readers: settings, the example, the table, the verdict."""
    lines = ["# abc-rlhf lab", "", "; ".join(f"{name} {_words(value)}" for name, value in setting.items()) + ".", ""]
    lines += [TEXT, "", *_table(["beta", "gradient"], [[f"{b:g}", f"{g:+.4f}"] for b, g in example.items()]), ""]
    body = [[row.case.label, f"{row.beta:g}", f"{row.lambda_:g}", *cells(row)] for row in rows]
    lines += [*_table(["credit", "beta", "lambda", *(column.heading for column in COLUMNS.values())], body), ""]
    lines += [f"- {c.heading} ({c.summary} over reward models): {VALUES[c.value]}" for c in COLUMNS.values()]
    lines += ["", *(f"- {sentence}" for sentence in verdict(rows))]
    return "\n".join(lines + ([f"- {skipped_line(skipped)}"] if skipped else [])) + "\n"


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def skipped_line(skipped: list[str]) -> str:
    """Names the methods that the lab leaves out."""
    return f"Skipped, because the lab cannot make what they look at: {', '.join(skipped)}."


def _table(header: list[str], body: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body)]
