"""What is cut from reviews: windows to train and test the reward model on, and prompts."""

from __future__ import annotations

import random
from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from abc_plugin.tools.demo.sources import Review


def word_window(review: Review, words: int, rng: random.Random) -> Review:
    """``words`` words in a row: one in four from the review's start, one in four its end, the rest from anywhere."""
    all_words = review.text.split()
    last = max(0, len(all_words) - words)
    start = rng.choice((0, last, rng.randint(0, last), rng.randint(0, last)))
    return Review(" ".join(all_words[start : start + words]), review.label)


def cut_windows(reviews: list[Review], count: int, words: tuple[int, int], rng: random.Random) -> list[Review]:
    """``count`` windows whose lengths are uniform over ``words``, going round the reviews in order."""
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
