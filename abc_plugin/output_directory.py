"""A run's output directory: can be written when the run starts, is one run's at a time, and holds one run only."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from abc_plugin.errors import UserError

LOCK, NOTE = ".lock", "settings.json"
RESULTS = ("*.safetensors", "*.bin", "merged", "summary.json", "completions.jsonl")  # by which readers would be misled
CONTENTS = " (contents)"  # behind a path's flag: a hash of what lies there

# Settings that do not shape the curve, by the beginning of their names; all others must be those of the run.
MAY_CHANGE = (
    "ckpt.",
    "logger.",
    "vllm.",  # local has no engines
    "local_rank",
    "shaping.show_",
    "local.merge_adapter",
    "train.num_episodes",  # a run may be made longer or shorter; that the learning rate's schedule changes is printed
)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that shape the curve and differ, in words; a path whose contents are known goes by these."""
    names = [name for name in then if name in now and then[name] != now[name]]
    return [
        f"{name} {then[name]} (now {now[name]})"
        for name in names
        if not name.removeprefix("--").startswith(MAY_CHANGE) and not {name + CONTENTS} & then.keys() & now.keys()
    ]


@contextlib.contextmanager
def claimed(args: Namespace, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within the block the run's directories are its own. Raises UserError where they cannot be."""
    output, checkpoints = Path(args.ckpt.output_dir), Path(args.ckpt.path)
    flags = {"--ckpt.output_dir": output}
    if (args.ckpt.save_steps > 0 or args.ckpt.load_enable) and checkpoints.resolve() != output.resolve():
        flags["--ckpt.path"] = checkpoints
    with contextlib.ExitStack() as stack:
        for flag, directory in flags.items():
            stack.enter_context(locked(flag, directory))
        claim("--ckpt.output_dir", output, settings)
        yield


@contextlib.contextmanager
def locked(flag: str, directory: Path) -> Iterator[None]:
    """Within the block the directory is this process's; the system ends the lock with the process, however it ends.

    Raises UserError where the directory cannot be written, or another process holds it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"\0" * 4096)
        file = open(directory / LOCK, "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{flag} {directory} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{flag} {directory} is another run's, which is not done; give another directory, or wait"
            ) from None
        except OSError as error:  # some network file systems have no locks
            print(f"abc_plugin: WARNING: {flag} {directory} cannot be locked ({error.strerror}): start one run only")
        yield


def claim(flag: str, directory: Path, settings: Mapping[str, Any]) -> None:
    """Note that the directory is of a run with these settings. Raises UserError where it has another's results."""
    note = directory / NOTE
    held = sorted(str(path.relative_to(directory)) for pattern in RESULTS for path in directory.glob(pattern))
    if held:
        if not note.exists():
            raise UserError(
                f"{flag} {directory} has {held[0]}, which no run left there that is known: it would be overwritten; "
                "give another directory, or remove it"
            )
        if changed := differences(json.loads(note.read_text(encoding="utf-8")), settings):
            raise UserError(
                f"{flag} {directory} has {held[0]} of a run that was made with other settings: {', '.join(changed)}; "
                "give them as they were, or another directory, or remove it"
            )
        return
    write_atomically(note, json.dumps(settings, indent=1))


def refuse_models(directories: Sequence[str | Path], models: Mapping[str, str]) -> None:
    """Raises UserError where a model that is read, its flag by path, lies in one of the directories to be written."""
    written = {Path(directory).expanduser().resolve() for directory in directories}
    for path, flag in models.items():
        if (there := Path(path).expanduser()).is_dir() and there.resolve() in written:
            raise UserError(f"--ckpt.output_dir: the run would overwrite {flag} {path}; give another directory")


def check_file(flag: str, path: Path, source: str = "") -> None:
    """The file can be written later, and is not ``source``, which is read. Raises UserError."""
    if source and path.resolve() == Path(source).expanduser().resolve():
        raise UserError(f"{flag} {path} is what is read: it would be overwritten; give another file")
    try:
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}") from None


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that after a kill it is there as a whole or not at all."""
    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
