"""What an actor-critic follows in expectation, and how noisy one completion's estimate of it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from abc_plugin.tools.lab.mdp import Completions


def exact_values(space: Completions, dense_MNL: Tensor, p_MN: Tensor) -> Tensor:
    """V(s_t) = E[sum of the shaped rewards from t on | s_t], what a perfect critic of this policy learns; (M, N, L).

    Credit may look at the whole completion, so a shaped reward is no function of the prefix; its expectation is.
    """
    to_go_MNL = dense_MNL.flip(2).cumsum(2).flip(2)
    return torch.stack([space.conditional(to_go_MNL[..., t], p_MN, t) for t in range(space.L)], dim=2)


def _zero(space: Completions, dense_MNL: Tensor, p_MN: Tensor, seed: int) -> Tensor:
    return torch.zeros_like(dense_MNL)


def _constant(space: Completions, dense_MNL: Tensor, p_MN: Tensor, seed: int) -> Tensor:
    return (p_MN * dense_MNL.sum(2)).sum(1)[:, None, None] * space.mask_NL


def _exact(space: Completions, dense_MNL: Tensor, p_MN: Tensor, seed: int) -> Tensor:
    return exact_values(space, dense_MNL, p_MN)


def _noisy(space: Completions, dense_MNL: Tensor, p_MN: Tensor, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    errors = [torch.randn(len(p_MN), space.V**t, generator=draw, dtype=p_MN.dtype) for t in range(space.L)]
    error_MNL = torch.stack([space.spread(error_Mp) for error_Mp in errors], dim=2)
    return exact_values(space, dense_MNL, p_MN) + 0.5 * error_MNL * space.mask_NL


CRITICS: dict[str, Callable[[Completions, Tensor, Tensor, int], Tensor]] = {
    "exact": _exact,  # the perfect critic of the shaped reward under the current policy
    "noisy": _noisy,  # that, plus a fixed normal error of standard deviation 0.5 per prefix
    "constant": _constant,  # the policy's mean reward everywhere: a baseline without a critic
    "zero": _zero,
}


def advantages(dense_MNL: Tensor, value_MNL: Tensor, lambda_: float) -> Tensor:
    """GAE with gamma = 1: A_t = sum_k lambda^k (r_{t+k} + V_{t+k+1} - V_{t+k}), V = 0 after the last action."""
    next_MNL = torch.cat([value_MNL[..., 1:], torch.zeros_like(value_MNL[..., :1])], dim=2)
    delta_MNL = dense_MNL + next_MNL - value_MNL
    found = [delta_MNL[..., -1]]
    for t in range(dense_MNL.shape[2] - 2, -1, -1):
        found.append(delta_MNL[..., t] + lambda_ * found[-1])
    return torch.stack(found[::-1], dim=2)


def expected_gradient(space: Completions, policy_MPV: Tensor, p_MN: Tensor, advantage_MNL: Tensor) -> Tensor:
    """E[sum_t A_t · d log pi(token t | prefix t) / d theta], (M, P, V); 0 behind an end, where there is no choice."""
    found = []
    for t, policy_MpV in enumerate(space.levels(policy_MPV)):
        mass_MpV = space.by_prefix(p_MN * advantage_MNL[..., t], t + 1).unflatten(1, (-1, space.V))
        found.append(mass_MpV - policy_MpV * mass_MpV.sum(2, keepdim=True))
    return torch.cat(found, dim=1)


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
