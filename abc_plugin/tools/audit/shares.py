"""Where the shares of a completion's tokens lie: one table, for every method's credit and every head's attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from scipy.special import entr

Marks = Mapping[str, list[bool]]  # of a completion's tokens: "punctuation", "special"


def shares(size_XT: np.ndarray) -> np.ndarray:
    """size / its sum over the tokens, (..., T), sizes >= 0; NaN where the sum is 0."""
    total_X1 = size_XT.sum(-1, keepdims=True)
    return np.divide(size_XT, total_X1, out=np.full(size_XT.shape, np.nan), where=total_X1 > 0)


def _entropy(share_XT: np.ndarray, marks: Marks) -> np.ndarray:
    """- sum share ln share / ln T; NaN for one token."""
    tokens = share_XT.shape[-1]
    return entr(share_XT).sum(-1) / (math.log(tokens) if tokens > 1 else math.nan)


# name: (what it says, of shares (..., T) and the completion's marks)
PLACES: dict[str, tuple[str, Callable[[np.ndarray, Marks], np.ndarray]]] = {
    "entropy": ("entropy, as a share of uniform's", _entropy),
    "first": ("share on the completion's first token", lambda share, marks: share[..., 0]),
    "last": ("share on its last token", lambda share, marks: share[..., -1]),
    "punctuation": ("share on punctuation", lambda share, marks: (share * marks["punctuation"]).sum(-1)),
    "special": ("share on special tokens", lambda share, marks: (share * marks["special"]).sum(-1)),
}
