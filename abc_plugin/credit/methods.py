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

from torch import Tensor

from abc_plugin.credit.redistribute import last_action, response_weights, uniform_weights
from abc_plugin.errors import UserError

GROUP = "abc_plugin.reward_shaping"
NEEDS = ("attention", "prefix", "gradient", "policy", "policy_last")


@dataclass(frozen=True)
class Evidence:
    """What a method may look at, for one batch of responses; a field is None where the method does not need it.

    Entry t of an action axis belongs to the token of action t, position t + 1 of the sequence.
    """

    sequences_BS: Tensor
    action_mask_BA: Tensor
    attention_BA: Tensor | None = None  # reward model: of the score token on the action's token, >= 0
    prefix_BA: Tensor | None = None  # reward model: the score head read there; before the first action: the prompt's
    gradient_BA: Tensor | None = None  # reward model: gradient x input of the score on the token's embedding, signed
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
