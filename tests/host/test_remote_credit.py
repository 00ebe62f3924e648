"""Rewards that come with the rollout: what is refused, and credit sent as spans of text."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import CreditError
from abc_plugin.host.import_openrlhf import import_host

import_host()

from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator  # noqa: E402
from test_experience_maker import flags, make  # noqa: E402

from abc_plugin.host.experience_maker import CreditExperienceMaker  # noqa: E402
from abc_plugin.host.ray_trainers import CheckedReplies  # noqa: E402
from abc_plugin.text import remote_credit  # noqa: E402

PROMPT, RESPONSE = "The film was", " naïve 🎬 good"


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny / "policy")


def answer(tokenizer, reward=1.0, **extra_logs):
    """What an executor of the host returns."""
    prompt, response = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PROMPT, RESPONSE))
    return {
        "prompt": PROMPT,
        "label": "",
        "images": None,
        "observation_tokens": prompt + response,
        "action_ranges": [(len(prompt), len(prompt) + len(response))],
        "rollout_log_probs": None,
        "reward": reward,
        "scores": reward,
        "extra_logs": extra_logs,
    }


def rollout(tokenizer, reward=1.0, **extra_logs):
    """One sample as the host's own generator makes it from what an executor returns."""
    return SamplesGenerator._process_response_into_experience(
        None, answer(tokenizer, reward, **extra_logs), max_len=64
    )


def spans(*weights):
    """Weights on the words "naïve", "🎬" and "good" of the query."""
    weighted, text = [], PROMPT + RESPONSE
    for word, weight in zip((" naïve", " 🎬", " good"), weights, strict=True):
        start = text.index(word)
        weighted.append([start, start + len(word), weight])
    return weighted


def maker(tokenizer, monkeypatch, shaping=None):
    made = make(CreditExperienceMaker, shaping or ShapingConfig("abc", 1.0), *flags("reinforce"))
    made.tokenizer = tokenizer
    monkeypatch.setattr(RemoteExperienceMaker, "make_experience", without_models)
    return made


def without_models(self, samples_list):
    for samples in samples_list:
        samples.kl = torch.zeros(samples.action_mask.shape)
        samples.values = torch.zeros(samples.action_mask.shape)
        samples.info["reward"] = samples.rewards
    return samples_list


def test_spans_become_credit_on_the_tokens_of_their_words(tokenizer, monkeypatch):
    samples = [rollout(tokenizer, 2.0, credit_spans=spans(3.0, 0.0, 1.0)) for _ in range(8)]
    made = maker(tokenizer, monkeypatch)
    [experience, *_] = made.make_experience_batch(samples)
    words = [tokenizer.decode(token) for token in experience.sequences[0, 1:][experience.action_mask[0].bool()]]
    shaped = experience.returns[0] - torch.cat([experience.returns[0, 1:], torch.zeros(1)])  # gamma 1: reward to go
    shaped = shaped[experience.action_mask[0].bool()]
    naive = sum(weight for word, weight in zip(words, shaped, strict=True) if word in (" na", "ïve", "ï", "ve"))
    torch.testing.assert_close(naive, torch.tensor(1.5))  # three quarters of 2
    torch.testing.assert_close(shaped[words.index(" good")], torch.tensor(0.5))
    torch.testing.assert_close(experience.info["credit_moved"], torch.zeros(len(experience.index)))
    assert "credit_spans" not in experience.info


def test_contributions_become_credit_as_they_are_and_the_rest_stays_last(tokenizer, monkeypatch):
    """Signed, in the reward's units: not renormalised; what lies on the prompt is dropped."""
    sent = [[0, len(PROMPT), 9.0], *spans(1.5, -0.25, 7.0)]
    samples = [rollout(tokenizer, 2.0, contribution_spans=sent, credit_spans=spans(1.0, 1.0, 1.0)) for _ in range(8)]
    made = maker(tokenizer, monkeypatch, ShapingConfig("abc_signed", 1.0))
    [experience, *_] = made.make_experience_batch(samples)
    actions = experience.action_mask[0].bool()
    paid = experience.returns[0, actions].diff(append=torch.zeros(1)).neg()
    text = "".join(tokenizer.decode(token) for token in experience.sequences[0, 1:][actions][:-1])
    assert paid.sum().item() == pytest.approx(2.0)
    assert paid[:-1].clamp(max=0).sum().item() == pytest.approx(-0.25)
    assert paid[:-1].clamp(min=0).sum().item() == pytest.approx(1.5 if " good" not in text else 8.5)
    assert not {"contribution_spans", "credit_spans"} & experience.info.keys()
    assert (experience.info["credit_negative_share"] > 0).all()


