"""Shared fixtures: tiny models with the real tokenizer, and the real command line."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from local_runs import LocalRuns

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that workers who take a file at a time end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A directory as `abc-rlhf prepare` makes it, with random models of two layers."""
    from abc_plugin.tools.demo.tiny_models import make_tiny

    directory = tmp_path_factory.mktemp("tiny")
    make_tiny(directory)
    return directory


@pytest.fixture(scope="session")
def other(tiny, tmp_path_factory) -> Path:
    """The tiny policy and prompts with a reward model of GPT-2's architecture and tokenizer."""
    import tokenizer_zoo
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    directory = tmp_path_factory.mktemp("other")
    (directory / "policy").symlink_to(tiny / "policy")
    (directory / "prompts.jsonl").symlink_to(tiny / "prompts.jsonl")
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, num_labels=1, initializer_range=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2ForSequenceClassification(config)
    model.save_pretrained(directory / "reward_model")
    tokenizer_zoo.load("gpt2").save_pretrained(directory / "reward_model")
    return directory


@pytest.fixture(scope="session")
def local_runs() -> Iterator["LocalRuns"]:
    """Runs `abc-rlhf local` in forks of a process that has imported OpenRLHF."""
    from local_runs import LocalRuns

    runs = LocalRuns()
    yield runs
    runs.close()


def run_settings(tiny: Path, out: Path) -> dict[str, object]:
    """Flags of a run of three PPO steps, without their dashes, and their values. Few CPUs have a fast bf16."""
    return {
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
        "ds.param_dtype": "fp32",
        "ckpt.output_dir": out,
        "ckpt.path": out / "checkpoints",
    }


def as_words(settings: dict[str, object]) -> list[str]:
    """Words of a command line; True sets a switch, None drops the flag."""
    given = {f"--{name}": value for name, value in settings.items() if value is not None}
    return [word for flag, value in given.items() for word in ([flag] if value is True else [flag, str(value)])]


def local_flags(tiny: Path, out: Path, **changes: object) -> list[str]:
    """The run's flags; ``changes`` maps a flag's name without dashes to its value (see ``as_words``)."""
    dtype = {"ds.param_dtype": "bf16"} if "ds.load_in_4bit" in changes else {}
    return as_words(run_settings(tiny, out) | dtype | changes)


def run_python(*words: object, **kwargs: object) -> subprocess.CompletedProcess:
    """Run this interpreter in a process of its own and return what it said."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, **kwargs)
