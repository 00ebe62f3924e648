"""OpenRLHF's own command-line parser, reused: a flag means here what it means there."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from unittest import mock

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError
from abc_plugin.host.imports import optional_packages
from abc_plugin.local.ranks import place

CLI = "openrlhf.cli.train_ppo_ray"
REQUIRED = {
    "--actor.model_name_or_path": "a Hugging Face model directory",
    "--reward.model_name_or_path": "a reward model's directory",
    "--data.prompt_dataset": "a JSONL file of prompts",
}

# One process: what the host asks about its cluster has only this answer. Appended to the flags: the last one counts.
ONE_PROCESS = {
    **{f"--{model}.num_nodes": "1" for model in ("actor", "ref", "critic", "reward")},
    **{f"--{model}.num_gpus_per_node": "1" for model in ("actor", "ref", "critic", "reward")},
    "--vllm.num_engines": "0",
    "--vllm.sync_backend": "gloo",
}


class _Parsed(BaseException):
    """Carries the parsed arguments out of the host's script."""


def _refuse(parser: ArgumentParser, message: str) -> None:
    raise UserError(f"{message} (flags are OpenRLHF's: {parser.prog} --help)")


def _stop_at_train() -> None:
    raise _Parsed(sys._getframe(1).f_locals["args"])


def parse(argv: list[str], command: str = "local") -> Namespace:
    """Run the host's script up to its ``train(args)`` and return ``args``, validated and nested as there.

    ``command`` stands for the program's name in help and errors.

    The parser is not importable: it stands under ``if __name__ == "__main__"``. The first thing ``train`` does is to
    ask whether Ray is up; that is where it is stopped.
    Raises UserError for what the host's script refuses.
    """
    with (
        mock.patch("ray.is_initialized", _stop_at_train),
        mock.patch.object(sys, "argv", [f"abc-rlhf {command}", *argv]),
        mock.patch.object(ArgumentParser, "error", _refuse),
        mock.patch("abc_plugin.host.install.openrlhf_plugin"),  # a patched host calls it, also for its parser
        optional_packages(),
    ):
        try:
            runpy.run_path(importlib.util.find_spec(CLI).origin, run_name="__main__")
        except _Parsed as parsed:
            return parsed.args[0]
        except Exception as error:  # assertions, and what the script trips over when a value makes no sense
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            hint = " (one process runs without vLLM engines)" if command == "local" else ""
            raise UserError(f"OpenRLHF refused the flags: {reason}{hint}") from None
    raise RuntimeError(f"{CLI} ended without calling train(args): this OpenRLHF version is not supported")


def parse_for_one_process(argv: list[str], shaping: ShapingConfig) -> tuple[Namespace, list[str]]:
    """``parse``, with the answers that follow from running in this process, and ``args.shaping``.

    Returns the arguments and the flags of ``argv`` that are ignored here. Raises UserError as ``parse``, and when a
    required flag is missing.
    """
    from transformers.utils import is_flash_attn_2_available

    given = [word.split("=")[0] for word in argv]
    for flag, what in REQUIRED.items():
        if flag not in given:
            raise UserError(f"{flag} is missing; give {what} (abc-rlhf prepare makes one)")
    args = parse([*argv, *(word for pair in ONE_PROCESS.items() for word in pair)])
    args.shaping = shaping
    if args.ds.lora.target_modules == ["all-linear"]:  # PEFT knows the word, but not in a list
        args.ds.lora.target_modules = "all-linear"
    for model in (args.actor, args.ref, args.critic, args.reward):  # the host shares work out by this number
        model.num_gpus_per_node = place().size
    args.train.colocate_all = args.train.colocate_actor_ref = args.train.colocate_critic_reward = False
    args.ds.enable_sleep = args.vllm.enable_sleep = False
    if not any(flag.startswith("--ds.attn") for flag in given) and not is_flash_attn_2_available():
        args.ds.attn_implementation = "sdpa"
    if args.logger.tensorboard_dir is None:
        args.logger.tensorboard_dir = str(Path(args.ckpt.output_dir) / "tensorboard")
    without_meaning = ("--vllm.", "--train.colocate", "--ds.enable_sleep")
    return args, [flag for flag in given if flag in ONE_PROCESS or flag.startswith(without_meaning)]
