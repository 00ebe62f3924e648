#!/usr/bin/env bash
# The same without a critic: REINFORCE with the mean of each prompt's samples as baseline, everything on one node of 8
# GPUs that all models and engines share ("hybrid engine").
#
#   POLICY=… REWARD_MODEL=… PROMPTS=… bash launch/ray/reinforce.sh [more flags; the last one counts]
#
# The baseline is subtracted from the scalar reward before it becomes credit, so a response's shaped rewards still sum to
# its advantage. Each token's return is what comes from it on: with abc, credit before a token no longer counts for it.
set -euo pipefail
abc_rlhf=${ABC_RLHF:-abc-rlhf}

$abc_rlhf ray \
    --actor.model_name_or_path "$POLICY" \
    --reward.model_name_or_path "$REWARD_MODEL" \
    --data.prompt_dataset "$PROMPTS" --data.input_key prompt --data.apply_chat_template \
    --train.colocate_all --vllm.enable_sleep --ds.enable_sleep \
    --actor.num_nodes 1 --actor.num_gpus_per_node 8 \
    --ref.num_nodes 1 --ref.num_gpus_per_node 8 \
    --reward.num_nodes 1 --reward.num_gpus_per_node 8 \
    --vllm.num_engines 8 --vllm.tensor_parallel_size 1 --vllm.gpu_memory_utilization 0.6 \
    --data.max_len 2048 --rollout.max_new_tokens 1024 \
    --rollout.batch_size 128 --rollout.micro_batch_size 16 --rollout.n_samples_per_prompt 8 \
    --train.batch_size 1024 --train.micro_batch_size 8 --ds.packing_samples \
    --ds.zero_stage 3 --actor.gradient_checkpointing_enable \
    --actor.adam.lr 5e-7 --algo.kl.init_coef 1e-3 --algo.kl.use_loss --algo.kl.estimator k2 \
    --ckpt.output_dir runs/ray-reinforce --ckpt.path runs/ray-reinforce/checkpoints --ckpt.save_steps 50 \
    --logger.tensorboard_dir runs/ray-reinforce/tensorboard \
    --algo.advantage.estimator reinforce_baseline \
    --reward_shaping abc --shaping.beta 0.8 "$@"
