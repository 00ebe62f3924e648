"""Where the row is taken: inside the model's own forward, from the query and key its attention function is handed.

transformers models look their attention function up by name on every call. A tap replaces that table entry with a
``_Watch``, which computes the row for the one module that carries the tap and then calls the function it replaced. The
model's output is untouched, nothing is projected twice, and wrappers around the model do not matter. The entry is
looked up in the namespace that the module's own forward reads: per-layer config copies and
``AttentionInterface.register`` are both bypassed by some models or patches.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from abc_plugin.errors import CreditError, UserError
from abc_plugin.recovery.layers import REMEDY, model_name, target_layer, unwrap
from abc_plugin.recovery.row import attention_row
from abc_plugin.recovery.rows import score_positions

MARK = "_abc_attention_tap"

# What an attention function was handed that changes the row in a way not computed here, and what it means.
NOT_COMPUTED = {
    "cu_seq_lens_q": "several sequences packed into one",
    "cu_seq_lens_k": "several sequences packed into one",
    "position_bias": "a position bias",
    "block_indices": "block-sparse attention",
    "indices": "sparse attention",
}
UNPACKED = "run the reward model on padded batches: no packing_samples, no ring attention"


class AttentionTap:
    """Recovers one attention row of one layer of ``model`` (equation: ``row.attention_row``).

        tap = AttentionTap(model, layer="last_full")
        with tap.record(attention_mask_BS) as recording:
            reward = model(input_ids, attention_mask_BS)
        recording.row_BS                                        # fp32, (B, S)

    model: a transformers decoder under sdpa, flash or eager attention, itself or inside wrappers.
    layer: see ``layers.target_layer``.
    One tap per model; copies of the model carry none. ``close`` restores everything. torch.compile before or after is
    fine: the row is computed outside the graph.
    Raises UserError when the model or its attention implementation is not supported, naming it.
    """

    def __init__(self, model: Any, layer: str = "last_full") -> None:
        self.module, self.layer_index, self.num_layers = target_layer(model, layer)
        self.recording: Recording | None = None
        self._model_name = model_name(model)
        self._watches: list[_Watch] = []
        tapped = [part for part in unwrap(model).modules() if part.__dict__.get(MARK) is not None]
        if tapped:
            other = getattr(tapped[0], MARK).describe()
            raise UserError(f"{self._model_name} already has a tap ({other}); close it first")
        self._watch()
        setattr(self.module, MARK, self)

    @property
    def implementation(self) -> str:
        """Name of the attention implementation that the model runs now, e.g. "sdpa"."""
        return self.module.config._attn_implementation

    def describe(self) -> str:
        """One line for the log; layers count from 0."""
        layer = f"layer {self.layer_index} of {self.num_layers}"
        return f"attention row of {layer} ({type(self.module).__name__}, {self.implementation})"

    @contextmanager
    def record(self, attention_mask_BS: Tensor) -> Iterator[Recording]:
        """Record the row during one forward of the model on right-, left- or unpadded sequences with this mask.

        The row is that of ``score_positions(attention_mask_BS)``: the last 1 of the mask. A head that reads elsewhere
        (AutoModelForSequenceClassification: the last id that is not pad_token_id) needs a mask that ends there.
        """
        if getattr(self.module, MARK, None) is not self:
            raise CreditError("the tap is closed; attach a new AttentionTap")
        if self.recording is not None:
            raise CreditError("the tap is recording already; leave the first record() block before the next")
        self._watch()  # another library may have replaced the function since
        recording = self.recording = Recording(attention_mask_BS, self)
        try:
            yield recording
        finally:
            self.recording = None

    def close(self) -> None:
        """Detach: the table entries and the module are as before. A second call does nothing."""
        if getattr(self.module, MARK, None) is self:
            delattr(self.module, MARK)
        while self._watches:
            self._watches.pop().release(self)

    def _watch(self) -> None:
        table, name = _table_entry(self.module, self._model_name)
        watch = table[name] if isinstance(table[name], _Watch) else _Watch(table, name)
        if watch not in self._watches:
            watch.users.add(self)
            self._watches.append(watch)

    def __reduce__(self) -> tuple:
        return type(None), ()  # copying or pickling a tapped model gives an untapped one: None stands for the tap


class Recording:
    """What one ``AttentionTap.record`` block saw."""

    def __init__(self, attention_mask_BS: Tensor, tap: AttentionTap) -> None:
        self.position_B = score_positions(attention_mask_BS)
        self.fired = 0
        self._mask_BS = attention_mask_BS.bool()
        self._about = tap.describe()
        self._row_BS: Tensor | None = None
        self._packed: Tensor | None = None  # bool on the device; read in row_BS, so that the forward does not wait

    @property
    def row_BS(self) -> Tensor:
        """The row, fp32 (B, S), detached. Raises CreditError unless the layer ran exactly once, on unpacked input."""
        if self.fired == 0:
            raise CreditError(
                f"{self._about}: the layer's attention function was not called; inside record(), run the tapped model "
                "itself (not a copy, not a graph compiled before the tap)"
            )
        if self.fired > 1:
            raise CreditError(
                f"{self._about}: the layer ran {self.fired} times in one record(); record one forward at a time, of a "
                "model that does not use one layer twice"
            )
        if self._packed is not None and bool(self._packed):
            raise CreditError(f"{self._about}: position_ids restart, so sequences are packed into one; {UNPACKED}")
        return self._row_BS

    @torch.compiler.disable
    def look(
        self, module: nn.Module, query_BHSD: Tensor, key_BKSD: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> None:
        """Compute the row from one call of the attention function; CreditError where it would not be right.

        Kept out of compiled graphs, which would freeze the answer to its first question.
        """
        if torch._C._current_graph_task_id() != -1:
            return  # a backward is running: gradient checkpointing computes the layer again, it is no second forward
        self._check(query_BHSD, key_BKSD, options)
        device = query_BHSD.device
        self.fired += 1
        self._row_BS = attention_row(
            query_BHSD.detach(),
            key_BKSD.detach(),
            self.position_B.to(device),
            scaling=options.get("scaling"),
            mask=mask,
            **_heeded(module, options),
        )
        if query_BHSD.shape[0] == 1:
            self._packed = _restarts(options.get("position_ids"), self._mask_BS.to(device))

    def _check(self, query_BHSD: Tensor, key_BKSD: Tensor, options: dict[str, Any]) -> None:
        for name, meaning in NOT_COMPUTED.items():
            if options.get(name) is not None:
                raise CreditError(f"{self._about}: {name} was passed, {meaning}; {UNPACKED}")
        ran_BS = (query_BHSD.shape[0], query_BHSD.shape[2])
        if ran_BS != self._mask_BS.shape:
            raise CreditError(
                f"{self._about}: the model ran on {ran_BS} tokens, the recorded mask is {tuple(self._mask_BS.shape)}: "
                f"packed or split sequences; {UNPACKED}"
            )
        if key_BKSD.shape[2] != query_BHSD.shape[2]:
            raise CreditError(
                f"{self._about}: {key_BKSD.shape[2]} keys for {query_BHSD.shape[2]} tokens: a cache or a learned "
                "prefix; run the forward on whole sequences without past_key_values"
            )


class _Watch:
    """An attention function that shows query and key to the module's tap, if any, and calls the one it replaced."""

    def __init__(self, table: Any, name: str) -> None:
        self.table, self.name = table, name
        self.users: weakref.WeakSet[AttentionTap] = weakref.WeakSet()
        # A fresh AttentionInterface has no local overrides. What is not overridden is looked up there on every call,
        # so that a later AttentionInterface.register still takes effect under the watch.
        registered = type(table)() if isinstance(table, AttentionInterface) else {}
        self._overrides = registered.get(name) is not table[name]
        self._source = {name: table[name]} if self._overrides else registered
        table[name] = self

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        original = self._source[self.name]
        tap = module.__dict__.get(MARK)
        if tap is None or tap.recording is None:
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        recording, tap.recording = tap.recording, None  # a watch inside a foreign wrapper must not look again
        try:
            recording.look(module, query, key, attention_mask, kwargs)
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        finally:
            tap.recording = recording

    def release(self, tap: AttentionTap) -> None:
        self.users.discard(tap)
        if self.users or self.table.get(self.name) is not self:
            return  # still needed, or replaced by someone whose entry is not ours to remove
        if self._overrides:
            self.table[self.name] = self._source[self.name]
        else:
            del self.table[self.name]


