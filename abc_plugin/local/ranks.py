"""Ranks: torchrun and deepspeed start one process per device, and each of them runs the whole driver.

All read the same prompts in the same order and come to the same decisions; what the models compute is shared out and
gathered again (host/inprocess.py, host/generation.py). One rank speaks: the others' output goes to their own logs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from abc_plugin.errors import UserError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by every launcher
PATIENCE = 60  # seconds that a rank leaves the launcher to end it, once another rank has told the error
START = "torchrun --nproc_per_node N -m abc_plugin local …, or deepspeed --num_gpus N --module abc_plugin local …"


class Place(NamedTuple):
    """A process among those of a run: its number, its number on this machine, and how many there are."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1


def place() -> Place:
    """This process's place by the launcher's variables; alone without them. Raises UserError when some are missing."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing and size > 1:
        raise UserError(f"WORLD_SIZE={size}, but {', '.join(missing)} not set: start the ranks with {START}")
    return Place() if missing else Place(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), size)


def refuse(command: str) -> None:
    """Raises UserError when several processes run a command that is for one."""
    if place().size > 1:
        raise UserError(f"abc-rlhf {command} runs in one process, but WORLD_SIZE={place().size}; start it with python")


def take_device() -> None:
    """Give this rank its device. Raises UserError when there are more ranks than GPUs, or the port is taken."""
    here = place()
    if torch.cuda.is_available():
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", here.local_rank + 1)))
        if on_this_machine > (gpus := torch.cuda.device_count()):
            raise UserError(f"{on_this_machine} ranks on this machine, but {gpus} GPUs: start {gpus} (one for each)")
        torch.cuda.set_device(here.local_rank)
    # torchrun listens on the port by itself.
    if here.size > 1 and here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _check_port(int(os.environ["MASTER_PORT"]))


def _check_port(port: int) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("", port))
        except OSError:
            raise UserError(
                f"MASTER_PORT {port} is in use, perhaps by another run; give another one (deepspeed --master_port N)"
            ) from None


def check_batches(args: Namespace, prompts: int) -> None:
    """Every rank gets as many batches of every rollout as the others. Raises UserError with the numbers otherwise.

    With uneven shares some ranks would wait for ever: under ZeRO-3 in a forward, always in the update.
    """
    size, rollout, train = place().size, args.rollout, args.train
    unit = train.micro_batch_size * size
    if train.batch_size % unit:
        raise UserError(
            f"--train.batch_size {train.batch_size} is no multiple of --train.micro_batch_size "
            f"{train.micro_batch_size}{f' on {size} ranks' if size > 1 else ''}: make it one of {unit}"
        )
    if size == 1:
        return
    copies, first = rollout.n_samples_per_prompt, min(prompts, rollout.batch_size)
    rest = prompts % rollout.batch_size
    for count, which in ((first, "a rollout"), (rest, "the last rollout of an episode")):
        samples = count * copies
        if samples % (rollout.micro_batch_size * size):
            both = [n * copies for n in (first, rest)]
            sizes = range(rollout.micro_batch_size, 0, -1)
            micro = next((m for m in sizes if not any(n % (m * size) for n in both)), None)
            whole = prompts - rest
            if micro:
                remedy = f"--rollout.micro_batch_size {micro} would do"
            elif count == rest and whole:
                remedy = f"--data.max_samples {whole} leaves that rollout out"
            else:
                remedy = f"start {max(n for n in range(1, size) if not samples % n)}, or change the batch"
            raise UserError(
                f"{which} has {samples} completions ({count} prompts, --rollout.n_samples_per_prompt {copies}), which "
                f"{size} ranks cannot share out in batches of --rollout.micro_batch_size {rollout.micro_batch_size}: "
                f"{remedy}"
            )


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The launcher's variables, or those of a job with one rank; leaves the process group afterwards."""
    with mock.patch.dict(os.environ, {} if all(name in os.environ for name in VARIABLES) else _alone()):
        try:
            yield
        except BaseException:
            if place().size == 1:  # among several, leaving would wait for ranks that wait for this one
                _leave()
            raise
        _leave()


def _alone() -> dict[str, str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    return dict(zip(VARIABLES, ("0", "0", "1", "127.0.0.1", str(port)), strict=True))


def _leave() -> None:
    _object_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, in their order. All ranks must come here; tensors in it must be on the CPU."""
    size = place().size
    if size == 1:
        return [value]
    values = [None] * size
    dist.all_gather_object(values, value, group=_object_group())
    return values


@functools.cache
def _object_group() -> dist.ProcessGroup | None:
    """The group for Python objects: NCCL, the default one on GPUs, would need them on the device."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timedelta(hours=1))


@contextlib.contextmanager
def one_voice() -> Iterator[Place]:
    """Within the block only rank 0 prints, and only the first rank that fails tells its error.

    The others wait for the launcher to end them, which it does once that rank has exited.
    """
    speaks.cache_clear()
    here = place()
    with contextlib.ExitStack() as stack:
        if here.rank:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield here
        except Exception:
            if not speaks():
                time.sleep(PATIENCE)
            raise


@functools.cache
def speaks() -> bool:
    """Whether an error is this rank's to tell: it is rank 0, or, once the ranks have met, the first that asks."""
    here = place()
    if here.size == 1 or not dist.is_initialized():
        return here.rank == 0
    try:
        return dist.distributed_c10d._get_default_store().add("abc_plugin/failed", 1) == 1
    except RuntimeError:  # the rank that kept the store has failed and is gone
        return False
