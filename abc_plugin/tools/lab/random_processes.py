"""Decision processes: rewards, policies, and the evidence that credit methods are given; one by hand, many random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from abc_plugin.credit.methods import ABC, Evidence, Method
from abc_plugin.credit.redistribute import last_action
from abc_plugin.credit.shaping import shape
from abc_plugin.tools.lab.mdp import Completions
from abc_plugin.tools.lab.policy_gradient import advantages, expected_gradient

GRID = 2.0**-16  # rewards and scores lie on it: the shipped fp32 functions add and subtract them without rounding

# Evidence the lab makes; the kinds of each, the plainest first. What is not listed here (another method's own need)
# cannot be made, and its methods are skipped by name.
KINDS = {
    "attention": ("random", "aligned"),
    "gradient": ("random", "aligned"),
    "contribution": ("random", "aligned", "exact"),
    "shapley": ("exact",),
    "prefix": ("random", "ideal"),
    "policy": ("random",),
    "policy_last": ("random",),
}

EXAMPLE_BETAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
EXAMPLE = (
    "Two tokens, each 0 or 1 with probability 1/2; r = 1 if the second is 1, else 0.5; attention on the first token: "
    "0.9 if the second is 1, else 0. The true gradient on the second token's logit is +0.125; with abc it is "
    "0.25·(0.5 - 0.9·beta), so from beta = 0.56 on the policy learns the worse token."
)


@dataclass(frozen=True)
class Tables:
    """reward_MN: r_C.  theta_MPV: the policy's logits.  evidence_MNL: by (field, kind), see ``draw``; for the string's
    tokens, or (M, N, L + 1) with the prompt's last token in front."""

    reward_MN: Tensor
    theta_MPV: Tensor
    evidence_MNL: dict[tuple[str, str], Tensor]


