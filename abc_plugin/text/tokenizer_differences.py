"""Whether policy and reward model read the same text as the same ids.

OpenRLHF gives the reward model the policy's ids. So two tokenizers are incompatible when some id or text that the
policy may write means something else to the reward model, and compatible when ids stay what they are: they may differ
in padding, which is masked, in added tokens that only one has and no text holds, and in how prompts are dressed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial
from typing import Any, NamedTuple

from abc_plugin.text.probe_texts import probes

EXAMPLES = 5  # kept of the texts that are read otherwise
MATCHING = ("single_word", "lstrip", "rstrip", "normalized")  # how an added token is matched in text


class Verdict(StrEnum):
    """How a difference is judged, in the words of the report and its JSON."""

    SAME = "same"
    COMPATIBLE = "harmless"
    INCOMPATIBLE = "dangerous"


SAME, COMPATIBLE, INCOMPATIBLE = Verdict
Judged = tuple[Verdict, str]  # and the words for it; None where there is nothing to compare


class Finding(NamedTuple):
    """One thing compared."""

    part: str
    verdict: Verdict
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
    texts: int  # read by both
    examples: list[Example]

    @property
    def verdict(self) -> Verdict:
        return max((finding.verdict for finding in self.findings), key=list(Verdict).index)

    def incompatibilities(self) -> list[str]:
        """What makes the credit wrong, in words, the gravest first."""
        return [finding.words for finding in self.findings if finding.verdict == INCOMPATIBLE]


@dataclass(frozen=True)
class ModelTokenizer:
    """A model's tokenizer, with what the model's configuration tells where there is one."""

    tokenizer: Any
    embedding_rows: int | None = None  # may exceed the vocabulary
    generation_ends: tuple[int, ...] = ()  # ids that end a generated sequence, by its generation_config
    config_ends: tuple[int, ...] = ()  # those of its config, which count where there is no generation_config

    @property
    def ends(self) -> tuple[int, ...]:
        """Every id that may end a generated sequence."""
        return end_ids(self.tokenizer.eos_token_id, self.generation_ends, self.config_ends)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    @cached_property
    def added(self) -> dict[str, dict[str, bool]]:
        """Added tokens and how they are matched."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        return {str(token): {name: bool(getattr(token, name)) for name in MATCHING} for token in tokens}

    @cached_property
    def pipeline(self) -> dict[str, Any]:
        """The parts of a fast tokenizer that decide ids, in one spelling; empty for a slow one."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return {}
        parts = json.loads(backend.to_str())
        model = parts["model"]
        return {
            "normalizer": _one_spelling(parts["normalizer"]),
            "pre-tokenizer": _one_spelling(parts["pre_tokenizer"]),
            "merges": model.pop("merges", None) or [],
            "model": {key: value for key, value in model.items() if value and key != "vocab"},
        }

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def name(self, index: int | None) -> str:
        return "none" if index is None else f"{index} ({self.tokenizer.convert_ids_to_tokens(index)!r})"


def end_ids(*ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids among eos_token_id as tokenizers and configurations have it: one id, several, or none."""
    return tuple(sorted({one for part in ids for one in ([part] if isinstance(part, int) else part or ())}))


def compare(policy: ModelTokenizer, reward_model: ModelTokenizer, prompts: Sequence[str] = ()) -> Comparison:
    """Compare all that decides ids, then read the texts of ``probes``, the special tokens and ``prompts``.

    prompts: as the policy is given them, chat template applied.
    """
    judged = [(part, check(policy, reward_model)) for part, check in CHECKS]
    findings = [Finding(part, *result) for part, result in judged if result is not None]
    texts = [*probes(), *_texts_with_special_tokens(policy, reward_model), *prompts]
    examples = []
    for text, ours, theirs in zip(texts, policy.encode(texts), reward_model.encode(texts), strict=True):
        if ours != theirs:
            first = _first_difference(ours, theirs)
            examples.append(Example(text, ours[first:], theirs[first:]))
    if examples:
        text, ours, theirs = examples[0]
        words = f"{text[:40]!r} has, from the first difference on, the ids {_both(ours[:8], theirs[:8])}"
        findings.append(Finding("texts", INCOMPATIBLE, f"{words} ({len(examples)} of {len(texts)} texts differ)"))
    else:
        findings.append(Finding("texts", SAME, f"{len(texts)} texts have the same ids"))
    return Comparison(findings, len(texts), examples[:EXAMPLES])


