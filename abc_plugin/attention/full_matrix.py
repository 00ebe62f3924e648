"""Rows read off a layer's full (B, H, S, S) matrix of weights.

``rerun_eager_row`` is the definition in code, against which everything else is tested: the whole model, eager, again.
``EagerRerun`` runs only the layer's attention again, on what the model's own forward handed it.  ``OwnWeights`` reads
the modules outside transformers' attention interface, which compute their weights themselves.
"""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from abc_plugin.attention.attention_row import averaged_matrix
from abc_plugin.attention.layers import (
    OUTSIDE,
    REMEDY,
    attention_layers,
    check_implementation,
    is_full,
    target_layer,
    uses_interface,
)
from abc_plugin.attention.query_positions import score_positions
from abc_plugin.attention.row_reader import Recording, RowReader, is_rerun, unpacked_faults
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


class MatrixReader(RowReader):
    """Recovers one attention row of one layer by hooks on its attention module, on padded batches of one process."""

    outside = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._hooks = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after, with_kwargs=True),
        ]

    def close(self) -> None:
        """Remove the hooks. A second call does nothing."""
        super().close()
        while self._hooks:
            self._hooks.pop().remove()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"recording": None}  # the hooks of a copied or unpickled model are idle

    @abstractmethod
    def _weights(self, arguments: dict[str, Any], output: Any) -> Tensor:
        """The layer's (B, H, S, S) weights without dropout, from one call of its module."""

    def _new_recording(self, *args: Any, **options: Any) -> Recording:
        if options["ring_group"] is not None or options["head_group"] is not None:
            raise CreditError(f"{self.describe()}: reads whole sequences and all heads; no ring or tensor parallelism")
        return MatrixRecording(*args, **options)

    @contextmanager
    def _watching(self, recording: Recording) -> Iterator[None]:
        yield  # the hooks look at self.recording

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Forward pre-hook: the call to make instead, or None for the one that was made."""
        return None

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.recording is None or is_rerun():
            return
        recording, self.recording = self.recording, None  # the module may be called again below
        try:
            arguments = named_arguments(module, args, kwargs)
            recording.check_layout(arguments)
            recording.keep_weights(self._weights(arguments, output))
        finally:
            self.recording = recording


class MatrixRecording(Recording):
    """What one ``MatrixReader.record`` block saw."""

    def check_layout(self, arguments: dict[str, Any]) -> None:
        """CreditError unless the layer ran on the padded batch that the mask describes."""
        hidden_BSD = arguments["hidden_states"]
        ran_BS = hidden_BSD.shape[:2]
        if ran_BS != self._mask_BS.shape or arguments.get("cu_seq_lens_q") is not None:
            raise self._error(
                f"the model ran on {tuple(ran_BS)} tokens, the recorded mask is {tuple(self._mask_BS.shape)}: packed "
                "or split sequences; run it on padded batches, or recover by tap"
            )
        self._faults = unpacked_faults(arguments.get("position_ids"), self._mask_BS.to(hidden_BSD.device))

    def keep_weights(self, weights_BHSS: Tensor) -> None:
        """Take the row at the positions, or the mean of several; that of a sequence of padding only is zero."""
        self.fired += 1
        tokens, keys = self._mask_BS.shape[1], weights_BHSS.shape[3]
        if keys != tokens:
            raise self._error(f"{keys} keys for {tokens} tokens: a cache; run whole sequences without it")
        if self._queries_BS is None:
            row_BHS = own_row(weights_BHSS, self.position_B)
        else:
            row_BHS = averaged_matrix(weights_BHSS, self._asked(weights_BHSS.device))
        self._keep(row_BHS * self._mask_BS.any(1).to(row_BHS)[:, None, None], None)


class OwnWeights(MatrixReader):
    """Has a layer outside the attention interface compute its attention eagerly, inside the model's own forward.

    For the modules of ``layers.OUTSIDE``. Most of them know no other way than the full matrix, so that nothing is
    added; Falcon under sdpa gives up its kernel in this one layer, and its score may differ from the stock one by
    rounding. In train mode the weights are those after dropout: CreditError where the model has been switched to it.
    """

    how = "read from its own weights"

    def _check_support(self) -> None:
        kind = type(self.module).__name__
        if kind not in OUTSIDE:
            raise UserError(f"{self.model_name} is not supported: {kind} hands out no weights; {REMEDY}")
        check_alibi(self.module, self.config, self.model_name)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        return None if self.recording is None or is_rerun() else own_weights(module, args, kwargs)

    def _weights(self, arguments: dict[str, Any], output: Any) -> Tensor:
        if self.module.training:
            raise CreditError(f"{self.describe()}: in train mode its weights are after dropout; call model.eval()")
        return output[1].detach()


class EagerRerun(MatrixReader):
    """After the layer's own attention has run, runs it once more in eager mode and reads the row off its matrix.

    The score stays what it was. Costs an S x S matrix per head and one attention module's time. Works in train mode:
    the second run is without dropout.
    """

    how = "eager re-run"

    def _check_support(self) -> None:
        check_implementation(self.implementation, self.config, self.model_name)
        check_alibi(self.module, self.config, self.model_name)

    def _weights(self, arguments: dict[str, Any], output: Any) -> Tensor:
        module = self.module
        for name in CACHES:
            cache = arguments.get(name)
            if cache is not None and cache.get_seq_length(self.layer_index) > arguments["hidden_states"].shape[1]:
                raise CreditError(
                    f"{self.describe()}: keys of an earlier forward: a cache; run whole sequences without it"
                )
        changes = {name: None for name in CACHES if name in arguments}  # or its keys would enter the cache twice
        if uses_interface(module) and self.implementation != "eager":
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


def own_row(weights_BHSS: Tensor, position_B: Tensor) -> Tensor:
    """weights[b,h,position[b],s], fp32 (B, H, S)."""
    index_B = torch.arange(len(position_B), device=weights_BHSS.device)
    return weights_BHSS[index_B, :, position_B.to(weights_BHSS.device)].float()


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names in the class's forward."""
    names = list(inspect.signature(type(module).forward).parameters)[1 : 1 + len(args)]
    return dict(zip(names, args, strict=True)) | kwargs


def own_weights(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The call changed so that a module outside the attention interface computes and returns its weights.

    Usable as a forward pre-hook. Falcon under sdpa is handed a bool mask, which its eager branch would add as 0 and 1.
    """
    arguments = named_arguments(module, args, kwargs)
    if "output_attentions" in inspect.signature(type(module).forward).parameters:
        arguments["output_attentions"] = True
    mask = arguments.get("attention_mask")
    if type(module).__name__ == "FalconAttention" and mask is not None and mask.dtype == torch.bool:
        arguments["attention_mask"] = additive(mask, arguments["hidden_states"].dtype)
    return (), arguments


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = visible) as what is added to the logits: 0 or the lowest number; others unchanged."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def check_alibi(module: nn.Module, config: Any, model: str) -> None:
    """UserError where a module's own eager attention is not the model's: Falcon's alibi (measured: 0.16 off sdpa)."""
    if type(module).__name__ == "FalconAttention" and config.alibi:
        raise UserError(
            f"{model} with alibi is not supported: transformers counts its alibi twice in eager attention; {REMEDY}"
        )
