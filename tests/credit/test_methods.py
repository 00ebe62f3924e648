"""Prefix, gradient and the options: literals worked by hand."""

import math

import pytest
import torch

from abc_plugin.credit.methods import ABC, ABC_SIGNED, GRAD_INPUT, PREFIX, UNIFORM, Evidence
from abc_plugin.credit.metrics import mean_disagreement, negative_share
from abc_plugin.credit.redistribute import mix
from abc_plugin.credit.shaping import disagreement, dropped, entropy, pooled, shape, slope, with_entropy, without


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


# Prompt of two tokens and three actions; two action spans; one action; none.
MASK = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0] * 5])
REWARD = torch.tensor([2.0, -1.0, 5.0, 7.0])
IDS = torch.zeros(4, 6, dtype=torch.long)


def test_prefix_by_hand():
    phi = tensor([9.0, 1.0, 0.5, 1.5, 9.0], [0.25, 9.0, 9.0, -0.5, 0.0], [0.0, 3.0, 4.0, 0.0, 0.0], [1.0] * 5)
    credit = PREFIX.credit(Evidence(IDS, MASK, prefix_BA=phi), REWARD)
    # 1, 0.5 - 1, 2 - 0.5; 0.25, -0.5 - 0.25 over the other side's turn, -1 + 0.5; one action: 5; nothing.
    expected = tensor([0, 1.0, -0.5, 1.5, 0], [0.25, 0, 0, -0.75, -0.5], [0, 0, 5.0, 0, 0], [0] * 5)
    assert torch.equal(credit, expected)
    assert negative_share(credit).tolist() == pytest.approx([0.5 / 3.0, 1.25 / 1.5, 0.0, 0.0])


def test_slope_by_hand():
    """S without the last action: 1.5 - 0.25, 0.5 - 1, 0; the row without actions does not count."""
    contribution = tensor([9.0, 1.5, -0.25, 7.0, 9.0], [0.5, 9.0, 9.0, -1.0, 7.0], [3.0] * 5, [1.0] * 5)
    evidence = Evidence(IDS, MASK, contribution_BA=contribution)
    # mean S = 0.25: deviations 1, -0.75, -0.25; squares sum to 1.625; with the rewards 2, -1, 5: 2 + 0.75 - 1.25.
    assert slope([evidence], REWARD) == pytest.approx(1.5 / 1.625)
    assert slope([evidence, evidence], torch.cat([REWARD, REWARD])) == pytest.approx(1.5 / 1.625)
    assert slope([evidence], -REWARD) == 0.0
    still = Evidence(IDS, MASK, contribution_BA=torch.zeros(4, 5))
    assert slope([still], REWARD) == 1.0
    assert slope([Evidence(IDS, torch.zeros_like(MASK), contribution_BA=contribution)], REWARD) == 1.0


def test_prefix_reads_the_actions_but_the_last():
    phi = torch.randn(4, 5)
    acts_later = MASK.flip(1).cumsum(1).flip(1) > MASK
    noisy = torch.where(MASK.bool() & acts_later, phi, 100.0)
    credits = [PREFIX.credit(Evidence(IDS, MASK, prefix_BA=x), REWARD) for x in (phi, noisy)]
    torch.testing.assert_close(*credits)


def test_gradient_by_hand():
    gradient = tensor([9.0, 3.0, -1.0, 0.0, 9.0], [1.0, 9.0, 9.0, 2.0, -1.0], [0] * 5, [1] * 5)
    credit = GRAD_INPUT.credit(Evidence(IDS, MASK, gradient_BA=gradient), REWARD)
    # |2| * [.75, -.25, 0] leaves 2 - 1 = 1, a third each; |-1| * [.25, .5, -.25] leaves -1 - .5 = -1.5, -.5 each.
    third = 1 / 3
    expected = tensor([0, 1.5 + third, -0.5 + third, third, 0], [-0.25, 0, 0, 0.0, -0.75], [0, 0, 5.0, 0, 0], [0] * 5)
    torch.testing.assert_close(credit, expected)


def test_gradients_that_cancel_are_no_division_by_zero():
    gradient = tensor([0.0, 1.0, -1.0, 1e-20, 0.0])
    credit = GRAD_INPUT.credit(Evidence(IDS[:1], MASK[:1], gradient_BA=gradient), REWARD[:1])
    torch.testing.assert_close(credit, tensor([0, 1 + 2 / 3, -1 + 2 / 3, 2 / 3, 0]))


