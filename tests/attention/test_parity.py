"""What padding may not change, on the definition's own terms; the families are in test_recovery_families."""

import pytest
import torch
from cpu_flash import cpu_flash, use_implementation
from recovery_models import RIGHT, inputs, tiny

from abc_plugin.attention.matrix import rerun_eager_row
from abc_plugin.attention.positions import score_positions
from abc_plugin.tools.bench.parity import recovered

READERS = [("llama", "sdpa", "auto"), ("llama", "flash_attention_2", "auto"), ("llama", "eager", "auto")]
READERS += [("llama", "sdpa", "eager-rerun"), ("llama", "flash_attention_2", "eager-rerun"), ("gptj", "eager", "auto")]


def read(model, implementation, recovery, mask, **feed):
    with cpu_flash():
        return recovered(use_implementation(model, implementation), "last", recovery, mask, **feed)[0]


@pytest.mark.parametrize(("family", "implementation", "recovery"), READERS)
def test_a_row_of_padding_only_is_zero_and_harms_no_other(family, implementation, recovery):
    mask = torch.cat([RIGHT[:2], torch.zeros(1, 12, dtype=torch.long)])
    row = read(tiny(family), implementation, recovery, mask, **inputs(mask))
    assert not row[2].any()
    torch.testing.assert_close(row[:2].sum(1), torch.ones(2))


def test_the_row_is_chosen_by_mask_when_padding_and_eos_share_an_id():
    model = tiny(pad_token_id=0, eos_token_id=0)
    ids = inputs(RIGHT)["input_ids"].clone()
    ids.scatter_(1, score_positions(RIGHT)[:, None], 0)  # each response ends in EOS, whose id is the padding's
    row = read(model, "sdpa", "auto", RIGHT, input_ids=ids)
    torch.testing.assert_close(row, rerun_eager_row(model, "last", RIGHT, input_ids=ids), rtol=0, atol=1e-6)
    assert (row.gather(1, score_positions(RIGHT)[:, None]) > 0).all()
    assert torch.equal(row > 0, RIGHT.bool())


@pytest.mark.parametrize(("family", "implementation", "recovery"), READERS)
def test_padding_does_not_change_the_row(family, implementation, recovery):
    model = tiny(family)
    alone = torch.ones(1, 9, dtype=torch.long)
    ids = inputs(alone)["input_ids"]
    expected = read(model, implementation, recovery, alone, **inputs(alone))
    for left, right in ((3, 0), (0, 3), (2, 1)):
        mask = torch.nn.functional.pad(alone, (left, right))
        feed = {**inputs(mask), "input_ids": torch.nn.functional.pad(ids, (left, right))}
        row = read(model, implementation, recovery, mask, **feed)
        torch.testing.assert_close(row[:, left : left + 9], expected, rtol=0, atol=2e-6)
