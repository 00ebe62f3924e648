"""The method: literals worked by hand, then properties over random batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abc_plugin.credit import methods
from abc_plugin.credit.metrics import credit_metrics
from abc_plugin.credit.redistribute import last_action, redistribute, response_weights, uniform_weights
from abc_plugin.errors import UserError


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


# Prompt of two tokens, three actions, one padded position; then two action spans; then an empty response.
MASK = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
ATTENTION = tensor([0.5, 0.1, 0.3, 0.1, 0.0], [0.2, 0.3, 0.1, 0.0, 0.2], [0.25, 0.25, 0.25, 0.25, 0.0])


def test_response_weights_by_hand():
    weights = response_weights(ATTENTION, MASK)
    expected = tensor([0, 0.2, 0.6, 0.2, 0], [0.5, 0, 0, 0, 0.5], [0, 0, 0, 0, 0])
    torch.testing.assert_close(weights, expected)


def test_last_action_and_uniform_by_hand():
    assert last_action(MASK).tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    third = 1 / 3
    torch.testing.assert_close(
        uniform_weights(MASK), tensor([0, third, third, third, 0], [third, 0, 0, third, third], [0] * 5)
    )


def test_redistribute_by_hand_is_equation_8():
    weights = response_weights(ATTENTION, MASK)
    shaped = redistribute(torch.tensor([2.0, -1.0, 5.0]), weights, MASK, beta=0.8)
    # 0.8 * 2 * [.2, .6, .2] + 0.2 * 2 on the last action; 0.8 * -1 * [.5, 0, .5] + 0.2 * -1; nothing to act on: zero.
    expected = tensor([0, 0.32, 0.96, 0.32 + 0.4, 0], [-0.4, 0, 0, 0, -0.4 - 0.2], [0] * 5)
    torch.testing.assert_close(shaped, expected)


def test_a_row_without_attention_on_the_response_is_uniform_over_it():
    attention = tensor([0.9, 0.0, 0.0, 0.0, 0.1])
    torch.testing.assert_close(response_weights(attention, MASK[:1]), uniform_weights(MASK[:1]))
    tiny = tensor([1.0, 1e-38, 3e-38, 0.0, 0.0])  # small but usable: not uniform
    torch.testing.assert_close(response_weights(tiny, MASK[:1]), tensor([0, 0.25, 0.75, 0, 0]), rtol=1e-3, atol=0)


def test_beta_zero_is_the_sparse_reward_bit_for_bit():
    reward = torch.tensor([0.3, -7.1, 5.0])
    sparse = last_action(MASK) * reward[:, None]
    for weights in (response_weights(ATTENTION, MASK), uniform_weights(MASK)):
        assert torch.equal(redistribute(reward, weights, MASK, beta=0.0), sparse)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("none", [[0, 0, 0, 1.0, 0]]),
        ("uniform", [[0, 1 / 3, 1 / 3, 1 / 3, 0]]),
        ("abc", [[0, 0.2, 0.6, 0.2, 0]]),
    ],
)
def test_registered_methods(name, weights):
    evidence = methods.Evidence(torch.zeros(1, 6), MASK[:1], ATTENTION[:1])
    method = methods.load(name)
    torch.testing.assert_close(method.weights(evidence), torch.tensor(weights))
    assert method.needs == ({"attention"} if name == "abc" else set())
    reward = torch.tensor([-2.0])
    torch.testing.assert_close(method.credit(evidence, reward), -2 * torch.tensor(weights))


def test_unknown_method_names_the_registered_ones():
    with pytest.raises(UserError, match=r"'abd' is not registered; registered: abc, abc_d, .*, uniform"):
        methods.load("abd")


def fake_entry_points(monkeypatch, **objects):
    """Registers objects of this module under names, through real EntryPoint objects."""
    from importlib.metadata import EntryPoint, EntryPoints

    points = [
        EntryPoint(name, f"{__name__}:{attr}", methods.GROUP) for name, attrs in objects.items() for attr in attrs
    ]
    monkeypatch.setattr(methods, "entry_points", lambda **match: EntryPoints(points).select(**match))


class FirstToken:
    """A third party's method."""

    needs = frozenset()

    @staticmethod
    def credit(evidence, reward_B):
        return reward_B[:, None] * last_action(evidence.action_mask_BA.flip(1)).flip(1)


class Greedy(FirstToken):
    needs = {"tokens"}


MALFORMED = object()


