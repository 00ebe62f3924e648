"""``abc-rlhf check-tokenizers``: exit status, report, machine-readable form and bad input."""

import argparse
import json

import pytest
from tokenizer_zoo import load
from transformers import GenerationConfig, LlamaConfig

from abc_plugin.errors import UserError
from abc_plugin.text import check_tokenizers


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories as of models, without weights: two of one kind, one of another."""
    base = tmp_path_factory.mktemp("models")
    for directory, name, rows in (("policy", "gpt2", 50257), ("padded", "gpt2", 50304), ("other", "bert", 30522)):
        load(name).save_pretrained(base / directory)
        LlamaConfig(vocab_size=rows).save_pretrained(base / directory)
    return base


def run(*words):
    parser = argparse.ArgumentParser()
    check_tokenizers.add_arguments(parser)
    return check_tokenizers.run(parser.parse_args([str(word) for word in words]))


def test_harmless_differences_pass(models, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert run(models / "policy", models / "padded", "--json", file) == 0
    out = capsys.readouterr().out
    assert "harmless differences only" in out and "embedding rows" in out and "dangerous" not in out
    answer = json.loads(file.read_text())
    assert answer["verdict"] == "harmless" and answer["examples"] == []
    assert {"part": "merges", "verdict": "same", "words": "50000"} in answer["findings"]


def test_dangerous_differences_are_shown_with_examples_and_fail(models, tmp_path, capsys):
    file, data = tmp_path / "result.json", tmp_path / "prompts.jsonl"
    data.write_text('{"text": "My own prompt"}\n')
    assert run(models / "policy", models / "other", "--json", file, "--data", data, "--input_key", "text") == 1
    out = capsys.readouterr().out
    assert "dangerous differences" in out and "'The film was great.'" in out and "the token '!' has id 0" in out
    answer = json.loads(file.read_text())
    assert answer["verdict"] == "dangerous" and answer["texts"] == 72
    assert answer["examples"][0] == {
        "text": "The film was great.",
        "policy": [464, 2646, 373, 1049, 13],
        "reward_model": [1996, 2143, 2001, 2307, 1012],
    }


def test_text_of_a_prompt_is_not_obeyed_by_the_terminal(models, tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"input": "\x1b[31m[red]A"}) + "\n")
    assert check_tokenizers._printable(repr("\x1b[31m[red]")) == "'\\x1b\\[31m\\[red]'"
    assert run(models / "policy", models / "other", "--data", data) == 1
    assert "\x1b[31m" not in capsys.readouterr().out


def test_prompts_are_read_as_training_reads_them(tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text('\ufeff{"input": "a\u2028b"}\n', encoding="utf-8")
    assert check_tokenizers.read_prompts(data, "input", None) == ["a\u2028b"]


def test_lists_of_messages_are_read_in_the_policys_template():
    tokenizer = type(load("gpt2"))(vocab={"a": 0}, merges=[])
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ 'go' }}"
    row = {"input": [{"role": "user", "content": "Hi"}]}
    assert check_tokenizers._prompt(row, "input", tokenizer, "") == "<user>Higo"


def test_every_end_of_a_generated_sequence_is_known(tmp_path):
    load("smollm2").save_pretrained(tmp_path)
    LlamaConfig(eos_token_id=[5, 6]).save_pretrained(tmp_path)
    assert check_tokenizers.load_tokenizer(str(tmp_path)).ends == (2, 5, 6)
    GenerationConfig(eos_token_id=[2, 0]).save_pretrained(tmp_path)
    assert check_tokenizers.load_tokenizer(str(tmp_path)).ends == (0, 2, 5, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: No such file"),
        ("", "has no prompts"),
        ("no json\n", ":1: not JSON"),
        ('{"input": "a"}\n{"text": "b"}\n', ":2: no key 'input', only text; set --input_key"),
        ('{"input": 3}\n', ":1: '3' is no text"),
        ('{"input": "\\ud800"}\n', ":1 has half of a surrogate pair"),
        ('{"input": [{"role": "user", "content": "Hi"}]}\n', "chat template refuses it"),
    ],
)
def test_bad_prompts_are_refused(models, tmp_path, content, message):
    data = tmp_path / "prompts.jsonl"
    if content is not None:
        data.write_text(content)
    with pytest.raises(UserError, match=message):
        run(models / "policy", models / "policy", "--data", data)


def test_models_without_a_tokenizer_are_refused(models, tmp_path):
    with pytest.raises(UserError, match="/missing: no such directory"):
        run(models / "policy", tmp_path / "missing")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="llama has no usable tokenizer"):
        run(tmp_path / "llama", models / "policy")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="gpt2 has no tokenizer files, only a configuration"):
        run(models / "policy", tmp_path / "gpt2")
    with pytest.raises(UserError, match="--json .* cannot be written: "):  # known before anything is read
        run(tmp_path / "none", models / "policy", "--json", tmp_path / "gpt2" / "config.json" / "result.json")
