"""What one process makes of OpenRLHF's settings: the answers it gives, and what it refuses before loading a model."""

from __future__ import annotations

import warnings
from argparse import Namespace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_flash_attn_2_available

from abc_plugin.attention.layers import skeleton
from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError
from abc_plugin.host.arguments import parse, reward_models
from abc_plugin.host.model_checks import refuse_adapter, refuse_without_lora
from abc_plugin.host.prompt_dataset import read_data
from abc_plugin.local.distributed_ranks import current_rank
from abc_plugin.local.lora import bitsandbytes

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output
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
    if args.ds.lora.target_modules == [ALL_LINEAR]:  # PEFT knows the word, but not in a list
        args.ds.lora.target_modules = ALL_LINEAR
    for model in (args.actor, args.ref, args.critic, args.reward):  # the host shares work out by this number
        model.num_gpus_per_node = current_rank().count
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


def check_batches(args: Namespace, prompts: int) -> None:
    """Every rank gets as many batches of every rollout as the others. Raises UserError with the numbers otherwise.

    With uneven shares some ranks would wait for ever: under ZeRO-3 in a forward, always in the update.
    """
    count, rollout, train = current_rank().count, args.rollout, args.train
    unit = train.micro_batch_size * count
    if train.batch_size % unit:
        raise UserError(
            f"--train.batch_size {train.batch_size} is no multiple of --train.micro_batch_size "
            f"{train.micro_batch_size}{f' on {count} ranks' if count > 1 else ''}: make it one of {unit}"
        )
    if count == 1:
        return
    copies, micro = rollout.n_samples_per_prompt, rollout.micro_batch_size
    first, rest = min(prompts, rollout.batch_size), prompts % rollout.batch_size
    for size, which in ((first, "a rollout"), (rest, "the last rollout of an episode")):
        samples = size * copies
        if samples % (micro * count) == 0:
            continue
        fits = [m for m in range(micro, 0, -1) if not any(n * copies % (m * count) for n in (first, rest))]
        if fits:
            remedy = f"--rollout.micro_batch_size {fits[0]} would do"
        elif size == rest and prompts > rest:
            remedy = f"--data.max_samples {prompts - rest} leaves that rollout out"
        else:
            remedy = f"start {max(n for n in range(1, count) if not samples % n)}, or change the batch"
        raise UserError(
            f"{which} has {samples} completions ({size} prompts, --rollout.n_samples_per_prompt {copies}), which "
            f"{count} ranks cannot share out in batches of --rollout.micro_batch_size {micro}: {remedy}"
        )


def check_lora(args: Namespace) -> None:
    """The settings of LoRA and 4-bit weights fit each other. Raises UserError naming the first that does not."""
    ds, lora, shaping = args.ds, args.ds.lora, args.shaping
    refuse_adapter(args)
    _refuse_first(
        (
            ds.load_in_4bit and not lora.rank,
            "--ds.load_in_4bit freezes the weights, so there is nothing to train; add --ds.lora.rank 16",
        ),
        (
            ds.load_in_4bit and ds.param_dtype != "bf16",
            f"--ds.param_dtype {ds.param_dtype} does not go with --ds.load_in_4bit; use bf16",
        ),
    )
    if ds.load_in_4bit:
        bitsandbytes()
    if not lora.rank:
        remedy = "without --ds.lora.rank; add --ds.lora.rank 16"
        refuse_without_lora(shaping, remedy)
        for name, default in (("alpha", 16), ("dropout", 0), ("target_modules", ALL_LINEAR)):
            if (value := getattr(lora, name)) != default:
                raise UserError(f"--ds.lora.{name} {_words(value)} means nothing {remedy}")
        return
    policy, critic = args.actor.model_name_or_path, args.critic.model_name_or_path
    _refuse_first(
        (
            args.ref.offload,
            "--ref.offload means nothing with --ds.lora.rank: the reference is the policy; leave it out",
        ),
        (
            lora.rank < 0 or lora.alpha < 1 or not 0 <= lora.dropout < 1,
            f"--ds.lora.rank {lora.rank}, --ds.lora.alpha {lora.alpha}, --ds.lora.dropout {lora.dropout}: rank and "
            "alpha must be 1 or more, dropout in [0, 1)",
        ),
        (
            args.train.enable_ema,
            "--train.enable_ema averages a model without adapters; leave it out with --ds.lora.rank",
        ),
        (
            shaping.share_base and critic is None,
            f"--local.share_base: there is no critic with --algo.advantage.estimator {args.algo.advantage.estimator}; "
            "leave it out",
        ),
        (
            shaping.share_base and critic != policy,
            f"--local.share_base: the critic {critic} is another model than the policy; add "
            f"--critic.model_name_or_path {policy}",
        ),
        (
            shaping.share_base and ds.zero_stage == 3,
            "--local.share_base does not go with --ds.zero_stage 3, which splits the base; use 2",
        ),
    )


