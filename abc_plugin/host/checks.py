"""Everything that can be refused before a model is loaded: each check raises a one-line UserError."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import torch
from openrlhf.datasets.utils import blending_datasets
from transformers import AutoConfig, AutoModel, AutoTokenizer

from abc_plugin.credit import methods
from abc_plugin.errors import UserError
from abc_plugin.recovery.tap import AttentionTap
from abc_plugin.tokenizers import first_difference

# Flags that mean something only with engines or several processes: (attribute path, refused value, what to do).
UNSUPPORTED = (
    ("reward.remote_url", bool, "a remote reward is called by vLLM engines; give --reward.model_name_or_path"),
    ("train.async_enable", bool, "one process cannot roll out while it trains; leave it out"),
    ("algo.dynamic_filtering_enable", bool, "it needs a remote reward; leave it out"),
    ("eval.dataset", bool, "OpenRLHF evaluates remote rewards only; use abc-rlhf evaluate"),
    ("ds.packing_samples", bool, "packed sequences need flash-attn and engines; leave it out"),
    ("reward.normalize_enable", bool, "OpenRLHF loses the mean and deviation while loading the model; leave it out"),
    ("ds.load_in_4bit", bool, "4-bit weights are not supported by this driver; leave it out"),
    ("ds.ring_attn_size", lambda size: size > 1, "ring attention needs several processes; leave it out"),
    ("ds.tensor_parallel_size", lambda size: size > 1, "tensor parallelism needs several processes; leave it out"),
    ("data.max_images_per_prompt", bool, "text only; leave it out"),
)


def check_supported(args: Namespace) -> None:
    """Refuse flags that one process without engines cannot honour."""
    for path, refused, remedy in UNSUPPORTED:
        value = args
        for name in path.split("."):
            value = getattr(value, name)
        if refused(value):
            raise UserError(f"--{path} {value} does not work with abc-rlhf local: {remedy}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: abc-rlhf local runs one process; start it with python"
        )
    if "flash" in args.ds.attn_implementation and not torch.cuda.is_available():
        raise UserError(
            f"--ds.attn_implementation {args.ds.attn_implementation} needs a CUDA device and there is none; use sdpa"
        )


def check_models(args: Namespace) -> None:
    """Paths exist, the reward model has its head, the attention tap fits, and the tokenizers are the same."""
    configs = {
        flag: _config(flag, path)
        for flag, path in (
            ("--actor.model_name_or_path", args.actor.model_name_or_path),
            ("--reward.model_name_or_path", args.reward.model_name_or_path),
            *(
                [("--critic.model_name_or_path", args.critic.model_name_or_path)]
                if args.critic.model_name_or_path
                else []
            ),
        )
    }
    reward_config = configs["--reward.model_name_or_path"]
    _check_reward_head(args.reward.model_name_or_path, reward_config, args.ds.value_head_prefix)
    policy, reward_model = (
        AutoTokenizer.from_pretrained(path, trust_remote_code=True, use_fast=not args.data.disable_fast_tokenizer)
        for path in (args.actor.model_name_or_path, args.reward.model_name_or_path)
    )
    if difference := first_difference(policy, reward_model):
        raise UserError(
            f"policy and reward model must share a tokenizer, but {difference} (policy "
            f"{args.actor.model_name_or_path}, reward model {args.reward.model_name_or_path}); use a reward model "
            "trained with the policy's tokenizer"
        )
    if args.shaping.dense and methods.load(args.shaping.method).needs_attention:
        _check_tap(args, reward_config)


def _check_tap(args: Namespace, reward_config: object) -> None:
    """The attention tap attaches to a model of this structure; no weights are read."""
    implementation = args.ds.attn_implementation
    try:
        with torch.device("meta"):
            skeleton = AutoModel.from_config(reward_config, attn_implementation=implementation, trust_remote_code=True)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"--reward.model_name_or_path {args.reward.model_name_or_path} does not run under "
            f"--ds.attn_implementation {implementation}: {str(error).split('. ')[0]}"
        ) from None
    AttentionTap(skeleton, layer=args.shaping.layer).close()


def _config(flag: str, path: str | None) -> object:
    if not path:
        raise UserError(f"{flag} is missing; give a directory with a Hugging Face model (abc-rlhf prepare makes one)")
    if not Path(path).expanduser().is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"{flag} {path}: no such directory")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path} is not a Hugging Face model: {str(error).splitlines()[0]}") from None


def _check_reward_head(path: str, config: object, prefix: str) -> None:
    """Without its head in the checkpoint, transformers would give the reward model a random one and only warn."""
    prefix = getattr(config, "value_head_prefix", prefix)
    names = _weight_names(Path(path).expanduser())
    if names is not None and f"{prefix}.weight" not in names:
        raise UserError(
            f"--reward.model_name_or_path {path} has no weight {prefix}.weight: it is no reward model, or its scalar "
            f"head has another name, which --ds.value_head_prefix can give"
        )


def _weight_names(path: Path) -> set[str] | None:
    """Names of a local safetensors checkpoint's tensors; None when it is stored otherwise."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.exists():
        return set(json.loads(index.read_text())["weight_map"])
    if single.exists():
        from safetensors import safe_open

        with safe_open(single, "pt") as file:
            return set(file.keys())
    return None


def check_data(args: Namespace) -> int:
    """The prompt dataset can be read and has enough prompts for one step. Returns their number."""
    count = len(read_prompts(args))
    if count * args.rollout.n_samples_per_prompt < max(args.rollout.batch_size, args.train.batch_size):
        raise UserError(
            f"--data.prompt_dataset {args.data.prompt_dataset} has {count} prompts, fewer than one step needs: lower "
            f"--rollout.batch_size {args.rollout.batch_size} and --train.batch_size {args.train.batch_size}"
        )
    return count


def read_prompts(args: Namespace) -> list:
    """The first ``--data.max_samples`` prompts; refuses a missing key and an empty prompt."""
    flag, keys = f"--data.prompt_dataset {args.data.prompt_dataset}", {"input": args.data.input_key}
    if not args.data.prompt_dataset:
        raise UserError("--data.prompt_dataset is missing; give a JSONL file of prompts (abc-rlhf prepare makes one)")
    if args.data.label_key:
        keys["label"] = args.data.label_key
    quiet = SimpleNamespace(print=lambda *_: None, is_rank_0=lambda: False, args=args)
    try:
        data = blending_datasets(
            args.data.prompt_dataset,
            args.data.prompt_probs,
            quiet,
            args.train.seed,
            dataset_split=args.data.prompt_split,
        )
    except Exception as error:  # datasets raises many kinds; each means the same to the user
        raise UserError(f"{flag} cannot be read: {str(error).splitlines()[0]}") from None
    for name, key in keys.items():
        if key not in data.column_names:
            raise UserError(f"{flag} has no key {key!r}, only {', '.join(data.column_names)}; set --data.{name}_key")
    prompts = list(data.select(range(min(args.data.max_samples, len(data))))[args.data.input_key])
    for row, prompt in enumerate(prompts):
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise UserError(
                f"{flag} has an empty prompt in row {row + 1} (key {args.data.input_key!r}); remove the row"
            )
    return prompts
