"""A study on disk: whose directory it is, its runs' folders, and the tables made of them.

plan.yaml     the plan, its first line HEADER       results.csv   method, settings, seed, step, reward, kl, value_loss
<run>/        run.json: its flags and command       timing.csv    run, seconds, seconds_per_step
              curve.csv: its steps; written last, and whole: the run is finished
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from abc_plugin.errors import UserError
from abc_plugin.report.scalars import KL, REWARD, SECONDS, Curve, read_run
from abc_plugin.tools.study.plan import Plan, Words, read_plan
from abc_plugin.tools.study.settings import Run, column, columns, text

HEADER = "# A study of abc-rlhf; written by it, with what --smoke and the environment made of the plan."
METRICS = {"reward": REWARD, "kl": KL, "value_loss": ("train/critic_loss",)}
PLAN, RUN, CURVE, TIMES, LOG, LOCK = "plan.yaml", "run.json", "curve.csv", "times.json", "output.log", ".lock"


class Study:
    """The directory of a study; nothing is written before ``claim``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock: io.TextIOBase | None = None

    def older(self, plan: Plan) -> dict[str, dict[str, Words]]:
        """Flags of the runs that are there, by folder. Raises UserError where there is no study, or another plan's."""
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file; give another --out")
        there = sorted(path for path in self.root.glob("*") if path.name not in (LOCK, f".{PLAN}.part"))
        if not there:
            return {}
        frozen = self.root / PLAN
        if not frozen.is_file() or not frozen.read_text(encoding="utf-8").startswith(HEADER):
            raise UserError(f"{self.root} has files of another origin, such as {there[0].name}; give another --out")
        _check_same(self.root, read_plan(frozen), plan)
        files = sorted(path for path in self.root.glob(f"*/{RUN}") if not path.parent.name.startswith("."))
        notes = {path.parent.name: json.loads(path.read_text("utf-8")) for path in files}
        return {name: {flag: tuple(words) for flag, words in note["flags"].items()} for name, note in notes.items()}

    def claim(self, plan: Plan, older: dict[str, dict[str, Words]]) -> None:
        """Make the directory this process's until it ends, and note the plan.

        Raises UserError when another has it, or has changed what was ``older`` there.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.root / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system opens it again when the process is gone
        except BlockingIOError:
            self.lock.seek(0)
            raise UserError(
                f"{self.root}: a study is running there (process {self.lock.read().strip()}); wait for it, or give "
                "another --out"
            ) from None
        if self.older(plan) != older:
            raise UserError(f"{self.root}: another study has worked there meanwhile; call again")
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()}\n")
        self.lock.flush()
        write_whole(self.root / PLAN, f"{HEADER}\n{plan.text()}")

    def folder(self, run: Run) -> Path:
        return self.root / run.name

    def refuse_foreign(self, runs: Iterable[Run]) -> None:
        """Raises UserError for a folder of a run's name which the study did not make."""
        for folder in map(self.folder, runs):
            if folder.exists() and not (folder / RUN).is_file():
                raise UserError(
                    f"{folder} has no {RUN}: the study did not make it; move it away, or give another --out"
                )

    def finished(self, run: Run) -> bool:
        return (self.folder(run) / CURVE).exists()

    def versions(self, run: Run) -> dict[str, str] | None:
        """What computed a run."""
        return json.loads((self.folder(run) / RUN).read_text("utf-8")).get("versions")

    def prepare(self, run: Run, command: list[str], versions: dict[str, str], *, goes_on: bool) -> None:
        """The run's folder, with its run.json from the first moment on; emptied, unless a stopped run goes on there.

        Raises UserError for a folder of that name which the study did not make.
        """
        folder, fresh = self.folder(run), self.root / f".new-{run.name}"
        if not folder.exists():
            fresh.mkdir(exist_ok=True)
            write_whole(fresh / RUN, _json({"run": run.name, "flags": run.flags, "settings": run.settings}))
            fresh.rename(folder)
        self.refuse_foreign([run])
        if not goes_on:
            for path in folder.iterdir():
                if path.name != RUN:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        note = {
            "run": run.name,
            "settings": run.settings,
            "flags": run.flags,
            "command": command,
            "versions": versions,
        }
        write_whole(folder / RUN, _json(note))

    def finish(self, run: Run, seconds: float, *, keep_policy: bool) -> str | None:
        """Write the ended run's curve; returns what is wrong with it, in which case it is not finished."""
        folder = self.folder(run)
        try:
            logged = read_run(folder, run.name)
        except UserError as error:
            return str(error)
        curves = {name: dict(logged.curve(tags)) for name, tags in METRICS.items()}
        if wrong := _fault(curves["reward"], run.steps):
            return wrong
        write_whole(folder / TIMES, _json(_times(seconds, logged.curve(SECONDS), len(curves["reward"]))))
        rows = [[step, *(_number(curve.get(step)) for curve in curves.values())] for step in sorted(curves["reward"])]
        write_whole(folder / CURVE, _csv([["step", *METRICS], *rows]))
        if not keep_policy:
            self.drop_weights(run)
        return None

    def drop_weights(self, run: Run) -> None:
        """Delete a finished run's weights and checkpoints."""
        shutil.rmtree(self.folder(run) / "checkpoints", ignore_errors=True)
        for path in self.folder(run).rglob("*.safetensors"):
            path.unlink()

    def write_tables(self, runs: Iterable[Run]) -> None:
        """results.csv and timing.csv of the finished ones; they follow from the runs alone, whatever their order."""
        runs = list(runs)
        names = columns(runs)
        done = sorted(filter(self.finished, runs), key=lambda run: [_place(run.settings[name]) for name in names])
        rows = [["run", "seconds", "seconds_per_step"]]
        results = [[*map(column, names), "step", *METRICS]]
        for run in done:
            times = json.loads((self.folder(run) / TIMES).read_text("utf-8"))
            rows.append([run.name, times["seconds"], times["seconds_per_step"]])
            settings = [run.settings[name] for name in names]
            with open(self.folder(run) / CURVE, newline="", encoding="utf-8") as file:
                results += [settings + row for row in list(csv.reader(file))[1:]]
        write_whole(self.root / "results.csv", _csv(results))
        write_whole(self.root / "timing.csv", _csv(rows))


