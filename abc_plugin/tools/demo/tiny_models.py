"""The embedded default with random models of two layers: the whole stack in seconds, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from abc_plugin.tools.demo.model_recipes import Recipe
from abc_plugin.tools.demo.reviews import read_corpus
from abc_plugin.tools.demo.smollm2_package import llama_config, save_model, smollm2_tokenizer, write_prompts

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
    tokenizer = smollm2_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save_model(LlamaForCausalLM(llama_config(tokenizer, **SHAPE)), tokenizer, out_dir / "policy")
        reward_model = LlamaForSequenceClassification(llama_config(tokenizer, num_labels=1, **SHAPE))
        torch.nn.init.normal_(reward_model.score.weight, std=SHAPE["hidden_size"] ** -0.5)
        save_model(reward_model, tokenizer, out_dir / "reward_model")
    recipe = Recipe(seed=seed, heldout_sentences=0, prompts=64, heldout_prompts=16)
    write_prompts(out_dir, read_corpus(recipe), tokenizer, recipe)
    (out_dir / "card.json").write_text(json.dumps({"made": "tiny", "seed": seed}, indent=2) + "\n", encoding="utf-8")
    return out_dir
