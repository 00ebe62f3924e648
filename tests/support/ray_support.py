"""Runs of the real stack (Ray, DeepSpeed, vLLM, OpenRLHF) on a CPU for tests: interpreter, flags, one run, records."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_words, run_settings
from torch import Tensor
from transformers import AutoModel

from abc_plugin.attention import attach
from abc_plugin.credit.redistribute import response_weights

CLONE = Path(__file__).parents[2]
INTERPRETER = "ABC_RAY_PYTHON"
# Rollout log-probs show that vLLM has the trained weights.
CHANGES = {"actor.adam.lr": 1e-2, "algo.advantage.is_correction_level": "token"}


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


def trained(which: str, tiny: Path, out: Path, **changes: object) -> RayRun:
    """A run that must succeed."""
    flags = ray_flags(tiny, out, **{"logger.tensorboard_dir": out / "tensorboard"}, **CHANGES | changes)
    finished = run_ray(which, out, flags)
    assert finished.status == 0, finished.log[-4000:]
    return finished


def arrived(log: str) -> int:
    """How often a driver said that credit arrived."""
    return len(re.findall(r"abc_plugin: credit arrived: \d+ responses", log))


def column(run: RayRun, step: int, name: str) -> Tensor:
    """A metric of a step's responses."""
    return torch.cat([one["info"][name].float().flatten() for one in run.steps[step]])


def credit_by_sequence(step: list[dict]) -> dict[tuple, float]:
    """The entropy of each sequence's credit, as recorded."""
    return {
        tuple(sequence[mask_A.nonzero().flatten() + 1].tolist()): entropy.item()
        for one in step
        for sequence, mask_A, entropy in zip(
            one["sequences"], one["action_mask"], one["info"]["credit_entropy"], strict=True
        )
    }


def expected_entropies(tiny: Path, step: list[dict]) -> dict[tuple, float]:
    """The entropy of each sequence's credit, from the reward model in fp32, alone, one sequence at a time."""
    model = AutoModel.from_pretrained(tiny / "reward_model", dtype=torch.float32, attn_implementation="eager").eval()
    recovery, entropies = attach(model, recovery="eager-rerun"), {}
    for one in step:
        for sequence, mask_A in zip(one["sequences"], one["action_mask"], strict=True):
            end = int(mask_A.nonzero().max()) + 2
            ids, mask = sequence[None, :end], torch.ones(1, end, dtype=torch.long)
            with recovery.record(mask) as recording, torch.no_grad():
                model(ids, attention_mask=mask)
            weight_A = response_weights(recording.row_BS[:, 1:], mask_A[None, : end - 1])
            key = tuple(sequence[mask_A.nonzero().flatten() + 1].tolist())
            entropies[key] = torch.special.entr(weight_A).sum().item()
    return entropies


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: int = 300) -> None:
    """Poll until the condition holds; fail when the process ends first or time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.2)


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
