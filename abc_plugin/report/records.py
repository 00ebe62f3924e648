"""Completions recorded while a run trains: ``completions.jsonl`` in its output directory, one completion a line.

A line holds, beside what a samples file holds (prompt, tokens, credit, reward):

    run            when the process that trained it began; a resumed run goes on under another
    step, sample   training step, counted from 1, and the completion's number in the step's batch
    method, beta   of ``--reward_shaping``; method "none" and beta 0 are the sparse reward
    reward         the score r_C, the reward model's units
    spread_reward  what was spread over the tokens: r_C after the host's baselines, length penalties and clipping
    truncated      whether generation ran into its limit
    special        positions of special tokens
    ids            token ids, and per token, null for a token the policy did not choose:
    credit         share of the method's credit, before beta; sums to 1, or in absolute value where credit is signed
    shaped_reward  reward units, with beta and without the KL penalty; sums to spread_reward
    kl_penalty     reward units; what the host subtracts, so <= 0 where the policy left the reference
    value          of the critic, reward units; null without a critic
    advantage      as the policy's loss gets it, whitened where the host whitens
    return         reward units
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abc_plugin.errors import UserError
from abc_plugin.report.samples import Sample, is_finite, numbered_lines, problem_of

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
FIELDS = {"run": str, "step": int, "sample": int, "method": str, "beta": (int, float), "truncated": bool}


@dataclass(frozen=True)
class Record(Sample):
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

    def numbers(self, token: int) -> list[tuple[str, str]]:
        """(what, value) of what is known of a token beside its credit."""
        known = [(name, form, self.columns[field][token]) for field, name, form in COLUMNS if field in self.columns]
        return [("id", str(self.ids[token]))] + [(name, form.format(v)) for name, form, v in known if v is not None]


def read_records(path: str | Path) -> tuple[list[Record], list[str]]:
    """The records of a file by step, and a note for each thing a reader should know.

    A resumed run repeats the steps after its checkpoint: from its first step on, a later process replaces what earlier
    ones wrote. A line cut short, as a killed process leaves it, is skipped with a note.
    Raises UserError, naming file and line, on anything else that is no record.
    """
    kept: list[Record] = []
    notes, lines = [], numbered_lines(path)
    for number, line in lines:
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            notes.append(f"{path}:{number} is cut short, as when a run is killed, and was skipped")
            continue
        if problem := _problem(fields):
            raise UserError(f"{path}:{number}: {problem}; it is not a file of completions recorded by {FLAG}")
        record = record_of(fields)
        if kept and record.run != kept[-1].run:
            kept = [old for old in kept if old.step < record.step]
        kept.append(record)
    if not kept:
        what = f"{len(lines)} lines, none a record" if lines else "nothing"
        raise UserError(f"{path} holds {what}; train with {FLAG} N to record completions every N steps")
    return sorted(kept, key=lambda record: record.step), notes


def by_step(records: list[Record]) -> dict[int, list[Record]]:
    """Records by step, both in order."""
    steps: dict[int, list[Record]] = {}
    for record in records:
        steps.setdefault(record.step, []).append(record)
    return steps


def record_of(fields: dict[str, Any]) -> Record:
    """The record of a line's fields."""
    plain = {name: fields[name] for name in (*FIELDS, "prompt", "tokens", "credit", "reward", "spread_reward", "ids")}
    columns = {field: fields[field] for field, _, _ in COLUMNS if fields[field] is not None}
    return Record(**plain, specials=frozenset(fields["special"]), columns=columns)


def _problem(fields: Any) -> str | None:
    """What is wrong with a parsed line, None if nothing is."""
    if problem := problem_of(fields):
        return problem
    columns = [field for field, _, _ in COLUMNS]
    missing = [name for name in (*FIELDS, "spread_reward", "ids", "special", *columns) if name not in fields]
    if missing:
        return f"lacks {', '.join(missing)}"
    wrong = [name for name, kind in FIELDS.items() if not isinstance(fields[name], kind)]
    if wrong or not is_finite(fields["spread_reward"]):
        return f"{(wrong or ['spread_reward'])[0]} {fields[(wrong or ['spread_reward'])[0]]!r} makes no sense"
    for name in ("ids", "special", *columns):
        values = fields[name]
        if values is None and name in columns:
            continue
        if not isinstance(values, list) or not all(v is None or isinstance(v, (int, float)) for v in values):
            return f"{name} is not a list of numbers"
        if name != "special" and len(values) != len(fields["tokens"]):
            return f"{len(fields['tokens'])} tokens but {len(values)} of {name}"
    return None
