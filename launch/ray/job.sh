#!/usr/bin/env bash
# Submits one of the other scripts as a Ray job, from any machine that reaches the cluster's dashboard.
#
#   RAY_ADDRESS=http://HEAD:8265 POLICY=… REWARD_MODEL=… PROMPTS=… bash launch/ray/job.sh launch/ray/gae.sh [flags]
#
# abc_plugin must be installed on every node, like OpenRLHF (its methods are found by their entry points, which
# uploading a working directory does not bring). The paths are those of the nodes.
set -euo pipefail
script=$1
env_json=$(python3 -c 'import json, os; names = ("POLICY", "REWARD_MODEL", "PROMPTS", "URL", "ABC_RLHF", "HF_TOKEN", "NCCL_DEBUG")
print(json.dumps({"working_dir": os.path.dirname(os.path.abspath("'"$script"'")),
                  "env_vars": {name: os.environ[name] for name in names if name in os.environ}}))')
${RAY:-ray} job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" --runtime-env-json "$env_json" \
    -- bash "$(basename "$script")" "${@:2}"
