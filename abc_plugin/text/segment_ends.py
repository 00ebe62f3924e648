"""Where the segments of a response end: its sentences, or an agent's turns."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from abc_plugin.text.character_spans import token_spans

# What a token's own text shows of the end of a sentence; what follows it is not asked, so that the end is known when
# the token is written. Closing quotes and brackets, with it or later, do not open another sentence by themselves.
SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’»)\]]*\s*$|\n")


def segment_ends(kind: str, tokenizer: Any, sequences_BS: Tensor, action_mask_BA: Tensor) -> Tensor | None:
    """Actions that close a segment, bool (B, A); None where ``kind`` is "none".

    sentence: the token's text ends in a full stop, exclamation or question mark, with closing quotes or brackets, or
    holds a line break.  turn: the last action before tokens that are not the policy's.
    """
    if kind == "none":
        return None
    mask_BA = action_mask_BA.bool()
    ends_BA = mask_BA & ~torch.nn.functional.pad(mask_BA[:, 1:], (0, 1))
    if kind == "sentence":
        for ends_A, acts_A, ids_A in zip(ends_BA, mask_BA, sequences_BS[:, 1:], strict=True):
            text, spans_S2 = token_spans(tokenizer, ids_A[acts_A].tolist())
            pieces = [text[start:end] for start, end in spans_S2.long().tolist()]
            closes = [SENTENCE_END.search(piece) is not None for piece in pieces]
            ends_A[acts_A] |= torch.tensor(closes, dtype=torch.bool)
    return ends_BA
