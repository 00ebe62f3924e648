"""A run's checkpoints on disk: which are complete, which one a run goes on from, which are kept.

The checkpoint of step N is ``{_actor,_critic}/global_stepN``, as OpenRLHF and DeepSpeed write them, and
``complete/global_stepN``: one file per rank with what they leave out (resume.py), and ``manifest.json``. The manifest
is written last and names every file with its size: without it, or with a file that is another, nothing is loaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from abc_plugin import __version__

PARTS = ("_actor", "_critic", "complete")
TAG = re.compile(r"global_step(\d+)")
PACKAGES = ("openrlhf", "torch", "transformers", "deepspeed")  # another version of them warns


@dataclass
class Checkpoints:
    """The checkpoints under ``root`` (``--ckpt.path``) of the run that this process is a rank of.

    settings: every setting by its flag.  ranks: number of processes.  manifest: that of the checkpoint which the run
    goes on from, empty when it starts anew.  again: whether the run was told to go on, so that there may be traces of
    it.  started: when the run began, the time between its processes left out.
    """

    root: Path
    settings: dict[str, Any] = field(repr=False)
    ranks: int
    manifest: dict[str, Any] = field(default_factory=dict, repr=False)
    again: bool = False
    started: float = field(default_factory=time.time)

    @property
    def step(self) -> int:
        """The step that the run goes on from; 0 when it starts anew."""
        return self.manifest.get("step", 0)

    def directory(self, step: int, part: str = "complete") -> Path:
        return self.root / part / f"global_step{step}"

    def present(self, *parts: str) -> set[int]:
        """The steps that have a directory in one of the parts, complete or not."""
        names = (path.name for part in parts for path in (self.root / part).glob("global_step*"))
        return {int(match[1]) for match in map(TAG.fullmatch, names) if match}

    def steps(self) -> list[int]:
        """The steps whose checkpoint is complete, the newest first."""
        return sorted(filter(lambda step: self._manifest(step).exists(), self.present("complete")), reverse=True)

    def claim(self, run_name: str) -> str:
        """Note, before there is a checkpoint, that the directory is this run's; returns the name it logs under."""
        note = self.root / "complete" / "run.json"
        if self.again and note.exists():
            return json.loads(note.read_text(encoding="utf-8"))["run_name"]
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, json.dumps({"run_name": run_name}))
        return run_name

    def kept(self) -> str:
        """What a stopped run can go on from, for people."""
        steps = ", ".join(map(str, sorted(self.steps())))
        if not steps:
            return "no checkpoint was complete (--ckpt.save_steps sets how often one is saved)"
        return f"checkpoints kept: step {steps} in {self.root}; the same command with --ckpt.load_enable goes on"

    def _manifest(self, step: int) -> Path:
        return self.directory(step) / "manifest.json"

    def _files(self, step: int) -> Iterator[Path]:
        """Every file of a step's checkpoint but the manifest."""
        for part in PARTS:
            for path in sorted(self.directory(step, part).rglob("*")):
                if path.is_file() and path != self._manifest(step):
                    yield path

    def begin(self, step: int) -> None:
        """Before a step's files are written: those that may stand there count no more. For rank 0."""
        self.directory(step).mkdir(parents=True, exist_ok=True)
        self._manifest(step).unlink(missing_ok=True)

    def finish(self, step: int, max_num: int, max_mem: float) -> None:
        """Once all ranks have written a step's files: write its manifest, then remove what is too old. For rank 0.

        Kept are the newest ``max_num`` checkpoints, fewer when they exceed ``max_mem`` GiB, and always this one. Later
        ones than this, and half-written ones, are of a time that the run does not go on from, and are removed too.
        """
        files = {str(path.relative_to(self.root)): path.stat().st_size for path in self._files(step)}
        manifest = {
            "step": step,
            "ranks": self.ranks,
            "seconds": round(time.time() - self.started, 1),
            "versions": versions(),
            "settings": self.settings,
            "files": files,
        }
        write_whole(self._manifest(step), json.dumps(manifest, indent=1))
        room, kept = max_mem * 1024**3 - sum(files.values()), [step]
        for older in (other for other in self.steps() if other < step):
            room -= sum(path.stat().st_size for path in self._files(older))
            if room < 0 or len(kept) >= max_num:
                break
            kept.append(older)
        for other in self.present(*PARTS) - set(kept):
            self.remove(other)

    def remove(self, step: int) -> None:
        """Delete a step's checkpoint, its manifest first: what a kill leaves of it is not complete."""
        self._manifest(step).unlink(missing_ok=True)
        for part in PARTS:
            shutil.rmtree(self.directory(step, part), ignore_errors=True)

    def damage(self, step: int) -> str | None:
        """Which file of a complete checkpoint is not as it was written; None when all are."""
        try:
            files = self.read(step)["files"]
        except (ValueError, KeyError):
            return f"{self._manifest(step)} cannot be read"
        for name, size in files.items():
            path = self.root / name
            now = path.stat().st_size if path.exists() else None
            if now != size:
                return f"{path} {'is missing' if now is None else f'has {now} of {size} bytes'}"
            if path.suffix == ".pt" and _altered(path):
                return f"{path} is altered"
        return None

    def read(self, step: int) -> dict[str, Any]:
        """The manifest of an undamaged step."""
        return json.loads(self._manifest(step).read_text(encoding="utf-8"))


def versions() -> dict[str, str]:
    """What computes here; another one may round otherwise."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"abc_plugin": __version__, **installed, "device": device}


def _altered(path: Path) -> bool:
    """Whether the bytes of a file by torch.save do not match its checksums, which torch.load does not compare."""
    try:
        with zipfile.ZipFile(path) as parts:
            return parts.testzip() is not None
    except zipfile.BadZipFile:
        return True


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
