"""Which row: the token whose hidden state the score head reads."""

from __future__ import annotations

from torch import Tensor


def score_positions(attention_mask_BS: Tensor) -> Tensor:
    """Index of each row's last 1, (B,) long: where OpenRLHF's reward model reads its score.

    position[b] = S - 1 - argmax_s mask[b, S-1-s]                    (openrlhf.models.model, ``eos_indices``)

    By mask, never by token id, so pad == eos and truncated responses need no case of their own; padding may lie left,
    right or in between. A row without any 1 gives S - 1, as the host's rule does; its attention row is all zeros.
    Raises ValueError unless the mask is (B, S) with S >= 1.
    """
    if attention_mask_BS.ndim != 2 or attention_mask_BS.shape[1] == 0:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask_BS.shape)}, expected (B, S) with S >= 1")
    return attention_mask_BS.shape[1] - 1 - attention_mask_BS.ne(0).long().fliplr().argmax(dim=1)
