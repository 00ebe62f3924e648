"""``python -m abc_plugin.local.flag_values``: what command lines mean to the host, for a process without it.

Reads a question from standard input and writes the answer to standard output, both JSON:

    {"driver": local or ray, "names": [flag, …], "commands": [[word, …], …], "parse_only": [[word, …], …]}
    {"values": [{flag: value}, …], "steps": [PPO steps or null, …], "gpus": devices, "versions": {package: version}}
    or {"error": line, "run": index}

``values`` has the named flags, without dashes, of each command, then of each of ``parse_only``; ``steps`` is of the
commands. Of commands that differ in the seed alone, the first passes the driver's checks of models and prompts too.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from argparse import Namespace
from typing import Any

import torch

from abc_plugin.errors import CreditError, UserError
from abc_plugin.host import ray_driver
from abc_plugin.host.import_openrlhf import import_host
from abc_plugin.local import command

SEED = "train.seed"


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to a question; see the module's text. An error without ``run`` is of the names."""
    import_host()
    from abc_plugin.host.arguments import flag_values
    from abc_plugin.local.checkpoints import versions

    driver, names, commands = question["driver"], question["names"], question["commands"]
    values, steps, checked = [], [], {}
    for index, words in enumerate([*commands, *question["parse_only"]]):
        try:
            args = command.settings(words)[0] if driver == "local" else ray_driver.parsed(words)
            all_values = flag_values(args) | {ray_driver.ON_CPU: ray_driver.ON_CPU in words}
            all_values = {flag.removeprefix("--"): value for flag, value in all_values.items()}
            # The host's parser takes abbreviations, too.
            if unknown := [name for name in names if name not in all_values]:
                return {"error": f"unknown flag {unknown[0]}; abc-rlhf {driver} --help has all flags"}
            values.append({name: all_values[name] for name in names})
            if index < len(commands):
                without_seed = json.dumps({name: value for name, value in values[-1].items() if name != SEED})
                if without_seed not in checked:
                    checked[without_seed] = _check_and_count_steps(args, driver)
                steps.append(checked[without_seed])
        except (UserError, CreditError) as error:
            return {"error": str(error), "run": index}
        except SystemExit:
            return {"error": "--help is no setting of a run; leave it out", "run": index}
    return {"values": values, "steps": steps, "gpus": torch.cuda.device_count(), "versions": versions()}


def _check_and_count_steps(args: Namespace, driver: str) -> int | None:
    """Pass the driver's checks, and count the run's steps; None where they depend on the completions."""
    if driver == "local":
        from abc_plugin.local.driver import check

        prompts = len(check(args))
    else:
        from abc_plugin.host.model_checks import preflight
        from abc_plugin.host.prompt_dataset import read_data

        preflight(args, args.shaping)
        prompts = len(read_data(args))
    if args.algo.dynamic_filtering_enable or args.train.async_enable:
        return None
    return args.train.num_episodes * math.ceil(prompts / args.rollout.batch_size)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = answer(json.load(sys.stdin))
    json.dump(result, sys.stdout)
