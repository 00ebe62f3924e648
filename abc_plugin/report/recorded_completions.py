"""Completions recorded while a run trains: ``completions.jsonl`` in its output directory, one completion a line.

A line holds, beside what a samples file holds (prompt, tokens, credit, reward):

    run            when the process that trained it began; a resumed run goes on under another
    step, sample   training step, counted from 1, and the completion's number in the step's batch
    method, beta   of ``--reward_shaping``; method "none" and beta 0 are the sparse reward
    reward         the score r_C, the reward model's units
    spread_reward  what was spread over the tokens: r_C after the host's baselines, length penalties and clipping
    truncated      whether generation ran into its limit
    special        positions of special tokens
    ids            token ids, and per token, null for a token the policy did not generate:
    credit         share of the method's credit, before beta; sums to 1, or in absolute value where credit is signed
    shaped_reward  reward units, with beta and without the KL penalty; sums to spread_reward
    kl_penalty     reward units; what the host subtracts, so <= 0 where the policy left the reference
    value          of the critic, reward units; null without a critic
    advantage      as the policy's loss gets it, whitened where the host whitens
    return         reward units
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from abc_plugin.jsonl import read_jsonl
from abc_plugin.report import samples_file

FILE = "completions.jsonl"
FLAG = "--shaping.show_every"

# Per-token numbers: field, what a reader calls it, its format.
COLUMNS = (
    ("shaped_reward", "shaped reward", "{:+.3f}"),
    ("kl_penalty", "KL penalty", "{:+.3f}"),
    ("value", "value", "{:+.3f}"),
    ("advantage", "advantage", "{:+.2f}"),
    ("return", "return", "{:+.3f}"),
)
FIELDS = samples_file.FIELDS | {
    "run": "a string",
    "step": "a whole number",
    "sample": "a whole number",
    "method": "a string",
    "beta": "a finite number",
    "truncated": "true or false",
    "spread_reward": "a finite number",
    "ids": "a list of finite numbers",
}


@dataclass(frozen=True)
class Record(samples_file.Sample):
    """One recorded completion; ``columns`` maps the fields of COLUMNS that it has to one number per token."""

    run: str
    step: int
    sample: int
    method: str
    beta: float
    truncated: bool
    spread_reward: float
    ids: list[int]
    specials: frozenset[int]
    columns: dict[str, list[float | None]]

    @property
    def caption(self) -> str:
        """One line: which completion, its score, how it was shaped."""
        changed = abs(self.spread_reward - self.reward) > 1e-3 * max(1.0, abs(self.reward))
        after = f", after baseline and clipping {self.spread_reward:.2f}" if changed else ""
        parts = [f"step {self.step}", f"sample {self.sample}", f"score {self.reward:.2f}{after}"]
        beta = f", β {self.beta:g}" if self.method != "none" else ""
        length = f"{self.actions} tokens" + ", truncated" * self.truncated
        return " · ".join([*parts, self.method + beta, length])

    def special(self, token: int) -> bool:
        """Whether the token's id is a special one."""
        return token in self.specials

    def numbers(self, token: int) -> dict[str, str]:
        """What is known of a token beside its credit, by name."""
        known = {name: (self.columns[field][token], form) for field, name, form in COLUMNS if field in self.columns}
        return {"id": str(self.ids[token])} | {n: form.format(v) for n, (v, form) in known.items() if v is not None}


def read_records(path: str | Path) -> tuple[list[Record], list[str]]:
    """The records of a file by step, and a note for each thing a reader should know.

    A resumed run repeats the steps after its checkpoint: from its first step on, a later process replaces what earlier
    ones wrote. A line cut short, as a killed process leaves it, is skipped with a note; so is a file without a record.
    Raises UserError, naming file and line, on anything else that is no record.
    """
    cut: list[str] = []
    kept: list[Record] = []
    remedy = f"it is not a file of completions recorded by {FLAG}"
    for where, fields in read_jsonl(path, remedy, cut=cut):
        record = _parse(where, fields, remedy)
        if kept and record.run != kept[-1].run:
            kept = [old for old in kept if old.step < record.step]
        kept.append(record)
    notes = [f"{where} is cut short, as when a run is killed, and was skipped" for where in cut]
    if not kept:
        notes.append(f"{path} holds no record; train with {FLAG} N to record completions every N steps")
    return sorted(kept, key=lambda record: record.step), notes


def by_step(records: list[Record]) -> dict[int, list[Record]]:
    """Records by step; they are sorted by it."""
    return {step: list(group) for step, group in groupby(records, key=lambda record: record.step)}


def record_of(fields: dict[str, Any]) -> Record:
    """The record of a line's fields."""
    columns = {field: fields[field] for field, _, _ in COLUMNS if fields[field] is not None}
    return Record(**{name: fields[name] for name in FIELDS}, specials=frozenset(fields["special"]), columns=columns)


def _parse(where: str, fields: dict[str, Any], remedy: str) -> Record:
    """As ``record_of``. Raises UserError where the line is no record; columns may be null (no critic)."""
    columns = dict.fromkeys([field for field, _, _ in COLUMNS], "a list of finite numbers")
    given = {name: kind for name, kind in columns.items() if fields.get(name, ...) is not None}
    kinds = FIELDS | {"special": "a list of finite numbers"} | given
    samples_file.check_fields(where, fields, kinds, ("credit", "ids", *given), remedy)
    return record_of(fields)
