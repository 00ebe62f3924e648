"""``abc-rlhf study PLAN.yaml`` runs a plan's grid of trainings; ``abc-rlhf study report`` compares them."""

from __future__ import annotations

import argparse

from abc_plugin.errors import UserError


def main(argv: list[str]) -> int:
    """Run or report; returns the exit status. Raises UserError for all that can be refused before a run starts."""
    if argv and argv[0] == "report":
        from abc_plugin.tools.study.report_command import add_report_arguments, report

        parser = argparse.ArgumentParser(prog="abc-rlhf study report", description="compare a study's methods")
        add_report_arguments(parser)
        return report(parser.parse_args(argv[1:]))
    args = _parser().parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least one run at a time")
    try:
        from abc_plugin.tools.study.runner import run_study
    except ModuleNotFoundError as error:
        raise UserError(f"abc-rlhf study needs {error.name}; pip install 'abc-plugin[study]'") from None

    return run_study(args.plan, args.out, smoke=args.smoke, jobs=args.jobs, gpus=args.gpus)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="abc-rlhf study",
        usage="abc-rlhf study PLAN.yaml [--out DIR] [--jobs N] [--gpus 0,1] [--smoke]\n"
        "       abc-rlhf study report DIR|FILE [--out DIR]",
        description="Train every run of a plan (abc_plugin/tools/study/README.md); a later call goes on.",
    )
    parser.add_argument("plan", metavar="PLAN.yaml", help="flags that all runs share, and the grid of those that vary")
    parser.add_argument("--out", metavar="DIR", help="the study's directory (default: the plan's `out`)")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: one per GPU, else 2; with driver ray 1)"
    )
    parser.add_argument("--gpus", metavar="0,1", help="the GPUs to share out, one to each run (default: all)")
    parser.add_argument("--smoke", action="store_true", help="the plan with its `smoke` section, in DIR-smoke")
    return parser
