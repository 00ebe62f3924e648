"""Which characters of the decoded text each token stands for, and weights carried from one set of spans to another.

Positions count characters of the text. Tokens that hold some of the bytes of one character share it: its k-th byte of
n ends at k / n of the character. Two tokenizers of bytes thus cut a character at the same numbers.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

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
    joined, cover the text. A token that is not seen in the text (an id outside the vocabulary, a leading space that
    sentencepiece drops, a space that clean_up_tokenization_spaces drops) has an empty span at its place. Bytes that
    are no UTF-8 are U+FFFD in the text and belong to the tokens that hold them.

    tokenizer: of transformers; byte-level BPE, sentencepiece BPE and unigram with or without byte fallback, WordPiece.
    Raises UserError where the tokens, put together by these rules, are not the decoded text; never shifted spans.
    """
    reader = _READERS.get(tokenizer)
    if reader is None:
        reader = _READERS[tokenizer] = _Reader(tokenizer)
    ids = [int(index) for index in ids]
    pieces = reader.pieces(ids)
    raw = b"".join(pieces)
    bounds = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(piece) for piece in pieces], out=bounds[1:])
    text = tokenizer.decode(ids, skip_special_tokens=False) if ids else ""
    compared = text.encode("utf-8", "replace").decode()  # as in the pieces, "?" for half of a surrogate pair
    position = _seen(raw.decode("utf-8", "replace"), compared, _character_positions(raw))
    if position is None:
        raise UserError(
            f"the tokens of {_name(tokenizer)} cannot be aligned with the text they decode to ({text[:40]!r}…): use a "
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
    bound_S2 = (spans_S2 + EPSILON).floor().long().tolist()
    return [text[start:end] for start, end in bound_S2]


class Pairs(NamedTuple):
    """Which source gives which share of its weight to which target; the shares of a source sum to 1."""

    source_P: NDArray[np.int64]
    target_P: NDArray[np.int64]
    share_P: Floats
    moved_P: NDArray[np.bool_]  # the source overlaps no target


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
    target_P = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    length_P = np.minimum(sources[source_P, 1], targets[target_P, 1])
    length_P -= np.maximum(sources[source_P, 0], targets[target_P, 0])
    kept = length_P > EPSILON
    source_P, target_P, length_P = source_P[kept], target_P[kept], length_P[kept]
    total_L = np.bincount(source_P, length_P, minlength=len(sources))

    lone = np.flatnonzero(total_L == 0)
    full = np.flatnonzero(targets[:, 1] - targets[:, 0] > EPSILON)
    full = full if len(full) else np.zeros(1, np.int64)
    before = np.searchsorted(targets[full, 1], sources[lone, 0] + EPSILON, "right") - 1
    return Pairs(
        np.concatenate([source_P, lone]),
        np.concatenate([target_P, full[np.maximum(before, 0)]]),
        np.concatenate([length_P / total_L[source_P], np.ones(len(lone))]),
        np.concatenate([np.zeros(len(source_P), bool), np.ones(len(lone), bool)]),
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
    source_P, target_P, share_P, moved_P = pair(spans_L2, token_spans_S2)
    weight_P = weight_L[source_P] * share_P
    total = np.abs(weight_P).sum()
    moved = np.abs(weight_P[moved_P]).sum() / total if total else 0.0
    return torch.from_numpy(np.bincount(target_P, weight_P, minlength=len(token_spans_S2))), float(moved)


class _Reader(dict[int, bytes]):
    """id: the bytes it stands for inside a text, looked up once per id."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        kinds = _decoder_kinds(backend)
        self.byte_level = "ByteLevel" in kinds
        self.byte_fallback = "ByteFallback" in kinds
        self.is_byte: dict[int, bool] = {}
        # No reference to the tokenizer itself: this object is a value under it in a weak dictionary.
        self._token = backend.id_to_token if backend is not None else tokenizer.convert_ids_to_tokens
        self._join = _joiner(tokenizer, backend)

    def __missing__(self, index: int) -> bytes:
        token = self._token(index)
        byte = BYTE_TOKEN.fullmatch(token or "") if self.byte_fallback else None
        self.is_byte[index] = byte is not None
        if token is None:
            piece = b""
        elif byte:
            piece = bytes([int(byte[1], 16)])
        elif self.byte_level:
            piece = self._bytes_of(token)
        else:
            piece = self._between(token).encode("utf-8", "replace")
        self[index] = piece
        return piece

    def pieces(self, ids: list[int]) -> list[bytes]:
        """What each id adds to the text, before the decoder drops spaces."""
        found = [self[index] for index in ids]
        if self.byte_level:
            return found
        first = next((place for place, index in enumerate(ids) if self._token(index) is not None), None)
        if first is not None and not self.is_byte[ids[first]]:  # decoders treat a text's start otherwise
            token = self._token(ids[first])
            found[first] = self._join([token, "a"]).removesuffix(self._after).encode("utf-8", "replace")
        if self.byte_fallback and not _is_utf8(b"".join(found)):
            found = _replaced_runs(found, [self.is_byte[index] for index in ids])
        return found

    def _bytes_of(self, token: str) -> bytes:
        """A byte-level token's characters are bytes in disguise; one with other characters was added as plain text."""
        try:
            return bytes([self._byte_of[character] for character in token])
        except KeyError:
            return token.encode()

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {character: byte for byte, character in bytes_to_unicode().items()}

    def _between(self, token: str) -> str:
        """What the token adds to a text that goes on to either side."""
        return self._join(["a", token, "a"]).removeprefix("a").removesuffix(self._after)

    @cached_property
    def _after(self) -> str:
        return self._join(["a", "a"]).removeprefix("a")


_READERS: WeakKeyDictionary[Any, _Reader] = WeakKeyDictionary()


def _decoder_kinds(backend: Any) -> set[str]:
    if backend is None or backend.decoder is None:
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in decoder.get("decoders", [decoder])}


def _joiner(tokenizer: Any, backend: Any) -> Any:
    if backend is None:
        return tokenizer.convert_tokens_to_string
    return " ".join if backend.decoder is None else backend.decoder.decode


def _name(tokenizer: Any) -> str:
    return f"{type(tokenizer).__name__} {getattr(tokenizer, 'name_or_path', '')}".strip()


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _replaced_runs(pieces: list[bytes], is_byte: list[bool]) -> list[bytes]:
    """Byte fallback replaces every byte of a run of byte tokens that is no UTF-8 as a whole."""
    out, start = list(pieces), 0
    while start < len(out):
        end = start
        while end < len(out) and is_byte[end]:
            end += 1
        if end > start and not _is_utf8(b"".join(out[start:end])):
            out[start:end] = [REPLACEMENT] * (end - start)
        start = end + 1
    return out


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


def _seen(joined: str, text: str, position: Floats) -> Floats | None:
    """The positions in ``text``, which may lack spaces of ``joined``; None where it differs in anything else.

    Matched from the end: what decoders drop at the start of a text is the first of its spaces.
    """
    if joined == text:
        return position
    kept = np.ones(len(joined), bool)
    if joined.endswith(text):
        kept[: len(joined) - len(text)] = False
    else:
        at = len(text)
        for index in range(len(joined) - 1, -1, -1):
            if at and joined[index] == text[at - 1]:
                at -= 1
            else:
                kept[index] = False
        if at:
            return None
    if any(joined[index] != " " for index in np.flatnonzero(~kept)):
        return None
    before = np.append(0, np.cumsum(kept))
    whole = np.floor(position).astype(np.int64)
    inside = np.append(kept, False)[whole]
    return before[whole] + np.where(inside, position - whole, 0.0)
