#!/usr/bin/env bash
# PPO with a critic (GAE) and dense credit on a Ray cluster: 2 nodes of 8 GPUs, an 8B policy and an 8B reward model.
#
#   node 1:  ray start --head --num-gpus 8
#   node 2:  ray start --address NODE1:6379 --num-gpus 8
#   node 1:  POLICY=… REWARD_MODEL=… PROMPTS=… bash launch/ray/gae.sh [more flags; the last one counts]
#
# OpenRLHF, vLLM, flash-attn and abc_plugin are installed on both nodes. Everything but the last two lines of flags is
# OpenRLHF's own script. Policy and reward model share a tokenizer.
set -euo pipefail
abc_rlhf=${ABC_RLHF:-abc-rlhf}

# 16 GPUs: policy and reference share 8, critic and reward model share 4, and 4 are vLLM engines. Lambda below 1 makes
# the critic bootstrap, which is where credit that comes early can help (the paper's runs used 0.95; the host's default
# is 1).
$abc_rlhf ray \
    --actor.model_name_or_path "$POLICY" \
    --reward.model_name_or_path "$REWARD_MODEL" \
    --data.prompt_dataset "$PROMPTS" --data.input_key prompt --data.apply_chat_template \
    --actor.num_nodes 1 --actor.num_gpus_per_node 8 \
    --ref.num_nodes 1 --ref.num_gpus_per_node 8 --train.colocate_actor_ref \
    --critic.num_nodes 1 --critic.num_gpus_per_node 4 \
    --reward.num_nodes 1 --reward.num_gpus_per_node 4 --train.colocate_critic_reward \
    --vllm.num_engines 4 --vllm.tensor_parallel_size 1 --vllm.gpu_memory_utilization 0.9 \
    --data.max_len 2048 --rollout.max_new_tokens 1024 \
    --rollout.batch_size 1024 --rollout.micro_batch_size 16 --rollout.n_samples_per_prompt 1 \
    --train.batch_size 128 --train.micro_batch_size 8 --ds.packing_samples \
    --ds.zero_stage 3 --actor.gradient_checkpointing_enable \
    --actor.adam.lr 5e-7 --critic.adam.lr 9e-6 --algo.kl.init_coef 0.01 \
    --ckpt.output_dir runs/ray-gae --ckpt.path runs/ray-gae/checkpoints --ckpt.save_steps 50 \
    --logger.tensorboard_dir runs/ray-gae/tensorboard \
    --algo.advantage.estimator gae --algo.advantage.lambd 0.95 \
    --reward_shaping abc --shaping.beta 0.8 "$@"
