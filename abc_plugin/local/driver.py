"""``abc-rlhf local``: OpenRLHF's own train() in one process, without Ray cluster and vLLM."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO
from unittest import mock

import torch

from abc_plugin.config import add_flags, split_flags
from abc_plugin.credit import methods
from abc_plugin.host.imports import import_host
from abc_plugin.local import ranks, timing

if TYPE_CHECKING:
    from datasets import Dataset


def main(argv: list[str]) -> int:
    """Train; returns the exit status. Raises UserError for anything that can be refused before training."""
    if {"-h", "--help"} & set(argv):
        return _help()
    with ranks.one_voice():
        return _checked(argv)


def parsed(argv: list[str]) -> tuple[Namespace, list[str]]:
    """The run's settings, and the flags that are ignored. Raises UserError for what one of the parsers refuses."""
    shaping, host_argv = split_flags(argv)
    methods.load(shaping.method)
    import_host()
    from abc_plugin.local.one_process import parse_for_one_process

    return parse_for_one_process(host_argv, shaping)


def check(args: Namespace) -> Dataset:
    """The prompts, after all checks but those of the output directory. Raises UserError."""
    from abc_plugin.host import checks
    from abc_plugin.local import frozen, one_process
    from abc_plugin.local import lora_checks as adapter_checks

    shaping = args.shaping
    one_process.check_supported(args)
    adapter_checks.check_settings(args, shaping)
    ranks.take_device()
    data = one_process.check_data(args)
    ranks.check_batches(args, len(data))
    texts = [prompt for prompt in data[args.data.input_key][: checks.READ] if isinstance(prompt, str)]
    checks.check_models(args, shaping, texts)
    one_process.check_positions(args)
    frozen.check_settings(args, shaping)
    adapter_checks.check_targets(args)
    return data


