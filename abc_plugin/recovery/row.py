"""The maths of one attention row: O(B·H·S·D), where the full matrix costs S times as much."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """One query's softmax over all keys, mean over heads, (B, S) fp32; no gradient.

    row[b,s] = mean_h softmax_s( cap(scaling · query[b,h,p]·key[b,k(h),s]) + bias[b,h,p,s] ),   p = position[b]
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
    with torch.autocast(query_BHSD.device.type, enabled=False):
        query_BHD = _take_row(query_BHSD, position_B).float()
        grouped = query_BHD.view(batch, key_heads, heads // key_heads, width)
        logits_BHS = (grouped @ key_BKSD.float().transpose(2, 3)).reshape(batch, heads, length)
        logits_BHS = logits_BHS * (width**-0.5 if scaling is None else scaling)
        if softcap is not None:
            logits_BHS = softcap * torch.tanh(logits_BHS / softcap)
        visible, bias = _mask_row(mask, position_B, (batch, length), causal, window)
        if bias is not None:
            logits_BHS = logits_BHS + bias.float()
        logits_BHS = logits_BHS.masked_fill(~visible, float("-inf"))
        if sinks_H is not None:
            logits_BHS = torch.cat([logits_BHS, sinks_H.float().view(1, -1, 1).expand(batch, heads, 1)], dim=2)
        # softmax makes NaN of a row without keys; only that NaN is a zero, a NaN from the model must stay visible
        row_BHS = logits_BHS.softmax(dim=2)[..., :length].masked_fill(~visible, 0.0)
        return row_BHS.mean(dim=1)


def _take_row(x_BHSD: Tensor, position_B: Tensor) -> Tensor:
    index = position_B.view(-1, 1, 1, 1).expand(-1, x_BHSD.shape[1], 1, x_BHSD.shape[3])
    return x_BHSD.gather(2, index).squeeze(2)


def _mask_row(
    mask: Tensor | None, position_B: Tensor, shape_BS: tuple[int, int], causal: bool, window: int | None
) -> tuple[Tensor, Tensor | None]:
    """(which keys the query sees, what is added to its logits), each broadcastable to (B, H, S)."""
    batch, length = shape_BS
    if mask is not None and mask.ndim == 4:
        row = _take_row(mask.expand(batch, -1, max(mask.shape[2], length), -1), position_B)[..., :length]
        return (row, None) if row.dtype == torch.bool else (row > torch.finfo(row.dtype).min, row)
    if mask is not None and mask.shape != shape_BS:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {shape_BS} or four dimensions")
    real_BS = torch.ones(shape_BS, dtype=torch.bool, device=position_B.device) if mask is None else mask.bool()
    count_BS = real_BS.cumsum(1)
    distance_BS = count_BS.gather(1, position_B[:, None]) - count_BS
    visible_BS = real_BS
    if causal:
        visible_BS = visible_BS & (distance_BS >= 0)
    if window is not None:
        visible_BS = visible_BS & (distance_BS.abs() < window)
    return visible_BS[:, None], None
