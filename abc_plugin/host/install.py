"""Puts the plugin's subclasses where OpenRLHF looks up its own classes, in the driver's process.

Ray pickles an importable class by reference, so that what is rebound in the driver reaches every worker; a function
rebound in the driver would not. Nothing else of the host is touched.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from argparse import Namespace

from abc_plugin.config import ShapingConfig, add_flags, split_flags
from abc_plugin.credit import methods
from abc_plugin.credit.methods import policy_need
from abc_plugin.errors import UserError
from abc_plugin.host.supported_releases import check_signatures, check_version

# The host's name, and the subclass that takes its place.
REBOUND = (
    ("openrlhf.trainer.ray.launcher.RewardModelActor", "abc_plugin.host.model_workers.CreditRewardModel"),
    ("openrlhf.trainer.ray.ppo_critic.CriticModelActor", "abc_plugin.host.model_workers.RestoredCritic"),
    ("openrlhf.trainer.ppo_trainer.PPOTrainer", "abc_plugin.host.ray_trainers.CreditPPOTrainer"),
    ("openrlhf.trainer.ppo_trainer_async.TrainingActor", "abc_plugin.host.ray_trainers.CreditTrainingActor"),
    ("openrlhf.trainer.ppo_trainer_async.GenerateSamplesActor", "abc_plugin.host.ray_trainers.CheckedSamplesActor"),
    ("openrlhf.trainer.ppo_trainer_async.PPOTrainerAsync", "abc_plugin.host.ray_trainers.CreditPPOTrainerAsync"),
)
# Only for methods that need the policy's attention: without one the policy's worker is the host's.
FOR_POLICY = ("openrlhf.trainer.ray.ppo_actor.PolicyModelActor", "abc_plugin.host.model_workers.CreditPolicyModel")
GET_STRATEGY = "openrlhf.utils.utils.get_strategy"

_undo: list[tuple[object, str, object]] = []  # (module, name, the host's object), in the order of rebinding


def undecorated(actor_class: type) -> type:
    """The plain class behind ``@ray.remote``, which has no subclasses; one that is not decorated as it is."""
    metadata = getattr(actor_class, "__ray_metadata__", None)
    return actor_class if metadata is None else metadata.modified_class


def as_actor(subclass: type, like: type) -> type:
    """``subclass`` decorated with the options of ``like``, e.g. its GPU share.

    Workers unpickle the subclass by reference, so it must stand at the top level of a module that they can import.
    Raises UserError when ``like`` is no Ray actor class.
    """
    if not hasattr(like, "__ray_metadata__"):
        raise UserError(f"{like.__module__}.{like.__name__} is no Ray actor class: this OpenRLHF is not supported")
    import ray

    options = like._default_options  # private, as __ray_metadata__ above: Ray has no public way to subclass an actor
    return ray.remote(**options)(subclass) if options else ray.remote(subclass)


def install(shaping: ShapingConfig | None = None) -> list[str]:
    """Rebind OpenRLHF's names to the plugin's subclasses; returns one line per name.

    Call it in the driver before ``openrlhf.cli.train_ppo_ray.train(args)``; every loaded module gets the new class
    wherever it holds the old one, so imports may stand before or after the call. With ``shaping`` the settings travel
    to the workers in ``strategy.args.shaping``, and what can be checked without a GPU is checked when the host makes
    its strategy; without, ``args.shaping`` must be set by the caller. A second call replaces the first. A trainer
    class of the user's own is not rebound: mix ``ray_trainers.WithCredit`` into it, or its rewards stay sparse.
    Raises UserError when this version of OpenRLHF is not supported or not what the plugin was written against.
    """
    uninstall()
    check_version()
    check_signatures()
    if shaping is not None:
        methods.load(shaping.method)
    wanted = (*REBOUND, FOR_POLICY) if shaping is None or policy_need(shaping) else REBOUND
    pairs = [(name, _load(name), _load(ours)) for name, ours in wanted]  # all subclasses before the first rebinding
    lines = []
    for name, stock, subclass in pairs:
        _rebind(stock, as_actor(subclass, like=stock))
        lines.append(f"{name} -> {subclass.__module__}.{subclass.__name__}")
    if shaping is not None:
        stock = _load(GET_STRATEGY)
        _rebind(stock, _carrying(shaping, stock))
        lines.append(f"{GET_STRATEGY} -> itself, with args.shaping")
    return lines


def uninstall() -> None:
    """Put back every object that ``install`` replaced; does nothing where nothing is installed."""
    while _undo:
        setattr(*_undo.pop())


def openrlhf_plugin() -> None:
    """Entry point of the group ``openrlhf.plugins``, which a patched host calls before it parses its flags.

    Takes the plugin's flags out of ``sys.argv``; bad input is one line on stderr and exit status 2.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
        add_flags(parser)
        print(parser.format_help())
    try:
        shaping, sys.argv[1:] = split_flags(sys.argv[1:])
        for line in install(shaping):
            print(f"abc_plugin: rebound {line}")
    except UserError as error:
        print(f"abc_plugin: error: {error}", file=sys.stderr)
        sys.exit(2)


def _load(dotted: str) -> object:
    module, name = dotted.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _rebind(stock: object, ours: object) -> None:
    """Wherever a loaded module holds ``stock``, under whatever name, put ``ours``."""
    others = [module for key, module in sys.modules.items() if key.split(".")[0] != "abc_plugin"]
    for module in others:
        held = getattr(module, "__dict__", {})  # not everything in sys.modules is a module
        for name in [name for name, value in held.items() if value is stock]:
            _undo.append((module, name, stock))
            setattr(module, name, ours)


def _carrying(shaping: ShapingConfig, stock: object) -> object:
    def get_strategy(args: Namespace) -> object:
        if getattr(args, "shaping", None) is None:
            from abc_plugin.host.model_checks import preflight

            preflight(args, shaping)
            args.shaping = shaping
        return stock(args)

    return get_strategy
