#!/usr/bin/env bash
# The paper's second task on one GPU: GPT-J-6B summarises Reddit posts, by QLoRA.
#
#   POLICY=… REWARD_MODEL=… bash launch/paper/tldr_gptj.sh [flags]     any flag of `abc-rlhf local`; the last one counts
#   SMOKE=1 bash launch/paper/tldr_gptj.sh                             see common.sh
#
# POLICY: GPT-J-6B after supervised fine-tuning on TL;DR. REWARD_MODEL: GPT-J-6B with a scalar head trained on the
# comparisons. The paper publishes neither; OpenRLHF trains both (openrlhf.cli.train_sft, openrlhf.cli.train_rm).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${POLICY:?GPT-J after supervised fine-tuning on TL;DR}" "${REWARD_MODEL:?GPT-J with a scalar head trained on the comparisons}"
PROMPTS=${PROMPTS:-trl-lib/tldr}

train "${OUT:-runs/paper/tldr}" 6 53 "${qlora[@]}" --local.share_base \
    --data.max_len 565 --rollout.batch_size 4 --rollout.micro_batch_size $((4 / ${RANKS:-1})) --train.max_epochs 4 \
    --data.max_samples 600 "${smoke[@]}" "$@"
