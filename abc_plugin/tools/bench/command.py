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
    "gpu": ("abc_plugin.tools.bench.gpu", "every claim on this machine's card: kernels, cost, runs, QLoRA, serve-rm"),
}
# flag: how it is read (argparse), and its help; %(default)s is told with it.
FORWARDS = {
    "--tokens": {"type": int, "nargs": "+", "default": [256, 1024], "help": "sequence lengths"},
    "--repeats": {"type": int, "default": 12, "help": "rounds; each runs every variant once"},
    "--model": {"help": "transformers model to load; default: a random llama, 8 layers, width 512"},
    "--batch": {"type": int, "nargs": "+", "default": [1], "help": "sequences per forward"},
}
FLAGS: dict[str, dict[str, dict]] = {
    "recovery": FORWARDS | {"--png": {"help": "also draw the ratios into this file"}},
    "methods": FORWARDS,
    "parity": {},
    "server": {
        "--model": {"required": True, "help": "the reward model's directory"},
        "--clients": {"type": int, "default": 64, "help": "clients, each with one text at a time"},
        "--batch": {"type": int, "default": 32, "help": "texts of a forward"},
        "--tokens": {"type": int, "default": 256, "help": "tokens of a text"},
        "--repeats": {"type": int, "default": 5, "help": "rounds"},
    },
    "gpu": {
        "--minutes": {"type": float, "default": 10, "help": "rows that do not fit in are left out"},
        "--rows": {"default": "", "metavar": "TEXT", "help": 'only those with it in "part: name"; all by default'},
        "--out": {"default": "runs/gpu", "help": "directory of the table, as Markdown and JSON"},
        "--device": {"choices": ["cuda", "cpu"], "default": "cuda", "help": "cpu: tiny models, to try the script"},
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Subcommands and their flags."""
    commands = parser.add_subparsers(dest="measurement", required=True, metavar="MEASUREMENT")
    for name, (_, help_) in MEASUREMENTS.items():
        command = commands.add_parser(name, help=help_, description=help_)
        for flag, options in FLAGS[name].items():
            told = " (%(default)s)" if options.get("default") else ""
            command.add_argument(flag, **options | {"help": options["help"] + told})


def run(args: argparse.Namespace) -> int:
    """Run one measurement."""
    return importlib.import_module(MEASUREMENTS[args.measurement][0]).run(args)
