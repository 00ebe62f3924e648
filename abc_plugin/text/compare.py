"""Whether policy and reward model read the same text as the same ids.

OpenRLHF gives the reward model the policy's ids. So a difference is dangerous when some id or text that the policy may
write means something else to the reward model, and harmless when ids stay what they are: padding, which is masked,
tokens that only one has and that occur in none of the texts, and how prompts are dressed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from abc_plugin.text.probe_texts import probes

SAME, HARMLESS, DANGEROUS = "same", "harmless", "dangerous"
SHOWN = 5  # examples of texts that are read otherwise
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of an added token: what decides where it is found


class Finding(NamedTuple):
    """One thing compared."""

    part: str
    verdict: str  # SAME, HARMLESS or DANGEROUS
    words: str


class Example(NamedTuple):
    """A text that the two read otherwise; the ids from the first difference on."""

    text: str
    policy: list[int]
    reward_model: list[int]


@dataclass(frozen=True)
class Comparison:
    """Every finding, the worst of which is the verdict."""

    findings: list[Finding]
    texts: int
    examples: list[Example]

    @property
    def verdict(self) -> str:
        verdicts = {finding.verdict for finding in self.findings}
        return next(level for level in (DANGEROUS, HARMLESS, SAME) if level in verdicts)

    def dangerous(self) -> list[str]:
        """What makes the credit wrong, in words, the gravest first."""
        return [finding.words for finding in self.findings if finding.verdict == DANGEROUS]


@dataclass(frozen=True)
class Side:
    """One model's tokenizer, with what its other files say where they are known."""

    tokenizer: Any
    rows: int | None = None  # of the embedding; may exceed the vocabulary
    ends: tuple[int, ...] = ()  # ids that end a generated sequence

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    @cached_property
    def added(self) -> dict[str, tuple]:
        tokens = self.tokenizer.added_tokens_decoder.values()
        return {str(token): tuple(bool(getattr(token, flag)) for flag in FLAGS) for token in tokens}

    @cached_property
    def pipeline(self) -> dict[str, Any]:
        """The parts of a fast tokenizer that decide ids, in one spelling; empty for a slow one."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return {}
        parts = json.loads(backend.to_str())
        model = parts["model"]
        return {
            "normalizer": _plain(parts["normalizer"]),
            "pre-tokenizer": _plain(parts["pre_tokenizer"]),
            "merges": model.pop("merges", None),
            "model": {key: value for key, value in model.items() if value and key != "vocab"},
        }

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def name(self, index: int | None) -> str:
        return "none" if index is None else f"{index} ({self.tokenizer.convert_ids_to_tokens(index)!r})"


def first_difference(policy: Any, reward_model: Any) -> str | None:
    """The first dangerous difference between two tokenizers, in words; None when there is none."""
    return next(iter(compare(Side(policy), Side(reward_model)).dangerous()), None)


def compare(policy: Side, reward_model: Side, prompts: Sequence[str] = ()) -> Comparison:
    """Compare all that decides ids, then read the texts of ``texts.probes``, the special tokens and ``prompts``.

    prompts: as the policy is given them, chat template applied.
    """
    findings = [finding for check in CHECKS for finding in check(policy, reward_model)]
    texts = [*probes(), *_dressed(policy, reward_model), *prompts]
    examples = []
    for text, ours, theirs in zip(texts, policy.ids(texts), reward_model.ids(texts), strict=True):
        if ours != theirs:
            at = _parting(ours, theirs)
            examples.append(Example(text, ours[at:], theirs[at:]))
    if examples:
        text, ours, theirs = examples[0]
        words = f"{text[:40]!r} has, from the first difference on, the ids {ours[:8]} for the policy and {theirs[:8]} "
        words += f"for the reward model ({len(examples)} of {len(texts)} texts differ)"
        findings.append(Finding("texts", DANGEROUS, words))
    else:
        findings.append(Finding("texts", SAME, f"{len(texts)} texts have the same ids"))
    return Comparison(findings, len(texts), examples[:SHOWN])


def _vocabulary(policy: Side, reward_model: Side) -> Iterator[Finding]:
    ours, theirs = policy.vocabulary, reward_model.vocabulary
    moved = sorted((ours[token], token) for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    if moved:
        index, token = moved[0]
        words = f"the token {token!r} has id {index} for the policy and {theirs[token]} for the reward model"
        yield Finding("vocabulary", DANGEROUS, f"{words} ({len(moved)} such tokens)")
        return
    of_theirs = {index: token for token, index in theirs.items()}
    renamed = sorted((index, token) for token, index in ours.items() if of_theirs.get(index, token) != token)
    if renamed:
        index, token = renamed[0]
        words = f"id {index} is {token!r} for the policy and {of_theirs[index]!r} for the reward model"
        yield Finding("vocabulary", DANGEROUS, f"{words} ({len(renamed)} such ids)")
        return
    yield Finding("vocabulary", SAME, f"{len(ours.keys() & theirs.keys())} tokens with the same ids")
    for who, mine, other in (("policy", policy, theirs), ("reward model", reward_model, ours)):
        extra = sorted(mine.vocabulary.keys() - other.keys(), key=mine.vocabulary.get)
        if extra:
            ordinary = [token for token in extra if token not in mine.added]
            words = f"only the {who} has {', '.join(map(repr, (ordinary or extra)[:3]))}"
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            yield Finding("extra tokens", DANGEROUS if ordinary else HARMLESS, words + more)


def _end(policy: Side, reward_model: Side) -> Iterator[Finding]:
    ours, theirs = policy.tokenizer.eos_token_id, reward_model.tokenizer.eos_token_id
    words = f"eos_token_id is {policy.name(ours)} for the policy and {reward_model.name(theirs)} for the reward model"
    if ours != theirs:
        yield Finding("end of sequence", DANGEROUS, words)
    elif policy.ends and theirs not in policy.ends:
        words = f"the policy's generation ends with {policy.ends}, the reward model's sequences with {theirs}"
        yield Finding("end of sequence", DANGEROUS, words)
    elif set(policy.ends) - {ours}:
        words = f"the policy may also end with {sorted(set(policy.ends) - {ours})}, the reward model's end is {theirs}"
        yield Finding("end of sequence", HARMLESS, words)
    else:
        yield Finding("end of sequence", SAME, policy.name(ours))


def _beginning(policy: Side, reward_model: Side) -> Iterator[Finding]:
    """OpenRLHF encodes without the tokens that a tokenizer adds around a text, so they decide no id in training."""
    ours, theirs = policy.tokenizer.bos_token_id, reward_model.tokenizer.bos_token_id
    around = [side.tokenizer("a")["input_ids"] for side in (policy, reward_model)]
    added = ours in around[0] or theirs in around[1]
    if ours != theirs:
        words = f"bos_token_id is {policy.name(ours)} for the policy, {reward_model.name(theirs)} for the reward model"
        words += ", and put before texts" if added else ", and put before no text"
        yield Finding("beginning", DANGEROUS if added else HARMLESS, words)
    elif around[0] != around[1] and policy.ids(["a"]) == reward_model.ids(["a"]):
        words = f"with special tokens 'a' is {around[0]} for the policy and {around[1]} for the reward model"
        yield Finding("beginning", HARMLESS, f"{words}; OpenRLHF encodes without")
    else:
        yield Finding("beginning", SAME, policy.name(ours))


def _parts(policy: Side, reward_model: Side) -> Iterator[Finding]:
    ours, theirs = policy.pipeline, reward_model.pipeline
    if not (ours and theirs):
        kinds = " and ".join(type(side.tokenizer).__name__ for side in (policy, reward_model))
        alike = not ours and not theirs and type(policy.tokenizer) is type(reward_model.tokenizer)
        verdict = SAME if alike else HARMLESS
        yield Finding("pipeline", verdict, f"{kinds}: a slow tokenizer shows no parts, only texts were compared")
        return
    for part in ("normalizer", "pre-tokenizer", "model"):
        if ours[part] == theirs[part]:
            yield Finding(part, SAME, _short(ours[part]))
        else:
            words = f"their {part}s differ: {_short(ours[part])} for the policy, {_short(theirs[part])} for the reward"
            yield Finding(part, DANGEROUS, f"{words} model")
    if ours["merges"] == theirs["merges"]:
        yield Finding("merges", SAME, f"{len(ours['merges'] or ())}")
        return
    mine, other = ours["merges"] or [], theirs["merges"] or []
    at = _parting(mine, other)
    first = " and ".join(repr(" ".join(merges[at])) if at < len(merges) else "none" for merges in (mine, other))
    yield Finding("merges", DANGEROUS, f"their merges differ: number {at} is {first} ({len(mine)} and {len(other)})")


def _added(policy: Side, reward_model: Side) -> Iterator[Finding]:
    """Tokens that both know must be found in text alike. One made whole only to pad with is masked."""
    pads = _pads(policy, reward_model)
    both = policy.vocabulary.keys() & reward_model.vocabulary.keys()
    ours, theirs = policy.added, reward_model.added
    other = sorted(
        token for token in (both & (ours.keys() | theirs.keys())) - pads if ours.get(token) != theirs.get(token)
    )
    if not other:
        yield Finding("added tokens", SAME, f"{len(both & ours.keys())} found in text alike")
        return
    words = "; ".join(
        f"{who}: {dict(zip(FLAGS, flags, strict=True)) if flags else 'not added'}"
        for who, flags in (("policy", ours.get(other[0])), ("reward model", theirs.get(other[0])))
    )
    yield Finding("added tokens", DANGEROUS, f"the added token {other[0]!r} is not found in text alike ({words})")


def _harmless(policy: Side, reward_model: Side) -> Iterator[Finding]:
    """What changes no id of a real token."""
    sides = (policy.tokenizer, reward_model.tokenizer)
    for part, values in (
        ("pad token", [side.name(side.tokenizer.pad_token_id) for side in (policy, reward_model)]),
        ("unknown token", [side.name(side.tokenizer.unk_token_id) for side in (policy, reward_model)]),
        ("padding side", [tokenizer.padding_side for tokenizer in sides]),
        ("maximum length", [_length(tokenizer.model_max_length) for tokenizer in sides]),
        ("chat template", [str(getattr(tokenizer, "chat_template", None)) for tokenizer in sides]),
    ):
        ours, theirs = values
        if ours == theirs:
            yield Finding(part, SAME, ours[:40].replace("\n", " "))
        elif part == "chat template":
            yield Finding(
                part, HARMLESS, "differs: the reward model reads prompts as the policy's template writes them"
            )
        else:
            yield Finding(part, HARMLESS, f"{ours} for the policy, {theirs} for the reward model")


def _rows(policy: Side, reward_model: Side) -> Iterator[Finding]:
    """Every id that the policy's tokenizer knows needs a row in the reward model's embedding."""
    if reward_model.rows is None:
        return
    top = max(policy.vocabulary.values())
    known = f"{policy.rows} for the policy, {reward_model.rows} for the reward model, {top + 1} ids"
    if top >= reward_model.rows:
        words = f"the policy's id {policy.name(top)} has no row in the reward model's embedding of {reward_model.rows}"
        yield Finding("embedding rows", DANGEROUS, words)
    else:
        padded = {policy.rows, reward_model.rows} != {top + 1}
        yield Finding("embedding rows", HARMLESS if padded else SAME, known)


CHECKS = (_vocabulary, _end, _parts, _added, _rows, _beginning, _harmless)


def _dressed(policy: Side, reward_model: Side) -> list[str]:
    """Texts with the special tokens that both have, and a conversation in the policy's own template."""
    shared = [token for token in policy.added if token in reward_model.vocabulary]
    texts = [f"a {token} b{token}c" for token in shared if token not in _pads(policy, reward_model)][:256]
    if getattr(policy.tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "Hi, who are you?"}, {"role": "assistant", "content": "A model."}]
        texts.append(policy.tokenizer.apply_chat_template(turns, tokenize=False))
    return texts


def _parting(ours: list, theirs: list) -> int:
    """Index of the first difference; the shorter one's length where one begins with the other."""
    differ = (k for k, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
    return next(differ, min(len(ours), len(theirs)))


def _pads(*sides: Side) -> set[str | None]:
    """Tokens that are only ever padding."""
    return {side.tokenizer.pad_token for side in sides} - {side.tokenizer.eos_token for side in sides}


def _plain(part: Any) -> Any:
    """One spelling of a normalizer or pre-tokenizer: no sequences of one or none, nothing that changes no id."""
    if not isinstance(part, dict):
        return part
    inner = part.get("normalizers", part.get("pretokenizers"))
    if inner is not None and len(inner) < 2:
        return _plain(inner[0]) if inner else None
    rest = {key: value for key, value in part.items() if key != "trim_offsets"}
    return {key: [_plain(one) for one in value] if isinstance(value, list) else value for key, value in rest.items()}


def _short(part: Any) -> str:
    text = "none" if part is None else json.dumps(part, ensure_ascii=False).replace('"', "")
    return text if len(text) <= 120 else text[:119] + "…"


def _length(length: int) -> str:
    return "unlimited" if length > 10**9 else str(length)
