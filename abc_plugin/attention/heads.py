"""The attention row of some heads of a layer only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from abc_plugin.attention.attach import attach
from abc_plugin.attention.layers import pretrained
from abc_plugin.errors import UserError


class HeadSubset:
    """As ``attach``, with row_BS the mean over the heads of the list instead of all.

    heads: indices from 0, among the heads of all processes where they are split.
    Raises UserError as ``attach``, and for a head that the layer does not have.
    """

    def __init__(self, model: Any, heads: Sequence[int], layer: str = "last_full", recovery: str = "auto") -> None:
        self._reader = attach(model, layer=layer, recovery=recovery, per_head=True)
        self._heads = list(heads)
        total = pretrained(model).config.get_text_config().num_attention_heads
        if max(self._heads) >= total:
            self._reader.close()
            raise UserError(f"--shaping.heads {max(self._heads)}: the layer has {total} heads, 0 to {total - 1}")

    def describe(self) -> str:
        """One line for the log."""
        return f"{self._reader.describe()}, heads {', '.join(map(str, self._heads))}"

    @contextmanager
    def record(self, attention_mask_BS: Tensor, **groups: ProcessGroup) -> Iterator[_Mean]:
        """As ``tap.AttentionTap.record``."""
        with self._reader.record(attention_mask_BS, **groups) as recording:
            yield _Mean(recording, self._heads)

    def close(self) -> None:
        """Detach."""
        self._reader.close()


class _Mean:
    def __init__(self, recording: Any, heads: list[int]) -> None:
        self._recording, self._heads = recording, heads

    @property
    def row_BS(self) -> Tensor:
        return self._recording.row_BHS[:, self._heads].mean(1)
