"""Signed credit: gradient x input of the score on each token's embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from abc_plugin.credit.methods import Evidence, Method


def gradient_credit(evidence: Evidence, reward_B: Tensor) -> Tensor:
    """The reward's size spread by attribution, and what that leaves of the reward spread evenly, (B, A) fp32, signed.

        a[b,t] = gradient[b,t] / sum_u |gradient[b,u]|                      0 where all of a row's gradient is 0
        credit[b,t] = |reward[b]|·a[b,t] + (reward[b] - |reward[b]|·sum_u a[b,u]) / (number of actions)

    Divides by the sum of absolute values, never by that of signed ones, which may be near 0: |credit| is at most
    |reward|·(1 + 2 / actions). A token that raised the score gets more than the even share, also where the reward is
    negative. Rows sum to reward[b]; multiplying the reward by a positive number multiplies the credit.
    """
    mask_BA = evidence.action_mask_BA.bool()
    reward_B1 = reward_B.double()[:, None]
    gradient_BA = evidence.gradient_BA.double() * mask_BA
    size_B1 = gradient_BA.abs().sum(1, keepdim=True)
    usable_B1 = size_B1 > torch.finfo(torch.float32).tiny
    part_BA = torch.where(usable_B1, reward_B1.abs() * gradient_BA / size_B1.where(usable_B1, 1.0), 0.0)
    rest_B1 = reward_B1 - part_BA.sum(1, keepdim=True)
    return ((part_BA + rest_B1 / mask_BA.sum(1, keepdim=True).clamp_min(1)) * mask_BA).float()


GRAD_INPUT = Method(frozenset({"gradient"}), gradient_credit)
