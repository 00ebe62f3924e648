"""A run's checkpoints on disk: which are complete, which one a run resumes from, which are refused, which are kept.

The checkpoint of step N is ``{_actor,_critic}/global_stepN``, as OpenRLHF and DeepSpeed write them, and
``complete/global_stepN``: one file per rank with what they leave out (resume.py), and ``manifest.json``. The manifest
is written last and names every file with its size: without it, or with a file that is another, nothing is loaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import time
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from abc_plugin import __version__
from abc_plugin.errors import UserError
from abc_plugin.local.distributed_ranks import current_rank
from abc_plugin.output_directory import differences, write_atomically

PARTS = ("_actor", "_critic", "complete")
TAG = re.compile(r"global_step(\d+)")
PACKAGES = ("openrlhf", "torch", "transformers", "deepspeed")  # another version of them warns


@dataclass
class Checkpoints:
    """The checkpoints under ``root`` (``--ckpt.path``) of the run that this process is a rank of.

    settings: every setting by its flag.  ranks: number of processes.  manifest: that of the checkpoint which the run
    resumes from, empty when it starts anew.  load: whether the run was told to resume, so that there may be traces of
    it.  started: when the run began, the time between its processes left out.
    saved: directories of the models that it has saved.
    """

    root: Path
    settings: dict[str, Any] = field(repr=False)
    ranks: int
    manifest: dict[str, Any] = field(default_factory=dict, repr=False)
    load: bool = False
    started: float = field(default_factory=time.time)
    saved: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The step that the run resumes from; 0 when it starts anew."""
        return self.manifest.get("step", 0)

    def directory(self, step: int, part: str = "complete") -> Path:
        return self.root / part / f"global_step{step}"

    def present(self, *parts: str) -> set[int]:
        """The steps that have a directory in one of the parts, complete or not."""
        names = (path.name for part in parts for path in (self.root / part).glob("global_step*"))
        return {int(match[1]) for match in map(TAG.fullmatch, names) if match}

    def steps(self) -> list[int]:
        """The steps whose checkpoint is complete, the newest first."""
        return sorted((step for step in self.present("complete") if self._manifest(step).exists()), reverse=True)

    def claim(self, run_name: str) -> str:
        """Note, before there is a checkpoint, that the directory is this run's; returns the name it logs under."""
        note = self.root / "complete" / "run.json"
        if self.load and note.exists():
            return json.loads(note.read_text(encoding="utf-8"))["run_name"]
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps({"run_name": run_name}))
        return run_name

    def description(self) -> str:
        """What is kept of a stopped run, and how it goes on, for people."""
        steps = ", ".join(map(str, sorted(self.steps())))
        models = f"saved: {', '.join(self.saved)}; " if self.saved else ""
        if not steps:
            return f"{models}no checkpoint was complete (--ckpt.save_steps sets how often one is saved)"
        return (
            f"{models}checkpoints kept: step {steps} in {self.root}; the same command with --ckpt.load_enable goes on"
        )

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
        ones than this, and half-written ones, are of a time that the run does not resume from, and are removed too.
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
        write_atomically(self._manifest(step), json.dumps(manifest, indent=1))
        free, kept = max_mem * 1024**3 - sum(files.values()), [step]
        for older in (other for other in self.steps() if other < step):
            free -= sum(path.stat().st_size for path in self._files(older))
            if free < 0 or len(kept) >= max_num:
                break
            kept.append(older)
        for other in self.present(*PARTS) - set(kept):
            self._manifest(other).unlink(missing_ok=True)  # first: what a kill leaves is not complete
            for part in PARTS:
                shutil.rmtree(self.directory(other, part), ignore_errors=True)

    def read(self, step: int) -> dict[str, Any]:
        """The manifest of an undamaged step."""
        return json.loads(self._manifest(step).read_text(encoding="utf-8"))

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
            if path.suffix == ".pt" and _is_altered(path):
                return f"{path} is altered"
        return None

    def resume(self) -> None:
        """Take the newest checkpoint whose files are all there; prints which ones are passed over.

        Raises UserError where all are damaged, and where it was made with other settings.
        """
        complete = self.steps()
        newer = sorted(step for step in self.present(*PARTS) - {*complete} if step > max(complete, default=0))
        if newer:
            _print(f"half-written and left unread: the checkpoint of step {', '.join(map(str, newer))}")
        for step in complete:
            if (damage := self.damage(step)) is None:
                self.manifest = self.read(step)
                self._check_settings()
                self.started -= self.manifest["seconds"]
                _print(f"goes on from step {step}, {self.directory(step)}")
                return
            _print(f"the checkpoint of step {step} is damaged and left unread: {damage}")
        if complete:
            raise UserError(f"no checkpoint in {self.root} is whole: {damage}; give another --ckpt.path to start anew")
        _print(f"--ckpt.load_enable: no complete checkpoint in {self.root}, the run starts from its first step")

    def _check_settings(self) -> None:
        """The checkpoint was made with the same settings and as many ranks; other versions are only a warning."""
        manifest, directory = self.manifest, self.directory(self.step)
        if manifest["ranks"] != self.ranks:
            raise UserError(
                f"{directory} was saved by {manifest['ranks']} ranks and this run has {self.ranks}: the optimiser's "
                f"state is split among them; start it with {manifest['ranks']}"
            )
        then, now = manifest["settings"], self.settings
        if changed := differences(then, now):
            raise UserError(
                f"{directory} was made with other settings: {', '.join(changed)}; give them as they were, or another "
                "--ckpt.path to start anew"
            )
        name = "--train.num_episodes"
        if then.get(name) != now.get(name):
            _print(
                f"{name} was {then[name]} and is {now[name]}: the learning rate follows the new schedule from here on"
            )
        for name, version in versions().items():
            if (before := manifest["versions"].get(name)) != version:
                _print(
                    f"WARNING: the checkpoint was made with {name} {before}, this is {version}: the curve may differ "
                    "from an uninterrupted one"
                )