def _vocabulary(policy: ModelTokenizer, reward_model: ModelTokenizer) -> Judged:
    ours, theirs = policy.vocabulary, reward_model.vocabulary
    both = ours.keys() & theirs.keys()
    moved = sorted((ours[token], token) for token in both if ours[token] != theirs[token])
    if moved:
        index, token = moved[0]
        words = _both(index, theirs[token])
        return INCOMPATIBLE, f"the token {token!r} has id {words} ({len(moved)} such tokens)"
    their_tokens = {index: token for token, index in theirs.items()}
    renamed = sorted((index, token) for token, index in ours.items() if their_tokens.get(index, token) != token)
    if renamed:
        index, token = renamed[0]
        words = _both(repr(token), repr(their_tokens[index]))
        return INCOMPATIBLE, f"id {index} is {words} ({len(renamed)} such ids)"
    return SAME, f"{len(both)} tokens with the same ids"


def _extra_tokens(who: str, policy: ModelTokenizer, reward_model: ModelTokenizer) -> Judged | None:
    """Of two vocabularies that agree, what only one has: none of its texts where it is an added token."""
    one, other = (policy, reward_model) if who == "policy" else (reward_model, policy)
    extra = sorted(one.vocabulary.keys() - other.vocabulary.keys(), key=one.vocabulary.get)
    if not extra or _vocabulary(policy, reward_model)[0] != SAME:
        return None
    ordinary = [token for token in extra if token not in one.added]
    words = f"only the {who} has {', '.join(map(repr, (ordinary or extra)[:3]))}"
    more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
    return INCOMPATIBLE if ordinary else COMPATIBLE, words + more


def _end(policy: ModelTokenizer, reward_model: ModelTokenizer) -> Judged:
    ours, theirs = policy.tokenizer.eos_token_id, reward_model.tokenizer.eos_token_id
    ends = policy.generation_ends
    if ours != theirs:
        return INCOMPATIBLE, f"eos_token_id is {_both(policy.name(ours), reward_model.name(theirs))}"
    if ends and theirs not in ends:
        return INCOMPATIBLE, f"the policy's generation ends with {ends}, the reward model's sequences with {theirs}"
    if others := set(ends) - {ours}:
        return COMPATIBLE, f"the policy may also end with {sorted(others)}, the reward model's end is {theirs}"
    return SAME, policy.name(ours)


def _beginning(policy: ModelTokenizer, reward_model: ModelTokenizer) -> Judged:
    """OpenRLHF encodes without the tokens that a tokenizer adds around a text, so they decide no id in training."""
    ours, theirs = policy.tokenizer.bos_token_id, reward_model.tokenizer.bos_token_id
    our_ids, their_ids = (model.tokenizer("a")["input_ids"] for model in (policy, reward_model))
    if ours != theirs:
        words = f"bos_token_id is {_both(policy.name(ours), reward_model.name(theirs))}"
        if ours in our_ids or theirs in their_ids:
            return INCOMPATIBLE, f"{words}, and put before texts"
        return COMPATIBLE, f"{words}, and put before no text"
    if our_ids != their_ids and policy.encode(["a"]) == reward_model.encode(["a"]):
        return COMPATIBLE, f"with special tokens 'a' is {_both(our_ids, their_ids)}; OpenRLHF encodes without"
    return SAME, policy.name(ours)


def _slow(policy: ModelTokenizer, reward_model: ModelTokenizer) -> Judged | None:
    if policy.pipeline and reward_model.pipeline:
        return None
    ours, theirs = type(policy.tokenizer), type(reward_model.tokenizer)
    alike = ours is theirs and not policy.pipeline and not reward_model.pipeline
    words = f"{ours.__name__} and {theirs.__name__}: a slow tokenizer shows no parts, only texts were compared"
    return SAME if alike else COMPATIBLE, words


def _part(part: str, policy: ModelTokenizer, reward_model: ModelTokenizer) -> Judged | None:
    if not (policy.pipeline and reward_model.pipeline):
        return None
    ours, theirs = policy.pipeline[part], reward_model.pipeline[part]
    if part == "merges" and ours != theirs:
        at = _first_difference(ours, theirs)
        one, other = (repr(" ".join(merges[at])) if at < len(merges) else "none" for merges in (ours, theirs))
        words = f"number {at} is {one} and {other} ({len(ours)} and {len(theirs)})"
        return INCOMPATIBLE, f"their merges differ: {words}"
    if ours != theirs:
        return INCOMPATIBLE, f"their {part}s differ: {_both(_short(ours), _short(theirs))}"
    return SAME, str(len(ours)) if part == "merges" else _short(ours)


def _added_tokens(policy: ModelTokenizer, reward_model: ModelTokenizer) -> Judged:
    """Tokens that both know must be matched in text alike. One that only ever pads is masked."""
    both = policy.vocabulary.keys() & reward_model.vocabulary.keys()
    ours, theirs = policy.added, reward_model.added
    added = (both & (ours.keys() | theirs.keys())) - _padding_tokens(policy, reward_model)
    different = sorted(token for token in added if ours.get(token) != theirs.get(token))
    if different:
        token = different[0]
        words = _both(*(model.get(token, "not added") for model in (ours, theirs)))
        return INCOMPATIBLE, f"the added token {token!r} is not matched in text alike: {words}"
    return SAME, f"{len(both & ours.keys())} matched in text alike"


