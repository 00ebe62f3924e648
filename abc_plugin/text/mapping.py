"""A reward model with its own tokenizer: the policy's sequences in its tokens, and its credit back in the policy's.

Legend: B sequences, S policy tokens, A = S - 1 actions (entry t is token t + 1), L reward-model tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from abc_plugin.errors import UserError
from abc_plugin.text.spans import Floats, Pairs, pair, token_spans

REPLY = "the-reply-stands-here"  # what a chat template is given in its place
SURROGATE = re.compile("[\ud800-\udfff]")  # not text: fast tokenizers refuse it


class MappedBatch(NamedTuple):
    """What the reward model is given, and the way back."""

    input_ids_BL: Tensor  # int64, padded on the right
    attention_mask_BL: Tensor  # int64
    truncated_B: Tensor  # bool: tokens were cut off the front to fit max_length; their credit is 0
    action_mask_BS: Tensor
    pairs_B: list[Pairs]  # columns of this batch: source in L, target in S

    def to_policy(self, row_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Weights on the reward model's tokens -> (row_BS, moved_share_B), both float64 on the CPU.

        row[b,s] = sum_l row[b,l]·share[b,l,s]                                               (share: ``align.pair``)

        row_BL: >= 0, as ``AttentionTap`` records it; each row's sum is preserved (a sequence without tokens has none).
        moved_share: of the weight that arrives on the response, the share whose piece has no characters there.
        Raises ValueError on another shape and on NaN.
        """
        if row_BL.shape != self.input_ids_BL.shape or not torch.isfinite(row_BL).all():
            raise ValueError(f"row of shape {tuple(row_BL.shape)} for {tuple(self.input_ids_BL.shape)}, or not finite")
        row = row_BL.detach().to("cpu", torch.float64).numpy()
        out_BS, moved_BS = (np.zeros(self.action_mask_BS.shape) for _ in range(2))
        for b, (source_P, target_P, share_P, moved_P) in enumerate(self.pairs_B):
            weight_P = row[b, source_P] * share_P
            out_BS[b] = np.bincount(target_P, weight_P, minlength=out_BS.shape[1])
            moved_BS[b] = np.bincount(target_P, weight_P * moved_P, minlength=out_BS.shape[1])
        action_BS = self.action_mask_BS.numpy()
        response_B = (out_BS * action_BS).sum(1)
        moved_B = (moved_BS * action_BS).sum(1) / np.where(response_B > 0, response_B, 1.0)
        return torch.from_numpy(out_BS), torch.from_numpy(moved_B)


def map_batch(
    policy: Any,
    reward_model: Any,
    sequences_BS: Tensor,
    attention_mask_BS: Tensor,
    action_mask_BA: Tensor,
    *,
    max_length: int | None = None,
    special_tokens: bool = False,
    messages_B: Sequence[list[dict[str, str]]] | None = None,
) -> MappedBatch:
    """Decode the policy's sequences and encode the text for the reward model.

    policy, reward_model: tokenizers.  sequences_BS, attention_mask_BS, action_mask_BA: OpenRLHF's, padded on any side.
    The text is what OpenRLHF sends to a remote reward model: the whole sequence decoded with its special tokens. Given
    ``messages_B`` (the turns before each reply, as ``apply_chat_template`` takes them), it is instead the reward
    model's own chat template around the reply; all that the template puts before the reply counts as prompt.
    End of sequence: where the policy's last token is its EOS, the reward model's sequence ends in *its* EOS (once),
    and what it gives that (with a template: all behind the reply) comes back to the policy's EOS. A reply that was cut
    off gets no EOS and an open turn, as it does from a reward model with the policy's tokenizer.
    special_tokens: whether the reward model's tokenizer adds its own (BOS, CLS, …); OpenRLHF trains without them.
    max_length: longer sequences lose their front, so that the score is still read behind the reply; default the
    tokenizer's model_max_length.
    Padding is masked, so a reward model without a pad token needs none.
    Raises UserError where a tokenizer cannot be aligned, has no usable chat template, or max_length leaves no room.
    """
    action_BS = torch.nn.functional.pad(action_mask_BA.bool().cpu(), (1, 0))
    real_BS = attention_mask_BS.bool().cpu()
    columns_B = [np.flatnonzero(real) for real in real_BS.numpy()]
    views = []
    for b, columns in enumerate(columns_B):
        ids = sequences_BS[b].cpu()[real_BS[b]].tolist()
        turns = None if messages_B is None else messages_B[b]
        views.append(_view(policy, reward_model, ids, action_BS[b].numpy()[columns], turns))
    encoder = _Encoder(reward_model, special_tokens and messages_B is None, max_length)
    encoded = encoder([view.text for view in views], [view.ended for view in views])
    pairs_B = []
    for columns, view, one in zip(columns_B, views, encoded, strict=True):
        pairs = pair(one.spans_L2, view.targets_S2)
        pairs_B.append(pairs._replace(target_P=columns[pairs.target_P]))
    length = max(len(one.ids) for one in encoded)
    ids_BL = torch.tensor([one.ids + [encoder.padding] * (length - len(one.ids)) for one in encoded])
    mask_BL = torch.tensor([[1] * len(one.ids) + [0] * (length - len(one.ids)) for one in encoded])
    return MappedBatch(ids_BL, mask_BL, torch.tensor([one.truncated for one in encoded]), action_BS, pairs_B)


class _View(NamedTuple):
    """The text a reward model is shown, and where in it each policy token stands."""

    text: str
    targets_S2: Floats  # characters of text; [len(text), len(text) + 1) is the place of the end of sequence
    ended: bool


