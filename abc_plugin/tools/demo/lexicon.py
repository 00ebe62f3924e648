"""A reward model whose attention is its reasoning: the control for studies of dense credit.

One layer, computed rather than trained. Each token has a valence v in [−1, 1]: how much more often it stands in
positive than in negative training reviews. The layer attends by |v|, and the score is what it finds there:

    r = c · Σ_t α_t v_t        α_t = softmax_t(a · |v_t|)        (t over all tokens of the text)

so attention does say which tokens the score came from, as ABC assumes. ``abc-rlhf prepare --lexicon_reward_model``
makes it.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification
from transformers.utils import logging

from abc_plugin.tools.demo import build as embedded
from abc_plugin.tools.demo import layout, reward, sources, texts
from abc_plugin.tools.demo.recipe import Recipe, default_dir, recipe_hash

WIDTH = 16  # of the hidden state, of the one head and of the MLP, which is zero
NORM = 8.0  # length of every hidden state, so that the norms of the architecture change nothing
VALENCE, SIZE, ONE, REST, FOUND = range(5)  # what the hidden state's first places hold
STILL = WIDTH // 2 - 1  # of the head: the pair that rotary embeddings turn least, here not at all


@dataclass(frozen=True)
class LexiconRecipe:
    """Every number that decides what ``abc-rlhf prepare --lexicon_reward_model`` makes."""

    smoothing: float = 20.0  # added to each token's count of positive and of negative reviews' tokens
    sharpness: float = 8.0  # a
    embedded: Recipe = field(default_factory=Recipe)  # its split of the reviews, its completions, its scale


RECIPE = LexiconRecipe()


def made_from() -> dict[str, str]:
    """Versions of the packages. Raises UserError when one is missing."""
    return sources.versions()


def directory(recipe: LexiconRecipe) -> Path:
    """Beside the embedded default: imdb-lexicon-<recipe hash>."""
    return default_dir(recipe.embedded, made_from()).with_name(f"imdb-lexicon-{recipe_hash(recipe, made_from())}")


def build(part: Path, recipe: LexiconRecipe, report: reward.Progress) -> None:
    """Write reward_model/ and card.json into ``part``."""
    start, cpu, base = time.time(), time.process_time(), recipe.embedded
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(base.seed)
    report("reading the reviews", 0.0)
    corpus = sources.read_corpus(base.seed, base.heldout_reviews, base.heldout_sentences)
    tokenizer = layout.smollm2_tokenizer()
    valence_V = valences(count(corpus.imdb + corpus.rotten, tokenizer, report), recipe.smoothing)
    model = lexicon_model(tokenizer, valence_V, recipe.sharpness)

    report("sampling completions", 0.0)
    rng = random.Random(base.seed)
    prompts = texts.cut_prompts(corpus.imdb_heldout, base.heldout_prompts, base.prompt_tokens, tokenizer, rng)
    reward_N = reward.scores(model, embedded.complete(embedded.load_policy(tokenizer), prompts, tokenizer, base))
    model.score.weight.data.mul_(base.reward_std / reward_N.std())
    layout.save_model(model, tokenizer, part / "reward_model")

    report("testing on held-out reviews", 0.0)
    saved = LlamaForSequenceClassification.from_pretrained(part / "reward_model", dtype=torch.float32)
    tests = embedded.tests(corpus, tokenizer, base)
    card = {
        "made": "a reward model of one layer that attends by words' valence and scores what it attends to",
        "recipe_hash": recipe_hash(recipe, made_from()),
        "recipe": dataclasses.asdict(recipe),
        "versions": made_from() | {"torch": torch.__version__},
        "heldout": {name: reward.accuracy(saved, *test) for name, test in tests.items()},
        "seconds": round(time.time() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "sources": sources.CITATIONS,
    }
    layout.write_card(part / "card.json", card)


def count(reviews: list[sources.Review], tokenizer, report: reward.Progress) -> Tensor:
    """(2, V): how often each token stands in negative and in positive reviews."""
    count_2V = torch.zeros(2, len(tokenizer))
    for done in range(0, len(reviews), 1000):
        for label in (0, 1):
            words = [review.text for review in reviews[done : done + 1000] if review.label == label]
            ids = list(itertools.chain(*reward.encode(words, tokenizer))) if words else []
            count_2V[label] += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(tokenizer))
        report("counting words", done / len(reviews))
    return count_2V


def valences(count_2V: Tensor, smoothing: float) -> Tensor:
    """(V,): ln of a token's frequency in positive over that in negative reviews, within [−1, 1]; counts smoothed."""
    frequency_2V = (count_2V + smoothing) / (count_2V + smoothing).sum(1, keepdim=True)
    return (frequency_2V[1] / frequency_2V[0]).log().clamp(-1, 1)


@torch.no_grad()
def lexicon_model(tokenizer, valence_V: Tensor, sharpness: float) -> LlamaForSequenceClassification:
    """The model of the equation above, with c = 1; valence_V: (V,) in [−1, 1]. fp32.

    All hidden states have the length NORM (REST fills them up), but for what attention adds, under 1 % of it.
    """
    config = layout.llama_config(
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
    model = layout.reward_model(config)
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
    attention.q_proj.weight[STILL, ONE] = WIDTH**0.5  # undoes attention's own scale
    attention.k_proj.weight[STILL, SIZE] = sharpness
    attention.v_proj.weight[0, VALENCE] = 1.0
    attention.o_proj.weight[FOUND, 0] = 1.0
    model.score.weight[0, FOUND] = 1.0
    return model.eval()
