"""Statistics, the choice of layers and heads, and the verdict: by hand, against scipy, and on audits of noise."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abc_plugin.tools.audit.advice import advise, verdict
from abc_plugin.tools.audit.heads import halves, map_heads
from abc_plugin.tools.audit.measure import LEAVE_ONE_OUT, RANDOM, RECENCY, curves, recency_credit
from abc_plugin.tools.audit.page import render
from abc_plugin.tools.audit.shares import PLACES, shares
from abc_plugin.tools.audit.stats import Interval, difference, interval, needed, pearson, spearman
from abc_plugin.tools.audit.summary import STATISTICS, background, summarise

NAN = math.nan
numbers = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 2)), min_size=3, max_size=30)


def test_correlations_by_hand():
    assert pearson([1, 2, 3], [1, 2, 4]) == pytest.approx(3 / math.sqrt(2 * 14 / 3))
    assert spearman([10, 20, 30], [1, 2, 400]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [1, 1, 2, 0]) == pytest.approx(-0.316227766)  # ranks 1 2 3 4 and 2.5 2.5 4 1


def test_correlations_that_are_not_defined():
    assert pearson([1, 1, 1], [1, 2, 3]) is None
    assert pearson([1, 2], [2, 1]) is None
    assert spearman([], []) is None


@given(numbers, st.randoms())
@settings(deadline=None, max_examples=50)
def test_correlations_agree_with_scipy(x, random):
    y = [value + random.choice([-1.0, 0.0, 1.0, 50.0]) for value in x]
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert pearson(x, y) is None
        return
    assert pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-9)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-9)


def test_interval_by_hand_and_over_groups():
    """Mean 2, s = 1, n = 3: 2 ± 4.302653 / sqrt 3."""
    expected = (2.0, 2 - 2.4841377, 2 + 2.4841377)
    alone = interval([1, 2, 3], "abc")
    assert (alone.mean, alone.low, alone.high) == pytest.approx(expected) and alone.n == 3
    grouped = interval([0, 2, None, 2, 3, 3, 3], "aaabccc")  # the means of the groups are 1, 2, 3
    assert (grouped.mean, grouped.low, grouped.high) == pytest.approx(expected) and grouped.n == 3
    assert interval([1.0, None], "ab") is None and interval([1.0, 2.0], "aa") is None
    assert interval([1, 2, 3], "abc", level=0.9).high == pytest.approx(2 + 2.9199856 / math.sqrt(3))
    assert difference([1.0, None, 3.0], [0.5, 1.0, None]) == [0.5, None, None]


def test_how_many_are_needed():
    estimate = interval(list(np.linspace(0, 1, 50)), range(50))
    assert needed(estimate, 0.05) == math.ceil((1.96 * np.linspace(0, 1, 50).std(ddof=1) / 0.05) ** 2)


def record(number, effect, credit, heads=None):
    """A completion whose score is 1 plus the effects of its tokens, which are removed without side effects."""
    effect, tokens = np.asarray(effect, dtype=float), len(effect)
    credit = {name: torch.as_tensor(values, dtype=torch.float64) for name, values in credit.items()}
    credit[RECENCY], credit[LEAVE_ONE_OUT] = recency_credit(tokens, 1.0), torch.as_tensor(effect)
    # Ids are places, so that the score is a function of what is left.
    model = SimpleNamespace(scores=lambda many: [1.0 + sum(effect[i] for i in ids if i >= 0) for ids in many])
    completion = SimpleNamespace(prompt_ids=[-1], ids=list(range(tokens)), row=number)
    heads = [[0.0, 0.0]] if heads is None else heads
    lies = {name: [[1.0] * (1 + len(heads))] for name in PLACES}
    return {
        "row": number,
        "prompt": f"prompt {number}",
        "tokens": [f" t{i}" for i in range(tokens)],
        "punctuation": [i == 0 for i in range(tokens)],
        "special": [False] * tokens,
        "reward": 1.0 + float(effect.sum()),
        "empty": 1.0,
        "effect": effect.tolist(),
        "gradient": None,
        "credit": {name: values.tolist() for name, values in credit.items()},
        "curves": curves(model, completion, credit, 1.0 + float(effect.sum()), 1.0),
        "layers": [[float(np.mean([head[0] for head in layer])), 0.0] for layer in [heads]],
        "heads": [[[float(head[0]), 0.0] for head in heads]],
        "attention": lies,
        "configured": [float(heads[-1][0]), 0.0],
        "configured_heads": [np.ones(tokens).tolist() for _ in heads],
        "on_prompt": 0.5,
        "on_first": 0.1,
    }


def noise(rng, count=16, tokens=12):
    """Effects, random credit under both names: nothing knows anything."""
    return [
        record(i, rng.normal(size=tokens), {"abc": rng.exponential(size=tokens), RANDOM: rng.exponential(size=tokens)})
        for i in range(count)
    ]


def test_shares_entropy_and_areas_by_hand():
    credit = [3.0, -1.0, 0.0, 0.0]
    one = record(1, [1.0, 2.0, 0.0, 0.0], {"abc": credit})
    expected = {"first": 0.75, "last": 0.0, "punctuation": 0.75, "special": 0.0}
    expected["entropy"] = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    for name, value in expected.items():
        assert STATISTICS[name][1](one, "abc") == pytest.approx(value), name
    # removed after each tenth of 4 tokens: 0 0 1 1 2 2 2 3 3 4 4; leave-one-out removes 2, then 1
    highest = [4, 4, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    lowest = [4, 4, 4, 4, 4, 4, 4, 3, 3, 1, 1]
    assert one["curves"][LEAVE_ONE_OUT] == {"highest": highest, "lowest": lowest}
    assert STATISTICS["deletion"][1](one, LEAVE_ONE_OUT) == pytest.approx((sum(highest) - 2.5) / 10)
    assert STATISTICS["insertion"][1](one, LEAVE_ONE_OUT) == pytest.approx((sum(lowest) - 2.5) / 10)


def test_noise_is_seldom_called_better():
    """Both intervals lie above 0 in at most 2.5 % of audits: at most 2 of these 80 expected."""
    rng = np.random.default_rng(0)
    said = [verdict(summarise(noise(rng))["abc"]) for _ in range(80)]
    assert said.count("better") <= 5 and said.count("worse") <= 5
    assert said.count("no better") >= 60


def test_the_words_follow_the_verdict():
    up, down, none = Interval(0.5, 0.4, 0.6, 20), Interval(-0.5, -0.6, -0.4, 20), Interval(0.0, -0.1, 0.1, 20)
    assert verdict({"spearman": up, "separation": up}) == "better"
    assert verdict({"spearman": down, "separation": down}) == "worse"
    assert verdict({"spearman": none, "separation": none}) == "no better"
    assert verdict({"spearman": up, "separation": none}) == "open"
    assert verdict({"spearman": none, "separation": down}) == "no better"
    assert verdict({"spearman": up, "separation": down}) == verdict({"spearman": down, "separation": up}) == "open"
    assert verdict({"spearman": None, "separation": none}) == "no better"
    records = noise(np.random.default_rng(3))
    [first, *_] = advise(summarise(records), records, map_heads(records, [0], 0))
    assert first.startswith("ABC credit of this model is no better than uniform: ")


def follows(rng, effects, gain, ends):
    """Credit like ``effects``, with the largest and the smallest swapped where ``ends``: curves suffer most."""
    credit = [gain * effect + rng.normal(scale=0.3, size=len(effect)) for effect in effects]
    for effect, own in zip(effects, credit, strict=True):
        own[[effect.argmax(), effect.argmin()]] += np.array([-80.0, 80.0]) * ends
    return credit


def advice_on(effects, heads=None, read=None, **credit):
    records = [
        record(i, effect, {name: credit[name][i] for name in credit}, None if heads is None else heads[i])
        for i, effect in enumerate(effects)
    ]
    return advise(summarise(records), records, map_heads(records, [7], 0, read))


def test_two_measures_that_contradict_each_other_are_said_so():
    """Effects of like size but for two large ones: credit has those two wrong and all others right, or none of it."""
    rng = np.random.default_rng(8)
    effects = [rng.permutation(np.r_[np.linspace(-1, 1, 18), 40.0, -40.0]) for _ in range(24)]
    chance = {RANDOM: rng.random((24, 20))}
    torn = follows(rng, effects, 1.0, True)
    sentences = advice_on(effects, abc=torn, **chance)
    assert sentences[0].startswith("Whether ABC credit of this model is better than uniform is open: ")
    assert "one of two measures says so, the other says the opposite (" in sentences[0]
    assert any(line.startswith("Against random credit it is better in rank correlation and worse in the cu")
               for line in sentences)  # fmt: skip
    sentences = advice_on(effects, abc=rng.random((24, 20)), prefix=torn, **chance)
    assert any(line.startswith("Better in rank correlation and worse in the curves is --reward_shaping prefix: by ")
               for line in sentences)  # fmt: skip
    assert not any(line.startswith("No other method") for line in sentences)
    sentences = advice_on(effects, abc=follows(rng, effects, 1.0, False), prefix=torn, **chance)
    assert "No other method audited (prefix) is clearly better in either measure." in sentences


def test_the_advice_names_no_difference_that_is_not_defined():
    """Constant credit has curves, by random order, but no rank correlation: only the curves are compared."""
    rng, even = np.random.default_rng(9), np.ones((24, 12))
    effects = list(rng.normal(size=(24, 12)))
    chance, close = {RANDOM: rng.random((24, 12))}, follows(rng, effects, 1.0, False)
    for credit in (
        {"abc": even, "prefix": close},
        {"abc": close, "prefix": even},
        {"abc": even, "prefix": even},
        {"abc": close, "prefix": even, RANDOM: even},
    ):
        half = [[[NAN]] if i % 2 else [[0.1]] for i in range(24)]  # defined where the layer is chosen, not on the rest
        for heads in (None, [[[NAN]]] * 24, half, [[[0.1], [NAN]]] * 24):
            text = " ".join(advice_on(effects, heads, **(chance | credit)))
            assert "None" not in text, text
    [said] = [line for line in advice_on(effects, abc=even, prefix=close, **chance) if "prefix" in line]
    assert said.startswith("Better in the curves alone is --reward_shaping prefix: by ") and "rank" not in said


def test_what_is_read_now_is_what_was_audited():
    """Two heads, the first good: with all heads read it is better than their mean; read alone, it is the choice."""
    rng = np.random.default_rng(10)
    effects = list(rng.normal(size=(24, 6)))
    heads = [[[0.5 + rng.normal(scale=0.05)], [-0.5 + rng.normal(scale=0.05)]] for _ in effects]
    credit = {"abc": rng.random((24, 6)), RANDOM: rng.random((24, 6))}
    every = advice_on(effects, heads, None, **credit)
    assert any(line.startswith("Layer 7, read now, is also what half of the prompts") for line in every)
    assert "Of 2 heads 1 (layer 7 head 0) follow the removals and 1 (layer 7 head 1) run against them" in every[-3]
    assert every[-2] == "To drop head 1 of the layer read now, use --shaping.heads 0."
    one = advice_on(effects, heads, [0], **credit)
    assert any(line.startswith("Layer 7 head 0, read now, is also what half of the prompts") for line in one)
    assert any(line.startswith("Layer 7, all heads, chosen on half of the prompts, has ") for line in one)
    assert not any("To drop" in line for line in one)
    wrong = advice_on(effects, heads, [1], **credit)
    assert "All heads read now run against them: read another layer, or use another method." in wrong


def test_many_heads_are_counted_and_the_first_named():
    rng = np.random.default_rng(11)
    effects = list(rng.normal(size=(24, 6)))
    heads = [0.5 + rng.normal(scale=0.05, size=(6, 1)) for _ in effects]
    sentences = advice_on(effects, heads, abc=rng.random((24, 6)), **{RANDOM: rng.random((24, 6))})
    named = ", ".join(f"layer 7 head {head}" for head in range(4))
    assert any(f"Of 6 heads 6 ({named}, 2 more) follow the removals and none run" in line for line in sentences)


def test_places_of_rows_by_hand():
    """Two rows of three tokens at once; attention that is zero on the whole completion lies nowhere."""
    marks = {"punctuation": [False, True, True], "special": [False] * 3}
    share = shares(np.array([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]]))
    expected = {"entropy": 1.5 * math.log(2) / math.log(3), "first": 0.25, "last": 0.5, "punctuation": 0.75}
    for name, (_, place) in PLACES.items():
        values = place(share, marks)
        assert values[0] == pytest.approx(expected.get(name, 0.0)) and np.isnan(values[1]), name
    assert np.isnan(PLACES["entropy"][1](shares(np.array([2.0])), marks))


def test_places_are_means_over_prompts():
    """A prompt of three completions counts as one; what is not defined is left out."""
    records = [record(i, [1.0, 2.0, 0.0], {"abc": [1, 2, 3]}) for i in (0, 0, 0, 1)]
    for one, value in zip(records, (0.1, 0.2, 0.3, 0.8), strict=True):
        one["attention"] = {name: [[0.9, None if value == 0.3 else value]] for name in PLACES}
    found = map_heads(records, [7], 0)
    for name in PLACES:
        assert found.shares_LH[name] == pytest.approx((0.15 + 0.8) / 2)
        assert found.shares_L[name] == pytest.approx(0.9)


def test_another_method_that_is_better_is_recommended():
    rng, records = np.random.default_rng(1), []
    for i in range(24):
        effect = rng.normal(size=12)
        credit = {"abc": rng.exponential(size=12), "prefix": effect + rng.normal(size=12), RANDOM: rng.random(12)}
        records.append(record(i, effect, credit))
    sentences = advise(summarise(records), records, map_heads(records, [0], 0))
    assert any(sentence.startswith("Better in both measures is --reward_shaping prefix: by") for sentence in sentences)


def test_credit_that_knows_only_the_end_is_called_recency():
    """Late tokens matter more; abc follows nothing else, and then the effects themselves."""
    rng, place, records = np.random.default_rng(6), np.arange(1, 13), []
    assert recency_credit(4, 2.0).tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    effects = [place * rng.uniform(0, 2, size=12) for _ in range(24)]
    recency = "Against recency, credit that knows only how late a token comes, it is"
    for noise_of, said in ((0.5, f"{recency} not clearly better or worse: by"), (0.0, f"{recency} better in both")):
        records = [
            record(i, effect, {"abc": (place if noise_of else effect) + noise_of * rng.normal(size=12), RANDOM: place})
            for i, effect in enumerate(effects)
        ]
        sentences = advise(summarise(records), records, map_heads(records, [0], 0))
        assert any(sentence.startswith(said) for sentence in sentences), said


def test_halves_are_of_prompts():
    records = [{"prompt": prompt} for prompt in "aabbcda"]
    assert halves(records) == ([0, 1, 4, 6], [2, 3, 5])


def test_what_was_chosen_by_luck_is_not_reported_as_luck():
    """Head 0 follows the removals only on the half it is chosen on, head 1 a little on both."""
    rng, records = np.random.default_rng(2), []
    for i in range(40):
        lucky = 0.9 if i % 2 == 0 else 0.0
        heads = [[lucky + rng.normal(scale=0.05)], [0.3 + rng.normal(scale=0.05)], [rng.normal(scale=0.05)]]
        records.append(record(i, rng.normal(size=6), {"abc": rng.random(6), RANDOM: rng.random(6)}, heads))
    found = map_heads(records, [7], 0)
    assert found.head.layer == 7 and found.head.heads == [0]
    assert found.head.chosen == pytest.approx(0.9, abs=0.05)
    assert abs(found.head.reported.mean) < 0.05 and found.head.over_configured.sign == 0
    assert found.carrying == [(7, 0), (7, 1)] and found.against == []


def test_many_heads_of_noise_carry_nothing():
    """200 heads: without widening, ten would seem to."""
    rng = np.random.default_rng(4)
    effects = rng.normal(size=(30, 6))
    records = [record(i, effect, {"abc": effect}, rng.normal(size=(200, 1))) for i, effect in enumerate(effects)]
    found = map_heads(records, [0], 0)
    assert len(found.carrying) + len(found.against) <= 1


def test_the_page_escapes_what_came_from_data():
    records = noise(np.random.default_rng(5), count=10)
    for one in records:
        one |= {"prompt": "<script>alert(1)</script>", "tokens": ["<em>"] + one["tokens"][1:]}
    pictures = dict.fromkeys(("agreement", "curves", "heads", "shares"), b"png")
    page = render(records, summarise(records), background(records), ["<i>"], {"model": "<u>"}, pictures, "<a>")
    for tag in ("<script>", "<em>", "<i>", "<u>", "<a>"):
        assert tag not in page
    assert "&lt;script&gt;" in page
