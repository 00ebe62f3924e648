"""``abc-rlhf check-tokenizers POLICY REWARD_MODEL``: whether the two read the same text as the same ids."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from abc_plugin.errors import UserError, first_line
from abc_plugin.jsonl import check_text, read_jsonl
from abc_plugin.output_directory import check_file
from abc_plugin.text.tokenizer_differences import (
    COMPATIBLE,
    INCOMPATIBLE,
    SAME,
    Comparison,
    ModelTokenizer,
    compare,
    end_ids,
)

VERDICTS = {  # its colour and what it means
    SAME: ("green", "the same: the same text has the same ids"),
    COMPATIBLE: ("yellow", "harmless differences only: the same text has the same ids"),
    INCOMPATIBLE: ("red", "dangerous differences: ids of the one mean something else to the other"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``abc-rlhf check-tokenizers``."""
    parser.add_argument("policy", metavar="POLICY", help="directory or hub name of the policy")
    parser.add_argument("reward_model", metavar="REWARD_MODEL", help="directory or hub name of the reward model")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="your prompts (JSON lines), read besides the built-in"
    )
    parser.add_argument("--input_key", default="input", metavar="KEY", help="their key (default input)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here, for machines")


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 0 when training may share ids, 1 when it may not."""
    if args.json:
        check_file("--json", args.json, str(args.data or ""))
    policy, reward_model = load_tokenizer(args.policy), load_tokenizer(args.reward_model)
    prompts = read_prompts(args.data, args.input_key, policy.tokenizer) if args.data else []
    result = compare(policy, reward_model, prompts)
    if args.json:
        write_json(args.json, args.policy, args.reward_model, result)
    show(result, Console())
    return int(result.verdict == INCOMPATIBLE)


def load_tokenizer(path: str, *, use_fast: bool = True) -> ModelTokenizer:
    """A model's tokenizer, embedding rows and generation ends. Raises UserError naming a path without a tokenizer."""
    if not Path(path).expanduser().is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"{path}: no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True, use_fast=use_fast)
    except Exception as error:  # a damaged tokenizer.json raises the bare class
        reason = first_line(error)
        raise UserError(f"{path} has no usable tokenizer ({reason}); save its tokenizer beside it") from None
    if len(tokenizer.get_vocab()) <= len(tokenizer.added_tokens_decoder):
        # transformers makes one from the configuration alone where the files are missing, and only warns.
        raise UserError(f"{path} has no tokenizer files, only a configuration; save its tokenizer beside it")
    rows = _configured(AutoConfig, path, "vocab_size")
    ends = (end_ids(_configured(kind, path, "eos_token_id")) for kind in (GenerationConfig, AutoConfig))
    return ModelTokenizer(tokenizer, rows, *ends)


def _configured(kind: Any, path: str, name: str) -> Any:
    """None where a directory holds a tokenizer alone."""
    try:
        return getattr(kind.from_pretrained(path), name, None)
    except (OSError, ValueError, TypeError):  # TypeError: the file is no object
        return None


def read_prompts(path: Path, key: str, tokenizer: Any) -> list[str]:
    """The prompts as the policy is given them; lists of messages by its chat template. Raises UserError on others."""
    rows = read_jsonl(path, "give --data a file with one JSON object a line")
    if not rows:
        raise UserError(f"--data {path} has no prompts")
    return [_prompt(row, key, tokenizer, where) for where, row in rows]


def _prompt(row: dict[str, Any], key: str, tokenizer: Any, where: str) -> str:
    if key not in row:
        raise UserError(f"{where}: no key {key!r}, only {', '.join(row) or 'none'}; set --input_key")
    prompt = row[key]
    if isinstance(prompt, list):
        try:
            prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise errors of their own
            raise UserError(f"{where}: the policy's chat template refuses it: {first_line(error)}") from None
    if not isinstance(prompt, str):
        raise UserError(f"{where}: {str(prompt)[:40]!r} is no text")
    check_text(prompt, where)
    return prompt


def write_json(path: Path, policy: str, reward_model: str, result: Comparison) -> None:
    """Verdict, findings and examples of the comparison. Raises UserError where it cannot be written."""
    answer = {
        "policy": policy,
        "reward_model": reward_model,
        "verdict": result.verdict,
        "findings": [finding._asdict() for finding in result.findings],
        "texts": result.texts,
        "examples": [example._asdict() for example in result.examples],
    }
    try:
        path.write_text(json.dumps(answer, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}") from None


def show(result: Comparison, console: Console) -> None:
    """The findings as a table, the first texts that are read otherwise, and the verdict."""
    table = Table(box=None, pad_edge=False)
    for title in ("", "part", "finding"):
        table.add_column(title, overflow="fold")
    for part, verdict, words in result.findings:
        table.add_row(f"[{VERDICTS[verdict][0]}]{verdict}[/]", part, _printable(words))
    console.print(table)
    for text, ours, theirs in result.examples:
        console.print(
            f"\n{_printable(repr(text[:70]))}\n  policy …{ours[:12]}\n  reward …{theirs[:12]}", highlight=False
        )
    colour, meaning = VERDICTS[result.verdict]
    console.print(f"\n[{colour}]{meaning}[/]")


def _printable(text: str) -> str:
    """Without what a terminal obeys or rich takes for markup."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("[", r"\[")
