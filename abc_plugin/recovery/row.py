"""The maths of one attention row: O(B·H·S·D), where the full matrix costs S times as much."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from abc_plugin.recovery.parallel import max_over, sum_over


@torch.no_grad()
def attention_row(
    query_BHSD: Tensor,
    key_BKSD: Tensor,
    position_B: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """One query's softmax over all keys, per head, (B, H, S) fp32; no gradient.

    row[b,h,s] = softmax_s( cap(scaling · query[b,h,p]·key[b,k(h),s]) + bias[b,h,p,s] ),   p = position[b]
    cap(x) = softcap · tanh(x / softcap);  k(h) = h // (H / K)

    query, key: as handed to the attention function, rotary embedding applied.  scaling: None is D^-0.5.
    mask: one of the three forms attention functions take
        None             no padding; ``causal`` and ``window`` apply
        (B, S)           1 at real keys, as flash attention gets it; ``causal`` and ``window`` apply and count real
                         tokens only, because flash attention drops the others first
        (B|1, H|1, S, S) the whole truth, as sdpa and eager get it: bool (True = visible) or additive (finfo.min and
                         -inf = hidden); ``causal`` and ``window`` are ignored
    window: a query sees keys less than this many tokens away.  sinks: per-head logits that take part in the softmax
    and are then dropped, so rows sum to less than 1.
    A row with no visible key is all zeros. fp32 inside even under autocast, which would make the product bf16.
    Raises ValueError on a mask of another shape.
    """
    batch, heads, _, width = query_BHSD.shape
    _, key_heads, length, _ = key_BKSD.shape
    query_BHD = take_row(query_BHSD, position_B)
    grouped = query_BHD.view(batch, key_heads, heads // key_heads, width)
    logits_BHS = fp32_product(grouped, key_BKSD.transpose(2, 3)).reshape(batch, heads, length)
    logits_BHS = logits_BHS * (width**-0.5 if scaling is None else scaling)
    if mask is not None and mask.ndim == 4:
        visible, bias = visible_and_bias(take_row(mask.expand(batch, -1, length, -1), position_B)[..., :length])
    elif mask is None or mask.shape == (batch, length):
        real_BS = torch.ones_like(logits_BHS[:, 0], dtype=torch.bool) if mask is None else mask.bool()
        visible, bias = visible_keys(real_BS, position_B, causal, window)[:, None], None
    else:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {(batch, length)} or four dimensions")
    return softmax_row(logits_BHS, visible, bias, softcap, sinks_H)


def softmax_row(
    logits_BHS: Tensor,
    visible: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    sinks_H: Tensor | None,
    ring_group: ProcessGroup | None = None,
) -> Tensor:
    """Softmax over the visible keys, (B, H, S); 0 at hidden ones.  visible, bias: broadcastable to (B, H, S).

    In a ring the keys of the other processes are hidden here and enter by the maximum and the sum.
    """
    if softcap is not None:
        logits_BHS = softcap * torch.tanh(logits_BHS / softcap)
    if bias is not None:
        logits_BHS = logits_BHS + bias.float()
    logits_BHS = logits_BHS.masked_fill(~visible, float("-inf"))
    peak_BH1 = logits_BHS.amax(dim=2, keepdim=True)
    if sinks_H is not None:
        sinks_BH1 = sinks_H.float().view(1, -1, 1)
        peak_BH1 = torch.maximum(peak_BH1, sinks_BH1)
    # finite even where no key is visible: exp(-inf - lowest) is 0, and a NaN from the model stays visible
    peak_BH1 = max_over(peak_BH1, ring_group).clamp(min=torch.finfo(torch.float32).min)
    weight_BHS = (logits_BHS - peak_BH1).exp()
    total_BH1 = sum_over(weight_BHS.sum(dim=2, keepdim=True), ring_group)
    if sinks_H is not None:
        total_BH1 = total_BH1 + (sinks_BH1 - peak_BH1).exp()
    return weight_BHS / total_BH1.clamp(min=torch.finfo(torch.float32).tiny)


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in fp32, also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


def take_row(x_BHSD: Tensor, position_B: Tensor) -> Tensor:
    """x[b,:,position[b]], (B, H, D)."""
    index = position_B.view(-1, 1, 1, 1).expand(-1, x_BHSD.shape[1], 1, x_BHSD.shape[3])
    return x_BHSD.gather(2, index).squeeze(2)


def visible_and_bias(row: Tensor) -> tuple[Tensor, Tensor | None]:
    """(which keys the query sees, what is added to its logits) from the query's row of a four-dimensional mask."""
    return (row, None) if row.dtype == torch.bool else (row > torch.finfo(row.dtype).min, row)


def visible_keys(real_BS: Tensor, position_B: Tensor, causal: bool, window: int | None) -> Tensor:
    """Which keys the query at ``position`` sees, bool (B, S); distances count real tokens only."""
    count_BS = real_BS.cumsum(1)
    distance_BS = count_BS.gather(1, position_B[:, None]) - count_BS
    visible_BS = real_BS
    if causal:
        visible_BS = visible_BS & (distance_BS >= 0)
    if window is not None:
        visible_BS = visible_BS & (distance_BS.abs() < window)
    return visible_BS
