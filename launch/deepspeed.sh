#!/usr/bin/env bash
# PPO with credit on all GPUs of this machine by DeepSpeed's launcher, with ZeRO-3; without GPUs, two processes.
#
#   POLICY=… REWARD_MODEL=… PROMPTS=… bash launch/deepspeed.sh [flags]    any flag of `abc-rlhf local`; the last one counts
#   RANKS=4 bash launch/deepspeed.sh                                      four of them
#   SMOKE=1 bash launch/deepspeed.sh                                      two short steps with the embedded default
#
# Started again after a crash, it goes on from the last complete checkpoint.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"
deepspeed --num_gpus "$ranks" --module abc_plugin local "${flags[@]}" "${smoke[@]}" "$@"
