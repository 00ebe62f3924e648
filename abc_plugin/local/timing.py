"""Where the time of a step goes: the host's timings, and those of the models' forwards and updates."""

from __future__ import annotations

import statistics
from typing import Any

# Metric: (the trainer's group, the method of its worker).
WORK = {
    "timing/score": ("reward_model_group", "forward"),
    "timing/policy_forward": ("actor_model_group", "forward"),
    "timing/reference_forward": ("reference_model_group", "forward"),
    "timing/critic_forward": ("critic_model_group", "forward"),
    "timing/policy_update": ("actor_model_group", "fit"),
    "timing/critic_update": ("critic_model_group", "fit"),
}


def take(trainer: Any) -> dict[str, float]:
    """Seconds that each model of the host's trainer has worked since the last call (rank 0's own)."""
    groups = {name: getattr(trainer, group) for name, (group, _) in WORK.items()}
    return {name: groups[name].seconds.pop(method, 0.0) for name, (_, method) in WORK.items() if groups[name]}


def figures(history: list[dict]) -> dict[str, float]:
    """Medians over the steps: seconds per step and their parts, and samples per second. Empty when there are none."""
    if not history:
        return {}
    parts = {
        "generate": lambda status: status["timing/generation"],
        "score": lambda status: status["timing/score"],
        "experience": lambda status: status["timing/make_experience"] - status["timing/score"],
        "update": lambda status: status["timing/ppo_train"],
    }
    seconds = {name: statistics.median(map(part, history)) for name, part in parts.items()}
    step = statistics.median(status["timing/step_total"] for status in history)
    samples = statistics.median(status["rollout/num_samples"] / status["timing/step_total"] for status in history)
    return {name: round(value, 4) for name, value in ({"step": step, "samples_per_second": samples} | seconds).items()}


def sentence(figures: dict[str, float]) -> str:
    """The figures in words; shares are of the parts' sum."""
    if not figures:
        return "no step was made"
    parts = {name: figures[name] for name in ("generate", "score", "experience", "update")}
    shares = (f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.items())
    return f"{figures['step']:.2f} s per step ({figures['samples_per_second']:.1f} samples/s): {', '.join(shares)}"
