"""``abc-rlhf study report DIR|FILE``: what a study says, with error bars: report.md, .json, .html, and pictures."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from abc_plugin.errors import UserError

try:
    from abc_plugin.tools.study import figures
    from abc_plugin.tools.study.comparisons import Analysis, Comparison, analyse
    from abc_plugin.tools.study.contents import sections, short_grid
    from abc_plugin.tools.study.document import as_html, as_markdown
    from abc_plugin.tools.study.reading import NAME, locate, read
    from abc_plugin.tools.study.table import Table
    from abc_plugin.tools.study.verdict import claim_lines, claims, headline, sentences
except ModuleNotFoundError as error:
    raise UserError(f"abc-rlhf study report needs {error.name}; pip install 'abc-plugin[study]'") from None

MARK = "made by abc-rlhf study report"  # near the start of each of its files: only these may be overwritten
START = 400  # bytes
ABOUT = 'null: there is none, such as an interval of too few seeds; "never": no number of steps reaches the reward'


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "source",
        metavar="DIR|FILE",
        help=f"what abc-rlhf study wrote ({NAME} in it is read), or any CSV or JSONL with a line per run and step: "
        "method, seed, step, reward and, if known, kl, value_loss, beta; further columns are settings",
    )
    parser.add_argument("--out", metavar="DIR", help="where to write (default: DIR, or FILE's name and -report)")


def report(args: argparse.Namespace) -> int:
    """Write the files; print the main table, the verdicts and one line with the paths.

    Raises UserError on a table that cannot be compared, and where files that are not a report's are in the way.
    """
    path = locate(args.source)
    own = path.parent if Path(args.source).is_dir() else path.with_name(f"{path.stem}-report")
    out = Path(args.out) if args.out else own
    analysis = analyse(read(path))
    files = _files(analysis, path, shlex.join(["abc-rlhf", "study", "report", args.source]))
    _write(out, files)
    _print(analysis)
    print(f"abc-rlhf study report: {headline(analysis)} {' '.join(str(out / name) for name in files)}")
    return 0


def _files(analysis: Analysis, path: Path, command: str) -> dict[str, bytes]:
    """All files by name, from nothing but the table: the same table gives the same bytes."""
    pictures, captions = figures.draw(analysis, MARK)
    parts = sections(analysis, captions, path.name)
    numbers = as_json(analysis) | {"figures": list(pictures)}
    texts = {
        "report.md": as_markdown(MARK, headline(analysis), parts, command),
        "report.json": json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": as_html(f"Study: {MARK}", headline(analysis), parts, pictures, command),
    }
    return {name: text.encode() for name, text in texts.items()} | pictures


def as_json(analysis: Analysis) -> dict[str, Any]:
    """The numbers behind the texts, in full; its ``about`` says what stands where there is none."""
    table = analysis.table
    return {
        "made_by": MARK,
        "about": ABOUT,
        "headline": headline(analysis),
        "verdicts": sentences(analysis),
        "claims": {"lines": claim_lines(analysis), "conditions": claims(analysis)},
        "warnings": analysis.warnings,
        "conditions": [{"label": table.label(s.condition)} | _plain(s) for s in analysis.summaries],
        "comparisons": [_plain_pair(table, comparison) for comparison in analysis.comparisons],
    }


def _plain_pair(table: Table, comparison: Comparison) -> dict[str, Any]:
    numbers = {name: value for name, value in _plain(comparison).items() if name not in ("condition", "other")}
    return {"condition": table.label(comparison.condition), "against": table.label(comparison.other)} | numbers


def _plain(value: Any) -> Any:
    """Dataclasses as objects without their curves; infinite, which only steps and their ratio are, as never."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.name != "curves"}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else "never" if value == math.inf else None
    return value


def _write(out: Path, files: dict[str, bytes]) -> None:
    """All files, or none where one in the way is not a report's; pictures that are no longer drawn are removed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in files:
            if (out / name).exists() and not _is_ours(out / name):
                raise UserError(
                    f"{out / name} is not of abc-rlhf study report and is left alone; choose another --out"
                )
        for name in _drawn_before(out):
            if name not in files and (out / name).is_file() and _is_ours(out / name):
                (out / name).unlink()
        for name, content in files.items():
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


def _print(analysis: Analysis) -> None:
    console = Console(markup=False, highlight=False)
    grid = short_grid(analysis)
    shown = RichTable(box=None, padding=(0, 1, 0, 0))
    for place, name in enumerate(grid.header):
        # In a narrow terminal headings and labels may break over lines, numbers may not.
        width = max(len(row[place]) for row in grid.rows) if place else None
        shown.add_column(name, justify="right" if place else "left", min_width=width)
    for row in grid.rows:
        shown.add_row(*row)
    console.print(shown)
    warnings = [f"Mind: {warning}" for warning in analysis.warnings]
    for line in [*warnings, *sentences(analysis), *claim_lines(analysis)]:
        console.print(line, soft_wrap=True)
