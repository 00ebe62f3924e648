#!/usr/bin/env bash
# The paper's third task on one GPU: a 7B OpenLLaMA answers questions, judged by a 3B reward model, by QLoRA.
#
#   bash launch/paper/hh_openllama.sh [flags]       models and questions from the Hugging Face hub; the last flag counts
#   POLICY=… REWARD_MODEL=… bash launch/paper/hh_openllama.sh                                 others
#   SMOKE=1 bash launch/paper/hh_openllama.sh       see common.sh
#
# Should the two tokenizers differ (the run says so before it loads anything), add --shaping.tokenizer_check map.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
out=${OUT:-runs/paper/hh}
POLICY=${POLICY:-VMware/open-llama-7b-open-instruct}
REWARD_MODEL=${REWARD_MODEL:-weqweasdas/hh_rlhf_rm_open_llama_3b}
PROMPTS=${PROMPTS:-$out/prompts.jsonl}
if [ ! -e "$PROMPTS" ]; then python launch/paper/prompts.py hh "$PROMPTS"; fi

train "$out" 6 256 "${qlora[@]}" --local.share_base \
    --data.max_len 512 --rollout.batch_size 16 --rollout.micro_batch_size $((16 / ${RANKS:-1})) --train.max_epochs 10 \
    --data.max_samples 2400 "${smoke[@]}" "$@"
