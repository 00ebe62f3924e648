"""Each credit method, with each kind of evidence, beta and lambda, against the true gradient and the optimum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from abc_plugin.credit.methods import Method
from abc_plugin.tools.lab.mdp import Completions
from abc_plugin.tools.lab.policy_gradient import advantages, ascend, expected_gradient, true_gradient, variance
from abc_plugin.tools.lab.random_processes import KINDS, Tables, prefix_critic, shaped


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
    """One setting; ``values`` has a number per reward model (M,) by name; ``findings_text.COLUMNS`` explains them."""

    case: Case
    beta: float
    lambda_: float
    values: dict[str, Tensor]


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
    """A row per setting, in their order."""
    policy_MPV = space.policy(tables.theta_MPV)
    p_MN = space.probability(policy_MPV)
    truth_MPV = true_gradient(space, policy_MPV, p_MN, tables.reward_MN)

    def estimate(dense_MNL: Tensor, values: str | Tensor, lambda_: float) -> tuple[Tensor, Tensor]:
        """The expected gradient (M, P, V) and the noise (M,) of one completion's estimate of it."""
        advantage_MNL = advantages(space, p_MN, dense_MNL, values, lambda_, seed)
        g_MPV = expected_gradient(space, policy_MPV, p_MN, advantage_MNL)
        variance_M = variance(space, policy_MPV, p_MN, advantage_MNL, g_MPV).clamp_min(0.0)
        return g_MPV, variance_M.sqrt() / _norm(g_MPV)

    reached: dict[tuple, dict[str, Tensor]] = {}
    for case, beta, lambda_ in wanted:
        # The prefix critic is of the reward model that pays: of the same scores where the credit is made of scores.
        kind = case.kind if "prefix" in case.method.needs else "ideal"
        baseline = prefix_critic(space, tables, kind) if critic == "prefix" else critic
        dense_MNL = shaped(space, tables, case.method, case.kind, beta)
        g_MPV, noise_M = estimate(dense_MNL, baseline, lambda_)
        noise = {"noise": noise_M, "noise_no_critic": estimate(dense_MNL, "zero", lambda_)[1]}
        # An exact critic leaves lambda no influence on the expectation (README), so one ascent serves all of them.
        ascent_lambda = 1.0 if critic == "exact" else lambda_
        key = (case.label, beta, ascent_lambda)
        if key not in reached:
            end_MPV = ascend(space, tables.theta_MPV, dense_MNL, baseline, ascent_lambda, seed)
            reached[key] = _reached(space, tables, p_MN, end_MPV)
        yield Row(case, beta, lambda_, against_truth(g_MPV, truth_MPV) | noise | reached[key])


def _norm(g_MPV: Tensor) -> Tensor:
    return g_MPV.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)


def against_truth(g_MPV: Tensor, truth_MPV: Tensor) -> dict[str, Tensor]:
    """Cosine, ratio of norms, and the share of logits (of those the true gradient moves) that are pushed back."""
    cosine_M = (g_MPV * truth_MPV).sum((1, 2)) / (_norm(g_MPV) * _norm(truth_MPV))
    moved_MPV, pushed_MPV = (x.abs() > 1e-9 * x.abs().amax((1, 2), keepdim=True) for x in (truth_MPV, g_MPV))
    flipped_MPV = moved_MPV & pushed_MPV & (g_MPV * truth_MPV < 0)
    flips_M = flipped_MPV.sum((1, 2)) / moved_MPV.sum((1, 2))
    return {"cosine": cosine_M, "norm_ratio": _norm(g_MPV) / _norm(truth_MPV), "flips": flips_M.double()}


def _reached(space: Completions, tables: Tables, start_MN: Tensor, policy_MPV: Tensor) -> dict[str, Tensor]:
    p_MN, reward_MN = space.probability(policy_MPV), tables.reward_MN
    best_M = reward_MN.masked_fill(~space.possible_N, -torch.inf).amax(1)
    start_M, end_M = ((p * reward_MN).sum(1) for p in (start_MN, p_MN))
    is_best_MN = reward_MN == best_M[:, None]
    return {"gain": (end_M - start_M) / (best_M - start_M), "best": (p_MN * is_best_MN).sum(1)}
