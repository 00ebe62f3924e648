"""Runs of ``abc-rlhf local``, each a process of its own, forked from one that imported OpenRLHF once.

python tests/support/local_runs.py 10      kills ten runs at random moments, and compares each with one that was not
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "support")]  # when it is run as a script

import conftest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

# Twelve prompts in rollouts of eight: every second step is half a rollout and ends an episode.
RESUMABLE = {
    "train.num_episodes": 3,
    "data.max_samples": 12,
    "train.batch_size": 4,
    "train.micro_batch_size": 2,
    "ckpt.save_steps": 1,
    "ckpt.max_num": 1,
    "algo.kl.target": 0.01,
    "algo.kl.horizon": 100,
    "reward_shaping": "abc",
}
STEPS = 6


class LocalRuns:
    """``run`` starts the driver in a fork of one process that imported the host once."""

    def __init__(self) -> None:
        words = [sys.executable, __file__, "serve"]
        self.server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        flags: list[str],
        *,
        ranks: int = 1,
        variant: tuple[str, Any] | None = None,
        end: tuple[Path, float, int] | None = None,
    ) -> tuple[int, str]:
        """(exit status, or minus the signal; what it printed).

        variant: a function of ``run_variants`` for its process, and its argument.  end: a path, seconds and a signal,
        which is sent so long after the run has made the path.
        """
        with tempfile.NamedTemporaryFile("r") as output:
            self._write({"flags": flags, "output": output.name, "ranks": ranks, "variant": variant})
            pids = json.loads(self.server.stdout.readline())
            if end:
                path, seconds, number = end
                deadline = time.time() + 200
                while not path.exists() and time.time() < deadline:
                    time.sleep(0.02)
                time.sleep(seconds)
                for pid in pids:
                    os.kill(pid, number)
            self._write("wait")
            return json.loads(self.server.stdout.readline()), output.read()

    def done(self, flags: list[str], **kwargs: Any) -> str:
        """What a run printed that must succeed."""
        status, output = self.run(flags, **kwargs)
        assert status == 0, output[-3000:]
        return output

    def _write(self, message: object) -> None:
        self.server.stdin.write(json.dumps(message) + "\n")
        self.server.stdin.flush()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(60)


def serve() -> None:
    """Forks a run per line of standard input; waits for it only once the other side has ended it, or will not."""
    from abc_plugin.host.import_openrlhf import import_host

    import_host()
    import abc_plugin.local.driver  # noqa: F401

    for line in sys.stdin:
        order, pids = json.loads(line), []
        port = random.randrange(20000, 30000)
        for rank in range(order["ranks"]):
            if (pid := os.fork()) == 0:
                _run_forked(order, rank, port)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        sys.stdin.readline()
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes[0]), flush=True)


def _run_forked(order: dict, rank: int, port: int) -> None:
    import run_variants

    from abc_plugin.cli import main

    output = os.open(order["output"] if rank == 0 else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2), os.close(0)
    if order["ranks"] > 1:
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in launched.items()} | {"MASTER_ADDR": "127.0.0.1"}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit it ignored
    torch.set_num_threads(1)
    name, argument = order["variant"] or ("unchanged", None)
    code = 1
    try:
        code = getattr(run_variants, name)(argument)
        if code is None:
            code = main(["local", *order["flags"]])
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def weights(out: Path) -> dict[str, torch.Tensor]:
    [file] = [path for name in ("model", "adapter_model") if (path := out / f"{name}.safetensors").exists()]
    return load_file(file)


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: (step, value) by tag."""
    [directory] = (out / "tensorboard").iterdir()
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def untimed(figures: dict) -> dict:
    return {name: value for name, value in figures.items() if "timing" not in str(name) and name != "seconds"}


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def history(out: Path, step: int = STEPS) -> dict[int, dict]:
    """The steps' figures in full precision, from the last checkpoint."""
    state = torch.load(out / "checkpoints" / "complete" / f"global_step{step}" / "rank0.pt", weights_only=True)
    return dict(enumerate(map(untimed, state["history"]), start=1))


def differences(one: Path, other: Path, step: int = STEPS) -> list[str]:
    """What differs between two runs' results; times left out."""
    pairs = [
        [untimed(read(out)) for out in (one, other)] for read in (scalars, summary, lambda out: history(out, step))
    ]
    differing = [
        f"{name}: {a.get(name)} and {b.get(name)}"
        for a, b in pairs
        for name in sorted(a.keys() | b.keys(), key=str)
        if a.get(name) != b.get(name)
    ]
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return differing + [f"weight {name}" for name in first if not torch.equal(first[name], second[name])]


def killed_at_random(runs: LocalRuns, tiny: Path, whole: Path, out: Path, times: int) -> tuple[str, list[str]]:
    """A run killed ``times`` times, within a random step each: what each left on disk, and what differs in the end."""
    flags = conftest.local_flags(tiny, out, **RESUMABLE | {"ckpt.load_enable": True})
    step_takes = summary(whole)["seconds"] / (STEPS + 2)
    kills = []
    for step in sorted(random.sample(range(1, STEPS), times)):
        saving = out / "checkpoints" / "_actor" / f"global_step{step}"
        status, _ = runs.run(flags, end=(saving, random.random() * step_takes, signal.SIGKILL))
        left = sorted(str(path.relative_to(out)) for path in out.glob("checkpoints/*/global_step*"))
        complete = [path.parent.name for path in out.rglob("manifest.json")]
        kills.append(f"{'killed' if status < 0 else 'had ended'}, complete {complete}, there {left}")
    status, output = runs.run(flags)
    return "; ".join(kills), differences(whole, out) if status == 0 else [output[-500:]]


def kill_at_random(times: int) -> int:
    """Kill -9 runs, some of them several times, at random moments of training; returns how many ended otherwise."""
    from abc_plugin.tools.demo.tiny_models import make_tiny

    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        root, runs = Path(directory), LocalRuns()
        (root / "tiny").mkdir()
        make_tiny(root / "tiny")
        runs.done(conftest.local_flags(root / "tiny", root / "whole", **RESUMABLE))
        for trial in range(1, times + 1):
            out = root / f"run{trial}"
            kills, wrong = killed_at_random(runs, root / "tiny", root / "whole", out, random.choice((1, 1, 2, 3)))
            failed += bool(wrong)
            print(f"{trial}: {kills}: {wrong or 'identical'}", flush=True)
            shutil.rmtree(out)
        runs.close()
    print(f"{times - failed} of {times} killed runs ended as the one that was not")
    return failed


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else sys.exit(kill_at_random(int(sys.argv[1])))