def _embedding_rows(policy: ModelTokenizer, reward_model: ModelTokenizer) -> Judged | None:
    """Every id that the policy's tokenizer knows needs a row in the reward model's embedding."""
    ours, theirs = policy.embedding_rows, reward_model.embedding_rows
    if theirs is None:
        return None
    top = max(policy.vocabulary.values())
    if ours is not None and top >= ours:
        return INCOMPATIBLE, f"the policy's id {policy.name(top)} has no row in its own embedding of {ours}"
    if top >= theirs:
        words = f"the policy's id {policy.name(top)} has no row in the reward model's embedding of {theirs}"
        return INCOMPATIBLE, words
    words = f"{_both(ours, theirs)}, {top + 1} ids"
    if ours is not None and ours > max(theirs, top + 1):
        words += (
            f"; ids from {top + 1} on are no tokens: abc-rlhf local never draws one, vLLM under abc-rlhf ray may, and "
            f"from {theirs} on it has no row in the reward model, which ends the run"
        )
    return SAME if {ours, theirs} == {top + 1} else COMPATIBLE, words


def _unused(value: Callable[[ModelTokenizer], str], policy: ModelTokenizer, reward_model: ModelTokenizer) -> Judged:
    """What changes no id of a real token."""
    ours, theirs = value(policy), value(reward_model)
    if ours == theirs:
        return SAME, ours[:40].replace("\n", " ")
    if value is _chat_template:
        return COMPATIBLE, "differs: the reward model reads prompts as the policy's template writes them"
    return COMPATIBLE, _both(ours, theirs)


def _chat_template(model: ModelTokenizer) -> str:
    return str(getattr(model.tokenizer, "chat_template", None))


def _maximum_length(model: ModelTokenizer) -> str:
    length = model.tokenizer.model_max_length
    return "unlimited" if length > 10**9 else str(length)


# (part, check): the gravest first.
CHECKS: tuple[tuple[str, Callable[[ModelTokenizer, ModelTokenizer], Judged | None]], ...] = (
    ("vocabulary", _vocabulary),
    ("extra tokens", partial(_extra_tokens, "policy")),
    ("extra tokens", partial(_extra_tokens, "reward model")),
    ("end of sequence", _end),
    ("pipeline", _slow),
    *((part, partial(_part, part)) for part in ("normalizer", "pre-tokenizer", "model", "merges")),
    ("added tokens", _added_tokens),
    ("embedding rows", _embedding_rows),
    ("beginning", _beginning),
    ("pad token", partial(_unused, lambda model: model.name(model.tokenizer.pad_token_id))),
    ("unknown token", partial(_unused, lambda model: model.name(model.tokenizer.unk_token_id))),
    ("padding side", partial(_unused, lambda model: model.tokenizer.padding_side)),
    ("maximum length", partial(_unused, _maximum_length)),
    ("chat template", partial(_unused, _chat_template)),
)


def _texts_with_special_tokens(policy: ModelTokenizer, reward_model: ModelTokenizer) -> list[str]:
    """Texts around the special tokens that both have, and a conversation in the policy's own template."""
    padding = _padding_tokens(policy, reward_model)
    shared = [token for token in policy.added if token in reward_model.vocabulary and token not in padding]
    texts = [f"a {token} b{token}c" for token in shared[:256]]
    if getattr(policy.tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "Hi, who are you?"}, {"role": "assistant", "content": "A model."}]
        texts.append(policy.tokenizer.apply_chat_template(turns, tokenize=False))
    return texts


def _both(ours: Any, theirs: Any) -> str:
    return f"{ours} for the policy and {theirs} for the reward model"


def _first_difference(ours: list, theirs: list) -> int:
    """Index of the first difference; the shorter one's length where one begins with the other."""
    differ = (k for k, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
    return next(differ, min(len(ours), len(theirs)))


def _padding_tokens(*models: ModelTokenizer) -> set[str | None]:
    """Tokens that are only ever padding."""
    return {model.tokenizer.pad_token for model in models} - {model.tokenizer.eos_token for model in models}


def _one_spelling(part: Any) -> Any:
    """A normalizer or pre-tokenizer without sequences of one or none and without what changes no id."""
    if not isinstance(part, dict):
        return part
    inner = part.get("normalizers", part.get("pretokenizers"))
    if inner is not None and len(inner) < 2:
        return _one_spelling(inner[0]) if inner else None
    return {
        key: [_one_spelling(one) for one in value] if isinstance(value, list) else value
        for key, value in part.items()
        if key != "trim_offsets"
    }


def _short(part: Any) -> str:
    text = "none" if part is None else json.dumps(part, ensure_ascii=False).replace('"', "")
    return text if len(text) <= 120 else text[:119] + "…"
