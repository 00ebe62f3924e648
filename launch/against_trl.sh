#!/usr/bin/env bash
# Speed of `abc-rlhf local` with credit against TRL's PPO trainer (experimental, last shipped in TRL 1.11), on the embedded
# models: runs in turn, seconds per step side by side. About 8 minutes on two idle cores; needs .venv-trl (3 MB).
#
#   bash launch/against_trl.sh                              REPEATS=3 for more pairs
#   bash launch/against_trl.sh --batch 16 --new_tokens 64   another shape
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/imdb.sh"
python=${VIRTUAL_ENV:-$PWD/.venv}/bin/python
if [ ! -e .venv-trl/made ]; then
    "$python" -m venv --clear .venv-trl
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$(.venv-trl/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    .venv-trl/bin/python -m pip install --quiet --no-deps trl==1.11.0 accelerate==1.15.0
    touch .venv-trl/made
fi
out=${OUT:-runs/against_trl}
mkdir -p "$out"
rm -f "$out"/{abc,trl,trl_bf16}-[0-9]*.json
for repeat in $(seq "${REPEATS:-2}"); do
    for side in abc trl trl_bf16; do
        echo "against_trl: $side, $repeat of ${REPEATS:-2}"
        if [ $side = abc ]; then interpreter=$python; else interpreter=.venv-trl/bin/python; fi
        "$interpreter" launch/against_trl.py $side "$demo/policy" "$demo/reward_model" "$demo/prompts.jsonl" \
            "$out/$side-$repeat.json" "$@" > "$out/$side-$repeat.log" 2>&1 || { tail -n 5 "$out/$side-$repeat.log" >&2; exit 1; }
        grep "^tokens per completion" "$out/$side-$repeat.log" || true
    done
done
"$python" - "$out" <<'REPORT'
import json, statistics, sys
from pathlib import Path

for kind in ("wall", "cpu"):
    medians = {}
    for side in ("abc", "trl", "trl_bf16"):
        runs = [json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob(f"{side}-*.json"))]
        medians[side] = [statistics.median(run[kind]) for run in runs]
    for side, values in medians.items():
        seconds, ratio = " ".join(f"{value:.2f}" for value in values), statistics.median(b / a for a, b in zip(medians["abc"], values))
        print(f"{kind}: {side} {seconds} s per step ({runs[0]['batch'] / statistics.median(values):.2f} samples/s), {ratio:.2f} times abc's")
REPORT
