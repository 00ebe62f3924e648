"""The reward model: the first layers of SmolLM2, of which the last is trained to tell positive from negative text.

Cheap enough for a laptop: the features of the frozen layers are computed once, and only the last layer, the final norm
and the head are trained on them, with the label asked for at every position of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from abc_plugin.tools.demo.recipe import Recipe

Progress = Callable[[str, float], None]  # what is happening, and the share done in [0, 1]
CHUNK = 64  # texts in one forward of the frozen layers


def fast_dtype() -> torch.dtype:
    """bf16 where this CPU multiplies it natively, and much faster than fp32; fp32 elsewhere."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast, tokens: int | None = None) -> list[list[int]]:
    """Ids of each text, cut to ``tokens``; nothing is added."""
    return [ids[:tokens] for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def pad_right(texts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids (N, L), int64, padded on the right, and the lengths (N,)."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True, padding_value=pad)
    return ids, torch.tensor([len(text) for text in texts])


@torch.no_grad()
def prepare_top(model: LlamaForSequenceClassification) -> None:
    """Start the final norm and the head afresh: the norm was made for SmolLM2's thirtieth layer."""
    model.model.norm.weight.fill_(1.0)
    model.score.weight.zero_()


def run_layers(model: LlamaForSequenceClassification, hidden_NLD: Tensor, layers: slice) -> Tensor:
    """Some of the model's layers on hidden states, without a mask: causal, and padding lies behind every text."""
    position_L = torch.arange(hidden_NLD.shape[1])[None]
    rotary = model.model.rotary_emb(hidden_NLD, position_L)
    for layer in model.model.layers[layers]:
        hidden_NLD = layer(hidden_NLD, attention_mask=None, position_ids=position_L, position_embeddings=rotary)
    return hidden_NLD


@torch.no_grad()
def frozen_features(model: LlamaForSequenceClassification, texts: list, recipe: Recipe, report: Progress) -> Iterator:
    """Batches (features (N, L, D), lengths (N,), labels (N,)) of texts [(ids, label)] of like length."""
    texts = sorted(texts, key=lambda text: len(text[0]))
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        ids_NL, length_N = pad_right([ids for ids, _ in chunk], model.config.pad_token_id)
        hidden_NLD = run_layers(model, model.model.embed_tokens(ids_NL), slice(0, -1))
        label_N = torch.tensor([float(label) for _, label in chunk])
        yield from zip(*(part.split(recipe.batch) for part in (hidden_NLD, length_N, label_N)), strict=True)
        report("features of the frozen layers", min(1.0, (start + CHUNK) / len(texts)))


def position_loss(logit_NL: Tensor, length_N: Tensor, label_N: Tensor, first: int) -> Tensor:
    """Mean over texts of the mean binary cross-entropy over a text's positions from ``first`` (or its last) on."""
    position_L = torch.arange(logit_NL.shape[1])[None]
    last_N1 = length_N[:, None] - 1
    scored_NL = ((position_L >= last_N1.clamp(max=first)) & (position_L <= last_N1)).float()
    loss_NL = binary_cross_entropy_with_logits(logit_NL, label_N[:, None].expand_as(logit_NL), reduction="none")
    return ((loss_NL * scored_NL).sum(1) / scored_NL.sum(1)).mean()


def train_top(model: LlamaForSequenceClassification, batches: list, recipe: Recipe, report: Progress) -> None:
    """Train the last layer, the final norm and the head (fp32 weights, products in the fast type)."""
    body = [*model.model.layers[-1].parameters(), model.model.norm.weight]
    groups = [
        {"params": body, "lr": recipe.learning_rate},
        {"params": [model.score.weight], "lr": recipe.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    steps = recipe.epochs * len(batches)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (steps - i) / steps))
    order = torch.Generator().manual_seed(recipe.seed)
    rows = [row for _ in range(recipe.epochs) for row in torch.randperm(len(batches), generator=order).tolist()]
    mixed = fast_dtype() == torch.bfloat16
    for step, row in enumerate(rows):
        hidden_NLD, length_N, label_N = batches[row]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            top_NLD = model.model.norm(run_layers(model, hidden_NLD.float(), slice(-1, None)))
        logit_NL = model.score(top_NLD.float()).squeeze(-1)
        optimizer.zero_grad()
        position_loss(logit_NL, length_N, label_N, recipe.first_scored).backward()
        torch.nn.utils.clip_grad_norm_(body, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            report("training the reward model's last layer", step / steps)


@torch.no_grad()
def scores(model: LlamaForSequenceClassification, texts: list[list[int]]) -> Tensor:
    """Reward of each text (N,), fp32, read at its last token; in the texts' order."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    score_N = torch.empty(len(texts))
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        ids_NL, length_N = pad_right([texts[i] for i in rows], model.config.pad_token_id)
        mask_NL = (torch.arange(ids_NL.shape[1])[None] < length_N[:, None]).long()
        hidden_NLD = model.model(ids_NL, attention_mask=mask_NL, use_cache=False).last_hidden_state
        score_N[rows] = model.score(hidden_NLD[torch.arange(len(rows)), length_N - 1]).squeeze(1).float()
    return score_N


def accuracy(model: LlamaForSequenceClassification, texts: list[list[int]], labels: list[int]) -> dict[str, float]:
    """Share of texts whose reward has the label's sign, its standard error sqrt(p(1-p)/n), and n."""
    share = ((scores(model, texts) > 0) == torch.tensor(labels).bool()).float().mean().item()
    n = len(labels)
    return {"accuracy": round(share, 4), "standard_error": round((share * (1 - share) / n) ** 0.5, 4), "n": n}
