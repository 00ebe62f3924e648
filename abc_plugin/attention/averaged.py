"""The mean of several rows of a layer, some at a time: the matrix of all rows is never made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from abc_plugin.attention.row import attention_rows, fp32_product
from abc_plugin.credit.redistribute import last_action

ROWS = 64  # computed at a time


@torch.no_grad()
def averaged_row(
    query_BHSD: Tensor, key_BKSD: Tensor, queries_BS: Tensor, *, rows: int = ROWS, **options: Any
) -> Tensor:
    """Each key's attention, averaged over those of the queries that see it, per head, (B, H, S) fp32.

    mean[b,h,s] = Σ_p queries[b,p]·row[b,h,p,s] / Σ_p queries[b,p]·sees[b,h,p,s]      0 where no query sees the key

    With causal attention a later token is seen by fewer queries; a plain sum would favour early ones for that alone.
    (Paper, appendix B: the weighted average over the generation; the authors' code divides by the same count, in
    XanderJC/attention-based-credit, get_generator_attention_distribution.)

    queries_BS: bool, whose rows.  options: those of ``row.attention_rows``, which makes the rows.
    Time O(P·S·H·D) for P queries; memory O(rows·S·H) beside query and key.
    """
    (batch, heads, _, _), (_, _, length, _) = query_BHSD.shape, key_BKSD.shape
    position_BP = queries_BS.byte().argsort(dim=1, descending=True, stable=True)
    longest = int(queries_BS.sum(1).max())
    sum_BHS = torch.zeros(batch, heads, length, device=query_BHSD.device)
    count_BhS: Tensor | float = 0.0
    key_BKSD = key_BKSD.float()  # once, rather than in every product
    for start in range(0, longest, rows):
        position_BR = position_BP[:, start : min(start + rows, longest)]
        weights_BHRS, visible_BhRS = attention_rows(query_BHSD, key_BKSD, position_BR, **options)
        asked_B11R = queries_BS.gather(1, position_BR)[:, None, None].float()
        sum_BHS += fp32_product(asked_B11R, weights_BHRS).squeeze(2)
        count_BhS = count_BhS + fp32_product(asked_B11R, visible_BhRS).squeeze(2)
    return sum_BHS / count_BhS.clamp(min=1.0) if longest else sum_BHS


def averaged_matrix(weights_BHSS: Tensor, queries_BS: Tensor) -> Tensor:
    """As ``averaged_row``, of a layer that has made the whole matrix anyway; a query sees what it attends to."""
    asked_B11S = queries_BS[:, None, None].float()
    count_BHS = fp32_product(asked_B11S, weights_BHSS != 0).squeeze(2)
    return fp32_product(asked_B11S, weights_BHSS).squeeze(2) / count_BHS.clamp(min=1.0)


def generating_rows(need: str, action_mask_BA: Tensor) -> Tensor:
    """Whose rows answer a need of the policy's attention, bool (B, S): action t was chosen by the token at position t.

    need: "policy", every action's; "policy_last", the last action's.
    """
    chosen_BA = last_action(action_mask_BA) if need == "policy_last" else action_mask_BA
    return torch.nn.functional.pad(chosen_BA.bool(), (0, 1))
