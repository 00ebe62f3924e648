"""Everything that can be refused before a model is loaded: each check raises a one-line UserError."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from openrlhf.datasets.utils import blending_datasets
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from abc_plugin.attention import attach
from abc_plugin.attention.readers import attach_readers, check_causal
from abc_plugin.config import ShapingConfig
from abc_plugin.credit import methods
from abc_plugin.credit.methods import policy_need
from abc_plugin.errors import UserError
from abc_plugin.host.ensemble import reward_models
from abc_plugin.host.method_checks import check_ensemble, check_method
from abc_plugin.host.options import flag, option, set_option
from abc_plugin.local.lora_checks import adapter_base
from abc_plugin.text.check import side
from abc_plugin.text.compare import Side, compare

READ = 1000  # prompts that both tokenizers read before training

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


def check_supported(args: Namespace) -> None:
    """Refuse flags that a run without engines cannot honour."""
    for path, refused, remedy in UNSUPPORTED:
        value = args
        for name in path.split("."):
            value = getattr(value, name)
        if refused(value):
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


def check_models(
    args: Namespace, shaping: ShapingConfig, prompts: Sequence[str] = (), *, runs_here: bool = True
) -> None:
    """Models have their weights and heads and share a tokenizer, and the attention tap fits the reward model.

    prompts: read by both tokenizers, besides the built-in texts.  runs_here: whether this machine will run the models,
    so that its devices and packages matter.
    """
    for template in ("data.apply_chat_template", "data.input_template"):
        if shaping.reward_text == "chat" and option(args, template):
            raise UserError(
                f"--shaping.reward_text chat needs the bare prompts, but {flag(args, template)} puts them into "
                "another template; use --shaping.reward_text plain"
            )
    check_method(args, shaping)
    check_ensemble(args)
    policy, critic = (option(args, f"{name}.model_name_or_path") for name in ("actor", "critic"))
    policy = adapter_base(policy) or policy
    flags = {name: flag(args, f"{name}.model_name_or_path") for name in ("actor", "reward", "critic")}
    _config(flags["actor"], policy)
    rewards = {path: _config(flags["reward"], path) for path in reward_models(args)}
    _weight_names(flags["actor"], policy)
    for path, config in rewards.items():
        check_reward_head(args, path, config)
    others = dict.fromkeys(rewards, flags["reward"])
    if critic and critic not in rewards:
        _config(flags["critic"], critic)
        others[critic] = flags["critic"]
    ours = _side(args, flags["actor"], policy)
    for path, name in others.items():
        if differences := compare(ours, _side(args, name, path), prompts).dangerous():
            _other_tokenizer(args, shaping, name, path, differences)
    for path, config in rewards.items():
        check_readers(args, path, config, shaping, runs_here=runs_here)
    check_policy(args, shaping, runs_here=runs_here)


def check_positions(args: Namespace) -> None:
    """No sequence is longer than a policy with a table of positions has rows; rotary ones have no such end."""
    path = args.actor.model_name_or_path
    config = AutoConfig.from_pretrained(adapter_base(path) or path, trust_remote_code=True).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit and not hasattr(config, "rope_parameters") and args.data.max_len > limit:
        raise UserError(f"--data.max_len {args.data.max_len} is more than the {limit} positions of {path}: lower it")


def check_readers(
    args: Namespace, path: str, config: object, shaping: ShapingConfig, *, runs_here: bool = True
) -> None:
    """A reward model of this structure can be read as the method needs; no weights are read."""
    needs = methods.load(shaping.method).needs & {"attention", "prefix"} if shaping.dense else frozenset()
    if not needs:
        return
    skeleton = _skeleton(args, "reward.model_name_or_path", path, config, runs_here)
    if "prefix" in needs:
        check_causal(skeleton)
    about = {"layer": shaping.layer, "recovery": shaping.recovery, "heads": shaping.head_list}
    for reader in attach_readers(skeleton, needs & {"attention"}, **about).values():
        reader.close()


def check_policy(args: Namespace, shaping: ShapingConfig, *, runs_here: bool = True) -> None:
    """The policy's attention can be read, where the method needs it."""
    need, path = policy_need(shaping), option(args, "actor.model_name_or_path")
    if need is None:
        return
    if option(args, "ds.ring_attn_size") > 1:
        raise UserError(
            f"--reward_shaping {shaping.method} reads the policy's attention over whole sequences, which "
            f"{flag(args, 'ds.ring_attn_size')} {option(args, 'ds.ring_attn_size')} splits; leave that out, or use abc"
        )
    name = flag(args, "actor.model_name_or_path")
    try:
        path = adapter_base(path) or path
        skeleton = _skeleton(args, "actor.model_name_or_path", path, _config(name, path), runs_here)
        attach(skeleton, layer=shaping.layer, recovery=shaping.recovery).close()
    except UserError as error:
        raise UserError(f"--reward_shaping {shaping.method} reads the policy {path}: {error}") from None


