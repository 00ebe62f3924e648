#!/usr/bin/env bash
# Everything that must pass: environment, lint, format, tests. From a clean clone, with nothing installed.
# bash tests/run.sh [pytest arguments], e.g. bash tests/run.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/environment.sh ray
.venv/bin/ruff check .
.venv/bin/ruff format --check .
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false KMP_BLOCKTIME=0 OMP_WAIT_POLICY=PASSIVE
exec .venv/bin/python -m pytest -n 2 --dist loadfile --durations=25 "$@"
