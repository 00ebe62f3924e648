"""Texts compared with committed files; SNAPSHOT=1 pytest … writes them anew, for git diff to show."""

from __future__ import annotations

import inspect
import os
from pathlib import Path


def assert_snapshot(text: str, name: str) -> None:
    """That ``text`` is snapshots/``name`` beside the calling test's file."""
    path = Path(inspect.stack()[1].filename).with_name("snapshots") / name
    if os.environ.get("SNAPSHOT") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    assert text.rstrip("\n") == path.read_text(encoding="utf-8").rstrip("\n")
