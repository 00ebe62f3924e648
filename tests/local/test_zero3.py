"""Weights that ZeRO-3 has split are whole when they are read, however late each transfer ends."""

import os

import torch
from processes import spawn
from torch import nn

SIZES = (3, 5, 7, 2)


def read_with_late_transfers(rank):
    """How many of the weights are whole, read by our ``gathered`` and by DeepSpeed's for a list."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2"}
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters

    from abc_plugin.local.zero3 import gathered

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
    for context in (gathered(parameters), deepspeed.zero.GatheredParameters(parameters)):
        with context:
            counts.append(sum(bool(p.isfinite().all()) for p in parameters))
    return torch.tensor(counts)


def test_every_transfer_is_waited_for(tmp_path):
    for ours, theirs in (counts.tolist() for counts in spawn(read_with_late_transfers, 2, tmp_path)):
        assert ours == 2 * len(SIZES)
        assert theirs < ours, "DeepSpeed waits for all of a list's transfers now: gathered need not go one by one"
