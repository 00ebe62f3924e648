"""Commands as a user gives them, on random models of a given shape: what ``abc-rlhf local`` and ``serve-rm`` take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from abc_plugin.errors import UserError

HEADED = {"policy": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}
PARTS = ("step", "generate", "score", "experience", "update")  # of summary.json's timing
LETTERS = [*range(0x4E00, 0xA000), *range(0xAC00, 0xD7A4)]  # enough for a token each, all of them letters


def random_model(kind: str, shape: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A llama with random weights.  kind: of HEADED."""
    config = LlamaConfig(**shape, num_labels=1, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    return HEADED[kind].from_config(config, dtype=dtype)


def random_checkpoint(out: Path, kind: str, shape: dict[str, Any], device: str) -> Path:
    """A ``random_model`` in bf16 with a tokenizer that has a letter per token, so that texts of known length can be
    drawn."""
    if (out / "tokenizer.json").exists():
        return out
    with torch.device(device):
        model = random_model(kind, shape, torch.bfloat16)
    model.save_pretrained(out, max_shard_size="2GB")  # a shard at a time goes through this machine's own memory
    del model
    torch.cuda.empty_cache()  # for the command that trains it
    tokens = ["<pad>", "</s>", "<unk>", *map(chr, LETTERS)][: shape["vocab_size"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(out)
    return out


def train(
    out: Path, models_: dict[str, Path], method: str, tokens: int, completions: int, flags: list[str]
) -> dict[str, float]:
    """``figures_of`` three steps by ``abc-rlhf local``, of so many completions; prompts and responses of ``tokens``.

    Raises as ``command``.
    """
    ids = torch.randint(32, (3 * completions, tokens), generator=torch.Generator().manual_seed(2)).tolist()
    prompts = out.with_suffix(".jsonl")
    prompts.write_text("".join(json.dumps({"input": "".join(chr(LETTERS[i]) for i in row)}) + "\n" for row in ids))
    given = {
        "actor.model_name_or_path": models_["policy"],
        "reward.model_name_or_path": models_["reward_model"],
        "data.prompt_dataset": prompts,
        "data.max_len": 2 * tokens,
        "rollout.max_new_tokens": tokens,
        "rollout.batch_size": completions,
        "rollout.micro_batch_size": 4,
        "train.batch_size": completions,
        "train.micro_batch_size": 1,
        "reward_shaping": method,
        "ckpt.output_dir": out,
        "ckpt.path": out / "checkpoints",
    }
    command("local", *(word for flag, value in given.items() for word in (f"--{flag}", str(value))), *flags)
    return figures_of(out)


def figures_of(out: Path) -> dict[str, float]:
    """Seconds per step and of its parts, GiB of the GPU's memory at the peak. Empty where the run has not ended."""
    if not (out / "summary.json").exists():
        return {}
    summary = json.loads((out / "summary.json").read_text())
    peak = {"peak GiB": summary["peak_gib"]} if "peak_gib" in summary else {}
    return {f"{part} s": summary["timing"][part] for part in PARTS} | peak


def command(*words: str) -> str:
    """The last line that ``abc-rlhf WORDS`` prints.

    Raises UserError where it refuses, RuntimeError where it fails, with its last line of errors.
    """
    result = subprocess.run([sys.executable, "-m", "abc_plugin", *words], capture_output=True, text=True)
    print(result.stdout, result.stderr, file=sys.stderr)
    said, errors = ((text.strip() or "it said nothing").splitlines()[-1] for text in (result.stdout, result.stderr))
    if result.returncode:
        raise (UserError if result.returncode == 2 else RuntimeError)(errors)
    return said
