"""Which characters of a decoded text each token stands for, and weights carried from one set of spans to another.

Spans count characters of the text. Tokens that hold some of the bytes of one character share it: its k-th byte of n
ends at k / n of the character, so that two byte-level tokenizers cut a character at the same numbers.
(`tokenizers.decoders.DecodeStream` gives whole characters only, and nothing for bytes that are no UTF-8.)

Legend: S tokens, L spans that carry weight, P pairs of an overlapping span and token.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from abc_plugin.errors import UserError

Floats = NDArray[np.float64]

REPLACEMENT = "\ufffd".encode()
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
EPSILON = 1e-9  # characters; the smallest true overlap, one byte of four, is 0.25


def token_spans(tokenizer: Any, ids: list[int]) -> tuple[str, Tensor]:
    """(text, spans_S2): the text that ``ids`` decode to and the characters [start, end) of each id in it.

    text == tokenizer.decode(ids, skip_special_tokens=False); spans_S2 is float64 on the CPU. Nothing is encoded again,
    so sampled ids, which are seldom those that encoding the text would give, are right. Spans do not decrease and,
    joined, cover the text. A token that the text does not show (an id outside the vocabulary, a leading space that
    sentencepiece drops, a space that clean_up_tokenization_spaces drops) has an empty span where it would stand. Bytes
    that are no UTF-8 are U+FFFD in the text and belong to the tokens that hold them.

    tokenizer: of transformers; byte-level BPE, sentencepiece BPE and unigram with or without byte fallback, WordPiece.
    Raises UserError where the tokens, put together by these rules, are not the decoded text; never shifted spans.
    """
    ids = [int(index) for index in ids]
    pieces = _token_bytes(tokenizer).pieces(ids)
    raw = b"".join(pieces)
    bounds = np.cumsum([0, *map(len, pieces)])
    text = tokenizer.decode(ids, skip_special_tokens=False) if ids else ""
    shown = text.encode("utf-8", "replace").decode()  # as in the pieces, "?" for half of a surrogate pair
    position = _without_dropped_spaces(raw.decode("utf-8", "replace"), shown, _character_positions(raw))
    if position is None:
        name = f"{type(tokenizer).__name__} {getattr(tokenizer, 'name_or_path', '')}".strip()
        raise UserError(
            f"the tokens of {name} cannot be aligned with the text they decode to ({text[:40]!r}…): use a "
            "byte-level, sentencepiece or WordPiece tokenizer in its fast version"
        )
    bound = position[bounds]
    return text, torch.from_numpy(np.stack([bound[:-1], bound[1:]], axis=1))


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each id, for a reader: joined, they are the text that ``ids`` decode to.

    A character whose bytes lie in several tokens belongs to the last of them; the others have no text of their own.
    Tokens that ``token_spans`` cannot align are decoded one by one; a part of a character is then U+FFFD.
    """
    try:
        text, spans_S2 = token_spans(tokenizer, ids)
    except UserError:
        return [tokenizer.decode([index], clean_up_tokenization_spaces=False) for index in ids]
    return [text[start:end] for start, end in (spans_S2 + EPSILON).floor().long().tolist()]


def adds_spaces(tokenizer: Any) -> bool:
    """Whether decoding puts spaces between tokens that have none, as WordPiece's does."""
    return _token_bytes(tokenizer).after != "a"


class Pairs(NamedTuple):
    """Which source gives which share of its weight to which target; the shares of a source sum to 1."""

    source_P: NDArray[np.int64]
    target_P: NDArray[np.int64]
    share_P: Floats
    moved_P: NDArray[np.bool_]  # the source overlaps no target

    def carry(self, weight_L: Floats, size: int) -> tuple[Floats, Floats]:
        """(weight_S, moved_S) on ``size`` targets: sum_l weight[l]·share[l,s] over all sources, and over the moved."""
        weight_P = weight_L[self.source_P] * self.share_P
        return tuple(
            np.bincount(self.target_P, part_P, minlength=size) for part_P in (weight_P, weight_P * self.moved_P)
        )


