"""Runs what a plan asks for and is not there yet: processes side by side, each in its folder, stopped together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from abc_plugin.errors import UserError
from abc_plugin.tools.study.directory import LOG, Study
from abc_plugin.tools.study.plan import Plan, command_words, read_plan
from abc_plugin.tools.study.settings import Resolved, Run, give_names, resolve

PROGRAM = [sys.executable, "-m", "abc_plugin"]
POLL = 0.5  # seconds between two looks at the runs
GRACE = 10  # seconds that a run has to end after Ctrl-C
LIBC = ctypes.CDLL(None)
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl
TAIL = 4096  # bytes of a log that hold its last bar
# The local driver's bar, and the host's line per step on Ray.
STEP = re.compile(rb"PPO:[^\r\n]*\| (\d+)/\d+ \[|Global step (\d+)")


def run_study(plan_file: str, out: str | None, *, smoke: bool, jobs: int | None, gpus: str | None) -> int:
    """Check the plan, train what is missing, report the outcome; returns 1 when a run failed, 130 when stopped."""
    plan = read_plan(plan_file, smoke=smoke)
    if not (out or plan.out):
        raise UserError(f"{plan_file} names no directory; give --out DIR, or the plan an `out`")
    study = Study(Path(out or plan.out))
    older = study.older(plan)
    print(f"study: checking {len(plan.runs())} runs of {plan_file}", flush=True)
    resolved = resolve(plan, older)
    give_names(resolved.runs, resolved.older)
    slots = _slots(plan, jobs, gpus, resolved.gpus)
    study.refuse_foreign(resolved.runs)
    study.claim(plan, older)
    return _Session(plan, study, resolved, slots).run()


def _slots(plan: Plan, jobs: int | None, gpus: str | None, there: int) -> list[str | None]:
    """One entry per run at a time: the GPU that it is given, None where nothing is shared out."""
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(there)))).split(",")
    if gpus is not None:
        indices = [index.strip() for index in gpus.split(",")]
        if not there:
            raise UserError(f"--gpus {gpus}: PyTorch sees no GPU here; leave it out")
        if not all(index.isdecimal() and int(index) < there for index in indices):
            raise UserError(f"--gpus {gpus}: give numbers below {there}, such as 0,1, as PyTorch counts the GPUs")
        names = [visible[int(index)] for index in indices]
    elif plan.driver == "ray" or not there:  # a cluster is shared out by Ray
        names = [None]
    else:
        names = visible
    if jobs is None:
        jobs = len(names) if names[0] is not None else 1 if plan.driver == "ray" else min(2, _cores())
    return [names[i % len(names)] for i in range(jobs)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Active:
    run: Run
    slot: str | None
    process: subprocess.Popen
    started: float
    task: TaskID


class _Session:
    """One call of the command: starts, watches and ends the processes of the runs that are not finished."""

    def __init__(self, plan: Plan, study: Study, resolved: Resolved, slots: list[str | None]) -> None:
        self.plan, self.study, self.slots = plan, study, slots
        self.runs, self.versions = resolved.runs, resolved.versions
        # A finished run stays in the tables when the plan has it no more; its settings are columns like any.
        self.in_tables = {run.name: run for run in [*filter(study.finished, resolved.older), *self.runs]}.values()
        self.free = deque(slots)
        self.active: list[_Active] = []
        self.failed: list[str] = []
        self.started = time.monotonic()
        # Without a terminal only the lines about ended runs are printed.
        console = Console(highlight=False, markup=False)
        columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=3600)

    def run(self) -> int:
        """All runs; returns the exit status."""
        for run in self._finished():
            if not self.plan.keep_policies:
                self.study.drop_weights(run)
        self.study.write_tables(self.in_tables)
        waiting = deque(run for run in self.runs if not self.study.finished(run))
        print(
            f"study: {len(self.runs)} runs, {len(self.runs) - len(waiting)} of them finished before; up to "
            f"{len(self.slots)} at a time; in {self.study.root}",
            flush=True,
        )
        self._warn_of_other_versions()
        try:
            with _terminated_as_interrupted(), self.bars:
                overall = self.bars.add_task("study", total=sum(run.steps or 0 for run in waiting) or None)
                while waiting or self.active:
                    while waiting and self.free:
                        self._start(waiting.popleft())
                    time.sleep(POLL)
                    self._look()
                    self.bars.update(overall, completed=sum(task.completed for task in self.bars.tasks[1:]))
        except KeyboardInterrupt:
            self._end_all(signal.SIGINT)
            print(f"\nstudy: stopped; {self._summary()}; the same command goes on:\n  {_this_command()}")
            return 130
        finally:
            self._end_all(signal.SIGKILL)
        return self._close()

    def _warn_of_other_versions(self) -> None:
        for run in self._finished():
            before = self.study.versions(run) or self.versions
            if other := [f"{name} {was}" for name, was in before.items() if was != self.versions.get(name)]:
                print(f"study: {run.name} was made with {', '.join(other)}, which differs now: so may results")
                return

    def _finished(self) -> list[Run]:
        return [run for run in self.runs if self.study.finished(run)]

    def _start(self, run: Run) -> None:
        goes_on = int(run.options.get("ckpt.save_steps", ("-1",))[0]) > 0
        folder = self.study.folder(run)
        options = run.options | {
            "ckpt.output_dir": (str(folder.resolve()),),
            "ckpt.path": (str(folder.resolve() / "checkpoints"),),
            "logger.tensorboard_dir": (str(folder.resolve() / "tensorboard"),),
        }
        command = [*PROGRAM, self.plan.driver, *command_words(options), *(["--ckpt.load_enable"] if goes_on else [])]
        self.study.prepare(run, command, self.versions, goes_on=goes_on)
        slot = self.free.popleft()
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
        task = self.bars.add_task(f"  {run.name}", total=run.steps)
        self.active.append(_Active(run, slot, process, time.monotonic(), task))

    def _look(self) -> None:
        """Deal with the runs that ended, and show how far the others are."""
        for active in [each for each in self.active if each.process.poll() is not None]:
            self.active.remove(active)
            self.free.append(active.slot)
            self._ended(active)
            self.bars.update(active.task, completed=active.run.steps, visible=False)
        for active in self.active:
            self.bars.update(active.task, completed=steps_in(self.study.folder(active.run) / LOG))

    def _ended(self, active: _Active) -> None:
        run, status, seconds = active.run, active.process.returncode, time.monotonic() - active.started
        log = self.study.folder(run) / LOG
        wrong = f"exit status {status}" if status else None
        wrong = wrong or self.study.finish(run, seconds, keep_policy=self.plan.keep_policies)
        if wrong:
            self.failed.append(run.name)
            last = "".join(f"\n  | {line}" for line in _last_lines(log))
            line = f"{run.name} failed: {wrong}{last}\n  the log is {log}"
        else:
            self.study.write_tables(self.in_tables)
            left = self.bars.tasks[0].time_remaining
            line = f"{run.name} took {duration(seconds)}; {self._summary()}" + (
                f", {duration(left)} left" if left else ""
            )
        self.bars.console.print(f"study: {line}", soft_wrap=True)

    def _summary(self) -> str:
        return f"{len(self._finished())} of {len(self.runs)} runs are finished in {self.study.root}"

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

    def _close(self) -> int:
        took = duration(time.monotonic() - self.started)
        if self.failed:
            print(
                f"study: {len(self.failed)} failed: {', '.join(self.failed)}; {self._summary()}, {took}; the same "
                f"command tries them again:\n  {_this_command()}",
                file=sys.stderr,
            )
            return 1
        root = shlex.quote(str(self.study.root))
        print(f"study: {self._summary()}: results.csv, in {took}; compare them with: abc-rlhf study report {root}")
        return 0


def _signal(process: subprocess.Popen, sign: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sign)


def _die_with_the_study() -> None:
    """In the child: when the study's process is killed without a chance to end its runs, they end too."""
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(SET_DEATH_SIGNAL, signal.SIGKILL)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A SIGTERM ends the runs as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def steps_in(log: Path) -> int:
    """The last step in a run's log; 0 where none is."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            matches = STEP.findall(file.read())
    except OSError:
        return 0
    return int(matches[-1][0] or matches[-1][1]) if matches else 0


def _last_lines(log: Path, count: int = 3) -> list[str]:
    """The end of a run's log, bars left out."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines()]
    return [line for line in lines if line and "%|" not in line][-count:]


def duration(seconds: float) -> str:
    """``0:12:00``."""
    return str(timedelta(seconds=round(seconds)))


def _this_command() -> str:
    return shlex.join(["abc-rlhf", *sys.argv[1:]])
