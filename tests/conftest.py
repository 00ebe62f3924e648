"""Shared fixtures: tiny models with the real tokenizer, and the real command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A directory as `abc-rlhf prepare` makes it, with random models of two layers."""
    from abc_plugin.demo.tiny import make_tiny

    directory = tmp_path_factory.mktemp("tiny")
    make_tiny(directory)
    return directory


def local_flags(tiny: Path, out: Path, **changes: object) -> list[str]:
    """Flags of a run of three PPO steps; ``changes`` maps a flag's name without dashes to its value, None drops it."""
    flags = {
        "actor.model_name_or_path": tiny / "policy",
        "reward.model_name_or_path": tiny / "reward_model",
        "data.prompt_dataset": tiny / "prompts.jsonl",
        "data.max_samples": 24,
        "data.max_len": 48,
        "rollout.max_new_tokens": 8,
        "rollout.batch_size": 8,
        "rollout.micro_batch_size": 4,
        "train.batch_size": 8,
        "train.micro_batch_size": 4,
        "actor.adam.lr": 1e-3,
        "critic.adam.lr": 1e-3,
        "ckpt.output_dir": out,
        "ckpt.path": out / "checkpoints",
    } | changes
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


def run_python(*words: object, **kwargs: object) -> subprocess.CompletedProcess:
    """Run this interpreter in a process of its own and return what it said."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, **kwargs)
