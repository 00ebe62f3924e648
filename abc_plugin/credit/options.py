"""What composes with any method: tokens left out, a floor under the entropy, credit pooled over segments."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from abc_plugin.credit.redistribute import last_action, uniform_weights

STEPS = 40  # bisections: the mixture is found to 2^-40


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
    """Weights on the kept actions only, renormalised.

    out[b,t] = weight[b,t]·kept[b,t] / sum_u weight[b,u]·kept[b,u]

    A row whose kept actions carry nothing is uniform over them; a row that keeps no action stays as it was.
    """
    left_BA = weight_BA.double() * kept_BA
    total_B1 = left_BA.sum(1, keepdim=True)
    usable_B1 = total_B1 > torch.finfo(torch.float32).tiny
    out_BA = torch.where(usable_B1, (left_BA / total_B1.where(usable_B1, 1.0)).float(), uniform_weights(kept_BA))
    return torch.where(kept_BA.any(1, keepdim=True), out_BA, weight_BA.float())


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
