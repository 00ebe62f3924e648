"""A study's report as files: tables, the texts made of them by templates, and the numbers behind."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from abc_plugin.errors import UserError
from abc_plugin.report import html
from abc_plugin.report.tokens import visible
from abc_plugin.tools.study import figures, inference, learning_curves
from abc_plugin.tools.study.comparisons import COMPARED, WORDS, Analysis, Comparison
from abc_plugin.tools.study.inference import NOTHING, Estimate, number, p_text
from abc_plugin.tools.study.learning_curves import Steps
from abc_plugin.tools.study.table import BASELINE, shown
from abc_plugin.tools.study.verdict import CLAIMS, claim_lines, claims, headline, sentences

MARK = "made by abc-rlhf study report"  # near the start of each of its files: only these may be overwritten
START = 400  # bytes
ABOUT = 'null: there is none, such as an interval of too few seeds; "never": no number of steps reaches the reward'
Frame = pd.DataFrame  # of text; columns that a row lacks are –


def files(analysis: Analysis, source: str, command: str) -> dict[str, bytes]:
    """All files by name, from nothing but the table: the same table gives the same bytes."""
    pictures, captions = figures.draw(analysis, MARK)
    content = _content(analysis, captions, source)
    body = html.render("tools/study/templates/report.html", images=pictures, html_table=html.table, **content)
    code = re.sub(r"[`\n]", " ", visible(command))
    text = MARKDOWN.get_template("tools/study/templates/report.md").render(mark=MARK, command=code, **content)
    numbers = as_json(analysis) | {"figures": list(pictures)}
    texts = {
        "report.md": re.sub(r"\n{3,}", "\n\n", text),
        "report.json": json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": html.document(f"Study: {MARK}", headline(analysis), body, command),
    }
    return {name: text.encode() for name, text in texts.items()} | pictures


def _markdown(text: object) -> str:
    """Text without any meaning in Markdown, in one line."""
    text = re.sub(r"([\\`*_|#~])", r"\\\1", visible(" ".join(str(text).split())))
    return text.replace("<", "&lt;").replace("](", "]\\(")


def _content(analysis: Analysis, captions: dict[str, str], source: str) -> dict[str, Any]:
    """What the templates say."""
    table, counts = analysis.table, sorted({len(condition.seeds) for condition in analysis.table.conditions})
    return {
        "headline": headline(analysis),
        "verdicts": [f"Mind: {warning}" for warning in analysis.warnings] + sentences(analysis),
        "claims": claim_lines(analysis),
        "tables": {name: frame for name, frame in tables(analysis).items() if len(frame)},
        "captions": captions,
        "usual": table.usual_label,
        "coverage": {n: inference.coverage_of_two_errors(n) for n in counts if n > 1},
        "lone": [table.label(condition) for condition in table.conditions if len(condition.seeds) == 1],
        "read": _read(analysis, source),
        "text_columns": _text_columns,
        "BASELINE": BASELINE,
        "inference": inference,
        "curves": learning_curves,
    }


def _text_columns(frame: Frame) -> int:
    """How many columns from the left are text; numbers follow."""
    return len([name for name in frame if name in ("condition", "against") or name in CLAIMS])


MARKDOWN = html.environment.overlay(autoescape=False, finalize=str, keep_trailing_newline=True)
MARKDOWN.filters = MARKDOWN.filters | {"md": _markdown}


def means(analysis: Analysis) -> Frame:
    """The main table."""
    return _frame(
        {
            "condition": analysis.table.label(summary.condition),
            "seeds": len(summary.condition.seeds),
            "reward over training ± 2 SE": summary.means["reward"],
            "95 % by Student's t": summary.means["reward"].estimate.interval,
            **{WORDS[name]: summary.means[name].estimate for name in COMPARED[1:] if name in summary.means},
        }
        for summary in analysis.summaries
    )


def tables(analysis: Analysis) -> dict[str, Frame]:
    """All tables by name."""
    label, comparisons = analysis.table.label, [each for each in analysis.comparisons if each.seeds]
    return {
        "means": means(analysis),
        "claims": _frame(
            {"condition": who}
            | {claim: ": ".join(filter(None, each)) for claim, each in zip(CLAIMS, row, strict=True)}
            for who, row in claims(analysis).items()
        ),
        "differences": _frame(_pair(analysis, each) | _differences(each) for each in comparisons),
        "steps": _frame(
            {"condition": label(each.condition)} | _steps(each.steps) for each in comparisons if each.with_baseline
        ),
        "spread": _frame(
            _pair(analysis, each)
            | {WORDS[name]: _tested(spread.ratio, spread.p_holm) for name, spread in each.spread.items()}
            for each in comparisons
            if each.spread
        ),
    }


def _frame(rows: Iterable[dict[str, Any]]) -> Frame:
    frame = pd.DataFrame(list(rows), dtype=object)
    return frame.where(frame.notna(), NOTHING).map(str)


def _pair(analysis: Analysis, comparison: Comparison) -> dict[str, Any]:
    return dict(zip(("condition", "against"), analysis.names(comparison), strict=True))


def _tested(estimate: Estimate, p: float | None) -> str:
    return str(estimate) if p is None else f"{estimate}, p {p_text(p)}"


def _differences(comparison: Comparison) -> dict[str, Any]:
    row = {"pairs": len(comparison.seeds)}
    row |= {WORDS[name]: _tested(test.difference, test.p_holm) for name, test in comparison.paired.items()}
    if comparison.equal_kl:
        row["KL, from and to"] = " to ".join(map(number, comparison.equal_kl))
    return row | {"reward that could be seen": number(comparison.paired["reward"].detectable)}


def _steps(steps: Steps | None) -> dict[str, Any]:
    if steps is None:
        return {"reward to reach": f"{BASELINE} does not rise"}
    return {
        "reward to reach": number(steps.target),
        "steps": steps.steps,
        "never": NOTHING if steps.never is None else f"{100 * steps.never:.1f} %",
        f"steps of {BASELINE}": steps.baseline_steps,
        "ratio": steps.ratio,
    }


def _read(analysis: Analysis, source: str) -> list[str]:
    """What the report was made of."""
    table, first = analysis.table, analysis.table.conditions[0].settings
    runs = sum(len(condition.seeds) for condition in table.conditions)
    lengths = " or ".join(map(str, sorted({len(condition.steps) for condition in table.conditions})))
    same = [f"{name} {shown(first[name])}" for name in first if name not in table.varied and first[name] is not None]
    return [
        f"{runs} runs of {len(table.conditions)} conditions and {lengths} steps, from {source}.",
        *([f"In all of them: {', '.join(same)}."] if same else []),
    ]


def as_json(analysis: Analysis) -> dict[str, Any]:
    """The numbers behind the texts, in full; its ``about`` says what stands where there is none."""
    label = analysis.table.label
    return {
        "made_by": MARK,
        "about": ABOUT,
        "headline": headline(analysis),
        "verdicts": sentences(analysis),
        "claims": {"lines": claim_lines(analysis), "conditions": claims(analysis)},
        "warnings": analysis.warnings,
        "conditions": [{"label": label(each.condition)} | _plain(each) for each in analysis.summaries],
        "comparisons": [
            _plain(each) | {"condition": label(each.condition), "against": label(each.other)}
            for each in analysis.comparisons
        ],
    }


def _plain(value: Any) -> Any:
    """Dataclasses as objects without their curves; infinite, which only steps and their ratio are, as never."""
    if is_dataclass(value):
        names = [field.name for field in fields(value) if field.name not in ("curves", "other")]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else "never" if value == math.inf else None
    return value


def write(out: Path, contents: dict[str, bytes]) -> None:
    """All files, or none where one in the way is not a report's; pictures that are no longer drawn are removed.

    Raises UserError naming the file or folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in contents:
            if (out / name).exists() and not _is_ours(out / name):
                raise UserError(f"{out / name} is not a file of abc-rlhf study report; choose another --out")
        for name in _drawn_before(out):
            if name not in contents and (out / name).is_file() and _is_ours(out / name):
                (out / name).unlink()
        for name, content in contents.items():
            (out / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from None


def _is_ours(file: Path) -> bool:
    return MARK.encode() in file.read_bytes()[:START]


def _drawn_before(out: Path) -> list[str]:
    """Pictures that the report now there lists; none where there is none, or one that was cut off while written."""
    try:
        figures_then = json.loads((out / "report.json").read_bytes()).get("figures", [])
    except (FileNotFoundError, ValueError):
        return []
    return [name for name in figures_then if Path(name).name == name]  # of this folder
