"""The smallest case in which attention credit turns a gradient around: two tokens of two values, by hand."""

from __future__ import annotations

import torch

from abc_plugin.credit.methods import ABC
from abc_plugin.tools.lab.gradient import advantages, exact_values, expected_gradient
from abc_plugin.tools.lab.mdp import Completions
from abc_plugin.tools.lab.tables import Tables, shaped

BETAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
TEXT = (
    "Two tokens, each 0 or 1 with probability 1/2; r = 1 if the second is 1, else 0.5; attention on the first token: "
    "0.9 if the second is 1, else 0. The true gradient on the second token's logit is +0.125; with abc it is "
    "0.25·(0.5 - 0.9·beta), so from beta = 0.56 on the policy learns the worse token."
)


def paper_example(betas: tuple[float, ...] = BETAS) -> dict[float, float]:
    """beta: the expected policy gradient on the logit of "second token = 1", under ABC with an exact critic."""
    space = Completions(2, 2)
    one_N = space.tokens_NL[:, 1] == 1
    reward_MN = torch.where(one_N, 1.0, 0.5).double()[None]
    first_N = torch.where(one_N, 0.9, 0.0).double()
    attention_MNL = torch.stack([first_N, 1.0 - first_N], dim=1)[None]
    theta_MPV = torch.zeros(1, space.prefixes, 2, dtype=torch.float64)
    tables = Tables(reward_MN, theta_MPV, {("attention", "random"): attention_MNL})
    policy_MPV = space.policy(theta_MPV)
    p_MN = space.probability(policy_MPV)
    found = {}
    for beta in betas:
        dense_MNL = shaped(space, tables, ABC, "random", beta)
        advantage_MNL = advantages(dense_MNL, exact_values(space, dense_MNL, p_MN), 1.0)
        g_MPV = expected_gradient(space, policy_MPV, p_MN, advantage_MNL)
        found[beta] = float(space.levels(g_MPV)[1][0, :, 1].sum())  # one logit, whatever the first token was
    return found
