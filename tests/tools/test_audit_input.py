"""What an audit reads, and what it refuses by name."""

import errno
import json

import audit_models
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaConfig, LlamaModel

from abc_plugin.cli import main
from abc_plugin.errors import UserError
from abc_plugin.output_directory import locked
from abc_plugin.tools.audit import command as audit_command
from abc_plugin.tools.audit import reward_model
from abc_plugin.tools.audit.audited_texts import Reading, read
from abc_plugin.tools.audit.reward_model import RewardModel


@pytest.fixture(scope="module")
def tokenizer():
    return audit_models.make_tokenizer()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return audit_models.save_reward_model(tmp_path_factory.mktemp("model"))


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def rows(count=12, **fields):
    return [{"prompt": f"w{i % 12} w1", "completion": "w2 good ."} | fields for i in range(count)]


def test_prompt_and_completion_become_ids_at_evenly_spaced_lines(tmp_path, tokenizer):
    chosen = read(write(tmp_path / "d", rows(100)), tokenizer, Reading(samples=20), 32)
    assert [completion.row for completion in chosen] == list(range(1, 100, 5))
    assert chosen[0].prompt == "w0 w1"
    assert tokenizer.convert_ids_to_tokens(chosen[0].prompt_ids + chosen[0].ids) == ["w0", "w1", "w2", "good", "."]
    assert chosen[0].special == [False] * 3


def test_completions_are_cut_and_shorter_ones_left_out(tmp_path, tokenizer):
    records = rows(12) + [{"prompt": f"w{i} w2", "completion": "w2 w3 good fine ."} for i in range(12)]
    chosen = read(write(tmp_path / "d", records), tokenizer, Reading(append_eos=True, tokens=4), 7)
    assert [completion.row for completion in chosen] == list(range(13, 25))
    assert tokenizer.convert_ids_to_tokens(chosen[0].ids) == ["w2", "w3", "good", "fine", "<eos>"]


def test_eos_is_appended_where_it_lacks(tmp_path, tokenizer):
    records = rows(11) + [{"prompt": "w11 w1", "completion": "w2 good <eos>"}]
    chosen = read(write(tmp_path / "d", records), tokenizer, Reading(append_eos=True), 32)
    assert all(completion.ids[-1] == tokenizer.eos_token_id and completion.special[-1] for completion in chosen)
    assert {len(completion.ids) for completion in chosen[:-1]} == {4} and len(chosen[-1].ids) == 3


SPLIT = {"completion_key": "text", "split": 2}
TURN = [{"role": "user", "content": "w0"}]


@pytest.mark.parametrize(
    ("record", "reading", "prompt", "tokens"),
    [
        ({"text": "w0 w1 w3 good ."}, SPLIT, "w0 w1", ["w3", "good", "."]),  # a whole text
        ({"prompt": "w0", "tokens": ["w2", " good", " ."]}, {}, "w0", ["w2", "good", "."]),  # abc-rlhf evaluate's
        ({"prompt": TURN, "completion": "w2 good ."}, {}, "w0 w7", ["w2", "good", "."]),  # a chat
    ],
)
def test_other_forms_of_a_line(record, reading, prompt, tokens, tmp_path, tokenizer, monkeypatch):
    template = "{% for turn in messages %}{{ turn['content'] }} w7{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    others = [json.loads(json.dumps(record).replace("w0", f"w{i}")) for i in range(1, 12)]
    [first, *_] = read(write(tmp_path / "d", [record, *others]), tokenizer, Reading(**reading), 32)
    assert first.prompt == prompt and tokenizer.convert_ids_to_tokens(first.ids) == tokens


@pytest.mark.parametrize(
    ("text", "reading", "message"),
    [
        ("", {}, "is empty"),
        ("nonsense\n", {}, ":1: not JSON"),
        ("[1]\n", {}, ":1: not an object but list"),
        ('{"prompt": "w1"}\n', {}, ":1: no key 'completion', only prompt; --prompt_key and --completion_key name"),
        ('{"prompt": "w1", "completion": "w2"}\n', {"prompt_key": "q"}, "no key 'q', only prompt, completion"),
        ('\n{"prompt": "w1", "completion": ""}\n', {}, ":2: the completion is empty"),
        ('{"prompt": "", "completion": "w2 w3"}\n', {}, ":1: the prompt is empty"),
        ('{"prompt": "w1 \\ud83c", "completion": "w2"}\n', {}, ":1 has half of a surrogate pair"),
        ('{"prompt": "w1", "completion": 3}\n', {}, "completion is no text but '3'"),
        ('{"prompt": 3, "completion": "w1"}\n', {}, "the prompt is no text"),
        ('{"completion": "w1 w2"}\n', {"split": 2}, "the completion is empty"),
        (json.dumps({"prompt": "w1", "completion": "w2 " * 32}), {}, ":1: 33 tokens, but .* reads at most 32"),
        ('{"prompt": "w1", "completion": "w2 w3 w4"}\n' * 50, {}, "to 1 different prompts are too few"),
        ('{"prompt": "w1", "completion": "w2 w3"}\n' * 50, {}, "to 0 different prompts .* at least 10 such"),
    ],
)  # fmt: skip
def test_bad_data_is_named(text, reading, message, tmp_path, tokenizer):
    (tmp_path / "data").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "data", tokenizer, Reading(**reading), 32)
    assert len(str(caught.value).splitlines()) == 1


def test_data_that_is_no_text_or_not_there(tmp_path, tokenizer):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "none", tokenizer, Reading(), 32)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read(tmp_path / "binary", tokenizer, Reading(), 32)


