"""``abc-rlhf bench``: what credit costs, and whether the recovered row is exact."""

from __future__ import annotations

import argparse
import importlib

# name: (module with run(args), one line of help)
MEASUREMENTS = {
    "recovery": ("abc_plugin.tools.bench.cost", "time and memory of a forward with credit, as ratios to one without"),
    "methods": ("abc_plugin.tools.bench.cost", "what each method's evidence costs beside the model's forward"),
    "parity": ("abc_plugin.tools.bench.parity", "the recovered row against eager attention, over model families"),
    "server": ("abc_plugin.tools.bench.server", "texts per second of serve-rm with many clients, to batched forwards"),
}
SERVER = (
    ("--clients", 64, "clients, each with one text at a time"),
    ("--batch", 32, "texts of a forward"),
    ("--tokens", 256, "tokens of a text"),
    ("--repeats", 5, "rounds"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Subcommands and their flags."""
    commands = parser.add_subparsers(dest="measurement", required=True, metavar="MEASUREMENT")
    for name, (_, help_) in MEASUREMENTS.items():
        command = commands.add_parser(name, help=help_, description=help_)
        if name == "parity":
            continue
        if name == "server":
            command.add_argument("--model", required=True, help="the reward model's directory")
            for flag, default, what in SERVER:
                command.add_argument(flag, type=int, default=default, help=f"{what} ({default})")
            continue
        command.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="sequence lengths (256 1024)")
        command.add_argument("--repeats", type=int, default=12, help="rounds; each runs every variant once (12)")
        command.add_argument(
            "--model", help="transformers model to load; default: a random llama, 8 layers, width 512"
        )
        command.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences per forward (1)")
        if name == "recovery":
            command.add_argument("--png", help="also draw the ratios into this file")


def run(args: argparse.Namespace) -> int:
    """Run one measurement."""
    return importlib.import_module(MEASUREMENTS[args.measurement][0]).run(args)
