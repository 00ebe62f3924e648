"""Causal credit: by how much each token moved the score of what has been written so far."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from abc_plugin.credit.methods import Evidence, Method
from abc_plugin.credit.redistribute import last_action


def prefix_credit(evidence: Evidence, reward_B: Tensor) -> Tensor:
    """Differences of the score of the prefix, (B, A) fp32, reward units, signed.

        credit[b,t] = phi[b,t] - phi[b,u]                t not the last action;  u the action before t
        credit[b,t] = reward[b] - phi[b,u] + phi0[b]     t the last action
        phi[b,u] = phi0[b]                               where no action is before t

    phi = evidence.prefix_BA, the score head read at the action's token; phi0 the same at the token before the first
    action, the prompt's own score (0 where the action axis has no such token). No action earned phi0, so it is paid at
    the end, as in the sparse reward: paid with the first action, it would set that action's advantage apart from all
    others wherever no critic takes it off. Rows sum to reward[b] whatever the units of phi are. phi is a function of
    what the policy has seen when it acts next, so the policy gradient at gamma = lambda = 1 is that of the sparse
    reward: credit is potential-based shaping (Ng et al. 1999; Chan et al. 2024, section 3, with a potential that is
    one; RED, arXiv 2411.08302).
    phi and reward differ in units where the host subtracts a baseline or clips: the last action then carries the
    difference, which lies on it in the sparse reward, too.
    After the environment's turn, the next action's difference includes what that turn did to the score.
    """
    mask_BA = evidence.action_mask_BA.bool()
    phi_BA, reward_B1 = evidence.prefix_BA.double(), reward_B.double()[:, None]
    place_A = torch.arange(mask_BA.shape[1], device=mask_BA.device)
    acted_BA = torch.where(mask_BA, place_A, -1).cummax(1).values  # the last action up to and with t
    before_BA = pad(acted_BA[:, :-1], (1, 0), value=-1)
    first_B1 = mask_BA.int().argmax(1, keepdim=True)
    start_B1 = pad(phi_BA, (1, 0)).gather(1, first_B1)
    held_BA = torch.where(before_BA >= 0, phi_BA.gather(1, before_BA.clamp_min(0)), start_B1)
    reached_BA = torch.where(last_action(mask_BA).bool(), reward_B1 + start_B1, phi_BA)
    return torch.where(mask_BA, reached_BA - held_BA, 0.0).float()


PREFIX = Method(frozenset({"prefix"}), prefix_credit)