def command(tmp_path, model_path, *more):
    data = write(tmp_path / "data.jsonl", rows())
    words = {"--reward.model_name_or_path": model_path, "--data": data, "--out": tmp_path / "out"}
    return ["audit", *(str(word) for pair in words.items() for word in pair), *more]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "abcd"], "'abcd' is not registered"),
        (["--methods", "abc_d"], "--methods abc_d needs policy, which a reward model alone does not give"),
        (["--samples", "0"], "--samples 0 is too small; the least is 1"),
        (["--tokens", "16", "2"], "--tokens 2 is too small; the least is 3"),
        (["--tokens", "4"], "completions of 4 or more tokens to 0 different prompts are too few"),
        (["--spans", "2"], "--spans 2 is too small; the least is 3"),
        (["--samples", "9"], "9 different prompts are too few"),
        (["--split", "0"], "--split 0 is too small; the least is 1"),
        (["--shaping.layer", "7"], "layer 7 is out of range"),
        (["--shaping.heads", "1"], "--shaping.heads 1: the layer has 1 heads"),
        (["--ds.value_head_prefix", "value_head"], "has no weight value_head.weight: it is no reward model"),
        (["--reward.model_name_or_path", "/no/such"], "/no/such: no such directory"),
        (["--data", "/no/such"], "cannot read /no/such: No such file or directory; give --data a file"),
        (["--reward.model_name_or_path", "/a/rm,/b/rm"], "/a/rm,/b/rm: several reward models; audit one at a time"),
        (["--out", "/dev/null/x"], "--out /dev/null/x cannot be written: Not a directory"),
    ],
)
def test_bad_flags_are_one_line_and_nothing_is_written(more, message, tmp_path, model_path, capsys):
    assert main(command(tmp_path, model_path, *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()


def test_an_audit_has_its_directory_to_itself(tmp_path, model_path, capsys):
    with locked("--out", tmp_path / "out"):
        assert main(command(tmp_path, model_path)) == 2
        assert "out is another run's, which is not done" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(model_path)
    assert main(command(tmp_path, model_path, "--out", str(tmp_path / "link"))) == 2
    assert f"--out: what is written would overwrite {reward_model.FLAG} {model_path}" in capsys.readouterr().err
    assert not (model_path / "completions.jsonl").exists()


def test_a_full_disk_says_what_an_audit_keeps(tmp_path, model_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(audit_command, "measure", full)
    assert main(command(tmp_path, model_path)) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if "abc-rlhf" in line]
    assert line.endswith("No space left on device; the completions done are kept, and the same command goes on")


def test_a_model_without_head_and_one_with_two_outputs(tmp_path):
    LlamaModel(LlamaConfig(**{"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                              "num_attention_heads": 1})).save_pretrained(tmp_path / "base")  # fmt: skip
    with pytest.raises(UserError, match="has no weight score.weight"):
        RewardModel(str(tmp_path / "base"))
    audit_models.save_reward_model(tmp_path / "two", labels=2)
    with pytest.raises(UserError, match="its head score.weight is no scalar"):
        RewardModel(str(tmp_path / "two"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a Hugging Face model"):
        RewardModel(str(tmp_path / "empty"))


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma3_text"])
def test_rows_of_every_layer_and_head_of_other_families(family, tmp_path):
    """Bloom's layers lie outside the attention interface and have no config of their own; gemma3's windows differ."""
    widths = {"hidden_size": 32, "n_embd": 32, "intermediate_size": 32, "head_dim": 8}
    config = AutoConfig.for_model(
        family, vocab_size=40, num_labels=1, num_hidden_layers=2, num_attention_heads=4, **widths
    )
    config.num_key_value_heads = 2
    torch.manual_seed(0)
    stock = AutoModelForSequenceClassification.from_config(config).eval()
    stock.save_pretrained(tmp_path)
    model = RewardModel(str(tmp_path), needs=frozenset({"attention", "prefix", "gradient"}))
    explained = model.explain(list(range(5, 16)))
    assert explained.score == pytest.approx(stock(torch.tensor([list(range(5, 16))])).logits.item(), abs=1e-5)
    assert explained.rows_LHS.shape == (2, 4, 11)
    assert explained.rows_LHS.sum(-1) == pytest.approx(torch.ones(2, 4), abs=1e-5)
    assert explained.evidence["gradient"].shape == (11,)


def test_scores_that_are_not_numbers_end_it_by_their_tokens(tmp_path, capsys):
    model = audit_models.make_reward_model(0.0)
    model.model.embed_tokens.weight.data[3, 1] = float("nan")  # of "good"
    model.save_pretrained(tmp_path / "model")
    audit_models.make_tokenizer().save_pretrained(tmp_path / "model")
    assert main(command(tmp_path, tmp_path / "model", "--methods", "uniform")) == 1
    assert "the score of the tokens [7, 8, 3" in capsys.readouterr().err


def test_gradients_of_rounded_weights_are_refused(tmp_path, model_path, monkeypatch, capsys):
    load = reward_model.load_reward_model

    def quantised(*args, **kwargs):
        model = load(*args, **kwargs)
        model.is_quantized = True
        return model

    monkeypatch.setattr(reward_model, "load_reward_model", quantised)
    assert main(command(tmp_path, model_path)) == 2
    error = capsys.readouterr().err
    assert "is a quantised checkpoint, whose kernels need not have a backward pass: audit the unquantised one" in error
    assert "training with --ds.load_in_4bit quantises itself" in error
    assert main(command(tmp_path, model_path, "--methods", "abc", "prefix", "uniform")) == 0
