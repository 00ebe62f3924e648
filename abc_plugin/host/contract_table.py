"""What the plugin relies on in OpenRLHF, as data; contract.py checks it."""

from __future__ import annotations

from typing import NamedTuple


class Needs(NamedTuple):
    """One symbol: its signature, and source that must stand in its body (both as ``ast.unparse`` writes them).

    A function's signature is its parameters without annotations; a class's its decorators and bases; that of an
    imported name where it comes from.
    """

    signature: str
    body: tuple[str, ...] = ()


GROUPS = "actor_model_group, critic_model_group, reward_model_group, reference_model_group, vllm_engines"

# File: symbol: what it must be. Every release in SUPPORTED has these.
CONTRACT: dict[str, dict[str, Needs]] = {
    "cli/train_ppo_ray.py": {
        # arguments.parse stops at the first statement; install rebinds the names that train looks up.
        "train": Needs(
            "(args)",
            (
                "if not ray.is_initialized():",
                "strategy = get_strategy(args)",
                "RewardModelActor, pg=pg",
                "CriticModelActor, pg=pg",
                "from openrlhf.trainer.ppo_trainer import PPOTrainer",
                "from openrlhf.trainer.ppo_trainer_async import PPOTrainerAsync as PPOTrainer",
            ),
        ),
        "RewardModelActor": Needs("from openrlhf.trainer.ray.launcher"),
        "CriticModelActor": Needs("from openrlhf.trainer.ray.ppo_critic"),
        "get_strategy": Needs("from openrlhf.utils"),
    },
    "utils/utils.py": {"get_strategy": Needs("(args)", ("args=args",))},
    "utils/deepspeed/deepspeed.py": {
        "DeepspeedStrategy.setup_distributed": Needs(
            "(self, timeout=timedelta(minutes=60))", ("mesh_dim_names=('dp', 'sp', 'tp')", "self.ds_device_mesh =")
        ),
        "DeepspeedStrategy.ring_attn_group": Needs("(self)"),
    },
    "trainer/ray/launcher.py": {
        "RewardModelActor": Needs("@ray.remote class(BaseModelActor)"),
        "RewardModelActor.init_model_from_pretrained": Needs(
            "(self, strategy, pretrain)", ("self.model = self.strategy.prepare(model",)
        ),
        "RewardModelActor.forward": Needs(
            "(self, sequences, attention_mask=None, packed_seq_lens=None, pad_sequence=False)",
            ("reward = self.model(sequences.to(device), attention_mask.to(device)", "return reward.to('cpu')"),
        ),
        "BaseModelActor.execute_batch": Needs("(self, method_name, all_data, start_idx, end_idx)"),
    },
    "trainer/ray/ppo_critic.py": {
        "CriticModelActor": Needs("@ray.remote class(BaseModelActor)"),
        "CriticModelActor.init_model_from_pretrained": Needs(
            "(self, strategy, pretrain, max_steps)", ("self.critic, self.critic_optim, self.critic_scheduler",)
        ),
    },
    # The token that the score is read at, where the attention row is taken.
    "models/model.py": {
        "_get_reward_model.RewardModel.forward": Needs(
            "(self, input_ids=None, attention_mask=None, return_output=False, ring_attn_group=None, "
            "pad_sequence=False, packed_seq_lens=None)",
            (
                "eos_indices = attention_mask.size(1) - 1 - "
                "attention_mask.long().fliplr().argmax(dim=1, keepdim=True)",
                "reward = values.gather(dim=1, index=eos_indices).squeeze(1)",
                "reward = (reward - self.mean) / self.std",
            ),
        ),
        "_get_reward_model.RewardModel.__init__": Needs(
            "(self, config)", ("self.normalize_reward = config.normalize_reward", "self.mean[0] = config.mean")
        ),
        "_get_critic_model.CriticModel.__init__": Needs(
            "(self, config)", ("self.normalize_reward = config.normalize_reward", "self.mean[0] = config.mean")
        ),
    },
    "models/utils.py": {
        "compute_reward": Needs(
            "(r, kl_coef, kl, action_mask=None, reward_clip_range=None)",
            (
                "r = r.clamp(min=reward_clip_range[0], max=reward_clip_range[1])",
                "kl_reward = -kl_coef * kl",
                "last_reward = torch.zeros_like(kl).scatter_(dim=1, index=eos_indices",
                "reward = last_reward + kl_reward",
            ),
        )
    },
    "trainer/ppo_trainer.py": {
        "RemoteExperienceMaker": Needs("from openrlhf.trainer.ppo_utils.experience_maker"),
        "BasePPOTrainer.__init__": Needs(
            f"(self, strategy, {GROUPS}, tokenizer)", ("self.experience_maker = RemoteExperienceMaker(",)
        ),
        "BasePPOTrainer.train_step": Needs(
            "(self, rollout_samples, global_step)", ("self.experience_maker.make_experience_batch(rollout_samples)",)
        ),
        "PPOTrainer": Needs("@ray.remote class(BasePPOTrainer)"),
        "PPOTrainer.__init__": Needs(f"(self, pretrain, strategy, {GROUPS}, **generate_kwargs)"),
    },
    "trainer/ppo_trainer_async.py": {
        "TrainingActor": Needs("@ray.remote class(BasePPOTrainer)"),
        "TrainingActor.__init__": Needs(
            f"(self, pretrain, strategy, {GROUPS}, *, vllm_lock, rollout_queue, rollout_slots)"
        ),
        "PPOTrainerAsync": Needs("@ray.remote class()"),
        "PPOTrainerAsync.__init__": Needs(
            f"(self, pretrain, strategy, {GROUPS}, **generate_kwargs)", ("TrainingActor.remote(",)
        ),
    },
    "trainer/ppo_utils/experience_maker.py": {
        "compute_reward": Needs("from openrlhf.models.utils"),
        "RemoteExperienceMaker": Needs("class()"),
        "RemoteExperienceMaker.__init__": Needs(
            "(self, actor_model_group, critic_model_group, reward_model_group, initial_model_group, kl_controller, "
            "strategy, tokenizer, **kwargs)",
            ("self.args = strategy.args", "self.tokenizer = tokenizer"),
        ),
        "RemoteExperienceMaker.make_experience_batch": Needs(
            "(self, rollout_samples)",
            (
                "self.split_rollout_samples(rollout_samples)",
                "self.make_experience(samples_list)",
                "self.compute_advantages_and_returns(experiences)",
            ),
        ),
        "RemoteExperienceMaker.split_rollout_samples": Needs("(self, rollout_samples)", ("sample.index = [i]",)),
        "RemoteExperienceMaker._dispatch_forward": Needs("(self, group, sync_condition, **kwargs)"),
        "RemoteExperienceMaker._flatten_results": Needs("(self, refs, duplicate_factor)"),
        "RemoteExperienceMaker.make_experience": Needs(
            "(self, samples_list)",
            (
                "self._dispatch_forward(self.reward_model_group",
                "use_reward_model = samples_list[0].rewards is None",
                "rewards_list = self._flatten_results(r_refs, duplicate_factor)",
                "samples.rewards = rewards_list[i]",
                "return samples_list",
            ),
        ),
        # The experience's own mask object is what ties its credit to the call.
        "RemoteExperienceMaker.compute_advantages_and_returns": Needs(
            "(self, experiences)",
            (
                "reward = compute_reward(reward, self.kl_ctl.value, experience.kl, "
                "action_mask=experience.action_mask, reward_clip_range=",
            ),
        ),
    },
    "trainer/ppo_utils/experience.py": {
        "Experience": Needs(
            "@dataclass class()",
            (
                *(f"{name}: torch.Tensor = tensor_field('step'" for name in ("sequences", "kl")),
                "attention_mask: torch.LongTensor = tensor_field('step'",
                "action_mask: torch.BoolTensor = tensor_field('step'",
                "rewards: torch.Tensor = tensor_field('episode'",
                "index: list[int]",
                "prompts: list[str]",
                "info: dict",
            ),
        ),
    },
    # How extra_logs of a remote reward, and so its credit, arrive in an experience's info.
    "trainer/ppo_utils/samples_generator.py": {
        "SamplesGenerator._process_response_into_experience": Needs(
            "(self, response, **generate_kwargs)",
            ("extra_logs = response.get('extra_logs', {})", "info[key] = torch.tensor([value])"),
        ),
    },
}