def test_contribution_by_hand():
    contribution = tensor([9.0, 1.5, -0.25, 7.0, 9.0], [0.5, 9.0, 9.0, -1.0, 7.0], [3.0] * 5, [1.0] * 5)
    credit = ABC_SIGNED.credit(Evidence(IDS, MASK, contribution_BA=contribution), REWARD)
    # 2 - 1.5 + 0.25 on the last action; -1 - 0.5 + 1, over the other side's turn; one action has all; nothing.
    expected = tensor([0, 1.5, -0.25, 0.75, 0], [0.5, 0, 0, -1.0, -0.5], [0, 0, 5.0, 0, 0], [0] * 5)
    assert torch.equal(credit, expected)
    shaped = shape(ABC_SIGNED, [Evidence(IDS, MASK, contribution_BA=contribution)], REWARD, beta=0.5)
    assert torch.equal(shaped.reward_BA[0], torch.tensor([0, 0.75, -0.125, 1.375, 0]))


def test_a_reward_that_was_divided_by_hand():
    """The group's deviation is .5: credit doubles, and the rest of the divided reward lies on the last action."""
    contribution = tensor([9.0, 1.5, -0.25, 7.0, 9.0], [0.5, 9.0, 9.0, -1.0, 7.0], [3.0] * 5, [1.0] * 5)
    evidence, deviation = Evidence(IDS, MASK, contribution_BA=contribution), torch.tensor([0.5, 0.5, 0.5, 1e-9])
    shaped = shape(ABC_SIGNED, [evidence], REWARD, beta=1.0, deviation_B=deviation)
    # 2 - 3 + .5; -1 - 1 + 2; one action has all; nothing.
    expected = tensor([0, 3.0, -0.5, -0.5, 0], [1.0, 0, 0, -2.0, 0.0], [0, 0, 5.0, 0, 0], [0] * 5)
    assert torch.equal(shaped.reward_BA, expected)
    # |(1.5, -.25)| is 1.52, a twentieth of it .076: below, the group is taken to be all the same.
    for near, dense in ((0.08, 1.5 / 0.08), (0.07, 0.0)):
        shaped = shape(ABC_SIGNED, [evidence], REWARD, beta=1.0, deviation_B=torch.full((4,), near))
        assert shaped.reward_BA[0, 1].item() == pytest.approx(dense)
        assert shaped.reward_BA[0].sum().item() == pytest.approx(2.0)


