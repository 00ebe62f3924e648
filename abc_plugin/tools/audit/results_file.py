"""The file of per-completion results: written as they come, so that a killed audit goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abc_plugin.errors import UserError

NAME = "completions.jsonl"
OUTPUTS = ("audit.json", "audit.html", "agreement.png", "curves.png", "heads.png")
FORMAT = 3  # of the records; another where they hold something else, or a method's credit means something else


class Results:
    """``DIR/completions.jsonl``: a line with the audit's configuration, then one line per completion, in order.

    Opens the file to go on with, or starts it. A last line that a kill cut short is dropped.
    Raises UserError where ``directory`` holds the results of another configuration, or outputs without them, and where
    it cannot be written; nothing there is changed.
    """

    def __init__(self, directory: str | Path, configuration: dict[str, Any]) -> None:
        self.path = Path(directory) / NAME
        self.records: list[dict[str, Any]] = []
        header = {"format": FORMAT, "configuration": json.loads(json.dumps(configuration))}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._go_on(header)
            elif foreign := [name for name in OUTPUTS if (self.path.parent / name).exists()]:
                raise UserError(f"--out {directory} holds {foreign[0]} but no {NAME}; choose another directory")
            else:
                self._write(header)
        except OSError as error:
            raise UserError(f"cannot write to --out {directory}: {error.strerror}; choose another") from None

    def _go_on(self, header: dict[str, Any]) -> None:
        """Read the lines that are whole, if they are of this configuration, and cut off what follows them."""
        whole = self.path.read_bytes().rpartition(b"\n")[0]
        if not whole:
            self.path.write_bytes(b"")
            self._write(header)
            return
        try:
            [earlier, *self.records] = map(json.loads, whole.splitlines())
            ours, theirs = header["configuration"], earlier["configuration"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is not an audit's ({error}); choose another --out") from None
        if earlier.get("format") != FORMAT:
            raise UserError(
                f"{self.path} was written by another version of the audit, whose records hold other fields or "
                "other credit; choose another --out, or remove it"
            )
        for name in ours | theirs:
            if theirs.get(name) != ours.get(name):
                raise UserError(
                    f"{self.path} is an audit of another configuration ({name}: {theirs.get(name)} there, "
                    f"{ours.get(name)} here); choose another --out"
                )
        with self.path.open("r+b") as file:
            file.truncate(len(whole) + 1)

    def append(self, record: dict[str, Any]) -> None:
        """Keep one completion's result, on the disk before this returns."""
        self._write(record)
        self.records.append(record)

    def _write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
