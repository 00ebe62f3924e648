"""A run without Ray: all checks, then OpenRLHF's train() with names of its modules rebound to what is here."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from openrlhf.cli import train_ppo_ray
from tqdm import tqdm

from abc_plugin import output_directory
from abc_plugin.attention.model_files import read_headers
from abc_plugin.credit.methods import policy_need
from abc_plugin.errors import CannotWrite, Terminated, UserError
from abc_plugin.host import model_checks
from abc_plugin.host.arguments import announce, settings_of
from abc_plugin.host.model_workers import CreditPolicyModel, CreditRewardModel, RestoredCritic
from abc_plugin.host.prompt_dataset import check_rollouts
from abc_plugin.local import distributed_ranks, flag_checks, frozen_layers, lora
from abc_plugin.local.checkpoints import prepare, saves
from abc_plugin.local.distributed_ranks import TERMINATION
from abc_plugin.local.ray_in_process import IN_PROCESS_RAY, InProcessClass, InProcessGroup
from abc_plugin.local.trainer import LocalPPOTrainer, local_strategy, timing_sentence
from abc_plugin.output_directory import writing


def run(args: Namespace, ignored: list[str]) -> int:
    """Check everything, then train; returns the exit status. Raises UserError for what a check refuses."""
    data = check(args)
    settings = settings_of(args, data[args.data.input_key])
    first = distributed_ranks.current_rank().index == 0
    with output_directory.claimed(args, settings) if first else contextlib.nullcontext():
        _check_space(args)
        args.checkpoints = prepare(args, settings)
        _announce(args, len(data), ignored)
        return _train(args)


def _announce(args: Namespace, prompts: int, ignored: list[str]) -> None:
    shaping = args.shaping
    if ignored:
        print(f"abc-rlhf local: no cluster, so these are ignored: {' '.join(ignored)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    if (count := distributed_ranks.current_rank().count) > 1:
        device = f"{count} ranks with ZeRO-{args.ds.zero_stage}, each on {device}"
    if args.ds.param_dtype == "bf16" and not (torch.cuda.is_available() or _fast_bf16()):
        print("abc-rlhf local: this CPU has no fast bf16: --ds.param_dtype fp32 would be many times faster")
    dense = f", beta {shaping.beta:g}" if shaping.dense else ""
    print(f"abc-rlhf local: {prompts} prompts, reward shaping {shaping.method}{dense}, {device}")
    announce(args, shaping)


def _check_space(args: Namespace) -> None:
    """The trained policy fits on the output's disk as it is now. Raises UserError."""
    path, output = args.actor.model_name_or_path, args.ckpt.output_dir
    size = 4 if args.ds.param_dtype == "fp32" else 2
    need = size * sum(tensor.numel() for tensor in read_headers("--actor.model_name_or_path", path).values())
    if not args.ds.lora.rank and os.path.isdir(output) and (free := shutil.disk_usage(output).free) < need:
        raise UserError(
            f"--ckpt.output_dir {output} has {free / 2**30:.2f} GiB left on its disk, and the trained policy alone "
            f"needs {need / 2**30:.2f}; make room, or give another directory"
        )


