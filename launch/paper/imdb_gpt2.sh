#!/usr/bin/env bash
# The paper's first task on one GPU: GPT-2 continues film reviews favourably. All weights are trained (124M; about 6 GB).
#
#   bash launch/paper/imdb_gpt2.sh                            models and reviews from the Hugging Face hub
#   REWARD_MODEL=… bash launch/paper/imdb_gpt2.sh [flags]     any flag of `abc-rlhf local`; the last one counts
#   SMOKE=1 bash launch/paper/imdb_gpt2.sh                    see common.sh
#
# The reward is logit(positive) - logit(negative) of a GPT-2 classifier of reviews: CLASSIFIER=… is one with two labels,
# which is turned into a reward model with that scalar head.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
out=${OUT:-runs/paper/imdb}
POLICY=${POLICY:-lvwerra/gpt2-imdb}
PROMPTS=${PROMPTS:-$out/prompts.jsonl}
if [ -z "${REWARD_MODEL:-}" ]; then
    REWARD_MODEL=$out/reward_model
    if [ ! -e "$REWARD_MODEL" ]; then
        python launch/paper/scalar_head.py "${CLASSIFIER:?a GPT-2 sequence classifier of reviews with labels 0 and 1}" "$REWARD_MODEL"
    fi
fi
if [ ! -e "$PROMPTS" ]; then python launch/paper/prompts.py imdb "$PROMPTS"; fi

train "$out" 6 48 \
    --data.max_len 64 --rollout.batch_size 16 --rollout.micro_batch_size $((16 / ${RANKS:-1})) --train.max_epochs 4 \
    --data.max_samples 2400 "${smoke[@]}" "$@"
