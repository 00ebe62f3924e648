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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from abc_plugin.errors import UserError
from abc_plugin.tools.study.directory import LOG, Study
from abc_plugin.tools.study.plan import Plan, command_words, read_plan
from abc_plugin.tools.study.progress import Bar, duration, steps_in
from abc_plugin.tools.study.settings import Resolved, Run, give_names, resolve

PROGRAM = [sys.executable, "-m", "abc_plugin"]
POLL = 0.5  # seconds between two looks at the runs
GRACE = 10  # seconds that a run has to end after Ctrl-C
LIBC = ctypes.CDLL(None)
SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl


def run_study(plan_file: str, out: str | None, *, smoke: bool, jobs: int | None, gpus: str | None) -> int:
    """Check the plan, run what is missing, say what came out; returns 1 when a run failed, 130 when stopped."""
    plan = read_plan(plan_file, smoke=smoke)
    if not (out or plan.out):
        raise UserError(f"{plan_file} names no directory; give --out DIR, or the plan an `out`")
    study = Study(Path(out or plan.out))
    older = study.older(plan)
    print(f"study: checking {len(plan.grid())} runs of {plan_file}", flush=True)
    found = resolve(plan, older)
    give_names(found.runs, found.older)
    slots = _slots(plan, jobs, gpus, found.gpus)
    study.refuse_foreign(found.runs)
    study.claim(plan, older)
    # A finished run stays in the tables when the plan has it no more; its settings are columns like any.
    everything = {run.name: run for run in [*filter(study.finished, found.older), *found.runs]}
    return _Session(plan, study, found, list(everything.values()), slots).run()


def _slots(plan: Plan, jobs: int | None, gpus: str | None, there: int) -> list[str | None]:
    """One entry per run at a time: the GPU that it is given, None where it is left what there is."""
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(there)))).split(",")
    if gpus is not None:
        places = [place.strip() for place in gpus.split(",")]
        if not there:
            raise UserError(f"--gpus {gpus}: PyTorch sees no GPU here; leave it out")
        if not all(place.isdecimal() and int(place) < there for place in places):
            raise UserError(f"--gpus {gpus}: give numbers below {there}, such as 0,1, as PyTorch counts the GPUs")
        names = [visible[int(place)] for place in places]
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


class _Session:
    """One call of the command: starts, watches and ends the processes of the runs that are not finished."""

    def __init__(self, plan: Plan, study: Study, found: Resolved, everything: list[Run], slots: list) -> None:
        self.plan, self.study, self.everything, self.slots = plan, study, everything, slots
        self.runs, self.versions = found.runs, found.versions
        self.free = deque(slots)
        self.active: list[_Active] = []
        self.failed: list[str] = []
        self.started = time.monotonic()

    def run(self) -> int:
        """All runs; returns the exit status."""
        for run in self._finished():
            if not self.plan.keep_policies:
                self.study.drop_weights(run)
        self.study.write_tables(self.everything)
        waiting = deque(run for run in self.runs if not self.study.finished(run))
        print(
            f"study: {len(self.runs)} runs, {len(self.runs) - len(waiting)} of them finished before; up to "
            f"{len(self.slots)} at a time; in {self.study.root}",
            flush=True,
        )
        self._warn_of_other_versions()
        try:
            with _terminated_as_interrupted(), self._bar() as bar:
                while waiting or self.active:
                    while waiting and self.free:
                        self._start(waiting.popleft())
                    self._look(bar)
                    time.sleep(POLL)
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

    def _bar(self) -> Bar:
        return Bar(sum(run.steps or 0 for run in self.runs), sum(run.steps or 0 for run in self._finished()))

    def _start(self, run: Run) -> None:
        goes_on = int(run.flags.get("ckpt.save_steps", ("-1",))[0]) > 0
        folder = self.study.folder(run)
        flags = run.flags | {
            "ckpt.output_dir": (str(folder.resolve()),),
            "ckpt.path": (str(folder.resolve() / "checkpoints"),),
            "logger.tensorboard_dir": (str(folder.resolve() / "tensorboard"),),
        }
        command = [*PROGRAM, self.plan.driver, *command_words(flags), *(["--ckpt.load_enable"] if goes_on else [])]
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
        self.active.append(_Active(run, slot, process, time.monotonic()))

    def _look(self, bar: Bar) -> None:
        """Deal with the runs that ended, and show how far the others are."""
        for active in [each for each in self.active if each.process.poll() is not None]:
            self.active.remove(active)
            self.free.append(active.slot)
            self._ended(active, bar)
        now = {each.run.name: steps_in(self.study.folder(each.run) / LOG) for each in self.active}
        bar.show(sum(run.steps or 0 for run in self._finished()), now)

    def _ended(self, active: _Active, bar: Bar) -> None:
        run, status, seconds = active.run, active.process.returncode, time.monotonic() - active.started
        log = self.study.folder(run) / LOG
        wrong = f"exit status {status}" if status else None
        wrong = wrong or self.study.finish(run, seconds, keep_policy=self.plan.keep_policies)
        if wrong:
            self.failed.append(run.name)
            last = "".join(f"\n  | {line}" for line in _last_lines(log))
            bar.say(f"study: {run.name} failed: {wrong}{last}\n  the log is {log}")
            return
        self.study.write_tables(self.everything)
        bar.say(f"study: {run.name} took {duration(seconds)}; {self._summary()}, {bar.left()} left")

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


def _last_lines(log: Path, count: int = 3) -> list[str]:
    """What a run said last: the end of its log, bars left out."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.rpartition("\r")[2].strip() for line in text.splitlines()]
    return [line for line in lines if line and "%|" not in line][-count:]


def _this_command() -> str:
    return shlex.join(["abc-rlhf", *sys.argv[1:]])
