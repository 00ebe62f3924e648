"""What one forward showed: the row, and every reason why it would not be the one that was asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from abc_plugin.attention.attention_row import attention_row, averaged_row
from abc_plugin.attention.layers import is_flash, mixing_layer, model_name, pretrained, target_layer
from abc_plugin.attention.packed_sequences import Fault, Packing, packed_row, packing_faults, unpacked
from abc_plugin.attention.process_groups import all_heads, head_mean, heads_by_rank, rank_and_size, sum_over
from abc_plugin.attention.query_positions import ROWS, row_positions
from abc_plugin.errors import CreditError, UserError

# What an attention function was handed that changes the row in a way not computed here, and what it means.
NOT_COMPUTED = {
    "position_bias": "a position bias",
    "block_indices": "block-sparse attention",
    "indices": "sparse attention",
}
RETURNS: dict[nn.Module, Tensor] = {}  # what an attention module's function returns instead of running
PACKING = "pack in the mask's order, without a cache, with position_ids that restart, as OpenRLHF does"
MIXED = "packed samples would mix in its layers of {}, which nothing tells where a sample begins; pack none of them"
HEADS = "this process ran {} of {} heads; under tensor parallelism record with head_group, otherwise without"


class RowReader(ABC):
    """Recovers one attention row of one layer of ``model``, during the blocks of ``record``.

    model: a transformers model, itself or inside wrappers.  layer: see ``layers.target_layer``.
    row: whose attention. "mask": of the last 1 of the mask, where OpenRLHF reads its score; "pad_token": of the last
    id that is not padding, where AutoModelForSequenceClassification reads; "cls": of the first 1 of the mask.
    heads: average these only, indices from 0 among the heads of all processes.  per_head: keep recording.row_BHS too.
    Raises UserError, by name, where the row would not be exact.
    """

    how = ""  # where the row comes from, in the description
    outside = False  # whether modules outside transformers' attention interface are read

    def __init__(
        self,
        model: Any,
        layer: str = "last_full",
        *,
        row: str = "mask",
        heads: Sequence[int] | None = None,
        per_head: bool = False,
    ) -> None:
        if row not in ROWS:
            raise UserError(f"row {row!r} is none of {', '.join(ROWS)}")
        self.module, self.layer_index, self.num_layers = target_layer(model, layer, outside=self.outside)
        self.model_name, self.row, self.heads, self.per_head = model_name(model), row, heads, per_head
        self.mixing = mixing_layer(model)
        self.recording: Recording | None = None
        self.closed = False
        self._model_config = None if hasattr(self.module, "config") else pretrained(model).config.get_text_config()
        self._check_support()
        if heads is not None and max(heads) >= (total := self.config.num_attention_heads):
            raise UserError(f"--shaping.heads {max(heads)}: the layer has {total} heads, 0 to {total - 1}")

    @property
    def config(self) -> Any:
        """The layer's own configuration now, or the model's where the module has none."""
        return getattr(self.module, "config", self._model_config)

    @property
    def implementation(self) -> str:
        """Name of the attention implementation that the model runs now, e.g. "sdpa"."""
        return self.config._attn_implementation

    def describe(self) -> str:
        """One line for the log; layers count from 0."""
        how = f", {self.how}" if self.how else ""
        heads = "" if self.heads is None else f", heads {', '.join(map(str, self.heads))}"
        layer = f"layer {self.layer_index} of {self.num_layers}"
        return f"attention row of {layer} ({type(self.module).__name__}, {self.implementation}{how}){heads}"

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
        (``attention_row.averaged_row``). Not in a ring, and of packed sequences under flash attention only.
        ring_group: the stream, padded to a multiple of the group's size, is split over it in rank order.
        head_group: the layer's heads are split over it. Every process of a group records the same mask and gets the
        whole row.
        """
        if self.closed:
            raise CreditError(f"{self.describe()}: closed; attach again")
        if self.recording is not None:
            raise CreditError(f"{self.describe()}: recording already; leave the first record() block before the next")
        self._check_support()  # the implementation may have been changed since
        pad_token_id = getattr(self.config, "pad_token_id", None)
        position_B = row_positions(self.row, attention_mask_BS, input_ids_BS, pad_token_id)
        options = {"queries_BS": queries_BS, "ring_group": ring_group, "head_group": head_group}
        self.recording = self._new_recording(attention_mask_BS, position_B, self, **options)
        try:
            with self._watching(self.recording):
                yield self.recording
        finally:
            self.recording = None

    def close(self) -> None:
        """No more recordings. A second call does nothing."""
        self.closed = True

    @abstractmethod
    def _check_support(self) -> None:
        """UserError, by name, where the row would not be exact."""

    @abstractmethod
    def _new_recording(self, *args: Any, **options: Any) -> Recording: ...

    @abstractmethod
    def _watching(self, recording: Recording) -> Any:
        """A context manager within which the layer's forward is shown to the recording."""


