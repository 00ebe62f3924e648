#!/usr/bin/env bash
# PPO with credit on all GPUs of this machine by torchrun, with ZeRO-3; without GPUs, two processes.
#
#   POLICY=… REWARD_MODEL=… PROMPTS=… bash launch/torchrun.sh [flags]     any flag of `abc-rlhf local`; the last one counts
#   RANKS=4 bash launch/torchrun.sh                                       four of them
#   SMOKE=1 bash launch/torchrun.sh                                       two short steps with the embedded default
#
# Started again after a crash, it goes on from the last complete checkpoint.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"
torchrun --standalone --nproc_per_node "$ranks" -m abc_plugin local "${flags[@]}" "${smoke[@]}" "$@"
