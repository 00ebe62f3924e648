"""The one way in: choose how the row is recovered, or refuse by name."""

from __future__ import annotations

from typing import Any

from abc_plugin.attention.fallback import Fallback
from abc_plugin.attention.layers import OUTSIDE, target_layer
from abc_plugin.attention.rerun import EagerRerun
from abc_plugin.attention.tap import AttentionTap
from abc_plugin.errors import UserError

Recovery = AttentionTap | Fallback | EagerRerun
RECOVERIES = ("auto", "tap", "eager-rerun")


def attach(
    model: Any, layer: str = "last_full", recovery: str = "auto", *, row: str = "mask", per_head: bool = False
) -> Recovery:
    """Recover one attention row of one layer of ``model``, from the forwards that it runs anyway.

        recovery = attach(model)
        with recovery.record(attention_mask_BS) as recording:
            reward = model(input_ids_BS, attention_mask_BS)
        recording.row_BS                                        # fp32, (B, S); equation: ``row.attention_row``
        recovery.describe(); recovery.close()

    model: a transformers model with softmax self-attention, itself or inside wrappers.
    layer: "last_full", "last" or an index such as "-2" (``layers.target_layer``).
    recovery: "auto": the tap where the layer goes through transformers' attention interface, at no measurable cost;
    where it does not, the layer's own weights (``fallback.Fallback``).  "tap": only that.  "eager-rerun": the
    reference (``rerun.EagerRerun``), which costs a second run of the layer's attention.
    row: "mask": the token of the mask's last 1, where OpenRLHF reads the score; "pad_token": of the last id that is
    not padding, where AutoModelForSequenceClassification reads (pass record() the input_ids too); "cls": of the mask's
    first 1; record(queries_BS=...) takes the mean of those rows instead.  per_head: keep recording.row_BHS too.
    Raises UserError, naming the model, where the row would not be exact; ``describe`` says what is in use, and where.
    """
    if recovery not in RECOVERIES:
        raise UserError(f"recovery {recovery!r} is none of {', '.join(RECOVERIES)}")
    chosen = {"tap": AttentionTap, "eager-rerun": EagerRerun}.get(recovery)
    if chosen is None:
        module, _, _ = target_layer(model, layer, outside=True)
        chosen = Fallback if type(module).__name__ in OUTSIDE else AttentionTap
    return chosen(model, layer, row=row, per_head=per_head)