def _fast_bf16() -> bool:
    """Whether PyTorch multiplies bf16 by oneDNN on this CPU; its own loops take 50 times as long as fp32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check(args: Namespace) -> Dataset:
    """The prompts, after all checks but those of the output directory. Raises UserError."""
    flag_checks.check_supported(args)
    flag_checks.check_lora(args)
    distributed_ranks.take_device()
    data = flag_checks.check_data(args)
    flag_checks.check_batches(args, len(data))
    check_rollouts(args, len(data), distributed_ranks.current_rank().count, saves=saves(args))
    model_checks.check_models(args, args.shaping, data)
    frozen_layers.check_settings(args, args.shaping)
    flag_checks.check_lora_targets(args)
    model_checks.check_output(args, merged=lora.MERGED)
    return data


def _train(args: Namespace) -> int:
    output, rank = Path(args.ckpt.output_dir), distributed_ranks.current_rank().index
    output.mkdir(parents=True, exist_ok=True)  # for the ranks that do not lock it
    log_file = output / (f"run.rank{rank}.log" if rank else "run.log")
    print(f"abc-rlhf local: loading models; details in {log_file}", flush=True)
    if rank:  # one writer
        args.logger.tensorboard_dir = args.logger.wandb.key = None
    TERMINATION.waits = False
    signal.signal(signal.SIGTERM, TERMINATION)
    with contextlib.closing(Log(log_file)) as log:
        try:
            with _output_to(log), _host_in_this_process(args), distributed_ranks.process_group(), writing(output):
                train_ppo_ray.train(args)
            if rank == 0:
                with writing(output):
                    _summarise(args, output)
            return 0
        except BaseException as error:
            traceback.print_exc(file=log)
            if isinstance(error, CannotWrite):
                raise CannotWrite(f"{error}; {args.checkpoints.description()}") from error
            if isinstance(error, KeyboardInterrupt) or TERMINATION.requested:  # a rank that ends takes others along
                print(f"\nabc-rlhf local: stopped; {args.checkpoints.description()}")
                return Terminated.status if TERMINATION.requested else getattr(error, "status", 130)
            if distributed_ranks.reports_errors():
                print(f"\nabc-rlhf local: failed; the log is {log_file}", file=sys.stderr)
            raise


class Log:
    """A run's log. Lines that a full disk does not take are lost, and the run goes on."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextlib.contextmanager
def _host_in_this_process(args: Namespace) -> Iterator[None]:
    """Rebind the names by which OpenRLHF's train() reaches Ray, its worker classes and its progress bars.

    train() is one function that looks all of them up in its module: there is no method to override and no argument.
    """
    with_ray = ("cli.train_ppo_ray", "trainer.ppo_trainer", "trainer.ppo_utils.experience_maker")
    with_bars = ("trainer.ray.launcher", "trainer.ray.ppo_actor", "trainer.ray.ppo_critic", "trainer.ppo_trainer")
    in_train = {
        "RayActorGroup": InProcessGroup,
        "RewardModelActor": CreditRewardModel,
        "CriticModelActor": RestoredCritic,
        "get_strategy": local_strategy,
    }
    if args.ds.lora.rank:
        in_train |= {"ReferenceModelActor": lora.AdapterOffReference, "CriticModelActor": lora.AdapterCritic}
    if policy_need(args.shaping):
        in_train["PolicyModelActor"] = CreditPolicyModel
    rebound = [
        *((name, "ray", IN_PROCESS_RAY) for name in with_ray),
        *((name, "tqdm", _no_bar) for name in (*with_bars, "datasets.prompts_dataset")),
        *(("cli.train_ppo_ray", name, value) for name, value in in_train.items()),
        ("trainer.ppo_trainer", "PPOTrainer", InProcessClass(LocalPPOTrainer)),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, value in rebound:
            stack.enter_context(mock.patch.object(importlib.import_module(f"openrlhf.{module}"), name, value))
        yield


def _no_bar(*args: object, **kwargs: object) -> tqdm:
    return tqdm(*args, **kwargs | {"disable": True})


@contextlib.contextmanager
def _output_to(log: Log) -> Iterator[None]:
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


def _summarise(args: Namespace, output: Path) -> None:
    """Write ``summary.json`` and print the run's last lines."""
    start = args.checkpoints.step
    summary = LocalPPOTrainer.summary | {"seconds": round(time.time() - args.checkpoints.started, 1)}
    if torch.cuda.is_available():
        summary["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)  # this rank's
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if summary["steps"] == start:
        change = ", nothing was left to train: the checkpoint is from the last step"
    else:
        kl = "none (no reference)" if summary["kl_last"] is None else f"{summary['kl_last']:.4f} nats per token"
        change = (
            f"; reward {summary['reward_first']:.3f} -> {summary['reward_last']:.3f} (mean of the first and last "
            f"{summary['window']} steps), KL to the reference {kl}"
        )
    before = f" ({start} of them before the checkpoint)" if start else ""
    print(
        f"done: {summary['steps']} steps{before} in {summary['seconds']:.0f} s{change}\n"
        f"{timing_sentence(summary['timing'])}\n"
        f"policy: {lora.policy_description(args)}\n"
        f"curves: tensorboard --logdir {args.logger.tensorboard_dir}, or abc-rlhf report {output}\n"
        f"completions: {f'abc-rlhf show {output}' if args.shaping.show_every else 'not recorded'}"
    )
