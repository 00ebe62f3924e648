"""Rows read off a layer's full (B, H, S, S) matrix of weights: what the fallback and the eager re-run share."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from abc_plugin.attention.averaged import averaged_matrix
from abc_plugin.attention.layers import REMEDY, model_name, pretrained, target_layer
from abc_plugin.attention.positions import ROWS, row_positions
from abc_plugin.attention.recording import Recording, unpacked_faults
from abc_plugin.errors import CreditError, UserError


class MatrixReader(ABC):
    """Recovers one attention row of one layer by hooks on its attention module; used as ``tap.AttentionTap`` is.

    layer, per_head, row: as there.  ``close`` removes the hooks. Packed, ring and tensor-parallel runs are refused.
    Subclasses say where the weights come from.
    """

    how: str

    def __init__(self, model: Any, layer: str = "last_full", *, per_head: bool = False, row: str = "mask") -> None:
        if row not in ROWS:
            raise UserError(f"row {row!r} is none of {', '.join(ROWS)}")
        self.module, self.layer_index, self.num_layers = target_layer(model, layer, outside=True)
        self.model_name = model_name(model)
        self.config = getattr(self.module, "config", None) or pretrained(model).config.get_text_config()
        self.per_head, self.row = per_head, row
        self.recording: MatrixRecording | None = None
        self._check_support()
        self._hooks = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after, with_kwargs=True),
        ]

    @property
    def implementation(self) -> str:
        """Name of the attention implementation that the model runs now, e.g. "sdpa"."""
        return self.config._attn_implementation

    def describe(self) -> str:
        """One line for the log; layers count from 0."""
        layer = f"layer {self.layer_index} of {self.num_layers}"
        return f"attention row of {layer} ({type(self.module).__name__}, {self.implementation}, {self.how})"

    @contextmanager
    def record(
        self,
        attention_mask_BS: Tensor,
        input_ids_BS: Tensor | None = None,
        *,
        queries_BS: Tensor | None = None,
        ring_group: ProcessGroup | None = None,
        head_group: ProcessGroup | None = None,
    ) -> Iterator[MatrixRecording]:
        """Record the row, or the mean of several, during one forward of the model on a padded batch (B, S)."""
        if not self._hooks:
            raise CreditError(f"{self.describe()}: closed; attach again")
        if self.recording is not None:
            raise CreditError(f"{self.describe()}: recording already; leave the first record() block before the next")
        if ring_group is not None or head_group is not None:
            raise CreditError(f"{self.describe()}: reads whole sequences and all heads; no ring or tensor parallelism")
        self._check_support()  # the implementation may have been changed since
        pad_token_id = getattr(self.config, "pad_token_id", None)
        position_B = row_positions(self.row, attention_mask_BS, input_ids_BS, pad_token_id)
        about, wanted = self.describe(), {"per_head": self.per_head, "queries_BS": queries_BS}
        self.recording = MatrixRecording(attention_mask_BS, position_B, about, **wanted)
        try:
            yield self.recording
        finally:
            self.recording = None

    def close(self) -> None:
        """Remove the hooks. A second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"recording": None}  # the hooks of a copied or unpickled model are idle

    @abstractmethod
    def _check_support(self) -> None:
        """UserError, by name, where the row would not be exact."""

    @abstractmethod
    def _weights(self, arguments: dict[str, Any], output: Any) -> Tensor:
        """The layer's (B, H, S, S) weights without dropout, from one call of its module."""

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Forward pre-hook: the call to make instead, or None for the one that was made."""
        return None

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.recording is None or torch._C._current_graph_task_id() != -1:
            return  # a backward is running: gradient checkpointing computes the layer again, it is no second forward
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
            raise CreditError(
                f"{self._about}: the model ran on {tuple(ran_BS)} tokens, the recorded mask is "
                f"{tuple(self._mask_BS.shape)}: packed or split sequences; run it on padded batches, or recover by tap"
            )
        self._faults = unpacked_faults(arguments.get("position_ids"), self._mask_BS.to(hidden_BSD.device))

    def keep_weights(self, weights_BHSS: Tensor) -> None:
        """Take the row at the positions, or the mean of several; that of a sequence of padding only is zero."""
        self.fired += 1
        tokens, keys = self._mask_BS.shape[1], weights_BHSS.shape[3]
        if keys != tokens:
            raise CreditError(
                f"{self._about}: {keys} keys for {tokens} tokens: a cache; run whole sequences without it"
            )
        if self._queries_BS is None:
            row_BHS = own_row(weights_BHSS, self.position_B)
        else:
            row_BHS = averaged_matrix(weights_BHSS, self._asked(weights_BHSS.device))
        self._keep(row_BHS * self._mask_BS.any(1).to(row_BHS)[:, None, None], None)


def own_row(weights_BHSS: Tensor, position_B: Tensor) -> Tensor:
    """weights[b,h,position[b],s], fp32 (B, H, S)."""
    place_B = torch.arange(len(position_B), device=weights_BHSS.device)
    return weights_BHSS[place_B, :, position_B.to(weights_BHSS.device)].float()


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


def check_outside(module: nn.Module, config: Any, model: str) -> None:
    """UserError where a module's own eager attention is not the model's: Falcon's alibi (measured: 0.16 off sdpa)."""
    if type(module).__name__ == "FalconAttention" and config.alibi:
        raise UserError(
            f"{model} with alibi is not supported: transformers counts its alibi twice in eager attention; {REMEDY}"
        )