def _table_entry(module: nn.Module, model: str) -> tuple[Any, str]:
    """(table, name) of the attention function the module calls. Raises UserError where there is none to watch."""
    kind, name = type(module).__name__, module.config._attn_implementation
    forward = inspect.unwrap(type(module).forward)
    if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
        raise UserError(f"{model} is not supported: {kind} bypasses transformers' attention interface; {REMEDY}")
    if name == "sdpa" and getattr(module.config, "attn_logit_softcapping", None) is not None:
        raise UserError(f"{model} is not supported under sdpa, which drops its softcap; use flash_attention_2")
    if name == "eager":
        return forward.__globals__, "eager_attention_forward"
    if name != "sdpa" and not _is_flash(name):
        raise UserError(f"attention {name!r} of {model} is not supported; use sdpa or flash_attention_2")
    return forward.__globals__["ALL_ATTENTION_FUNCTIONS"], name


def _is_flash(name: str | None) -> bool:
    return name is not None and "flash" in name and "|" not in name  # hub kernels are flash too; "paged|…" is not


def _heeded(module: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the implementation in use heeds: sdpa only causality, eager all but what its mask holds."""
    name = module.config._attn_implementation
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if name == "sdpa":
        return {"causal": causal}
    logits = {"softcap": options.get("softcap"), "sinks_H": options.get("s_aux")}
    if name == "eager":
        return {"causal": False, **logits}
    return {"causal": causal, "window": options.get("sliding_window"), **logits}


def _restarts(position_ids: Tensor | None, mask_BS: Tensor) -> Tensor | None:
    """Whether positions of neighbouring real tokens are not consecutive, a bool on the device."""
    if position_ids is None or position_ids.shape != mask_BS.shape:
        return None
    step = position_ids[:, 1:] - position_ids[:, :-1]
    return ((step != 1) & mask_BS[:, 1:] & mask_BS[:, :-1]).any()
