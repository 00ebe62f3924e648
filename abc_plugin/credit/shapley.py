"""Shapley values of a response's segments, from calls of the score on parts of the response: the costly reference.

    phi[k] = mean over orders of the K segments of  v(those before k, and k) - v(those before k)

v(C) is the score of prompt and response with only the segments in C left, v(none) that of the prompt alone; so
sum_k phi[k] = v(all) - v(none) (Shapley 1953; as credit: SCAR, arXiv 2505.20417). Exact where all 2^K - 1 parts of a
response are within the calls; else over orders that are drawn, each followed by its reverse (antithetic; Mitchell et
al. 2022, arXiv 2104.12199), whose sum is still exact. captum's ShapleyValueSampling replaces features and bounds the
orders; here tokens are removed and the calls are bounded.

Dimensions beside the package's: K segments, C combinations of segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb

import torch
from torch import Tensor

from abc_plugin.credit.redistribute import last_action


def segments(ends_BA: Tensor | None, action_mask_BA: Tensor, calls: int) -> Tensor:
    """Number of each action's segment, (B, A), from 0; -1 off the actions.

    ends_BA: actions that close a segment; None makes every token one. Neighbours are merged, evenly by their number,
    until two orders of them are within the calls: K <= max(2, (calls + 1) // 2).
    """
    mask_BA, most = action_mask_BA.bool(), max(2, (calls + 1) // 2)
    ends_BA = mask_BA if ends_BA is None else (ends_BA & mask_BA) | last_action(mask_BA).bool()
    number_BA, count_B1 = ends_BA.long().cumsum(1) - ends_BA.long(), ends_BA.sum(1, keepdim=True)
    merged_BA = torch.where(count_B1 > most, number_BA * most // count_B1.clamp_min(1), number_BA)
    return merged_BA.where(mask_BA, -1)


def plan(count: int, calls: int, seed: int) -> tuple[Tensor, Tensor]:
    """(parts_CK, weight_KC): phi = weight @ v(parts), with at most ``calls`` parts besides the first, which is all."""
    whole = 2**count - 1  # a part is a number whose bits are its segments
    if whole <= calls:
        parts = list(range(whole, -1, -1))
        gains = [
            (k, part, part & ~(1 << k), 1 / (count * comb(count - 1, part.bit_count() - 1)))
            for part in parts
            for k in range(count)
            if part >> k & 1
        ]
    else:
        rng, parts, gains, order = torch.Generator().manual_seed(seed), [whole, 0], [], []
        orders = (calls - 1) // (count - 1)
        for number in range(orders):
            order = torch.randperm(count, generator=rng).tolist() if number % 2 == 0 else order[::-1]
            before = 0
            for k in order:
                gains.append((k, before | 1 << k, before, 1 / orders))
                before |= 1 << k
                parts.append(before)
    column = {part: at for at, part in enumerate(dict.fromkeys(parts))}
    weight_KC = torch.zeros(count, len(column), dtype=torch.double)
    for k, after, before, weight in gains:
        weight_KC[k, column[after]] += weight
        weight_KC[k, column[before]] -= weight
    return torch.tensor([[part >> k & 1 for k in range(count)] for part in column]).bool(), weight_KC


def shapley_values(
    score: Callable[[Tensor], Tensor], whole_B: Tensor, segment_BA: Tensor, calls: int, seeds: Sequence[int]
) -> Tensor:
    """phi of each segment on its last action, (B, A) fp32, units of the score, signed; 0 elsewhere.

    score: bool (B, A), the tokens that are left (all that are no actions are) -> (B,). It is called ``calls`` times
    whatever the lengths, as split models must run equally often everywhere; responses that need fewer are run whole.
    whole_B: the score of all.  segment_BA: ``segments``.  seeds: of each response's drawn orders.
    """
    plans = [plan(int(row_A.max()) + 1, calls, seed) for row_A, seed in zip(segment_BA, seeds, strict=True)]
    value_NB = [whole_B.double()]
    for call in range(1, calls + 1):
        kept_BA = torch.ones_like(segment_BA, dtype=torch.bool)
        for kept_A, row_A, (parts_CK, _) in zip(kept_BA, segment_BA, plans, strict=True):
            acts_A = row_A >= 0
            if call < len(parts_CK):
                kept_A[acts_A] = parts_CK[call][row_A[acts_A]]
        value_NB.append(score(kept_BA).double())
    value_BN, out_BA = torch.stack(value_NB, 1), torch.zeros(segment_BA.shape)
    for b, (parts_CK, weight_KC) in enumerate(plans):
        for k, phi in enumerate((weight_KC @ value_BN[b, : len(parts_CK)]).tolist()):
            out_BA[b, (segment_BA[b] == k).nonzero()[-1]] = phi
    return out_BA
