"""Runs of the local driver that are killed and resumed, each a process of its own, forked from one with the host.

python tests/support/resume_runs.py 10      kills ten runs at random moments, and compares each with one that was not
"""

from __future__ import annotations

import io
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

import conftest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Twelve prompts in rollouts of eight: every second step is half a rollout and ends an episode.
SETTINGS = {
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


class Runs:
    """``run`` starts the driver in a fork of one process that imported the host once."""

    def __init__(self) -> None:
        words = [sys.executable, __file__, "serve"]
        self.server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        flags: list[str],
        said: Path,
        *,
        point: str = "",
        step: int = 0,
        ranks: int = 1,
        kill_after: tuple[Path, float] | None = None,
    ) -> tuple[int, str]:
        """Returns (exit status, or minus the signal; what it printed).

        Killed at a point of a step, or some seconds after a path, which it makes, is there.
        """
        order = {"flags": flags, "said": str(said), "point": point, "step": step, "ranks": ranks}
        self._write(order)
        pids = json.loads(self.server.stdout.readline())
        if kill_after:
            path, seconds = kill_after
            deadline = time.time() + 200
            while not path.exists() and time.time() < deadline:
                time.sleep(0.02)
            time.sleep(seconds)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        self._write("wait")
        status = json.loads(self.server.stdout.readline())
        return status, said.read_text()

    def _write(self, message: object) -> None:
        self.server.stdin.write(json.dumps(message) + "\n")
        self.server.stdin.flush()

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(60)


def serve() -> None:
    """Forks a run per line of standard input; waits for it only once the other side has killed it, or will not."""
    from abc_plugin.host.imports import import_host

    import_host()
    import abc_plugin.local.driver
    import abc_plugin.local.lora
    import abc_plugin.local.trainer  # noqa: F401

    for line in sys.stdin:
        order, pids = json.loads(line), []
        port = random.randrange(20000, 30000)
        for rank in range(order["ranks"]):
            if (pid := os.fork()) == 0:
                child(order, rank, port)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        sys.stdin.readline()
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes[0]), flush=True)


