"""Statistics, the choice of layers and heads, and the advice: by hand, against scipy, and on audits of noise."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import assert_snapshot

from abc_plugin.config import ShapingConfig
from abc_plugin.credit.methods import load
from abc_plugin.tools.audit.advice import Advice, advise, closing, verdict
from abc_plugin.tools.audit.audit_outputs import Outcome, render
from abc_plugin.tools.audit.completion_measures import curves, recency_credit
from abc_plugin.tools.audit.correlations import (
    Interval,
    interval,
    intervals,
    spearman,
)
from abc_plugin.tools.audit.head_map import halves, map_heads
from abc_plugin.tools.audit.summary_table import (
    LEAVE_ONE_OUT,
    RANDOM,
    RECENCY,
    gain,
    statistics,
    summarise,
    tabulate,
)

NAN = math.nan
METHODS = {name: load(name) for name in ("abc", "abc_signed", "prefix", "uniform")}
numbers = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 2)), min_size=3, max_size=30)


def test_correlations_by_hand():
    assert spearman([10, 20, 30], [1, 2, 400]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [1, 1, 2, 0]) == pytest.approx(-0.316227766)  # ranks 1 2 3 4 and 2.5 2.5 4 1
    for undefined in (spearman([1, 1, 1], [1, 2, 3]), spearman([1, 2], [2, 1]), spearman([], [])):
        assert math.isnan(undefined)


@given(numbers, st.randoms())
@settings(deadline=None, max_examples=50)
def test_correlations_agree_with_scipy(x, random):
    y = [value + random.choice([-1.0, 0.0, 1.0, 50.0]) for value in x]
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert math.isnan(spearman(x, y))
        return
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-9)


def test_interval_by_hand_and_over_prompts():
    """Mean 2, s = 1, n = 3: 2 ± 4.302653 / sqrt 3."""
    for estimate in (
        interval(pd.Series([1, 2, 3], list("abc"))),
        interval(pd.Series([0, 2, NAN, 2, 3, 3, 3], list("aaabccc"))),  # the means of the prompts are 1, 2, 3
    ):
        assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((2.0, 2 - 2.4841377, 2 + 2.4841377))
        assert estimate.n == 3
    assert interval(pd.Series([1.0, NAN], list("ab"))) is None and interval(pd.Series([1.0, 2.0], list("aa"))) is None
    assert interval(pd.Series([1, 2, 3], list("abc")), level=0.9).high == pytest.approx(2 + 2.9199856 / math.sqrt(3))


def test_differences_are_paired():
    tables = {
        "a": pd.DataFrame({"s": [1.0, NAN, 3.0, 5.0]}, list("pqrr")),
        "b": pd.DataFrame({"s": [0.5, 1, 1, 3]}, list("pqrr")),
    }
    estimate = gain(tables, "a", "b", ["s"])["s"]
    assert (estimate.mean, estimate.n) == ((0.5 + 2) / 2, 2)


def record(number, effect, credit, heads=None, baselines=True):
    """A completion whose score is 1 plus the effects of its tokens, which are removed without side effects."""
    effect, tokens = np.asarray(effect, dtype=float), len(effect)
    credit = {name: torch.as_tensor(values, dtype=torch.float64) for name, values in credit.items()}
    if baselines:
        credit |= {RECENCY: recency_credit(tokens, 1.0), LEAVE_ONE_OUT: torch.as_tensor(effect)}
    # Ids are positions, so that the score is a function of what is left.
    model = SimpleNamespace(scores=lambda many: [1.0 + sum(effect[i] for i in ids if i >= 0) for ids in many])
    completion, pieces = SimpleNamespace(prompt_ids=[-1], row=number), [[i] for i in range(tokens)]
    heads = [0.0] if heads is None else [float(head) for head in heads]
    return {
        "row": number,
        "prompt": f"prompt {number}",
        "tokens": [f" t{i}" for i in range(tokens)],
        "reward": 1.0 + float(effect.sum()),
        "empty": 1.0,
        "effect": effect.tolist(),
        "credit": {name: values.tolist() for name, values in credit.items()},
        "curves": curves(model, completion, pieces, credit, 1.0 + float(effect.sum()), 1.0),
        "layers": [float(np.mean(heads))],
        "heads": [heads],
        "configured": float(heads[-1]),
    }


def noise(rng, count=16, tokens=12):
    """Effects, random credit under both names: nothing knows anything."""
    return [
        record(i, rng.normal(size=tokens), {"abc": rng.exponential(size=tokens), RANDOM: rng.exponential(size=tokens)})
        for i in range(count)
    ]


def advice(records, read=None, **shaping):
    tables = tabulate(records)
    head_map = map_heads(records, [7], 0, read)
    return advise(summarise(tables), tables, head_map, METHODS, ShapingConfig(**shaping), "my model")


def test_areas_by_hand():
    credit = [3.0, -1.0, 0.0, 0.0]
    one = record(1, [1.0, 2.0, 0.0, 0.0], {"abc": credit})
    # removed after each tenth of 4 tokens: 0 0 1 1 2 2 2 3 3 4 4; leave-one-out removes 2, then 1
    highest = [4, 4, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    lowest = [4, 4, 4, 4, 4, 4, 4, 3, 3, 1, 1]
    assert one["curves"][LEAVE_ONE_OUT] == {"highest": highest, "lowest": lowest}
    areas = statistics(one, LEAVE_ONE_OUT)
    assert areas["deletion"] == pytest.approx((sum(highest) - 2.5) / 10)
    assert areas["insertion"] == pytest.approx((sum(lowest) - 2.5) / 10)
    assert areas["separation"] == pytest.approx((sum(lowest) - sum(highest)) / 10)


def test_noise_is_seldom_called_better():
    """Both intervals lie above 0 in at most 2.5 % of audits: at most 2 of these 80 expected."""
    rng, verdicts = np.random.default_rng(0), []
    for _ in range(80):
        draws = zip(rng.normal(size=(16, 12)), rng.exponential(size=(16, 12)), strict=True)
        records = [record(i, effect, {"abc": credit}, baselines=False) for i, (effect, credit) in enumerate(draws)]
        verdicts.append(verdict(intervals(tabulate(records)["abc"])))
    assert verdicts.count("better") <= 5 and verdicts.count("worse") <= 5
    assert verdicts.count("no better") >= 60


UP, DOWN, NONE = Interval(0.5, 0.4, 0.6, 20), Interval(-0.5, -0.6, -0.4, 20), Interval(0.0, -0.1, 0.1, 20)


@pytest.mark.parametrize(
    ("spearman", "separation", "expected"),
    [
        (UP, UP, "better"),
        (DOWN, DOWN, "worse"),
        (NONE, NONE, "no better"),
        (UP, NONE, "open"),
        (NONE, DOWN, "no better"),
        (UP, DOWN, "open"),
        (DOWN, UP, "open"),
        (None, NONE, "no better"),
    ],
)
def test_the_verdict_follows_the_intervals(spearman, separation, expected):
    assert verdict({"spearman": spearman, "separation": separation}) == expected


def follows(rng, effects, swapped=False):
    """Credit like ``effects``, with the largest and the smallest swapped: curves suffer most."""
    credit = np.array(effects) + rng.normal(scale=0.3, size=np.shape(effects))
    for effect, own in zip(effects, credit, strict=True):
        own[[effect.argmax(), effect.argmin()]] += np.array([-80.0, 80.0]) * swapped
    return credit


def test_the_advice():
    """Each verdict, recency, other methods, mixed and undefined measures, lengths, heads: see the snapshot."""
    rng, count, tokens = np.random.default_rng(8), 24, 20
    chance, even = rng.random((count, tokens)), np.ones((count, tokens))
    effects = rng.normal(size=(count, tokens))
    # Of like size but for two large ones: ``torn`` has those two wrong and all others right.
    extreme = [rng.permutation(np.r_[np.linspace(-1, 1, 18), 40.0, -40.0]) for _ in range(count)]
    close, torn = follows(rng, effects), follows(rng, extreme, swapped=True)
    late = np.arange(1, tokens + 1) * rng.uniform(0, 2, size=(count, tokens))
    other = rng.random((count, tokens))
    credit_cases = {
        "abc follows the effects": (effects, {"abc": close}),
        "abc runs against them": (effects, {"abc": -close}),
        "abc knows nothing, prefix does": (effects, {"abc": other, "prefix": close}),
        "abc finds sizes only": (effects, {"abc": np.abs(effects)}),
        "the measures of abc contradict each other": (extreme, {"abc": torn}),
        "those of prefix do, abc knows nothing": (extreme, {"abc": other, "prefix": torn}),
        "those of prefix do, abc is right": (extreme, {"abc": follows(rng, extreme), "prefix": torn}),
        "abc knows only how late a token comes": (late, {"abc": np.arange(20) + rng.normal(size=(count, 20))}),
        "late tokens matter and abc follows them": (late, {"abc": late}),
        "abc orders no tokens": (effects, {"abc": even, "prefix": close}),
        "prefix orders no tokens, nor does random": (effects, {"abc": close, "prefix": even, RANDOM: even}),
        "without abc": (effects, {"prefix": close, "uniform": even}),
    }
    two = rng.normal([0.5, -0.5], 0.05, size=(count, 2))
    halved = [[NAN] if i % 2 else [0.1] for i in range(count)]  # defined where a head is chosen, not on the rest
    head_cases = {
        "one head of two is good, both are read": (two, None),
        "the good one is read": (two, [0]),
        "the bad one is read": (two, [1]),
        "many heads follow": (rng.normal(0.5, 0.05, size=(count, 6)), None),
        "undefined": ([[NAN]] * count, None),
        "undefined where they are reported": (halved, None),
        "one of two is undefined": ([[0.1, NAN]] * count, None),
    }
    text, given = "", {}
    for name, (sizes, credit) in credit_cases.items():
        credit = {**credit, RANDOM: credit.get(RANDOM, chance)}
        records = [record(i, sizes[i], {key: values[i] for key, values in credit.items()}) for i in range(count)]
        given[name] = advice(records)
        lines = [line for line in given[name].sentences if not line.startswith(("Layer", "Of"))]
        text += "\n".join([f"# {name}", *lines, *closing({None: given[name]}), "", ""])
    names = {16: "without abc", 64: "abc knows nothing, prefix does", 256: "abc finds sizes only"}
    of_lengths = {length: given[name] for length, name in names.items()}
    text += "\n".join(["# three lengths", *closing(of_lengths), "", ""])
    for name, (heads, read) in head_cases.items():
        records = [record(i, effects[i], {"abc": close[i], RANDOM: chance[i]}, heads[i]) for i in range(count)]
        lines = [line for line in advice(records, read).sentences if line.startswith(("Layer", "Of"))]
        text += "\n".join([f"# heads: {name}", *lines, "", ""])
    assert "None" not in text and "nan" not in text
    assert_snapshot(text, "audit_advice.txt")


def test_the_command_has_the_settings_that_the_method_uses():
    rng = np.random.default_rng(8)
    effects = rng.normal(size=(24, 20))
    given = {"layer": "3", "heads": "0,1", "drop": "sinks"}
    commands = {}
    for name in ("abc", "abc_signed", "prefix"):
        credit = [{name: effect, RANDOM: rng.random(20)} for effect in effects]
        records = [record(i, effect, own) for i, (effect, own) in enumerate(zip(effects, credit, strict=True))]
        commands[name] = advice(records, **given).command.partition(" --reward_shaping ")[2]
    assert commands == {
        "abc": "abc --shaping.layer 3 --shaping.heads 0,1 --shaping.drop sinks",
        "abc_signed": "abc_signed --shaping.layer 3 --shaping.beta 1",
        "prefix": "prefix",
    }


def test_halves_are_of_prompts():
    assert halves(pd.Index(list("aabbcda"))).nonzero()[0].tolist() == [0, 1, 4, 6]


def test_what_was_chosen_by_luck_is_not_reported_as_luck():
    """Head 0 follows the removals only on the half it is chosen on, head 1 a little on both."""
    rng, records = np.random.default_rng(2), []
    for i in range(40):
        heads = rng.normal([0.0 if i % 2 else 0.9, 0.3, 0.0], 0.05)
        records.append(record(i, rng.normal(size=6), {"abc": rng.random(6), RANDOM: rng.random(6)}, heads))
    head_map = map_heads(records, [7], 0)
    assert head_map.head.layer == 7 and head_map.head.heads == [0]
    assert abs(head_map.head.reported.mean) < 0.05 and head_map.head.over_configured.sign == 0
    assert head_map.carrying == [(7, 0), (7, 1)] and head_map.against == []


def test_many_heads_of_noise_carry_nothing():
    """200 heads: without widening, ten would seem to."""
    rng = np.random.default_rng(4)
    effects = rng.normal(size=(30, 6))
    records = [record(i, effect, {"abc": effect}, rng.normal(size=200)) for i, effect in enumerate(effects)]
    head_map = map_heads(records, [0], 0)
    assert len(head_map.carrying) + len(head_map.against) <= 1


def test_the_page_escapes_what_came_from_data():
    records = noise(np.random.default_rng(5), count=10)
    for one in records:
        one |= {"prompt": "<script>alert(1)</script>", "tokens": ["<em>"] + one["tokens"][1:]}
    pngs = dict.fromkeys(("agreement", "curves", "heads"), b"png")
    outcome = Outcome(
        records, summarise(tabulate(records)), None, Advice(["<i>"], "<x-command>", "<x-why>"), {"model": "<u>"}
    )
    page = render(outcome, pngs, "<a>")
    for tag in ("<script>", "<em>", "<i>", "<x-command>", "<x-why>", "<u>", "<a>"):
        assert tag not in page
    assert "&lt;script&gt;" in page
