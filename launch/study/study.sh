#!/usr/bin/env bash
# Does dense credit help? Trains every run of a plan, several at a time, and compares the methods with error bars.
#
#   bash launch/study/study.sh                                    the embedded study (embedded.yaml), on two cores
#   bash launch/study/study.sh launch/study/conditions.yaml       the same under other conditions; lexicon.yaml: reward model;
#                                                                 embedded_horizon.yaml: signed credit at a short horizon
#   bash launch/study/study.sh launch/study/small.yaml            which method for which run: many runs of a small policy
#   bash launch/study/study.sh launch/study/horizon.yaml          the decisive ones of them, with more seeds
#   bash launch/study/study.sh launch/study/paper_imdb.yaml       the paper's tasks, on a GPU; plans say what they need
#   bash launch/study/study.sh PLAN.yaml --jobs 4 --out runs/mine a plan of yours; options of `abc-rlhf study`
#   SMOKE=1 bash launch/study/study.sh [PLAN.yaml]                the plan in small, on the embedded models
#
# When it is stopped, the same command goes on; runs that are finished are kept.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
case "${1:-}" in
    "" | -*) plan=$root/launch/study/embedded.yaml ;;
    *) plan=$(realpath "$1") && shift ;;
esac
if [ -n "${SMOKE:-}" ]; then
    source "$root/launch/imdb.sh"
    export DEMO=$demo SMALL=$demo OTHER=$demo LEXICON=$demo
else
    cd "$root"
    if [ -z "${VIRTUAL_ENV:-}" ]; then bash launch/environment.sh; fi  # an active environment is used as it is
    export PATH=${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH TOKENIZERS_PARALLELISM=false
    export KMP_BLOCKTIME=0 OMP_WAIT_POLICY=PASSIVE  # as in launch/imdb.sh
    export GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184
    named=$(sed -s '/^smoke:/,$d' "$plan" "${plan%/*}/$(sed -n 's/^like: *//p' "$plan")" 2>/dev/null || true)
    while read -r name made; do  # what the plan names and nobody has set
        if [[ "$named" == *"\${$name}"* && -z "${!name:-}" ]]; then
            abc-rlhf prepare $made
            export "$name=$(abc-rlhf prepare $made --path)"
        fi
    done <<< $'DEMO\nSMALL --small_models\nOTHER --other_reward_model\nLEXICON --lexicon_reward_model'
fi
abc-rlhf study "$plan" ${SMOKE:+--smoke} "$@"
