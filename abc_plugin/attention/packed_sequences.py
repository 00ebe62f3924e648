"""Sequences packed into one stream: the row of each, back at its padded positions; whole, or split over a ring.

Dimensions beside the package's: T tokens of the stream, L of them on this process. Without a ring both are the number
of 1s in the mask; with one, T is that rounded up to a multiple of the processes, and each has its L = T / processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from abc_plugin.attention.attention_row import fp32_product, softmax_rows, visible_and_bias, visible_keys
from abc_plugin.attention.process_groups import rank_and_size, sum_over

MISMATCH = "{} do not begin where the recorded mask's sequences begin"
Fault = tuple[Tensor, str]  # (bool on the device, what it means when true): read later, so that no forward waits


class Packing:
    """Where the tokens of a padded batch lie in the stream that the host makes of them, ``input_ids[mask == 1]``."""

    def __init__(self, mask_BS: Tensor, position_B: Tensor, tokens: int, ring_group: ProcessGroup | None) -> None:
        length_B = mask_BS.sum(1)
        end_B = length_B.cumsum(0)
        self.mask_BS, self.position_B, self.ring_group = mask_BS, position_B, ring_group
        self.first = rank_and_size(ring_group)[0] * tokens  # this process's first token
        stream_L = self.first + torch.arange(tokens, device=mask_BS.device)
        self.real_L = stream_L < end_B[-1]
        self.sequence_L = torch.searchsorted(end_B, stream_L, right=True).clamp(max=len(end_B) - 1)
        self.offset_L = stream_L - (end_B - length_B)[self.sequence_L]
        self.starts_L = self.offset_L == 0
        index_BS = (mask_BS.flatten().cumsum(0).view_as(mask_BS) - 1).clamp(min=0) - self.first
        self.here_BS = mask_BS & (index_BS >= 0) & (index_BS < tokens)
        self.index_BS = index_BS.clamp(0, tokens - 1)  # among this process's tokens; arbitrary where it is not here
        self.query_B = self.index_BS.gather(1, position_B[:, None]).squeeze(1)
        self.asks_B = self.here_BS.gather(1, position_B[:, None]).squeeze(1)  # whose query is on this process
        self.several = (length_B > 0).sum() > 1


@torch.no_grad()
def packed_row(
    packing: Packing,
    query_1HLD: Tensor,
    key_1KLD: Tensor,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """As ``attention_row.attention_row``, of a stream: (B, H, S), each row over its sequence's keys at padded places.

    In a ring the result holds this process's keys, 0 elsewhere: the row is the sum over the processes.
    mask: None, where the attention function tells sequences apart itself, or the stream's (1, 1|H, T, T).
    """
    _, heads, tokens, width = query_1HLD.shape
    key_heads = key_1KLD.shape[1]
    query_BHD = query_1HLD[0, :, packing.query_B].transpose(0, 1).float() * packing.asks_B[:, None, None]
    query_BHD = sum_over(query_BHD, packing.ring_group)
    query_LKGD = query_BHD.view(-1, key_heads, heads // key_heads, width)[packing.sequence_L]
    logits_LH = fp32_product(query_LKGD, key_1KLD[0].transpose(0, 1)[..., None]).view(tokens, heads)
    logits_BHS = logits_LH[packing.index_BS].transpose(1, 2) * (width**-0.5 if scaling is None else scaling)
    visible_B1S = visible_keys(packing.mask_BS, packing.position_B[:, None], causal, window)
    visible, bias = visible_B1S & packing.here_BS[:, None], None
    if mask is not None and mask.ndim == 4:
        visible, bias = (_to_sequences(row, packing) for row in visible_and_bias(_mask_rows(mask, packing)))
        visible = visible & packing.here_BS[:, None]
    return softmax_rows(logits_BHS, visible, bias, softcap, sinks_H, packing.ring_group)


def unpacked(packing: Packing, x_1HLD: Tensor) -> Tensor:
    """Queries, keys or values of the stream at the padded batch's positions, (B, H, S, D); arbitrary at padding."""
    return x_1HLD[0][:, packing.index_BS].transpose(0, 1)


def _mask_rows(mask_11TT: Tensor, packing: Packing) -> Tensor:
    """The queries' rows of the stream's mask, (B, 1|H, T)."""
    return mask_11TT[0, :, packing.query_B].transpose(0, 1)


