"""What a plan's options mean: asked from the host's own parser, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from abc_plugin.errors import UserError
from abc_plugin.tools.study.plan import Plan, Words, command_words
from abc_plugin.tools.study.results_table import BASELINE, CREDIT_SETTINGS

# Short names of columns; every other option keeps its name. The first, second and last are always there.
COLUMNS = {
    "reward_shaping": "method",
    "shaping.beta": "beta",
    "algo.advantage.lambd": "lambda",
    "rollout.max_new_tokens": "length",
    "algo.kl.init_coef": "kl_coef",
    "algo.advantage.estimator": "estimator",
    "critic.adam.lr": "critic_lr",
    "train.seed": "seed",
}
LONGEST = 200  # letters of a folder's name; file systems take 255 bytes
ALWAYS = ("reward_shaping", "shaping.beta", "train.seed")


@dataclass
class Run:
    """One training of a study.

    options: those on its command line.  settings: what the host makes of every option that the study names, as text;
    equal settings are the same run.  steps: PPO steps it will make; None where nobody can know.  name: its folder.
    """

    options: dict[str, Words]
    settings: dict[str, str]
    steps: int | None = None
    name: str = ""

    @property
    def identity(self) -> frozenset:
        return frozenset(self.settings.items())


def resolve(plan: Plan, older: dict[str, dict[str, Words]]) -> tuple[list[Run], list[Run], dict[str, Any]]:
    """The plan's runs, each once and seed by seed; those that are there already; and the host's answer.

    Seeds come first in the order of the runs: a study that is stopped early has all methods of the same seeds.
    Raises UserError for what a run's own checks would refuse: options, models and prompts.
    """
    options = [*plan.runs, *older.values()]
    question = {
        "driver": plan.driver,
        "names": list(dict.fromkeys([*ALWAYS, *(name for each in options for name in each)])),
        "commands": [command_words(each) for each in plan.runs],
        "parse_only": [command_words(each) for each in older.values()],
    }
    answer = ask_host(question)
    if "error" in answer:
        mine = options[answer["run"]] if "run" in answer else {}
        own = ", ".join(f"{name} {' '.join(words)}" for name, words in mine.items() if plan.common.get(name) != words)
        raise UserError(f"{plan.source}: {answer['error']}" + (f" [run: {own}]" if own else ""))
    runs = [Run(*each) for each in zip(options, map(_settings, answer["values"]), strict=True)]
    there = runs[len(plan.runs) :]
    for run, name in zip(there, older, strict=True):
        run.name = name
    unique: dict[frozenset, Run] = {}
    for run, steps in zip(runs, answer["steps"], strict=False):
        run.steps = steps
        unique.setdefault(run.identity, run)
    seeds = list(dict.fromkeys(run.settings["train.seed"] for run in runs))
    return sorted(unique.values(), key=lambda run: seeds.index(run.settings["train.seed"])), there, answer


def ask_host(question: dict[str, Any]) -> dict[str, Any]:
    """The answer of ``abc_plugin.local.flag_values`` to a question, which is described there."""
    command = [sys.executable, "-m", "abc_plugin.local.flag_values"]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"the host's parser ended with status {done.returncode}: {' | '.join(lines[-3:])}")
    return json.loads(done.stdout)


def _settings(values: dict[str, Any]) -> dict[str, str]:
    settings = {name: text(value) for name, value in values.items()}
    if settings["reward_shaping"] == BASELINE:  # they change nothing there
        settings |= {name: "" for name in settings if column(name) in CREDIT_SETTINGS}
    return settings


def text(value: Any) -> str:
    """A setting as text: equal numbers read the same, 1 and 1.0 as 1."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(text, value))
    return repr(int(value) if value.is_integer() else value) if isinstance(value, float) else str(value)


def column(option: str) -> str:
    """An option's name as a column of results.csv."""
    return COLUMNS.get(option, option)


def columns(runs: Iterable[Run]) -> list[str]:
    """The options that are columns: method, beta, all others of which the runs have several values, seed.

    An option that all runs are given alike is none, though the host may make something else of it in some: of a
    critic's path under an estimator without critic. The option that it follows tells those apart.
    """
    runs = list(runs)
    names = dict.fromkeys([*COLUMNS, *sorted({name for run in runs for name in run.settings})])
    varied = [
        name
        for name in names
        if len({run.settings.get(name) for run in runs}) > 1 and len({run.options.get(name) for run in runs}) > 1
    ]
    return [*ALWAYS[:2], *(name for name in varied if name not in ALWAYS), ALWAYS[2]]


def give_names(runs: list[Run], older: list[Run]) -> None:
    """Each run the name of the folder it has, or a new one that tells its varied settings, up to LONGEST letters."""
    folders = {run.identity: run.name for run in older}
    (method, *others), taken = columns([*older, *runs]), {run.name for run in older}
    for run in runs:
        given = {column(name): run.settings[name] for name in others if run.settings[name]}
        parts = [
            f"{name}{value.rstrip('/').rpartition('/')[2]}" for name, value in given.items()
        ]  # of a path its last
        name = re.sub(r"[^\w.+-]", "_", "-".join([run.settings[method], *parts]))
        if len(name) > LONGEST:
            name = f"{name[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        free = [name, *(f"{name}~{n}" for n in range(2, len(taken) + 2))]
        run.name = folders.get(run.identity) or next(each for each in free if each not in taken)
        taken.add(run.name)
