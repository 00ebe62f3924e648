"""What a plan's flags mean: asked from the host's own parser, in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from abc_plugin.errors import UserError
from abc_plugin.tools.study.plan import Plan, Words, command_words
from abc_plugin.tools.study.table import CREDIT_SETTINGS

# Short names of columns; every other flag keeps its name. The first, second and last are always there.
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
ALWAYS = ("reward_shaping", "shaping.beta", "train.seed")


@dataclass
class Run:
    """One training of a study.

    flags: what its command line says.  settings: what the host makes of every flag that the study names, as text;
    equal settings are the same run.  steps: PPO steps it will make; None where nobody can know.  name: its folder.
    """

    flags: dict[str, Words]
    settings: dict[str, str]
    steps: int | None = None
    name: str = field(default="")

    @property
    def identity(self) -> frozenset:
        return frozenset(self.settings.items())


@dataclass(frozen=True)
class Resolved:
    """The host's answer: the plan's runs, each once and seed by seed, the older ones', the number of GPUs, and what
    computes here."""

    runs: list[Run]
    older: list[Run]
    gpus: int
    versions: dict[str, str]


def resolve(plan: Plan, older: dict[str, dict[str, Words]]) -> Resolved:
    """Ask the host what the flags of the plan's runs mean, and those of the runs that are there already, by name.

    Seeds come first in the order of the runs: a study that is stopped early has all methods of the same seeds.
    Raises UserError for what a run's own checks would refuse, of flags, models and prompts.
    """
    grid = plan.grid()
    names = list(dict.fromkeys([*ALWAYS, *plan.names, *(name for flags in older.values() for name in flags)]))
    question = {
        "driver": plan.driver,
        "names": names,
        "commands": [command_words(flags) for flags in grid],
        "parse_only": [command_words(flags) for flags in older.values()],
    }
    answer = ask_host(question)
    if "error" in answer and "run" not in answer:
        raise UserError(f"{plan.source}: {answer['error']}")
    if "error" in answer:
        flags = [*grid, *older.values()][answer["run"]]
        own = [f"{name} {' '.join(words)}" for name, words in flags.items() if plan.flags.get(name) != words]
        raise UserError(f"{plan.source}: {answer['error']} [run: {', '.join(own)}]")
    values = [_settings(value) for value in answer["values"]]
    runs = [Run(*each) for each in zip(grid, values, answer["steps"], strict=False)]
    there = [Run(flags, values[len(grid) + i], name=name) for i, (name, flags) in enumerate(older.items())]
    once = {run.identity: run for run in reversed(runs)}
    first = {run.identity: place for place, run in reversed(list(enumerate(runs)))}
    seeds = list(dict.fromkeys(run.settings["train.seed"] for run in runs))
    ordered = sorted(once.values(), key=lambda run: (seeds.index(run.settings["train.seed"]), first[run.identity]))
    return Resolved(ordered, there, answer["gpus"], answer["versions"])


def ask_host(question: dict[str, Any]) -> dict[str, Any]:
    """The answer of ``abc_plugin.local.command_lines`` to a question, which is described there."""
    done = subprocess.run(
        [sys.executable, "-m", "abc_plugin.local.command_lines"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"the host's parser ended with status {done.returncode}: {' | '.join(lines[-3:])}")
    return json.loads(done.stdout)


def _settings(values: dict[str, Any]) -> dict[str, str]:
    settings = {name: text(value) for name, value in values.items()}
    if settings["reward_shaping"] == "none":  # they move nothing
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


def column(flag: str) -> str:
    """A flag's name as a column of results.csv."""
    return COLUMNS.get(flag, flag)


def columns(runs: Iterable[Run]) -> list[str]:
    """The flags that are columns: method, beta, all others of which the runs have several values, seed.

    A flag that all runs are given alike is none, though the host may make something else of it in some: of a critic's
    path under an estimator without critic. The flag that it follows tells those apart.
    """
    runs = list(runs)
    named = dict.fromkeys([*COLUMNS, *sorted(name for run in runs for name in run.settings)])
    both = {name: ({run.settings.get(name) for run in runs}, {run.flags.get(name) for run in runs}) for name in named}
    varied = [name for name, (values, words) in both.items() if len(values) > 1 and len(words) > 1]
    return [*ALWAYS[:2], *(name for name in varied if name not in ALWAYS), ALWAYS[2]]


def give_names(runs: list[Run], older: list[Run]) -> None:
    """Each run the name of the folder it has, or a new one that tells its varied settings."""
    folders = {run.identity: run.name for run in older}
    varied, taken = columns([*older, *runs]), {run.name for run in older}
    for run in runs:
        run.name = folders.get(run.identity) or _free(_name(run, varied), taken)
        taken.add(run.name)


def _name(run: Run, varied: list[str]) -> str:
    method, *others = varied
    parts = [f"{column(name)}{_short(run.settings[name])}" for name in others if run.settings[name]]
    return re.sub(r"[^\w.+-]", "_", "-".join([run.settings[method], *parts]))


def _short(setting: str) -> str:
    return setting.rstrip("/").rpartition("/")[2] or setting


def _free(name: str, taken: set[str]) -> str:
    return next(free for n in range(1, len(taken) + 2) if (free := f"{name}~{n}" if n > 1 else name) not in taken)
