"""Resuming from a checkpoint so that the curve is the one of a run that was never stopped.

OpenRLHF's checkpoints have weights, optimisers and schedulers. Saved beside them, for each rank: the random number
generators, the order of the prompts, the KL controller, rollouts that wait for the policy, and the steps' figures, by
whose number the rollouts are counted.
"""

from __future__ import annotations

import functools
import math
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from peft import PeftModel

from abc_plugin.errors import Terminated, UserError, first_line
from abc_plugin.local.distributed_ranks import TERMINATION, current_rank, gather
from abc_plugin.output_directory import writing

GRAD_NORM = "_global_grad_norm"  # the engine's attribute that DeepSpeed's checkpoints lack


class ResumableStrategy:
    """Mixed into the host's strategy: deletes no checkpoint before the next is complete, loads only complete ones.

    A saved model, too, takes its place only once it is whole.
    """

    def save_model(self, model: torch.nn.Module, tokenizer: Any, output_dir: str, **kwargs: Any) -> None:
        """Host signature. Raises CannotWrite; then nothing half-written is left, nor what was there replaced."""
        output, part = Path(output_dir), Path(output_dir) / ".part"
        try:
            with writing(output):
                super().save_model(model, tokenizer, str(part), **kwargs)
                for path in part.iterdir() if self.is_rank_0() else ():
                    if path.is_dir():
                        shutil.rmtree(output / path.name, ignore_errors=True)
                    path.replace(output / path.name)
        finally:
            if self.is_rank_0():
                shutil.rmtree(part, ignore_errors=True)
        self.args.checkpoints.saved.append(output_dir)

    def save_ckpt(
        self,
        model: torch.nn.Module,
        save_dir: str,
        tag: str | None = None,
        max_num: int = 3,
        max_mem: float = 1000,
        client_state: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Host signature; the limits are kept by ``Checkpoints.finish``."""
        # The host averages the norm over micro-batches, of which those before the first update report the last one.
        state = (client_state or {}) | {GRAD_NORM: model.get_global_grad_norm()}
        save = functools.partial(model.save_checkpoint, exclude_frozen_parameters=self._has_adapter(model))
        # The host passes the engine no such argument; an adapter's base would be saved with every checkpoint.
        with mock.patch.object(model, "save_checkpoint", save):
            super().save_ckpt(model, save_dir, tag, math.inf, math.inf, state, **kwargs)

    def load_ckpt(self, model: torch.nn.Module, load_dir: str, tag: str | None = None, **kwargs: Any) -> tuple:
        """Host signature. Raises UserError when a file cannot be read."""
        tag = f"global_step{self.args.checkpoints.step}"
        try:
            path, states = super().load_ckpt(model, load_dir, tag, not self._has_adapter(model), **kwargs)
        except Exception as error:  # a damaged file is many kinds of error, and each means the same to the user
            raise _unreadable(f"{load_dir}/{tag}", self.args, error) from error
        if path is None:
            raise _unreadable(f"{load_dir}/{tag}", self.args, "DeepSpeed found nothing in it")
        setattr(model, GRAD_NORM, states.pop(GRAD_NORM))
        return path, states

    def _has_adapter(self, model: torch.nn.Module) -> bool:
        """Whether only an adapter is trained: its base is in no checkpoint, but loaded and quantised as at first."""
        return isinstance(self._unwrap_model(model), PeftModel)


class ResumableTrainer:
    """Mixed into the host's trainer: saves what the host's checkpoints lack, and restores it before the first step."""

    def save_logs_and_checkpoints(
        self, global_step: int, logs_dict: dict | None = None, client_states: dict | None = None
    ) -> None:
        """The host's, with a checkpoint also where a SIGTERM waits for one. Raises Terminated after that."""
        options, ends = self.args.ckpt, TERMINATION.due()
        with (
            mock.patch.object(options, "save_steps", 1 if ends else options.save_steps),
            writing(self.args.checkpoints.root),
        ):
            self._save(global_step, logs_dict, client_states)
        if ends:
            raise Terminated

    def _save(self, global_step: int, logs_dict: dict | None, client_states: dict | None) -> None:
        """The host's; afterwards the checkpoint is declared complete, and only then are older ones removed."""
        options, checkpoints = self.args.ckpt, self.args.checkpoints
        if global_step % options.save_steps or options.disable_ds:
            super().save_logs_and_checkpoints(global_step, logs_dict, client_states)
            return
        rank = current_rank().index
        if rank == 0:
            checkpoints.begin(global_step)
        super().save_logs_and_checkpoints(global_step, logs_dict, client_states)
        if self.tensorboard_logger:
            self.tensorboard_logger.writer.flush()
        gather(None)  # the directory is there
        torch.save(self._state(client_states), self._state_file(global_step))
        gather(None)  # so are all files
        if rank == 0:
            checkpoints.finish(global_step, options.max_num, options.max_mem)

    def init_checkpoint_states(self) -> dict:
        """Where the host's loop starts; a resumed run is restored here, after everything that draws random numbers."""
        checkpoints = self.args.checkpoints
        if checkpoints.load:
            _drop_later_events(self.tensorboard_logger, checkpoints.step)
        if not checkpoints.step:
            return super().init_checkpoint_states()
        file = self._state_file(checkpoints.step)
        try:
            state = torch.load(file, weights_only=True)
        except Exception as error:
            raise _unreadable(file, self.args, error) from error
        return self._restore(state)

    def _state_file(self, step: int) -> str:
        return str(self.args.checkpoints.directory(step) / f"rank{current_rank().index}.pt")

    def _state(self, client_states: dict) -> dict[str, Any]:
        """What a rank needs to resume, besides what DeepSpeed saves. Plain values and tensors only."""
        generator = self.samples_generator
        order = getattr(self.prompts_dataloader.sampler, "generator", None)
        # The host counts an episode that ended within this step as begun, and would train it once more.
        ended = generator._dataloader_iter is None
        return {
            "trainer": client_states | {"episode": client_states["episode"] + ended},
            "ended": ended,
            "order": None if order is None else order.get_state(),
            "kl": float(self.kl_ctl.value),
            "history": [{k: v for k, v in s.items() if isinstance(v, (int, float))} for s in self.history],
            # Until --critic.freezing_steps have passed, the policy's rollouts pile up: it then trains on all of them.
            "waiting": [vars(experience) for experience in self._policy_buffer()],
            "random": random_state(),
        }

    def _policy_buffer(self) -> list[Experience]:
        return self.actor_model_group.worker.trainer.replay_buffer.items

    def _restore(self, state: dict[str, Any]) -> dict:
        trainer = state["trainer"]
        loader, generator = self.prompts_dataloader, self.samples_generator
        if not state["ended"]:
            # The iterator is made here, because making it draws a random number.
            loader.load_state_dict(trainer["data_loader_state_dict"])
            generator._dataloader_iter, generator._sample_buffer = iter(loader), []
        if state["order"] is not None:
            loader.sampler.generator.set_state(state["order"])
        self.kl_ctl.value = state["kl"]
        self.history[:] = state["history"]
        self._policy_buffer()[:] = [Experience(**fields) for fields in state["waiting"]]
        set_random_state(state["random"])
        return trainer | {"data_loader_state_dict": {}}


def random_state() -> dict[str, Any]:
    """States of all generators that training draws from in this process, in values that torch.load takes for safe."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set them to what ``random_state`` returned."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _drop_later_events(logger: Any, step: int) -> None:
    """Have TensorBoard forget the steps after ``step`` that the stopped run had already logged."""
    if logger:
        directory = logger.writer.log_dir
        logger.writer.close()
        logger.writer = type(logger.writer)(directory, purge_step=step + 1)


def _unreadable(file: str, args: Any, reason: object) -> UserError:
    where = args.checkpoints.directory(args.checkpoints.step)
    why = f"{file} cannot be read: {first_line(reason)}"
    return UserError(f"{why}; remove {where} to go on from the checkpoint before it")
