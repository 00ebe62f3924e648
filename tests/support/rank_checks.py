"""What one of several ranks sees of the others; for ``run_variants.two_ranks``."""

from __future__ import annotations

import os

import deepspeed
from deepspeed.runtime.zero import partition_parameters
from torch import nn

from abc_plugin.local import distributed_ranks
from abc_plugin.local.ray_in_process import InProcessGroup

SIZES = (3, 5, 7, 2)


class Worker:
    """Stands for a worker of the host."""

    def __init__(self, world_size, rank, address, port):
        self.rank = rank
        self.seen = []
        os.environ["LOCAL_RANK"] = "0"  # as the host's does

    def execute_batch(self, method_name, batch, start, end):
        return [getattr(self, method_name)(item) for item in batch["item"][start:end]]

    def change(self, item):
        item.append(self.rank)
        self.seen.append(item)
        return item

    def own(self, add):
        return self.rank + add


def use_group(rank: int) -> dict:
    """What one of two ranks sees of a group."""
    group = InProcessGroup(1, 2, Worker)
    items = [[number] for number in range(4)]
    results = group.async_run_method_batch("change", item=items)
    try:
        group.async_run_method_batch("change", item=items[:3])
    except RuntimeError as error:
        uneven = str(error)
    return {
        "results": results,
        "uneven": uneven,
        "seen": group.worker.seen,
        "items": items,
        "own": group.async_run_method("own", add=10),
        "local_rank": os.environ["LOCAL_RANK"],
        "timed": sorted(group.seconds),
        "whole": read_with_late_transfers(),
    }


def read_with_late_transfers() -> list[int]:
    """How many of the weights are whole, read by our ``gather_zero3`` and by DeepSpeed's for a list."""

    deepspeed.init_distributed("gloo", verbose=False)
    comm = partition_parameters.dist
    at_once = comm.all_gather_into_tensor

    class Late:
        """A transfer that moves nothing before it is waited for, as one of gloo's threads may."""

        def __init__(self, *transfer):
            self.transfer = transfer

        def wait(self):
            output, shard, group = self.transfer
            at_once(output, shard, group=group)

    def late(output, shard, group=None, async_op=False):
        output.fill_(float("nan"))
        transfer = Late(output, shard, group)
        return transfer if async_op else transfer.wait()

    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        model = nn.Sequential(*(nn.Linear(size, size) for size in SIZES))
    parameters = list(model.parameters())
    comm.all_gather_into_tensor = late
    counts = []
    for context in (distributed_ranks.gather_zero3(parameters), deepspeed.zero.GatheredParameters(parameters)):
        with context:
            counts.append(sum(bool(p.isfinite().all()) for p in parameters))
    return counts