def _checked(argv: list[str]) -> int:
    args, ignored = parsed(argv)
    from abc_plugin.local import resume_checks

    data, shaping = check(args), args.shaping
    args.checkpoints = resume_checks.prepare(args, data[args.data.input_key])
    if ignored:
        print(f"abc-rlhf local: no cluster, so these are ignored: {' '.join(ignored)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    if (size := ranks.place().size) > 1:
        device = f"{size} ranks with ZeRO-{args.ds.zero_stage}, each on {device}"
    dense = f", beta {shaping.beta:g}" if shaping.dense else ""
    print(f"abc-rlhf local: {len(data)} prompts, reward shaping {shaping.method}{dense}, {device}")
    return _train(args)


def _help() -> int:
    parser = argparse.ArgumentParser(prog="abc-rlhf local", add_help=False, usage="abc-rlhf local [flags]")
    add_flags(parser)
    print(__doc__.strip(), parser.format_help(), "OpenRLHF's flags, as for openrlhf.cli.train_ppo_ray:", sep="\n\n")
    import_host()
    from abc_plugin.host.arguments import parse

    try:
        parse(["--help"])
    except SystemExit:
        return 0
    return 1


@contextlib.contextmanager
def _host_in_this_process(args: Namespace) -> Iterator[None]:
    """Rebind the names by which OpenRLHF's train() reaches Ray, its worker classes and its progress bars."""
    from abc_plugin.credit.methods import policy_need
    from abc_plugin.host.worker import CreditPolicyModel, CreditRewardModel, RestoredCritic
    from abc_plugin.local import lora as adapters
    from abc_plugin.local.in_process import InProcessClass, InProcessGroup, InProcessRay
    from abc_plugin.local.trainer import LocalPPOTrainer, local_strategy

    with_ray = ("cli.train_ppo_ray", "trainer.ppo_trainer", "trainer.ppo_utils.experience_maker")
    with_bars = ("trainer.ray.launcher", "trainer.ray.ppo_actor", "trainer.ray.ppo_critic", "trainer.ppo_trainer")
    rebinds = [
        *((name, "ray", InProcessRay) for name in with_ray),
        *((name, "tqdm", _no_bar) for name in (*with_bars, "datasets.prompts_dataset")),
        ("cli.train_ppo_ray", "RayActorGroup", InProcessGroup),
        ("cli.train_ppo_ray", "RewardModelActor", CreditRewardModel),
        ("cli.train_ppo_ray", "CriticModelActor", RestoredCritic),
        ("cli.train_ppo_ray", "get_strategy", local_strategy),
        ("trainer.ppo_trainer", "PPOTrainer", InProcessClass(LocalPPOTrainer)),
        *adapters.rebinds(args),
    ]
    if policy_need(args.shaping):
        rebinds.append(("cli.train_ppo_ray", "PolicyModelActor", CreditPolicyModel))
    with contextlib.ExitStack() as stack:
        for module, name, value in rebinds:
            stack.enter_context(mock.patch.object(importlib.import_module(f"openrlhf.{module}"), name, value))
        yield


def _no_bar(*args: object, **kwargs: object) -> object:
    from tqdm import tqdm

    return tqdm(*args, **{**kwargs, "disable": True})


@contextlib.contextmanager
def _output_to(log: TextIO) -> Iterator[None]:
    """Send what OpenRLHF, DeepSpeed and transformers print and log to the run's log; the terminal keeps our bar."""
    terminal = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    handlers = {handler for logger in loggers for handler in logger.handlers if type(handler) is logging.StreamHandler}
    before = {handler: handler.setStream(log) for handler in handlers if handler.stream in terminal}
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        for handler, stream in before.items():
            handler.setStream(stream)


def _train(args: Namespace) -> int:
    from abc_plugin.local.lora_files import saved
    from abc_plugin.local.trainer import LocalPPOTrainer

    output, rank = Path(args.ckpt.output_dir), ranks.place().rank
    output.mkdir(parents=True, exist_ok=True)
    log_file = output / (f"run.rank{rank}.log" if rank else "run.log")
    print(f"abc-rlhf local: loading models; details in {log_file}", flush=True)
    if rank:  # one writer
        args.logger.tensorboard_dir = args.logger.wandb.key = None
    with open(log_file, "a", buffering=1, encoding="utf-8") as log:
        try:
            with _output_to(log), _host_in_this_process(args), ranks.joined():
                importlib.import_module("openrlhf.cli.train_ppo_ray").train(args)
        except KeyboardInterrupt:
            print(f"\nabc-rlhf local: stopped; {args.checkpoints.kept()}")
            return 130
        except Exception:
            traceback.print_exc(file=log)
            if ranks.speaks():
                print(f"\nabc-rlhf local: failed; the log is {log_file}", file=sys.stderr)
            raise
    if rank:
        return 0
    summary = LocalPPOTrainer.summary | {"seconds": round(time.time() - args.checkpoints.started, 1)}
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    before = f" ({args.checkpoints.step} of them before the checkpoint)" if args.checkpoints.step else ""
    print(
        f"done: {summary['steps']} steps{before} in {summary['seconds']:.0f} s{_change(args, summary)}\n"
        f"{timing.sentence(summary['timing'])}\n"
        f"policy: {saved(args)}\n"
        f"curves: tensorboard --logdir {args.logger.tensorboard_dir}, or abc-rlhf report {output}\n"
        f"completions: {f'abc-rlhf show {output}' if args.shaping.show_every else 'not recorded'}"
    )
    return 0


def _change(args: Namespace, summary: dict) -> str:
    if summary["steps"] == args.checkpoints.step:
        return ", nothing was left to train: the checkpoint is from the last step"
    kl = "none (no reference)" if summary["kl_last"] is None else f"{summary['kl_last']:.4f} nats per token"
    return (
        f"; reward {summary['reward_first']:.3f} -> {summary['reward_last']:.3f} (mean of the first and last "
        f"{summary['window']} steps), KL to the reference {kl}"
    )
