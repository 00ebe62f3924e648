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

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AttentionInterface

from abc_plugin.attention.layers import REMEDY, model_name, target_layer, unwrap
from abc_plugin.attention.positions import ROWS, row_positions
from abc_plugin.attention.recording import Recording
from abc_plugin.errors import CreditError, UserError

MARK = "_abc_attention_tap"


class AttentionTap:
    """Recovers one attention row of one layer of ``model`` (equation: ``row.attention_row``).

        tap = AttentionTap(model, layer="last_full")
        with tap.record(attention_mask_BS) as recording:
            reward = model(input_ids, attention_mask_BS)
        recording.row_BS                                        # fp32, (B, S)

    model: a transformers decoder under sdpa, flash or eager attention, itself or inside wrappers.
    layer: see ``layers.target_layer``.  per_head: keep recording.row_BHS too.
    row: whose attention. "mask": of the last 1 of the mask, where OpenRLHF reads its score; "pad_token": of the last
    id that is not padding, where AutoModelForSequenceClassification reads; "cls": of the first 1 of the mask.
    One tap per model; copies of the model carry none. ``close`` restores everything. torch.compile before or after is
    fine: the row is computed outside the graph.
    Raises UserError when the model or its attention implementation is not supported, naming it.
    """

    def __init__(self, model: Any, layer: str = "last_full", *, per_head: bool = False, row: str = "mask") -> None:
        if row not in ROWS:
            raise UserError(f"row {row!r} is none of {', '.join(ROWS)}")
        self.module, self.layer_index, self.num_layers = target_layer(model, layer)
        self.per_head, self.row = per_head, row
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
    def record(
        self,
        attention_mask_BS: Tensor,
        input_ids_BS: Tensor | None = None,
        *,
        queries_BS: Tensor | None = None,
        ring_group: ProcessGroup | None = None,
        head_group: ProcessGroup | None = None,
    ) -> Iterator[Recording]:
        """Record the row during one forward of the model on the sequences of this mask, 1 at real tokens.

        The model may run on the padded batch (B, S), padding left, right or in between, or on one stream (1, T) of the
        mask's real tokens in order, packed; recording.row_BS is (B, S) in both cases.
        input_ids_BS: for row="pad_token", the padded batch's.
        queries_BS: bool, on the padded batch; in place of the one row the mean of these queries' rows
        (``averaged.averaged_row``). Not in a ring, and of packed sequences under flash attention only.
        ring_group: the stream, padded to a multiple of the group's size, is split over it in rank order.
        head_group: the layer's heads are split over it. Every process of a group records the same mask and gets the
        whole row.
        """
        if getattr(self.module, MARK, None) is not self:
            raise CreditError("the tap is closed; attach a new AttentionTap")
        if self.recording is not None:
            raise CreditError("the tap is recording already; leave the first record() block before the next")
        self._watch()  # another library may have replaced the function since
        recording = self.recording = Recording(
            attention_mask_BS,
            row_positions(self.row, attention_mask_BS, input_ids_BS, self.module.config.pad_token_id),
            self.describe(),
            per_head=self.per_head,
            queries_BS=queries_BS,
            ring_group=ring_group,
            head_group=head_group,
        )
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
