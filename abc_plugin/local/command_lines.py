"""``python -m abc_plugin.local.command_lines``: what command lines mean to the host, told to a process without it.

Reads a question from standard input and writes the answer to standard output, both JSON:

    {"driver": local or ray, "names": [flag, …], "commands": [[word, …], …], "parse_only": [[word, …], …]}
    {"values": [{flag: value}, …], "steps": [PPO steps or null, …], "gpus": devices, "versions": {package: version}}
    or {"error": line, "run": index}

``values`` has the named flags, without dashes, of each command, then of each of ``parse_only``; ``steps`` is of the
commands. Of commands that differ in the seed alone, the first passes the driver's checks of models and prompts too.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from abc_plugin.errors import CreditError, UserError
from abc_plugin.host import ray_driver
from abc_plugin.host.imports import import_host
from abc_plugin.local import driver as local
from abc_plugin.local.checkpoints import versions

SEED = "train.seed"


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to a question; see the module's text. An error without ``run`` is of the names."""
    commands, values, steps = question["commands"], [], []
    known: dict[str, int | None] = {}
    with _seen_once():
        for index, words in enumerate([*commands, *question["parse_only"]]):
            try:
                args = local.parsed(words)[0] if question["driver"] == "local" else ray_driver.parsed(words)
                settings = _settings(args, words)
                # The host's parser takes abbreviations, too.
                if unknown := [name for name in question["names"] if name not in settings]:
                    return {"error": f"unknown flag {unknown[0]}; abc-rlhf {question['driver']} --help has all flags"}
                values.append({name: settings[name] for name in question["names"]})
                if index < len(commands):
                    alike = json.dumps({name: value for name, value in values[-1].items() if name != SEED})
                    if alike not in known:
                        known[alike] = _checked_steps(args, question["driver"])
                    steps.append(known[alike])
            except (UserError, CreditError) as error:
                return {"error": str(error), "run": index}
            except SystemExit:
                return {"error": "--help is no setting of a run; leave it out", "run": index}
    return {"values": values, "steps": steps, "gpus": torch.cuda.device_count(), "versions": versions()}


@contextlib.contextmanager
def _seen_once() -> Iterator[None]:
    """What is the same for many runs, the host's code and tokenizers, is looked at once."""
    import_host()
    from abc_plugin.host import checks

    with contextlib.ExitStack() as stack:
        for module, name in ((local, "import_host"), (ray_driver, "import_cluster_host"), (checks, "side")):
            once = functools.cache(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, once))
        yield


def _settings(args: Namespace, words: list[str]) -> dict[str, Any]:
    """All settings by flag, without dashes."""
    from abc_plugin.local.resume_checks import by_flag

    settings = by_flag(args) | {ray_driver.ON_CPU: ray_driver.ON_CPU in words}
    return {flag.removeprefix("--"): value for flag, value in settings.items()}


def _checked_steps(args: Namespace, driver: str) -> int | None:
    """Pass the driver's checks, and count the run's steps; None where they depend on the completions."""
    from abc_plugin.host.checks import preflight
    from abc_plugin.host.model_files import read_data

    if driver == "local":
        prompts = len(local.check(args))
    else:
        preflight(args, args.shaping)
        prompts = len(read_data(args))
    if args.algo.dynamic_filtering_enable or args.train.async_enable:
        return None
    return args.train.num_episodes * math.ceil(prompts / args.rollout.batch_size)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        said = answer(json.load(sys.stdin))
    json.dump(said, sys.stdout)
