"""``credit.shaping.shape`` with the run's settings: what the tokenizer must say about a batch is said here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from abc_plugin.config import ShapingConfig
from abc_plugin.credit.methods import Evidence, Method
from abc_plugin.credit.shaping import Shaped, dropped, shape
from abc_plugin.text.segments import segment_ends


def special_actions(tokenizer: Any, sequences_BS: Tensor) -> Tensor:
    """Actions whose token is one of the tokenizer's special ones, bool (B, A)."""
    return torch.isin(sequences_BS[:, 1:], torch.tensor(tokenizer.all_special_ids))


def shape_batch(
    shaping: ShapingConfig, method: Method, members: Sequence[Evidence], reward_B: Tensor, tokenizer: Any, beta: float
) -> Shaped:
    """As ``shape``, with ``--shaping.drop``, ``--shaping.entropy_floor`` and ``--shaping.segment``."""
    sequences_BS, mask_BA = members[0].sequences_BS, members[0].action_mask_BA
    return shape(
        method,
        members,
        reward_B,
        beta=beta,
        dropped_BA=dropped(shaping.dropped, mask_BA, special_actions(tokenizer, sequences_BS)),
        entropy_floor=shaping.entropy_floor,
        ends_BA=segment_ends(shaping.segment, tokenizer, sequences_BS, mask_BA),
    )
