"""What the files of a model and of the prompts say, before anything is loaded."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from openrlhf.datasets.utils import blending_datasets
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from abc_plugin.errors import UserError


def reward_models(args: Namespace) -> list[str]:
    """The paths of ``--reward.model_name_or_path``, which has commas between several."""
    return [path.strip() for path in (args.reward.model_name_or_path or "").split(",") if path.strip()]


def is_absent(path: str) -> bool:
    """Whether ``path`` names a directory, rather than a model of the hub, and it is not on this machine."""
    return not Path(path).expanduser().is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1)


def adapter_base(path: str) -> str | None:
    """The base model's path where ``path`` is a directory that PEFT wrote, else None."""
    file = Path(path).expanduser() / "adapter_config.json"
    return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] if file.is_file() else None


def read_config(flag: str, path: str) -> PretrainedConfig:
    """The model's config. Raises UserError naming ``flag`` where there is no model, or an adapter only."""
    if is_absent(path):
        raise UserError(f"{flag} {path}: no such directory")
    if base := adapter_base(path):
        raise UserError(f"{flag} {path} is a LoRA adapter of {base}; merge it into that first")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path} is not a Hugging Face model: {str(error).splitlines()[0]}") from None


def check_reward_head(args: Namespace, path: str, config: PretrainedConfig) -> None:
    """Without its head in the checkpoint, transformers would give the reward model a random one and only warn."""
    flag = "--reward.model_name_or_path"
    prefix = getattr(config, "value_head_prefix", args.ds.value_head_prefix)
    if f"{prefix}.weight" not in weight_names(flag, path):
        raise UserError(
            f"{flag} {path} has no weight {prefix}.weight: it is no reward model, or its scalar head has another "
            "name, which --ds.value_head_prefix can give"
        )


def weight_names(flag: str, path: str) -> set[str]:
    """Names of a checkpoint's tensors, of a directory or from the hub. Raises UserError when it has no weights."""
    quiet = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)
    for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME):
        file = cached_file(path, name, **quiet)
        if file is None:
            continue
        if name.endswith(".json"):
            return set(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"])
        if name == WEIGHTS_NAME:
            return set(torch.load(file, map_location="meta", weights_only=True))
        with safe_open(file, "pt") as tensors:
            return set(tensors.keys())
    raise UserError(f"{flag} {path} has no weights ({SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}); save the model there")


def quiet_strategy(args: Namespace) -> SimpleNamespace:
    """What the host's dataset functions want of a strategy, without its output."""
    return SimpleNamespace(print=lambda *_: None, is_rank_0=lambda: False, args=args)


def read_data(args: Namespace) -> Dataset:
    """The prompt dataset as the host reads it; refuses a missing key and a prompt that is empty or no text."""
    data_args = args.data
    source = f"--data.prompt_dataset {data_args.prompt_dataset}"
    try:
        data = blending_datasets(
            data_args.prompt_dataset,
            data_args.prompt_probs,
            quiet_strategy(args),
            args.train.seed,
            max_count=data_args.max_samples,
            dataset_split=data_args.prompt_split,
        )
    except Exception as error:  # datasets raises many kinds; each means the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        split = f"split {data_args.prompt_split!r}"
        raise UserError(f"{source} ({split}) cannot be read: {reason}") from None
    for name, key in (("input", data_args.input_key), ("label", data_args.label_key)):
        if key and key not in data.column_names:
            raise UserError(f"{source} has no key {key!r}, only {', '.join(data.column_names)}; set --data.{name}_key")
    data = data.select(range(min(data_args.max_samples, len(data))))
    for row, prompt in enumerate(data[data_args.input_key], start=1):
        where = f"in row {row} (key {data_args.input_key!r})"
        if prompt is None or prompt == [] or (isinstance(prompt, str) and not prompt.strip()):
            raise UserError(f"{source} has an empty prompt {where}; remove the row")
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and data_args.apply_chat_template):
            raise UserError(
                f"{source} has a prompt that is no text {where}: {str(prompt)[:60]}; give strings, or lists of "
                "messages with --data.apply_chat_template"
            )
    return data
