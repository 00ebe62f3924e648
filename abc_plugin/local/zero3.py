"""Weights that ZeRO-3 has split over the ranks, whole for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import deepspeed
from torch import nn


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Whole parameters within the block, on every rank; those that are not split stay as they are.

    They are gathered one by one. Of a list DeepSpeed starts every transfer and waits for the last only
    (partition_parameters.py, _allgather_params_coalesced): on NCCL's stream the others have then ended too, in gloo's
    threads they may not have, and the block would read memory that nothing has been written to yet.
    """
    with contextlib.ExitStack() as stack:
        for parameter in parameters:
            if hasattr(parameter, "ds_id"):
                stack.enter_context(deepspeed.zero.GatheredParameters([parameter]))
        yield