@pytest.mark.parametrize("form", [lambda s: s, lambda s: [s]], ids=["function", "http"])
def test_both_forms_in_which_the_host_hands_spans_over(tokenizer, monkeypatch, form):
    """A function's value arrives as it is, a server's inside a list of one query."""
    samples = [rollout(tokenizer, [2.0], credit_spans=form(spans(1.0, 1.0, 1.0))) for _ in range(8)]
    for experience in maker(tokenizer, monkeypatch).make_experience_batch(samples):
        torch.testing.assert_close(experience.info["return"], torch.full((len(experience.index),), 2.0))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], r"sample 3: credit_spans has shape \(1, 2\), expected \[\[start, end, value\]"),
        (
            [[0, 3, -1.0]],
            "sample 3: credit_spans has negative entries; signed credit belongs under contribution_spans",
        ),
        ([[0, 3, float("nan")]], "sample 3: credit_spans has NaN or infinite"),
        ([[0, 999, 1.0]], r"sample 3: credit_spans reaches from 0 to 999, but the query has \d+ characters"),
        ([[5, 3, 1.0]], "sample 3: credit_spans has a span that ends before it starts"),
        ([], r"sample 3: credit_spans is empty; send \[\[start, end, value\], ...\]"),
        ([[0, 8, 1.0]], "sample 3: all weight of its credit_spans lies on the prompt"),
        ([[13, 20, 0.0]], "sample 3: all weight of its credit_spans lies on the prompt"),
    ],
)
def test_credit_that_does_not_fit_the_text_ends_the_run(tokenizer, monkeypatch, value, message):
    samples = [rollout(tokenizer, credit_spans=spans(1.0, 1.0, 1.0)) for _ in range(8)]
    samples[3] = rollout(tokenizer, credit_spans=value)
    with pytest.raises(CreditError, match=message):
        maker(tokenizer, monkeypatch).make_experience_batch(samples)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "its contribution is known where.*serve-rm --reward_shaping abc_signed, or.*contribution_spans"),
        ([[0, 3, float("inf")]], "sample 3: contribution_spans has NaN or infinite"),
        ([[0, 8, -1.0]], "sample 3: all weight of its contribution_spans lies on the prompt"),
    ],
)
def test_contributions_that_are_missing_or_do_not_fit_end_the_run(tokenizer, monkeypatch, value, message):
    samples = [rollout(tokenizer, contribution_spans=spans(1.0, -1.0, 1.0)) for _ in range(8)]
    samples[3] = rollout(
        tokenizer, credit_spans=spans(1.0, 1.0, 1.0), **{"contribution_spans": value} if value else {}
    )
    with pytest.raises(CreditError, match=f"(?i){message}"):
        maker(tokenizer, monkeypatch, ShapingConfig("abc_signed")).make_experience_batch(samples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra_logs": {"note": "good"}}, "extra_logs['note'] is 'good', expected a number"),
        ({"extra_logs": {"length": None}}, "extra_logs['length'] is 'None', expected a number"),
        ({"extra_logs": {"credit_spans": [[0, 3, 1.0], [3, 5]]}}, "extra_logs['credit_spans'] is '[[0, 3, 1.0], [3"),
        ({"extra_logs": {"contribution_spans": [[0, 3, None]]}}, "expected [[start, end, value], ...]"),
        ({"extra_logs": {"credit_spans": "[[0, 3, 1.0]]"}}, "expected [[start, end, value], ...]"),
        ({"extra_logs": [1.0]}, "extra_logs is '[1.0]', expected a dict"),
        ({"reward": "1.5"}, "reward is '1.5', expected a number"),
        ({"scores": [[1.0], []]}, "scores is '[[1.0], []]', expected a number"),
        ({"extra_logs": {"parts": []}}, "extra_logs['parts'] is '[]', expected a number"),
    ],
)
def test_a_reply_that_is_no_number_is_named_with_its_sample(tokenizer, changes, message):
    generator = CheckedReplies(SimpleNamespace())
    assert generator._process_response_into_experience(answer(tokenizer, good=True), max_len=64).info["good"].all()
    with pytest.raises(CreditError, match=re.escape(f"prompt {PROMPT!r}: ") + ".*" + re.escape(message)):
        generator._process_response_into_experience(answer(tokenizer) | changes, max_len=64)


