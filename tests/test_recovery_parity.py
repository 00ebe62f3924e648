"""The tap against the definition (eager attention, full matrix), over families, implementations and paddings."""

import pytest
import torch
from cpu_flash import cpu_flash, use_implementation
from recovery_models import FAMILIES, PADDINGS, RIGHT, WINDOW, inputs, tiny

from abc_plugin.recovery.rerun import rerun_eager_row
from abc_plugin.recovery.rows import score_positions
from abc_plugin.recovery.tap import AttentionTap

CASES = [(family, implementation) for family, (_, _, known) in FAMILIES.items() for implementation in known]


def tapped_row(model, implementation, layer, mask, **feed):
    tap = AttentionTap(use_implementation(model, implementation), layer)
    try:
        with cpu_flash() as kernels, torch.no_grad(), tap.record(mask) as recording:
            model(attention_mask=mask, **feed)
        assert bool(kernels) == implementation.startswith("flash")  # the code under test is the one that ran
        return recording.row_BS
    finally:
        tap.close()


def feed_of(family, mask):
    feed = inputs(mask)
    return {"input_ids": feed["input_ids"]} if family == "opt" else feed  # opt counts positions by the mask itself


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_fp32_row_is_the_eager_row(family, implementation):
    model = tiny(family)
    for mask in PADDINGS.values():
        feed = feed_of(family, mask)
        for layer in ("0", "1", "last"):
            expected = rerun_eager_row(model, layer, mask, **feed)
            row = tapped_row(model, implementation, layer, mask, **feed)
            assert row.dtype == torch.float32 and row.shape == mask.shape
            torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "implementation"), CASES + [("gpt2", "flash_attention_2")])
def test_bf16_row_is_near_the_eager_row(family, implementation):
    model = tiny(family).bfloat16()
    feed = feed_of(family, RIGHT)
    expected = rerun_eager_row(model, "last", RIGHT, **feed)
    row = tapped_row(model, implementation, "last", RIGHT, **feed)
    distance = (row / row.sum(1, keepdim=True) - expected / expected.sum(1, keepdim=True)).abs().sum(1)
    assert distance.max() <= 2e-2


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
def test_a_sliding_layer_gives_exact_zeros_outside_its_window(implementation):
    row = tapped_row(tiny("gemma3"), implementation, "last", RIGHT, **inputs(RIGHT))
    distance = score_positions(RIGHT)[:, None] - torch.arange(RIGHT.shape[1])
    assert torch.equal(row > 0, (distance >= 0) & (distance < WINDOW))


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
def test_a_row_of_padding_only_is_zero_and_harms_no_other(implementation):
    mask = torch.cat([RIGHT[:2], torch.zeros(1, 12, dtype=torch.long)])
    model = tiny()
    row = tapped_row(model, implementation, "last", mask, **inputs(mask))
    assert not row[2].any()
    torch.testing.assert_close(row[:2].sum(1), torch.ones(2))


def test_the_row_is_chosen_by_mask_when_padding_and_eos_share_an_id():
    model = tiny(pad_token_id=0, eos_token_id=0)
    ids = inputs(RIGHT)["input_ids"].clone()
    ids.scatter_(1, score_positions(RIGHT)[:, None], 0)  # each response ends in EOS, whose id is the padding's
    row = tapped_row(model, "sdpa", "last", RIGHT, input_ids=ids)
    torch.testing.assert_close(row, rerun_eager_row(model, "last", RIGHT, input_ids=ids), rtol=0, atol=1e-6)
    assert (row.gather(1, score_positions(RIGHT)[:, None]) > 0).all()
    assert torch.equal(row > 0, RIGHT.bool())


def test_padding_does_not_change_the_row():
    model = tiny()
    alone = torch.ones(1, 9, dtype=torch.long)
    ids = inputs(alone)["input_ids"]
    expected = tapped_row(model, "sdpa", "last", alone, input_ids=ids)
    for left, right in ((3, 0), (0, 3), (2, 1)):
        mask = torch.nn.functional.pad(alone, (left, right))
        feed = {**inputs(mask), "input_ids": torch.nn.functional.pad(ids, (left, right))}
        for implementation in ("sdpa", "flash_attention_2"):
            row = tapped_row(model, implementation, "last", mask, **feed)
            torch.testing.assert_close(row[:, left : left + 9], expected, rtol=0, atol=2e-6)
