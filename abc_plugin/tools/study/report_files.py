"""A study's report as files: tables, the texts made of them by templates, and the numbers behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from abc_plugin.errors import UserError
from abc_plugin.report import html_templates
from abc_plugin.report.token_colours import visible
from abc_plugin.tools.study import learning_curves, study_figures
from abc_plugin.tools.study.comparisons import ATTENTION, CLAIMS, MEASURES, Analysis, Comparison, per_run
from abc_plugin.tools.study.learning_curves import Steps
from abc_plugin.tools.study.paired_statistics import NOTHING, SIGNIFICANT, number, t_interval
from abc_plugin.tools.study.results_table import BASELINE

MARK = "made by abc-rlhf study report"  # near the start of each of its files: only these may be overwritten
START = 400  # bytes
TEXTS = ("condition", "method", "against", *CLAIMS)  # columns of words; the others are numbers


def files(analysis: Analysis, source: str, command: str) -> dict[str, bytes]:
    """All files by name, from nothing but the table: the same table gives the same bytes."""
    pictures, captions = study_figures.draw(analysis, MARK)
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
    body = html_templates.render(
        "tools/study/templates/report.html", images=pictures, html_table=html_templates.table, **content
    )
    code = re.sub(r"[`\n]", " ", visible(command))
    text = MARKDOWN.get_template("tools/study/templates/report.md").render(mark=MARK, command=code, **content)
    written = {
        "report.md": re.sub(r"\n{3,}", "\n\n", text),
        "report.json": as_json(analysis),
        "report.html": html_templates.document(f"Study: {MARK}", analysis.headline(), body, command),
    }
    return {name: text.encode() for name, text in written.items()} | pictures


def _markdown(text: object) -> str:
    """Text without any meaning in Markdown, in one line."""
    text = re.sub(r"([\\`*_|#~])", r"\\\1", visible(" ".join(str(text).split())))
    return text.replace("<", "&lt;").replace("](", "]\\(")


MARKDOWN = html_templates.environment.overlay(autoescape=False, finalize=str, keep_trailing_newline=True)
MARKDOWN.filters = MARKDOWN.filters | {"md": _markdown}


def rows(analysis: Analysis) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table, estimates and tests as they are."""
    compared = [each for each in analysis.comparisons if each.seeds]
    with_baseline = [each for each in compared if each.with_baseline]
    overview: dict[str, dict[str, Any]] = {}
    for each in with_baseline:
        group, test = each.condition.group, each.tests["reward"]
        base = {f"reward of {BASELINE}": number(per_run(each.other.curves)["reward"].mean(), 2)}
        row = overview.setdefault(group, {"condition": group, "seeds": 0} | base)
        row |= {"seeds": max(row["seeds"], test.n), each.condition.label: f"{test.estimate}{' *' * test.significant}"}
    return {
        "overview": list(overview.values()),
        "claims": [
            _who(each) | {claim: ": ".join(said) for claim, said in each.claims().items()}
            for each in with_baseline
            if each.condition.method.startswith(ATTENTION)
        ],
        "means": [
            {"condition": each.group, "method": each.label, "seeds": len(each.curves["reward"])}
            | {MEASURES[name]: t_interval(values) for name, values in per_run(each.curves).items()}
            for each in analysis.table.conditions
        ],
        "differences": [
            _who(each)
            | {"against": each.other.label, "pairs": len(each.seeds)}
            | {MEASURES[name]: test for name, test in each.tests.items()}
            | ({"KL, from and to": " to ".join(map(number, each.shared_kl))} if each.shared_kl else {})
            for each in compared
        ],
        "steps": [_who(each) | _steps(each.steps) for each in with_baseline],
    }


def _who(comparison: Comparison) -> dict[str, str]:
    return {"condition": comparison.condition.group, "method": comparison.condition.label}


def _steps(steps: Steps | None) -> dict[str, Any]:
    if steps is None:
        return {"reward to reach": f"no rise of {BASELINE} is established"}
    named = {"steps": steps.steps, f"steps of {BASELINE}": steps.baseline_steps, "ratio": steps.ratio}
    return {"reward to reach": number(steps.target)} | named


def tables(analysis: Analysis) -> dict[str, pd.DataFrame]:
    """All tables by name, of text; those without rows, and conditions where no setting varies, are left out."""
    frames = {name: pd.DataFrame(each, dtype=object) for name, each in rows(analysis).items() if each}
    for name, frame in frames.items():
        frames[name] = frame.where(frame.notna(), NOTHING).map(str)[list(frame)[not frame["condition"].any() :]]
        frames[name].attrs["texts"] = sum(column in TEXTS for column in frames[name])
    return frames


def as_json(analysis: Analysis) -> str:
    """The tables' numbers in full; null where there is none, "never" where steps are infinite."""
    content = {"made_by": MARK, "headline": analysis.headline(), "warnings": analysis.warnings} | rows(analysis)
    # JSON has no infinite numbers; here only steps and their ratio are.
    content = json.loads(json.dumps(content, default=vars), parse_constant={"Infinity": "never"}.get)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


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
