"""A reward model with its own tokenizer: the policy's sequences in its tokens, and its credit back in the policy's.

Legend: B sequences, S policy tokens, A = S - 1 actions (entry t is token t + 1), L reward-model tokens.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from abc_plugin.errors import UserError, first_line
from abc_plugin.text.character_spans import Floats, Pairs, adds_spaces, pair, token_spans

Messages = list[dict[str, str]]  # turns, as apply_chat_template takes them

REPLY = "the-reply-stands-here"  # what a chat template is given instead
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

        row[b,s] = sum_l row[b,l]·share[b,l,s]                              (share: ``character_spans.pair``)

        row_BL: >= 0, as ``AttentionTap`` records it; each row's sum is preserved (a sequence without tokens has none).
        moved_share: of the weight that arrives on the response, the share whose piece has no characters there.
        Raises ValueError on another shape and on NaN.
        """
        if row_BL.shape != self.input_ids_BL.shape or not torch.isfinite(row_BL).all():
            raise ValueError(f"row of shape {tuple(row_BL.shape)} for {tuple(self.input_ids_BL.shape)}, or not finite")
        rows = row_BL.detach().to("cpu", torch.float64).numpy()
        size, action_BS = self.action_mask_BS.shape[1], self.action_mask_BS.numpy()
        carried = [pairs.carry(row, size) for pairs, row in zip(self.pairs_B, rows, strict=True)]
        out_BS, moved_BS = (np.stack(part) for part in zip(*carried, strict=True))
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
    messages_B: Sequence[Messages] | None = None,
    ends: Sequence[int] = (),
) -> MappedBatch:
    """Decode the policy's sequences and encode the text for the reward model.

    policy, reward_model: tokenizers.  sequences_BS, attention_mask_BS, action_mask_BA: OpenRLHF's, padded on any side.
    The text is what OpenRLHF sends to a remote reward model: the whole sequence decoded with its special tokens. Given
    ``messages_B`` (the turns before each reply, as ``apply_chat_template`` takes them), it is instead the reward
    model's own chat template around the reply; all that the template puts before the reply counts as prompt.
    End of sequence: where the policy's last token is its EOS or another of ``ends``, it is no text, and the reward
    model's sequence ends in *its* EOS (once); what it gives that (with a template: all behind the reply) comes back to
    the policy's last token. A reply that was cut off gets no EOS and an open turn, as it does from a reward model with
    the policy's tokenizer.
    special_tokens: whether the reward model's tokenizer adds its own (BOS, CLS, …); OpenRLHF trains without them.
    max_length: longer sequences lose their front, so that the score is still read behind the reply; default the
    tokenizer's model_max_length.
    Padding is masked, so a reward model without a pad token needs none.
    Raises UserError where a tokenizer cannot be aligned, has no usable chat template, or max_length leaves no room.
    """
    encoder = _Encoder(reward_model, special_tokens and messages_B is None, max_length)
    action_BS = torch.nn.functional.pad(action_mask_BA.bool().cpu(), (1, 0))
    ids_B, truncated_B, pairs_B = [], [], []
    for b, mask_S in enumerate(attention_mask_BS.cpu()):
        columns = mask_S.nonzero().flatten()
        turns = None if messages_B is None else messages_B[b]
        policy_ids = sequences_BS[b].cpu()[columns].tolist()
        action_S = action_BS[b][columns]
        ended = bool(policy_ids) and policy_ids[-1] in (policy.eos_token_id, *ends) and bool(action_S[-1])
        shown = _shown_text(policy, reward_model, policy_ids, action_S, turns, ended)
        ids, spans_L2, truncated = encoder(shown)
        pairs = pair(spans_L2, shown.spans_S2)
        pairs_B.append(pairs._replace(target_P=columns.numpy()[pairs.target_P]))
        ids_B.append(torch.tensor(ids))
        truncated_B.append(truncated)
    ids_BL = pad_sequence(ids_B, batch_first=True, padding_value=encoder.padding)
    mask_BL = pad_sequence([torch.ones_like(ids) for ids in ids_B], batch_first=True)
    return MappedBatch(ids_BL, mask_BL, torch.tensor(truncated_B), action_BS, pairs_B)


class _ShownText(NamedTuple):
    """The text that a reward model is shown, and which of its characters each policy token stands for."""

    text: str
    spans_S2: Floats  # [len(text), len(text) + 1) stands for the end of the sequence
    ended: bool


def _shown_text(
    policy: Any, reward_model: Any, ids: list[int], action_S: Tensor, turns: Messages | None, ended: bool
) -> _ShownText:
    text, spans = token_spans(policy, ids[:-1] if ended else ids)
    text, spans_S2, high = SURROGATE.sub("\ufffd", text), spans.numpy(), len(text)
    if turns is not None and action_S.any():
        first = int(action_S.int().argmax())
        begin = int(spans_S2[first, 0]) if first < len(spans_S2) else high
        text, stands = _in_template(reward_model, turns, text[begin:], ended)
        low, high = stands[0], stands[-1]
        spans_S2 = np.interp(spans_S2 - begin, np.arange(len(stands)), stands)
        spans_S2[:first] = 0.0
        spans_S2[max(first - 1, 0) : first, 1] = low  # the last prompt token stands for all before the reply
    if ended:
        spans_S2 = np.append(spans_S2, [[high, len(text) + 1.0]], axis=0)
    return _ShownText(text, spans_S2, ended)


def check_template(reward_model: Any) -> None:
    """Raises UserError where a tokenizer has no chat template, or one that cannot show a prompt and its reply."""
    _in_template(reward_model, [{"role": "user", "content": "a"}], "b", True)


