"""What the plugin overrides and calls in OpenRLHF: the versions that have it, and a check of each signature."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from abc_plugin.errors import UserError

SUPPORTED = ">=0.10.2,<0.12"
LOCAL_SUPPORTED = ">=0.11,<0.12"  # before 0.11 train() needs vLLM engines
TESTED = "0.11.2"  # what the remedies install

GROUPS = "actor_model_group, critic_model_group, reward_model_group, reference_model_group, vllm_engines"
MAKER = "trainer.ppo_utils.experience_maker:RemoteExperienceMaker"

# Module below openrlhf, and a name in it: its parameters; "..." where others may follow, None for what has none.
SIGNATURES: dict[str, str | None] = {
    "cli.train_ppo_ray:train": "args",
    "cli.train_ppo_ray:get_strategy": "args",
    "cli.train_ppo_ray:PolicyModelActor": None,
    "cli.train_ppo_ray:RewardModelActor": None,
    "cli.train_ppo_ray:CriticModelActor": None,
    "utils.utils:get_strategy": "args",
    "utils.deepspeed:DeepspeedStrategy.ring_attn_group": None,
    "trainer.ray.launcher:RewardModelActor.init_model_from_pretrained": "self, strategy, pretrain",
    "trainer.ray.launcher:RewardModelActor.forward": "self, sequences, attention_mask, packed_seq_lens, pad_sequence",
    "trainer.ray.ppo_actor:PolicyModelActor.init_model_from_pretrained": (
        "self, strategy, pretrain, max_steps, vllm_engines"
    ),
    "trainer.ray.ppo_actor:PolicyModelActor.forward": "self, sequences, action_mask, attention_mask, ...",
    "trainer.ray.ppo_critic:CriticModelActor.init_model_from_pretrained": "self, strategy, pretrain, max_steps",
    "models.utils:compute_reward": "r, kl_coef, kl, action_mask, reward_clip_range",
    "trainer.ppo_trainer:RemoteExperienceMaker": None,
    "trainer.ppo_trainer:BasePPOTrainer.__init__": f"self, strategy, {GROUPS}, tokenizer",
    "trainer.ppo_trainer:BasePPOTrainer.train_step": "self, rollout_samples, global_step",
    "trainer.ppo_trainer:PPOTrainer": None,
    "trainer.ppo_trainer_async:GenerateSamplesActor": None,
    "trainer.ppo_trainer_async:TrainingActor": None,
    "trainer.ppo_utils.samples_generator:SamplesGenerator._process_response_into_experience": (
        "self, response, **generate_kwargs"
    ),
    "trainer.ppo_trainer_async:PPOTrainerAsync": None,
    MAKER: (
        "actor_model_group, critic_model_group, reward_model_group, initial_model_group, kl_controller, strategy, "
        "tokenizer, **kwargs"
    ),
    f"{MAKER}.make_experience_batch": "self, rollout_samples",
    f"{MAKER}.split_rollout_samples": "self, rollout_samples",
    f"{MAKER}.make_experience": "self, samples_list",
    f"{MAKER}._dispatch_forward": "self, group, sync_condition, **kwargs",
    f"{MAKER}._flatten_results": "self, refs, duplicate_factor",
    f"{MAKER}.compute_advantages_and_returns": "self, experiences",
    f"{MAKER}.get_advantages_and_returns": "self, values, rewards, action_mask, gamma, lambd",
    f"{MAKER}.get_cumulative_returns": "self, rewards, action_mask, gamma",
    "trainer.ppo_utils.experience:Experience": (
        "sequences, attention_mask, action_mask, action_log_probs, base_action_log_probs, rollout_log_probs, values, "
        "returns, advantages, kl, rewards, scores, response_length, truncated, total_length, index, prompts, labels, "
        "images, mm_train_inputs, info"
    ),
}

# What the local driver, ``abc-rlhf evaluate`` and their checks override and call besides.
LOCAL_SIGNATURES: dict[str, str | None] = {
    "cli.train_ppo_ray:RayActorGroup": (
        "num_nodes, num_gpus_per_node, ray_actor_type, pg, num_gpus_per_actor, duplicate_actors, resources, "
        "num_resources_per_node"
    ),
    "trainer.ray.launcher:BaseDistributedActor.__init__": "self, world_size, rank, master_addr, master_port",
    "trainer.ray.launcher:BaseModelActor.execute_batch": "self, method_name, all_data, start_idx, end_idx",
    "trainer.ray.launcher:ReferenceModelActor.init_model_from_pretrained": "self, strategy, pretrain",
    "trainer.ray.launcher:ReferenceModelActor.forward": (
        "self, sequences, action_mask, attention_mask, return_output, packed_seq_lens, mm_train_inputs_list"
    ),
    "trainer.ray.ppo_actor:ActorPPOTrainer": "strategy, actor, ...",
    "trainer.ppo_trainer:BasePPOTrainer.broadcast_to_vllm": "self",
    "trainer.ppo_trainer:BasePPOTrainer.init_checkpoint_states": "self",
    "trainer.ppo_trainer:BasePPOTrainer.save_logs_and_checkpoints": "self, global_step, logs_dict, client_states",
    "trainer.ppo_trainer:PPOTrainer.fit": "self, global_step",
    "trainer.ppo_utils.samples_generator:_collect_prompt_batch": "dataloader_iter, num_prompts",
    "trainer.ppo_utils.samples_generator:SamplesGenerator.generate_samples": "self, **generate_kwargs",
    "trainer.ppo_utils.samples_generator:SamplesGenerator._generate_vllm": (
        "self, dataloader_iter, num_prompts, dynamic_filtering, **generate_kwargs"
    ),
    "utils.deepspeed:DeepspeedStrategy": (
        "seed, full_determinism, max_norm, micro_train_batch_size, train_batch_size, zero_stage, args"
    ),
    "utils.deepspeed:DeepspeedStrategy.get_ds_train_config": "self, optim_dict, max_norm",
    "utils.deepspeed:DeepspeedStrategy.save_ckpt": (
        "self, model, save_dir, tag, max_num, max_mem, client_state, save_latest, metric_value, metric_key"
    ),
    "utils.deepspeed:DeepspeedStrategy.load_ckpt": (
        "self, model, load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states, "
        "load_module_only"
    ),
    "utils.deepspeed:DeepspeedStrategy.prepare": "self, *args",
    "utils.deepspeed:DeepspeedStrategy.save_model": "self, model, tokenizer, output_dir, **kwargs",
    "utils.deepspeed:DeepspeedStrategy._unwrap_model": "self, model",
    "datasets.prompts_dataset:PromptDataset": "dataset, tokenizer, strategy, input_template",
    "datasets.utils:blending_datasets": "datasets, probabilities, strategy, seed, max_count, ...",
    "models.model:_get_critic_model": "base_pretrained_model, base_llm_model, value_head_prefix, packing_samples",
    "models.model:get_llm_for_sequence_regression": "model_name_or_path, model_type, ...",
    "models.actor:Actor": "pretrain_or_model, ...",
    "utils.utils:get_tokenizer": "pretrain, model, padding_side, strategy, use_fast",
    "utils.utils:convert_to_torch_dtype": "param_dtype",
}


def check_version(*, local: bool = False) -> None:
    """Raises UserError unless a supported OpenRLHF is installed, or a pre-release of one; imports nothing of it."""
    supported = LOCAL_SUPPORTED if local else SUPPORTED
    remedy = f"pip install --no-deps openrlhf=={TESTED}"
    try:
        version = importlib.metadata.version("openrlhf")
        fits = SpecifierSet(supported).contains(Version(version), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"OpenRLHF is not installed; {remedy}, or --no-deps -e on its repository") from None
    except InvalidVersion:
        fits = False
    if not fits:
        who = "abc-rlhf local" if local else "abc_plugin"
        raise UserError(f"OpenRLHF {version} is not supported: {who} needs {supported}; {remedy}")


def check_signatures(*, local: bool = False) -> None:
    """Raises UserError naming the first symbol that the imported OpenRLHF lacks or has otherwise."""
    if wrong := differences(SIGNATURES | LOCAL_SIGNATURES if local else SIGNATURES):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        version, package = importlib.metadata.version("openrlhf"), importlib.import_module("openrlhf").__path__[0]
        raise UserError(
            f"OpenRLHF {version} in {package} is not what abc_plugin was written against: {wrong[0]}{more}; "
            f"pip install --no-deps --force-reinstall openrlhf=={TESTED}"
        )


def differences(signatures: dict[str, str | None]) -> list[str]:
    """One line for every symbol that is missing or has other parameters; empty is good."""
    lines = []
    for symbol, expected in signatures.items():
        try:
            actual = parameters(symbol) if expected is not None else _resolve(symbol)
        except (ImportError, AttributeError) as error:
            lines.append(f"{symbol}: missing ({error})")
            continue
        if expected is None or actual == expected:
            continue
        if not (expected.endswith(", ...") and f"{actual}, ".startswith(expected.removesuffix("..."))):
            lines.append(f"{symbol}: expected ({expected}), not ({actual})")
    return lines


def parameters(symbol: str) -> str:
    """Names of its parameters, e.g. ``self, value, **kwargs``; of a class, of its constructor's."""
    value = inspect.unwrap(_resolve(symbol))
    listed = inspect.signature(getattr(value, "__func__", value)).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    # Ray's actor classes bind their methods, and add a parameter of their own.
    return ", ".join(stars.get(one.kind, "") + one.name for one in listed if one.name != "_ray_trace_ctx")


def _resolve(symbol: str) -> Any:
    return pkgutil.resolve_name(f"openrlhf.{symbol}")
