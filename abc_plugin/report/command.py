"""``abc-rlhf report``: curves.png, report.html and, with --compare, a table of groups of runs."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from abc_plugin.errors import UserError

try:
    from abc_plugin.report.logged_runs import FOOTNOTE, Run, comparison, read_run
    from abc_plugin.report.recorded_completions import FILE, Record, read_records
    from abc_plugin.report.report_page import Content, draw_curves, headline, render
    from abc_plugin.report.samples_file import read_samples
except ModuleNotFoundError as error:
    raise UserError(f"abc-rlhf report needs {error.name}; pip install 'abc-plugin[report]'") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="what abc-rlhf local wrote; events under RUN_DIR/tensorboard"
    )
    parser.add_argument("--before", metavar="JSONL", help="samples of the policy before training (abc-rlhf evaluate)")
    parser.add_argument("--after", metavar="JSONL", help="samples of the trained policy on the same prompts")
    parser.add_argument(
        "--compare",
        metavar="LABEL=RUN_DIR",
        nargs="+",
        action="extend",
        default=[],
        help="draw these runs with it; labels that agree up to a # are seeds of one method: abc#1=… abc#2=… none#1=…",
    )
    parser.add_argument("--out", metavar="DIR", help="where to write report.html and curves.png (default RUN_DIR)")


def run(args: argparse.Namespace) -> int:
    """Write the two files, print the comparison and one line with their paths.

    What the run recorded beside its curves is left out with a note where it is damaged.
    Raises UserError on a missing run, a run without events, and malformed samples or labels.
    """
    main, runs = _runs(args.run_dir, args.compare)
    records, notes = _recorded(Path(args.run_dir) / FILE)
    summary, broken = _read_summary(Path(args.run_dir) / "summary.json")
    for note in notes + broken:
        print(f"abc-rlhf report: {note}", file=sys.stderr)
    content = Content(
        run=main,
        runs=runs,
        before=read_samples(args.before) if args.before else [],
        after=read_samples(args.after) if args.after else [],
        summary=summary,
        command=_command_line(args),
        records=records,
        notes=notes,
    )
    html, png = render(content), draw_curves(runs)
    page, curves = _write(Path(args.out or args.run_dir), html, png)
    if args.compare:
        _print_comparison(runs)
    print(f"{headline(content)} {page} {curves}")
    return 0


def _runs(run_dir: str, compare_words: list[str]) -> tuple[Run, list[Run]]:
    """RUN_DIR's run, and all runs in the order of --compare; RUN_DIR comes first if it is not among them.

    RUN_DIR's label is the one it has in --compare, else its directory's name.
    """
    directories: dict[str, str] = {}
    for word in compare_words:
        label, _, directory = word.partition("=")
        if not (label and directory):
            raise UserError(f"--compare {word!r} is not LABEL=RUN_DIR, e.g. abc#1=runs/abc-1")
        if label in directories:
            raise UserError(f"--compare has two runs labelled {label!r}; number them: {label}#1=… {label}#2=…")
        directories[label] = directory
    main = Path(run_dir).resolve()
    own = next((label for label, directory in directories.items() if Path(directory).resolve() == main), None)
    if own is None:
        own = main.name
        if own in directories:
            raise UserError(
                f"--compare label {own!r} is also the name of RUN_DIR; choose another or list {run_dir} too"
            )
        directories = {own: run_dir} | directories
    runs = [read_run(directory, label) for label, directory in directories.items()]
    return next(run for run in runs if run.label == own), runs


def _recorded(path: Path) -> tuple[list[Record], list[str]]:
    """The run's completions and notes on them; whatever is wrong with them, the curves are drawn."""
    if not path.exists():
        return [], []
    try:
        return read_records(path)
    except UserError as error:
        return [], [f"{error}; left out"]


def _read_summary(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The driver's flat summary, empty when the run has none, and a note where it is left out."""
    if not path.exists():
        return {}, []
    try:
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        return {}, [f"{path} is not JSON ({error}); left out"]
    if not isinstance(summary, dict):
        return {}, [f"{path} is not a JSON object of names and values; left out"]
    return summary, []


def _write(out: Path, html: str, png: bytes) -> tuple[Path, Path]:
    page, curves = out / "report.html", out / "curves.png"
    try:
        out.mkdir(parents=True, exist_ok=True)
        page.write_text(html, encoding="utf-8")
        curves.write_bytes(png)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    return page, curves


def _print_comparison(runs: list[Run]) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))
    rows = comparison(runs)
    for name, cells in rows.items():
        # In a narrow terminal headings and sentences may break over lines, numbers may not.
        table.add_column(name, min_width=max((len(cell) for cell in cells if "±" in cell), default=None))
    for row in rows.itertuples(index=False):
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(FOOTNOTE, style="dim")


def _command_line(args: argparse.Namespace) -> str:
    words = ["abc-rlhf", "report", args.run_dir]
    for name in ("before", "after", "out"):
        if getattr(args, name):
            words += [f"--{name}", getattr(args, name)]
    return shlex.join(words + (["--compare", *args.compare] if args.compare else []))
