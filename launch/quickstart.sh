#!/usr/bin/env bash
# From nothing installed to a policy trained with Attention Based Credit and a report of it, on a laptop without a GPU.
#
#   bash launch/quickstart.sh                            SmolLM2-135M learns to continue film reviews favourably
#   bash launch/quickstart.sh --train.seed 2             any flag of `abc-rlhf local` can be added or changed
#   OUT=runs/none bash launch/quickstart.sh --reward_shaping none
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/imdb.sh"
out=${OUT:-runs/quickstart}

if [ -e "$out" ] && [ ! -e "$out/before.jsonl" ]; then
    echo "error: $out exists and this script did not make it; set OUT to another directory" >&2
    exit 2
fi
rm -rf "$out"
evaluate "$demo/policy" "$out/before.jsonl" --reward_shaping abc
train "$out" --reward_shaping abc "$@"
evaluate "$out" "$out/after.jsonl" --reward_shaping abc
abc-rlhf report "$out" --before "$out/before.jsonl" --after "$out/after.jsonl"