def _view(
    policy: Any, reward_model: Any, ids: list[int], action_S: np.ndarray, turns: list[dict[str, str]] | None
) -> _View:
    ended = bool(ids) and ids[-1] == policy.eos_token_id and bool(action_S[-1])
    text, spans = token_spans(policy, ids[:-1] if ended else ids)
    text, spans_S2, length = SURROGATE.sub("\ufffd", text), spans.numpy(), len(text)
    if turns is not None and action_S.any():
        first = int(action_S.argmax())
        begin = int(spans_S2[first, 0]) if first < len(spans_S2) else length
        text, shift, low, high = _in_template(reward_model, turns, text[begin:], ended)
        spans_S2 = np.clip(spans_S2 - begin + shift, low, high)
        spans_S2[:first] = 0.0
        spans_S2[max(first - 1, 0) : first, 1] = low  # the last prompt token stands for all before the reply
        length = high
    if ended:
        spans_S2 = np.append(spans_S2, [[length, len(text) + 1.0]], axis=0)
    return _View(text, spans_S2, ended)


def _in_template(reward_model: Any, turns: list[dict[str, str]], reply: str, ended: bool) -> tuple[str, int, int, int]:
    """(text, shift, low, high): the reply in the template lies in [low, high), its character c at c + shift."""
    try:
        around = reward_model.apply_chat_template(
            [*turns, {"role": "assistant", "content": f" {REPLY} "}], tokenize=False
        )
    except Exception as error:  # templates raise errors of their own for turns that they do not like
        reason = str(error).splitlines()[0]
        raise UserError(f"the reward model's chat template cannot be used: {reason}") from None
    keeps = f" {REPLY} " in around  # most templates strip the reply
    before, found, after = around.rpartition(f" {REPLY} " if keeps else REPLY)
    if not found:
        raise UserError(
            "the reward model's chat template leaves the assistant's reply out; score it without a template"
        )
    shown = reply if keeps else reply.strip()
    stripped = 0 if keeps else len(reply) - len(reply.lstrip())
    low = len(before)
    return before + shown + (after if ended else ""), low - stripped, low, low + len(shown)


class _Encoded(NamedTuple):
    ids: list[int]
    spans_L2: Floats
    truncated: bool


class _Encoder:
    """The reward model's ids of texts, with the characters that each stands for."""

    def __init__(self, tokenizer: Any, special_tokens: bool, max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length or tokenizer.model_max_length
        self.before, self.after = _added_around(tokenizer) if special_tokens else ([], [])
        ends = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.padding = next(index for index in ends if index is not None)
        if self.max_length <= len(self.before) + len(self.after):
            raise UserError(f"the reward model's maximum length {self.max_length} leaves no room for a completion")

    def __call__(self, texts: list[str], ended: list[bool]) -> list[_Encoded]:
        fast = self.tokenizer.is_fast
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=fast,
            verbose=False,
        )
        offsets = batch["offset_mapping"] if fast else [None] * len(texts)
        return [self._one(*row) for row in zip(texts, batch["input_ids"], offsets, ended, strict=True)]

    def _one(self, text: str, body: list[int], offsets: list | None, ended: bool) -> _Encoded:
        eos = self.tokenizer.eos_token_id
        spans_L2 = piece_spans(self.tokenizer, text, body, offsets)
        after = self.after
        if ended and eos is not None and (body + after)[-1:] != [eos]:
            after = [*after, eos]
        ids = self.before + body + after or [self.padding]
        front, end = np.zeros((len(ids) - len(body) - len(after), 2)), [len(text), len(text) + 1.0]
        spans_L2 = np.concatenate([front, spans_L2, np.tile(end, (len(after), 1))])
        cut = max(len(ids) - self.max_length, 0)
        kept = np.r_[: len(self.before), len(self.before) + cut : len(ids)]
        return _Encoded([ids[index] for index in kept], spans_L2[kept], cut > 0)


def piece_spans(tokenizer: Any, text: str, ids: list[int], offsets: list | None) -> Floats:
    """Characters of ``text`` that each of its ids stands for (L, 2).

    By the tokens' own bytes where they spell the text, else (normalised text) by the tokenizer's offsets.
    Raises UserError where they do not and there are no offsets.
    """
    try:
        spelled, spans_L2 = token_spans(tokenizer, ids)
    except UserError:
        spelled = None
    if spelled == text:
        return spans_L2.numpy()
    if offsets is None:
        raise UserError(
            f"the reward model's {type(tokenizer).__name__} is a slow tokenizer without offsets, and its tokens do "
            f"not spell the text {text[:40]!r}…; use its fast version"
        )
    return _split_shared(np.asarray(offsets, np.float64).reshape(-1, 2))


def _split_shared(offsets_L2: Floats) -> Floats:
    """Consecutive tokens with the same characters (bytes of one, an expanded ligature) get equal parts of them."""
    new = np.append(True, (np.diff(offsets_L2, axis=0) != 0).any(1))[: len(offsets_L2)]
    group = np.cumsum(new) - 1
    size, first = np.bincount(group)[group], np.flatnonzero(new)[group]
    part = (offsets_L2[:, 1] - offsets_L2[:, 0]) / size
    start = offsets_L2[:, 0] + part * (np.arange(len(offsets_L2)) - first)
    return np.stack([start, start + part], axis=1)


def _added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text."""
    bare, full = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise UserError(f"the special tokens of the reward model's {type(tokenizer).__name__} change the text's own ids")