def _other_tokenizer(args: Namespace, shaping: ShapingConfig, name: str, path: str, differences: list[str]) -> None:
    """What ``--shaping.tokenizer_check`` says to a model that reads text otherwise than the policy."""
    policy = option(args, "actor.model_name_or_path")
    is_reward = path in reward_models(args)
    difference = differences[0] + (f" (and {len(differences) - 1} more)" if len(differences) > 1 else "")
    if shaping.tokenizer_check == "off":
        print(
            f"abc_plugin: WARNING: --shaping.tokenizer_check off: {name} {path} reads the policy's ids as its own, "
            f"though {difference}; reward and credit are those of another text"
        )
    elif shaping.tokenizer_check == "strict" or not is_reward:
        remedy = " or --shaping.tokenizer_check map" if is_reward else ""
        raise UserError(
            f"{name} {path} and the policy {policy} must share a tokenizer, but {difference}; use a model trained "
            f"with the policy's tokenizer{remedy}; abc-rlhf check-tokenizers {policy} {path} shows all"
        )
    else:
        print(f"abc_plugin: {name} {path} reads the text in its own tokens: {difference}")
        if option(args, "critic.model_name_or_path") == path:
            # The host's default is the reward model, which cannot read the policy's ids.
            set_option(args, "critic.model_name_or_path", policy)
            print(f"abc_plugin: the critic starts from the policy {policy}, whose tokens it reads")


def _side(args: Namespace, name: str, path: str) -> Side:
    try:
        return side(path, use_fast=not option(args, "data.disable_fast_tokenizer"))
    except UserError as error:
        raise UserError(f"{name} {error}") from None


def _skeleton(args: Namespace, model: str, path: str, config: object, runs_here: bool) -> PreTrainedModel:
    """A model of this structure without weights, under the attention implementation that the run uses."""
    implementation = option(args, "ds.attn_implementation")
    try:
        with torch.device("meta"):
            skeleton = AutoModel.from_config(
                config, attn_implementation=implementation if runs_here else "eager", trust_remote_code=True
            )
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{flag(args, model)} {path} does not run under "
            f"{flag(args, 'ds.attn_implementation')} {implementation}: {str(error).split('. ')[0]}"
        ) from None
    skeleton.config._attn_implementation = implementation  # a driver's machine need not be able to run the kernels
    return skeleton


def is_absent(path: str) -> bool:
    """Whether ``path`` names a directory, rather than a model of the hub, and it is not on this machine."""
    return not Path(path).expanduser().is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1)


def _config(name: str, path: str) -> object:
    if is_absent(path):
        raise UserError(f"{name} {path}: no such directory")
    if base := adapter_base(path):
        raise UserError(f"{name} {path} is a LoRA adapter of {base}; merge it into that first")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} {path} is not a Hugging Face model: {str(error).splitlines()[0]}") from None


def check_reward_head(args: Namespace, path: str, config: object) -> None:
    """Without its head in the checkpoint, transformers would give the reward model a random one and only warn."""
    name = flag(args, "reward.model_name_or_path")
    prefix = getattr(config, "value_head_prefix", option(args, "ds.value_head_prefix"))
    if f"{prefix}.weight" not in _weight_names(name, path):
        raise UserError(
            f"{name} {path} has no weight {prefix}.weight: it is no reward model, or its scalar head has another "
            f"name, which {flag(args, 'ds.value_head_prefix')} can give"
        )


def _weight_names(name: str, path: str) -> set[str]:
    """Names of a checkpoint's tensors, of a directory or from the hub. Raises UserError when it has no weights."""
    readers = {
        SAFE_WEIGHTS_INDEX_NAME: _indexed,
        SAFE_WEIGHTS_NAME: _in_safetensors,
        WEIGHTS_INDEX_NAME: _indexed,
        WEIGHTS_NAME: lambda file: set(torch.load(file, map_location="meta", weights_only=True)),
    }
    for file_name, read in readers.items():
        file = cached_file(
            path,
            file_name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is not None:
            return read(file)
    raise UserError(f"{name} {path} has no weights ({SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}); save the model there")


def _indexed(file: str) -> set[str]:
    return set(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"])


def _in_safetensors(file: str) -> set[str]:
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys())


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
