"""Samples files: JSON lines, one completion with its tokens, their credit and its reward a line."""

from __future__ import annotations

import re
import reprlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from abc_plugin.errors import UserError
from abc_plugin.jsonl import read_jsonl

Item = TypeVar("Item")

SUM_TOLERANCE = 0.02  # weights are written rounded

# The usual ways to write a special token, for files that hold texts and no ids.
SPECIAL = re.compile(r"<\|[^<>]*\|>|</?s>|<(pad|bos|eos|unk)>|<(start|end)_of_turn>|\[(PAD|SEP|CLS|UNK|EOS|BOS)\]")


@dataclass(frozen=True)
class Sample:
    """One completion: the tokens' texts join to it, ``credit`` has one share per token.

    Shares sum to 1. Signed ones sum to 1 in absolute value: a token above 0 raised the reward, one below lowered it.
    A share of None is of a token that the policy did not generate (a tool's answer between its turns).
    """

    prompt: str
    tokens: list[str]
    credit: list[float | None]
    reward: float

    @property
    def caption(self) -> str:
        """One line that names the completion."""
        return f"reward {self.reward:.2f} · {self.actions} tokens"

    @cached_property
    def actions(self) -> int:
        """Number of tokens that the policy generated."""
        return sum(share is not None for share in self.credit)

    @property
    def signed(self) -> bool:
        """Whether some token has negative credit."""
        return any(share < 0 for share in self.credit if share is not None)

    def special(self, token: int) -> bool:
        """Whether the token is a special one, by the looks of its text."""
        return bool(SPECIAL.fullmatch(self.tokens[token].strip()))

    def numbers(self, token: int) -> dict[str, str]:
        """What is known of a token beside its credit, by name."""
        return {"reward": f"{self.reward:.2f}"}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


KINDS: dict[str, Callable[[Any], bool]] = {
    "a string": lambda value: isinstance(value, str),
    "a finite number": _is_number,
    "a whole number": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "true or false": lambda value: isinstance(value, bool),
    "a list of strings": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "a list of finite numbers": lambda value: (
        isinstance(value, list) and all(item is None or _is_number(item) for item in value)
    ),
}
FIELDS = {
    "prompt": "a string",
    "tokens": "a list of strings",
    "credit": "a list of finite numbers",
    "reward": "a finite number",
}


def check_fields(
    where: str, fields: dict[str, Any], kinds: dict[str, str], per_token: tuple[str, ...], remedy: str
) -> None:
    """Raises UserError, naming ``where``, unless the line has all fields, of their kinds, a number per token, and
    shares that sum to 1."""
    if missing := [name for name in kinds if name not in fields]:
        raise UserError(f"{where}: lacks {', '.join(missing)}; {remedy}")
    for name, kind in kinds.items():
        if not KINDS[kind](fields[name]):
            raise UserError(f"{where}: {name} {reprlib.repr(fields[name])} is not {kind}; {remedy}")
    count = len(fields["tokens"])
    for name in per_token:
        if len(fields[name]) != count:
            raise UserError(f"{where}: {count} tokens but {len(fields[name])} numbers of {name}; {remedy}")
    shares = [share for share in fields["credit"] if share is not None]
    sums = sum(shares), sum(map(abs, shares))
    if any(shares) and all(abs(total - 1.0) > SUM_TOLERANCE for total in sums):
        raise UserError(f"{where}: credit sums to {sums[0]:.4g}, not to 1; {remedy}")


def read_samples(path: str | Path) -> list[Sample]:
    """The samples of a file, in its order.

    Raises UserError, naming file and line, on a line that is no sample; and on an empty file.
    """
    samples = []
    for where, fields in read_jsonl(path, "abc-rlhf evaluate writes samples files"):
        check_fields(where, fields, FIELDS, ("credit",), "write the file again with abc-rlhf evaluate")
        samples.append(Sample(**{name: fields[name] for name in FIELDS}))
    if not samples:
        raise UserError(f"samples file {path} is empty; abc-rlhf evaluate writes one")
    return samples


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


def evenly_spaced(items: list[Item], count: int) -> list[Item]:
    """``count`` items at even distances, the first and the last among them; all if there are at most that many."""
    if len(items) <= count:
        return items
    return [items[i * (len(items) - 1) // max(1, count - 1)] for i in range(count)]


def spread_over_ranks(items: list[Item], key: Callable[[Item], float], count: int) -> list[tuple[int, Item]]:
    """(rank, item) of ``count`` items at evenly spaced ranks from the largest key (rank 1) to the smallest.

    Ties keep the given order, so the selection depends on nothing but the data.
    """
    return evenly_spaced(list(enumerate(sorted(items, key=key, reverse=True), 1)), count)
