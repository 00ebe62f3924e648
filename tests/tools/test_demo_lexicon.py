"""The control: a reward model whose attention is its reasoning, by hand and through the host and the tap."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from abc_plugin.attention import attach
from abc_plugin.cli import main
from abc_plugin.credit.methods import ABC, Evidence
from abc_plugin.host.imports import import_host
from abc_plugin.tools.demo import layout, lexicon, prepare, reward, sources
from abc_plugin.tools.demo.recipe import Recipe, recipe_hash
from abc_plugin.tools.demo.sources import Corpus, Review

TINY = lexicon.LexiconRecipe(embedded=Recipe(heldout_reviews=2, heldout_sentences=1, heldout_prompts=2, completions=2))
GOOD, BAD, FILM = 5, 7, 9  # any three tokens
REVIEWS = [Review(" a wonderful wonderful film for all of us here", 1), Review(" an awful film for one and none", 0)]


@pytest.fixture(scope="module")
def tokenizer():
    return layout.smollm2_tokenizer()


@pytest.fixture
def model(tokenizer):
    valence_V = torch.zeros(len(tokenizer))
    valence_V[[GOOD, BAD]] = torch.tensor([0.75, -0.5])
    return lexicon.lexicon_model(tokenizer, valence_V, 4.0)


def test_the_score_is_what_it_attends_to_by_hand(model):
    ids = [[FILM, GOOD, FILM, BAD], [BAD, FILM, FILM, FILM]]
    # softmax of 4·|v|: e^0 twice, e^3, e^2; and e^2, e^0 three times.
    first = (0.75 * 20.0855 - 0.5 * 7.3891) / (2 + 20.0855 + 7.3891)
    second = -0.5 * 7.3891 / (3 + 7.3891)
    # Under 1 % smaller, by the last norm, which sees what attention has added.
    torch.testing.assert_close(reward.scores(model, ids), torch.tensor([first, second]), rtol=8e-3, atol=0)


def test_places_do_not_matter_far_away_either(model):
    near = reward.scores(model, [[FILM] * 3 + [GOOD, BAD, FILM]])
    far = reward.scores(model, [[GOOD] + [FILM] * 2 + [BAD] + [FILM] * 2])
    torch.testing.assert_close(near, far, rtol=1e-5, atol=0)
    long = torch.full((1, 3001), FILM)
    long[0, 0] = GOOD
    with torch.no_grad():
        score = model(long, attention_mask=torch.ones_like(long)).logits.item()
    assert score == pytest.approx(0.75 * 20.0855 / (20.0855 + 3000), rel=1e-2)


def test_abc_reads_its_reasons_from_openrlhfs_reward_model(model, tokenizer, tmp_path):
    layout.save_model(model, tokenizer, tmp_path)
    import_host()
    from openrlhf.models import get_llm_for_sequence_regression

    judge = get_llm_for_sequence_regression(str(tmp_path), "reward", attn_implementation="sdpa").float().eval()
    ids_BS = torch.tensor([[FILM, GOOD, GOOD, FILM, BAD, FILM]])
    mask_BS = torch.ones_like(ids_BS)
    with torch.no_grad(), attach(judge).record(mask_BS) as recording:
        judge(ids_BS, mask_BS)
    action_mask_BA = torch.tensor([[False, True, True, True, True]])  # a prompt of two tokens
    credit_BA = ABC.credit(Evidence(ids_BS, action_mask_BA, recording.row_BS[:, 1:]), torch.tensor([2.0]))
    expected = 2.0 * torch.tensor([3.0, 0.0, 2.0, 0.0]).softmax(0)
    torch.testing.assert_close(credit_BA[0, 1:], expected, rtol=1e-2, atol=0)  # weights lie in bf16


def test_valence_is_the_log_of_smoothed_frequencies_within_one():
    count_2V = torch.tensor([[8.0, 1.0, 1.0, 0.0], [2.0, 1.0, 7.0, 0.0]])  # negative, positive; 10 tokens each
    found = lexicon.valences(count_2V, 1.0)
    expected = torch.tensor([3 / 9, 1.0, 8 / 2, 1.0]).log().clamp(-1, 1)
    torch.testing.assert_close(found, expected)
    assert found[2] == 1.0


def test_words_are_counted_by_label(tokenizer):
    reviews = [Review(" good good film", 1), Review(" film", 0)]
    count_2V = lexicon.count(reviews, tokenizer, lambda _what, _share: None)
    good, film = (tokenizer(word, add_special_tokens=False).input_ids for word in (" good", " film"))
    assert count_2V[:, [*good, *film]].tolist() == [[0.0, 1.0], [2.0, 1.0]] and count_2V.sum() == 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What ``build`` writes, of invented reviews and completions."""
    reviews = [
        Review(" a wonderful wonderful film for all of us here", 1),
        Review(" an awful film for one and none", 0),
    ]
    corpus = Corpus(reviews, reviews, reviews[:1], reviews[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "read_corpus", lambda *_: corpus)
        patch.setattr(lexicon.embedded, "load_policy", lambda _tokenizer: None)
        patch.setattr(
            lexicon.embedded,
            "complete",
            lambda _policy, _prompts, tokenizer, _recipe: [tokenizer(text).input_ids for text, _ in REVIEWS],
        )
        return prepare.ensure_reward_model(
            "lexicon_reward_model", tmp_path_factory.mktemp("lexicon") / "made", recipe=TINY
        )


def test_what_is_made_scores_with_the_recipes_deviation_and_tells_its_accuracy(made):
    saved = AutoModelForSequenceClassification.from_pretrained(made / "reward_model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(made / "reward_model")
    ids = [tokenizer(review.text).input_ids for review in REVIEWS]
    assert reward.scores(saved, ids).std().item() == pytest.approx(2.0, rel=2e-2)
    card = json.loads((made / "card.json").read_text())
    assert card["recipe_hash"] == recipe_hash(TINY, lexicon.made_from())
    assert card["heldout"]["rotten_tomatoes_sentences"]["accuracy"] == 1.0
    assert sorted(path.name for path in made.iterdir()) == ["card.json", "reward_model"]


def test_it_has_a_directory_of_its_own_and_the_flags_exclude_each_other(made, monkeypatch, capsys):
    monkeypatch.setenv("ABC_HOME", "/somewhere")
    assert lexicon.directory(lexicon.RECIPE).name.startswith("imdb-lexicon-")
    monkeypatch.setattr(prepare, "recipe_hash", lambda *_: json.loads((made / "card.json").read_text())["recipe_hash"])
    assert main(["prepare", "--lexicon_reward_model", "--path", "--out", str(made)]) == 0
    assert capsys.readouterr().out == f"{made}\n"
    with pytest.raises(SystemExit):
        main(["prepare", "--lexicon_reward_model", "--other_reward_model"])
    assert "not allowed with argument" in capsys.readouterr().err
