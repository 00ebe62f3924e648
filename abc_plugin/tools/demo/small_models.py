"""A small policy and reward model, pretrained from scratch on the reviews: for studies that need many runs.

A Llama of a few layers with a tokenizer of its own learns to write reviews; a copy of it, with a score head, learns to
tell favourable ones. It continues for as long as it is asked, and a PPO step of it takes about a second of CPU.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from abc_plugin.tools.demo import reward_training
from abc_plugin.tools.demo.model_recipes import SmallRecipe
from abc_plugin.tools.demo.reviews import Corpus, read_corpus
from abc_plugin.tools.demo.smollm2_package import complete, save_model, write_prompts

END, PAD = "<|end|>", "<|pad|>"


def build(part: Path, recipe: SmallRecipe, report: reward_training.Progress) -> dict[str, Any]:
    """Write policy/, reward_model/, prompts.jsonl and heldout.jsonl into ``part``; returns what its card tells."""
    report("reading the reviews", 0.0)
    corpus = read_corpus(recipe)
    tokenizer = review_tokenizer(corpus, recipe)
    heldout = write_prompts(part, corpus, tokenizer, recipe)
    policy = LlamaForCausalLM(llama_config(tokenizer, recipe))
    perplexity = pretrain(policy, corpus, tokenizer, recipe, report)
    model = LlamaForSequenceClassification(llama_config(tokenizer, recipe, num_labels=1))
    model.model.load_state_dict(policy.model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    training = partial(report, "training the reward model")
    reward_training.train_whole(model, corpus, tokenizer, recipe, training, weight_decay=0.1, betas=(0.9, 0.95))

    report("sampling completions", 0.0)
    reward_N = reward_training.scores(model, complete(policy.float(), heldout, tokenizer, recipe))
    reward_training.scale_head(model, reward_N, recipe.reward_std)
    save_model(policy, tokenizer, part / "policy")
    save_model(model, tokenizer, part / "reward_model")

    report("testing on held-out reviews", 0.0)
    saved = LlamaForSequenceClassification.from_pretrained(part / "reward_model", dtype=torch.float32)
    return {
        "heldout_perplexity": round(perplexity, 1),
        "heldout": reward_training.heldout_accuracy(saved, corpus, tokenizer, recipe.seed),
    }


def review_tokenizer(corpus: Corpus, recipe: SmallRecipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``recipe.vocabulary`` entries, learned from the training reviews."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((review.text for review in corpus.imdb), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=recipe.positions,
        clean_up_tokenization_spaces=False,
        eos_token=END,
        pad_token=PAD,
    )


def llama_config(tokenizer: PreTrainedTokenizerFast, recipe: SmallRecipe, **changes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.width * 8 // 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )


def pretrain(
    policy: LlamaForCausalLM,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    recipe: SmallRecipe,
    report: reward_training.Progress,
) -> float:
    """Next-token loss on blocks of the reviews, which END parts. Returns the perplexity on held-out blocks."""
    train_NL, heldout_NL = (
        token_blocks(reviews, tokenizer, recipe.block)
        for reviews in (corpus.imdb[: recipe.pretraining_reviews], corpus.imdb_heldout[:100])
    )
    order = torch.randperm(len(train_NL), generator=torch.Generator().manual_seed(recipe.seed))
    batches = order.split(recipe.pretraining_batch)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=recipe.pretraining_rate, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.pretraining_rate, len(batches), pct_start=0.1)
    for step, rows in enumerate(batches):
        loss = next_token_loss(policy, train_NL[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report("pretraining a policy on the reviews", step / len(batches))
    with torch.no_grad():
        return next_token_loss(policy, heldout_NL[:64]).exp().item()


def token_blocks(reviews: list, tokenizer: PreTrainedTokenizerFast, block: int) -> torch.Tensor:
    """Ids of the reviews one behind the other, END after each, cut into rows (N, block)."""
    ids = [
        token
        for text in reward_training.encode([r.text for r in reviews], tokenizer)
        for token in (*text, tokenizer.eos_token_id)
    ]
    return torch.tensor(ids[: len(ids) // block * block]).view(-1, block)


def next_token_loss(policy: LlamaForCausalLM, ids_NL: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token."""
    logits_NLV = policy(ids_NL[:, :-1], use_cache=False).logits
    return cross_entropy(logits_NLV.flatten(0, 1).float(), ids_NL[:, 1:].flatten())
