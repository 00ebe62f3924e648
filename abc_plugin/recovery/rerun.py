"""The definition in code: the row read off the full matrix of an eager forward; ``tap`` is tested against it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from abc_plugin.recovery.layers import target_layer
from abc_plugin.recovery.rows import score_positions


@torch.no_grad()
def rerun_eager_row(model: nn.Module, layer: str, attention_mask_BS: Tensor, **inputs: Any) -> Tensor:
    """Run a copy of ``model`` in eager attention, without dropout; the row of layer ``layer``, (B, S) fp32.

    row[b,s] = mean_h weights[b,h,p,s],   p = score_positions(mask)[b],   weights the (B, H, S, S) softmax of the layer
    """
    model = copy.deepcopy(model).eval()
    for part in model.modules():
        if hasattr(part, "config") and hasattr(part.config, "_attn_implementation"):
            part.config._attn_implementation = "eager"
    weights: list[Tensor] = []
    attention, _, _ = target_layer(model, layer)
    attention.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    model(attention_mask=attention_mask_BS, **inputs)
    [weights_BHSS] = weights
    position_B = score_positions(attention_mask_BS)
    return weights_BHSS[torch.arange(len(position_B)), :, position_B].float().mean(1)