def _to_sequences(row_BHT: Tensor | None, packing: Packing) -> Tensor | None:
    if row_BHT is None:
        return None
    return row_BHT.gather(2, packing.index_BS[:, None].expand(-1, row_BHT.shape[1], -1))


def packing_faults(packing: Packing, mask: Tensor | None, options: dict[str, Any], is_flash: bool) -> list[Fault]:
    """What would make a packed row wrong: flash attention tells sequences apart by its options, others by the mask."""
    unread_B = packing.mask_BS.any(1) & ~packing.mask_BS.gather(1, packing.position_B[:, None]).squeeze(1)
    faults = [(unread_B.any(), "the row asked for is that of a padding token, which packing leaves out")]
    positions = options.get("position_ids")
    if positions is not None and positions.shape != (1, len(packing.starts_L)):
        positions = None
    if packing.ring_group is not None:
        return faults + _ring_faults(packing, mask, positions, is_flash)
    if mask is not None and mask.ndim == 4:
        return faults + _mask_faults(packing, mask, positions)
    return faults + _flash_faults(packing, mask, options.get("cu_seq_lens_k"), positions, is_flash)


def _flash_faults(
    packing: Packing, mask: Tensor | None, bounds: Tensor | None, positions_1L: Tensor | None, is_flash: bool
) -> list[Fault]:
    """Flash attention without a mask goes by the bounds, else by where positions are at their lowest."""
    if not is_flash or mask is not None or (bounds is None and positions_1L is None):
        return [(packing.several, "nothing tells its attention where one ends and the next begins")]
    if bounds is None:
        begins_L = positions_1L[0] == positions_1L.min()
        return [((begins_L != packing.starts_L).any(), MISMATCH.format("position_ids"))]
    tokens = len(packing.starts_L)
    begins_L = torch.zeros(tokens + 1, dtype=torch.bool, device=packing.starts_L.device)
    begins_L[bounds.long().clamp(0, tokens)] = True
    return [((begins_L[:-1] != packing.starts_L).any(), MISMATCH.format("cu_seq_lens_k"))]


def _ring_faults(packing: Packing, mask: Tensor | None, positions_1L: Tensor | None, is_flash: bool) -> list[Fault]:
    """A ring's flash attention has its bounds from elsewhere; positions, where it passes them, must agree."""
    if not is_flash or mask is not None:
        return [(torch.ones(()), "in a ring its attention must be flash attention without a mask")]
    if positions_1L is None:
        return []
    moved_L = _restarts(positions_1L) != packing.starts_L
    moved_L[0] = positions_1L[0, 0] != packing.offset_L[0]  # a slice may begin in the middle of a sequence
    return [((moved_L & packing.real_L).any(), MISMATCH.format("position_ids"))]


def _mask_faults(packing: Packing, mask_11TT: Tensor, positions_1L: Tensor | None) -> list[Fault]:
    """A four-dimensional mask is what ran; positions, where they restart at all, must agree."""
    faults = [(_leaks(mask_11TT, packing), "its mask lets a token see other sequences")]
    if positions_1L is not None:
        split_L = _restarts(positions_1L) & ~packing.starts_L
        faults.append((split_L.any(), MISMATCH.format("position_ids")))
    return faults


def _leaks(mask_11TT: Tensor, packing: Packing) -> Tensor:
    """Whether a query whose row is taken sees a key of another sequence, or any token the last key before its own.

    The second: some models (gpt_oss in eager) leave packing out of their masks. The sequences' last tokens may then be
    too far from other sequences for the window, and only the hidden states below them are mixed up.
    """
    visible_BHT, _ = visible_and_bias(_mask_rows(mask_11TT, packing))
    own_BHS = _to_sequences(visible_BHT, packing) & packing.mask_BS[:, None]
    leaks_BH = (visible_BHT.sum(-1) != own_BHS.sum(-1)) & packing.mask_BS.any(1)[:, None]
    index_L = torch.arange(len(packing.offset_L), device=packing.offset_L.device)
    before_L = index_L - packing.offset_L - 1  # -1 in the first sequence
    sees_HL, _ = visible_and_bias(mask_11TT[0][:, index_L, before_L.clamp(min=0)])
    return leaks_BH.any() | (sees_HL & (before_L >= 0)).any()


def _restarts(positions_1L: Tensor) -> Tensor:
    """Where a position is not one more than the last, bool (L,); the first token counts."""
    return torch.diff(positions_1L[0], prepend=positions_1L[0, :1]) != 1
