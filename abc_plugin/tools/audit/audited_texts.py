"""What is audited: prompts and completions as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from abc_plugin.errors import UserError
from abc_plugin.jsonl import check_text, read_jsonl
from abc_plugin.text.character_spans import token_texts

MINIMUM = 10  # completions of different prompts: five to choose a layer on, five to report it on
SHORTEST = 3  # tokens; the order of fewer says nothing
ADVISED = 50  # below that, intervals are too wide for most verdicts

CHOICES = "; --prompt_key and --completion_key name others, --split N takes a whole text's first N tokens as prompt"


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion, in the reward model's tokens."""

    row: int  # line of the file, from 1
    prompt: str
    prompt_ids: list[int]
    ids: list[int]
    tokens: list[str]  # texts of ``ids``, which join to the completion
    special: list[bool]


@dataclass(frozen=True)
class Reading:
    """How a file's lines become completions."""

    prompt_key: str = "prompt"
    completion_key: str = "completion"
    split: int | None = None  # the completion key holds a whole text, of which so many tokens are the prompt
    append_eos: bool = False
    samples: int = 128
    tokens: int | None = None  # completions are cut to so many tokens, and shorter ones are left out


def read(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, reading: Reading, window: int | None
) -> list[Completion]:
    """Up to ``reading.samples`` completions, at evenly spaced lines of the JSONL file ``path``.

    A line is an object with a prompt (a text, or messages for the tokenizer's chat template) and a completion; the
    output of ``abc-rlhf evaluate``, whose completion is a list of tokens, is read too. Prompt and completion get no
    special tokens and are tokenised apart, as in a rollout.
    Raises UserError, naming the line, on what is no such object, on an empty prompt or completion, on one that does
    not fit into ``window`` tokens; and where fewer than MINIMUM prompts differ.
    """
    lines = read_jsonl(path, "give --data a file with one JSON object a line")
    if not lines:
        raise UserError(f"--data {path} is empty; give at least {MINIMUM} completions, one JSON object a line")
    count = min(len(lines), reading.samples)
    chosen = [lines[i * len(lines) // count] for i in range(count)]
    completions = [_completion(record, where, tokenizer, reading) for where, record in chosen]
    if reading.tokens:
        least = reading.tokens + reading.append_eos
        completions = [completion for completion in completions if len(completion.ids) >= least]
    for completion in completions:
        length = len(completion.prompt_ids) + len(completion.ids)
        if window is not None and length > window:
            raise UserError(
                f"{path}:{completion.row}: {length} tokens, but the reward model reads at most {window}: shorten or "
                "remove the completion"
            )
    distinct = len({completion.prompt for completion in completions if len(completion.ids) >= SHORTEST})
    if distinct < MINIMUM:
        raise UserError(
            f"{path}: completions of {reading.tokens or SHORTEST} or more tokens to {distinct} different prompts are "
            f"too few: an interval needs at least {MINIMUM} such prompts, a useful one {ADVISED} or more (--samples)"
        )
    return completions


def _completion(
    record: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, reading: Reading
) -> Completion:
    ids = _encode(tokenizer, _completion_text(record, where, reading), where)
    if reading.split is not None:
        prompt_ids, ids = ids[: reading.split], ids[reading.split :]
        prompt = tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False)
    else:
        prompt = _prompt_text(_field(record, reading.prompt_key, where), where, tokenizer)
        prompt_ids = _encode(tokenizer, prompt, where)
    if not prompt_ids:
        raise UserError(f"{where}: the prompt is empty; the score of an empty completion is read there, so remove it")
    if not ids:
        raise UserError(f"{where}: the completion is empty; there is no credit to audit, so remove the line")
    ids = ids[: reading.tokens]
    if reading.append_eos and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    tokens = token_texts(tokenizer, ids)
    special = [token in tokenizer.all_special_ids for token in ids]
    return Completion(int(where.rpartition(":")[2]), prompt, prompt_ids, ids, tokens, special)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> list[int]:
    check_text(text, where)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _field(record: dict[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise UserError(f"{where}: no key {key!r}, only {', '.join(record) or 'none'}{CHOICES}")
    return record[key]


def _completion_text(record: dict[str, Any], where: str, reading: Reading) -> str:
    key = reading.completion_key
    if key not in record and isinstance(record.get("tokens"), list):  # of abc-rlhf evaluate
        return "".join(map(str, record["tokens"]))
    text = _field(record, key, where)
    if not isinstance(text, str):
        raise UserError(f"{where}: {key} is no text but {str(text)[:40]!r}; give strings")
    return text


def _prompt_text(prompt: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(prompt, str):
        return prompt
    try:
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise UserError(
            f"{where}: the prompt is no text, and no chat that the tokenizer's template takes: {error}"
        ) from None
