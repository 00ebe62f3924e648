"""Runs of the real stack (Ray, DeepSpeed, vLLM, OpenRLHF) on a CPU for tests: interpreter, flags, one run, records."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_words, run_settings
from torch import Tensor

CLONE = Path(__file__).parents[2]
INTERPRETER = "ABC_RAY_PYTHON"


def ray_python() -> str:
    """The interpreter of an environment with vLLM and this clone's abc_plugin; skips the test where there is none."""
    if named := os.environ.get(INTERPRETER):
        return named
    if (made := CLONE / ".venv-ray" / "bin" / "python").exists():
        return str(made)
    if importlib.util.find_spec("vllm"):
        return sys.executable
    return pytest.skip(f"no vLLM here: bash launch/environment.sh ray makes .venv-ray (or set {INTERPRETER})")


def ray_flags(tiny: Path, out: Path, **changes: object) -> list[str]:
    """Flags of a run of three PPO steps, as for openrlhf.cli.train_ppo_ray; ``changes`` as in ``local_flags``."""
    cluster = {
        **{f"{model}.num_gpus_per_node": 1 for model in ("actor", "ref", "critic", "reward")},
        "vllm.num_engines": 1,
        "vllm.enforce_eager": True,
        "ds.attn_implementation": "eager",
        "ds.param_dtype": None,  # its parser has bf16 and fp16 only
    }
    return as_words(run_settings(tiny, out) | cluster | changes)


@dataclass
class RayRun:
    """What one run left: its exit status, what it said, and the experiences of each PPO step."""

    status: int
    log: str
    steps: list[list[dict[str, Any]]]


def run_ray(which: str, out: Path, flags: list[str], timeout: int = 600) -> RayRun:
    """Run the command line ``which`` ("stock" or "abc", see ray_run.py) in its own process, recording in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    command = [ray_python(), CLONE / "tests" / "support" / "ray_run.py", which, out / "records", *flags]
    for _ in range(2):
        with open(out / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=out) as process:
            try:
                status = process.wait(timeout)
            except BaseException:  # also Ctrl-C; SIGTERM lets it end Ray
                process.terminate()
                raise
        # The host picks a free port and uses it later: on a busy machine another process may be faster.
        if status == 0 or "EADDRINUSE" not in (out / "log").read_text(errors="replace"):
            break
    steps = [torch.load(path) for path in sorted((out / "records").glob("*.pt"))]
    return RayRun(status, (out / "log").read_text(errors="replace"), steps)


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested lists and dicts, by its path, to compare two runs' steps."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(inner, f"{name}/{key}")


def assert_identical(left: list, right: list) -> None:
    """Two runs' steps agree bit by bit, by name of the first tensor that does not."""
    left, right = dict(tensors(left)), dict(tensors(right))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
