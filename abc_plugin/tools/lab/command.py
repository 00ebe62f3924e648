"""``abc-rlhf lab``: what credit does to the policy gradient, exactly, before any GPU is spent."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from abc_plugin.credit.methods import Method, available, load
from abc_plugin.errors import UserError
from abc_plugin.output_directory import check_file

try:
    from abc_plugin.tools.lab import findings_text
    from abc_plugin.tools.lab.bias_plot import draw as draw_png
    from abc_plugin.tools.lab.gradient_bias import cases, measure, settings
    from abc_plugin.tools.lab.mdp import Completions
    from abc_plugin.tools.lab.policy_gradient import CRITICS
    from abc_plugin.tools.lab.random_processes import EXAMPLE, draw, paper_example
except ModuleNotFoundError as error:
    raise UserError(f"abc-rlhf lab needs {error.name}; pip install 'abc-plugin[report]'") from None

SUFFIXES = ("json", "md", "png")
MOST_COMPLETIONS = 20_000
MOST_REWARDS = 5_000_000  # reward models x completions x positions: 40 MB a table
SHOWN = ("cosine", "worst", "norm_ratio", "flips", "noise", "gain", "best")  # columns that fit a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("--vocabulary", type=int, default=3, metavar="V", help="tokens to choose from (3)")
    add("--length", type=int, default=4, metavar="L", help="tokens of a completion (4)")
    add("--reward_models", type=int, default=64, metavar="N", help="random reward models (64)")
    add("--seed", type=int, default=0, help="of all random tables (0)")
    add("--methods", nargs="+", metavar="NAME", help="default: every registered method")
    add("--betas", nargs="+", type=float, default=[0.5, 0.8, 1.0], metavar="B", help="(0.5 0.8 1)")
    add("--lambdas", nargs="+", type=float, default=[1.0, 0.95], metavar="X", help="of GAE (1 0.95)")
    add(
        "--critic",
        choices=CRITICS,
        default="exact",
        help="value function: exact (of the shaped reward under the current policy), noisy (with errors of 0.5 per "
        "prefix), constant (the mean reward), prefix (the reward model's score so far: the host's critic in its first "
        "step), zero",
    )
    add(
        "--rewards",
        choices=("table", "sum"),
        default="table",
        help="table: independent per completion; sum: of a value per position and token; both standardised",
    )
    add("--reward_mean", type=float, default=0.0, metavar="X", help="added to the standardised rewards (0)")
    add("--ends", action="store_true", help="token 0 ends a completion, so that lengths differ")
    add("--out", type=Path, default=Path("runs/lab"), metavar="DIR", help="(runs/lab)")


def run(args: argparse.Namespace) -> int:
    """Print the tables and the verdict, write lab.json, lab.md and lab.png.

    Raises UserError on values out of range, unknown methods, too many completions, and an unusable --out.
    """
    _check(args)
    setting = {name: value for name, value in vars(args).items() if name not in ("command", "out")}
    made, skipped = cases(_methods(args.methods))
    setting["methods"] = list(dict.fromkeys(case.name for case in made))
    _refuse_other_results(args.out, setting)
    console = Console(highlight=False)
    example = paper_example()
    _print_example(console, example)
    space = Completions(args.vocabulary, args.length, ends=args.ends)
    tables = draw(space, args.reward_models, args.seed, rewards=args.rewards, offset=args.reward_mean)
    wanted = settings(made, args.betas, args.lambdas)
    measured = measure(space, tables, wanted, args.critic, args.seed)
    rows = list(track(measured, "lab", len(wanted), console=Console(stderr=True), transient=True))
    summary = findings_text.summarise(rows)
    sentences = findings_text.verdict(summary)
    if skipped:
        sentences.append(f"Skipped, because the lab cannot make what they look at: {', '.join(skipped)}.")
    title = (
        f"{args.reward_models} random reward models over {args.vocabulary}^{args.length} completions, "
        f"lambda {args.lambdas[0]:g}, {args.critic} critic"
    )
    console.print(title + (" (the other lambdas are in lab.md)" if len(args.lambdas) > 1 else ""))
    console.print(_table(summary[summary["lambda"] == args.lambdas[0]]))
    lines = json.loads(summary.to_json(orient="records", double_precision=15))  # infinities as null
    everything = {"settings": setting, "example": example, "verdict": sentences, "rows": lines}
    files = [args.out / f"lab.{suffix}" for suffix in SUFFIXES]
    try:
        files[0].write_text(json.dumps(everything, indent=1), encoding="utf-8")
        files[1].write_text(findings_text.as_markdown(summary, setting, example, sentences), encoding="utf-8")
        files[2].write_bytes(draw_png(summary, f"{title}; equal points are drawn side by side"))
    except OSError as error:
        raise UserError(f"cannot write to {args.out}: {error.strerror}; choose another --out") from None
    for sentence in sentences:
        console.print(sentence, markup=False)
    print(f"abc-rlhf lab: {len(rows)} settings of {args.reward_models} reward models: {' '.join(map(str, files))}")
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, least in (("vocabulary", 2), ("length", 1), ("reward_models", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} is too small; the least is {least}")
    for name in ("betas", "lambdas"):
        for value in getattr(args, name):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"--{name} {value:g} is outside [0, 1]")
    if not abs(args.reward_mean) <= 10.0:
        raise UserError(f"--reward_mean {args.reward_mean:g} is outside [-10, 10] standard deviations")
    completions = args.vocabulary ** min(args.length, 64)
    if completions > MOST_COMPLETIONS:
        raise UserError(
            f"--vocabulary {args.vocabulary} --length {args.length} has more than {MOST_COMPLETIONS:,} completions; "
            "lower --length or --vocabulary"
        )
    most = MOST_REWARDS // (completions * args.length)
    if args.reward_models > most:
        raise UserError(
            f"--reward_models {args.reward_models} of {completions:,} completions is too many; at most {most}"
        )


def _methods(names: list[str] | None) -> dict[str, Method]:
    """none, which the others are compared with, and the wanted ones."""
    known = available()
    for name in names or ():
        if name not in known:
            raise UserError(f"--methods {name!r} is not registered; registered: {', '.join(known)}")
    return {name: load(name) for name in dict.fromkeys(["none", *(names or known)])}


def _refuse_other_results(out: Path, setting: dict[str, Any]) -> None:
    """Make the directory; refuse one that cannot be written, or holds the results of other settings."""
    for suffix in SUFFIXES:
        check_file("--out", out / f"lab.{suffix}")
    earlier = out / "lab.json"
    try:
        same = not earlier.exists() or json.loads(earlier.read_bytes()).get("settings") == setting
    except (ValueError, AttributeError):
        same = False
    if not same:
        raise UserError(f"{earlier} is of a lab with other settings; choose another --out, or remove it")


def _print_example(console: Console, example: dict[float, float]) -> None:
    console.print(EXAMPLE, markup=False)
    table = Table(box=SIMPLE, padding=(0, 1))
    table.add_column("beta")
    for beta in example:
        table.add_column(f"{beta:g}", justify="right")
    table.add_row("gradient", *(f"{value:+.4f}" for value in example.values()))
    console.print(table)


def _table(summary: pd.DataFrame) -> Table:
    """The columns that fit a terminal; the files have all."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("credit", no_wrap=True)
    for heading in ("beta", *(findings_text.COLUMNS[name].heading for name in SHOWN)):
        table.add_column(heading, justify="right", no_wrap=True)
    repeated = summary.credit.duplicated()
    for number, line in summary.iterrows():
        table.add_row("" if repeated[number] else line.credit, f"{line.beta:g}", *findings_text.cells(line, SHOWN))
    return table
