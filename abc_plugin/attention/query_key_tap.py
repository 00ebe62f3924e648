"""Where the row is taken: inside the model's own forward, from the query and key its attention function is handed.

transformers models look their attention function up by name on every call. While something is recorded, that table
entry is a ``_Watch``, which shows query and key to the recordings of the module that calls, and then calls the
function it stands for. The model's output is untouched, nothing is projected twice, wrappers around the model do not
matter, and outside a record block nothing is left. The entry is looked up in the namespace that the module's own
forward reads: per-layer config copies and ``AttentionInterface.register`` are both bypassed by some models or patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from abc_plugin.attention.layers import REMEDY, check_implementation, forward_code, uses_interface
from abc_plugin.attention.row_reader import RETURNS, Recording, RowReader, is_rerun
from abc_plugin.errors import UserError

RECORDINGS: dict[nn.Module, list[Recording]] = {}  # by the attention module that they are waiting for
WATCHES: dict[tuple[int, str, Any], _Watch] = {}  # by id of the table, name and function: kept for compiled graphs


class AttentionTap(RowReader):
    """Recovers one attention row of one layer of ``model`` (equation: ``attention_row.attention_rows``).

        tap = AttentionTap(model, layer="last_full")
        with tap.record(attention_mask_BS) as recording:
            reward = model(input_ids, attention_mask_BS)
        recording.row_BS                                        # fp32, (B, S)

    Of a transformers model under sdpa, flash or eager attention. Several taps on one model do not mind each other;
    copies of the model carry none. torch.compile before or after is fine: the row is computed outside the graph.
    """

    def _check_support(self) -> None:
        _table_entry(self.module, self.model_name)

    def _new_recording(self, *args: Any, **options: Any) -> Recording:
        return Recording(*args, **options)

    @contextmanager
    def _watching(self, recording: Recording) -> Iterator[None]:
        table, name = _table_entry(self.module, self.model_name)
        function = table[name]
        watch = function if isinstance(function, _Watch) else None
        watch = watch or WATCHES.setdefault((id(table), name, function), _Watch(table, name))
        waiting = RECORDINGS.setdefault(self.module, [])
        waiting.append(recording)
        watch.enter()
        try:
            yield
        finally:
            watch.leave()
            waiting.remove(recording)
            if not waiting:
                del RECORDINGS[self.module]


class _Watch:
    """An attention function that shows query and key to the module's recordings and calls the one it replaces."""

    def __init__(self, table: Any, name: str) -> None:
        self._table, self._name = table, name
        self._blocks = 0  # record blocks that need it
        # A fresh AttentionInterface has no local overrides. What is not overridden is looked up there on every call,
        # so that a later AttentionInterface.register still takes effect under the watch.
        registered = type(table)() if isinstance(table, AttentionInterface) else {}
        self._overrides = registered.get(name) is not table[name]
        self._source = {name: table[name]} if self._overrides else registered

    def enter(self) -> None:
        """Stand in the table from the first block on."""
        self._blocks += 1
        self._table[self._name] = self

    def leave(self) -> None:
        """Put the entry back after the last block, unless someone else has replaced it since."""
        self._blocks -= 1
        if self._blocks or self._table.get(self._name) is not self:
            return
        if self._overrides:
            self._table[self._name] = self._source[self._name]
        else:
            del self._table[self._name]

    @torch.compiler.disable  # a graph would freeze the answer to its first question
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
        if module in RETURNS:
            return RETURNS[module], None
        original = self._source[self._name]
        recordings = RECORDINGS.pop(module, None)  # a watch inside a foreign wrapper must not look again
        looking = [] if recordings is None or is_rerun() else recordings
        try:
            for recording in looking:
                recording.look(module, query, key, attention_mask, kwargs)
            output = original(module, query, key, value, attention_mask, *args, **kwargs)
            for recording in looking:
                recording.look_after(value, output[0])
            return output
        finally:
            if recordings is not None:
                RECORDINGS[module] = recordings


def _table_entry(module: nn.Module, model: str) -> tuple[Any, str]:
    """(table, name) of the attention function the module calls. Raises UserError where there is none to watch."""
    if not uses_interface(module):
        kind = type(module).__name__
        raise UserError(f"{model} is not supported: {kind} bypasses transformers' attention interface; {REMEDY}")
    name, names = module.config._attn_implementation, forward_code(module).__globals__
    check_implementation(name, module.config, model)
    return (names, "eager_attention_forward") if name == "eager" else (names["ALL_ATTENTION_FUNCTIONS"], name)
