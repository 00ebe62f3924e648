"""OpenRLHF's releases, unpacked from their wheels and kept in pytest's cache: pure Python, without dependencies."""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

SUPPORTED = ("0.10.2", "0.10.3", "0.10.4", "0.11.0", "0.11.1", "0.11.2")


@cache
def _ask_the_index() -> subprocess.CompletedProcess:
    return subprocess.run(
        [*PIP, "index", "versions", "openrlhf", "--retries", "1"], capture_output=True, text=True, timeout=120
    )


def on_the_index() -> list[str]:
    """Every version that the package index offers. Skips the test when no index can be reached."""
    answer = _ask_the_index()
    if answer.returncode != 0:
        pytest.skip(f"no package index with OpenRLHF can be reached, so its releases are not checked: {answer.stderr}")
    listed = next(line for line in answer.stdout.splitlines() if line.startswith("Available versions:"))
    return listed.removeprefix("Available versions:").replace(" ", "").split(",")


def release(version: str, cache_dir: Path) -> Path:
    """A directory with the release's packages ``openrlhf`` and ``tests`` and its metadata; do not change it."""
    directory = cache_dir / version
    if directory.is_dir():
        return directory
    assert version in on_the_index(), f"OpenRLHF {version} is gone from the package index"
    unfinished = cache_dir / f"{version}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    # The wheels hold Python only, but are tagged with the platform that they were built on.
    platform = ["--python-version", "3.11", "--platform", "manylinux1_x86_64", "--only-binary", ":all:"]
    command = [*PIP, "install", "--quiet", "--no-deps", "--no-compile", *platform, "--target", str(unfinished)]
    result = subprocess.run([*command, f"openrlhf=={version}"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return unfinished.rename(directory)