def saves(args: Namespace) -> bool:
    """Whether the run saves checkpoints from which one can go on."""
    return args.ckpt.save_steps > 0 and not args.ckpt.disable_ds


def prepare(args: Namespace, settings: dict[str, Any]) -> Checkpoints:
    """Decide, before a model is loaded, where the run starts; sets ``args.ckpt.load_enable`` to whether it resumes.

    A run that resumes keeps its name, so that its curves stay one. Raises UserError when it cannot resume as asked,
    and when it would write among another run's checkpoints.
    """
    load = args.ckpt.load_enable
    run = Checkpoints(Path(args.ckpt.path), settings, current_rank().count, load=load)
    _check_kind(args, run)
    if load:
        run.resume()
        args.ckpt.load_enable = run.step > 0
    elif saves(args) and (steps := run.steps()):
        raise UserError(
            f"--ckpt.path {run.root} has a run's checkpoints, the last of step {steps[0]}: add --ckpt.load_enable to "
            "go on from it, or give another directory, or remove this one"
        )
    if (saves(args) or run.step) and current_rank().index == 0:
        args.logger.wandb.run_name = run.claim(args.logger.wandb.run_name)
    return run


def _check_kind(args: Namespace, run: Checkpoints) -> None:
    """From checkpoints of the kind asked for, or there already, a run can resume to the bit."""
    options, ours = args.ckpt, (run.root / "complete").is_dir()
    weights = sorted(run.root.glob("global_step*_hf"), key=lambda path: path.stat().st_mtime)
    if options.load_enable and (options.disable_ds or (weights and not ours)):
        remedy = f"--actor.model_name_or_path {weights[-1]} starts from its weights" if weights else "leave it out"
        raise UserError(
            f"--ckpt.load_enable cannot go on from {run.root}: --ckpt.disable_ds saves no optimiser; {remedy}"
        )
    if not (options.load_enable or saves(args)):
        return
    if args.ds.use_universal_ckpt:
        raise UserError("--ds.use_universal_ckpt: this driver goes on only from checkpoints of its own; leave it out")
    if args.train.enable_ema:
        raise UserError(
            "--train.enable_ema: OpenRLHF's checkpoints lack the averaged weights, so no run can go on from them; "
            "leave it out, or save weights only with --ckpt.disable_ds --ckpt.save_hf"
        )
    if run.present("_actor") and not ours:
        raise UserError(
            f"--ckpt.path {run.root} has checkpoints that abc-rlhf local did not write: their data order and random "
            "numbers are unknown; give another directory"
        )


def versions() -> dict[str, str]:
    """What computes here; another one may round otherwise."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"abc_plugin": __version__, **installed, "device": device}


def _is_altered(path: Path) -> bool:
    """Whether the bytes of a file by torch.save do not match its checksums, which torch.load does not compare."""
    try:
        with zipfile.ZipFile(path) as parts:
            return parts.testzip() is not None
    except zipfile.BadZipFile:
        return True


def _print(line: str) -> None:
    print(f"abc-rlhf local: {line}")
