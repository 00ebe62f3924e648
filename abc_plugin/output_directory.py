"""A run's output directory: can be written when the run starts, is one run's at a time, and holds one run only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from abc_plugin.errors import CannotWrite, UserError

LOCK, NOTE = ".lock", "settings.json"
# By which readers would be misled; the curves of a run that was stopped early may be all that it has left.
RESULTS = ("*.safetensors", "*.bin", "merged", "summary.json", "completions.jsonl", "tensorboard/*/*tfevents*")
CONTENTS = " (contents)"  # behind a path's flag: a hash of what lies there

# A disk that is full, above a quota or a file's greatest size, read-only or broken; and how those say so who hide it.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)
WRITERS = ("PytorchStreamWriter", "inline_container", "while serializing")

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
    names = [name for name, value in then.items() if name in now and value != now[name]]
    return [
        f"{name} {then[name]} (now {now[name]})"
        for name in names
        if not name.removeprefix("--").startswith(MAY_CHANGE) and not {name + CONTENTS} & then.keys() & now.keys()
    ]


@contextlib.contextmanager
def claimed(args: Namespace, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within the block the run's directories are its own. Raises UserError where they cannot be."""
    output, checkpoints = Path(args.ckpt.output_dir), Path(args.ckpt.path)
    results = {"--ckpt.output_dir": output}
    if args.critic.save_value_network:
        results["--critic.save_value_network"] = Path(f"{args.ckpt.output_dir}_critic")  # as the host names it
    held = dict(results)
    if (args.ckpt.save_steps > 0 or args.ckpt.load_enable) and checkpoints.resolve() != output.resolve():
        held["--ckpt.path"] = checkpoints
    with contextlib.ExitStack() as stack:
        for flag, directory in held.items():
            stack.enter_context(locked(flag, directory))
        if args.logger.tensorboard_dir:
            probe("--logger.tensorboard_dir", Path(args.logger.tensorboard_dir))
        for flag, directory in results.items():
            claim(flag, directory, settings)
        yield


def probe(flag: str, directory: Path) -> None:
    """Make the directory. Raises UserError where nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise UserError(f"{flag} {directory} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def locked(flag: str, directory: Path) -> Iterator[None]:
    """Within the block the directory is this process's; the system ends the lock with the process, however it ends.

    Raises UserError where the directory cannot be written, or another process holds it.
    """
    probe(flag, directory)
    with open(directory / LOCK, "a") as file:
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
    found = [path for pattern in RESULTS for path in directory.glob(pattern)]
    held = sorted(str(path.relative_to(directory)) for path in found if not _without_events(path))
    if held:
        if not note.exists():
            raise UserError(
                f"{flag} {directory} has {held[0]}, which no run left there that is known: it would be overwritten; "
                "give another directory, or remove it"
            )
        try:
            changed = differences(json.loads(note.read_text(encoding="utf-8")), settings)
        except (ValueError, AttributeError):  # AttributeError: no object
            raise UserError(f"{note} is damaged, so {held[0]} may be of another run; give another directory") from None
        if changed:
            raise UserError(
                f"{flag} {directory} has {held[0]} of a run that was made with other settings: {', '.join(changed)}; "
                "give them as they were, or another directory, or remove it"
            )
        return
    write_atomically(note, json.dumps(settings, indent=1))


def _without_events(path: Path) -> bool:
    """Whether it is a file of curves without any, as of a run that ended before its first step."""
    return "tfevents" in path.name and path.stat().st_size < 100


def refuse_models(
    directories: Sequence[str | Path], models: Mapping[str, str], flag: str = "--ckpt.output_dir"
) -> None:
    """Raises UserError where a model that is read, its flag by path, lies in one of the directories to be written."""
    written = {Path(directory).expanduser().resolve() for directory in directories}
    for path, model in models.items():
        if (there := Path(path).expanduser()).is_dir() and there.resolve() in written:
            raise UserError(f"{flag}: what is written would overwrite {model} {path}; give another directory")


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


@contextlib.contextmanager
def writing(path: str | Path, kept: str = "") -> Iterator[None]:
    """Within the block, a file that cannot be written raises CannotWrite with its path, or else this one.

    kept: what is not lost by it, in words.
    """
    try:
        yield
    except Exception as error:  # torch, safetensors and DeepSpeed have kinds of error of their own
        words, number = str(error) or type(error).__name__, getattr(error, "errno", None)
        if number not in UNWRITABLE and not any(word in words for word in WRITERS):
            raise
        cause = os.strerror(number) if number else words.splitlines()[0]
        there = next(each for each in (Path(path), *Path(path).absolute().parents) if each.exists())
        if shutil.disk_usage(there).free < 2**20:
            cause = os.strerror(errno.ENOSPC)
        name = getattr(error, "filename", None) or path
        raise CannotWrite(f"{name} cannot be written: {cause}" + (f"; {kept}" if kept else "")) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that after a kill it is there as a whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
