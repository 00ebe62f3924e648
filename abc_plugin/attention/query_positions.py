"""Which rows: the token whose hidden state the score head reads, or the tokens that generated."""

from __future__ import annotations

import torch
from torch import Tensor

from abc_plugin.credit.redistribute import last_action
from abc_plugin.errors import CreditError

ROWS = ("mask", "pad_token", "cls")


def score_positions(attention_mask_BS: Tensor) -> Tensor:
    """Index of each row's last 1, (B,) long: where OpenRLHF's reward model reads its score.

    position[b] = S - 1 - argmax_s mask[b, S-1-s]                    (openrlhf.models.model, ``eos_indices``)

    By mask, never by token id, so pad == eos and truncated responses need no case of their own; padding may lie left,
    right or in between. A row without any 1 gives S - 1, as the host's rule does; its attention row is all zeros.
    Raises ValueError unless the mask is (B, S) with S >= 1.
    """
    if attention_mask_BS.ndim != 2 or attention_mask_BS.shape[1] == 0:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask_BS.shape)}, expected (B, S) with S >= 1")
    return attention_mask_BS.shape[1] - 1 - attention_mask_BS.ne(0).long().fliplr().argmax(dim=1)


def last_unpadded_positions(input_ids_BS: Tensor, pad_token_id: int | None) -> Tensor:
    """Index of each row's last id that is not ``pad_token_id``, (B,) long.

    position[b] = argmax_s s · 1[ids[b,s] != pad]   (transformers.modeling_layers, GenericForSequenceClassification)

    Where pad == eos this is the token before the closing EOS. A row of padding gives 0; pad_token_id None gives S - 1.
    """
    index_S = torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device)
    if pad_token_id is None:
        return index_S[-1].expand(len(input_ids_BS))
    return (index_S * (input_ids_BS != pad_token_id)).argmax(dim=1)


def first_positions(attention_mask_BS: Tensor) -> Tensor:
    """Index of each row's first 1, (B,) long: the CLS token of encoders. A row without any 1 gives 0."""
    return attention_mask_BS.ne(0).long().argmax(dim=1)


def row_positions(
    rule: str, attention_mask_BS: Tensor, input_ids_BS: Tensor | None, pad_token_id: int | None
) -> Tensor:
    """Positions by a rule of ROWS: the last 1 of the mask, the last id that is not padding, or the first 1.

    Raises CreditError where "pad_token" gets no input_ids of the mask's shape; ValueError on a mask of another form.
    """
    position_B = score_positions(attention_mask_BS)
    if rule == "pad_token":
        if input_ids_BS is None or input_ids_BS.shape != attention_mask_BS.shape:
            raise CreditError("row 'pad_token' goes by ids: pass record() the input_ids of the recorded mask's shape")
        return last_unpadded_positions(input_ids_BS, pad_token_id)
    return first_positions(attention_mask_BS) if rule == "cls" else position_B


def generating_rows(need: str, action_mask_BA: Tensor) -> Tensor:
    """Whose rows answer a need of the policy's attention, bool (B, S): the token at position t generated action t.

    need: "policy", every action's; "policy_last", the last action's.
    """
    action_BA = last_action(action_mask_BA) if need == "policy_last" else action_mask_BA
    return torch.nn.functional.pad(action_BA.bool(), (0, 1))
