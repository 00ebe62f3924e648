"""The package's CPU stand-in for flash-attn, and one for ring-flash-attn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from abc_plugin.tools.bench.kernels import attend, cpu_flash, flash_utils, use_implementation

__all__ = ["cpu_flash", "cpu_ring_flash", "flash_utils", "use_implementation"]


@contextmanager
def cpu_ring_flash(mask_BS: Tensor, group: dist.ProcessGroup) -> Iterator[None]:
    """Replace the attention function as ring-flash-attn does: each process has its slice of the packed stream.

    Segments come from outside the call (here the mask, there ``update_ring_flash_attn_params``); padding at the end of
    the stream belongs to the last sequence, as in OpenRLHF.
    """
    lengths = mask_BS.sum(1).tolist()

    def everywhere(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=2)[0].transpose(0, 1)

    def ring_flash(module, query, key, value, attention_mask, *, scaling, sliding_window=None, s_aux=None, **kwargs):
        local, rank = query.shape[2], dist.get_rank(group)
        q, k, v = (everywhere(x) for x in (query, key, value))
        parts = lengths[:-1] + [len(q) - sum(lengths[:-1])]
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
        sequences = zip(q.split(parts), k.split(parts), v.split(parts), strict=True)
        out = torch.cat([attend(*sequence, scaling, True, window, 0.0, s_aux) for sequence in sequences])
        return out[rank * local :][:local][None], None

    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = ring_flash
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
