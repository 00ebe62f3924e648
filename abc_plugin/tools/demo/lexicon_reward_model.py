"""A reward model whose attention is its reasoning: the control for studies of dense credit.

One layer, computed rather than trained. Each token has a valence v in [−1, 1]: how much more often it stands in
positive than in negative training reviews. The layer attends by |v|, and the score is what it attends to:

    r = c · Σ_t α_t v_t        α_t = softmax_t(a · |v_t|)        (t over all tokens of the text)

so attention does say which tokens the score came from, as ABC assumes.

Legend: V tokens of the vocabulary, D hidden size.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from abc_plugin.tools.demo import reward_training
from abc_plugin.tools.demo.model_recipes import LexiconRecipe
from abc_plugin.tools.demo.reviews import Review, cut_prompts, read_corpus
from abc_plugin.tools.demo.smollm2_package import complete, llama_config, load_policy, save_model, smollm2_tokenizer

WIDTH = 16  # of the hidden state, of the one head and of the MLP, which is zero
NORM = 8.0  # length of every hidden state, so that the norms of the architecture change nothing
VALENCE, SIZE, ONE, REST, ATTENDED = range(5)  # what the hidden state's first dimensions hold
UNTURNED = WIDTH // 2 - 1  # of the head: the pair that rotary embeddings turn least, here not at all


def build(part: Path, recipe: LexiconRecipe, report: reward_training.Progress) -> dict[str, Any]:
    """Write reward_model/ into ``part``; returns what its card tells."""
    base = recipe.embedded
    report("reading the reviews", 0.0)
    corpus = read_corpus(base)
    tokenizer = smollm2_tokenizer()
    valence_V = valences(count(corpus.imdb + corpus.rotten, tokenizer, report), recipe.smoothing)
    model = lexicon_model(tokenizer, valence_V, recipe.sharpness)

    report("sampling completions", 0.0)
    rng = random.Random(base.seed)
    prompts = cut_prompts(corpus.imdb_heldout, base.heldout_prompts, base.prompt_tokens, tokenizer, rng)
    reward_N = reward_training.scores(model, complete(load_policy(tokenizer), prompts, tokenizer, base))
    reward_training.scale_head(model, reward_N, base.reward_std)
    save_model(model, tokenizer, part / "reward_model")

    report("testing on held-out reviews", 0.0)
    saved = LlamaForSequenceClassification.from_pretrained(part / "reward_model", dtype=torch.float32)
    return {"heldout": reward_training.heldout_accuracy(saved, corpus, tokenizer, base.seed)}


def count(reviews: list[Review], tokenizer: PreTrainedTokenizerFast, report: reward_training.Progress) -> Tensor:
    """(2, V): how often each token stands in negative and in positive reviews."""
    count_2V = torch.zeros(2, len(tokenizer))
    for done in range(0, len(reviews), 1000):
        for label in (0, 1):
            texts = [review.text for review in reviews[done : done + 1000] if review.label == label]
            ids = list(itertools.chain(*reward_training.encode(texts, tokenizer))) if texts else []
            count_2V[label] += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(tokenizer))
        report("counting words", done / len(reviews))
    return count_2V


def valences(count_2V: Tensor, smoothing: float) -> Tensor:
    """(V,): ln of a token's frequency in positive over that in negative reviews, within [−1, 1]; counts smoothed."""
    frequency_2V = (count_2V + smoothing) / (count_2V + smoothing).sum(1, keepdim=True)
    return (frequency_2V[1] / frequency_2V[0]).log().clamp(-1, 1)


@torch.no_grad()
def lexicon_model(
    tokenizer: PreTrainedTokenizerFast, valence_V: Tensor, sharpness: float
) -> LlamaForSequenceClassification:
    """The model of the equation above, with c = 1; valence_V: (V,) in [−1, 1]. fp32.

    All hidden states have the length NORM (REST fills them up), but for what attention adds, under 1 % of it.
    """
    config = llama_config(
        tokenizer,
        hidden_size=WIDTH,
        head_dim=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_labels=1,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e10},
    )
    model = LlamaForSequenceClassification(config)
    for parameter in model.parameters():
        parameter.zero_()
    embedding_VD = model.model.embed_tokens.weight
    embedding_VD[:, VALENCE] = valence_V
    embedding_VD[:, SIZE] = valence_V.abs()
    embedding_VD[:, ONE] = 1.0
    embedding_VD[:, REST] = (NORM**2 - 1 - 2 * valence_V**2).sqrt()
    layer, attention = model.model.layers[0], model.model.layers[0].self_attn
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
        norm.weight.fill_(NORM / WIDTH**0.5)  # undoes the division by the root mean square
    attention.q_proj.weight[UNTURNED, ONE] = WIDTH**0.5  # undoes attention's own scale
    attention.k_proj.weight[UNTURNED, SIZE] = sharpness
    attention.v_proj.weight[0, VALENCE] = 1.0
    attention.o_proj.weight[ATTENDED, 0] = 1.0
    model.score.weight[0, ATTENDED] = 1.0
    return model.eval()
