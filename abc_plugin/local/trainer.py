"""The host's PPO trainer with per-token credit, transformers rollouts, a progress bar and the time of each part."""

from __future__ import annotations

import math
import statistics
import sys
from argparse import Namespace
from typing import Any

from openrlhf.trainer import ppo_trainer
from openrlhf.utils.deepspeed import DeepspeedStrategy
from tqdm import tqdm
from transformers import set_seed

from abc_plugin.host.install import undecorated
from abc_plugin.host.ray_trainers import WithCredit
from abc_plugin.local.distributed_ranks import TERMINATION, current_rank
from abc_plugin.local.frozen_layers import FrozenStrategy
from abc_plugin.local.lora import AdapterStrategy
from abc_plugin.local.resume import ResumableStrategy, ResumableTrainer
from abc_plugin.local.rollout import TransformersSamplesGenerator

WINDOW = 5  # steps averaged for the summary's first and last reward

# Seconds that a model works in a step, by metric: (the trainer's group, the method of its worker).
TIMED = {
    "timing/score": ("reward_model_group", "forward"),
    "timing/policy_forward": ("actor_model_group", "forward"),
    "timing/reference_forward": ("reference_model_group", "forward"),
    "timing/critic_forward": ("critic_model_group", "forward"),
    "timing/policy_update": ("actor_model_group", "fit"),
    "timing/critic_update": ("critic_model_group", "fit"),
}


class LocalStrategy(ResumableStrategy, AdapterStrategy, FrozenStrategy, DeepspeedStrategy):
    """The host's strategy; its Adam is PyTorch's, which needs no compiler."""

    def get_ds_train_config(self, optim_dict: dict | None = None, **kwargs: object) -> dict:
        config = super().get_ds_train_config(optim_dict, **kwargs)
        if optim_dict and optim_dict["type"] == "AdamW":
            config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
        return config


def local_strategy(args: Namespace) -> LocalStrategy:
    """The host's get_strategy (utils/utils.py) with LocalStrategy.

    It also seeds this process: the host seeds its workers only, and leaves the order of prompts to chance.
    """
    set_seed(args.train.seed)
    return LocalStrategy(
        seed=args.train.seed,
        full_determinism=args.train.full_determinism_enable,
        micro_train_batch_size=args.train.micro_batch_size,
        train_batch_size=args.train.batch_size,
        zero_stage=args.ds.zero_stage,
        args=args,
    )


class LocalPPOTrainer(ResumableTrainer, WithCredit, undecorated(ppo_trainer.PPOTrainer)):
    """The host's trainer: its fit loop, checkpoints, loggers and KL controller.

    ``summary`` holds the run's figures once fit has ended: reward in the reward model's units, KL in nats per token.
    """

    summary: dict = {}

    def __init__(self, pretrain: str, strategy: LocalStrategy, actor_group: Any, *groups: Any, **kwargs: Any) -> None:
        super().__init__(pretrain, strategy, actor_group, *groups, **kwargs)
        self.samples_generator = TransformersSamplesGenerator(
            self.samples_generator, actor_group.worker, lambda: len(self.history)
        )
        self.history: list[dict] = []

    def fit(self, global_step: int = 0) -> None:
        """The host's loop with one bar over all steps; stands on the last step when a run is resumed."""
        per_episode = math.ceil(len(self.prompts_dataloader) / self.args.rollout.batch_size)
        total = self.args.train.num_episodes * per_episode
        done = self.args.checkpoints.step
        bar = {"desc": "PPO", "unit": "step", "file": sys.__stderr__, "disable": current_rank().index > 0}
        TERMINATION.waits = math.isfinite(self.args.ckpt.save_steps) and not self.args.ckpt.disable_ds
        with tqdm(total=total, initial=done, **bar) as self.bar:
            super().fit(global_step)
        first, last = self.history[:WINDOW], self.history[-WINDOW:]
        LocalPPOTrainer.summary = {
            "method": self.args.shaping.method,
            "beta": self.args.shaping.beta if self.args.shaping.dense else 0.0,
            "seed": self.args.train.seed,
            "steps": len(self.history),
            "window": len(last),
            "reward_first": _mean(first, "rollout/reward_mean"),
            "reward_last": _mean(last, "rollout/reward_mean"),
            "reward_mean": _mean(self.history, "rollout/reward_mean"),
            "kl_last": _mean(last, "kl") if self.reference_model_group is not None else None,
            "timing": timing_summary(self.history),
        }

    def save_logs_and_checkpoints(self, global_step: int, logs_dict: dict, client_states: dict | None = None) -> None:
        """The host's; how long each model worked is added to its metrics, and so to the history."""
        logs_dict |= pop_timings(self)
        super().save_logs_and_checkpoints(global_step, logs_dict, client_states)

    def broadcast_to_vllm(self) -> None:
        """Nothing to send: the policy generates itself."""

    def train_step(self, rollout_samples: list, global_step: int) -> tuple[dict, int]:
        status, step = super().train_step(rollout_samples, global_step)
        self.strategy.drop_states()
        if "policy_loss" not in status and global_step > self.args.critic.freezing_steps:
            raise RuntimeError(f"step {step} made no update of the policy: its rollout filled no training batch")
        self.history.append(status)
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix(reward=f"{status['rollout/reward_mean']:.3f}", kl=f"{status.get('kl', float('nan')):.4f}")
        return status, step


def _mean(history: list[dict], name: str) -> float | None:
    """Mean over the steps that report it; None where none does (the critic may train alone at first)."""
    values = [status[name] for status in history if name in status]
    return sum(values) / len(values) if values else None


def pop_timings(trainer: Any) -> dict[str, float]:
    """Seconds that each model of the trainer has worked since the last call (this rank's own)."""
    groups = {metric: (getattr(trainer, group), method) for metric, (group, method) in TIMED.items()}
    return {metric: group.seconds.pop(method, 0.0) for metric, (group, method) in groups.items() if group}


def timing_summary(history: list[dict]) -> dict[str, float]:
    """Medians over the steps: seconds per step and of its parts, and samples per second. Empty without steps."""
    if not history:
        return {}
    figures = [
        {
            "step": status["timing/step_total"],
            "samples_per_second": status["rollout/num_samples"] / status["timing/step_total"],
            "generate": status["timing/generation"],
            "score": status["timing/score"],
            "experience": status["timing/make_experience"] - status["timing/score"],
            "update": status["timing/ppo_train"],
        }
        for status in history
    ]
    return {name: round(statistics.median(step[name] for step in figures), 4) for name in figures[0]}


def timing_sentence(summary: dict[str, float]) -> str:
    """``timing_summary`` in words; shares are of the parts' sum."""
    if not summary:
        return "no step was made"
    parts = {name: summary[name] for name in ("generate", "score", "experience", "update")}
    shares = (f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.items())
    return f"{summary['step']:.2f} s per step ({summary['samples_per_second']:.1f} samples/s): {', '.join(shares)}"
