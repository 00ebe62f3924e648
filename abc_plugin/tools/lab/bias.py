"""Each credit method, with each kind of evidence, beta and lambda, against the true gradient and the optimum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from abc_plugin.credit.methods import Method
from abc_plugin.tools.lab.mdp import Completions
from abc_plugin.tools.lab.policy_gradient import advantages, ascend, expected_gradient, true_gradient, variance
from abc_plugin.tools.lab.random_processes import KINDS, Tables, shaped


@dataclass(frozen=True)
class Case:
    """A method and the kind of evidence it is given; "" for a method that needs none."""

    name: str
    method: Method
    kind: str

    @property
    def label(self) -> str:
        """How rows and lines are called."""
        return f"{self.name}, {self.kind}" if self.kind else self.name


@dataclass(frozen=True)
class Row:
    """One setting; ``values`` has a number per reward model (M,) for each name in VALUES."""

    case: Case
    beta: float
    lambda_: float
    values: dict[str, Tensor]


VALUES = {
    "cosine": "between the gradient followed and the true one",
    "norm_ratio": "length of the gradient followed, over the true one's",
    "flips": "share of logits that it pushes against the true gradient",
    "variance": "trace of the covariance of one completion's estimate",
    "noise": "sqrt(variance) over the length of the gradient followed",
    "noise_no_critic": "the same where the value function is 0",
    "batch": "completions up to which a batch's mean is closer in angle to the true gradient than that of none",
    "gain": "reward that ascent gains, of what the best completion would gain",
    "best": "probability of the best completion after the ascent",
}


def cases(methods: dict[str, Method]) -> tuple[list[Case], list[str]]:
    """One case per method and kind of evidence, and the names of methods whose evidence the lab cannot make."""
    possible = {name: method for name, method in methods.items() if method.needs <= set(KINDS)}
    made = []
    for name, method in possible.items():
        kinds = dict.fromkeys(kind for need in sorted(method.needs) for kind in KINDS[need])
        made += [Case(name, method, kind) for kind in kinds or ("",)]
    return made, [name for name in methods if name not in possible]


def settings(made: list[Case], betas: list[float], lambdas: list[float]) -> list[tuple[Case, float, float]]:
    """What to compute; at beta = 0 every method is none, which therefore has this one beta and comes first."""
    none = [(case, 0.0) for case in made if case.name == "none"]
    others = [(case, beta) for case in made if case.name != "none" for beta in sorted(set(betas)) if beta > 0]
    return [(case, beta, lambda_) for case, beta in none + others for lambda_ in dict.fromkeys(lambdas)]


def measure(
    space: Completions, tables: Tables, wanted: list[tuple[Case, float, float]], critic: str, seed: int
) -> Iterator[Row]:
    """A row per setting, in their order; those of none come first, since others are compared with them."""
    policy_MPV = space.policy(tables.theta_MPV)
    p_MN = space.probability(policy_MPV)
    truth_MPV = true_gradient(space, policy_MPV, p_MN, tables.reward_MN)

    def estimate(dense_MNL: Tensor, critic: str, lambda_: float) -> tuple[Tensor, Tensor]:
        """The expected gradient (M, P, V) and the variance (M,) of one completion's estimate of it."""
        advantage_MNL = advantages(space, p_MN, dense_MNL, critic, lambda_, seed)
        g_MPV = expected_gradient(space, policy_MPV, p_MN, advantage_MNL)
        return g_MPV, variance(space, policy_MPV, p_MN, advantage_MNL, g_MPV).clamp_min(0.0)

    reached: dict[tuple, dict[str, Tensor]] = {}
    noise_of_none: dict[float, Tensor] = {}
    for case, beta, lambda_ in wanted:
        dense_MNL = shaped(space, tables, case.method, case.kind, beta)
        g_MPV, variance_M = estimate(dense_MNL, critic, lambda_)
        plain_MPV, plain_M = estimate(dense_MNL, "zero", lambda_)
        values = against_truth(g_MPV, truth_MPV) | {"variance": variance_M}
        values["noise"] = variance_M.sqrt() / _norm(g_MPV)
        values["noise_no_critic"] = plain_M.sqrt() / _norm(plain_MPV)
        if case.name == "none":
            noise_of_none[lambda_] = values["noise"]
        values["batch"] = batch_up_to(values["cosine"], values["noise"], noise_of_none[lambda_])
        # An exact critic leaves lambda no influence on the expectation (README), so one ascent serves all of them.
        ascent_lambda = 1.0 if critic == "exact" else lambda_
        key = (case.label, beta, ascent_lambda)
        if key not in reached:
            end_MPV = ascend(space, tables.theta_MPV, dense_MNL, critic, ascent_lambda, seed)
            reached[key] = _reached(space, tables, p_MN, end_MPV)
        yield Row(case, beta, lambda_, values | reached[key])


def _norm(g_MPV: Tensor) -> Tensor:
    return g_MPV.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)


def against_truth(g_MPV: Tensor, truth_MPV: Tensor) -> dict[str, Tensor]:
    """Cosine, ratio of norms, and the share of logits (of those the true gradient moves) that are pushed back."""
    cosine_M = (g_MPV * truth_MPV).sum((1, 2)) / (_norm(g_MPV) * _norm(truth_MPV))
    moved_MPV, pushed_MPV = (x.abs() > 1e-9 * x.abs().amax((1, 2), keepdim=True) for x in (truth_MPV, g_MPV))
    flipped_MPV = moved_MPV & pushed_MPV & (g_MPV * truth_MPV < 0)
    flips_M = flipped_MPV.sum((1, 2)) / moved_MPV.sum((1, 2))
    return {"cosine": cosine_M, "norm_ratio": _norm(g_MPV) / _norm(truth_MPV), "flips": flips_M.double()}


def batch_up_to(cosine_M: Tensor, noise_M: Tensor, none_M: Tensor) -> Tensor:
    """Completions n per batch up to which this estimate is better aligned with the true gradient than that of none.

    With |g| = 1 a batch's mean has the squared alignment cos² / (1 + noise² / n); that of none 1 / (1 + none² / n).
    They are equal at n = (cos²·none² - noise²) / (1 - cos²). 0 where that is negative or the two are the same.
    """
    square_M = cosine_M.clamp_min(0.0).square()
    ahead_M, bias_M = square_M * none_M.square() - noise_M.square(), 1.0 - square_M
    ahead_M = torch.where(ahead_M > 1e-6 * none_M.square(), ahead_M, 0.0)
    return torch.where(bias_M > 1e-9, ahead_M / bias_M, torch.where(ahead_M > 0, torch.inf, 0.0))


def _reached(space: Completions, tables: Tables, start_MN: Tensor, policy_MPV: Tensor) -> dict[str, Tensor]:
    p_MN, reward_MN = space.probability(policy_MPV), tables.reward_MN
    best_M = reward_MN.masked_fill(~space.possible_N, -torch.inf).amax(1)
    start_M, end_M = ((p * reward_MN).sum(1) for p in (start_MN, p_MN))
    is_best_MN = reward_MN == best_M[:, None]
    return {"gain": (end_M - start_M) / (best_M - start_M), "best": (p_MN * is_best_MN).sum(1)}
