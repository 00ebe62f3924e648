"""The layout of the embedded default with random models of two layers: the whole stack in seconds, for tests."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from abc_plugin.tools.demo import layout
from abc_plugin.tools.demo.sources import read_corpus
from abc_plugin.tools.demo.texts import cut_prompts

# head_dim 32 rather than 16: vLLM's CPU attention takes no smaller one.
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": 0.2,  # the default 0.02 leaves logits and scores almost constant at this width
}


def make_tiny(out_dir: Path, seed: int = 0) -> Path:
    """Write policy/, reward_model/, 64 training and 16 held-out prompts and a card into ``out_dir``; return it.

    The tokenizer and the prompts are the real ones; the weights are random and the same for the same ``seed``. Scores
    of different texts have a standard deviation of about 1.
    Raises UserError when one of the two packages is missing.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = layout.smollm2_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layout.save_model(LlamaForCausalLM(layout.llama_config(tokenizer, **SHAPE)), tokenizer, out_dir / "policy")
        reward = layout.reward_model(layout.llama_config(tokenizer, num_labels=1, **SHAPE))
        torch.nn.init.normal_(reward.score.weight, std=SHAPE["hidden_size"] ** -0.5)
        layout.save_model(reward, tokenizer, out_dir / "reward_model")
    corpus = read_corpus(seed, heldout_reviews=1000, heldout_sentences=0)
    rng = random.Random(seed)
    heldout = cut_prompts(corpus.imdb_heldout, 16, (4, 8), tokenizer, rng)
    layout.write_prompts(out_dir / "heldout.jsonl", heldout)
    layout.write_prompts(out_dir / "prompts.jsonl", cut_prompts(corpus.imdb, 64, (4, 8), tokenizer, rng, heldout))
    layout.write_card(out_dir / "card.json", {"made": "tiny", "seed": seed})
    return out_dir