def pair(spans_L2: ArrayLike, token_spans_S2: ArrayLike) -> Pairs:
    """Pair every source span with the targets that it overlaps, by overlapping characters.

    share[l,s] = |span_l ∩ token_s| / sum_u |span_l ∩ token_u|

    spans_L2: sources, in any order; they may overlap one another.  token_spans_S2: targets, in order, not overlapping,
    as ``token_spans`` gives them.
    A source that overlaps no target goes whole to the nearest before it: the last target that is not empty and ends at
    or before the source's start; where there is none, the first that is not empty; where all are empty, the first.
    Without targets there are no pairs.
    Raises ValueError when targets are out of order or a span ends before it starts.
    """
    sources, targets = (np.asarray(spans, np.float64).reshape(-1, 2) for spans in (spans_L2, token_spans_S2))
    if (sources[:, 0] > sources[:, 1]).any() or (np.diff(targets.reshape(-1)) < 0).any():
        raise ValueError("a span ends before it starts, or target spans overlap or are out of order")
    if not len(targets):
        return Pairs(*(np.zeros(0, kind) for kind in (np.int64, np.int64, np.float64, np.bool_)))
    first = np.searchsorted(targets[:, 1], sources[:, 0], "right")
    count = np.maximum(np.searchsorted(targets[:, 0], sources[:, 1], "left") - first, 0)
    source_P = np.repeat(np.arange(len(sources)), count)
    target_P = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)
    length_P = np.minimum(sources[source_P, 1], targets[target_P, 1])
    length_P -= np.maximum(sources[source_P, 0], targets[target_P, 0])
    kept = length_P > EPSILON
    source_P, target_P, length_P = source_P[kept], target_P[kept], length_P[kept]
    total_L = np.bincount(source_P, length_P, minlength=len(sources))

    alone = np.flatnonzero(total_L == 0)
    shown = np.flatnonzero(targets[:, 1] - targets[:, 0] > EPSILON)
    shown = shown if len(shown) else np.zeros(1, np.int64)
    before = np.searchsorted(targets[shown, 1], sources[alone, 0] + EPSILON, "right") - 1
    return Pairs(
        np.append(source_P, alone),
        np.append(target_P, shown[np.maximum(before, 0)]),
        np.append(length_P / total_L[source_P], np.ones(len(alone))),
        np.arange(len(source_P) + len(alone)) >= len(source_P),
    )


def spread(weight_L: ArrayLike, spans_L2: ArrayLike, token_spans_S2: ArrayLike) -> tuple[Tensor, float]:
    """Carry weights of spans to tokens: (weight_S, moved_share).

    weight[s] = sum_l weight[l]·share[l,s]                                        (share and its rules: see ``pair``)

    weight_L: any unit, signed allowed; a tensor on the CPU or an array.  weight_S: float64, with the same sum.
    moved_share: share of the sum of |weight| whose span overlaps no token; in [0, 1], 0 where all weights are zero.
    A span across the border of prompt and response gives each its part by characters: the prompt's part is lost when
    ``credit.redistribute.response_weights`` keeps the response only.
    Raises ValueError on another number of weights than spans, on NaN, and where there is weight but no token.
    """
    weight_L = np.asarray(weight_L, np.float64)
    if weight_L.shape != (len(spans_L2),) or not np.isfinite(weight_L).all():
        raise ValueError(f"weights of shape {weight_L.shape} for {len(spans_L2)} spans, or not finite")
    if weight_L.any() and not len(token_spans_S2):
        raise ValueError("there is weight, but no token to carry it")
    pairs, size = pair(spans_L2, token_spans_S2), len(token_spans_S2)
    weight_S, _ = pairs.carry(weight_L, size)
    size_S, moved_S = pairs.carry(np.abs(weight_L), size)
    return torch.from_numpy(weight_S), float(moved_S.sum() / (size_S.sum() or 1.0))


@lru_cache(maxsize=8)
def _token_bytes(tokenizer: Any) -> _TokenBytes:
    return _TokenBytes(tokenizer)


