"""What an actor-critic follows in expectation, how noisy one completion's estimate of it is, and where it ends."""

from __future__ import annotations

import torch
from torch import Tensor

from abc_plugin.tools.lab.mdp import Completions

CRITICS = ("constant", "exact", "noisy", "prefix", "zero")
STEPS = 200  # of natural gradient ascent


def critic_values(space: Completions, p_MN: Tensor, dense_MNL: Tensor, critic: str | Tensor, seed: int = 0) -> Tensor:
    """What the critic says of the state before each choice, (M, N, L).

    A tensor (M, N, L): fixed values, as of ``random_processes.prefix_critic``.
    exact: V(s_t) = E[sum of the shaped rewards from t on | s_t], what a perfect critic of this policy learns; credit
    may look at the whole completion, so a shaped reward is no function of the prefix, but its expectation is.
    noisy: that plus a fixed normal error of standard deviation 0.5 per prefix.  constant: the policy's mean reward.
    """
    if isinstance(critic, Tensor):
        return critic
    if critic == "zero":
        return torch.zeros_like(dense_MNL)
    if critic == "constant":
        return (p_MN * dense_MNL.sum(2)).sum(1)[:, None, None] * space.mask_NL
    to_go_MNL = dense_MNL.flip(2).cumsum(2).flip(2)
    exact_MNL = torch.stack([space.conditional(to_go_MNL[..., t], p_MN, t) for t in range(space.L)], dim=2)
    if critic == "exact":
        return exact_MNL
    generator = torch.Generator().manual_seed(seed)
    errors = [torch.randn(len(p_MN), space.V**t, generator=generator, dtype=p_MN.dtype) for t in range(space.L)]
    error_MNL = torch.stack([space.spread(error_Mp) for error_Mp in errors], dim=2)
    return exact_MNL + 0.5 * error_MNL * space.mask_NL


def advantages(
    space: Completions,
    p_MN: Tensor,
    dense_MNL: Tensor,
    critic: str | Tensor = "exact",
    lambda_: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """GAE with gamma = 1: A_t = sum_k lambda^k (r_{t+k} + V_{t+k+1} - V_{t+k}), V = 0 after the last action."""
    value_MNL = critic_values(space, p_MN, dense_MNL, critic, seed)
    next_MNL = torch.cat([value_MNL[..., 1:], torch.zeros_like(value_MNL[..., :1])], dim=2)
    delta_MNL = dense_MNL + next_MNL - value_MNL
    backwards = [delta_MNL[..., -1]]
    for t in range(space.L - 2, -1, -1):
        backwards.append(delta_MNL[..., t] + lambda_ * backwards[-1])
    return torch.stack(backwards[::-1], dim=2)


def expected_gradient(space: Completions, policy_MPV: Tensor, p_MN: Tensor, advantage_MNL: Tensor) -> Tensor:
    """E[sum_t A_t · d log pi(token t | prefix t) / d theta], (M, P, V); 0 behind an end, where there is no choice."""
    parts = []
    for t, policy_MpV in enumerate(space.levels(policy_MPV)):
        mass_MpV = space.by_prefix(p_MN * advantage_MNL[..., t], t + 1).unflatten(1, (-1, space.V))
        parts.append(mass_MpV - policy_MpV * mass_MpV.sum(2, keepdim=True))
    return torch.cat(parts, dim=1)


def true_gradient(space: Completions, policy_MPV: Tensor, p_MN: Tensor, reward_MN: Tensor) -> Tensor:
    """d E[r_C] / d theta: every choice is weighted by the whole reward (the policy gradient theorem); (M, P, V)."""
    return expected_gradient(space, policy_MPV, p_MN, reward_MN[..., None].expand(-1, -1, space.L))


def variance(space: Completions, policy_MPV: Tensor, p_MN: Tensor, advantage_MNL: Tensor, mean_MPV: Tensor) -> Tensor:
    """Trace of the covariance of one completion's estimate, (M,): E|g|² - |E g|².

    |g|² = sum_t A_t² |onehot(token t) - pi(. | prefix t)|²: the logits of different prefixes are different parameters.
    """
    second_M = 0.0
    for t, policy_MpV in enumerate(space.levels(policy_MPV)):
        square_MpV = 1.0 - 2.0 * policy_MpV + policy_MpV.square().sum(2, keepdim=True)
        square_MN = space.spread(square_MpV.flatten(1))
        second_M = second_M + (p_MN * advantage_MNL[..., t].square() * square_MN).sum(1)
    return second_M - mean_MPV.square().sum((1, 2))


def ascend(
    space: Completions,
    theta_MPV: Tensor,
    dense_MNL: Tensor,
    critic: str | Tensor = "exact",
    lambda_: float = 1.0,
    seed: int = 0,
    steps: int = STEPS,
) -> Tensor:
    """pi after ``steps`` natural gradient steps of length 1, (M, P, V); a critic by name follows the policy.

    theta[s,a] += g[s,a] / (P(s)·pi(a|s)), the expected advantage of the choice: for a softmax table the gradient in
    the Fisher metric. It differs from g by positive factors only, so it rests where g rests, but it is not held up
    for thousands of steps near policies that have almost stopped exploring, as the plain gradient is.
    """
    for _ in range(steps):
        policy_MPV = space.policy(theta_MPV)
        p_MN = space.probability(policy_MPV)
        advantage_MNL = advantages(space, p_MN, dense_MNL, critic, lambda_, seed)
        g_MPV = expected_gradient(space, policy_MPV, p_MN, advantage_MNL)
        mass_MP = torch.cat([space.by_prefix(p_MN, t) for t in range(space.L)], dim=1)
        theta_MPV = theta_MPV + g_MPV / (mass_MP[..., None] * policy_MPV).clamp_min(torch.finfo(torch.float64).tiny)
    return space.policy(theta_MPV)
