#!/usr/bin/env bash
# The quickstart with a reward model of another family and tokenizer: SmolLM2 writes, a GPT-2 with GPT-2's tokens judges.
# The reward model reads the text in its own tokens, and its credit comes back to the policy's tokens by characters.
#
#   bash launch/other_tokenizer.sh                              the first time, trains that GPT-2 (a few minutes)
#   bash launch/other_tokenizer.sh --train.seed 2               any flag of `abc-rlhf local` can be added or changed
#   OTHER=DIR OUT=runs/other bash launch/other_tokenizer.sh     any reward model: DIR/reward_model
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/imdb.sh"
out=${OUT:-runs/other_tokenizer}

if [ -e "$out" ] && [ ! -e "$out/before.jsonl" ]; then
    echo "error: $out exists and this script did not make it; set OUT to another directory" >&2
    exit 2
fi
if [ -z "${OTHER:-}" ]; then abc-rlhf prepare --other_reward_model; fi
other=${OTHER:-$(abc-rlhf prepare --other_reward_model --path)}
mapped=(--reward.model_name_or_path "$other/reward_model" --shaping.tokenizer_check map --reward_shaping abc)
# A judge of few layers, so all are trained, at lower rates.
all=(--local.train_layers 0 --data.max_samples 960 --actor.adam.lr 6e-5 --critic.adam.lr 1e-4 --algo.kl.init_coef 0.1)

rm -rf "$out"
evaluate "$demo/policy" "$out/before.jsonl" "${mapped[@]}"
train "$out" "${mapped[@]}" "${all[@]}" "$@"
evaluate "$out" "$out/after.jsonl" "${mapped[@]}"
abc-rlhf report "$out" --before "$out/before.jsonl" --after "$out/after.jsonl"