def _check_same(root: Path, before: Plan, now: Plan) -> None:
    """The common flags are those of the plan that is there, but for flags that all blocks of one of them set."""
    if before.driver != now.driver:
        raise UserError(f"{root} is a study with driver {before.driver}, {now.source} has {now.driver}: another --out")
    set_by_all = {name for plan in (before, now) for name in plan.names if all(name in block for block in plan.blocks)}
    for name in dict.fromkeys([*before.flags, *now.flags]):
        old, new = (_said(plan.flags.get(name)) for plan in (before, now))
        if old != new and name not in set_by_all:
            raise UserError(
                f"{root} is a study whose runs have {name} {old}, {now.source} has {new}: its results would not be "
                "comparable; give another --out, or vary the flag in `runs`"
            )


def _said(words: Words | None) -> str:
    return "the host's default" if words is None else " ".join(map(_canonical, words))


def _canonical(word: str) -> str:
    try:
        return text(float(word))
    except (ValueError, OverflowError):
        return word


def _fault(reward: dict[int, float], steps: int | None) -> str | None:
    """What is wrong with a run that ended well by its own account."""
    wanted = list(range(1, (steps or len(reward)) + 1))
    if sorted(reward) != wanted:
        return f"it logged the reward of {len(reward)} steps, the last is {max(reward)}, the plan has {steps or 'all'}"
    if bad := [step for step in wanted if not math.isfinite(reward[step])]:
        return f"its reward is {reward[bad[0]]} in step {bad[0]}"
    return None


def _times(seconds: float, per_step: Curve, steps: int) -> dict[str, Any]:
    """seconds: of the process that ended the run.  seconds_per_step: mean of what its steps logged."""
    logged = [value for _, value in per_step]
    mean = sum(logged) / len(logged) if logged else seconds / steps
    return {"seconds": round(seconds, 1), "seconds_per_step": round(mean, 3)}


def _number(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def _place(setting: str) -> tuple:
    """Where a setting sorts: nothing, then numbers, then words."""
    try:
        return (1, float(setting), setting)
    except ValueError:
        return (2 if setting else 0, 0.0, setting)


def _csv(rows: list[list]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _json(value: object) -> str:
    return json.dumps(value, indent=1) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
