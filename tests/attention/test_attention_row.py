"""Row choice and the maths of one row, against numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from abc_plugin.attention import attention_row as row_module
from abc_plugin.attention.query_positions import (
    first_positions,
    last_unpadded_positions,
    row_positions,
    score_positions,
)


def attention_row(*args, **options):
    return row_module.attention_row(*args, **options).mean(1)


# Two heads, three tokens, width 2. Queries are (2, 7) everywhere and keys (ln x, 0), so that with scaling 0.5 the
# softmax weights are proportional to x: head 0 has 1 : 2 : 5, head 1 has 3 : 1 : 4.
QUERY = torch.tensor([2.0, 7.0]).expand(1, 2, 3, 2)
KEY = torch.tensor([[[1.0, 2.0, 5.0], [3.0, 1.0, 4.0]]]).log()[..., None] * torch.tensor([1.0, 0.0])
LAST = torch.tensor([2])
HIDE_FIRST = torch.tensor([[False, True, True]])
LOWEST = torch.finfo(torch.float32).min
BY_HAND = {
    "last": ({}, [4 / 16, 3 / 16, 9 / 16]),
    "padding": ({"mask": HIDE_FIRST.long()}, [0, 17 / 70, 53 / 70]),
    "bool_mask": ({"mask": HIDE_FIRST.view(1, 1, 1, 3).expand(1, 1, 3, 3)}, [0, 17 / 70, 53 / 70]),
    "additive_mask": ({"mask": torch.tensor([LOWEST, 0.0, 0.0]).expand(1, 1, 3, 3)}, [0, 17 / 70, 53 / 70]),
    "infinite_mask": ({"mask": torch.tensor([-math.inf, 0.0, 0.0]).expand(1, 1, 3, 3)}, [0, 17 / 70, 53 / 70]),
    "bias": ({"mask": torch.tensor([5.0, 2.0, 1.0]).log().expand(1, 1, 3, 3)}, [45 / 84, 16 / 84, 23 / 84]),
    "window": ({"window": 2}, [0, 17 / 70, 53 / 70]),
    "window_over_hole": ({"window": 2, "mask": torch.tensor([[1, 0, 1]])}, [25 / 84, 0, 59 / 84]),
    "sinks": ({"sinks_H": torch.tensor([8.0, 8.0]).log()}, [2 / 16, 1.5 / 16, 4.5 / 16]),
    "sinks_all_masked": ({"sinks_H": torch.zeros(2), "mask": torch.zeros(1, 3)}, [0, 0, 0]),
    "all_masked": ({"mask": torch.zeros(1, 3, dtype=torch.long)}, [0, 0, 0]),
    "all_masked_additive": ({"mask": torch.full((1, 1, 3, 3), LOWEST)}, [0, 0, 0]),
}


@pytest.mark.parametrize(("options", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_row_by_hand(options, expected):
    [row] = attention_row(QUERY, KEY, LAST, scaling=0.5, **options).tolist()
    for got, want in zip(row, expected, strict=True):
        assert got == pytest.approx(want, abs=1e-6)


def test_an_earlier_query_sees_no_later_key_unless_attention_is_bidirectional():
    row = attention_row(QUERY, KEY, torch.tensor([1]), scaling=0.5)
    assert_close(row, torch.tensor([[13 / 24, 11 / 24, 0.0]]))
    both = attention_row(QUERY, KEY, torch.tensor([1]), scaling=0.5, causal=False)
    assert_close(both, torch.tensor([[4 / 16, 3 / 16, 9 / 16]]))


def test_softcap_by_hand():
    weights = [[math.exp(2 * math.tanh(math.log(x) / 2)) for x in head] for head in ((1, 2, 5), (3, 1, 4))]
    expected = [sum(head[s] / sum(head) for head in weights) / 2 for s in range(3)]
    assert_close(attention_row(QUERY, KEY, LAST, scaling=0.5, softcap=2.0), torch.tensor([expected]))


def test_neighbouring_heads_share_a_key_head():
    query = QUERY.repeat(1, 2, 1, 1) * torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 4, 1, 1)  # heads 1 and 3 uniform
    row = attention_row(query, KEY, LAST, scaling=0.5)
    assert_close(row, torch.tensor([[28 / 96, 25 / 96, 43 / 96]]))


def test_default_scaling_is_the_inverse_root_of_the_width():
    assert_close(attention_row(QUERY, KEY, LAST), attention_row(QUERY, KEY, LAST, scaling=2**-0.5))


def test_each_sequence_has_its_own_query():
    row = attention_row(QUERY.expand(2, -1, -1, -1), KEY.expand(2, -1, -1, -1), torch.tensor([2, 0]), scaling=0.5)
    assert_close(row, torch.tensor([[4 / 16, 3 / 16, 9 / 16], [1.0, 0.0, 0.0]]))


def test_a_nan_behind_the_mask_is_hidden_and_a_visible_one_is_not():
    key = KEY.clone()
    key[:, :, 0] = math.nan
    assert attention_row(QUERY, key, LAST, mask=HIDE_FIRST.long()).isfinite().all()
    assert attention_row(QUERY, key, LAST).isnan().any()


def test_fp32_under_autocast_and_without_gradient():
    query = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    key = query.detach()[:, :2] * 3
    position = torch.tensor([7, 3])
    expected = attention_row(query, key, position)
    with torch.autocast("cpu", torch.bfloat16):
        row = attention_row(query, key, position)
    assert torch.equal(row, expected) and row.dtype == torch.float32 and not row.requires_grad
    half = attention_row(query.bfloat16(), key.bfloat16(), position)
    assert torch.equal(half, attention_row(query.bfloat16().float(), key.bfloat16().float(), position))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask has shape \(1, 4\)"):
        attention_row(QUERY, KEY, LAST, mask=torch.ones(1, 4))


masks = st.integers(1, 9).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=1, max_size=4)
)


@given(masks)
def test_score_position_is_the_last_one_of_the_mask(rows):
    mask = torch.tensor(rows)
    expected = [max((s for s, bit in enumerate(row) if bit), default=len(row) - 1) for row in rows]
    for form in (mask, mask.bool(), mask.float()):
        assert score_positions(form).tolist() == expected
    host = mask.size(1) - 1 - mask.long().fliplr().argmax(dim=1, keepdim=True)  # as in openrlhf.models.model
    assert torch.equal(score_positions(mask), host.squeeze(1))


@pytest.mark.parametrize("shape", [(3,), (2, 0), (1, 1, 3)])
def test_score_position_needs_two_dimensions(shape):
    with pytest.raises(ValueError, match="expected"):
        score_positions(torch.ones(shape))


PAD, EOS = 0, 2
IDS = {  # ids, their mask, last 1 of the mask, last id that is not PAD, the same where PAD is EOS, first 1
    "right_padding": ([5, 6, EOS, PAD], [1, 1, 1, 0], 2, 2, 3, 0),
    "left_padding": ([PAD, 5, 6, EOS], [0, 1, 1, 1], 3, 3, 2, 1),
    "truncated": ([5, 6, 7, 8], [1, 1, 1, 1], 3, 3, 3, 0),
    "end_inside": ([5, EOS, 7, EOS], [1, 1, 1, 1], 3, 3, 2, 0),
    "only_the_end": ([EOS, PAD, PAD, PAD], [1, 0, 0, 0], 0, 0, 3, 0),
    "padding_only": ([PAD, PAD, PAD, PAD], [0, 0, 0, 0], 3, 0, 3, 0),
}


@pytest.mark.parametrize(("ids", "mask", "last", "other", "other_than_end", "first"), IDS.values(), ids=IDS)
def test_positions_by_each_rule(ids, mask, last, other, other_than_end, first):
    ids, mask = torch.tensor([ids]), torch.tensor([mask])
    assert row_positions("mask", mask, None, None).tolist() == [last]
    assert row_positions("pad_token", mask, ids, PAD).tolist() == [other]
    assert row_positions("pad_token", mask, ids, EOS).tolist() == [other_than_end]
    assert row_positions("cls", mask, None, None).tolist() == [first]


@given(masks)
def test_other_rules_in_batches(rows):
    mask = torch.tensor(rows)
    assert first_positions(mask).tolist() == [row.index(1) if 1 in row else 0 for row in rows]
    last_ones = [max((s for s, bit in enumerate(row) if bit), default=0) for row in rows]
    assert last_unpadded_positions(mask, 0).tolist() == last_ones  # the mask's digits as ids
    assert last_unpadded_positions(mask, None).tolist() == [mask.shape[1] - 1] * len(rows)


@settings(max_examples=50, deadline=None)
@given(masks, st.integers(0, 2**16), st.sampled_from([None, 1, 3]), st.booleans())
def test_rows_sum_to_one_over_the_visible_keys(rows, seed, window, causal):
    mask = torch.tensor(rows)
    generator = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(len(mask), 4, mask.shape[1], 2, generator=generator)
    key = 3 * torch.randn(len(mask), 2, mask.shape[1], 2, generator=generator)
    row = attention_row(query, key, score_positions(mask), mask=mask, window=window, causal=causal)
    assert (row >= 0).all() and not row[mask == 0].any()
    assert_close(row.sum(1), mask.any(1).float())