def child(order: dict, rank: int, port: int) -> None:
    from abc_plugin.cli import main

    said = os.open(order["said"] if rank == 0 else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2), os.close(0)
    if order["ranks"] > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"]}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if order["point"]:
        POINTS[order["point"]](order["step"])
    code = 1
    try:
        code = main(["local", *order["flags"]])
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def within_a_file(step: int) -> None:
    """Half of the policy's optimiser state is written."""
    save = torch.save

    def half(value: object, path: object, *args: object, **kwargs: object) -> None:
        if f"_actor/global_step{step}/" in str(path) and "optim_states" in str(path):
            whole = io.BytesIO()
            save(value, whole)
            with open(path, "wb") as file:
                file.write(whole.getvalue()[: whole.tell() // 2])
            die()
        save(value, path, *args, **kwargs)

    torch.save = half


def between_the_models(step: int) -> None:
    """The policy's checkpoint is whole, the critic's not begun."""
    from openrlhf.trainer.ray.ppo_critic import CriticModelActor

    from abc_plugin.host.install import undecorated

    critic = undecorated(CriticModelActor)
    save = critic.save_checkpoint

    def save_checkpoint(self: object, tag: str, **kwargs: object) -> None:
        if tag == f"global_step{step}":
            die()
        save(self, tag, **kwargs)

    critic.save_checkpoint = save_checkpoint


def before_the_manifest(step: int) -> None:
    """All files are whole, but nothing says so."""
    from abc_plugin.local import checkpoints

    write = checkpoints.write_whole

    def write_whole(path: Path, text: str) -> None:
        if path.parent.name == f"global_step{step}":
            die()
        write(path, text)

    checkpoints.write_whole = write_whole


def while_removing(step: int) -> None:
    """The new checkpoint is complete, the old one half removed."""
    from abc_plugin.local import checkpoints

    remove = shutil.rmtree

    def rmtree(path: Path, **kwargs: object) -> None:
        remove(path, **kwargs)
        if Path(path).name == f"global_step{step - 1}":
            die()

    checkpoints.shutil.rmtree = rmtree


def after_logging(step: int) -> None:
    """The step is trained and logged, its checkpoint not begun."""
    from abc_plugin.local.resume import ResumableTrainer

    save = ResumableTrainer.save_logs_and_checkpoints

    def save_logs_and_checkpoints(self: object, global_step: int, logs: dict, states: dict) -> None:
        if global_step == step:
            self.tensorboard_logger.log_train(global_step, logs)
            self.tensorboard_logger.writer.flush()
            die()
        save(self, global_step, logs, states)

    ResumableTrainer.save_logs_and_checkpoints = save_logs_and_checkpoints


POINTS = {
    point.__name__.replace("_", " "): point
    for point in (within_a_file, between_the_models, before_the_manifest, while_removing, after_logging)
}


def weights(out: Path) -> dict[str, torch.Tensor]:
    [file] = [path for name in ("model", "adapter_model") if (path := out / f"{name}.safetensors").exists()]
    return load_file(file)


def events(out: Path) -> dict[str, list]:
    """What TensorBoard shows: (step, value) by tag, times left out."""
    [directory] = (out / "tensorboard").iterdir()
    read = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
        if "timing" not in tag
    }


def history(out: Path, step: int = STEPS) -> list[dict]:
    """The steps' figures in full precision, from the last checkpoint."""
    state = torch.load(out / "checkpoints" / "complete" / f"global_step{step}" / "rank0.pt", weights_only=True)
    return [{k: v for k, v in figures.items() if "timing" not in k} for figures in state["history"]]


def summary(out: Path) -> dict:
    read = json.loads((out / "summary.json").read_text())
    return {name: value for name, value in read.items() if name not in ("seconds", "timing")}


def differences(one: Path, other: Path, step: int = STEPS) -> list[str]:
    """What differs between two runs' results; times left out."""
    first, second = weights(one), weights(other)
    found = [
        f"weight {name}" for name in first.keys() | second.keys() if not _equal(first.get(name), second.get(name))
    ]
    for read in (events, summary, lambda out: dict(enumerate(history(out, step), start=1))):
        a, b = read(one), read(other)
        found += [
            f"{name}: {a.get(name)} and {b.get(name)}"
            for name in sorted(a.keys() | b.keys(), key=str)
            if a.get(name) != b.get(name)
        ]
    return found


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def kill_at_random(times: int) -> int:
    """Kill -9 runs, some of them several times, at random moments of training; returns how many ended otherwise."""
    from abc_plugin.tools.demo.tiny import make_tiny

    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        root, runs = Path(directory), Runs()
        (root / "tiny").mkdir()
        make_tiny(root / "tiny")
        status, said = runs.run(conftest.local_flags(root / "tiny", root / "whole", **SETTINGS), root / "said.txt")
        assert status == 0, said[-2000:]
        for trial in range(1, times + 1):
            out = root / f"run{trial}"
            kills, wrong = one_trial(runs, root / "tiny", root / "whole", out, random.choice((1, 1, 2, 3)))
            failed += bool(wrong)
            print(f"{trial}: {kills}: {wrong or 'identical'}", flush=True)
            shutil.rmtree(out)
        runs.close()
    print(f"{times - failed} of {times} killed runs ended as the one that was not")
    return failed


def one_trial(runs: Runs, tiny: Path, whole: Path, out: Path, times: int) -> tuple[str, list[str]]:
    """A run killed ``times`` times, within a random step each: what each left on disk, and what differs in the end."""
    flags = conftest.local_flags(tiny, out, **SETTINGS | {"ckpt.load_enable": True})
    step_takes = json.loads((whole / "summary.json").read_text())["seconds"] / (STEPS + 2)
    kills = []
    for step in sorted(random.sample(range(1, STEPS), times)):
        saving = out / "checkpoints" / "_actor" / f"global_step{step}"
        status, said = runs.run(flags, out.with_suffix(".txt"), kill_after=(saving, random.random() * step_takes))
        left = {
            part: [path.name.removeprefix("global_step") for path in out.glob(f"checkpoints/{part}/global_step*")]
            for part in ("_actor", "_critic")
        }
        complete = [path.parent.name.removeprefix("global_step") for path in out.rglob("manifest.json")]
        kills.append(f"{'killed' if status < 0 else 'had ended'}, complete {complete}, there {left}")
    status, said = runs.run(flags, out.with_suffix(".txt"))
    return "; ".join(kills), differences(whole, out) if status == 0 else [said[-500:]]


if __name__ == "__main__":
    serve() if sys.argv[1] == "serve" else sys.exit(kill_at_random(int(sys.argv[1])))