def test_extra_logs_of_some_samples_only_are_named(tokenizer, monkeypatch):
    samples = [rollout(tokenizer, credit_spans=spans(1.0, 1.0, 1.0), score=1.0) for _ in range(8)]
    del samples[3].info["score"]
    with pytest.raises(CreditError, match="samples 0 and 3 .* have not the same extra_logs: score came"):
        maker(tokenizer, monkeypatch).make_experience_batch(samples)


def test_a_reward_without_credit_ends_the_run_but_uniform_needs_none(tokenizer, monkeypatch):
    samples = [rollout(tokenizer) for _ in range(8)]
    with pytest.raises(CreditError, match="reward of sample 0 came without credit.*a rule has none: use .*uniform"):
        maker(tokenizer, monkeypatch).make_experience_batch(samples)
    samples = [rollout(tokenizer) for _ in range(8)]
    for experience in maker(tokenizer, monkeypatch, ShapingConfig("uniform", 1.0)).make_experience_batch(samples):
        assert (experience.info["credit_conservation_error"] < 1e-6).all()


@pytest.mark.parametrize("shaping", [ShapingConfig("abc"), ShapingConfig("uniform"), ShapingConfig("none")])
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ([0.1, 0.2, 0.7], "sample 5 of 8 .prompt 'The film was'. has a list of 3 rewards: the host takes one scalar"),
        (float("nan"), "sample 5 of 8 .* has the reward nan: nothing was trained on it"),
        (None, "sample 5 of 8 .* came back without a reward: the reward server or function failed"),
    ],
)
def test_rewards_that_the_host_would_mangle_or_miss_end_the_run(tokenizer, monkeypatch, shaping, reward, message):
    samples = [rollout(tokenizer, credit_spans=spans(1.0, 1.0, 1.0)) for _ in range(8)]
    samples[5] = rollout(tokenizer, reward)
    with pytest.raises(CreditError, match=message):
        maker(tokenizer, monkeypatch, shaping).make_experience_batch(samples)


def test_a_batch_that_got_no_credit_ends_the_run(tokenizer, monkeypatch):
    made = maker(tokenizer, monkeypatch, ShapingConfig("uniform"))
    monkeypatch.setattr(RemoteExperienceMaker, "make_experience_batch", lambda self, samples: samples)
    with pytest.raises(CreditError, match="--reward_shaping uniform is on, but a batch got no credit"):
        made.make_experience_batch([rollout(tokenizer)])


def test_the_first_batch_says_that_credit_arrived_and_the_next_does_not(tokenizer, monkeypatch, capsys):
    made = maker(tokenizer, monkeypatch, ShapingConfig("uniform"))
    for _ in range(2):
        made.make_experience_batch([rollout(tokenizer) for _ in range(8)])
    assert capsys.readouterr().out.count("abc_plugin: credit arrived: 8 responses") == 1


def test_row_of_a_hand_computed_case(tokenizer):
    text = "ab cd"
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    row_S, moved = remote_credit.token_row(
        "attention", torch.tensor([[0, 2, 1.0], [2, 5, 3.0]]), ids, tokenizer, "sample 0"
    )
    of = dict(zip(tokenizer.convert_ids_to_tokens(ids.tolist()), row_S.tolist(), strict=True))
    assert sum(of.values()) == pytest.approx(4.0) and moved == 0.0
    assert sum(weight for token, weight in of.items() if not token.startswith("Ġ")) == pytest.approx(1.0)
