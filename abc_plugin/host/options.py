"""OpenRLHF's settings by their present dotted names, for hosts that still have flat ones (before 0.10.2)."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

# dotted name: flat name
FLAT = {
    "actor.model_name_or_path": "pretrain",
    "critic.model_name_or_path": "critic_pretrain",
    "reward.model_name_or_path": "reward_pretrain",
    "reward.remote_url": "remote_rm_url",
    "algo.advantage.estimator": "advantage_estimator",
    "reward.offload": "ref_reward_offload",
    "reward.normalize_enable": "normalize_reward",
    "train.agent_func_path": "agent_func_path",
    "ckpt.load_enable": "load_checkpoint",
    "ckpt.output_dir": "save_path",
    "data.input_template": "input_template",
    "data.apply_chat_template": "apply_chat_template",
    "data.disable_fast_tokenizer": "disable_fast_tokenizer",
    "ds.attn_implementation": "attn_implementation",
    "ds.load_in_4bit": "load_in_4bit",
    "ds.lora.rank": "lora_rank",
    "ds.ring_attn_size": "ring_attn_size",
    "ds.tensor_parallel_size": "ds_tensor_parallel_size",
    "ds.value_head_prefix": "value_head_prefix",
    "ds.zero_stage": "zero_stage",
}


def option(args: Namespace, name: str) -> Any:
    """The value of the host's setting ``name``, wherever this version of OpenRLHF keeps it."""
    if hasattr(args, FLAT[name]):
        return getattr(args, FLAT[name])
    for part in name.split("."):
        args = getattr(args, part)
    return args


def set_option(args: Namespace, name: str, value: Any) -> None:
    """Give the host's setting ``name`` another value."""
    if hasattr(args, FLAT[name]):
        setattr(args, FLAT[name], value)
        return
    *parents, last = name.split(".")
    for part in parents:
        args = getattr(args, part)
    setattr(args, last, value)


def flag(args: Namespace, name: str) -> str:
    """The command-line flag of that setting in this version, for messages."""
    return f"--{FLAT[name]}" if hasattr(args, FLAT[name]) else f"--{name}"
