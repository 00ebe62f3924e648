"""The definition in code: the row read off the full matrix of an eager forward. Everything else is tested against it.

``rerun_eager_row`` runs the whole model again; ``EagerRerun`` only the attention module that is asked about, on what
the model's own forward handed it, so that the score stays what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from abc_plugin.attention.layers import attention_layers, is_full, reaches, target_layer
from abc_plugin.attention.matrix import MatrixReader, additive, check_outside, own_row, own_weights
from abc_plugin.attention.positions import score_positions
from abc_plugin.errors import CreditError, UserError

CACHES = ("past_key_values", "layer_past")

# (what a layer's queries see, whether only of earlier tokens): transformers' own maker of the mask
MASKS = {
    ("full", True): masking_utils.create_causal_mask,
    ("full", False): masking_utils.create_bidirectional_mask,
    ("sliding", True): masking_utils.create_sliding_window_causal_mask,
    ("sliding", False): masking_utils.create_bidirectional_sliding_window_mask,
    ("chunked", True): masking_utils.create_chunked_causal_mask,
}


def rerun_eager_row(model: nn.Module, layer: str, attention_mask_BS: Tensor, **inputs: Any) -> Tensor:
    """Run a copy of ``model`` in eager attention, without dropout; the row of layer ``layer``, (B, S) fp32.

    row[b,s] = mean_h weights[b,h,p,s],   p = score_positions(mask)[b],   weights the (B, H, S, S) softmax of the layer
    """
    _, index, _ = target_layer(model, layer, outside=True)
    return rerun_eager_rows(model, attention_mask_BS, **inputs)[index]


@torch.no_grad()
def rerun_eager_rows(model: nn.Module, attention_mask_BS: Tensor, **inputs: Any) -> dict[int, Tensor]:
    """As ``rerun_eager_row``, of every layer that has attention, by its index."""
    model = copy.deepcopy(model).eval()
    for part in model.modules():
        if hasattr(part, "config") and hasattr(part.config, "_attn_implementation"):
            part.config._attn_implementation = "eager"
    rows: dict[int, Tensor] = {}
    for index, attention in attention_layers(model, outside=True).items():

        def keep(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
            rows[index] = own_row(output[1], score_positions(attention_mask_BS)).mean(1)

        attention.register_forward_pre_hook(own_weights, with_kwargs=True)
        attention.register_forward_hook(keep)
    model(attention_mask=attention_mask_BS, **inputs)
    return rows


class EagerRerun(MatrixReader):
    """After the layer's own attention has run, runs it once more in eager mode and reads the row off its matrix.

    Interface and errors of ``tap.AttentionTap``; costs an S x S matrix per head and one attention module's time.
    Sequences must not be packed. Works in train mode: the second run is without dropout.
    """

    how = "eager re-run"

    def _check_support(self) -> None:
        """UserError where eager attention computes something else than the implementation in use."""
        name, softcap = self.implementation, getattr(self.config, "attn_logit_softcapping", None)
        if name not in ("eager", "sdpa") and ("flash" not in str(name) or "|" in name):
            raise UserError(f"attention {name!r} of {self.model_name} is not supported; use sdpa or flash_attention_2")
        if name == "sdpa" and softcap is not None:
            raise UserError(f"{self.model_name} is not supported under sdpa, which drops its softcap; use eager")
        check_outside(self.module, self.config, self.model_name)

    def _weights(self, arguments: dict[str, Any], output: Any) -> Tensor:
        module = self.module
        for name in CACHES:
            cache = arguments.get(name)
            if cache is not None and cache.get_seq_length(self.layer_index) > arguments["hidden_states"].shape[1]:
                raise CreditError(
                    f"{self.describe()}: keys of an earlier forward: a cache; run whole sequences without it"
                )
        changes = {name: None for name in CACHES if name in arguments}  # or its keys would enter the cache twice
        if reaches(module) and self.implementation != "eager":
            changes["attention_mask"] = _eager_mask(module, arguments)
        with _eager(module):
            _, again = own_weights(module, (), arguments | changes)
            return module(**again)[1]


@contextmanager
def _eager(module: nn.Module) -> Iterator[None]:
    """The module in eager attention and without dropout; restored afterwards."""
    training = [part for part in module.modules() if part.training]
    config = module.__dict__.get("config")
    module.eval()
    if config is not None:
        module.config = copy.copy(config)  # the other layers share it
        module.config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        if config is not None:
            module.config = config
        for part in training:
            part.training = True


def _eager_mask(module: nn.Module, arguments: dict[str, Any]) -> Tensor | None:
    """The additive (B, 1, S, S) mask of what sdpa or flash attention was told by a bool, a (B, S) mask or none."""
    hidden_BSD, mask = arguments["hidden_states"], arguments.get("attention_mask")
    if mask is not None and mask.ndim == 4:
        return additive(mask, hidden_BSD.dtype)
    config = copy.copy(module.config)
    config._attn_implementation_internal = "eager"
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    kind = "full" if is_full(module) else "chunked" if chunked else "sliding"
    make = MASKS[kind, getattr(module, "is_causal", True)]
    return make(config=config, inputs_embeds=hidden_BSD, attention_mask=mask, past_key_values=None)
