"""JSON lines: one object a line, as samples, recorded completions, prompts and tables of studies are written."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from abc_plugin.errors import UserError


def check_text(text: str, where: str) -> None:
    """Raises UserError for what JSON can spell and no tokenizer takes: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} has half of a surrogate pair, which is no text; mend or remove the line") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values; one of two values of a key would be lost unsaid."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} is there twice")
    return fields


def read_jsonl(path: str | Path, remedy: str, *, cut: list[str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Every object of the file with where it stands, ``PATH:LINE``; blank lines are skipped, NaN is a number.

    Only a line feed ends a line, as in JSON; a byte order mark at the start is skipped.
    remedy: how each error message ends, e.g. "abc-rlhf evaluate writes one".
    cut: a list that collects where lines stand that are not JSON, as a killed process leaves its last one, even inside
    a letter; without it such a line is an error too.
    Raises UserError, naming file and line, where the file cannot be read, or a line is not UTF-8 or no object.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    objects = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode("utf-8"), object_pairs_hook=_each_once)
        except (ValueError, RecursionError) as error:  # a UnicodeDecodeError, too; or too deep
            if cut is None:
                reason = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "JSON"
                raise UserError(f"{where}: not {reason} ({error}); {remedy}") from None
            cut.append(where)
            continue
        if not isinstance(fields, dict):
            raise UserError(f"{where}: not an object but {type(fields).__name__}; {remedy}")
        objects.append((where, fields))
    return objects