def test_a_third_party_method_is_loaded_and_collisions_are_errors(monkeypatch):
    entries = {
        "first": ["FirstToken"],
        "greedy": ["Greedy"],
        "bad": ["MALFORMED"],
        "twice": ["FirstToken", "MALFORMED"],
    }
    fake_entry_points(monkeypatch, **entries)
    evidence = methods.Evidence(torch.zeros(1, 6), MASK[:1])
    assert methods.load("first").credit(evidence, torch.tensor([2.0])).tolist() == [[0, 2, 0, 0, 0]]
    with pytest.raises(UserError, match="lacks needs or credit"):
        methods.load("bad")
    with pytest.raises(UserError, match="needs 'tokens', none of attention, prefix"):
        methods.load("greedy")
    with pytest.raises(UserError, match="registered twice"):
        methods.load("twice")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 1.5}, "beta 1.5"),
        ({"beta": math.nan}, "beta nan"),
        ({"reward_B": torch.tensor([1.0, math.nan, 0.0])}, "reward has NaN"),
        ({"reward_B": torch.zeros(2)}, "reward has shape"),
        ({"weight_BA": torch.zeros(3, 4)}, "weight has shape"),
        ({"weight_BA": torch.full((3, 5), 0.2)}, "outside the response"),
        ({"weight_BA": 0.5 * uniform_weights(MASK)}, "row 0 is off by 0.5"),
    ],
)
def test_redistribute_refuses(change, message):
    good = {"reward_B": torch.ones(3), "weight_BA": uniform_weights(MASK), "action_mask_BA": MASK, "beta": 0.8}
    redistribute(**good)
    with pytest.raises(ValueError, match=message):
        redistribute(**good | change)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (ATTENTION[:, :4], r"shape \(3, 4\), expected \(3, 5\)"),
        (ATTENTION.where(ATTENTION != 0.3, math.nan), "NaN"),
        (ATTENTION - 0.2, "negative"),
    ],
)
def test_response_weights_refuses(attention, message):
    with pytest.raises(ValueError, match=message):
        response_weights(attention, MASK)


@st.composite
def batches(draw):
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 33))
    seed = draw(st.integers(0, 2**31))
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=rng) < draw(st.floats(0, 1))
    scale = 10.0 ** draw(st.integers(-30, 3))
    attention = torch.rand(rows, width, generator=rng) * scale
    attention[torch.rand(rows, width, generator=rng) < draw(st.floats(0, 1))] = 0.0
    reward = torch.randn(rows, generator=rng) * 10.0 ** draw(st.integers(-3, 3))
    return reward, attention, mask, draw(st.floats(0, 1))


@settings(max_examples=200, deadline=None)
@given(batches())
def test_every_method_conserves_the_reward_and_stays_on_the_response(batch):
    reward, attention, mask, beta = batch
    kept = torch.where(mask.any(1), reward, 0.0)
    for weights in (last_action(mask), uniform_weights(mask), response_weights(attention, mask)):
        assert (weights >= 0).all()
        assert (weights[~mask] == 0).all()
        shaped = redistribute(reward, weights, mask, beta=beta)
        assert shaped.dtype == torch.float32
        assert (shaped[~mask] == 0).all()
        torch.testing.assert_close(shaped.double().sum(1), kept.double(), rtol=1e-6, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(batches(), st.integers(0, 2**31))
def test_rows_do_not_depend_on_their_batch_or_padding(batch, seed):
    _, attention, mask, _ = batch
    whole = response_weights(attention, mask)
    left = torch.nn.functional.pad(attention, (3, 0), value=0.7), torch.nn.functional.pad(mask, (3, 0))
    assert torch.equal(response_weights(*left)[:, 3:], whole)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(response_weights(attention[order], mask[order]), whole[order])


def test_metrics_by_hand():
    weights = response_weights(ATTENTION, MASK)
    reward = torch.tensor([2.0, -1.0, 5.0])
    shaped = redistribute(reward, weights, MASK, beta=0.5)
    shaped[1, 0] += 0.25
    special = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    metrics = credit_metrics(weights, shaped, reward, MASK, special)
    entropy = -(2 * 0.2 * math.log(0.2) + 0.6 * math.log(0.6))
    torch.testing.assert_close(metrics["credit_entropy"], torch.tensor([entropy, math.log(2), 0.0]))
    torch.testing.assert_close(metrics["credit_last_token"], torch.tensor([0.2, 0.5, 0.0]))
    torch.testing.assert_close(metrics["credit_special_tokens"], torch.tensor([0.2, 0.5, 0.0]))
    torch.testing.assert_close(metrics["credit_conservation_error"], torch.tensor([0.0, 0.25, 0.0]))
