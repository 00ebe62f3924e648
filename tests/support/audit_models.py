"""A reward model whose score is known: 8 numbers wide, one layer, built by hand, over a vocabulary of words."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

VALUES = {"good": 1.0, "fine": 0.6, "bad": -1.0, "poor": -0.6}  # every other word is worth 0
WORDS = [f"w{i}" for i in range(12)]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
WINDOW = 32


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *VALUES, *WORDS, "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=WINDOW
    )


@torch.no_grad()
def make_reward_model(attends: float, labels: int = 1) -> LlamaForSequenceClassification:
    """score = 4 · sum_s attention[s] · value[s], attention[s] proportional to exp(attends · |value[s]|).

    attends = 0: the score is 4 times the mean value. The norms' epsilon is so large that they divide by a constant.
    Query and key lie in the coordinate that rotary embedding hardly turns.
    """
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        rms_norm_eps=1e6,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=labels,
    )
    model = LlamaForSequenceClassification(config)
    for weight in model.parameters():
        weight.zero_()
    [layer], embeddings = model.model.layers, model.model.embed_tokens.weight
    for word, index in tokenizer.get_vocab().items():
        value = VALUES.get(word, 0.0)
        embeddings[index, :3] = torch.tensor([1.0, value, abs(value)])
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
        norm.weight.fill_(1e3)
    layer.self_attn.q_proj.weight[3, 0] = attends * 8**0.5
    layer.self_attn.k_proj.weight[3, 2] = 1.0
    layer.self_attn.v_proj.weight[4, 1] = 1.0
    layer.self_attn.o_proj.weight[5, 4] = 1.0
    model.score.weight[:, 5] = 4.0
    return model


def save_reward_model(directory: Path, attends: float = 0.0, labels: int = 1) -> Path:
    make_reward_model(attends, labels).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def write_completions(path: Path, count: int = 16, words: tuple[str, ...] = tuple(VALUES), seed: int = 0) -> Path:
    """``count`` completions to different prompts: 8 plain words, two of ``words`` among them, and a full stop."""
    rng, lines = random.Random(seed), []
    for i in range(count):
        completion = rng.choices(WORDS, k=8)
        for position, word in zip(rng.sample(range(8), 2), rng.sample(words, 2), strict=True):
            completion[position] = word
        prompt = f"{WORDS[i % 12]} {WORDS[i // 12]} w5"
        lines.append(json.dumps({"prompt": prompt, "completion": " ".join([*completion, "."])}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path
