"""Runs what a plan asks for and is not there yet: processes side by side, each in its folder, stopped together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from abc_plugin.errors import UserError
from abc_plugin.output_directory import writing
from abc_plugin.tools.study.plan import Plan, command_words, read_plan
from abc_plugin.tools.study.run_settings import Run, give_names, resolve
from abc_plugin.tools.study.study_directory import LOG, Study

PROGRAM = [sys.executable, "-m", "abc_plugin"]
POLL = 0.5  # seconds between two looks at the runs
GRACE = 10  # seconds that a run has to end after Ctrl-C
LIBC = ctypes.CDLL(None)
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl


def run_study(plan_file: str, out: str | None, *, smoke: bool, jobs: int | None, gpus: str | None) -> int:
    """Check the plan, train what is missing, report the outcome; returns 1 when a run failed, 130 when stopped."""
    plan = read_plan(plan_file, smoke=smoke)
    if not (out or plan.out):
        raise UserError(f"{plan_file} names no directory; give --out DIR, or the plan an `out`")
    study = Study(Path(out or plan.out))
    older = study.older(plan)
    print(f"study: checking {len(plan.runs)} runs of {plan_file}", flush=True)
    runs, there, host = resolve(plan, older)
    give_names(runs, there)
    slots = _slots(plan.driver, jobs, gpus, host["gpus"])
    with writing(study.root, "finished runs are kept, and the same command goes on"):
        study.claim(plan, runs)
        # A finished run stays in the tables when the plan has it no more; its settings are columns like any.
        in_tables = {run.name: run for run in [*filter(study.finished, there), *runs]}
        return _Session(plan, study, runs, list(in_tables.values()), slots, host["versions"]).run()


def _slots(driver: str, jobs: int | None, gpus: str | None, there: int) -> list[str | None]:
    """One entry per run at a time: the GPU that it is given, None where nothing is shared out."""
    names: list[str | None] = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(there)))).split(",")
    if gpus is not None:
        indices = [index.strip() for index in gpus.split(",")]
        if not all(index.isdecimal() and int(index) < there for index in indices):
            raise UserError(f"--gpus {gpus}: give numbers below {there}, the GPUs that PyTorch sees here, such as 0,1")
        names = [names[int(index)] for index in indices]
    elif driver == "ray" or not there:  # a cluster is shared out by Ray
        names = [None] * (1 if driver == "ray" else min(2, _cores()))
    return [names[i % len(names)] for i in range(jobs or len(names))]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Active:
    run: Run
    slot: str | None
    process: subprocess.Popen
    started: float


@dataclass
class _Session:
    """One call of the command: starts, watches and ends the processes of the runs that are not finished."""

    plan: Plan
    study: Study
    runs: list[Run]
    in_tables: list[Run]
    slots: list[str | None]
    versions: dict[str, str]
    active: list[_Active] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def run(self) -> int:
        """All runs; returns the exit status."""
        begun, finished = time.monotonic(), [run for run in self.runs if self.study.finished(run)]
        for run in finished:
            if not self.plan.keep_policies:
                self.study.drop_weights(run)
        self.study.write_tables(self.in_tables)
        waiting, free = deque(run for run in self.runs if run not in finished), deque(self.slots)
        print(
            f"study: {len(self.runs)} runs, {len(finished)} of them finished before; up to {len(free)} at a time; in "
            f"{self.study.root}, each with its {LOG}",
            flush=True,
        )
        try:
            while waiting or self.active:
                while waiting and free:
                    self._start(waiting.popleft(), free.popleft())
                time.sleep(POLL)
                for active in [each for each in self.active if each.process.poll() is not None]:
                    self.active.remove(active)
                    free.append(active.slot)
                    self._ended(active)
        except KeyboardInterrupt as error:
            self._end_all(signal.SIGINT)
            print(f"\nstudy: stopped; {self._summary()}; the same command goes on:\n  {_this_command()}")
            return getattr(error, "status", 130)
        finally:
            self._end_all(signal.SIGKILL)
        took = timedelta(seconds=round(time.monotonic() - begun))
        if self.failed:
            said = f"{len(self.failed)} failed: {', '.join(self.failed)}; {self._summary()}, {took}"
            print(f"study: {said}; the same command tries them again:\n  {_this_command()}", file=sys.stderr)
            return 1
        root = shlex.quote(str(self.study.root))
        print(f"study: {self._summary()}: results.csv, in {took}; compare them with: abc-rlhf study report {root}")
        return 0

    def _start(self, run: Run, slot: str | None) -> None:
        goes_on = int(run.options.get("ckpt.save_steps", ("-1",))[0]) > 0
        folder = self.study.folder(run)
        options = run.options | {
            "ckpt.output_dir": (str(folder.resolve()),),
            "ckpt.path": (str(folder.resolve() / "checkpoints"),),
            "logger.tensorboard_dir": (str(folder.resolve() / "tensorboard"),),
        }
        command = [*PROGRAM, self.plan.driver, *command_words(options), *(["--ckpt.load_enable"] if goes_on else [])]
        self.study.prepare(run, command, self.versions, goes_on=goes_on)
        environment = {"OMP_NUM_THREADS": str(max(1, _cores() // len(self.slots)))} | os.environ
        if slot is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot
        with open(folder / LOG, "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the runs
                preexec_fn=_die_with_the_study,
            )
        self.active.append(_Active(run, slot, process, time.monotonic()))

    def _ended(self, active: _Active) -> None:
        run, status, seconds = active.run, active.process.returncode, time.monotonic() - active.started
        keep = self.plan.keep_policies
        if wrong := f"exit status {status}" if status else self.study.finish(run, seconds, keep_policy=keep):
            self.failed.append(run.name)
            log = self.study.folder(run) / LOG
            lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
            last = [line for line in lines if line.strip() and "%|" not in line][-3:]  # without bars
            line = "\n  | ".join([f"{run.name} failed: {wrong}", *last]) + f"\n  the log is {log}"
        else:
            self.study.write_tables(self.in_tables)
            line = f"{run.name} took {timedelta(seconds=round(seconds))}; {self._summary()}"
        print(f"study: {line}", flush=True)

    def _summary(self) -> str:
        finished = sum(map(self.study.finished, self.runs))
        return f"{finished} of {len(self.runs)} runs are finished in {self.study.root}"

    def _end_all(self, sign: int) -> None:
        """Signal every run's process group; those that have not ended in time are killed."""
        for active in self.active:
            _signal(active.process, sign)
        deadline = time.monotonic() + GRACE
        for active in self.active:
            with contextlib.suppress(subprocess.TimeoutExpired):
                active.process.wait(max(0.1, deadline - time.monotonic()))
            _signal(active.process, signal.SIGKILL)
            active.process.wait()
        self.active.clear()


def _signal(process: subprocess.Popen, sign: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sign)


def _die_with_the_study() -> None:
    """In the child: when the study's process is killed without a chance to end its runs, they end too."""
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)


def _this_command() -> str:
    return shlex.join(["abc-rlhf", *sys.argv[1:]])
