"""Sums over processes, for a sequence split along a ring and for heads split by tensor parallelism.

A group of None is this process alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """(rank of this process in the group, number of processes)."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def sum_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Elementwise sum over the group's processes."""
    return _reduce(x, dist.ReduceOp.SUM, group)


def max_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Elementwise maximum over the group's processes."""
    return _reduce(x, dist.ReduceOp.MAX, group)


def _reduce(x: Tensor, operation: dist.ReduceOp, group: ProcessGroup | None) -> Tensor:
    if group is not None:
        x = x.contiguous()
        dist.all_reduce(x, operation, group=group)
    return x


def heads_by_rank(row_BHS: Tensor, group: ProcessGroup | None) -> Tensor:
    """Number of heads that each process holds, long (processes,)."""
    rank, size = rank_and_size(group)
    heads = torch.zeros(size, dtype=torch.long, device=row_BHS.device)
    heads[rank] = row_BHS.shape[1]
    return sum_over(heads, group)


def head_mean(row_BHS: Tensor, group: ProcessGroup | None) -> Tensor:
    """Mean over the heads of all processes, (B, S); shards may be uneven, so it is no mean of means.

    row[b,s] = Σ_ranks Σ_h row_rank[b,h,s] / Σ_ranks H_rank
    """
    return sum_over(row_BHS.sum(dim=1), group) / heads_by_rank(row_BHS, group).sum()


def all_heads(row_BHS: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of all processes' heads in rank order, (B, ΣH, S)."""
    if group is None:
        return row_BHS
    rank, _ = rank_and_size(group)
    heads = heads_by_rank(row_BHS, group).tolist()
    return sum_over(torch.nn.functional.pad(row_BHS, (0, 0, sum(heads[:rank]), sum(heads[rank + 1 :]))), group)