def test_dropped_tokens_by_hand():
    special = torch.tensor([[1, 1, 0, 0, 0], [0] * 5, [0] * 5, [0] * 5]).bool()
    assert dropped(frozenset(), MASK, special) is None
    assert dropped({"special"}, MASK, special)[0].tolist() == [True, True, False, False, False]
    both = dropped({"special", "sinks"}, MASK, special)
    assert both[:3].int().tolist() == [[1, 1, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]
    kept = MASK.bool() & ~both
    weight = tensor([0, 0.5, 0.3, 0.2, 0], [0.2, 0, 0, 0.2, 0.6], [0, 0, 1.0, 0, 0], [0] * 5)
    # The second keeps .2 and .2; the third has nothing else to give its share to; the fourth nothing at all.
    expected = tensor([0, 0, 1.0, 0, 0], [0.5, 0, 0, 0.5, 0], [0, 0, 1.0, 0, 0], [0] * 5)
    torch.testing.assert_close(without(weight, kept), expected)
    lonely = tensor([0, 1.0, 0.0, 0.0, 0])
    torch.testing.assert_close(without(lonely, tensor([0, 0, 1, 1, 0]).bool()), tensor([0, 0, 0.5, 0.5, 0]))


def test_entropy_floor_by_hand():
    weight, kept = tensor([1.0, 0.0], [0.6, 0.4]), torch.ones(2, 2, dtype=torch.bool)
    assert torch.equal(with_entropy(weight, kept, 0.0), weight)
    torch.testing.assert_close(with_entropy(weight, kept, 1.0), tensor([0.5, 0.5], [0.5, 0.5]))
    # A share p with -p ln p - (1-p) ln(1-p) = ln 2 / 2 is 0.110028; the second row has more entropy already.
    mixed = with_entropy(weight, kept, 0.5)
    torch.testing.assert_close(mixed, tensor([1 - 0.1100279, 0.1100279], [0.6, 0.4]))
    assert entropy(mixed)[0].item() == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_pooled_by_hand():
    credit = tensor([0, 1.0, -0.5, 1.5, 0], [0.25, 0, 0, -0.75, -0.5])
    ends = torch.tensor([[0, 0, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()  # one off the actions: does not count
    expected = tensor([0, 0, 0.5, 1.5, 0], [0.25, 0, 0, 0, -1.25])
    assert torch.equal(pooled(credit, MASK[:2], ends), expected)
    none = torch.zeros_like(ends)
    assert torch.equal(pooled(credit, MASK[:2], none), tensor([0, 0, 0, 2.0, 0], [0, 0, 0, 0, -1.0]))


def test_pooling_a_causal_method_keeps_it_causal():
    """A token's credit, and where a segment ends, know nothing of later tokens: so neither does the pooled credit."""
    phi, mask = torch.randn(1, 8), torch.ones(1, 8, dtype=torch.long)
    ends = torch.tensor([[0, 0, 1, 0, 1, 0, 0, 1]]).bool()
    other = phi.clone()
    other[0, 5:] = torch.randn(3)
    one, two = (pooled(PREFIX.credit(Evidence(IDS, mask, prefix_BA=x), REWARD[:1]), mask, ends) for x in (phi, other))
    assert torch.equal(one[:, :5], two[:, :5])


def test_mix_by_hand():
    credit = tensor([0, 1.0, -0.5, 1.5, 0], [0.25, 0, 0, -0.75, -0.5], [0, 0, 5.0, 0, 0], [0] * 5)
    shaped = mix(REWARD, credit, MASK, 0.5)
    # half of each, and half of 2, -1, 5 on the last action.
    expected = tensor([0, 0.5, -0.25, 0.75 + 1, 0], [0.125, 0, 0, -0.375, -0.25 - 0.5], [0, 0, 5.0, 0, 0], [0] * 5)
    assert torch.equal(shaped, expected)
    beta = tensor([1, 0.0, 1.0, 1.0, 1], [1] * 5, [0] * 5, [1] * 5)
    shaped = mix(REWARD, credit, MASK, beta)
    assert shaped[0].tolist() == [0, 0, -0.5, 2.5, 0]  # the freed 1.0 is on the last action
    assert shaped[2].tolist() == [0, 0, 5.0, 0, 0]


@pytest.mark.parametrize(
    ("credit", "message"),
    [
        (torch.ones(4, 4), "credit has shape"),
        (torch.ones(4, 5), "not zero outside the response"),
        (MASK * math.nan, "NaN"),
        (MASK * 1.0, "row 2 is off by|row 0 is off by|row 1 is off by"),
    ],
)
def test_mix_refuses(credit, message):
    with pytest.raises(ValueError, match=message):
        mix(REWARD, credit, MASK, 0.5)


def test_disagreement_by_hand():
    # Mean size 1.5, deviation .5; 1.25 and .25; only one; 0 and -.5.
    first, second = tensor([2.0, 1.0, 1.0, 0.0], [1.0, 0, 0, 1.0]), tensor([1.0, 1.5, 0.0, -0.5], [1.0, 0, 0, 1.0])
    apart = disagreement([first, second])
    expected = [1 / 3, 0.2, 1.0, 1.0]
    torch.testing.assert_close(apart, tensor(expected, [0.0] * 4))
    assert torch.equal(disagreement([first]), torch.zeros(2, 4))
    assert (disagreement([first, second, -first, 9 * second]) <= 1).all()


def test_an_ensemble_by_hand():
    """Two models' attention on two actions, 1:3 and 3:1 within the response: mean uniform, disagreement 0.5."""
    mask, reward = torch.ones(1, 2, dtype=torch.long), torch.tensor([4.0])
    members = [Evidence(IDS[:1, :3], mask, attention_BA=tensor(row)) for row in ([0.1, 0.3], [0.6, 0.2])]
    shaped = shape(ABC, members, reward, beta=0.8)
    torch.testing.assert_close(shaped.share_BA, tensor([0.5, 0.5]))
    torch.testing.assert_close(shaped.disagreement_BA, tensor([0.5, 0.5]))
    torch.testing.assert_close(shaped.reward_BA, tensor([0.8 * 0.5 * 2.0, 4.0 - 0.8]))
    torch.testing.assert_close(mean_disagreement(shaped.disagreement_BA, shaped.share_BA), torch.tensor([0.5]))
    agreeing = shape(ABC, [members[0], members[0]], reward, beta=0.8)
    torch.testing.assert_close(agreeing.reward_BA, shape(ABC, members[:1], reward, beta=0.8).reward_BA)


def test_uniform_without_special_tokens():
    special = torch.tensor([[0, 0, 0, 1, 0]] * 4).bool()
    shaped = shape(UNIFORM, [Evidence(IDS, MASK)], REWARD, beta=1.0, dropped_BA=special)
    torch.testing.assert_close(shaped.reward_BA[0], torch.tensor([0, 1.0, 1.0, 0, 0]))
