#!/usr/bin/env python3
"""Give OpenRLHF a plugin loader: patch its PPO script, check that it is patched, or take the patch out again.

    python patches/apply.py [--check | --reverse] [DIRECTORY]

DIRECTORY holds the package openrlhf (site-packages, or a checkout); default: the one that this Python imports. Needs
the command ``patch``. Exit status: 0 done, or --check: patched; 1 --check: not patched; 2 refused, nothing changed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

PATCHES = {
    "openrlhf-0.9.9.patch": SpecifierSet(">=0.9.9,<0.10"),
    "openrlhf-0.10.0.patch": SpecifierSet(">=0.10,<0.10.2"),
    "openrlhf-0.10.2.patch": SpecifierSet(">=0.10.2,<0.11"),
    "openrlhf-0.11.0.patch": SpecifierSet(">=0.11,<0.12"),
}
TARGET = Path("openrlhf/cli/train_ppo_ray.py")
MARKER = 'entry_points(group="openrlhf.plugins")'


class Refused(Exception):
    """One line for the user; nothing was changed."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="only say whether it is patched")
    action.add_argument("--reverse", action="store_true", help="restore the file, byte for byte")
    parser.add_argument("directory", nargs="?", type=Path, help="holds the package openrlhf")
    args = parser.parse_args(argv)
    try:
        directory = args.directory or installed_directory()
        version = version_in(directory)
        return run(directory, version, check=args.check, reverse=args.reverse)
    except Refused as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return 2


def run(directory: Path, version: str, *, check: bool, reverse: bool) -> int:
    """Patch or restore the OpenRLHF in ``directory``, or with ``check`` report; returns the exit status."""
    patch = patch_for(version)
    target = directory / TARGET
    what = f"OpenRLHF {version}, {target}"
    applied, restored = outcome(target, patch), outcome(target, patch, "--reverse")
    if (applied is None) == (restored is None):
        raise Refused(f"{what} has been changed by hand: {patch.name} neither fits nor is in it; reinstall OpenRLHF")
    is_patched = applied is None
    if check or is_patched != reverse:
        state = "patched" if is_patched else "not patched"
        print(f"{what}: {state}{'' if check else ', nothing to do'} ({patch.name})")
        return int(check and not is_patched)
    new = restored if reverse else applied
    compile(new, str(target), "exec")
    if (MARKER.encode() in new) == reverse:
        raise Refused(f"{patch.name} is damaged: with it {target.name} would {'keep' if reverse else 'lack'} {MARKER}")
    replace(target, new)
    print(f"{what}: {'restored' if reverse else 'patched'} ({patch.name})")
    return 0


def outcome(target: Path, patch: Path, *options: str) -> bytes | None:
    """What ``patch`` makes of the file, or None where it does not fit exactly. The file itself is left alone."""
    if shutil.which("patch") is None:
        raise Refused("the command patch is not installed; install it (apt-get install patch)")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / TARGET
        copy.parent.mkdir(parents=True)
        shutil.copyfile(target, copy)
        # force: never ask, never guess that the patch might be meant the other way round.
        command = ["patch", "-p1", "--force", "--fuzz=0", *options, f"--input={patch}"]
        result = subprocess.run(command, cwd=scratch, capture_output=True)
        return copy.read_bytes() if result.returncode == 0 else None


def replace(target: Path, content: bytes) -> None:
    """Write a new file and move it into place: never half written, and a hard link into pip's or uv's cache is cut."""
    new = target.with_name(f"{target.name}.new")
    new.write_bytes(content)
    shutil.copymode(target, new)
    os.replace(new, target)


def patch_for(version: str) -> Path:
    """The patch for a version of OpenRLHF."""
    try:
        fitting = [name for name, range_ in PATCHES.items() if range_.contains(Version(version), prereleases=True)]
    except InvalidVersion:
        fitting = []
    if not fitting:
        ranges = "; ".join(str(range_) for range_ in PATCHES.values())
        raise Refused(f"no patch for OpenRLHF {version}; there are patches for {ranges}")
    return Path(__file__).resolve().parent / fitting[0]


def installed_directory() -> Path:
    """Where the openrlhf lies that this Python would import; it is not imported."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or not spec.submodule_search_locations:
        raise Refused(f"{sys.executable} has no openrlhf; run this with the Python that has it, or give its directory")
    return Path(spec.submodule_search_locations[0]).parent


def version_in(directory: Path) -> str:
    """Version of the OpenRLHF in a directory: of its installation, or of its repository."""
    if not (directory / TARGET).is_file():
        raise Refused(f"{directory} has no {TARGET}")
    installations = list(directory.glob("openrlhf-*.dist-info"))
    if len(installations) == 1:
        return installations[0].name.removeprefix("openrlhf-").removesuffix(".dist-info")
    if not installations and (directory / "version.txt").is_file():
        return (directory / "version.txt").read_text(encoding="utf-8").strip()
    raise Refused(f"{directory} has {len(installations)} openrlhf-*.dist-info and no version.txt to tell its version")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
