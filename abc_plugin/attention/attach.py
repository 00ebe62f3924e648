"""The one way in: choose how the row is recovered, or refuse by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abc_plugin.attention.full_matrix import EagerRerun, OwnWeights
from abc_plugin.attention.layers import OUTSIDE, target_layer
from abc_plugin.attention.query_key_tap import AttentionTap
from abc_plugin.attention.row_reader import RowReader
from abc_plugin.errors import UserError

RECOVERIES = ("auto", "tap", "eager-rerun")


def attach(
    model: Any,
    layer: str = "last_full",
    recovery: str = "auto",
    *,
    row: str = "mask",
    heads: Sequence[int] | None = None,
    per_head: bool = False,
) -> RowReader:
    """Recover one attention row of one layer of ``model``, from the forwards that it runs anyway.

        recovery = attach(model)
        with recovery.record(attention_mask_BS) as recording:
            reward = model(input_ids_BS, attention_mask_BS)
        recording.row_BS                                        # fp32, (B, S); see attention_row.attention_rows
        recovery.describe(); recovery.close()

    model: a transformers model with softmax self-attention, itself or inside wrappers.
    layer: "last_full", "last" or an index such as "-2" (``layers.target_layer``).
    recovery: "auto": the tap where the layer goes through transformers' attention interface, at no measurable cost;
    where it does not, the layer's own weights (``full_matrix.OwnWeights``).  "tap": only that.  "eager-rerun": the
    reference (``full_matrix.EagerRerun``), which costs a second run of the layer's attention.
    row, heads, per_head: see ``row_reader.RowReader``; record(queries_BS=...) takes the mean of several rows instead.
    Raises UserError, naming the model, where the row would not be exact; ``describe`` says what is in use, and where.
    """
    if recovery not in RECOVERIES:
        raise UserError(f"recovery {recovery!r} is none of {', '.join(RECOVERIES)}")
    reader = {"tap": AttentionTap, "eager-rerun": EagerRerun}.get(recovery)
    if reader is None:
        module, _, _ = target_layer(model, layer, outside=True)
        reader = OwnWeights if type(module).__name__ in OUTSIDE else AttentionTap
    return reader(model, layer, row=row, heads=heads, per_head=per_head)
