#!/usr/bin/env bash
# Does dense credit help? Trains every run of a plan, several at a time, and compares the methods with error bars.
#
#   bash launch/study/study.sh                                    the embedded study (embedded.yaml), on two cores
#   bash launch/study/study.sh launch/study/conditions.yaml       the same under other conditions; lexicon.yaml: reward model
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
if [ -n "${SMOKE:-}" ] || [[ "$plan" =~ ^"$root"/launch/study/(embedded|conditions|lexicon)\.yaml$ ]]; then
    source "$root/launch/imdb.sh"
    export DEMO=$demo
    if [ -z "${SMOKE:-}" ] && [ "${plan##*/}" = lexicon.yaml ]; then
        if [ -z "${LEXICON:-}" ]; then abc-rlhf prepare --lexicon_reward_model; fi
        export LEXICON=${LEXICON:-$(abc-rlhf prepare --lexicon_reward_model --path)}
    fi
else
    cd "$root"
    if [ -z "${VIRTUAL_ENV:-}" ]; then bash launch/environment.sh; fi  # an active environment is used as it is
    export PATH=${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH TOKENIZERS_PARALLELISM=false
fi
abc-rlhf study "$plan" ${SMOKE:+--smoke} "$@"
