"""A study's table in memory: one array of curves per condition.

A condition is all settings (method, beta, further columns), a run a condition and a seed. N seeds, T steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BASELINE = "none"  # the method that the others are compared with
METRICS = ("reward", "kl", "value_loss")
# Columns that say how a method spreads the reward: they mean nothing to the baseline, which spreads none.
CREDIT_SETTINGS = (
    "beta",
    "shaping.layer",
    "shaping.heads",
    "shaping.drop",
    "shaping.entropy_floor",
    "shaping.segment",
    "shaping.recovery",
)
SYMBOLS = {"beta": "β", "lambda": "λ"}

Value = float | str | None  # of a setting; None: empty, it means nothing to the method


@dataclass(frozen=True)
class Condition:
    """The runs of one condition; all have the same steps."""

    settings: dict[str, Value]
    seeds: tuple[int, ...]  # N, increasing
    steps: tuple[int, ...]  # T, increasing
    curves: dict[str, np.ndarray]  # metric: (N, T); a metric that is not wholly there is absent

    @property
    def method(self) -> str:
        return str(self.settings["method"])

    @property
    def group(self) -> tuple[tuple[str, Value], ...]:
        """All settings but the method and those of its credit: equal in a condition and in its baseline."""
        return tuple((name, value) for name, value in self.settings.items() if not of_credit(name))

    def only(self, seeds: tuple[int, ...]) -> dict[str, np.ndarray]:
        """The curves of some of its seeds."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return {metric: curves[rows] for metric, curves in self.curves.items()}


@dataclass(frozen=True)
class Table:
    """All conditions, a group's together and its baseline first; ``varied``: settings with several values."""

    conditions: list[Condition]
    varied: list[str]
    warnings: list[str]

    def label(self, condition: Condition, *, group: bool = True) -> str:
        """``abc β 0.8, λ 0.95``: method, beta, and the settings that vary; those of the group may be left out."""
        settings = condition.settings
        beta = "" if settings["beta"] is None else f" β {shown(settings['beta'])}"
        credit = self.named((name, settings[name]) for name in CREDIT_SETTINGS[1:] if name in settings)
        parts = [f"{condition.method}{beta}", credit, self.group_label(condition) if group else ""]
        return ", ".join(part for part in parts if part)

    def group_label(self, condition: Condition) -> str:
        """``λ 0.95, length 48``; empty where nothing but method and beta varies. What is ``usual`` goes unsaid."""
        return self.named((name, value) for name, value in condition.group if self.usual.get(name) != value)

    @cached_property
    def usual(self) -> dict[str, Value]:
        """Of each setting outside the credit that varies and is never empty, its commonest value; none of at most two.

        A study of many conditions, each apart from the rest in one setting, would else name all settings each time.
        """
        names = [name for name in self.varied if not of_credit(name)]
        if len(names) <= 2:
            return {}
        counts = {name: Counter(condition.settings[name] for condition in self.conditions) for name in names}
        return {name: count.most_common(1)[0][0] for name, count in counts.items() if None not in count}

    def named(self, settings: Iterable[tuple[str, Value]]) -> str:
        """``λ 0.95, length 48``: those that vary and have a value."""
        given = [(name, value) for name, value in settings if name in self.varied and value is not None]
        return ", ".join(f"{SYMBOLS.get(name, name)} {shown(value)}" for name, value in given)

    @property
    def usual_label(self) -> str:
        """What labels leave unsaid; empty where they say all."""
        return self.named(self.usual.items())

    def groups(self) -> dict[tuple, list[Condition]]:
        """Conditions that may be compared, by what they share."""
        found: dict[tuple, list[Condition]] = {}
        for condition in self.conditions:
            found.setdefault(condition.group, []).append(condition)
        return found

    def baseline(self, condition: Condition) -> Condition | None:
        """The condition of method none with the same settings but those of credit; None where there is none."""
        return self._find(
            condition.settings | {name: None for name in condition.settings if of_credit(name)}, BASELINE
        )

    def uniform(self, condition: Condition) -> Condition | None:
        """The condition of method uniform with all the same settings."""
        return self._find(condition.settings, "uniform")

    def _find(self, settings: dict[str, Value], method: str) -> Condition | None:
        wanted = settings | {"method": method}
        return next((other for other in self.conditions if other.settings == wanted), None)


def of_credit(name: str) -> bool:
    """Whether a column is the method or a setting of its credit, in which a condition and its baseline may differ."""
    return name == "method" or name in CREDIT_SETTINGS


def shown(value: Value) -> str:
    """A setting as text: 0.8, 48, gpt2; – where it is empty."""
    return "–" if value is None else value if isinstance(value, str) else f"{value:.10g}"
