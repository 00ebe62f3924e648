"""Mean and deviation of the reward, which OpenRLHF loses while it loads a model under transformers 5.

The host keeps them in buffers that are not saved; transformers 5 makes such buffers without their values. They are
set again from the config that the host itself read them from.
"""

from __future__ import annotations

from argparse import Namespace

from openrlhf.trainer.ray.ppo_critic import CriticModelActor

from abc_plugin.attention.layers import unwrap
from abc_plugin.host.options import option
from abc_plugin.host.ray_actors import undecorated


def normalises(args: Namespace) -> bool:
    """Whether ``--reward.normalize_enable`` is set (flat before OpenRLHF 0.10.2)."""
    return option(args, "reward.normalize_enable")


def restore(model: object) -> str:
    """Set the buffers ``mean`` and ``std`` of the host's reward or critic model from its config; returns what was set.

    Host: models/model.py, ``reward = (reward - mean) / std``; 0 and 1 where the config has none.
    """
    regression = next(part for part in unwrap(model).modules() if "normalize_reward" in vars(part))
    values = {"mean": getattr(regression.config, "mean", 0.0), "std": getattr(regression.config, "std", 1.0)}
    for name, value in values.items():
        getattr(regression, name).fill_(value)
    return f"mean {values['mean']}, std {values['std']}"


class RestoredCritic(undecorated(CriticModelActor)):
    """OpenRLHF's critic worker; with ``--reward.normalize_enable`` its values are normalised as configured."""

    def init_model_from_pretrained(self, strategy: object, *args: object, **kwargs: object) -> None:
        """Host signature."""
        super().init_model_from_pretrained(strategy, *args, **kwargs)
        if normalises(strategy.args):
            strategy.print(f"abc_plugin: reward normalisation of the critic restored: {restore(self.critic)}")
