#!/usr/bin/env bash
# The whole real stack (Ray, DeepSpeed, vLLM's CPU build, OpenRLHF's own command line) on a laptop without a GPU: three
# PPO steps with credit. About 2 minutes on two cores once .venv-ray is there; it takes 1.3 GB more than .venv.
#
#   bash launch/ray/cpu_smoke.sh                          random models of two layers
#   DEMO=$(abc-rlhf prepare --path) bash launch/ray/cpu_smoke.sh       SmolLM2-135M and its reward model, 8 GB of memory
#   bash launch/ray/cpu_smoke.sh --train.async_enable     any flag of OpenRLHF
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash launch/environment.sh ray
export PATH=$PWD/.venv-ray/bin:$PATH HF_HUB_OFFLINE=1
out=${OUT:-runs/ray-smoke}
rm -rf "$out"
demo=${DEMO:-$out/models}
if [ -z "${DEMO:-}" ]; then python -c 'import sys; from abc_plugin.tools.demo.tiny_models import make_tiny; make_tiny(sys.argv[1])' "$demo"; fi

abc-rlhf ray --on_cpu \
    --actor.model_name_or_path "$demo/policy" --reward.model_name_or_path "$demo/reward_model" \
    --data.prompt_dataset "$demo/prompts.jsonl" --data.max_samples 24 \
    --actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 --critic.num_gpus_per_node 1 --reward.num_gpus_per_node 1 \
    --vllm.num_engines 1 --vllm.enforce_eager --ds.attn_implementation sdpa \
    --data.max_len 64 --rollout.max_new_tokens 16 --rollout.batch_size 8 --rollout.micro_batch_size 4 \
    --train.batch_size 8 --train.micro_batch_size 4 --actor.adam.lr 1e-4 --critic.adam.lr 1e-4 \
    --ckpt.output_dir "$out" --ckpt.path "$out/checkpoints" --logger.tensorboard_dir "$out/tensorboard" \
    --algo.advantage.lambd 0.95 --reward_shaping abc "$@"
