"""Ranks: torchrun and deepspeed start one process per device, and each of them runs the whole driver.

All read the same prompts in the same order and come to the same decisions; what the models compute is shared out and
gathered again (ray_in_process.py, rollout.py). Only rank 0 prints: the others' output goes to their own logs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from abc_plugin.errors import Terminated, UserError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by every launcher
GRACE = 60  # seconds that a failed rank leaves the launcher to end it, once another rank has reported an error
START = "torchrun --nproc_per_node N -m abc_plugin local …, or deepspeed --num_gpus N --module abc_plugin local …"


class Rank(NamedTuple):
    """A process among those of a run: its number, its number on this machine, and how many there are."""

    index: int = 0
    local_index: int = 0
    count: int = 1


def current_rank() -> Rank:
    """This process by the launcher's variables; the only one without them. Raises UserError when some are missing."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing and count > 1:
        raise UserError(f"WORLD_SIZE={count}, but {', '.join(missing)} not set: start the ranks with {START}")
    return Rank() if missing else Rank(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), count)


def refuse_several(command: str) -> None:
    """Raises UserError when several processes run a command that is for one."""
    if (count := current_rank().count) > 1:
        raise UserError(f"abc-rlhf {command} runs in one process, but WORLD_SIZE={count}; start it with python")


def take_device() -> None:
    """Give this rank its device. Raises UserError when there are more ranks than GPUs, or the port is taken."""
    rank = current_rank()
    if torch.cuda.is_available():
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", rank.local_index + 1)))
        if on_this_machine > (gpus := torch.cuda.device_count()):
            raise UserError(f"{on_this_machine} ranks on this machine, but {gpus} GPUs: start {gpus} (one for each)")
        torch.cuda.set_device(rank.local_index)
    # torchrun listens on the port by itself.
    if rank.count > 1 and rank.index == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        port = int(os.environ["MASTER_PORT"])
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("", port))
            except OSError:
                raise UserError(
                    f"MASTER_PORT {port} is in use, perhaps by another run; give another one (deepspeed "
                    "--master_port N)"
                ) from None


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Within the block the launcher's variables are set, those of a single rank without one; then the group is left.

    The host reads them, and joins the group itself.
    """
    launched = all(name in os.environ for name in VARIABLES)
    with mock.patch.dict(os.environ, {} if launched else _single_rank()):  # the environment is as before afterwards
        try:
            yield
        except BaseException:
            if current_rank().count == 1:  # among several, leaving would wait for ranks that wait for this one
                _leave()
            raise
        _leave()


def _single_rank() -> dict[str, str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    return dict(zip(VARIABLES, ("0", "0", "1", "127.0.0.1", str(port)), strict=True))


def _leave() -> None:
    _object_group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


class Termination:
    """What a SIGTERM does while a run trains: ends it at once, or where it ``waits`` once the caller has looked.

    A run that saves checkpoints waits for the end of its step and saves one more, any run for its last files.
    """

    def __init__(self) -> None:
        self.waits = self.requested = False

    def __call__(self, *_: object) -> None:
        """The signal's handler; a second signal is not waited for."""
        if not self.waits or self.requested:
            raise Terminated
        self.requested = True

    def due(self) -> bool:
        """Whether one of the ranks, which all call this, was told to end."""
        return self.waits and any(gather(self.requested))


TERMINATION = Termination()


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, in their order. All ranks must come here; tensors in it must be on the CPU."""
    count = current_rank().count
    if count == 1:
        return [value]
    values = [None] * count
    dist.all_gather_object(values, value, group=_object_group())
    return values


@functools.cache
def _object_group() -> dist.ProcessGroup | None:
    """The group for Python objects: NCCL, the default one on GPUs, would need them on the device."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timedelta(hours=1))


@contextlib.contextmanager
def gather_zero3(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gather ZeRO-3 shards within a block: every rank has the whole parameters; those that are not split stay.

    They are gathered one by one. Of a list DeepSpeed starts every transfer and waits for the last only
    (partition_parameters.py, _allgather_params_coalesced): on NCCL's stream the others have then ended too, in gloo's
    threads they may not have, and the block would read memory that nothing has been written to yet.
    """
    import deepspeed

    with contextlib.ExitStack() as stack:
        for parameter in parameters:
            if hasattr(parameter, "ds_id"):
                stack.enter_context(deepspeed.zero.GatheredParameters([parameter]))
        yield


@contextlib.contextmanager
def only_first_rank_prints() -> Iterator[Rank]:
    """Within the block the other ranks print nothing, and only the first rank that fails reports its error.

    The others wait for the launcher to end them, which it does once that rank has exited.
    """
    reports_errors.cache_clear()
    rank = current_rank()
    with contextlib.ExitStack() as stack:
        if rank.index:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield rank
        except Exception:
            if not reports_errors():
                time.sleep(GRACE)
            raise


@functools.cache
def reports_errors() -> bool:
    """Whether this rank reports an error: it is rank 0, or, once the ranks have joined, the first that asks."""
    rank = current_rank()
    if rank.count == 1 or not dist.is_initialized():
        return rank.index == 0
    try:
        return dist.distributed_c10d._get_default_store().add("abc_plugin/failed", 1) == 1
    except RuntimeError:  # the rank that kept the store has failed and is gone
        return False
