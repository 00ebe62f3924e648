"""A study on disk: whose directory it is, its runs' folders, and the tables made of them.

plan.yaml     the plan, its first line HEADER       results.csv   method, settings, seed, step, reward, kl, value_loss
<run>/        run.json: its options and command     timing.csv    run, seconds, seconds_per_step
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
from abc_plugin.report.runs import KL, REWARD, SECONDS, read_run
from abc_plugin.tools.study.plan import Plan, Words, read_plan
from abc_plugin.tools.study.settings import Run, column, columns, text

HEADER = "# A study of abc-rlhf; written by it, with what --smoke and the environment made of the plan."
TAGS = {"reward": REWARD, "kl": KL, "value_loss": ("train/critic_loss",)}
PLAN, RUN, CURVE, TIMES, LOG, LOCK = "plan.yaml", "run.json", "curve.csv", "times.json", "output.log", ".lock"
RESULTS, TIMING = "results.csv", "timing.csv"


class Study:
    """The directory of a study; nothing is written before ``claim``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock: io.TextIOBase | None = None

    def older(self, plan: Plan) -> dict[str, dict[str, Words]]:
        """Options of the runs that are there, by folder. Raises UserError for a directory or plan of another study."""
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file; give another --out")
        there = sorted(path for path in self.root.glob("*") if path.name not in (LOCK, f".{PLAN}.part"))
        if not there:
            return {}
        written = self.root / PLAN
        if not written.is_file() or not written.read_text(encoding="utf-8").startswith(HEADER):
            raise UserError(f"{self.root} has files of another origin, such as {there[0].name}; give another --out")
        _check_same(self.root, read_plan(written), plan)
        notes = {path.parent.name: _read_json(path) for path in sorted(self.root.glob(f"[!.]*/{RUN}"))}
        return {
            name: {option: tuple(words) for option, words in note["flags"].items()} for name, note in notes.items()
        }

    def claim(self, plan: Plan, older: dict[str, dict[str, Words]]) -> None:
        """Make the directory this process's until it ends, and write the plan.

        Raises UserError when another process has it, or has changed what was ``older`` there.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.root / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system unlocks it when the process is gone
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
        write_whole(self.root / PLAN, f"{HEADER}\n{plan.text}")

    def folder(self, run: Run) -> Path:
        return self.root / run.name

    def refuse_foreign(self, runs: Iterable[Run]) -> None:
        """Raises UserError for a folder of a run's name which the study did not make."""
        for folder in map(self.folder, runs):
            if folder.exists() and not (folder / RUN).is_file():
                raise UserError(f"{folder} has no {RUN}, so it is not the study's; move it, or give another --out")

    def finished(self, run: Run) -> bool:
        return (self.folder(run) / CURVE).exists()

    def versions(self, run: Run) -> dict[str, str] | None:
        """The packages' versions that a run was made with."""
        return _read_json(self.folder(run) / RUN).get("versions")

    def prepare(self, run: Run, command: list[str], versions: dict[str, str], *, goes_on: bool) -> None:
        """The run's folder, with its run.json from the first moment on; emptied, unless a stopped run goes on there.

        Raises UserError for a folder of that name which the study did not make.
        """
        folder, fresh = self.folder(run), self.root / f".new-{run.name}"
        note = {"run": run.name, "settings": run.settings, "flags": run.options}
        if not folder.exists():
            fresh.mkdir(exist_ok=True)
            write_whole(fresh / RUN, _json(note))
            fresh.rename(folder)
        self.refuse_foreign([run])
        if not goes_on:
            for path in folder.iterdir():
                if path.name != RUN:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write_whole(folder / RUN, _json(note | {"command": command, "versions": versions}))

    def finish(self, run: Run, seconds: float, *, keep_policy: bool) -> str | None:
        """Write the ended run's curve; returns what is wrong with it, in which case it is not finished."""
        folder = self.folder(run)
        try:
            logged = read_run(folder, run.name)
        except UserError as error:
            return str(error)
        curves = {name: logged.curve(tags).to_dict() for name, tags in TAGS.items()}
        if wrong := _fault(curves["reward"], run.steps):
            return wrong
        steps = sorted(curves["reward"])
        times = logged.curve(SECONDS).tolist()
        per_step = sum(times) / len(times) if times else seconds / len(steps)
        write_whole(folder / TIMES, _json({"seconds": round(seconds, 1), "seconds_per_step": round(per_step, 3)}))
        rows = [[step, *(curve.get(step, "") for curve in curves.values())] for step in steps]
        write_whole(folder / CURVE, _csv([["step", *TAGS], *rows]))
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
        finished = [run for run in runs if self.finished(run)]
        results, timing = [[*map(column, names), "step", *TAGS]], [["run", "seconds", "seconds_per_step"]]
        for run in sorted(finished, key=lambda run: [_sort_key(run.settings[name]) for name in names]):
            timing.append([run.name, *_read_json(self.folder(run) / TIMES).values()])
            with open(self.folder(run) / CURVE, newline="", encoding="utf-8") as file:
                results += [[*(run.settings[name] for name in names), *row] for row in list(csv.reader(file))[1:]]
        write_whole(self.root / RESULTS, _csv(results))
        write_whole(self.root / TIMING, _csv(timing))


def _check_same(root: Path, before: Plan, now: Plan) -> None:
    """Common options must stay as they are in the plan that is there, but for those that a plan's grids all set."""
    if before.driver != now.driver:
        raise UserError(f"{root} is a study with driver {before.driver}, {now.source} has {now.driver}: another --out")
    varied = {name for plan in (before, now) for name in plan.names if all(name in grid for grid in plan.grids)}
    for name in dict.fromkeys([*before.common, *now.common]):
        old, new = (_canonical(plan.common.get(name)) for plan in (before, now))
        if old != new and name not in varied:
            raise UserError(
                f"{root} is a study whose runs have {name} {old}, {now.source} has {new}: its results would not be "
                "comparable; give another --out, or vary the flag in `runs`"
            )


def _canonical(words: Words | None) -> str:
    """An option's words; equal numbers read the same."""
    if words is None:
        return "the host's default"
    parts = []
    for word in words:
        try:
            parts.append(text(float(word)))
        except (ValueError, OverflowError):
            parts.append(word)
    return " ".join(parts)


def _fault(reward: dict[int, float], steps: int | None) -> str | None:
    """What is wrong with a run that ended with status 0."""
    wanted = list(range(1, (steps or len(reward)) + 1))
    if sorted(reward) != wanted:
        return f"it logged the reward of {len(reward)} steps, the last is {max(reward)}, the plan has {steps or 'all'}"
    if bad := [step for step in wanted if not math.isfinite(reward[step])]:
        return f"its reward is {reward[bad[0]]} in step {bad[0]}"
    return None


def _sort_key(setting: str) -> tuple:
    """Nothing, then numbers, then words."""
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


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
