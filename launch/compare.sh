#!/usr/bin/env bash
# The quickstart's setting for several methods and seeds with everything else equal, and a report that compares them.
#
#   bash launch/compare.sh                               none, uniform and abc, 3 seeds: about 50 minutes on two cores
#   METHODS="none abc" SEEDS="1 2" bash launch/compare.sh --algo.advantage.lambd 1
#
# Runs that are done already (they have a summary.json) are kept, so a second call goes on where the first stopped. JOBS
# runs go on at the same time, each with its share of the cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/imdb.sh"
out=${OUT:-runs/compare} methods=${METHODS:-none uniform abc} seeds=${SEEDS:-1 2 3} jobs=${JOBS:-2}
export OMP_NUM_THREADS=$((($(nproc) + jobs - 1) / jobs))

compared=()
for seed in $seeds; do
    for method in $methods; do
        run=$out/$method-$seed
        compared+=("$method#$seed=$run")
        [ -e "$run/summary.json" ] && continue
        while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
        echo "compare: $method, seed $seed, in $run"
        rm -rf "$run" && mkdir -p "$run"
        {
            train "$run" --reward_shaping "$method" --train.seed "$seed" "$@"
            evaluate "$run" "$run/after.jsonl" --reward_shaping "$method"
        } > "$run/output.log" 2>&1 &
    done
done
wait
first=${compared[0]#*=}
abc-rlhf report "$first" --out "$out" --compare "${compared[@]}"
