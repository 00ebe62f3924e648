#!/usr/bin/env bash
# The quickstart's setting for several methods and seeds with everything else equal, and a report that compares them.
#
#   bash launch/compare.sh                               none, uniform and abc, 3 seeds: about 50 minutes on two cores
#   METHODS="none abc" SEEDS="1 2" bash launch/compare.sh --algo.advantage.lambd 1
#
# Runs that are done already (they have an after.jsonl) are kept, so a second call goes on where the first stopped. JOBS
# runs go on at the same time, each with its share of the cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/imdb.sh"
out=${OUT:-runs/compare} methods=${METHODS:-none uniform abc} seeds=${SEEDS:-1 2 3} jobs=${JOBS:-2}
export OMP_NUM_THREADS=$((($(nproc) + jobs - 1) / jobs))

trap 'kill $(jobs -rp) 2>/dev/null || true' EXIT

one_run() {  # RUN METHOD SEED [flags]
    rm -rf "$1" && mkdir -p "$1"
    { train "$1" --reward_shaping "$2" --train.seed "$3" "${@:4}" &&
        evaluate "$1" "$1/after.jsonl" --reward_shaping "$2"; } > "$1/output.log" 2>&1 || touch "$1/failed"
}

compared=()
for seed in $seeds; do
    for method in $methods; do
        run=$out/$method-$seed
        compared+=("$method#$seed=$run")
        [ -e "$run/after.jsonl" ] && continue
        while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
        echo "compare: $method, seed $seed, in $run"
        one_run "$run" "$method" "$seed" "$@" &
    done
done
wait
if ls "$out"/*/failed > /dev/null 2>&1; then
    for failed in "$out"/*/failed; do tail -n 3 "${failed%failed}output.log" >&2; done
    echo "error: failed: $(ls "$out"/*/failed); the output.log beside each says why" >&2
    exit 1
fi
first=${compared[0]#*=}
abc-rlhf report "$first" --out "$out" --compare "${compared[@]}"
