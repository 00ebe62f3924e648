"""Samples files: JSON lines, one completion with its tokens, their credit and its reward a line."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from abc_plugin.errors import UserError

Item = TypeVar("Item")

SUM_TOLERANCE = 0.02  # weights are written rounded


@dataclass(frozen=True)
class Sample:
    """One completion: the tokens' texts join to it, ``credit`` has one weight per token and sums to 1."""

    prompt: str
    tokens: list[str]
    credit: list[float]
    reward: float


def read_samples(path: str | Path) -> list[Sample]:
    """The samples of a file, in its order; blank lines are skipped.

    Raises UserError, naming file and line, on a line that is not JSON, lacks a field, has a field of another type, a
    number that is not finite, other than one weight per token, or weights that do not sum to 1; and on an empty file.
    """
    samples = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    samples.append(_parse(line, f"{path}:{number}"))
    except OSError as error:
        raise UserError(f"cannot read samples file {path}: {error.strerror}; abc-rlhf evaluate writes one") from None
    except UnicodeDecodeError:
        raise UserError(f"samples file {path} is not UTF-8 text; abc-rlhf evaluate writes one") from None
    if not samples:
        raise UserError(f"samples file {path} is empty; abc-rlhf evaluate writes one")
    return samples


def _parse(line: str, where: str) -> Sample:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}); write the file again with abc-rlhf evaluate") from None
    problem = _problem(record)
    if problem:
        raise UserError(f"{where}: {problem}; write the file again with abc-rlhf evaluate")
    return Sample(record["prompt"], record["tokens"], record["credit"], record["reward"])


def _problem(record: Any) -> str | None:
    """What is wrong with a parsed line, None if nothing is."""
    if not isinstance(record, dict):
        return "not an object with prompt, tokens, credit and reward"
    missing = [name for name in ("prompt", "tokens", "credit", "reward") if name not in record]
    if missing:
        return f"lacks {', '.join(missing)}"
    tokens, credit = record["tokens"], record["credit"]
    if not isinstance(record["prompt"], str):
        return "prompt is not a string"
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return "tokens is not a list of strings"
    if not isinstance(credit, list) or not all(map(_is_finite, credit)):
        return "credit is not a list of finite numbers"
    if not _is_finite(record["reward"]):
        return f"reward {record['reward']!r} is not a finite number"
    if len(tokens) != len(credit):
        return f"{len(tokens)} tokens but {len(credit)} credit weights"
    if tokens and abs(sum(credit) - 1.0) > SUM_TOLERANCE:
        return f"credit sums to {sum(credit):.4g}, not to 1"
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error, sqrt(sum (x - mean)^2 / (n - 1) / n); None for a single value."""
    if len(values) == 1:
        return values[0], None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def pair_up(before: list[Sample], after: list[Sample]) -> list[tuple[Sample, Sample]]:
    """Samples of the same prompt, in the order of ``before``; a prompt's k-th sample goes with its k-th counterpart.

    Raises UserError when no prompt is in both.
    """
    counterparts = _by_occurrence(after)
    pairs = [(sample, counterparts[key]) for key, sample in _by_occurrence(before).items() if key in counterparts]
    if not pairs:
        raise UserError("the samples before and after have no prompt in common; evaluate both on the same prompts")
    return pairs


def _by_occurrence(samples: list[Sample]) -> dict[tuple[str, int], Sample]:
    seen: Counter[str] = Counter()
    keyed = {}
    for sample in samples:
        keyed[sample.prompt, seen[sample.prompt]] = sample
        seen[sample.prompt] += 1
    return keyed


def spread_over_ranks(items: list[Item], key: Callable[[Item], float], count: int) -> list[tuple[int, Item]]:
    """(rank, item) of ``count`` items at evenly spaced ranks from the largest key (rank 1) to the smallest.

    Both ends are in; all items when there are at most ``count``. Ties keep the given order, so the choice depends on
    nothing but the data.
    """
    ranked = list(enumerate(sorted(items, key=key, reverse=True), 1))
    if len(ranked) <= count:
        return ranked
    return [ranked[i * (len(ranked) - 1) // (count - 1)] for i in range(count)]