def _refuse_first(*refusals: tuple[object, str]) -> None:
    """Raises UserError with the first message whose condition holds."""
    for refused, message in refusals:
        if refused:
            raise UserError(message)


def check_lora_targets(args: Namespace) -> None:
    """Adapters find layers in policy and critic, and 4-bit weights in every model; prints what is trained.

    Raises UserError for a model that is quantised already or has no layer that can be, and for
    ``--ds.lora.target_modules`` that match nothing in a model, or of which one matches in none.
    """
    if not args.ds.lora.rank:
        return
    trained = {f"--{name}.model_name_or_path": getattr(args, name).model_name_or_path for name in ("actor", "critic")}
    if args.ds.load_in_4bit:
        frozen = dict.fromkeys(reward_models(args), "--reward.model_name_or_path")
        for path, name in (frozen | {path: name for name, path in trained.items() if path}).items():
            _check_quantisable(name, path, _without_weights(path, AutoModel))
    layers = [
        layer
        for name, path in trained.items()
        if path
        for layer in _check_adapter(
            args, name, path, _without_weights(path, AutoModelForCausalLM if "actor" in name else AutoModel)
        )
    ]
    for target in [] if args.ds.lora.target_modules == ALL_LINEAR else args.ds.lora.target_modules:
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):  # PEFT's rule
            raise UserError(f"--ds.lora.target_modules {target} matches no layer of policy or critic")


def _without_weights(path: str, auto: Any) -> PreTrainedModel:
    return skeleton(AutoConfig.from_pretrained(path, trust_remote_code=True), auto=auto)


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    """What transformers quantises (integrations/bitsandbytes.py): plain linear layers, and GPT-2's transposed ones."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }


def _check_quantisable(name: str, path: str, model: PreTrainedModel) -> None:
    if before := getattr(model.config, "quantization_config", None):
        method = before.get("quant_method") if isinstance(before, dict) else before.quant_method
        raise UserError(f"{name} {path} is quantised already ({method}); give the unquantised model, as the others")
    held = sum(layer.weight.numel() for layer in _linear(model).values())
    if not held:
        raise UserError(
            f"{name} {path} ({type(model).__name__}) has no linear layer that bitsandbytes could quantise; leave "
            "--ds.load_in_4bit out"
        )
    print(f"abc_plugin: {held / model.num_parameters():.0%} of the weights of {path} in 4 bits, the rest in bf16")


def _check_adapter(args: Namespace, name: str, path: str, model: PreTrainedModel) -> list[str]:
    """The layers that get an adapter."""
    targets, lora = args.ds.lora.target_modules, args.ds.lora
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    linear = sorted({layer.rsplit(".", 1)[-1] for layer, module in _linear(model).items() if module is not tied})
    remedy = f"its linear layers are {', '.join(linear)}"
    try:
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            adapted = get_peft_model(model, config)
    except ValueError as error:
        reason = "match no layer" if "not found" in str(error) or not targets else str(error).split(". ")[0]
        raise UserError(f"--ds.lora.target_modules {_words(targets)} of {name} {path}: {reason}; {remedy}") from None
    matched = adapted.base_model.targeted_module_names
    if tied is not None and any(tied in model.get_submodule(layer).modules() for layer in matched):
        raise UserError(
            f"--ds.lora.target_modules {_words(targets)} of {name} {path}: its output layer is tied to its embedding; "
            f"{remedy}"
        )
    trained, total = adapted.get_nb_trainable_parameters()
    print(f"abc_plugin: LoRA on {len(matched)} layers of {path}: {trained:,} of {total:,} parameters are trained")
    return matched


def _words(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
