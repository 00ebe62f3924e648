"""Random decision processes: rewards, policies, and the evidence that credit methods are given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from abc_plugin.credit.methods import Evidence, Method
from abc_plugin.credit.redistribute import last_action
from abc_plugin.credit.shaping import shape
from abc_plugin.tools.lab.mdp import Completions

GRID = 2.0**-16  # rewards and scores lie on it: the shipped fp32 functions add and subtract them without rounding

# Evidence the lab makes; the kinds of each, the plainest first. What is not listed here (another method's own need)
# cannot be made, and its methods are skipped by name.
KINDS = {
    "attention": ("random", "aligned"),
    "gradient": ("random", "aligned"),
    "prefix": ("random", "ideal"),
    "policy": ("random",),
    "policy_last": ("random",),
}


@dataclass(frozen=True)
class Tables:
    """reward_MN: r_C.  theta_MPV: the policy's logits.  evidence_MNL: by (field, kind), see ``draw``; of the string's
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
    gradient: random: normal; aligned: leave-one-out, signed.
    prefix: random: normal plus ``offset`` per prefix; ideal: E[r_C | prefix] under the policy theta; both with the
    empty prefix, the prompt's own score, in front, and r_C at the last action.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    reward_MN = _rewards(space, normal, models, rewards, offset)
    theta_MPV = 0.5 * normal(models, space.prefixes, space.V)
    effect_MNL = leave_one_out(space, reward_MN)
    shape = (models, space.N, space.L)
    last_NL = last_action(space.mask_NL).bool()
    evidence = {("attention", "random"): normal(*shape).softmax(2), ("attention", "aligned"): effect_MNL.abs()}
    evidence |= {("gradient", "random"): normal(*shape), ("gradient", "aligned"): effect_MNL}
    for name in ("policy", "policy_last"):
        evidence[name, "random"] = normal(*shape)[:, space.before_last_N].softmax(2) * ~last_NL
    levels = [space.spread(normal(models, space.V**t) + offset) for t in (*range(1, space.L + 1), 0)]
    p_MN = space.probability(space.policy(theta_MPV))
    ideal = [space.conditional(reward_MN, p_MN, t) for t in range(space.L + 1)]
    for kind, scores in (("random", [levels[-1], *levels[:-1]]), ("ideal", ideal)):
        score_MNT = torch.where(pad(last_NL, (1, 0)), reward_MN[..., None], torch.stack(scores, dim=2))
        evidence["prefix", kind] = _on_grid(score_MNT)
    return Tables(reward_MN, theta_MPV, evidence)


def _rewards(space: Completions, normal, models: int, rewards: str, offset: float) -> Tensor:
    if rewards == "table":
        reward_MN = normal(models, space.N)[:, space.canonical_N]
    else:
        value_MLV = normal(models, space.L, space.V)
        picked_MNL = value_MLV[:, torch.arange(space.L), space.tokens_NL]
        reward_MN = (picked_MNL * space.mask_NL).sum(2)
    possible = reward_MN[:, space.possible_N]
    reward_MN = (reward_MN - possible.mean(1, keepdim=True)) / possible.std(1, keepdim=True)
    return _on_grid(reward_MN + offset)


def _on_grid(x: Tensor) -> Tensor:
    return (x / GRID).round() * GRID


def leave_one_out(space: Completions, reward_MN: Tensor) -> Tensor:
    """r_C minus its mean over all tokens in this place, the others kept; (M, N, L): what attention should know."""
    found = []
    for t in range(space.L):
        split = reward_MN.unflatten(1, (space.V**t, space.V, -1))
        found.append((split - split.mean(2, keepdim=True)).flatten(1))
    return torch.stack(found, dim=2)


def shaped(space: Completions, tables: Tables, method: Method, kind: str, beta: float) -> Tensor:
    """The per-token rewards that the shipped credit.shaping makes of every completion; float64 (M, N, L)."""
    models, actions = len(tables.reward_MN), space.L + 1
    rows = [x.repeat(models, 1) for x in (space.sequences_NS, pad(space.mask_NL, (1, 0)))]
    fields = {}
    for name in method.needs:
        value_BA = tables.evidence_MNL[name, _kind(name, kind)].flatten(0, 1)
        fields[f"{name}_BA"] = pad(value_BA, (actions - value_BA.shape[1], 0))
    dense_BA = shape(method, [Evidence(*rows, **fields)], tables.reward_MN.flatten(), beta=beta).reward_BA
    return dense_BA[:, 1:].double().unflatten(0, (models, space.N))


def _kind(name: str, kind: str) -> str:
    return kind if kind in KINDS[name] else KINDS[name][0]