# What the local driver, ``abc-rlhf evaluate`` and their checks rely on besides, in every release in LOCAL_SUPPORTED.
LOCAL_CONTRACT: dict[str, dict[str, Needs]] = {
    "cli/train_ppo_ray.py": {
        "ray": Needs("import ray"),
        "RayActorGroup": Needs("from openrlhf.trainer.ray.launcher"),
    },
    "trainer/ray/launcher.py": {
        "BaseDistributedActor.__init__": Needs("(self, world_size, rank, master_addr, master_port)"),
        "RayActorGroup.__init__": Needs(
            "(self, num_nodes, num_gpus_per_node, ray_actor_type, pg=None, num_gpus_per_actor=1, duplicate_actors=1, "
            "resources=None, num_resources_per_node=None)"
        ),
        "tqdm": Needs("from tqdm"),
    },
    "trainer/ray/ppo_actor.py": {"tqdm": Needs("from tqdm")},
    "trainer/ray/ppo_critic.py": {"tqdm": Needs("from tqdm")},
    "trainer/ppo_trainer.py": {
        "ray": Needs("import ray"),
        "tqdm": Needs("from tqdm"),
        "BasePPOTrainer.broadcast_to_vllm": Needs("(self)"),
        "PPOTrainer.__init__": Needs(
            f"(self, pretrain, strategy, {GROUPS}, **generate_kwargs)", ("self.samples_generator =",)
        ),
        "PPOTrainer.fit": Needs("(self, global_step=0)", ("self.train_step(rollout_samples, global_step)",)),
    },
    "trainer/ppo_utils/experience_maker.py": {"ray": Needs("import ray")},
    "trainer/ppo_utils/samples_generator.py": {
        "_collect_prompt_batch": Needs(
            "(dataloader_iter, num_prompts)", ("return (prompts, labels, images, exhausted)",)
        ),
        "SamplesGenerator._generate_vllm": Needs(
            "(self, dataloader_iter, num_prompts, dynamic_filtering, **generate_kwargs)"
        ),
    },
    "utils/deepspeed/deepspeed.py": {
        "init_device_mesh": Needs("from torch.distributed.device_mesh"),
        "DeepspeedStrategy.__init__": Needs(
            "(self, seed=42, full_determinism=False, max_norm=0.0, micro_train_batch_size=1, train_batch_size=1, "
            "zero_stage=2, args=None)"
        ),
        "DeepspeedStrategy.get_ds_train_config": Needs("(self, optim_dict=None, *, max_norm=None)"),
    },
    "datasets/prompts_dataset.py": {
        "tqdm": Needs("from tqdm"),
        "PromptDataset.__init__": Needs("(self, dataset, tokenizer, strategy, input_template=None)"),
    },
    "datasets/utils.py": {
        "blending_datasets": Needs(
            "(datasets, probabilities=None, strategy=None, seed=42, max_count=100000000.0, "
            "stopping_strategy='all_exhausted', dataset_split='train')"
        )
    },
    "models/model.py": {
        "get_llm_for_sequence_regression": Needs(
            "(model_name_or_path, model_type, *, param_dtype='bf16', load_in_4bit=False, lora_rank=0, lora_alpha=16, "
            "target_modules=None, lora_dropout=0, normalize_reward=False, attn_implementation='flash_attention_2', "
            "ds_config=None, init_value_head=False, value_head_prefix='score', device_map=None, "
            "packing_samples=False, experts_implementation=None, **kwargs)"
        )
    },
    "utils/utils.py": {
        "get_tokenizer": Needs("(pretrain, model, padding_side='left', strategy=None, use_fast=True)"),
        "convert_to_torch_dtype": Needs("(param_dtype)"),
    },
}
