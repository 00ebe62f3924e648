"""``abc-rlhf study`` with a stand-in for the host: runs of three quick steps that log what their flags decide.

python tests/support/study_stand_in.py study PLAN.yaml …     the command, whose runs are:
python tests/support/study_stand_in.py local --flag value …  one run; it notes its start in $STARTS
python tests/support/study_stand_in.py real study …          with real runs; only its first call asks the host

What a run does follows from its seed: 13 fails unless $MENDED is there, 14 logs NaN, 15 ends a step early, 16 writes
its environment, 17 says nothing at all, 18 logs infinity. With $SLOW a step takes that many seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 3
DEFAULTS = {"reward_shaping": "none", "shaping.beta": 0.8, "train.seed": 42, "algo.advantage.lambd": 1}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """In place of abc_plugin.local.flag_values."""
    given = [dict(zip(words[::2], words[1::2], strict=True)) for words in commands(question)]
    values = [
        {name: typed(flags.get(f"--{name}", DEFAULTS.get(name))) for name in question["names"]} for flags in given
    ]
    steps, gpus = [STEPS] * len(question["commands"]), int(os.environ.get("GPUS", "0"))
    return {"values": values, "steps": steps, "gpus": gpus, "versions": {"torch": os.environ.get("TORCH", "2")}}


def commands(question: dict[str, Any]) -> list[list[str]]:
    return question["commands"] + question["parse_only"]


def typed(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def train(words: list[str]) -> int:
    """One run: events, weights, and the bar that the driver shows."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    flags = dict(zip(words[::2], words[1::2], strict=False))
    settings = [typed(flags.get(f"--{name}", default)) for name, default in DEFAULTS.items()]
    out, seed = Path(flags["--ckpt.output_dir"]), flags["--train.seed"]
    with open(os.environ["STARTS"], "a") as starts:
        starts.write(f"{out.name} {os.getpid()}\n")
    if seed == "13" and not os.path.exists(os.environ.get("MENDED", "")):
        print("loading\nabc-rlhf: error: thirteen is unlucky; take another", file=sys.stderr)
        return 2
    (out / "checkpoints" / "step").mkdir(parents=True)
    (out / "checkpoints" / "step" / "optimizer.pt").write_text("state")
    writer = EventFileWriter(flags["--logger.tensorboard_dir"])
    for step in range(1, STEPS + 1 - (seed == "15")):
        time.sleep(float(os.environ.get("SLOW", "0")))
        odd = {("14", 2): float("nan"), ("18", 1): float("inf")}
        reward = odd.get((seed, step)) or zlib.crc32(f"{settings} {step}".encode()) / 2**32
        logged = {"train/rollout/reward_mean": reward, "train/kl": step / 10, "train/critic_loss": reward / 3}
        if seed == "17":
            del logged["train/rollout/reward_mean"]
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in logged.items()]
        writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        writer.flush()
        print(f"\rPPO: 10%|#    | {step}/{STEPS} [00:01<00:02]", end="", file=sys.stderr, flush=True)
    writer.close()
    (out / "model.safetensors").write_text("weights")
    (out / "environment.json").write_text(json.dumps(dict(os.environ)))
    return 0


def main(words: list[str]) -> int:
    if words[0] == "local":
        return train(words[1:])
    from abc_plugin import cli
    from abc_plugin.tools.study import run_settings, runner

    if words[0] == "real":
        run_settings.ask_host = remembered(run_settings.ask_host)
        return cli.main(words[1:])
    runner.PROGRAM = [sys.executable, __file__]
    runner.POLL = 0.05
    run_settings.ask_host = answer
    return cli.main(words)


def remembered(ask: Callable) -> Callable:
    """``ask``, whose answer is kept in the working directory: two runs of one seed, whether one is there or none."""

    def asked(question: dict[str, Any]) -> dict[str, Any]:
        file = Path("answer.json")
        if not file.exists():
            file.write_text(json.dumps(ask(question)))
        kept = json.loads(file.read_text())
        runs = [question["commands"].index(words) for words in commands(question)]
        return kept | {"values": [kept["values"][run] for run in runs]}

    return asked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