class Recording:
    """What one ``RowReader.record`` block saw."""

    made_of = "query or key"

    def __init__(
        self,
        mask_BS: Tensor,
        position_B: Tensor,
        reader: RowReader,
        *,
        queries_BS: Tensor | None = None,
        ring_group: ProcessGroup | None = None,
        head_group: ProcessGroup | None = None,
    ) -> None:
        self._reader, self._mixing = reader.describe(), reader.mixing
        if queries_BS is not None and queries_BS.shape != mask_BS.shape:
            raise self._error(f"queries of {tuple(queries_BS.shape)} for a mask of {tuple(mask_BS.shape)}")
        if queries_BS is not None and ring_group is not None:
            raise self._error("the mean of several rows needs whole sequences; use no ring attention")
        self.position_B = position_B
        self.fired = 0
        self._mask_BS = mask_BS.bool()
        self._heads, self._per_head = reader.heads, reader.per_head
        self._queries_BS = None if queries_BS is None else queries_BS.bool()
        self._ring_group, self._head_group = ring_group, head_group
        self._row_BS: Tensor | None = None
        self._row_BHS: Tensor | None = None
        self._faults: list[Fault] = []

    @property
    def row_BS(self) -> Tensor:
        """The row, or the mean of the rows of ``queries``; mean over heads, fp32 (B, S), the same on every process.

        Raises CreditError unless the layer ran exactly once, on sequences laid out as the mask says, and the row is
        finite.
        """
        self._check_recorded()
        return self._row_BS

    @property
    def row_BHS(self) -> Tensor:
        """The rows of each head, of all processes' heads in rank order, (B, H, S); with ``per_head`` only."""
        if not self._per_head:
            raise self._error("rows of heads were not kept; attach with per_head=True")
        self._check_recorded()
        return self._row_BHS

    def _error(self, meaning: str) -> CreditError:
        return CreditError(f"{self._reader}: {meaning}")

    def _check_recorded(self) -> None:
        if self.fired == 0:
            raise self._error(
                "the layer's attention function was not called; inside record(), run the tapped model itself (not a "
                "copy, not a graph compiled before the tap)"
            )
        if self.fired > 1:
            raise self._error(
                f"the layer ran {self.fired} times in one record(); record one forward at a time, of a model that "
                "does not use one layer twice"
            )
        for wrong, meaning in self._faults:
            if bool(wrong):
                raise self._error(meaning)
        if not bool(self._row_BS.isfinite().all()):
            rows = (~self._row_BS.isfinite().all(1)).nonzero().flatten().tolist()
            raise self._error(
                f"the row of sequence {', '.join(map(str, rows))} (of 0 to {len(self._row_BS) - 1}) is not finite, so "
                f"the model's {self.made_of} is not; check its weights and precision"
            )

    @torch.no_grad()
    def look(
        self, module: nn.Module, query_BHSD: Tensor, key_BKSD: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> None:
        """Compute the row from one call of the attention function; CreditError where it would not be right."""
        self.fired += 1
        self._check_options(query_BHSD, key_BKSD, options)
        in_force = {"scaling": options.get("scaling"), "mask": mask, **_options_in_force(module, options)}
        mask_BS, position_B = self._mask_BS.to(query_BHSD.device), self.position_B.to(query_BHSD.device)
        packing = self._packing = None
        if self._is_packed(query_BHSD, options):
            if self._mixing:
                raise self._error(MIXED.format(self._mixing))
            packing = self._packing = Packing(mask_BS, position_B, query_BHSD.shape[2], self._ring_group)
            flash = is_flash(module.config._attn_implementation)
            faults = packing_faults(packing, mask, options, flash)
            self._faults = [(wrong, f"packed sequences, but {meaning}; {PACKING}") for wrong, meaning in faults]
        else:
            self._faults = unpacked_faults(options.get("position_ids"), mask_BS)
        if self._queries_BS is not None:
            if packing is not None:
                if mask is not None:
                    raise self._error(
                        "the mean of several rows of packed sequences is read under flash attention only"
                    )
                query_BHSD, key_BKSD = unpacked(packing, query_BHSD), unpacked(packing, key_BKSD)
                in_force["mask"] = mask_BS
            row_BHS = averaged_row(query_BHSD, key_BKSD, self._asked(mask_BS.device), **in_force)
        elif packing is not None:
            row_BHS = packed_row(packing, query_BHSD, key_BKSD, **in_force)
        else:
            row_BHS = attention_row(query_BHSD, key_BKSD, position_B, **in_force)
        self._keep(row_BHS, getattr(module.config, "num_attention_heads", None))

    def look_after(self, value_BKSD: Tensor, output_BSHD: Tensor) -> None:
        """What the same call was handed as values and returned; the row needs neither."""

    def _asked(self, device: torch.device) -> Tensor:
        """Whose rows to average, (B, S), noting the fault of a query that is padding."""
        queries_BS = self._queries_BS.to(device)
        padding = (queries_BS & ~self._mask_BS.to(device)).any()
        self._faults.append((padding, "a row asked for is that of a padding token"))
        return queries_BS

    def _keep(self, row_BHS: Tensor, expected_heads: int | None) -> None:
        """Reduce over heads and processes, and note the fault of heads that are missing."""
        if expected_heads is not None:
            ran = heads_by_rank(row_BHS, self._head_group).sum()
            self._faults.append((ran != expected_heads, HEADS.format(row_BHS.shape[1], expected_heads)))
        if self._heads is None and not self._per_head:
            self._row_BS = sum_over(head_mean(row_BHS, self._head_group), self._ring_group)
            return
        row_BHS = sum_over(all_heads(row_BHS, self._head_group), self._ring_group)
        self._row_BS = (row_BHS if self._heads is None else row_BHS[:, list(self._heads)]).mean(1)
        self._row_BHS = row_BHS if self._per_head else None

    def _check_options(self, query_BHSD: Tensor, key_BKSD: Tensor, options: dict[str, Any]) -> None:
        for name, meaning in NOT_COMPUTED.items():
            if options.get(name) is not None:
                raise self._error(f"{name} was passed, {meaning}, which the row does not heed")
        if key_BKSD.shape[2] != query_BHSD.shape[2]:
            raise self._error(
                f"{key_BKSD.shape[2]} keys for {query_BHSD.shape[2]} tokens: a cache or a learned prefix; run the "
                "forward on whole sequences without past_key_values"
            )

    def _is_packed(self, query_BHSD: Tensor, options: dict[str, Any]) -> bool:
        """Whether the model ran on one stream of the mask's tokens; CreditError unless on that or on the batch."""
        ran_BS = (query_BHSD.shape[0], query_BHSD.shape[2])
        bounded = options.get("cu_seq_lens_k") is not None
        if ran_BS == self._mask_BS.shape and not bounded and self._ring_group is None:
            return False
        real, (_, ranks) = int(self._mask_BS.sum()), rank_and_size(self._ring_group)
        tokens = -(-real // ranks)  # rounded up: the host pads the stream to a multiple of the ring
        if ran_BS == (1, tokens):
            return True
        ran = f"{ran_BS} tokens{' with cu_seq_lens_k' if bounded else ''}"
        raise self._error(
            f"the model ran on {ran}; a recorded mask of {tuple(self._mask_BS.shape)} means that or, packed, "
            f"(1, {tokens}) on each of {ranks} processes; record with the padded batch's mask, and with ring_group "
            "where a ring is used"
        )


def is_rerun() -> bool:
    """Whether the model's parts run now for another reason than the recorded forward.

    A backward recomputes layers under gradient checkpointing; a contribution runs single tokens (RETURNS).
    """
    return bool(RETURNS) or torch._C._current_graph_task_id() != -1


def unpacked_faults(position_ids: Tensor | None, mask_BS: Tensor) -> list[Fault]:
    """Sequences of a (1, S) batch that the mask calls one: positions of neighbouring real tokens not consecutive."""
    if len(mask_BS) != 1 or position_ids is None or position_ids.shape != mask_BS.shape:
        return []
    step = position_ids[:, 1:] - position_ids[:, :-1]
    restarts = ((step != 1) & mask_BS[:, 1:] & mask_BS[:, :-1]).any()
    return [(restarts, "position_ids restart, so sequences are packed into one; record with the padded batch's mask")]


def _options_in_force(module: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
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
