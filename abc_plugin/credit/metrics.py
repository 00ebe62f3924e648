"""What to watch while shaping: one number per response and metric."""

from __future__ import annotations

import torch
from torch import Tensor

from abc_plugin.credit.redistribute import last_action


def without_attention(attention_BA: Tensor, action_mask_BA: Tensor) -> Tensor:
    """1 for a response none of whose actions is attended to, so that its credit is uniform, else 0; fp32 (B,).

    By the rule of ``redistribute.response_weights``. It happens where the layer's window ends behind the last action.
    """
    mask = action_mask_BA.bool()
    attended = (attention_BA.double() * mask).sum(1) > torch.finfo(torch.float32).tiny
    return (mask.any(1) & ~attended).float()


def credit_metrics(
    weight_BA: Tensor, dense_BA: Tensor, reward_B: Tensor, action_mask_BA: Tensor, special_BA: Tensor
) -> dict[str, Tensor]:
    """Per-response metrics (B,), fp32, logged beside the host's own.

    weight_BA: the method's weights; of signed credit |credit| / sum |credit|.

    credit_entropy              -sum w ln w, nats; ln(number of actions) when uniform
    credit_last_token           share of credit on the last action
    credit_special_tokens       share of credit on special tokens (special_BA: bool, the action's token is special)
    credit_conservation_error   |sum of shaped rewards - reward|, reward units; 0 for a response without actions
    """
    mask = action_mask_BA.bool()
    reward_B = torch.where(mask.any(1), reward_B.float(), 0.0)
    return {
        "credit_entropy": torch.special.entr(weight_BA.clamp_min(0.0)).sum(1),
        "credit_last_token": (weight_BA * last_action(mask)).sum(1),
        "credit_special_tokens": (weight_BA * special_BA).sum(1),
        "credit_conservation_error": (dense_BA.double().sum(1) - reward_B.double()).abs().float(),
    }


def negative_share(credit_BA: Tensor) -> Tensor:
    """Of sum |credit|, what lies on tokens of negative credit, (B,) fp32 in [0, 1]; 0 where there is no credit."""
    total_B = credit_BA.abs().sum(1)
    return (-credit_BA.clamp_max(0.0)).sum(1) / total_B.where(total_B > 0, 1.0)


def mean_disagreement(disagreement_BA: Tensor, share_BA: Tensor) -> Tensor:
    """Disagreement of the reward models per token (``shaping.disagreement``), mean weighted by credit, (B,) fp32."""
    return (disagreement_BA * share_BA).sum(1)
