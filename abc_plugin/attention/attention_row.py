"""The maths of attention rows: one, or the mean of several, without the matrix of all, which costs S times as much.

Dimensions beside the package's: R rows, each of one query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from abc_plugin.attention.process_groups import max_over, sum_over

ROWS_AT_A_TIME = 64  # of a mean


def attention_row(query_BHSD: Tensor, key_BKSD: Tensor, position_B: Tensor, **options: Any) -> Tensor:
    """One row of each sequence, (B, H, S) fp32: ``attention_rows`` of the query at ``position``; options as there."""
    weights_BHRS, _ = attention_rows(query_BHSD, key_BKSD, position_B[:, None], **options)
    return weights_BHRS[:, :, 0]


@torch.no_grad()
def attention_rows(
    query_BHSD: Tensor,
    key_BKSD: Tensor,
    position_BR: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Some queries' softmax over all keys, per head: weights (B, H, R, S), fp32, and the visible keys (B, 1|H, R, S).

    row[b,h,r,s] = softmax_s( cap(scaling · query[b,h,p]·key[b,k(h),s]) + bias[b,h,p,s] ),   p = position[b,r]
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
    A row with no visible key is all zeros. fp32 inside even under autocast, which would make the product bf16. No
    gradient. Raises ValueError on a mask of another shape.
    """
    (batch, heads, _, width), (_, key_heads, length, _) = query_BHSD.shape, key_BKSD.shape
    query_BHRD = take_rows(query_BHSD, position_BR)
    grouped = query_BHRD.view(batch, key_heads, -1, width)  # the heads that share a key head, row by row
    logits_BHRS = fp32_product(grouped, key_BKSD.transpose(2, 3)).view(batch, heads, -1, length)
    logits_BHRS = logits_BHRS * (width**-0.5 if scaling is None else scaling)
    if mask is not None and mask.ndim == 4:
        visible, bias = visible_and_bias(take_rows(mask.expand(batch, -1, length, -1), position_BR)[..., :length])
    elif mask is None or mask.shape == (batch, length):
        real_BS = query_BHSD.new_ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
        visible, bias = visible_keys(real_BS, position_BR, causal, window)[:, None], None
    else:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {(batch, length)} or four dimensions")
    return softmax_rows(logits_BHRS, visible, bias, softcap, sinks_H), visible


@torch.no_grad()
def averaged_row(
    query_BHSD: Tensor, key_BKSD: Tensor, queries_BS: Tensor, *, rows: int = ROWS_AT_A_TIME, **options: Any
) -> Tensor:
    """Each key's attention, averaged over those of the queries that see it, per head, (B, H, S) fp32.

    mean[b,h,s] = Σ_p queries[b,p]·row[b,h,p,s] / Σ_p queries[b,p]·sees[b,h,p,s]      0 where no query sees the key

    With causal attention a later token is seen by fewer queries; a plain sum would favour early ones for that alone.
    (Paper, appendix B: the weighted average over the generation; the authors' code divides by the same count, in
    XanderJC/attention-based-credit, get_generator_attention_distribution.)

    queries_BS: bool, whose rows.  options: those of ``attention_rows``.
    Time O(P·S·H·D) for P queries; memory O(rows·S·H) beside query and key.
    """
    (batch, heads, _, _), (_, _, length, _) = query_BHSD.shape, key_BKSD.shape
    position_BP = queries_BS.byte().argsort(dim=1, descending=True, stable=True)
    longest = int(queries_BS.sum(1).max())
    sum_BHS = torch.zeros(batch, heads, length, device=query_BHSD.device)
    count_BhS: Tensor | float = 0.0
    key_BKSD = key_BKSD.float()  # once, rather than in every product
    for start in range(0, longest, rows):
        position_BR = position_BP[:, start : min(start + rows, longest)]
        weights_BHRS, visible_BhRS = attention_rows(query_BHSD, key_BKSD, position_BR, **options)
        asked_B11R = queries_BS.gather(1, position_BR)[:, None, None].float()
        sum_BHS += fp32_product(asked_B11R, weights_BHRS).squeeze(2)
        count_BhS = count_BhS + fp32_product(asked_B11R, visible_BhRS).squeeze(2)
    return sum_BHS / count_BhS.clamp(min=1.0) if longest else sum_BHS


def averaged_matrix(weights_BHSS: Tensor, queries_BS: Tensor) -> Tensor:
    """As ``averaged_row``, of a layer that has made the whole matrix anyway; a query sees what it attends to."""
    asked_B11S = queries_BS[:, None, None].float()
    count_BHS = fp32_product(asked_B11S, weights_BHSS != 0).squeeze(2)
    return fp32_product(asked_B11S, weights_BHSS).squeeze(2) / count_BHS.clamp(min=1.0)


def softmax_rows(
    logits: Tensor,
    visible: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    sinks_H: Tensor | None,
    ring_group: ProcessGroup | None = None,
) -> Tensor:
    """Softmax over the visible keys, (B, H, S) or (B, H, R, S) as the logits; 0 at hidden ones.

    visible, bias: broadcastable to the logits. In a ring the keys of the other processes are hidden here and enter by
    the maximum and the sum.
    """
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.float()
    logits = logits.masked_fill(~visible, float("-inf"))
    peak = logits.amax(dim=-1, keepdim=True)
    if sinks_H is not None:
        sinks = sinks_H.float().view(-1, *[1] * (logits.ndim - 2))
        peak = torch.maximum(peak, sinks)
    # finite even where no key is visible: exp(-inf - lowest) is 0, and a NaN from the model stays visible
    peak = max_over(peak, ring_group).clamp(min=torch.finfo(torch.float32).min)
    weights = (logits - peak).exp()
    total = sum_over(weights.sum(dim=-1, keepdim=True), ring_group)
    if sinks_H is not None:
        total = total + (sinks - peak).exp()
    return weights / total.clamp(min=torch.finfo(torch.float32).tiny)


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in fp32, also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


def take_rows(x_BHSD: Tensor, position_BR: Tensor) -> Tensor:
    """x[b,:,position[b,r]], (B, H, R, D)."""
    index = position_BR[:, None, :, None].expand(-1, x_BHSD.shape[1], -1, x_BHSD.shape[3])
    return x_BHSD.gather(2, index)


def visible_and_bias(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """(which keys the queries see, what is added to their logits) from their rows of a four-dimensional mask."""
    return (rows, None) if rows.dtype == torch.bool else (rows > torch.finfo(rows.dtype).min, rows)


def visible_keys(real_BS: Tensor, position_BR: Tensor, causal: bool, window: int | None) -> Tensor:
    """Which keys the queries at ``position`` see, bool (B, R, S); distances count real tokens only."""
    count_BS = real_BS.cumsum(1)
    distance_BRS = count_BS.gather(1, position_BR)[..., None] - count_BS[:, None]
    visible_BRS = real_BS[:, None]
    if causal:
        visible_BRS = visible_BRS & (distance_BRS >= 0)
    if window is not None:
        visible_BRS = visible_BRS & (distance_BRS.abs() < window)
    return visible_BRS.expand_as(distance_BRS)
