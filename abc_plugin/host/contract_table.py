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

STEP_TENSORS = ("sequences", "kl", "values", "returns", "advantages")

# File: symbol: what it must be. Every release in SUPPORTED has these.
CONTRACT: dict[str, dict[str, Needs]] = {
    "cli/train_ppo_ray.py": {
        # arguments.parse stops at the first statement; install rebinds the names that train looks up.
        "train": Needs(
            "(args)",
            (
                "if not ray.is_initialized():",
                "strategy = get_strategy(args)",
                "PolicyModelActor, pg=pg",
                "RewardModelActor, pg=pg",
                "CriticModelActor, pg=pg",
                "from openrlhf.trainer.ppo_trainer import PPOTrainer",
                "from openrlhf.trainer.ppo_trainer_async import PPOTrainerAsync as PPOTrainer",
            ),
        ),
        "PolicyModelActor": Needs("from openrlhf.trainer.ray.ppo_actor"),
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
    "trainer/ray/ppo_actor.py": {
        "PolicyModelActor": Needs(
            "@ray.remote class(BaseModelActor)",
            (
                "= self.actor(sequences.to(device), action_mask.to(device), attention_mask.to(device)",
                "self.actor.eval()",
                "return action_log_probs.to('cpu')",
            ),
        ),
        "PolicyModelActor.init_model_from_pretrained": Needs(
            "(self, strategy, pretrain, max_steps=None, vllm_engines=None)",
            ("self.actor, self.actor_optim, self.actor_scheduler = strategy.prepare(",),
        ),
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
            f"(self, strategy, {GROUPS}, tokenizer)",
            (
                "self.experience_maker = RemoteExperienceMaker(",
                "self.wandb_logger = WandbLogger(self.args)",
                "self.tensorboard_logger = TensorboardLogger(self.args)",
            ),
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
                "self._dispatch_forward(self.actor_model_group",
                "action_log_probs_list = self._flatten_results(action_log_probs_ref, duplicate_factor)",
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
                *(f"{name}: torch.Tensor = tensor_field('step'" for name in STEP_TENSORS),
                "attention_mask: torch.LongTensor = tensor_field('step'",
                "action_mask: torch.BoolTensor = tensor_field('step'",
                "rewards: torch.Tensor = tensor_field('episode'",
                "truncated: torch.Tensor = tensor_field('episode'",
                "index: list[int]",
                "prompts: list[str]",
                "info: dict",
            ),
        ),
    },
    # Where heat maps go.
    "utils/logging_utils.py": {
        "WandbLogger.__init__": Needs("(self, args)", ("self.handle = wandb",)),
        "TensorboardLogger.__init__": Needs("(self, args)", ("self.writer = SummaryWriter(",)),
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
        # With LoRA the reference is the policy, so that must be loaded first.
        "ReferenceModelActor": Needs("from openrlhf.trainer.ray.launcher"),
        "train": Needs(
            "(args)",
            (
                "refs.extend(actor_model.async_init_model_from_pretrained(strategy, args.actor.model_name_or_path, "
                "max_steps, vllm_engines))\n    if ref_model is not None:\n        "
                "refs.extend(ref_model.async_init_model_from_pretrained(strategy, args.actor.model_name_or_path))",
            ),
        ),
    },
    "trainer/ray/launcher.py": {
        "BaseDistributedActor.__init__": Needs("(self, world_size, rank, master_addr, master_port)"),
        "ReferenceModelActor.init_model_from_pretrained": Needs("(self, strategy, pretrain)"),
        "ReferenceModelActor.forward": Needs(
            "(self, sequences, action_mask=None, attention_mask=None, return_output=False, packed_seq_lens=None, "
            "mm_train_inputs_list=None)",
            ("with torch.no_grad():", "log_probs = self.model("),
        ),
        "RayActorGroup.__init__": Needs(
            "(self, num_nodes, num_gpus_per_node, ray_actor_type, pg=None, num_gpus_per_actor=1, duplicate_actors=1, "
            "resources=None, num_resources_per_node=None)"
        ),
        "tqdm": Needs("from tqdm"),
    },
    "trainer/ray/ppo_actor.py": {
        "tqdm": Needs("from tqdm"),
        "ActorPPOTrainer": Needs("class(ABC)", ("self.replay_buffer = NaiveReplayBuffer(",)),
    },
    "trainer/ray/ppo_critic.py": {"tqdm": Needs("from tqdm")},
    "trainer/ppo_trainer.py": {
        "ray": Needs("import ray"),
        "tqdm": Needs("from tqdm"),
        "BasePPOTrainer.broadcast_to_vllm": Needs("(self)"),
        "PPOTrainer.__init__": Needs(
            f"(self, pretrain, strategy, {GROUPS}, **generate_kwargs)", ("self.samples_generator =",)
        ),
        # Where a run resumes, and what it restores then.
        "BasePPOTrainer.init_checkpoint_states": Needs("(self)"),
        "BasePPOTrainer.save_logs_and_checkpoints": Needs("(self, global_step, logs_dict=None, client_states=None)"),
        "PPOTrainer.fit": Needs(
            "(self, global_step=0)",
            (
                "self.train_step(rollout_samples, global_step)",
                "start_episode = checkpoint_states['episode']",
                "if state_dict:",
                "for episode in range(start_episode, self.args.train.num_episodes):",
                "client_states = {'episode': episode,",
            ),
        ),
    },
    "trainer/ppo_utils/experience_maker.py": {"ray": Needs("import ray")},
    "trainer/ppo_utils/samples_generator.py": {
        "_collect_prompt_batch": Needs(
            "(dataloader_iter, num_prompts)", ("return (prompts, labels, images, exhausted)",)
        ),
        "SamplesGenerator.generate_samples": Needs(
            "(self, **generate_kwargs)",
            (
                "self._dataloader_iter = iter(self.prompts_dataloader)",
                "self._dataloader_iter = None",
                "self._sample_buffer = self._sample_buffer[chunk_size:]",
            ),
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
        "DeepspeedStrategy.save_ckpt": Needs(
            "(self, model, save_dir, tag=None, max_num=3, max_mem=1000, client_state=None, save_latest=True, "
            "metric_value=None, metric_key=None)",
            ("model.save_checkpoint(save_dir, tag=tag",),
        ),
        "DeepspeedStrategy.load_ckpt": Needs(
            "(self, model, load_dir, tag=None, load_module_strict=True, load_optimizer_states=True, "
            "load_lr_scheduler_states=True, load_module_only=False)"
        ),
        "DeepspeedStrategy.prepare": Needs("(self, *args)"),
        "DeepspeedStrategy.save_model": Needs("(self, model, tokenizer, output_dir, **kwargs)"),
        "DeepspeedStrategy._unwrap_model": Needs("(self, model)"),
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
        "LoraConfig": Needs("from peft"),
        "_get_critic_model": Needs(
            "(base_pretrained_model, base_llm_model, value_head_prefix='score', packing_samples=False)",
            ("setattr(self, self.base_model_prefix, base_llm_model(config))", "self.value_head_prefix = value_head"),
        ),
        "get_llm_for_sequence_regression": Needs(
            "(model_name_or_path, model_type, *, param_dtype='bf16', load_in_4bit=False, lora_rank=0, lora_alpha=16, "
            "target_modules=None, lora_dropout=0, normalize_reward=False, attn_implementation='flash_attention_2', "
            "ds_config=None, init_value_head=False, value_head_prefix='score', device_map=None, "
            "packing_samples=False, experts_implementation=None, **kwargs)",
            (
                "value_head_prefix = getattr(config, 'value_head_prefix', value_head_prefix)",
                "cls_class = _get_critic_model(base_pretrained_class, base_class, value_head_prefix, packing_samples)",
                "lora_config = LoraConfig(r=lora_rank",
                "value_head.weight.data.normal_(mean=0.0, std=1 / (config.hidden_size + 1))",
            ),
        ),
    },
    "models/actor.py": {
        "Actor": Needs("class(nn.Module)", ("self.model = get_peft_model(self.model, lora_config)",)),
    },
    "utils/utils.py": {
        "get_tokenizer": Needs("(pretrain, model, padding_side='left', strategy=None, use_fast=True)"),
        "convert_to_torch_dtype": Needs("(param_dtype)"),
    },
}
