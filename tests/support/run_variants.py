"""What a forked run of local_runs.py does otherwise: one function per variant, called in its process beforehand."""

from __future__ import annotations

import io
import os
import resource
import signal
import time
from pathlib import Path

import torch


def unchanged(_: object) -> None:
    """The run as it is."""


def stock(_: object) -> None:
    """The stock host in one process: all of this driver but the plugin's experience maker and workers."""
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    from openrlhf.trainer.ray.launcher import RewardModelActor
    from openrlhf.trainer.ray.ppo_critic import CriticModelActor

    from abc_plugin.host import ray_trainers
    from abc_plugin.local import driver

    ray_trainers.CreditExperienceMaker = RemoteExperienceMaker
    driver.CreditRewardModel, driver.RestoredCritic = RewardModelActor, CriticModelActor


def without_kept_states(_: object) -> None:
    """``--local.train_layers`` whose frozen layers run every time."""
    from abc_plugin.local import frozen_layers

    frozen_layers.Trunk._skip_known = lambda self, forward, last: forward
    frozen_layers.keep_generated = lambda *_: None


def probed(facts: str) -> None:
    """The run looks at its own models before and after training, and saves what it saw."""
    from lora_probe import Probed

    from abc_plugin.local import driver

    Probed.facts_file, driver.LocalPPOTrainer = facts, Probed


def two_ranks(out: str) -> int:
    """No run: what the ranks see of one another is saved per rank."""
    import rank_checks
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.save(rank_checks.use_group(dist.get_rank()), f"{out}/{dist.get_rank()}.pt")
    return 0


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def full_disk(step: int) -> None:
    """From this step on no file grows, of the models and the log."""
    from abc_plugin.local.trainer import LocalPPOTrainer

    train_step = LocalPPOTrainer.train_step

    def then_full(self: object, samples: list, global_step: int) -> tuple[dict, int]:
        status = train_step(self, samples, global_step)
        if status[1] == step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return status

    LocalPPOTrainer.train_step = then_full


def killed_within_a_file(step: int) -> None:
    """Half of the policy's optimiser state is written."""
    save = torch.save

    def half(value: object, path: object, *args: object, **kwargs: object) -> None:
        if f"_actor/global_step{step}/" in str(path) and "optim_states" in str(path):
            whole = io.BytesIO()
            save(value, whole)
            Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])
            _kill()
        save(value, path, *args, **kwargs)

    torch.save = half


def killed_between_the_models(step: int) -> None:
    """The policy's checkpoint is whole, the critic's not begun."""
    from openrlhf.trainer.ray.ppo_critic import CriticModelActor

    from abc_plugin.host.install import undecorated

    critic = undecorated(CriticModelActor)
    save = critic.save_checkpoint

    def save_checkpoint(self: object, tag: str, **kwargs: object) -> None:
        if tag == f"global_step{step}":
            _kill()
        save(self, tag, **kwargs)

    critic.save_checkpoint = save_checkpoint


def killed_before_the_manifest(step: int) -> None:
    """All files are whole, but nothing says so."""
    from abc_plugin.local import checkpoints

    write = checkpoints.write_atomically

    def write_atomically(path: Path, text: str) -> None:
        if path.parent.name == f"global_step{step}":
            _kill()
        write(path, text)

    checkpoints.write_atomically = write_atomically


def killed_while_removing(step: int) -> None:
    """The new checkpoint is complete, the old one half removed."""
    from abc_plugin.local import checkpoints

    remove = checkpoints.shutil.rmtree

    def rmtree(path: Path, **kwargs: object) -> None:
        remove(path, **kwargs)
        if Path(path).name == f"global_step{step - 1}":
            _kill()

    checkpoints.shutil.rmtree = rmtree


def killed_after_logging(step: int) -> None:
    """The step is trained and logged, its checkpoint not begun."""
    from abc_plugin.local.resume import ResumableTrainer

    save = ResumableTrainer.save_logs_and_checkpoints

    def save_logs_and_checkpoints(self: object, global_step: int, logs: dict, states: dict) -> None:
        if global_step == step:
            self.tensorboard_logger.log_train(global_step, logs)
            self.tensorboard_logger.writer.flush()
            _kill()
        save(self, global_step, logs, states)

    ResumableTrainer.save_logs_and_checkpoints = save_logs_and_checkpoints
