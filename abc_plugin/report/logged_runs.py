"""Runs: their curves out of TensorBoard's event files, and a table of several, a row per method and its seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from abc_plugin.errors import UserError
from abc_plugin.report.statistics import mean

Curve = pd.Series  # values by step, steps increasing; as logged, NaN included

REWARD = ("train/rollout/reward_mean", "train/reward")  # the first that is present; the second is per micro-batch
KL = ("train/kl",)
SECONDS = ("train/timing/step_total",)

WINDOW = 5  # steps in the trailing mean that smooths a curve
LAST = 10  # steps that count as the end of a run
BASELINE = "none"  # the group whose final reward the others are timed against


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
        return next((self.scalars[tag] for tag in tags if tag in self.scalars), pd.Series(dtype=float))


def read_scalars(tensorboard_dir: str | Path) -> dict[str, Curve]:
    """Every scalar tag under a directory, searched at any depth.

    The event files of a resumed run merge by step and the later file wins: from its first step of a tag on, a file
    replaces what earlier files say of that tag, so steps that were trained and then lost to a crash do not survive.
    A file that was cut short counts up to the cut.
    Raises UserError when the directory is missing or holds no scalar.
    """
    directory = Path(tensorboard_dir)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; train with --logger.tensorboard_dir {directory} first")
    merged: dict[str, Curve] = {}
    for tags in _files_in_time(directory):
        for tag, events in tags.items():
            new = pd.Series({event.step: event.value for event in events}, dtype=float).sort_index()
            old = merged.get(tag, new[:0])
            merged[tag] = pd.concat([old[old.index < new.index[0]], new])
    if not merged:
        raise UserError(f"{directory} holds no TensorBoard scalars; has the run logged a step yet?")
    return dict(sorted(merged.items()))


def _files_in_time(directory: Path) -> list[dict[str, list]]:
    """The scalar events of each file by tag, files in the order in which they were begun."""
    files = []
    for path in sorted(path for path in directory.rglob("*tfevents*") if path.is_file()):
        accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
        tags = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
        if tags:
            files.append((min(event.wall_time for events in tags.values() for event in events), tags))
    return [tags for _, tags in sorted(files, key=lambda file: file[0])]


def read_run(run_dir: str | Path, label: str) -> Run:
    """The run in ``run_dir``, its events anywhere under ``run_dir/tensorboard``.

    Raises UserError when it is missing, holds no events, or never logged a reward.
    """
    if not Path(run_dir).is_dir():
        raise UserError(f"run directory {run_dir} does not exist; give the directory that abc-rlhf local wrote")
    run = Run(label, read_scalars(Path(run_dir) / "tensorboard"))
    if run.curve(REWARD).empty:
        raise UserError(f"{run_dir} logged neither {' nor '.join(REWARD)}; is it a PPO run?")
    return run


def by_group(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by group, groups in the order of their first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def smooth(curve: Curve) -> Curve:
    """Trailing mean over WINDOW logged steps; the first WINDOW - 1 average what there is."""
    return curve.rolling(WINDOW, min_periods=1).mean()


def steps_to_reach(curve: Curve, target: float) -> float:
    """First step whose mean over a full window of WINDOW logged steps is >= target; infinity if there is none."""
    mean_T = curve.rolling(WINDOW).mean()
    return min(mean_T.index[mean_T >= target], default=math.inf)


HEADER = (
    "label",
    "seeds",
    "steps",
    "reward over training",
    "KL over training",
    f"reward, last {LAST} steps",
    f"steps to {BASELINE}'s final reward",
    "reward / √KL at the end",
    "s per step",
)
FOOTNOTE = (
    "Over training: mean over all logged steps of a seed, then mean ± standard deviation (n − 1) over seeds. "
    "KL: nats per token, as the host logs it. "
    f"Last {LAST} steps: mean over a seed's last {LAST} logged steps (all, if fewer), then as before. "
    f"Steps to {BASELINE}'s final reward: first step at which the mean reward of the last {WINDOW} logged steps is at "
    f"least the mean reward of the last {LAST} steps of the seeds of {BASELINE}; median over seeds, a seed that never "
    "gets there counts as infinite. "
    f"Reward / √KL at the end: a seed's reward over the square root of its KL, both of its last {LAST} steps, then "
    "mean over seeds; – where the KL of a seed is not positive or was not logged. "
    "s per step: median over a seed's steps but the first, wall time as the host logs it, then as before."
)


def comparison(runs: list[Run]) -> pd.DataFrame:
    """A row of text per group, in the order of the groups' first runs. FOOTNOTE defines the columns."""
    groups = by_group(runs)
    baseline = [mean(run.curve(REWARD)[-LAST:]) for run in groups.get(BASELINE, [])]
    target = mean(baseline) if baseline else None
    return pd.DataFrame([_row(group, seeds, target) for group, seeds in groups.items()], columns=list(HEADER))


def _row(group: str, seeds: list[Run], target: float | None) -> list[str]:
    rewards = [run.curve(REWARD) for run in seeds]
    kls = [kl for run in seeds if not (kl := run.curve(KL)).empty]
    steps = [reward.index[-1] for reward in rewards]
    last_reward = [mean(reward[-LAST:]) for reward in rewards]
    last_kl = [mean(kl[-LAST:]) for kl in kls]
    ratio = "–"
    if len(kls) == len(seeds) and all(kl > 0 for kl in last_kl):
        ratio = f"{mean([reward / math.sqrt(kl) for reward, kl in zip(last_reward, last_kl, strict=True)]):.3f}"
    seconds = [run.curve(SECONDS)[1:] for run in seeds]
    return [
        group,
        str(len(seeds)),
        "–".join(str(step) for step in sorted({min(steps), max(steps)})),
        _spread([mean(reward) for reward in rewards]),
        _spread([mean(kl) for kl in kls]),
        _spread(last_reward),
        "–" if target is None else _median_steps([steps_to_reach(reward, target) for reward in rewards]),
        ratio,
        _spread([float(np.median(times)) for times in seconds if len(times)]),
    ]


def _spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return "–"
    with np.errstate(invalid="ignore"):
        around = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{around}"


def _median_steps(steps: list[float]) -> str:
    """``23``, ``23 (1 of 3 not reached)`` or ``not reached (2 of 3)``."""
    missed, median = f"{steps.count(math.inf)} of {len(steps)}", float(np.median(steps))
    if math.isinf(median):
        return f"not reached ({missed})"
    return f"{median:g} ({missed} not reached)" if math.inf in steps else f"{median:g}"
