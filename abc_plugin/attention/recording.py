"""What one forward showed: the row, and every reason why it would not be the one that was asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from abc_plugin.attention.averaged import averaged_row
from abc_plugin.attention.packed import Fault, Packing, packed_row, packing_faults, unpacked
from abc_plugin.attention.parallel import all_heads, head_mean, heads_by_rank, place, sum_over
from abc_plugin.attention.row import attention_row
from abc_plugin.errors import CreditError

# What an attention function was handed that changes the row in a way not computed here, and what it means.
NOT_COMPUTED = {
    "position_bias": "a position bias",
    "block_indices": "block-sparse attention",
    "indices": "sparse attention",
}


class Recording:
    """What one ``AttentionTap.record`` block saw."""

    def __init__(
        self,
        mask_BS: Tensor,
        position_B: Tensor,
        about: str,
        *,
        per_head: bool = False,
        queries_BS: Tensor | None = None,
        ring_group: ProcessGroup | None = None,
        head_group: ProcessGroup | None = None,
    ) -> None:
        if queries_BS is not None and queries_BS.shape != mask_BS.shape:
            raise CreditError(f"{about}: queries of {tuple(queries_BS.shape)} for a mask of {tuple(mask_BS.shape)}")
        if queries_BS is not None and ring_group is not None:
            raise CreditError(f"{about}: the mean of several rows needs whole sequences; use no ring attention")
        self.position_B = position_B
        self.fired = 0
        self._mask_BS = mask_BS.bool()
        self._about = about
        self._per_head = per_head
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
        """The rows of each head, of all processes' heads in rank order, (B, H, S); of a tap with ``per_head`` only."""
        if not self._per_head:
            raise CreditError(f"{self._about}: rows of heads were not kept; attach AttentionTap(..., per_head=True)")
        self._check_recorded()
        return self._row_BHS

    def _check_recorded(self) -> None:
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
        for wrong, meaning in self._faults:
            if bool(wrong):
                raise CreditError(f"{self._about}: {meaning}")
        if not bool(self._row_BS.isfinite().all()):
            rows = (~self._row_BS.isfinite().all(1)).nonzero().flatten().tolist()
            raise CreditError(
                f"{self._about}: the row of sequence {', '.join(map(str, rows))} (of 0 to {len(self._row_BS) - 1}) is "
                "not finite, so the model's query or key is not; check its weights and precision"
            )

    @torch.compiler.disable
    @torch.no_grad()
    def look(
        self, module: nn.Module, query_BHSD: Tensor, key_BKSD: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> None:
        """Compute the row from one call of the attention function; CreditError where it would not be right.

        Kept out of compiled graphs, which would freeze the answer to its first question.
        """
        if torch._C._current_graph_task_id() != -1:
            return  # a backward is running: gradient checkpointing computes the layer again, it is no second forward
        self.fired += 1
        self._check_options(query_BHSD, key_BKSD, options)
        mask_BS, position_B = self._mask_BS.to(query_BHSD.device), self.position_B.to(query_BHSD.device)
        heeded = {"scaling": options.get("scaling"), "mask": mask, **_heeded(module, options)}
        if self._is_packed(query_BHSD, options):
            packing = Packing(mask_BS, position_B, query_BHSD.shape[2], self._ring_group)
            faults = packing_faults(packing, mask, options, _is_flash(module))
            self._faults = [(wrong, f"packed sequences, but {meaning}; {PACKING}") for wrong, meaning in faults]
            if self._queries_BS is None:
                row_BHS = packed_row(packing, query_BHSD, key_BKSD, **heeded)
            else:
                padded = unpacked(packing, query_BHSD, key_BKSD, mask)
                row_BHS = averaged_row(*padded, self._asked(mask_BS.device), **heeded | {"mask": mask_BS})
        else:
            self._faults = unpacked_faults(options.get("position_ids"), mask_BS)
            if self._queries_BS is None:
                row_BHS = attention_row(query_BHSD, key_BKSD, position_B, **heeded)
            else:
                row_BHS = averaged_row(query_BHSD, key_BKSD, self._asked(mask_BS.device), **heeded)
        self._keep(row_BHS, getattr(module.config, "num_attention_heads", None))

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
        if self._per_head:
            self._row_BHS = sum_over(all_heads(row_BHS, self._head_group), self._ring_group)
            self._row_BS = self._row_BHS.mean(1)
        else:
            self._row_BS = sum_over(head_mean(row_BHS, self._head_group), self._ring_group)

    def _check_options(self, query_BHSD: Tensor, key_BKSD: Tensor, options: dict[str, Any]) -> None:
        for name, meaning in NOT_COMPUTED.items():
            if options.get(name) is not None:
                raise CreditError(f"{self._about}: {name} was passed, {meaning}, which the row does not heed")
        if key_BKSD.shape[2] != query_BHSD.shape[2]:
            raise CreditError(
                f"{self._about}: {key_BKSD.shape[2]} keys for {query_BHSD.shape[2]} tokens: a cache or a learned "
                "prefix; run the forward on whole sequences without past_key_values"
            )

    def _is_packed(self, query_BHSD: Tensor, options: dict[str, Any]) -> bool:
        """Whether the model ran on one stream of the mask's tokens; CreditError unless on that or on the batch."""
        ran_BS = (query_BHSD.shape[0], query_BHSD.shape[2])
        bounded = options.get("cu_seq_lens_k") is not None
        if ran_BS == self._mask_BS.shape and not bounded and self._ring_group is None:
            return False
        real, (_, ranks) = int(self._mask_BS.sum()), place(self._ring_group)
        tokens = -(-real // ranks)  # rounded up: the host pads the stream to a multiple of the ring
        if ran_BS == (1, tokens):
            return True
        ran = f"{ran_BS} tokens{' with cu_seq_lens_k' if bounded else ''}"
        raise CreditError(
            f"{self._about}: the model ran on {ran}; a recorded mask of {tuple(self._mask_BS.shape)} means that or, "
            f"packed, (1, {tokens}) on each of {ranks} processes; record with the padded batch's mask, and with "
            "ring_group where a ring is used"
        )


PACKING = "pack in the mask's order, without a cache, with position_ids that restart, as OpenRLHF does"
HEADS = "this process ran {} of {} heads; under tensor parallelism record with head_group, otherwise without"


def unpacked_faults(position_ids: Tensor | None, mask_BS: Tensor) -> list[Fault]:
    """Sequences of a (1, S) batch that the mask calls one: positions of neighbouring real tokens not consecutive."""
    if len(mask_BS) != 1 or position_ids is None or position_ids.shape != mask_BS.shape:
        return []
    step = position_ids[:, 1:] - position_ids[:, :-1]
    restarts = ((step != 1) & mask_BS[:, 1:] & mask_BS[:, :-1]).any()
    return [(restarts, "position_ids restart, so sequences are packed into one; record with the padded batch's mask")]


def _is_flash(module: nn.Module) -> bool:
    return "flash" in module.config._attn_implementation


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
