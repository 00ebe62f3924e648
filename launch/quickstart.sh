#!/usr/bin/env bash
# From nothing installed to a policy trained with Attention Based Credit and a report of it, on a laptop without a GPU.
#
#   bash launch/quickstart.sh                            SmolLM2-135M learns to continue film reviews favourably
#   bash launch/quickstart.sh --train.seed 2             any flag of `abc-rlhf local` can be added or changed
#   OUT=runs/none bash launch/quickstart.sh --reward_shaping none
#
# About 12 minutes the first time on two cores (3 for the environment, 3 for the reward model), 6 afterwards.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-runs/quickstart}
HOME_DIR=${ABC_HOME:-$HOME/.cache/abc_plugin}

bash launch/environment.sh
export PATH=$PWD/.venv/bin:$PATH
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export KMP_BLOCKTIME=0 OMP_WAIT_POLICY=PASSIVE  # threads that wait must not spin: two to three times faster on few cores

abc-rlhf prepare
DEMO=$(abc-rlhf prepare --path)

rm -rf "$OUT"
common=(
    --reward.model_name_or_path "$DEMO/reward_model"
    --data.max_len 64 --rollout.max_new_tokens 16 --rollout.micro_batch_size 32
    --reward_shaping abc
)
evaluate() { abc-rlhf evaluate --actor.model_name_or_path "$1" --data.prompt_dataset "$DEMO/heldout.jsonl" --data.max_samples 128 "${common[@]}" --out "$OUT/$2.jsonl"; }

evaluate "$DEMO/policy" before
abc-rlhf local "${common[@]}" \
    --actor.model_name_or_path "$DEMO/policy" \
    --data.prompt_dataset "$DEMO/prompts.jsonl" --data.max_samples 1280 \
    --rollout.batch_size 32 --train.batch_size 16 --train.micro_batch_size 16 \
    --actor.adam.lr 2e-5 --critic.adam.lr 5e-5 \
    --algo.advantage.lambd 0.95 --algo.kl.init_coef 0.05 \
    --ckpt.output_dir "$OUT" --ckpt.path "$OUT/checkpoints" \
    "$@"
evaluate "$OUT" after
abc-rlhf report "$OUT" --before "$OUT/before.jsonl" --after "$OUT/after.jsonl"
