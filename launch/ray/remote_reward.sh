#!/usr/bin/env bash
# A reward model on a machine of its own: it is served over HTTP, and its replies carry the credit.
#
#   reward machine:  REWARD_MODEL=… bash launch/ray/remote_reward.sh serve [flags of abc-rlhf serve-rm]
#   cluster:         POLICY=… PROMPTS=… URL=http://REWARD:5000/get_reward bash launch/ray/remote_reward.sh train [flags]
#
# The server sees text only; its credit comes back as spans of characters, so that it needs not share the tokenizer.
# Several servers: URL=http://A:5000/get_reward,http://B:5000/get_reward
set -euo pipefail
abc_rlhf=${ABC_RLHF:-abc-rlhf}
case ${1:?serve or train} in
serve)
    $abc_rlhf serve-rm --reward.model_name_or_path "$REWARD_MODEL" --data.max_len 2048 --batch_size 16 "${@:2}"
    ;;
train)
    $abc_rlhf ray \
        --actor.model_name_or_path "$POLICY" \
        --reward.remote_url "$URL" \
        --data.prompt_dataset "$PROMPTS" --data.input_key prompt --data.apply_chat_template \
        --train.colocate_all --vllm.enable_sleep --ds.enable_sleep \
        --actor.num_nodes 1 --actor.num_gpus_per_node 8 --ref.num_nodes 1 --ref.num_gpus_per_node 8 \
        --vllm.num_engines 8 --vllm.tensor_parallel_size 1 --vllm.gpu_memory_utilization 0.6 \
        --data.max_len 2048 --rollout.max_new_tokens 1024 \
        --rollout.batch_size 128 --rollout.micro_batch_size 16 --rollout.n_samples_per_prompt 8 \
        --train.batch_size 1024 --train.micro_batch_size 8 --ds.packing_samples --ds.zero_stage 3 \
        --actor.adam.lr 5e-7 --algo.kl.init_coef 1e-3 --algo.kl.use_loss --algo.kl.estimator k2 \
        --algo.advantage.estimator rloo \
        --ckpt.output_dir runs/ray-remote --ckpt.path runs/ray-remote/checkpoints --ckpt.save_steps 50 \
        --logger.tensorboard_dir runs/ray-remote/tensorboard \
        --reward_shaping abc --shaping.beta 0.8 "${@:2}"
    ;;
*)
    echo "error: say serve or train" >&2
    exit 2
    ;;
esac
