"""From evidence to shaped rewards: the method, the options, several reward models, and beta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from abc_plugin.credit.methods import Evidence, Method
from abc_plugin.credit.options import pooled, with_entropy, without
from abc_plugin.credit.redistribute import mix, redistribute


class Shaped(NamedTuple):
    """One batch's shaped rewards, and what to say about them; all fp32 (B, A)."""

    reward_BA: Tensor  # reward units; rows sum to the reward
    credit_BA: Tensor  # the method's, before beta; reward units, signed
    share_BA: Tensor  # |credit| / sum |credit|: the method's weights, where it has some
    disagreement_BA: Tensor  # of the reward models, in [0, 1]; 0 where there is one


def shape(
    method: Method,
    members: Sequence[Evidence],
    reward_B: Tensor,
    *,
    beta: float,
    dropped_BA: Tensor | None = None,
    entropy_floor: float = 0.0,
    ends_BA: Tensor | None = None,
) -> Shaped:
    """Shape a batch's rewards by the credit of one reward model, or the mean credit of several.

        credit = mean_m credit_m
        out[b,t] = beta·(1 - d[b,t])·credit[b,t] + (the rest of reward[b])·[t == last action of b]

    members: one Evidence per reward model, on the same actions.  reward_B: reward units, after baseline and clipping.
    d: ``disagreement`` of the members' credit.  dropped_BA, entropy_floor: ``options``, of methods with weights.
    ends_BA: where segments end (``options.pooled``), applied last.
    Raises ValueError as ``redistribute``.
    """
    mask_BA = members[0].action_mask_BA.bool()
    kept_BA = mask_BA if dropped_BA is None else mask_BA & ~dropped_BA

    def of(evidence: Evidence) -> Tensor:
        if method.weights is None:
            credit_BA = method.credit(evidence, reward_B)
        else:
            credit_BA = method.weights(evidence)
            credit_BA = credit_BA if dropped_BA is None else without(credit_BA, kept_BA)
            credit_BA = with_entropy(credit_BA, kept_BA, entropy_floor) if entropy_floor else credit_BA
        return credit_BA if ends_BA is None else pooled(credit_BA, mask_BA, ends_BA)

    each = [of(evidence) for evidence in members]
    mean_BA = each[0] if len(each) == 1 else torch.stack(each).mean(0)
    apart_BA = disagreement(each)
    credit_BA = mean_BA if method.weights is None else reward_B.float()[:, None] * mean_BA
    if method.weights is not None and len(each) == 1:
        reward_BA = redistribute(reward_B, mean_BA, mask_BA, beta=beta)
    else:
        reward_BA = mix(reward_B, credit_BA, mask_BA, beta * (1.0 - apart_BA))
    share_BA = mean_BA if method.weights is not None else mean_BA.abs() / _total(mean_BA)
    return Shaped(reward_BA, credit_BA, share_BA, apart_BA)


def disagreement(credits: Sequence[Tensor]) -> Tensor:
    """How far several reward models' credit is apart, (B, A) fp32 in [0, 1].

        d[b,t] = min(1, std_m c_m[b,t] / mean_m |c_m[b,t]|)                            std with divisor M; 0 / 0 = 0

    c: a model's weights, or its signed credit. Relative to the token's own credit: an absolute deviation would vanish
    with the response's length. Two models of which only one credits a token disagree by 1, two that give it 1 : 3 by
    0.5. Nothing of other tokens enters, so that causal credit stays causal.
    """
    if len(credits) == 1:
        return torch.zeros_like(credits[0])
    credit_MBA = torch.stack(list(credits))
    size_BA = credit_MBA.abs().mean(0)
    return (credit_MBA.std(0, correction=0) / size_BA.where(size_BA > 0, 1.0)).clamp(max=1.0)


def _total(credit_BA: Tensor) -> Tensor:
    total_B1 = credit_BA.abs().sum(1, keepdim=True)
    return total_B1.where(total_B1 > 0, 1.0)
