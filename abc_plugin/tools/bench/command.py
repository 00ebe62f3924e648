"""``abc-rlhf bench``: what credit costs, and whether the recovered row is exact."""

from __future__ import annotations

import argparse
import importlib

# flag: how it is read (argparse), and its help; %(default)s is told with it.
FORWARDS = {
    "--tokens": {"type": int, "nargs": "+", "default": [256, 1024], "help": "sequence lengths"},
    "--repeats": {"type": int, "default": 12, "help": "rounds; each runs every variant once"},
    "--model": {"help": "transformers model to load; default: a random llama, 8 layers, width 512"},
    "--batch": {"type": int, "nargs": "+", "default": [1], "help": "sequences per forward"},
}
SERVER = {
    "--model": {"required": True, "help": "the reward model's directory"},
    "--clients": {"type": int, "default": 64, "help": "clients, each with one text at a time"},
    "--batch": {"type": int, "default": 32, "help": "texts of a forward"},
    "--tokens": {"type": int, "default": 256, "help": "tokens of a text"},
    "--repeats": {"type": int, "default": 5, "help": "rounds"},
}
GPU = {
    "--minutes": {"type": float, "default": 10, "help": "rows that do not fit in are left out"},
    "--rows": {"default": "", "metavar": "TEXT", "help": 'only those with it in "part: name"; all by default'},
    "--out": {"default": "runs/gpu", "help": "directory of the table, as Markdown and JSON"},
    "--device": {"choices": ["cuda", "cpu"], "default": "cuda", "help": "cpu: tiny models, to try the script"},
}
PNG = {"--png": {"help": "also draw the ratios into this file"}}
# name: (module with run(args), one line of help, flags)
MEASUREMENTS = {
    "recovery": ("forward_cost", "time and memory of a forward with credit, as ratios to one without", FORWARDS | PNG),
    "methods": ("forward_cost", "what each method's evidence costs beside the model's forward", FORWARDS),
    "parity": ("eager_parity", "the recovered row against eager attention, over model families", {}),
    "server": ("server_load", "texts per second of serve-rm with many clients, to batched forwards", SERVER),
    "gpu": ("gpu_table", "every claim on this machine's card: kernels, cost, runs, QLoRA, serve-rm", GPU),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Subcommands and their flags."""
    commands = parser.add_subparsers(dest="measurement", required=True, metavar="MEASUREMENT")
    for name, (_, help_, flags) in MEASUREMENTS.items():
        command = commands.add_parser(name, help=help_, description=help_)
        for flag, options in flags.items():
            told = " (%(default)s)" if options.get("default") else ""
            command.add_argument(flag, **options | {"help": options["help"] + told})


def run(args: argparse.Namespace) -> int:
    """Run one measurement."""
    return importlib.import_module(f"abc_plugin.tools.bench.{MEASUREMENTS[args.measurement][0]}").run(args)
