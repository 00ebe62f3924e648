"""``abc-rlhf local``: OpenRLHF's own train() in one process, without Ray cluster and vLLM."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import socket
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO
from unittest import mock

import torch

from abc_plugin.config import add_flags, split_flags
from abc_plugin.credit import methods
from abc_plugin.host.adapt import import_host


def main(argv: list[str]) -> int:
    """Train; returns the exit status. Raises UserError for anything that can be refused before training."""
    if {"-h", "--help"} & set(argv):
        return _help()
    shaping, host_argv = split_flags(argv)
    methods.load(shaping.method)
    import_host()
    from abc_plugin.host import checks
    from abc_plugin.host.arguments import parse_for_one_process

    args, ignored = parse_for_one_process(host_argv, shaping)
    checks.check_supported(args)
    data = checks.check_data(args)
    texts = [prompt for prompt in data[args.data.input_key][: checks.READ] if isinstance(prompt, str)]
    checks.check_models(args, shaping, texts)
    if ignored:
        print(f"abc-rlhf local: one process, so these are ignored: {' '.join(ignored)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
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
def _host_in_this_process() -> Iterator[None]:
    """Rebind the names by which OpenRLHF's train() reaches Ray, its worker classes and its progress bars."""
    from abc_plugin.host.inprocess import InProcessClass, InProcessGroup, InProcessRay
    from abc_plugin.host.local_trainer import LocalPPOTrainer, local_strategy
    from abc_plugin.host.normalisation import RestoredCritic
    from abc_plugin.host.reward_model import CreditRewardModel

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
    ]
    with contextlib.ExitStack() as stack:
        for module, name, value in rebinds:
            stack.enter_context(mock.patch.object(importlib.import_module(f"openrlhf.{module}"), name, value))
        yield


def _no_bar(*args: object, **kwargs: object) -> object:
    from tqdm import tqdm

    return tqdm(*args, **{**kwargs, "disable": True})


def _one_rank() -> None:
    """The process-group variables of a job with one rank."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextlib.contextmanager
def _output_to(log: TextIO) -> Iterator[None]:
    """Send what OpenRLHF, DeepSpeed and transformers print and log to the run's log; the terminal keeps our bar."""
    terminal = (sys.stdout, sys.stderr)
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
    from abc_plugin.host.local_trainer import LocalPPOTrainer

    output = Path(args.ckpt.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    print(f"abc-rlhf local: loading models; details in {output / 'run.log'}", flush=True)
    _one_rank()
    started = time.time()
    with open(output / "run.log", "a", buffering=1, encoding="utf-8") as log:
        try:
            with _output_to(log), _host_in_this_process():
                importlib.import_module("openrlhf.cli.train_ppo_ray").train(args)
        except KeyboardInterrupt:
            kept = sorted(str(path) for path in Path(args.ckpt.path).glob("*/*global_step*"))
            print(f"\nabc-rlhf local: stopped; checkpoints kept: {', '.join(kept) or 'none (set --ckpt.save_steps)'}")
            return 130
        except Exception:
            traceback.print_exc(file=log)
            print(f"\nabc-rlhf local: failed; the log is {output / 'run.log'}", file=sys.stderr)
            raise
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    summary = LocalPPOTrainer.summary | {"seconds": round(time.time() - started, 1)}
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"done: {summary['steps']} steps in {summary['seconds']:.0f} s{_change(summary)}\n"
        f"policy: {output}\ncurves: tensorboard --logdir {args.logger.tensorboard_dir}, or abc-rlhf report {output}"
    )
    return 0


def _change(summary: dict) -> str:
    if not summary["steps"]:
        return ", nothing was left to train: the checkpoint is from the last step"
    kl = "none (no reference)" if summary["kl_last"] is None else f"{summary['kl_last']:.4f} nats per token"
    return (
        f"; reward {summary['reward_first']:.3f} -> {summary['reward_last']:.3f} (mean of the first and last "
        f"{summary['window']} steps), KL to the reference {kl}"
    )
