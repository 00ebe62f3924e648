"""Scalars out of TensorBoard event files, and the run they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from abc_plugin.errors import UserError

Curve = list[tuple[int, float]]  # (step, value), steps increasing

REWARD = ("train/rollout/reward_mean", "train/reward")  # the first that is present; the second is per micro-batch
KL = ("train/kl",)
SECONDS = ("train/timing/step_total",)


def read_scalars(tensorboard_dir: str | Path) -> dict[str, Curve]:
    """Every scalar tag under a directory, searched at any depth: {tag: [(step, value), ...]}, steps increasing.

    The event files of a resumed run merge by step and the later file wins: from its first step of a tag on, a file
    replaces what earlier files say of that tag, so steps that were trained and then lost to a crash do not survive.
    A file that was cut short counts up to the cut. Values are as logged, NaN included.
    Raises UserError when the directory is missing or holds no scalar.
    """
    directory = Path(tensorboard_dir)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; train with --logger.tensorboard_dir {directory} first")
    merged: dict[str, dict[int, float]] = {}
    for tags in _files_in_time(directory):
        for tag, events in tags.items():
            first = min(event.step for event in events)
            kept = {step: value for step, value in merged.get(tag, {}).items() if step < first}
            merged[tag] = kept | {event.step: event.value for event in events}
    if not merged:
        raise UserError(f"{directory} holds no TensorBoard scalars; has the run logged a step yet?")
    return {tag: sorted(curve.items()) for tag, curve in sorted(merged.items())}


def _files_in_time(directory: Path) -> list[dict[str, list]]:
    """The scalar events of each file by tag, files in the order in which they were begun."""
    files = []
    for path in sorted(directory.rglob("*tfevents*")):
        accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
        tags = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
        if tags:
            files.append((min(event.wall_time for events in tags.values() for event in events), tags))
    return [tags for _, tags in sorted(files, key=lambda file: file[0])]


@dataclass(frozen=True)
class Run:
    """One run's scalars under a label such as ``abc#2``: group ``abc``, one of its seeds."""

    label: str
    scalars: dict[str, Curve]

    @property
    def group(self) -> str:
        """The label up to its first ``#``."""
        return self.label.split("#")[0]

    def curve(self, tags: tuple[str, ...]) -> Curve:
        """The curve of the first tag that was logged; empty if none was."""
        return next((self.scalars[tag] for tag in tags if tag in self.scalars), [])


def read_run(run_dir: str | Path, label: str) -> Run:
    """The run in ``run_dir``, its events anywhere under ``run_dir/tensorboard``.

    Raises UserError when it is missing, holds no events, or never logged a reward.
    """
    if not Path(run_dir).is_dir():
        raise UserError(f"run directory {run_dir} does not exist; give the directory that abc-rlhf local wrote")
    run = Run(label, read_scalars(Path(run_dir) / "tensorboard"))
    if not run.curve(REWARD):
        raise UserError(f"{run_dir} logged neither {' nor '.join(REWARD)}; is it a PPO run?")
    return run


def by_group(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by group, groups in the order of their first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups
