"""The registry behind ``--reward_shaping``, filled from the entry-point group ``abc_plugin.reward_shaping``.

A method is one object:

    needs: frozenset[str]                        # names of NEEDS: what the models must be asked for
    credit(evidence, reward_B) -> (B, A)         # fp32, reward units, rows sum to reward_B, 0 off the actions
    weights(evidence) -> (B, A), or None         # of methods made by ``share``: credit = reward · weights

A package adds one by declaring, e.g. in its setup.py,
``entry_points={"abc_plugin.reward_shaping": ["mine = my_package.my_module:METHOD"]}``; ``METHOD = share(function)``
is enough for a method that gives every token a share of the reward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch
from torch import Tensor
from torch.nn.functional import pad

from abc_plugin.config import ShapingConfig
from abc_plugin.credit.redistribute import last_action, response_weights, uniform_weights
from abc_plugin.errors import UserError

GROUP = "abc_plugin.reward_shaping"
NEEDS = ("attention", "prefix", "gradient", "contribution", "shapley", "policy", "policy_last")
POLICY = frozenset({"policy", "policy_last"})  # the needs that the policy's worker answers
SCORE_UNITS = frozenset(
    {"prefix", "contribution", "shapley"}
)  # the needs whose evidence, and credit, is a part of the score


@dataclass(frozen=True)
class Evidence:
    """What a method may look at, for one batch of responses; a field is None where the method does not need it.

    Entry t of an action axis belongs to the token of action t, position t + 1 of the sequence.
    """

    sequences_BS: Tensor
    action_mask_BA: Tensor
    attention_BA: Tensor | None = None  # reward model: of the score token on the action's token, >= 0
    prefix_BA: Tensor | None = None  # reward model: the score head read at the token
    gradient_BA: Tensor | None = None  # reward model: gradient x input of the score on the token's embedding, signed
    contribution_BA: Tensor | None = None  # reward model: what the token adds to the score in its last layer, signed
    shapley_BA: Tensor | None = None  # reward model: Shapley value of the segment that the token ends, signed
    policy_BA: Tensor | None = None  # policy: attention on the action's token, mean over the generation's rows, >= 0
    policy_last_BA: Tensor | None = None  # policy: of the step that chose the last token, >= 0


@dataclass(frozen=True)
class Method:
    """A credit method; see the module's text for the contract."""

    needs: frozenset[str]
    credit: Callable[[Evidence, Tensor], Tensor]
    weights: Callable[[Evidence], Tensor] | None = None


def share(weights: Callable[[Evidence], Tensor], *needs: str) -> Method:
    """The method credit[b,t] = reward[b]·weights[b,t]; weights >= 0, rows sum to 1, 0 off the actions."""
    return Method(frozenset(needs), lambda evidence, reward_B: reward_B.float()[:, None] * weights(evidence), weights)


NONE = share(lambda evidence: last_action(evidence.action_mask_BA))
UNIFORM = share(lambda evidence: uniform_weights(evidence.action_mask_BA))
ABC = share(lambda evidence: response_weights(evidence.attention_BA, evidence.action_mask_BA), "attention")

# Of the policy's own attention while it generated (paper, appendix B): ABC-D averages over the steps that could see
# the token, ABC-D2 takes the step that chose the last token; no step sees that token, so its credit is 0. As in the
# authors' code (XanderJC/attention-based-credit, get_generator_attention_distribution), except that there the whole
# distribution is one token late: the attention on a token credits the one after it.
ABC_D = share(lambda evidence: response_weights(evidence.policy_BA, evidence.action_mask_BA), "policy")
ABC_D2 = share(lambda evidence: response_weights(evidence.policy_last_BA, evidence.action_mask_BA), "policy_last")


def prefix_credit(evidence: Evidence, reward_B: Tensor) -> Tensor:
    """Differences of the score of the prefix, (B, A) fp32, reward units, signed.

        credit[b,t] = phi[b,t] - phi[b,u]                t not the last action;  u the action before t
        credit[b,t] = reward[b] - phi[b,u]               t the last action
        phi[b,u] = 0                                     where no action is before t

    phi = evidence.prefix_BA, the score head read at the action's token. So the first action is paid what the prompt
    scores by itself, too, which no action earned: paid at the end, it would be noise in the return of every action.
    Rows sum to reward[b] whatever the units of phi are. phi is a function of what the policy has seen when it acts
    next, so the policy gradient at gamma = lambda = 1 is that of the sparse reward: credit is potential-based shaping
    (Ng et al. 1999; Chan et al. 2024, section 3, with a potential that is one; RED, arXiv 2411.08302).
    phi and reward differ in units where the host subtracts a baseline or clips: the last action then carries the
    difference, which lies on it in the sparse reward, too.
    After the environment's turn, the next action's difference includes what that turn did to the score.
    """
    mask_BA = evidence.action_mask_BA.bool()
    phi_BA, reward_B1 = evidence.prefix_BA.double(), reward_B.double()[:, None]
    index_A = torch.arange(mask_BA.shape[1], device=mask_BA.device)
    acted_BA = torch.where(mask_BA, index_A, -1).cummax(1).values  # the last action up to and with t
    before_BA = pad(acted_BA[:, :-1], (1, 0), value=-1)
    held_BA = torch.where(before_BA >= 0, phi_BA.gather(1, before_BA.clamp_min(0)), 0.0)
    reached_BA = torch.where(last_action(mask_BA).bool(), reward_B1, phi_BA)
    return torch.where(mask_BA, reached_BA - held_BA, 0.0).float()


PREFIX = Method(frozenset({"prefix"}), prefix_credit)


def gradient_credit(evidence: Evidence, reward_B: Tensor) -> Tensor:
    """The reward's size spread by attribution, and what that leaves of the reward spread evenly, (B, A) fp32, signed.

        a[b,t] = gradient[b,t] / sum_u |gradient[b,u]|                      0 where all of a row's gradient is 0
        credit[b,t] = |reward[b]|·a[b,t] + (reward[b] - |reward[b]|·sum_u a[b,u]) / (number of actions)

    Divides by the sum of absolute values, never by that of signed ones, which may be near 0: |credit| is at most
    |reward|·(1 + 2 / actions). A token that raised the score gets more than the even share, also where the reward is
    negative. Rows sum to reward[b]; multiplying the reward by a positive number multiplies the credit.
    """
    mask_BA = evidence.action_mask_BA.bool()
    reward_B1 = reward_B.double()[:, None]
    gradient_BA = evidence.gradient_BA.double() * mask_BA
    size_B1 = gradient_BA.abs().sum(1, keepdim=True)
    usable_B1 = size_B1 > torch.finfo(torch.float32).tiny
    part_BA = torch.where(usable_B1, reward_B1.abs() * gradient_BA / size_B1.where(usable_B1, 1.0), 0.0)
    rest_B1 = reward_B1 - part_BA.sum(1, keepdim=True)
    return ((part_BA + rest_B1 / mask_BA.sum(1, keepdim=True).clamp_min(1)) * mask_BA).float()


GRAD_INPUT = Method(frozenset({"gradient"}), gradient_credit)


def part_credit(part_BA: Tensor, action_mask_BA: Tensor, reward_B: Tensor) -> Tensor:
    """Each token's part of the score, the rest of the reward on the last action, (B, A) fp32, reward units, signed.

        credit[b,t] = part[b,t]                                             t not the last action
        credit[b,t] = reward[b] - sum_u credit[b,u]                         t the last action, u all others

    What the actions before it do not explain lies on the last action: the prompt's share, what the parts leave out
    (of contributions the residual path), and the difference in units where the host subtracts a baseline or clips.
    Rows sum to reward[b].
    """
    last_BA = last_action(action_mask_BA).bool()
    earlier_BA = action_mask_BA.bool() & ~last_BA
    credit_BA = torch.where(earlier_BA, part_BA.double(), 0.0)
    rest_B1 = reward_B.double()[:, None] - credit_BA.sum(1, keepdim=True)
    return torch.where(last_BA, rest_B1, credit_BA).float()


def part(need: str) -> Method:
    """The method whose credit is ``part_credit`` of the evidence of one need."""

    def credit(evidence: Evidence, reward_B: Tensor) -> Tensor:
        return part_credit(getattr(evidence, f"{need}_BA"), evidence.action_mask_BA, reward_B)

    return Method(frozenset({need}), credit)


# What each token adds to the score through the last layer's attention, in a run times the batch's ``shaping.slope``.
ABC_SIGNED = part("contribution")
SHAPLEY = part("shapley")  # the mean of what its segment adds to the score of parts of the response


def available() -> list[str]:
    """Names of the registered methods, sorted."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def load(name: str) -> Method:
    """The method registered under ``name``.

    Raises UserError when the name is unknown, registered by two packages, or its object does not meet the contract.
    """
    points = {point.value: point for point in entry_points(group=GROUP, name=name)}
    if not points:
        known = ", ".join(available()) or "none at all: install the plugin first (pip install -e .)"
        raise UserError(f"--reward_shaping {name!r} is not registered; registered: {known}")
    if len(points) > 1:
        raise UserError(f"--reward_shaping {name!r} is registered twice: {' and '.join(sorted(points))}; remove one")
    [point] = points.values()
    method = point.load()
    if not hasattr(method, "needs") or not callable(getattr(method, "credit", None)):
        raise UserError(f"{point.value} (--reward_shaping {name}) lacks needs or credit(evidence, reward_B)")
    if unknown := set(method.needs) - set(NEEDS):
        raise UserError(f"{point.value} (--reward_shaping {name}) needs {min(unknown)!r}, none of {', '.join(NEEDS)}")
    return Method(frozenset(method.needs), method.credit, getattr(method, "weights", None))


def policy_need(shaping: ShapingConfig) -> str | None:
    """Which of POLICY the method needs; None where it needs neither or no reward moves.

    Raises UserError for a method that needs both: one forward of the policy gives one.
    """
    needs = sorted(load(shaping.method).needs & POLICY) if shaping.dense else []
    if len(needs) > 1:
        raise UserError(f"--reward_shaping {shaping.method} needs {' and '.join(needs)} at once; let it need one")
    return needs[0] if needs else None
