"""Several gloo processes for one test module."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, in the process that the others are forked from.
multiprocessing.set_forkserver_preload(
    ["torch", "transformers", "recovery_models", "abc_plugin.attention.query_key_tap"]
)


def spawn(worker: Callable[[int], Any], processes: int, directory: Path) -> list[Any]:
    """Run ``worker(rank)``, a module's function, in processes of one gloo world; what each returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _enter, (worker, processes, port, str(directory)), nprocs=processes, start_method="forkserver"
    )
    return [torch.load(directory / f"{rank}.pt") for rank in range(processes)]


def _enter(rank: int, worker: Callable[[int], Any], processes: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    try:
        torch.save(worker(rank), Path(directory) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def own_group(rank: int, members_of_each: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup:
    """This process's group among several; every process makes all of them."""
    groups = {members: dist.new_group(members) for members in members_of_each}
    return next(group for members, group in groups.items() if rank in members)
