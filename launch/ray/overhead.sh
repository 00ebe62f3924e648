#!/usr/bin/env bash
# What credit costs in the whole real pipeline: the CPU smoke with and without it, in turn, and the seconds of a step
# side by side. About 12 minutes on two idle cores.
#
#   bash launch/ray/overhead.sh                     REPEATS=3 for more pairs; any flag of OpenRLHF can be added
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bash launch/environment.sh ray
out=${OUT:-runs/ray-overhead}
export DEMO=${DEMO:-$(.venv/bin/abc-rlhf prepare --path)}
mkdir -p "$(dirname "$out")"
runs=()
for repeat in $(seq "${REPEATS:-2}"); do
    for method in none abc; do
        run=$out/$method-$repeat
        OUT=$run bash launch/ray/cpu_smoke.sh --reward_shaping $method --train.seed "$repeat" \
            --data.max_samples 64 --data.max_len 128 --rollout.max_new_tokens 32 "$@" > "$out-$method-$repeat.log" 2>&1 ||
            { tail -n 5 "$out-$method-$repeat.log" >&2; exit 1; }
        runs+=("$method#$repeat=$run")
    done
done
.venv/bin/abc-rlhf report "$out/none-1" --out "$out" --compare "${runs[@]}"
