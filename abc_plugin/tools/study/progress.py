"""How far a study is: one bar over all steps of all runs, with the time left; without a terminal a line per run."""

from __future__ import annotations

import re
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

TAIL = 4096  # bytes of a log that hold its last bar
# The local driver's bar, and the host's line per step on Ray.
STEP = re.compile(rb"PPO:[^\r\n]*\| (\d+)/\d+ \[|Global step (\d+)")


class Bar:
    """steps: of all runs; done: of those that are finished already."""

    def __init__(self, steps: int, done: int) -> None:
        self.console = Console(highlight=False, markup=False)
        self.progress = Progress(TextColumn("study"), BarColumn(30), TextColumn("{task.description}"))
        self.steps, self.done, self.at_start, self.started = steps, done, done, time.monotonic()
        self.task = self.progress.add_task("", total=max(steps, 1), completed=done)
        self.now = ""
        self.live = Live(console=self.console, get_renderable=self._view, refresh_per_second=2, transient=True)

    def __enter__(self) -> Bar:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def _view(self) -> Group:
        return Group(self.progress, Text(self.now))

    def show(self, done: int, now: dict[str, int]) -> None:
        """done: steps of finished runs.  now: the steps made by the runs that are going on."""
        self.done = done + sum(now.values())
        self.now = "\n".join(f"  {name}: step {step}" for name, step in now.items())
        steps = f"{self.done}/{self.steps} steps, {self.left()} left"
        self.progress.update(self.task, completed=self.done, description=steps)

    def left(self) -> str:
        """The time left at the pace of this session so far."""
        made = self.done - self.at_start
        if made <= 0:
            return "?"
        return duration((self.steps - self.done) * (time.monotonic() - self.started) / made)

    def say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds for people: 3 h 05 min, 12 min or 40 s."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def steps_in(log: Path) -> int:
    """The step that a run's log speaks of last; 0 where none is."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            tail = file.read()
    except OSError:
        return 0
    found = STEP.findall(tail)
    return int(found[-1][0] or found[-1][1]) if found else 0
