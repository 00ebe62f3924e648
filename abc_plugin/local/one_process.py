"""Which of OpenRLHF's settings one process can honour: the answers it gives, and what it refuses."""

from __future__ import annotations

from argparse import Namespace
from operator import attrgetter
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig
from transformers.utils import is_flash_attn_2_available

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError
from abc_plugin.host.arguments import parse
from abc_plugin.host.model_files import adapter_base, read_data
from abc_plugin.local.ranks import place

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

# Flags that a run without engines cannot honour: (attribute path, refused value, why and what to do). Packing,
# ring attention, dynamic batches and host-side evaluation are refused by OpenRLHF itself, for want of engines.
UNSUPPORTED = (
    ("train.agent_func_path", bool, "agents run beside vLLM engines; leave it out, or use abc-rlhf ray"),
    ("reward.remote_url", bool, "a remote reward is called by vLLM engines; give --reward.model_name_or_path"),
    ("algo.advantage.is_correction_level", lambda level: level != "off", "there is no second engine; leave it out"),
    ("train.async_enable", bool, "the processes that roll out are those that train; leave it out"),
    ("train.enable_ema", lambda ema: ema and not torch.cuda.is_available(), "it needs a CUDA device; leave it out"),
    (
        "train.full_determinism_enable",
        lambda on: on and torch.cuda.is_available(),
        "tokens are drawn by a cumulated sum, of which CUDA has no deterministic form; leave it out, runs are seeded",
    ),
    ("ds.tensor_parallel_size", lambda size: size > 1, "not supported here; --ds.zero_stage 3 splits the weights"),
    ("data.max_images_per_prompt", bool, "text only; leave it out"),
)


def parse_for_one_process(argv: list[str], shaping: ShapingConfig) -> tuple[Namespace, list[str]]:
    """``parse``, with the answers that follow from running in this process, and ``args.shaping``.

    Returns the arguments and the flags of ``argv`` that are ignored here. Raises UserError as ``parse``, and when a
    required flag is missing.
    """
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


def check_supported(args: Namespace) -> None:
    """Refuse flags that a run without engines cannot honour."""
    for path, refused, remedy in UNSUPPORTED:
        if refused(value := attrgetter(path)(args)):
            raise UserError(f"--{path} {value} does not work with abc-rlhf local: {remedy}")
    if args.rollout.max_new_tokens is not None and not 0 < args.rollout.max_new_tokens < args.data.max_len:
        raise UserError(
            f"--rollout.max_new_tokens {args.rollout.max_new_tokens} leaves no room for a prompt in --data.max_len "
            f"{args.data.max_len}"
        )
    if "flash" in args.ds.attn_implementation and not torch.cuda.is_available():
        raise UserError(
            f"--ds.attn_implementation {args.ds.attn_implementation} needs a CUDA device and there is none; use sdpa"
        )


def check_positions(args: Namespace) -> None:
    """No sequence is longer than a policy with a table of positions has rows; rotary ones have no such end."""
    path = args.actor.model_name_or_path
    config = AutoConfig.from_pretrained(adapter_base(path) or path, trust_remote_code=True).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit and not hasattr(config, "rope_parameters") and args.data.max_len > limit:
        raise UserError(f"--data.max_len {args.data.max_len} is more than the {limit} positions of {path}: lower it")


def check_data(args: Namespace) -> Dataset:
    """The prompts can be read and fill the batches of a step. Returns them."""
    data = read_data(args)
    count = len(data)
    rollout, train = args.rollout, args.train
    samples = min(count, rollout.batch_size) * rollout.n_samples_per_prompt
    if samples < train.batch_size:  # the host would drop the incomplete batch and never update
        raise UserError(
            f"a rollout has {samples} completions (--rollout.batch_size {rollout.batch_size}, "
            f"--rollout.n_samples_per_prompt {rollout.n_samples_per_prompt}, {count} prompts), fewer than "
            f"--train.batch_size {train.batch_size}: raise the former or lower the latter"
        )
    if rollout.temperature <= 0:
        raise UserError(f"--rollout.temperature {rollout.temperature}: PPO needs sampled completions; use 1.0")
    return data
