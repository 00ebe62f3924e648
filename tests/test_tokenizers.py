"""The strict tokenizer comparison on the real tokenizer and mutations of it."""

import json

import pytest
from transformers import AutoTokenizer

from abc_plugin.tokenizers import first_difference


@pytest.fixture(scope="module")
def original(tiny):
    return AutoTokenizer.from_pretrained(tiny / "policy")


def mutated(tiny, tmp_path, change, **config):
    source = tiny / "policy"
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).exists():
            (tmp_path / name).write_text((source / name).read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | config))
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    change(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return AutoTokenizer.from_pretrained(tmp_path)


def swap(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġof"] = vocabulary["Ġof"], vocabulary["Ġthe"]


def test_the_same_tokenizer_has_no_difference(tiny, tmp_path, original):
    assert first_difference(original, mutated(tiny, tmp_path, lambda tokenizer: None)) is None


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (swap, {}, "the token 'Ġ(the|of)' has id"),
        (lambda tokenizer: tokenizer["model"]["merges"].pop(), {}, "their model differ"),
        (lambda tokenizer: tokenizer.update(normalizer={"type": "Lowercase"}), {}, "their normalizer differ"),
        (lambda tokenizer: None, {"eos_token": "<|endoftext|>"}, "eos_token_id is"),
    ],
)
def test_each_mutation_is_found(tiny, tmp_path, original, change, config, message):
    import re

    assert re.search(message, first_difference(original, mutated(tiny, tmp_path, change, **config)))
