"""From one attention row to per-token rewards (paper, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor


def _check(name: str, value: Tensor, shape: torch.Size) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} has NaN or infinite entries: the reward model's output is not usable")


def last_action(action_mask_BA: Tensor) -> Tensor:
    """One-hot of each row's last action, fp32 (B, A); all zeros for a row without actions."""
    mask = action_mask_BA.bool()
    after = mask.flip(1).cumsum(1).flip(1)  # actions at or after t; 1 from the last action back to the one before it
    return ((after == 1) & mask).float()


def uniform_weights(action_mask_BA: Tensor) -> Tensor:
    """1 / (number of actions) on each action, fp32 (B, A); all zeros for a row without actions."""
    mask = action_mask_BA.bool().float()
    return mask / mask.sum(1, keepdim=True).clamp_min(1.0)


def renormalised(share_BA: Tensor, kept_BA: Tensor) -> Tensor:
    """What lies on the kept entries, rows summing to 1, fp32; uniform over them where that is all zero or underflows.

    out[b,t] = share[b,t]·kept[b,t] / sum_u share[b,u]·kept[b,u];  all zeros in a row that keeps nothing
    """
    left_BA = share_BA.double() * kept_BA  # double: a row of 1e-38s must not become uniform
    total_B1 = left_BA.sum(1, keepdim=True)
    usable_B1 = total_B1 > torch.finfo(torch.float32).tiny
    return torch.where(usable_B1, (left_BA / total_B1.where(usable_B1, 1.0)).float(), uniform_weights(kept_BA))


def response_weights(attention_BA: Tensor, action_mask_BA: Tensor) -> Tensor:
    """Restrict an attention row to the response and renormalise it (paper, footnote 4).

    weight[b,t] = attention[b,t]·mask[b,t] / sum_u attention[b,u]·mask[b,u]

    attention_BA: >= 0, any scale; what lies on the prompt, on padding and between action spans is dropped.
    action_mask_BA: 1 where a token was chosen by the policy; one or several spans.
    Returns fp32 (B, A), rows summing to 1. A row whose attention on the response is all zero (or underflows) is
    uniform over the response; a row without actions is all zeros.
    Raises ValueError on another shape, on NaN or infinite entries and on negative ones.
    """
    _check("attention", attention_BA, action_mask_BA.shape)
    if (attention_BA < 0).any():
        raise ValueError(f"attention has negative entries (smallest {attention_BA.min().item():.3g})")
    return renormalised(attention_BA, action_mask_BA.bool())


def redistribute(reward_B: Tensor, weight_BA: Tensor, action_mask_BA: Tensor, *, beta: float) -> Tensor:
    """Spread each response's scalar reward over its tokens; row sums are preserved.

    out[b,t] = beta·reward[b]·weight[b,t] + (1 - beta)·reward[b]·[t == last action of b]              (paper, eq. 8)

    reward_B: reward units, after baseline and clipping.  weight_BA: rows sum to 1, 0 where action_mask is 0; signed
    weights are allowed.  beta: in [0, 1].
    Returns fp32 (B, A), reward units; rows sum to reward_B to fp32 rounding, rows without actions are zero.
    Raises ValueError on other shapes, NaN, beta outside [0, 1], weight off the actions, a row that does not sum to 1.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta {beta} is outside [0, 1]")
    _check("weight", weight_BA, action_mask_BA.shape)
    _check("reward", reward_B, action_mask_BA.shape[:1])
    mask = action_mask_BA.bool()
    if (weight_BA[~mask] != 0).any():
        raise ValueError("weight is not zero outside the response: it is shifted or was not masked")
    error = (weight_BA.float().sum(1) - mask.any(1).float()).abs()
    if (error > 1e-3).any():
        raise ValueError(f"weight rows must sum to 1; row {int(error.argmax())} is off by {error.max().item():.3g}")
    mixed = beta * weight_BA.float() + (1.0 - beta) * last_action(mask)
    return reward_B.float()[:, None] * mixed


def mix(reward_B: Tensor, credit_BA: Tensor, action_mask_BA: Tensor, beta: float | Tensor) -> Tensor:
    """``redistribute`` of credit in reward units, also signed, with a beta for every token if wanted.

    out[b,t] = beta[b,t]·credit[b,t] + (reward[b] - sum_u beta[b,u]·credit[b,u])·[t == last action of b]

    With one beta for all, and rows of credit that sum to the reward, the last term is (1 - beta)·reward: equation 8.
    credit_BA: 0 off the actions, rows sum to reward_B.  beta: in [0, 1], a number or (B, A).
    Returns fp32 (B, A), reward units; rows sum to reward_B to fp32 rounding, rows without actions are zero.
    Raises ValueError on other shapes, NaN, credit off the actions, a row that does not sum to its reward.
    """
    _check("credit", credit_BA, action_mask_BA.shape)
    _check("reward", reward_B, action_mask_BA.shape[:1])
    mask = action_mask_BA.bool()
    if (credit_BA[~mask] != 0).any():
        raise ValueError("credit is not zero outside the response: it is shifted or was not masked")
    credit, reward = credit_BA.double(), torch.where(mask.any(1), reward_B.double(), 0.0)
    error = (credit.sum(1) - reward).abs() / (1.0 + credit.abs().sum(1))
    if (error > 1e-3).any():
        raise ValueError(
            f"credit must sum to the reward; row {int(error.argmax())} is off by {error.max().item():.3g}"
        )
    dense = beta * credit
    rest = (reward - dense.sum(1))[:, None]
    return (dense + last_action(mask) * rest).float()
