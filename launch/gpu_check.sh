#!/usr/bin/env bash
# Whether every claim holds on this machine's GPU: exactness under its kernels, cost, runs, QLoRA, serve-rm.
#
#   bash launch/gpu_check.sh [--minutes N] [--rows TEXT]     a table, in runs/gpu too; status 1 where a claim fails
#   WHEELS=DIR bash launch/gpu_check.sh                      without network: README.md says how to fill DIR
#
# Runs in python3 (PYTHON chooses another), which must have PyTorch with CUDA and transformers. What else is missing is
# installed beside it, into .venv-gpu (VENV); no compiler is needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} venv=${VENV:-.venv-gpu}
"$python" -c 'import torch, transformers' ||
    { echo "error: $python has no PyTorch or no transformers; set PYTHON to one that has both" >&2; exit 2; }

if [ ! -e "$venv/made" ]; then
    "$python" -m venv --clear --without-pip "$venv"
    # The new environment sees all that the old one does, also where that is an environment itself.
    packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$python" -c 'import os, sys; print(*filter(os.path.isdir, sys.path[1:]), sep="\n")' \
        > "$("$venv/bin/python" -c "$packages")/outer.pth"
    pip() {
        DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --use-pep517 \
            ${WHEELS:+--no-index --find-links "$WHEELS"} "$@"
    }
    pip -r launch/requirements-gpu.txt
    "$venv/bin/python" -m pip show --quiet abc-plugin 2>/dev/null || pip -e .  # tells its methods' names
    touch "$venv/made"
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$venv/bin/python" -m abc_plugin bench gpu "$@"
