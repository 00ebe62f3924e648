"""One number per token, kept from one forward, and back at its padded position when samples were packed."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from abc_plugin.attention.packed import Packing
from abc_plugin.attention.parallel import place, sum_over
from abc_plugin.attention.positions import score_positions
from abc_plugin.errors import CreditError


class TokenValues:
    """What one ``record`` block kept of each token."""

    def __init__(self, mask_BS: Tensor, about: str, ring_group: ProcessGroup | None = None) -> None:
        self._mask_BS, self._about, self._ring_group = mask_BS.bool(), about, ring_group
        self._kept: list[Tensor] = []

    def keep(self, value: Tensor) -> None:
        """Of every token that ran: of the padded batch (B, S), or of the stream (1, L) of the mask's tokens."""
        self._kept.append(padded(value.detach().float(), self._mask_BS.to(value.device), self._ring_group))

    @property
    def row_BS(self) -> Tensor:
        """fp32 (B, S), 0 on padding. Raises CreditError unless one forward ran and its values are finite."""
        if len(self._kept) != 1:
            raise CreditError(f"{self._about}: it ran {len(self._kept)} times in one record(); run one forward of it")
        if not bool(self._kept[0].isfinite().all()):
            raise CreditError(f"{self._about}: not finite; check the model's weights and precision")
        return self._kept[0]


def padded(value: Tensor, mask_BS: Tensor, ring_group: ProcessGroup | None = None) -> Tensor:
    """Values of a padded batch (B, S) or of its stream (1, L), as OpenRLHF packs it -> (B, S), 0 where the mask is 0.

    Raises CreditError on another shape.
    """
    if value.shape == mask_BS.shape and ring_group is None:
        return value.masked_fill(~mask_BS, 0.0)
    tokens = -(-int(mask_BS.sum()) // place(ring_group)[1])  # the host pads the stream to a multiple of the ring
    if value.shape != (1, tokens):
        raise CreditError(f"the model ran on {tuple(value.shape)} tokens; the mask says {tuple(mask_BS.shape)}")
    packing = Packing(mask_BS, score_positions(mask_BS), tokens, ring_group)
    return sum_over(value[0][packing.index_BS] * packing.here_BS, ring_group)