def _in_template(reward_model: Any, turns: Messages, reply: str, ended: bool) -> tuple[str, Floats]:
    """(text, stands): the turns and the reply as the template writes them; the reply's character c is at stands[c].

    stands: (len(reply) + 1,), not decreasing; the last is where the reply ends. Characters that the template leaves
    out stand where the next one does.
    """
    before, mark, after = _rendered(reward_model, turns, f" {REPLY} ").rpartition(REPLY)
    if not mark:
        raise UserError(
            "the reward model's chat template leaves the assistant's reply out; score it without a template"
        )
    keeps = before.endswith(" ") and after.startswith(" ")  # most templates strip the reply
    before, after = (before[:-1], after[1:]) if keeps else (before, after)
    written = _rendered(reward_model, turns, reply)
    text = written if ended else written.removesuffix(after)
    low, high = len(os.path.commonprefix([before, written])), len(written.removesuffix(after))
    shown = reply if keeps else reply.strip()
    if written == before + shown + after:
        stripped = 0 if keeps else len(reply) - len(reply.lstrip())
        return text, np.clip(np.arange(len(reply) + 1.0) - stripped + low, low, high)
    # A template that treats the reply, e.g. leaves its thoughts out: aligned by words.
    ours, theirs = (re.findall(r"\w+|\s|[^\w\s]", part) for part in (reply, written[low:high]))
    our_ends, their_ends = (np.cumsum([0, *map(len, pieces)]) for pieces in (ours, theirs))
    stands = np.full(len(reply) + 1, float(high))
    for at, to, size in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()[:-1]:
        characters = np.arange(our_ends[at], our_ends[at + size])
        stands[characters] = low + their_ends[to] + characters - our_ends[at]
    return text, np.minimum.accumulate(stands[::-1])[::-1]


def _rendered(reward_model: Any, turns: Messages, reply: str) -> str:
    try:
        return reward_model.apply_chat_template([*turns, {"role": "assistant", "content": reply}], tokenize=False)
    except Exception as error:  # templates raise errors of their own for turns that they do not like
        raise UserError(f"the reward model's chat template cannot be used: {first_line(error)}") from None


class _Encoder:
    """The reward model's ids of a text, with the characters that each stands for."""

    def __init__(self, tokenizer: Any, special_tokens: bool, max_length: int | None) -> None:
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id
        self.max_length = max_length or tokenizer.model_max_length
        self.before, self.after = _added_around(tokenizer) if special_tokens else ([], [])
        self.padding = next(index for index in (tokenizer.pad_token_id, self.eos, 0) if index is not None)
        if self.max_length <= len(self.before) + len(self.after):
            raise UserError(f"the reward model's maximum length {self.max_length} leaves no room for a completion")

    def __call__(self, shown: _ShownText) -> tuple[list[int], Floats, bool]:
        """(ids, spans_L2, whether the front was cut off)."""
        text, end = shown.text, len(shown.text)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast, verbose=False
        )
        body, after = encoded["input_ids"], self.after
        spans_L2 = piece_spans(self.tokenizer, text, body, encoded.get("offset_mapping"))
        if shown.ended and self.eos is not None and (body + after)[-1:] != [self.eos]:
            after = [*after, self.eos]
        ids = self.before + body + after or [self.padding]
        front = np.zeros((len(ids) - len(body) - len(after), 2))
        spans_L2 = np.concatenate([front, spans_L2, np.tile([end, end + 1.0], (len(after), 1))])
        cut = max(len(ids) - self.max_length, 0)
        kept = np.r_[: len(self.before), len(self.before) + cut : len(ids)]
        return [ids[index] for index in kept], spans_L2[kept], cut > 0


def piece_spans(tokenizer: Any, text: str, ids: list[int], offsets: list | None) -> Floats:
    """Characters of ``text`` that each of its ids stands for (L, 2).

    By the tokens' own bytes where they spell the text, else (normalised text) by the tokenizer's offsets. A space that
    WordPiece only puts before a word when it decodes belongs to none.
    Raises UserError where they do not and there are no offsets.
    """
    try:
        spelled, spans_L2 = token_spans(tokenizer, ids)
    except UserError:
        spelled = None
    if spelled == text:
        spans_L2 = spans_L2.numpy()
        if adds_spaces(tokenizer):
            spans_L2[:, 0] += [text[int(start) : int(end)].startswith(" ") for start, end in spans_L2]
        return spans_L2
    if offsets is None:
        raise UserError(
            f"the reward model's {type(tokenizer).__name__} is a slow tokenizer without offsets, and its tokens do "
            f"not spell the text {text[:40]!r}…; use its fast version"
        )
    return _split_shared(_with_marks(text, np.asarray(offsets, np.float64).reshape(-1, 2)))


def _with_marks(text: str, offsets_L2: Floats) -> Floats:
    """Accents, and whatever else was composed with the character before it, belong to that character's tokens.

    tokenizers' offsets of a composed character are those of its first part.
    """
    covered = np.zeros(len(text), bool)
    for start, end in offsets_L2.astype(np.int64):
        covered[start:end] = True
    reach, base = np.arange(len(text) + 1.0), 0
    for at in range(1, len(text)):
        if covered[at] or not covered[base]:
            base = at
        elif unicodedata.category(text[at])[0] == "M" or len(unicodedata.normalize("NFC", text[base : at + 1])) == 1:
            reach[base + 1] = at + 1
        else:
            base = at
    return np.stack([offsets_L2[:, 0], reach[offsets_L2[:, 1].astype(np.int64)]], axis=1)


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
