"""From evidence to shaped rewards: the method, the options, several reward models, and beta."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from abc_plugin.credit.methods import Evidence, Method, part_credit
from abc_plugin.credit.redistribute import last_action, mix, redistribute, renormalised, uniform_weights

STEPS = 40  # bisections: the mixture is found to 2^-40
LEAST_DEVIATION = 0.05  # of a group's rewards, relative to what a response's credits would give if independent


class Shaped(NamedTuple):
    """One batch's shaped rewards, and what they are made of; all fp32 (B, A)."""

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
    deviation_B: Tensor | None = None,
) -> Shaped:
    """Shape a batch's rewards by the credit of one reward model, or the mean credit of several.

        credit = mean_m credit_m
        out[b,t] = beta·(1 - d[b,t])·credit[b,t] + (the rest of reward[b])·[t == last action of b]

    members: one Evidence per reward model, on the same actions.  reward_B: reward units, after baseline and clipping.
    d: ``disagreement`` of the members' credit.  dropped_BA, entropy_floor: of methods with weights, by ``without`` and
    ``with_entropy``.
    ends_BA: where segments end (``pooled``), applied last.
    deviation_B: what the reward was divided by and the method's credit was not (``in_deviations``).
    Raises ValueError as ``redistribute``.
    """
    mask_BA = members[0].action_mask_BA.bool()
    kept_BA = mask_BA if dropped_BA is None else mask_BA & ~dropped_BA

    def member_credit(evidence: Evidence) -> Tensor:
        if method.weights is None:
            credit_BA = method.credit(evidence, reward_B)
            if deviation_B is not None:
                credit_BA = in_deviations(credit_BA, reward_B, mask_BA, deviation_B)
        else:
            credit_BA = method.weights(evidence)
            credit_BA = credit_BA if dropped_BA is None else without(credit_BA, kept_BA)
            credit_BA = with_entropy(credit_BA, kept_BA, entropy_floor) if entropy_floor else credit_BA
        return credit_BA if ends_BA is None else pooled(credit_BA, mask_BA, ends_BA)

    each = [member_credit(evidence) for evidence in members]
    mean_BA = each[0] if len(each) == 1 else torch.stack(each).mean(0)
    apart_BA = disagreement(each)
    credit_BA = mean_BA if method.weights is None else reward_B.float()[:, None] * mean_BA
    if method.weights is not None and len(each) == 1:
        reward_BA = redistribute(reward_B, mean_BA, mask_BA, beta=beta)
    else:
        reward_BA = mix(reward_B, credit_BA, mask_BA, beta * (1.0 - apart_BA))
    share_BA = mean_BA if method.weights is not None else mean_BA.abs() / _total_size(mean_BA)
    return Shaped(reward_BA, credit_BA, share_BA, apart_BA)


def slope(evidences: Sequence[Evidence], reward_N: Tensor) -> float:
    """By how much the reward grows with what contributions say of it: least squares over a batch of N responses.

        k = max(0, sum_n (S[n] - mean S)·reward[n] / sum_n (S[n] - mean S)^2)          1 where all S are the same
        S[n] = sum of contribution[n,t] over the actions t of response n but the last

    A contribution is what a token adds through the last layer's attention. Earlier layers read the same token and hand
    on what they read to the last token's own stream, of which contributions know nothing; so they are small, and most
    of the reward stays with the last action. k·contribution is the best prediction of the reward that is linear in
    them, and k the coefficient of least variance of the control variate that past contributions are to later actions.
    Responses without actions do not count.
    """
    sums, acts = [], []
    for one in evidences:
        mask_BA = one.action_mask_BA.bool()
        earlier_BA = mask_BA & ~last_action(mask_BA).bool()
        sums.append((one.contribution_BA.double() * earlier_BA).sum(1))
        acts.append(mask_BA.any(1))
    acts_N = torch.cat(acts)
    sum_N, reward_N = torch.cat(sums)[acts_N], reward_N.double()[acts_N]
    apart_N = sum_N - sum_N.mean() if len(sum_N) else sum_N
    variation = apart_N.square().sum().item()
    return max(0.0, (apart_N * reward_N).sum().item() / variation) if variation > 0 else 1.0


