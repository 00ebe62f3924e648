"""A study on disk: whose directory it is, its runs' folders, and the tables made of them.

plan.yaml     the plan, its first line HEADER       results.csv   method, settings, seed, step, reward, kl, value_loss
<run>/        run.json: its options and command     timing.csv    run, seconds, seconds_per_step
              curve.csv: its steps; written last, and whole: the run is finished
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
import yaml

from abc_plugin.errors import UserError
from abc_plugin.output_directory import probe, write_atomically
from abc_plugin.report.logged_runs import KL, REWARD, SECONDS, read_run
from abc_plugin.tools.study.plan import Plan, Words
from abc_plugin.tools.study.results_table import setting, sort_key
from abc_plugin.tools.study.run_settings import Run, column, columns

HEADER = "# A study of abc-rlhf; written by it, with what --smoke and the environment made of the plan."
TAGS = {"reward": REWARD, "kl": KL, "value_loss": ("train/critic_loss",)}
PLAN, RUN, CURVE, TIMES, LOG, LOCK = "plan.yaml", "run.json", "curve.csv", "times.json", "output.log", ".lock"
RESULTS, TIMING = "results.csv", "timing.csv"


class Study:
    """The directory of a study; nothing is written before ``claim``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock: TextIO | None = None

    def older(self, plan: Plan) -> dict[str, dict[str, Words]]:
        """Options of the runs that are there, by folder. Raises UserError for a directory that is not the plan's."""
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file; give another --out")
        there = sorted(path for path in self.root.glob("[!.]*"))
        if not there:
            return {}
        written = self.root / PLAN
        text = written.read_text(encoding="utf-8") if written.is_file() else ""
        if not text.startswith(HEADER):
            raise UserError(f"{self.root} has files of another origin, such as {there[0].name}; give another --out")
        try:
            driver = yaml.safe_load(text)["driver"]
        except (yaml.YAMLError, TypeError, KeyError):
            raise UserError(f"{written} is damaged; give another --out, or remove it where the plan is this") from None
        if driver != plan.driver:
            raise UserError(f"{self.root} is a study with driver {driver}, not {plan.driver}; give another --out")
        flags = {path.parent.name: _read_json(path)["flags"] for path in sorted(self.root.glob(f"[!.]*/{RUN}"))}
        return {run: {name: tuple(words) for name, words in each.items()} for run, each in flags.items()}

    def claim(self, plan: Plan, runs: list[Run]) -> None:
        """Make the directory this process's until it ends, and write the plan.

        Raises UserError when another process has it, or has something in a run's place.
        """
        for folder in map(self.folder, runs):
            if not (folder / RUN).is_file() and any(folder.glob("[!.]*")):
                raise UserError(f"{folder} has no {RUN}, so it is not the study's; move it, or give another --out")
        probe("--out", self.root)
        self.lock = open(self.root / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system unlocks it when the process is gone
        except BlockingIOError:
            self.lock.seek(0)
            process = self.lock.read().strip()
            raise UserError(f"{self.root}: a study is running there (process {process}); give another --out") from None
        self.lock.truncate(0)
        print(os.getpid(), file=self.lock, flush=True)
        write_atomically(self.root / PLAN, f"{HEADER}\n{plan.text}")

    def folder(self, run: Run) -> Path:
        return self.root / run.name

    def finished(self, run: Run) -> bool:
        return (self.folder(run) / CURVE).exists()

    def prepare(self, run: Run, command: list[str], versions: dict[str, str], *, goes_on: bool) -> None:
        """The run's folder with its run.json; emptied, unless a stopped run goes on there."""
        folder = self.folder(run)
        if not goes_on:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        note = {"run": run.name, "settings": run.settings, "flags": run.options}
        write_atomically(folder / RUN, _json(note | {"command": command, "versions": versions}))

    def finish(self, run: Run, seconds: float, *, keep_policy: bool) -> str | None:
        """Write the ended run's curve; returns what is wrong with it, in which case it is not finished."""
        folder = self.folder(run)
        try:
            logged = read_run(folder, run.name)
        except UserError as error:
            return str(error)
        curve = pd.DataFrame({name: logged.curve(tags) for name, tags in TAGS.items()}).rename_axis("step")
        steps = run.steps or len(curve)
        if curve.index.tolist() != list(range(1, steps + 1)):
            return f"it logged {len(curve)} steps, the last is {curve.index.max()}, the plan has {run.steps or 'all'}"
        if bad := [step for step, value in curve["reward"].items() if not np.isfinite(value)]:
            return f"its reward is {curve['reward'][bad[0]]} in step {bad[0]}"
        per_step = logged.curve(SECONDS).mean() if len(logged.curve(SECONDS)) else seconds / steps
        write_atomically(folder / TIMES, _json({"seconds": round(seconds, 1), "seconds_per_step": round(per_step, 3)}))
        write_atomically(folder / CURVE, curve.to_csv())
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
        names, results, timing = columns(runs), [], []
        finished = [run for run in runs if self.finished(run)]
        for run in sorted(finished, key=lambda run: [sort_key(setting(run.settings[name])) for name in names]):
            curve = pd.read_csv(self.folder(run) / CURVE, dtype=str, keep_default_na=False)
            results.append(curve.assign(**{name: run.settings[name] for name in names}))
            timing.append({"run": run.name} | _read_json(self.folder(run) / TIMES))
        rows = pd.concat(results or [pd.DataFrame()]).reindex(columns=[*names, "step", *TAGS])
        write_atomically(self.root / RESULTS, rows.rename(columns=column).to_csv(index=False))
        times = pd.DataFrame(timing, columns=["run", "seconds", "seconds_per_step"])
        write_atomically(self.root / TIMING, times.to_csv(index=False))


def _json(value: object) -> str:
    return json.dumps(value, indent=1) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove its folder, and the run is made anew") from None
