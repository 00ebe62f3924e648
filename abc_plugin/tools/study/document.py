"""A study's report as files: tables, the texts made of them by templates, and the numbers behind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from abc_plugin.errors import UserError
from abc_plugin.report import html
from abc_plugin.report.tokens import visible
from abc_plugin.tools.study import figures, learning_curves
from abc_plugin.tools.study.comparisons import ATTENTION, CLAIMS, MEASURES, Analysis, Comparison, per_run
from abc_plugin.tools.study.inference import NOTHING, SIGNIFICANT, number, t_interval
from abc_plugin.tools.study.table import BASELINE

MARK = "made by abc-rlhf study report"  # near the start of each of its files: only these may be overwritten
START = 400  # bytes
TEXTS = ("condition", "method", "against", *CLAIMS)  # columns of words; the others are numbers


def files(analysis: Analysis, source: str, command: str) -> dict[str, bytes]:
    """All files by name, from nothing but the table: the same table gives the same bytes."""
    pictures, captions = figures.draw(analysis, MARK)
    content = {
        "headline": analysis.headline(),
        "warnings": analysis.warnings,
        "tables": tables(analysis),
        "captions": captions,
        "table_read": analysis.table,
        "source": source,
        "runs": sum(len(each.curves["reward"]) for each in analysis.table.conditions),
        "steps": sorted({each.curves["reward"].shape[1] for each in analysis.table.conditions}),
        "BASELINE": BASELINE,
        "SIGNIFICANT": SIGNIFICANT,
        "curves": learning_curves,
    }
    body = html.render("tools/study/templates/report.html", images=pictures, html_table=html.table, **content)
    code = re.sub(r"[`\n]", " ", visible(command))
    text = MARKDOWN.get_template("tools/study/templates/report.md").render(mark=MARK, command=code, **content)
    written = {
        "report.md": re.sub(r"\n{3,}", "\n\n", text),
        "report.json": json.dumps(as_json(analysis), indent=1, ensure_ascii=False) + "\n",
        "report.html": html.document(f"Study: {MARK}", analysis.headline(), body, command),
    }
    return {name: text.encode() for name, text in written.items()} | pictures


def _markdown(text: object) -> str:
    """Text without any meaning in Markdown, in one line."""
    text = re.sub(r"([\\`*_|#~])", r"\\\1", visible(" ".join(str(text).split())))
    return text.replace("<", "&lt;").replace("](", "]\\(")


MARKDOWN = html.environment.overlay(autoescape=False, finalize=str, keep_trailing_newline=True)
MARKDOWN.filters = MARKDOWN.filters | {"md": _markdown}


def tables(analysis: Analysis) -> dict[str, pd.DataFrame]:
    """All tables by name, of text; those without rows are left out."""
    compared = [each for each in analysis.comparisons if each.seeds]
    with_baseline = [each for each in compared if each.with_baseline]
    claimed = [each for each in with_baseline if each.condition.method.startswith(ATTENTION)]
    overview: dict[str, dict[str, Any]] = {}
    for each in with_baseline:
        group, test = each.condition.group, each.tests["reward"]
        row = overview.setdefault(group, {"condition": group})
        row["seeds"] = max(row.get("seeds", 0), test.n)
        row.setdefault(f"reward of {BASELINE}", number(per_run(each.other)["reward"].mean(), 2))
        row[each.condition.label] = f"{test.estimate}{' *' * test.significant}"
    rows = {
        "overview": overview.values(),
        "claims": [_who(each) | {claim: ": ".join(said) for claim, said in each.claims().items()} for each in claimed],
        "means": [
            {"condition": each.group, "method": each.label, "seeds": len(each.curves["reward"])}
            | {MEASURES[name]: t_interval(values) for name, values in per_run(each).items()}
            for each in analysis.table.conditions
        ],
        "differences": [
            _who(each)
            | {"against": each.other.label, "pairs": len(each.seeds)}
            | {MEASURES[name]: test for name, test in each.tests.items()}
            | ({"KL, from and to": " to ".join(map(number, each.shared_kl))} if each.shared_kl else {})
            for each in compared
        ],
        "steps": [_who(each) | _steps(each) for each in with_baseline],
    }
    return {name: _frame(each) for name, each in rows.items() if each}


def _who(comparison: Comparison) -> dict[str, str]:
    return {"condition": comparison.condition.group, "method": comparison.condition.label}


def _steps(comparison: Comparison) -> dict[str, Any]:
    if comparison.steps is None:
        return {"reward to reach": f"no rise of {BASELINE} is established"}
    steps = comparison.steps
    named = {"steps": steps.steps, f"steps of {BASELINE}": steps.baseline_steps, "ratio": steps.ratio}
    return {"reward to reach": number(steps.target)} | named


def _frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """What a row lacks is –; a column ``condition`` that is empty, since no setting varies, is left out."""
    frame = pd.DataFrame(list(rows), dtype=object)
    if not frame["condition"].any():
        del frame["condition"]
    frame = frame.where(frame.notna(), NOTHING).map(str)
    frame.attrs["texts"] = sum(name in TEXTS for name in frame)
    return frame


def as_json(analysis: Analysis) -> dict[str, Any]:
    """The numbers in full; null where there is none, "never" for a number of steps that does not reach the reward."""
    numbers = {
        "made_by": MARK,
        "headline": analysis.headline(),
        "warnings": analysis.warnings,
        "conditions": [
            {"condition": each.group, "method": each.label, "seeds": each.curves["reward"].index.tolist()}
            | {name: t_interval(values) for name, values in per_run(each).items()}
            for each in analysis.table.conditions
        ],
        "comparisons": [
            _who(each)
            | {"against": each.other.label, "seeds": each.seeds, "tests": each.tests}
            | {"steps": each.steps, "shared_kl": each.shared_kl, "claims": each.claims()}
            for each in analysis.comparisons
        ],
    }
    # JSON has no infinite numbers; here only steps and their ratio are.
    return json.loads(json.dumps(numbers, default=vars), parse_constant={"Infinity": "never"}.get)


def write(out: Path, contents: dict[str, bytes]) -> None:
    """All files, or none where one in the way is not a report's. Raises UserError naming the file or folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in map(out.joinpath, contents):
            if path.exists() and MARK.encode() not in path.read_bytes()[:START]:
                raise UserError(f"{path} is not a file of abc-rlhf study report; choose another --out")
        for name, content in contents.items():
            (out / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
