"""How the embedded default is made: one frozen dataclass whose hash names the cache directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """Every number that decides what ``abc-rlhf prepare`` makes."""

    seed: int = 0
    heldout_reviews: int = 1000  # IMDb reviews that no training text or training prompt comes from
    heldout_sentences: int = 500  # Rotten Tomatoes sentences, likewise
    prompts: int = 4096
    heldout_prompts: int = 256
    prompt_tokens: tuple[int, int] = (4, 8)
    layers: int = 14  # of SmolLM2's 30; all but the last stay frozen
    windows: int = 4000  # training texts cut from as many IMDb reviews
    sentences: int = 8000  # training texts from Rotten Tomatoes (there are 8,030 besides the held-out)
    window_words: tuple[int, int] = (10, 40)
    window_tokens: int = 48  # longer texts are cut here
    first_scored: int = 7  # every position from here on is trained to give the label
    epochs: int = 2
    batch: int = 16
    learning_rate: float = 7e-4
    head_learning_rate: float = 2e-3
    completions: int = 256  # sampled from the policy to measure the reward's spread
    completion_tokens: int = 16
    reward_std: float = 2.0  # on those completions, after scaling the head


def recipe_hash(recipe: Recipe, versions: dict[str, str]) -> str:
    """Ten hex digits over all fields and the packages' versions."""
    text = json.dumps([dataclasses.asdict(recipe), versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def default_dir(recipe: Recipe, versions: dict[str, str]) -> Path:
    """``$ABC_HOME`` (or ~/.cache/abc_plugin) / imdb-smollm2-<recipe hash>."""
    home = Path(os.environ.get("ABC_HOME") or Path.home() / ".cache" / "abc_plugin").expanduser()
    return home / f"imdb-smollm2-{recipe_hash(recipe, versions)}"
