"""The embedded default: SmolLM2 as policy, its first layers as reward model, and prompts.

Of the reward model only the last layer, the final norm and the head are trained, on features of the frozen layers that
are computed once: cheap enough for a laptop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM, LlamaForSequenceClassification

from abc_plugin.tools.demo import reward_training
from abc_plugin.tools.demo.model_recipes import Recipe
from abc_plugin.tools.demo.reviews import Corpus, cut_windows, read_corpus
from abc_plugin.tools.demo.smollm2_package import (
    complete,
    llama_config,
    load_policy,
    save_model,
    smollm2_tokenizer,
    write_prompts,
)


def build(part: Path, recipe: Recipe, report: reward_training.Progress) -> dict[str, Any]:
    """Write policy/, reward_model/, prompts.jsonl and heldout.jsonl into ``part``; returns what its card tells."""
    report("reading the reviews", 0.0)
    corpus = read_corpus(recipe)
    tokenizer = smollm2_tokenizer()
    heldout = write_prompts(part, corpus, tokenizer, recipe)

    report("SmolLM2's weights", 0.0)
    policy = load_policy(tokenizer)
    save_model(policy, tokenizer, part / "policy")
    model = train_reward_model(policy, corpus, tokenizer, recipe, report)

    report("sampling completions", 0.0)
    reward_N = reward_training.scores(
        model.to(reward_training.fast_dtype()), complete(policy, heldout, tokenizer, recipe)
    )
    factor = reward_training.scale_head(model, reward_N, recipe.reward_std)
    save_model(model, tokenizer, part / "reward_model")

    report("testing on held-out reviews", 0.0)
    saved = AutoModelForSequenceClassification.from_pretrained(
        part / "reward_model", dtype=reward_training.fast_dtype()
    )
    return {
        "versions": {"dtype": str(reward_training.fast_dtype())},
        "heldout": reward_training.heldout_accuracy(saved, corpus, tokenizer, recipe.seed),
        "reward_on_completions": {
            "mean": round(factor * reward_N.mean().item(), 3),
            "std": round(factor * reward_N.std().item(), 3),
            "n": len(reward_N),
            "head_was_multiplied_by": round(factor, 3),
        },
    }


def train_reward_model(
    policy: LlamaForCausalLM, corpus: Corpus, tokenizer: Any, recipe: Recipe, report: reward_training.Progress
) -> LlamaForSequenceClassification:
    """The trained reward model in fp32."""
    config = llama_config(tokenizer, num_hidden_layers=recipe.layers, num_labels=1)
    model = LlamaForSequenceClassification(config)
    own = model.state_dict()
    model.load_state_dict(own | {name: value for name, value in policy.state_dict().items() if name in own})
    with torch.no_grad():  # the norm was made for SmolLM2's thirtieth layer
        model.model.norm.weight.fill_(1.0)
        model.score.weight.zero_()

    windows = cut_windows(corpus.imdb[: recipe.windows], recipe.windows, recipe.window_words, recipe.seed)
    pairs = reward_training.labelled(windows + corpus.rotten[: recipe.sentences], tokenizer, recipe.window_tokens)
    model.to(reward_training.fast_dtype())
    batches = frozen_features(model, pairs, recipe, report)
    model.float()
    order = torch.Generator().manual_seed(recipe.seed)
    rows = [row for _ in range(recipe.epochs) for row in torch.randperm(len(batches), generator=order).tolist()]
    top = [*model.model.layers[-1].parameters(), model.model.norm.weight]
    groups = [
        {"params": top, "lr": recipe.learning_rate},
        {"params": [model.score.weight], "lr": recipe.head_learning_rate},
    ]
    reward_training.train(
        model.score,
        lambda features_NLD: model.model.norm(run_layers(model, features_NLD.float(), slice(-1, None))),
        torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98), fused=True),
        [batches[row] for row in rows],
        recipe.first_scored,
        lambda share: report("training the reward model's last layer", share),
    )
    return model


@torch.no_grad()
def frozen_features(
    model: LlamaForSequenceClassification, pairs: list, recipe: Recipe, report: reward_training.Progress
) -> list[reward_training.Batch]:
    """Batches with what the frozen layers make of the ids (N, L, D)."""
    result, chunks = [], reward_training.batches_by_length(pairs, reward_training.CHUNK, model.config.pad_token_id)
    for done, (ids_NL, length_N, label_N) in enumerate(chunks, 1):
        hidden_NLD = run_layers(model, model.model.embed_tokens(ids_NL), slice(0, -1))
        result += zip(*(part.split(recipe.batch) for part in (hidden_NLD, length_N, label_N)), strict=True)
        report("features of the frozen layers", done / len(chunks))
    return result


def run_layers(model: LlamaForSequenceClassification, hidden_NLD: Tensor, layers: slice) -> Tensor:
    """Some of the model's layers on hidden states, without a mask: causal, and padding lies behind every text."""
    position_L = torch.arange(hidden_NLD.shape[1])[None]
    rotary = model.model.rotary_emb(hidden_NLD, position_L)
    for layer in model.model.layers[layers]:
        hidden_NLD = layer(hidden_NLD, attention_mask=None, position_ids=position_L, position_embeddings=rotary)
    return hidden_NLD