class _TokenBytes(dict[int, bytes]):
    """id: the UTF-8 bytes that it adds to a text that goes on to both sides, looked up once per id."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        parts = json.loads(decoder.__getstate__()) if decoder else {"decoders": []}
        kinds = {part["type"] for part in parts.get("decoders", [parts])}
        self.byte_level, self.byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self.token = backend.id_to_token if backend else tokenizer.convert_ids_to_tokens
        self.join = decoder.decode if decoder else " ".join if backend else tokenizer.convert_tokens_to_string
        self.after = self.join(["a", "a"]).removeprefix("a")  # an "a" behind another token

    def __missing__(self, index: int) -> bytes:
        token = self.token(index)
        if token is None:
            self[index] = b""
        elif self.is_byte(index):
            self[index] = bytes([int(token[3:5], 16)])
        elif self.byte_level:
            self[index] = _byte_level(token)
        else:
            joined = self.join(["a", token, "a"]).removeprefix("a").removesuffix(self.after)
            self[index] = joined.encode("utf-8", "replace")
        return self[index]

    def is_byte(self, index: int) -> bool:
        return self.byte_fallback and BYTE_TOKEN.fullmatch(self.token(index) or "") is not None

    def pieces(self, ids: list[int]) -> list[bytes]:
        """What each id adds to the text, before the decoder drops spaces."""
        pieces = [self[index] for index in ids]
        if self.byte_level:
            return pieces
        first = next((s for s, index in enumerate(ids) if self.token(index) is not None), None)
        if first is not None and not self.is_byte(ids[first]):  # decoders treat a text's start otherwise
            begins = self.join([self.token(ids[first]), "a"]).removesuffix(self.after)
            pieces[first] = begins.encode("utf-8", "replace")
        if self.byte_fallback and not _is_utf8(b"".join(pieces)):
            # Byte fallback replaces every byte of a run of byte tokens that is no UTF-8 as a whole.
            runs = [(byte, [*run]) for byte, run in groupby(range(len(ids)), lambda s: self.is_byte(ids[s]))]
            for byte, run in runs:
                if byte and not _is_utf8(b"".join(pieces[s] for s in run)):
                    pieces[run[0] : run[-1] + 1] = [REPLACEMENT] * len(run)
        return pieces


def _byte_level(token: str) -> bytes:
    """A byte-level token's characters are bytes in disguise; one with other characters was added as plain text."""
    try:
        return bytes(_bytes_by_character()[character] for character in token)
    except KeyError:
        return token.encode()


@lru_cache
def _bytes_by_character() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # slow to import; only byte-level BPE needs it

    return {character: byte for byte, character in bytes_to_unicode().items()}


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _character_positions(raw: bytes) -> Floats:
    """Position in characters of each boundary between bytes, (len(raw) + 1,), once ``raw`` is decoded with U+FFFD."""
    begins = (np.frombuffer(raw, np.uint8) & 0xC0) != 0x80
    done = 0
    while True:  # one turn per sequence of bytes that is no UTF-8
        try:
            raw[done:].decode()
            break
        except UnicodeDecodeError as error:
            begins[done + error.start] = True
            begins[done + error.start + 1 : done + error.end] = False
            done += error.end
    first = np.append(np.flatnonzero(begins), len(raw))
    character = np.cumsum(begins) - 1
    within = (np.arange(len(raw)) - first[character]) / np.diff(first)[character]
    return np.append(character + within, float(len(first) - 1))


def _without_dropped_spaces(joined: str, text: str, position: Floats) -> Floats | None:
    """The positions in ``text``, which may lack spaces of ``joined``; None where it differs in anything else.

    Matched from the end: what decoders drop at the start of a text is the first of its spaces.
    """
    if joined == text:
        return position
    kept, rest = np.zeros(len(joined) + 1, bool), len(text)
    for index in reversed(range(len(joined))):
        if rest and joined[index] == text[rest - 1]:
            kept[index], rest = True, rest - 1
        elif joined[index] != " ":
            return None
    if rest:
        return None
    whole = np.floor(position).astype(np.int64)
    before = np.cumsum(kept) - kept
    return before[whole] + np.where(kept[whole], position - whole, 0.0)
