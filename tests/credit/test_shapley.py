"""Shapley values against the definition by brute force, and what they promise at any budget."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abc_plugin.credit.shapley import plan, segments, shapley_values

# Of segments of two tokens each; "both" is worth something only with 0 and 2 together.
ADDITIVE = lambda held: 1.0 * (0 in held) - 2.5 * (1 in held) + 0.5 * (2 in held)  # noqa: E731
JOINT = lambda held: 3.0 * ({0, 2} <= held) - 1.0 * (1 in held and 2 not in held) + 0.25 * len(held) ** 2  # noqa: E731


def brute_force(value, count):
    """The mean over all orders, by the definition."""
    phi, orders = [0.0] * count, list(permutations(range(count)))
    for order in orders:
        for place, k in enumerate(order):
            phi[k] += (value(set(order[: place + 1])) - value(set(order[:place]))) / len(orders)
    return phi


def scored(value, segment_BA, counted=None, prompt=0.5):
    """The score of a toy: ``value`` of the segments whose first token is left, and what the prompt scores."""

    def score(kept_BA):
        if counted is not None:
            counted.append(1)
        held = [set(row[kept & (row >= 0)].tolist()) for row, kept in zip(segment_BA, kept_BA, strict=True)]
        return torch.tensor([prompt + value(one) for one in held])

    return score


@pytest.mark.parametrize("value", [ADDITIVE, JOINT])
def test_three_segments_are_exact(value):
    segment = torch.tensor([[-1, 0, 0, -1, 1, 1, 2, 2, -1]])
    score, counted = scored(value, segment), []
    whole = score(torch.ones_like(segment).bool())
    out = shapley_values(scored(value, segment, counted), whole, segment, 7, [0])
    expected = torch.zeros(1, 9)
    expected[0, [2, 5, 7]] = torch.tensor(brute_force(value, 3))
    torch.testing.assert_close(out, expected)
    assert len(counted) == 7


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 40), calls=st.integers(2, 40), seed=st.integers(0, 99))
def test_values_add_up_to_what_the_response_adds_to_the_prompt(length, calls, seed):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, length, generator=rng) < 0.7
    segment = segments(None, mask, calls)
    assert int(segment.max()) + 1 <= max(2, (calls + 1) // 2)
    pairs = torch.randn(40, 40, generator=rng)
    value = lambda held: float(sum(pairs[i, j] for i in held for j in held))  # noqa: E731
    score = scored(value, segment)
    whole, empty = score(torch.ones_like(mask)), score(~mask)
    out = shapley_values(score, whole, segment, calls, [seed] * 3)
    torch.testing.assert_close(out.sum(1), whole - empty, atol=1e-4, rtol=1e-5)
    assert (out[~mask] == 0).all()


@pytest.mark.parametrize(("count", "calls"), [(2, 2), (8, 16), (8, 15), (20, 39), (4, 15), (1, 2), (0, 2)])
def test_the_calls_are_bounded_and_the_first_part_is_the_whole(count, calls):
    parts, weight = plan(count, calls, seed=3)
    assert len(parts) - 1 <= calls and weight.shape == (count, len(parts))
    assert parts[0].all() and len({tuple(part) for part in parts.tolist()}) == len(parts)


def test_sampling_nears_the_exact_values_and_pairs_of_orders_are_exact_for_pairs():
    """Where only pairs of segments act together, an order and its reverse average to the truth."""
    segment = torch.arange(6)[None]
    value = lambda held: float(sum((i + 1) * (j - 2) for i in held for j in held))  # noqa: E731
    score = scored(value, segment)
    out = shapley_values(score, score(torch.ones(1, 6).bool()), segment, 11, [5])  # 1 + 2·5: one pair
    torch.testing.assert_close(out[0], torch.tensor(brute_force(value, 6)))


def test_segments_by_hand():
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0], [0] * 7])
    ends = torch.tensor([[0, 0, 1, 0, 1, 1, 0], [0] * 7, [1] * 7]).bool()  # one off the actions: does not count
    assert segments(ends, mask, 9).tolist() == [[-1, 0, 0, 1, -1, 1, 2], [-1, 0] + [-1] * 5, [-1] * 7]
    assert segments(None, mask, 5)[0].tolist() == [-1, 0, 0, 1, -1, 1, 2]  # five tokens in three, evenly
    assert segments(None, mask, 2)[0].tolist() == [-1, 0, 0, 0, -1, 1, 1]
