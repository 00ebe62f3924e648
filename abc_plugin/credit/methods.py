"""The registry behind ``--reward_shaping``, filled from the entry-point group ``abc_plugin.reward_shaping``.

A method is one object with two members:

    needs_attention: bool              # ask the reward model for its attention row
    weights(evidence) -> (B, A)        # fp32, rows sum to 1, 0 off the actions

A package adds one by declaring, e.g. in its setup.py,
``entry_points={"abc_plugin.reward_shaping": ["mine = my_package.my_module:METHOD"]}``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

from torch import Tensor

from abc_plugin.credit.redistribute import last_action, response_weights, uniform_weights
from abc_plugin.errors import UserError

GROUP = "abc_plugin.reward_shaping"


@dataclass(frozen=True)
class Evidence:
    """What a method may look at, for one batch of responses."""

    sequences_BS: Tensor
    action_mask_BA: Tensor
    attention_BA: Tensor | None = None  # attention of the score token on the token of each action; None if not needed


@dataclass(frozen=True)
class Method:
    """A credit method; see the module's text for the contract."""

    needs_attention: bool
    weights: Callable[[Evidence], Tensor]


NONE = Method(False, lambda evidence: last_action(evidence.action_mask_BA))
UNIFORM = Method(False, lambda evidence: uniform_weights(evidence.action_mask_BA))
ABC = Method(True, lambda evidence: response_weights(evidence.attention_BA, evidence.action_mask_BA))


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
    if not hasattr(method, "needs_attention") or not callable(getattr(method, "weights", None)):
        raise UserError(f"{point.value} (--reward_shaping {name}) lacks needs_attention or weights(evidence)")
    return method
