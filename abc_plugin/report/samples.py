"""Samples files: JSON lines, one completion with its tokens, their credit and its reward a line."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from abc_plugin.errors import UserError

Item = TypeVar("Item")

SUM_TOLERANCE = 0.02  # weights are written rounded

# The usual ways to write a special token, for files that hold texts and no ids.
SPECIAL = re.compile(r"<\|[^<>]*\|>|</?s>|<(pad|bos|eos|unk)>|<(start|end)_of_turn>|\[(PAD|SEP|CLS|UNK|EOS|BOS)\]")


@dataclass(frozen=True)
class Sample:
    """One completion: the tokens' texts join to it, ``credit`` has one share per token.

    Shares sum to 1. Signed ones sum to 1 in absolute value: a token above 0 raised the reward, one below lowered it.
    A share of None is of a token that the policy did not choose (a tool's answer between its turns).
    """

    prompt: str
    tokens: list[str]
    credit: list[float | None]
    reward: float

    @property
    def caption(self) -> str:
        """One line about the completion."""
        return f"reward {self.reward:.2f} · {self.actions} tokens"

    @cached_property
    def actions(self) -> int:
        """Number of tokens that the policy chose."""
        return sum(share is not None for share in self.credit)

    @property
    def signed(self) -> bool:
        """Whether some token has negative credit."""
        return any(share < 0 for share in self.credit if share is not None)

    def special(self, token: int) -> bool:
        """Whether the token is a special one, by the looks of its text."""
        return bool(SPECIAL.fullmatch(self.tokens[token].strip()))

    def numbers(self, token: int) -> list[tuple[str, str]]:
        """(what, value) of what is known of a token beside its credit."""
        return [("reward", f"{self.reward:.2f}")]


def read_samples(path: str | Path) -> list[Sample]:
    """The samples of a file, in its order; blank lines are skipped.

    Raises UserError, naming file and line, on a line that is not JSON, lacks a field, has a field of another type, a
    number that is not finite, other than one weight per token, or weights that do not sum to 1; and on an empty file.
    """
    samples = [_parse(line, f"{path}:{number}") for number, line in numbered_lines(path)]
    if not samples:
        raise UserError(f"samples file {path} is empty; abc-rlhf evaluate writes one")
    return samples


def numbered_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers. Raises UserError when there is no such file of text."""
    try:
        with open(path, encoding="utf-8") as lines:
            return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read samples file {path}: {error.strerror}; abc-rlhf evaluate writes one") from None
    except UnicodeDecodeError:
        raise UserError(f"samples file {path} is not UTF-8 text; abc-rlhf evaluate writes one") from None


def _parse(line: str, where: str) -> Sample:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}); write the file again with abc-rlhf evaluate") from None
    problem = problem_of(record)
    if problem:
        raise UserError(f"{where}: {problem}; write the file again with abc-rlhf evaluate")
    return Sample(record["prompt"], record["tokens"], record["credit"], record["reward"])


def problem_of(record: Any) -> str | None:
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
    if not isinstance(credit, list) or not all(share is None or is_finite(share) for share in credit):
        return "credit is not a list of finite numbers"
    if not is_finite(record["reward"]):
        return f"reward {record['reward']!r} is not a finite number"
    if len(tokens) != len(credit):
        return f"{len(tokens)} tokens but {len(credit)} credit weights"
    shares = [share for share in credit if share is not None]
    sums = sum(shares), sum(map(abs, shares))
    if any(shares) and all(abs(total - 1.0) > SUM_TOLERANCE for total in sums):
        return f"credit sums to {sums[0]:.4g}, not to 1"
    return None


def is_finite(value: Any) -> bool:
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

    Both ends are in (of one item the first); all items when there are at most ``count``. Ties keep the given order,
    so the choice depends on nothing but the data.
    """
    ranked = list(enumerate(sorted(items, key=key, reverse=True), 1))
    if len(ranked) <= count:
        return ranked
    return [ranked[i * (len(ranked) - 1) // max(1, count - 1)] for i in range(count)]
