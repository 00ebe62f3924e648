"""Settings that the chosen credit method cannot heed, refused by name before anything runs."""

from __future__ import annotations

from argparse import Namespace

from abc_plugin.config import ShapingConfig
from abc_plugin.credit import methods
from abc_plugin.errors import UserError
from abc_plugin.host.ensemble import reward_models
from abc_plugin.host.options import flag, option

ATTENTION = frozenset({"attention", "policy", "policy_last"})

# What needs one graph of the whole reward model on one device: (host's setting, refused value, why).
NO_GRADIENT = (
    ("ds.zero_stage", lambda stage: stage == 3, "ZeRO-3 frees each layer's weights before a backward could use them"),
    ("reward.offload", bool, "it keeps the reward model's weights on the CPU"),
    ("ds.ring_attn_size", lambda size: size > 1, "it splits each sequence over processes"),
    ("ds.tensor_parallel_size", lambda size: size > 1, "it splits each layer over processes"),
)


# Advantage estimators that divide the scalar reward: a prefix's score, which nobody divides, would drown it, or drown.
SCALED = ("group_norm",)


def check_method(args: Namespace, shaping: ShapingConfig, *, remote: str | None = None) -> None:
    """Refuse what ``--reward_shaping`` cannot do with the other settings; says so, with the remedy.

    remote: the flag of a reward that comes from elsewhere. Raises UserError. beta 0 heeds nothing.
    """
    method = methods.load(shaping.method)
    if shaping.method == "none" or shaping.beta > 0:
        _options(shaping, method)
    if not shaping.dense:
        return
    name = f"--reward_shaping {shaping.method}"
    if shaping.segment == "turn" and not option(args, "train.agent_func_path"):
        raise UserError(
            "--shaping.segment turn needs an agent's turns: without --train.agent_func_path a response is one turn, "
            "and its pooled credit the sparse reward; use sentence"
        )
    estimator = option(args, "algo.advantage.estimator")
    if "prefix" in method.needs and estimator in SCALED:
        raise UserError(
            f"{name} does not work with {flag(args, 'algo.advantage.estimator')} {estimator}: it divides rewards by "
            "their group's deviation, which a prefix's score does not know; use rloo, or --reward_shaping abc"
        )
    of_scores = sorted(method.needs & {"prefix", "gradient"})
    if remote and of_scores:
        raise UserError(
            f"{name} needs the reward model here, and {remote} sends scores and attention only; use abc, or "
            f"{flag(args, 'reward.model_name_or_path')}"
        )
    if "prefix" in method.needs and shaping.tokenizer_check == "map":
        raise UserError(
            f"{name} reads the score behind each of the policy's tokens, and with --shaping.tokenizer_check map the "
            "reward model's tokens end elsewhere; use abc or grad_input, or a reward model with the policy's tokenizer"
        )
    for path, refused, why in NO_GRADIENT:
        if "gradient" in method.needs and refused(option(args, path)):
            raise UserError(
                f"{name} needs gradients of the reward model, and {flag(args, path)} {option(args, path)} stands in "
                f"the way: {why}; leave it out, or use --reward_shaping prefix or abc"
            )


def _options(shaping: ShapingConfig, method: methods.Method) -> None:
    """The plugin's own options against the method."""
    name, default = f"--reward_shaping {shaping.method}", ShapingConfig()
    wanted = {"layer": ATTENTION, "recovery": ATTENTION, "heads": frozenset({"attention"})}
    if shaping.method == "none":
        for option_name in (*wanted, "drop", "entropy_floor", "segment"):
            if (given := getattr(shaping, option_name)) != getattr(default, option_name):
                raise UserError(
                    f"--shaping.{option_name} {given} changes credit, and --reward_shaping none gives none: name a "
                    "method, such as abc, or leave the option out"
                )
        return
    for option_name, needs in wanted.items():
        given = getattr(shaping, option_name)
        if given != getattr(default, option_name) and not needs & method.needs:
            reads = "no attention" if needs == ATTENTION or not method.needs & ATTENTION else "the policy's attention"
            raise UserError(f"{name} reads {reads}: leave --shaping.{option_name} {given} out, or use abc")
    for option_name in ("drop", "entropy_floor"):
        given = getattr(shaping, option_name)
        if given != getattr(default, option_name) and method.weights is None:
            raise UserError(
                f"{name} gives signed credit, not shares of a whole that could be renormalised: leave "
                f"--shaping.{option_name} {given} out, or use abc"
            )


def check_ensemble(args: Namespace) -> None:
    """Several reward models: no path missing or twice. Raises UserError."""
    given, paths = option(args, "reward.model_name_or_path") or "", reward_models(args)
    name = f"{flag(args, 'reward.model_name_or_path')} {given}"
    if "," in given and (len(paths) != given.count(",") + 1 or len(set(paths)) != len(paths)):
        raise UserError(f"{name}: give each reward model once, with single commas between them")