def in_deviations(credit_BA: Tensor, reward_B: Tensor, action_mask_BA: Tensor, deviation_B: Tensor) -> Tensor:
    """Credit in the score's units -> credit of a reward that was divided by its group's deviation, (B, A) fp32.

        out[b,t] = credit[b,t] / deviation[b]                               t not the last action
        out[b,t] = reward[b] - sum_u out[b,u]                               t the last action, u all others

    Where the group hardly differs, deviation[b] < LEAST_DEVIATION·sqrt(sum_u credit[b,u]^2), all of the reward stays
    with the last action: the divided reward is bounded, by the square root of the group's size, but what moves within
    a response would grow without bound. reward_B: after the division.  deviation_B: score units, > 0.
    """
    last_BA = last_action(action_mask_BA).bool()
    earlier_BA = torch.where(last_BA, 0.0, credit_BA.double())
    divides_B = deviation_B >= LEAST_DEVIATION * earlier_BA.norm(dim=1)
    divided_BA = torch.where(divides_B[:, None], earlier_BA / deviation_B[:, None], 0.0)
    return part_credit(divided_BA, action_mask_BA, reward_B)


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


def _total_size(credit_BA: Tensor) -> Tensor:
    total_B1 = credit_BA.abs().sum(1, keepdim=True)
    return total_B1.where(total_B1 > 0, 1.0)


def dropped(kinds: Collection[str], action_mask_BA: Tensor, special_BA: Tensor) -> Tensor | None:
    """Actions whose share goes to the others, bool (B, A); None where ``kinds`` is empty.

    special: the token is one of the tokenizer's special ones.  sinks: the response's last action, from which the
    attention is read; its attention to itself says nothing about the others. (The other sink, a sequence's first
    token, lies in the prompt and has no credit to begin with.)
    """
    if not kinds:
        return None
    last_BA = last_action(action_mask_BA).bool()
    return (special_BA & ("special" in kinds)) | (last_BA & ("sinks" in kinds))


def without(weight_BA: Tensor, kept_BA: Tensor) -> Tensor:
    """Weights on the kept actions only, ``renormalised``; a row that keeps no action stays as it was."""
    return torch.where(kept_BA.any(1, keepdim=True), renormalised(weight_BA, kept_BA), weight_BA.float())


def entropy(weight_BA: Tensor) -> Tensor:
    """-sum_t w ln w in nats, (B,)."""
    return torch.special.entr(weight_BA.clamp_min(0.0)).sum(1)


def with_entropy(weight_BA: Tensor, kept_BA: Tensor, floor: float) -> Tensor:
    """The weights mixed with uniform ones just enough that their entropy is at least ``floor`` of the uniform ones'.

    out = (1 - m)·weight + m / n on the n kept actions,   least m with H(out) >= floor·ln n

    H(out) does not fall with m, so m is found by bisection, to 2^-40. floor: 0 changes nothing, 1 is uniform.
    """
    uniform_BA = uniform_weights(kept_BA).double()
    weight_BA, wanted_B = weight_BA.double(), floor * entropy(uniform_BA)
    low_B, high_B = torch.zeros_like(wanted_B), torch.ones_like(wanted_B)
    for _ in range(STEPS):
        middle_B = (low_B + high_B) / 2
        enough_B = entropy(weight_BA.lerp(uniform_BA, middle_B[:, None])) >= wanted_B
        low_B, high_B = low_B.where(enough_B, middle_B), high_B.where(~enough_B, middle_B)
    mixed_B = torch.where((entropy(weight_BA) >= wanted_B) | ~kept_BA.any(1), 0.0, high_B)
    return weight_BA.lerp(uniform_BA, mixed_B[:, None]).float()


def pooled(credit_BA: Tensor, action_mask_BA: Tensor, ends_BA: Tensor) -> Tensor:
    """Each segment's credit on the segment's last action; rows keep their sums.

    out[b,t] = sum of credit over the segment that ends at t;  0 where none ends

    ends_BA: bool, the action closes a segment. A row's last action always closes one.
    On the last action, not evenly over the segment: the return of every action still counts what its segment earned,
    and no credit is moved before what earned it, so that a causal method stays causal.
    """
    mask_BA = action_mask_BA.bool()
    ends_BA = (ends_BA & mask_BA) | last_action(mask_BA).bool()
    segment_BA = ends_BA.long().cumsum(1) - ends_BA.long()  # 0 up to and with the first end, then 1, ...
    total_BA = torch.zeros_like(credit_BA, dtype=torch.double).scatter_add_(1, segment_BA, credit_BA.double())
    return torch.where(ends_BA, total_BA.gather(1, segment_BA), 0.0).float()