def draw(space: Completions, models: int, seed: int, *, rewards: str = "table", offset: float = 0.0) -> Tables:
    """Random tables of ``models`` reward models.

    reward: independent standard normal per completion (``table``), or the sum over positions of a normal value per
    (position, token) (``sum``); then standardised per model over the completions, plus ``offset``.
    theta: normal with standard deviation 0.5.
    attention: random: softmax of normal logits per completion; aligned: |leave-one-out|.
    policy, policy_last: random: softmax of normal logits, 0 on the last token, which no step of the policy sees.
    gradient, contribution: random: normal, contribution divided by sqrt(L); aligned: leave-one-out, signed.
    contribution, shapley: exact: ``shapley``.
    prefix: random: normal plus ``offset`` per prefix; ideal: E[r_C | prefix] under the policy theta; both with the
    empty prefix, the prompt's own score, in front, and r_C at the last action.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if rewards == "table":
        reward_MN = normal(models, space.N)[:, space.canonical_N]
    else:
        value_MLV = normal(models, space.L, space.V)
        reward_MN = (value_MLV[:, torch.arange(space.L), space.tokens_NL] * space.mask_NL).sum(2)
    possible = reward_MN[:, space.possible_N]
    reward_MN = (reward_MN - possible.mean(1, keepdim=True)) / possible.std(1, keepdim=True)
    reward_MN = _on_grid(reward_MN + offset)

    theta_MPV = 0.5 * normal(models, space.prefixes, space.V)
    effect_MNL = leave_one_out(space, reward_MN)
    shape_MNL = (models, space.N, space.L)
    last_NL = last_action(space.mask_NL).bool()
    evidence = {("attention", "random"): normal(*shape_MNL).softmax(2), ("attention", "aligned"): effect_MNL.abs()}
    evidence |= {("gradient", "random"): normal(*shape_MNL), ("gradient", "aligned"): effect_MNL}
    evidence["contribution", "random"] = evidence["gradient", "random"] / space.L**0.5
    evidence["contribution", "aligned"] = effect_MNL
    evidence["contribution", "exact"] = evidence["shapley", "exact"] = shapley(space, reward_MN)
    for name in ("policy", "policy_last"):
        evidence[name, "random"] = normal(*shape_MNL)[:, space.before_last_N].softmax(2) * ~last_NL
    levels = [space.spread(normal(models, space.V**t) + offset) for t in (*range(1, space.L + 1), 0)]
    p_MN = space.probability(space.policy(theta_MPV))
    ideal = [space.conditional(reward_MN, p_MN, t) for t in range(space.L + 1)]
    for kind, scores in (("random", [levels[-1], *levels[:-1]]), ("ideal", ideal)):
        score_MNT = torch.where(pad(last_NL, (1, 0)), reward_MN[..., None], torch.stack(scores, dim=2))
        evidence["prefix", kind] = _on_grid(score_MNT)
    return Tables(reward_MN, theta_MPV, evidence)


def prefix_critic(space: Completions, tables: Tables, kind: str = "ideal") -> Tensor:
    """V(s_t) = phi(t), the reward model's score of the first t tokens, (M, N, L): the host's critic in its first step.

    It is a copy of the reward model, head included, unless the run names another model for it.
    """
    return tables.evidence_MNL["prefix", kind][..., : space.L] * space.mask_NL


def _on_grid(x: Tensor) -> Tensor:
    return (x / GRID).round() * GRID


def effect(space: Completions, x_MN: Tensor, t: int) -> Tensor:
    """x minus its mean over all tokens at position t, the others kept; (M, N)."""
    split = x_MN.unflatten(1, (space.V**t, space.V, -1))
    return (split - split.mean(2, keepdim=True)).flatten(1)


def leave_one_out(space: Completions, reward_MN: Tensor) -> Tensor:
    """The effect of each position on r_C, (M, N, L): what attention should know.

    Its sum is r_C - mean r_C where rewards are sums over tokens; up to L times that where all tokens interact.
    """
    return torch.stack([effect(space, reward_MN, t) for t in range(space.L)], dim=2)


def shapley(space: Completions, reward_MN: Tensor) -> Tensor:
    """Shapley values of the positions, tokens left out being uniform, (M, N, L); their sum is r_C - mean r_C.

        value_t = integral over q from 0 to 1 of the mean effect of t where each other token stays with probability q

    (Owen 1972). A polynomial in q of degree L - 1, so that ceil(L / 2) points of Gauss and Legendre are exact.
    """
    value_MNL = torch.zeros(*reward_MN.shape, space.L, dtype=reward_MN.dtype)
    for point, weight in zip(*np.polynomial.legendre.leggauss((space.L + 1) // 2), strict=True):
        for t in range(space.L):
            x_MN = effect(space, reward_MN, t)
            for other in set(range(space.L)) - {t}:
                x_MN = x_MN - (1 - point) / 2 * effect(space, x_MN, other)
            value_MNL[..., t] += weight / 2 * x_MN
    return value_MNL


def shaped(space: Completions, tables: Tables, method: Method, kind: str, beta: float) -> Tensor:
    """The per-token rewards that the shipped credit.shaping makes of every completion; float64 (M, N, L)."""
    models, actions = len(tables.reward_MN), space.L + 1
    rows = [x.repeat(models, 1) for x in (space.sequences_NS, pad(space.mask_NL, (1, 0)))]
    fields = {}
    for name in method.needs:
        value_BA = tables.evidence_MNL[name, kind if kind in KINDS[name] else KINDS[name][0]].flatten(0, 1)
        if name == "prefix":  # there is one prompt: its score is a constant, which no action earns
            value_BA = value_BA - value_BA[:, :1]
        fields[f"{name}_BA"] = pad(value_BA, (actions - value_BA.shape[1], 0))
    dense_BA = shape(method, [Evidence(*rows, **fields)], tables.reward_MN.flatten(), beta=beta).reward_BA
    return dense_BA[:, 1:].double().unflatten(0, (models, space.N))


def paper_example(betas: tuple[float, ...] = EXAMPLE_BETAS) -> dict[float, float]:
    """beta: the expected gradient on the logit of "second token = 1", under ABC with an exact critic; see EXAMPLE."""
    space = Completions(2, 2)
    one_N = space.tokens_NL[:, 1] == 1
    first_N = torch.where(one_N, 0.9, 0.0).double()
    attention_MNL = torch.stack([first_N, 1.0 - first_N], dim=1)[None]
    theta_MPV = torch.zeros(1, space.prefixes, 2, dtype=torch.float64)
    tables = Tables(torch.where(one_N, 1.0, 0.5).double()[None], theta_MPV, {("attention", "random"): attention_MNL})
    policy_MPV = space.policy(theta_MPV)
    p_MN = space.probability(policy_MPV)
    gradients = {}
    for beta in betas:
        advantage_MNL = advantages(space, p_MN, shaped(space, tables, ABC, "random", beta))
        g_MPV = expected_gradient(space, policy_MPV, p_MN, advantage_MNL)
        gradients[beta] = float(space.levels(g_MPV)[1][0, :, 1].sum())  # one logit, whatever the first token was
    return gradients
