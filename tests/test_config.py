"""Flags: one home of defaults, refused values, and what is left for the host's parser."""

import dataclasses

import pytest

from abc_plugin.config import ShapingConfig, split_flags
from abc_plugin.errors import UserError


def test_defaults_and_what_is_left_for_the_host():
    shaping, rest = split_flags(
        ["--reward_shaping", "abc", "--train.seed", "3", "--shaping.beta=0.5", "--ds.zero_stage", "2"]
    )
    assert shaping == ShapingConfig(method="abc", beta=0.5, layer="last_full")
    assert rest == ["--train.seed", "3", "--ds.zero_stage", "2"]
    assert split_flags([]) == (ShapingConfig("none", 0.8, "last_full"), [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shaping.calls", "1"], "--shaping.calls 1: Shapley values need the scores .*give at least 2"),
        (["--shaping.beta", "1.5"], r"--shaping.beta 1.5 is outside \[0, 1\]"),
        (["--shaping.beta", "nan"], "--shaping.beta nan is outside"),
        (["--shaping.beta", "half"], "invalid float value: 'half'"),
        (["--shaping.show_every", "-1"], "--shaping.show_every -1, --shaping.show_samples 4: give 0"),
        (["--shaping.show_samples", "0"], "--shaping.show_samples 0: give 0 .never. or more, and at least 1"),
        (["--shaping.layer", "middle"], "--shaping.layer 'middle' is neither"),
        (["--shaping.layer=--1"], "--shaping.layer '--1' is neither"),
        (
            ["--shaping.bta", "0.5"],
            "unknown flag --shaping.bta; the plugin's flags are --reward_shaping, --shaping.beta",
        ),
        (["--shaping.heads", "0,b"], "--shaping.heads '0,b' is neither all nor a list"),
        (["--shaping.drop", "special,sink"], "--shaping.drop 'sink' is none of special, sinks"),
        (["--shaping.entropy_floor", "2"], r"--shaping.entropy_floor 2.0 is outside \[0, 1\]"),
        (["--shaping.segment", "word"], "--shaping.segment 'word' is none of none, sentence, turn"),
        (["--reward_shapin=abc"], None),
        (["--reward_shaping"], "expected one argument"),
    ],
)
def test_bad_flags(words, message):
    if message is None:  # not ours by name: the host's parser refuses it
        assert split_flags(words)[1] == words
        return
    with pytest.raises(UserError, match=message) as error:
        split_flags(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("method", "beta", "dense"), [("none", 0.8, False), ("abc", 0.0, False), ("abc", 0.1, True)])
def test_dense(method, beta, dense):
    assert ShapingConfig(method, beta).dense is dense


def test_lists_of_heads_and_kinds():
    given = ShapingConfig("abc", heads="5,0,5", drop="special,sinks")
    assert given.head_list == [0, 5] and given.dropped == {"special", "sinks"}
    assert ShapingConfig().head_list is None and ShapingConfig().dropped == frozenset()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ShapingConfig().beta = 0.1
