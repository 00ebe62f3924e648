"""Whether policy and reward model read the same text as the same ids."""

from __future__ import annotations

import json

PROBES = (
    "The film was great.",
    " naïve café, 東京 🎬\n\n\tdef f(x):  return x ** 2",
    "<|im_start|>user\nHi<|im_end|>",
)


def first_difference(policy: object, reward_model: object) -> str | None:
    """The first thing in which two tokenizers differ, in words; None when they are the same.

    Compared strictly: vocabulary and ids, the ids that begin and end a sequence, the fast tokenizers' pipelines
    (normaliser, pre-tokeniser, merges, added tokens), and the ids of a few probe texts. The padding token is left out:
    the reward model is given the policy's ids with an attention mask and never sees its own.
    """
    ours, theirs = policy.get_vocab(), reward_model.get_vocab()
    if ours != theirs:
        token = min(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))[0]
        return (
            f"the token {token!r} has id {ours.get(token)} for the policy and {theirs.get(token)} for the reward model"
        )
    for name in ("bos_token_id", "eos_token_id"):
        ends = getattr(policy, name), getattr(reward_model, name)
        if ends[0] != ends[1]:
            return f"{name} is {ends[0]} for the policy and {ends[1]} for the reward model"
    ours, theirs = _pipeline(policy), _pipeline(reward_model)
    for part in sorted(ours.keys() | theirs.keys()):
        if ours.get(part) != theirs.get(part):
            return f"their {part.replace('_', '-')} differ"
    for text in PROBES:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (policy, reward_model)]
        if ids[0] != ids[1]:
            return f"{text!r} is {ids[0][:8]} for the policy and {ids[1][:8]} for the reward model"
    return None


def _pipeline(tokenizer: object) -> dict[str, object]:
    """The parts of a fast tokenizer that decide ids; empty for a slow one, which the probes must tell apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    parts = json.loads(backend.to_str())
    return {part: parts.get(part) for part in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
