"""``abc-rlhf study PLAN.yaml`` runs a plan's grid of trainings; ``abc-rlhf study report`` compares them."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from abc_plugin.errors import UserError

USAGE = """abc-rlhf study PLAN.yaml [--out DIR] [--jobs N] [--gpus 0,1] [--smoke]
       abc-rlhf study report DIR|FILE [--out DIR]"""
SOURCE = """what abc-rlhf study wrote (results.csv in it is read), or any CSV or JSONL with a line per run and step:
method, seed, step, reward and, if known, kl, beta; further columns are settings"""


def main(argv: list[str]) -> int:
    """Run or report; returns the exit status. Raises UserError for all that can be refused before a run starts."""
    reporting = argv[:1] == ["report"]
    command = "abc-rlhf study report" if reporting else "abc-rlhf study"
    if reporting:
        parser = argparse.ArgumentParser(prog=command, description="Compare a study's methods.")
        parser.add_argument("source", metavar="DIR|FILE", help=SOURCE)
        parser.add_argument("--out", metavar="DIR", help="where to write (default: DIR, or FILE's name and -report)")
    else:
        about = "Train every run of a plan (abc_plugin/tools/study/README.md); a later call goes on."
        parser = argparse.ArgumentParser(prog=command, usage=USAGE, description=about)
        parser.add_argument(
            "plan", metavar="PLAN.yaml", help="flags that all runs share, and the grid of those that vary"
        )
        parser.add_argument("--out", metavar="DIR", help="the study's directory (default: the plan's `out`)")
        jobs = "runs at a time (default: one per GPU, else 2; with driver ray 1)"
        parser.add_argument("--jobs", type=int, metavar="N", help=jobs)
        parser.add_argument("--gpus", metavar="0,1", help="the GPUs to share out, one to each run (default: all)")
        parser.add_argument("--smoke", action="store_true", help="the plan with its `smoke` section, in DIR-smoke")
    args = parser.parse_args(argv[reporting:])
    try:
        if reporting:
            return _report(args)
        if args.jobs is not None and args.jobs < 1:
            raise UserError(f"--jobs {args.jobs}: at least one run at a time")
        from abc_plugin.tools.study.runner import run_study

        return run_study(args.plan, args.out, smoke=args.smoke, jobs=args.jobs, gpus=args.gpus)
    except ModuleNotFoundError as error:
        raise UserError(f"{command} needs {error.name}; pip install 'abc-plugin[study]'") from None


def _report(args: argparse.Namespace) -> int:
    """Write the report's files; print the main table, what limits it, and one line with the paths."""
    from rich.console import Console
    from rich.table import Table

    from abc_plugin.tools.study import report_files
    from abc_plugin.tools.study.comparisons import analyse
    from abc_plugin.tools.study.results_table import locate, read

    path = locate(args.source)
    own = path.parent if Path(args.source).is_dir() else path.with_name(f"{path.stem}-report")
    out = Path(args.out or own)
    analysis = analyse(read(path))
    contents = report_files.files(analysis, path.name, shlex.join(["abc-rlhf", "study", "report", args.source]))
    report_files.write(out, contents)
    console, overview = Console(markup=False, highlight=False), report_files.tables(analysis).get("overview")
    if overview is not None:
        shown = Table(*overview, box=None)
        for row in overview.itertuples(index=False, name=None):
            shown.add_row(*row)
        console.print(shown)
    for warning in analysis.warnings:
        console.print(f"Mind: {warning}", soft_wrap=True)
    paths = " ".join(str(out / name) for name in contents)
    console.print(f"abc-rlhf study report: {analysis.headline()} {paths}", soft_wrap=True)
    return 0
