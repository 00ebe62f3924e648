"""The policy that a credit method ends at when its expected gradient is followed without any noise."""

from __future__ import annotations

import torch
from torch import Tensor

from abc_plugin.tools.lab.gradient import CRITICS, advantages, expected_gradient
from abc_plugin.tools.lab.mdp import Completions

STEPS = 200


def ascend(
    space: Completions,
    theta_MPV: Tensor,
    dense_MNL: Tensor,
    critic: str,
    lambda_: float,
    seed: int,
    steps: int = STEPS,
) -> Tensor:
    """pi after ``steps`` natural gradient steps of length 1, (M, P, V); the critic follows the policy.

    theta[s,a] += g[s,a] / (P(s)·pi(a|s)), the expected advantage of the choice: for a softmax table the gradient in
    the Fisher metric. It differs from g by positive factors only, so it rests where g rests, but it is not held up
    for thousands of steps near policies that have almost stopped exploring, as the plain gradient is.
    """
    for _ in range(steps):
        policy_MPV = space.policy(theta_MPV)
        p_MN = space.probability(policy_MPV)
        advantage_MNL = advantages(dense_MNL, CRITICS[critic](space, dense_MNL, p_MN, seed), lambda_)
        g_MPV = expected_gradient(space, policy_MPV, p_MN, advantage_MNL)
        mass_MP = torch.cat([space.by_prefix(p_MN, t) for t in range(space.L)], dim=1)
        theta_MPV = theta_MPV + g_MPV / (mass_MP[..., None] * policy_MPV).clamp_min(torch.finfo(torch.float64).tiny)
    return space.policy(theta_MPV)
