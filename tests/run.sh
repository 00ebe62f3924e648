#!/usr/bin/env bash
# Everything that must pass: environment, lint, format, tests. From a clean clone, with nothing installed.
# bash tests/run.sh [pytest arguments], e.g. bash tests/run.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/environment.sh ray
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false KMP_BLOCKTIME=0 OMP_WAIT_POLICY=PASSIVE
if [ $# -gt 0 ]; then exec .venv/bin/python -m pytest --durations=10 "$@"; fi
# The runs on a real cluster by themselves: they have many processes, which give up when they wait too long for each other.
# Five of them are left out: bash tests/run.sh -m more
by_file="-n 2 --dist loadfile --no-loadscope-reorder"
.venv/bin/python -m pytest $by_file --durations=15 --ignore-glob "*/test_ray*.py"
.venv/bin/python -m pytest $by_file --durations=10 -m "not more" tests/host/test_ray.py tests/host/test_ray_rewards.py
