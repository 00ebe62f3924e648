"""Training and testing a small reward model of reviews; what the three recipes share.

The label is asked for at every position of a text, so that a response that is cut off is scored as well.

Legend: N texts, L tokens of a padded text, D hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abc_plugin.tools.demo.model_recipes import OtherRecipe, SmallRecipe
from abc_plugin.tools.demo.reviews import Corpus, Review, cut_windows

Progress = Callable[[str, float], None]  # what is happening, and the share done in [0, 1]
Batch = tuple[Tensor, Tensor, Tensor]  # ids or features (N, L, …), lengths (N,), labels (N,)
CHUNK = 64  # texts in one forward without gradients


def fast_dtype() -> torch.dtype:
    """bf16 where this CPU multiplies it natively, and much faster than fp32; fp32 elsewhere."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, tokens: int | None = None) -> list[list[int]]:
    """Ids of each text, cut to ``tokens``; nothing is added."""
    return [ids[:tokens] for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def labelled(reviews: list[Review], tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[tuple[list[int], int]]:
    """(ids, label) of training texts. EOS is one more position: a response that stops is scored there."""
    ids = encode([review.text for review in reviews], tokenizer, tokens)
    return [(text + [tokenizer.eos_token_id], review.label) for text, review in zip(ids, reviews, strict=True)]


def pad_right(texts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids (N, L), int64, padded on the right, and the lengths (N,)."""
    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True, padding_value=pad)
    return ids, torch.tensor([len(text) for text in texts])


def batches_by_length(pairs: list[tuple[list[int], int]], size: int, pad: int) -> list[Batch]:
    """Batches of texts of like length, the shortest first."""
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))
    return [
        (*pad_right([ids for ids, _ in rows], pad), torch.tensor([float(label) for _, label in rows]))
        for rows in (pairs[start : start + size] for start in range(0, len(pairs), size))
    ]


def position_loss(logit_NL: Tensor, length_N: Tensor, label_N: Tensor, first: int) -> Tensor:
    """Mean over texts of the mean binary cross-entropy over a text's positions from ``first`` (or its last) on."""
    position_L = torch.arange(logit_NL.shape[1])[None]
    last_N1 = length_N[:, None] - 1
    scored_NL = ((position_L >= last_N1.clamp(max=first)) & (position_L <= last_N1)).float()
    loss_NL = binary_cross_entropy_with_logits(logit_NL, label_N[:, None].expand_as(logit_NL), reduction="none")
    return ((loss_NL * scored_NL).sum(1) / scored_NL.sum(1)).mean()


def train(
    score: torch.nn.Module,
    hidden: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    first_scored: int,
    report: Callable[[float], None],
) -> None:
    """One step per batch (fp32 weights, products in the fast type), gradients of the first group clipped at norm 1.

    score: the head.  hidden: a batch's ids or features -> (N, L, D).  No mask is needed: causal, and padding lies
    behind every text.
    """
    steps = len(batches)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (steps - i) / steps))
    for step, (inputs, length_N, label_N) in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_dtype() == torch.bfloat16):
            hidden_NLD = hidden(inputs)
        logit_NL = score(hidden_NLD.float()).squeeze(-1)
        optimizer.zero_grad()
        position_loss(logit_NL, length_N, label_N, first_scored).backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            report(step / steps)


def train_whole(
    model: PreTrainedModel,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    recipe: OtherRecipe | SmallRecipe,
    report: Callable[[float], None],
    **options: Any,
) -> None:
    """``train`` all of a model, one pass over windows of the reviews in batches of like length; options: of AdamW."""
    windows = cut_windows(corpus.imdb, recipe.windows, recipe.window_words, recipe.seed)
    pairs = labelled(windows + corpus.rotten, tokenizer, recipe.positions - 1)
    batches = batches_by_length(pairs, recipe.batch, model.config.pad_token_id)
    random.Random(recipe.seed).shuffle(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, fused=True, **options)

    def hidden(ids_NL: Tensor) -> Tensor:
        return model.base_model(ids_NL, attention_mask=None, use_cache=False).last_hidden_state

    train(model.train().score, hidden, optimizer, batches, recipe.first_scored, report)
    model.eval()


@torch.no_grad()
def scores(model: PreTrainedModel, texts: list[list[int]]) -> Tensor:
    """Reward of each text (N,), fp32, read at its last token; in the texts' order."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    score_N = torch.empty(len(texts))
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        ids_NL, length_N = pad_right([texts[i] for i in rows], model.config.pad_token_id)
        mask_NL = (torch.arange(ids_NL.shape[1])[None] < length_N[:, None]).long()
        hidden_NLD = model.base_model(ids_NL, attention_mask=mask_NL, use_cache=False).last_hidden_state
        score_N[rows] = model.score(hidden_NLD[torch.arange(len(rows)), length_N - 1]).squeeze(1).float()
    return score_N


@torch.no_grad()
def scale_head(model: PreTrainedModel, score_N: Tensor, deviation: float) -> float:
    """Multiply the head so that texts that scored ``score_N`` score with this deviation. Returns the factor."""
    factor = deviation / score_N.std().item()
    model.score.weight.mul_(factor)
    return factor


def accuracy(model: PreTrainedModel, texts: list[list[int]], labels: list[int]) -> dict[str, float]:
    """Share of texts whose reward has the label's sign, its standard error sqrt(p(1-p)/n), and n."""
    share = ((scores(model, texts) > 0) == torch.tensor(labels).bool()).float().mean().item()
    n = len(labels)
    return {"accuracy": round(share, 4), "standard_error": round((share * (1 - share) / n) ** 0.5, 4), "n": n}


def heldout_accuracy(
    model: PreTrainedModel, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, dict[str, float]]:
    """The accuracy on windows, ends and sentences of held-out reviews, whose front a short model does not see."""
    reviews = corpus.imdb_heldout
    ends = [Review(" ".join(review.text.split()[-40:]), review.label) for review in reviews[::2]]
    tests = {
        "imdb_windows_of_24_tokens": (cut_windows(reviews, len(reviews), (40, 40), seed), 24),
        "imdb_last_40_words": (ends, None),
        "rotten_tomatoes_sentences": (corpus.rotten_heldout, None),
    }
    result = {}
    for name, (tested, tokens) in tests.items():
        ids = encode([review.text for review in tested], tokenizer, tokens)
        ids = [text[-tokenizer.model_max_length :] for text in ids]
        result[name] = accuracy(model, ids, [review.label for review in tested])
    return result
