"""Packed sequences: the row of each, put back where the padded batch has it, equals the padded batch's eager row."""

import pytest
import torch
from cpu_flash import cpu_flash, use_implementation
from hypothesis import given, settings
from hypothesis import strategies as st
from recovery_models import LEFT, RIGHT, inputs, tiny
from torch.testing import assert_close

from abc_plugin.attention.attention_row import attention_row
from abc_plugin.attention.full_matrix import rerun_eager_row
from abc_plugin.attention.layers import mixing_layer
from abc_plugin.attention.packed_sequences import Packing
from abc_plugin.attention.packed_sequences import packed_row as row_of_packed
from abc_plugin.attention.query_key_tap import AttentionTap
from abc_plugin.attention.query_positions import ROWS, row_positions, score_positions
from abc_plugin.errors import CreditError

HOLES = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 1, 1, 1]])
SINGLES = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]])  # one-token sequences
EMPTY = torch.tensor([[0] * 6, [1] * 6, [0] * 6, [0, 1, 1, 0, 0, 0], [0] * 6])
ONE_SEQUENCE = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]])
FULL = torch.ones(1, 7, dtype=torch.long)
MASKS = {
    "right": RIGHT,
    "left": LEFT,
    "holes": HOLES,
    "one_token_each": SINGLES,
    "empty_rows": EMPTY,
    "one_padded_sequence": ONE_SEQUENCE,
    "one_full_sequence": FULL,
}
IMPLEMENTATIONS = ("flash_attention_2", "sdpa", "eager")
FAMILIES = {  # what changes a row: shared key heads, window, norm before the product, sinks, softcap, MLA, no rotary
    "llama": IMPLEMENTATIONS,
    "mistral_window": IMPLEMENTATIONS,
    "gemma3": IMPLEMENTATIONS,
    "qwen3": IMPLEMENTATIONS,
    "gpt_neox": IMPLEMENTATIONS,
    "deepseek_v3": IMPLEMENTATIONS,
    "gpt_oss": ("flash_attention_2",),  # in eager its own masks leave packing out
    "gemma2": ("flash_attention_2", "eager"),
}


def packed(mask_BS):
    """What OpenRLHF hands its base model with packed samples: one row of the real tokens, positions restarting."""
    feed = inputs(mask_BS)
    return {name: value[mask_BS.bool()][None] for name, value in feed.items()} | {"use_cache": False}


def packed_row(model, mask, *, tap_options=None, record=None, **changes):
    tap = AttentionTap(model, **{"layer": "last"} | (tap_options or {}))
    try:
        with cpu_flash() as kernels, torch.no_grad(), tap.record(mask, **(record or {})) as recording:
            model(**packed(mask) | changes)
        row = recording.row_BS
        if "flash" in tap.implementation and len(mask) > 1:
            assert set(kernels) == {"varlen"}  # the sequences were kept apart by the kernel, not by a mask
        return row
    finally:
        tap.close()


def padded_row(model, mask):
    """The eager row of the sequences padded on the right, moved to where ``mask`` has its 1s.

    On the right, because eager windows count the padding between tokens and flash windows do not.
    """
    real, feed = mask.bool(), inputs(mask)
    right = mask.sort(dim=1, descending=True).values
    ids = torch.zeros_like(mask)
    ids[right.bool()] = feed["input_ids"][real]
    row = torch.zeros(mask.shape)
    row[real] = rerun_eager_row(model, "last", right, input_ids=ids)[right.bool()]
    return row


def same(row, expected):
    assert_close(row, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "implementation"), [(family, name) for family, names in FAMILIES.items() for name in names]
)
def test_packed_row_is_the_padded_eager_row(family, implementation):
    model = tiny(family)
    for mask in MASKS.values():
        expected = padded_row(model, mask)
        row = packed_row(use_implementation(model, implementation), mask)
        assert row.dtype == torch.float32 and row.shape == mask.shape
        same(row, expected)


HYBRIDS = ("qwen3_next", "qwen3_5", "minimax", "lfm2", "jamba", "bamba", "falcon_h1", "nemotron_h", "granitemoehybrid")


@pytest.mark.parametrize("family", [*HYBRIDS, "llama", "gemma3", "qwen3_moe", "gpt2", "mistral_window"])
@torch.no_grad()
def test_models_in_which_packed_samples_mix_are_refused_by_name(family):
    """Two samples: whether the second one's states know of the first, and whether the layers are told."""
    model = use_implementation(tiny(family), "sdpa")
    two, mask = torch.arange(3, 15)[None], torch.ones(2, 6, dtype=torch.long)
    other = torch.cat([two[:, :6] + 20, two[:, 6:]], 1)
    position = torch.arange(6).repeat(2)[None]
    feeds = [{"input_ids": ids, "position_ids": position, "use_cache": False} for ids in (two, other)]
    one, changed = (model(**feed).last_hidden_state[:, 6:] for feed in feeds)
    mixes = (one - changed).abs().max() > 1e-2 * one.abs().max()
    assert bool(mixes) == (mixing_layer(model) is not None) == (family in HYBRIDS)
    tap = AttentionTap(model, layer="last_full")
    with tap.record(mask) as recording:
        if mixes:
            with pytest.raises(CreditError, match=f"would mix in its layers of {mixing_layer(model)}, which nothing"):
                model(**feeds[0])
            return
        model(**feeds[0])
    assert recording.row_BS.shape == (2, 6)


def test_a_packed_bf16_row_is_near_the_padded_one():
    model = tiny().bfloat16()
    row = packed_row(use_implementation(model, "flash_attention_2"), RIGHT)
    assert row.dtype == torch.float32
    assert (row - padded_row(model, RIGHT)).abs().sum(1).max() <= 2e-2


def test_packed_segments_may_be_given_by_their_bounds():
    model = use_implementation(tiny(), "flash_attention_2")
    for mask in (RIGHT, LEFT, EMPTY, FULL):
        lengths = mask.sum(1)
        row = packed_row(model, mask, position_ids=None, **bounds(lengths))
        expected = padded_row(model, mask)
        # without position_ids rotary positions run on through the stream; only their differences matter
        assert_close(row, expected, rtol=0, atol=1e-5)
        nonempty = packed_row(model, mask, position_ids=None, **bounds(lengths[lengths > 0]))
        assert torch.equal(nonempty, row)


def bounds(lengths):
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def restarting(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


TOTAL = [9, 5, 12]  # RIGHT's sequences


def blocks(*lengths):
    return torch.block_diag(*[torch.ones(length, length) for length in lengths]).tril().bool()[None, None]


POSITIONS = "position_ids do not begin where the recorded mask's sequences begin"
WRONG = {  # implementation, what the model is called with, what is said
    "positions_of_other_segments": (
        "flash_attention_2",
        {"position_ids": restarting(9, 6, 11)},
        POSITIONS,
    ),
    "positions_of_fewer_segments": ("flash_attention_2", {"position_ids": restarting(9, 17)}, POSITIONS),
    "positions_of_more_segments": (
        "flash_attention_2",
        {"position_ids": restarting(9, 5, 6, 6)},
        POSITIONS,
    ),
    "positions_that_run_on": ("flash_attention_2", {"position_ids": restarting(26)}, POSITIONS),
    "restarts_the_kernel_does_not_see": (
        "flash_attention_2",
        {"position_ids": torch.cat([restarting(9), 3 + restarting(5), restarting(12)], 1)},
        POSITIONS,
    ),
    "bounds_of_other_segments": ("flash_attention_2", bounds(torch.tensor([9, 6, 11])), "cu_seq_lens_k do not"),
    "bounds_of_fewer_segments": ("flash_attention_2", bounds(torch.tensor([9, 17])), "cu_seq_lens_k do not"),
    "bounds_of_more_segments": ("flash_attention_2", bounds(torch.tensor([9, 5, 6, 6])), "cu_seq_lens_k do not"),
    "a_padding_mask": (
        "flash_attention_2",
        {"attention_mask": torch.tensor([[0] + [1] * 25])},
        "nothing tells its attention where",
    ),
    "sdpa_with_a_cache": ("sdpa", {"use_cache": True}, "nothing tells its attention where"),
    "sdpa_with_an_all_ones_mask": ("sdpa", {"attention_mask": torch.ones(1, 26)}, "nothing tells its attention where"),
    "eager_with_a_cache": ("eager", {"use_cache": True}, "lets a token see other sequences"),
    "sdpa_positions_of_other_segments": ("sdpa", {"position_ids": restarting(9, 6, 11)}, "lets a token see other"),
    "sdpa_positions_of_more_segments": ("sdpa", {"position_ids": restarting(9, 5, 6, 6)}, POSITIONS),
    "sdpa_own_mask_of_fewer_segments": (
        "sdpa",
        {"attention_mask": blocks(14, 12), "position_ids": restarting(26)},
        "lets a token see other sequences",
    ),
    "sdpa_own_mask_with_a_token_that_all_see": (
        "sdpa",
        {"attention_mask": blocks(*TOTAL) | (torch.arange(26) == 0)},
        "lets a token see other sequences",
    ),
}


@pytest.mark.parametrize(("implementation", "changes", "message"), WRONG.values(), ids=WRONG)
def test_packing_that_disagrees_with_the_mask_is_refused(implementation, changes, message):
    model = use_implementation(tiny(), implementation)
    with pytest.raises(CreditError, match=f"LlamaAttention, {implementation}.*packed sequences, but .*{message}"):
        packed_row(model, RIGHT, **changes)


def test_a_model_whose_mask_leaves_packing_out_is_refused_even_where_the_rows_own_keys_are_right():
    model = use_implementation(tiny("gpt_oss"), "eager")  # the last tokens' windows stay within their sequences
    with pytest.raises(CreditError, match="lets a token see other sequences"):
        packed_row(model, RIGHT)


def test_an_own_mask_of_the_right_segments_is_trusted_without_position_ids():
    model = tiny()
    row = packed_row(model, RIGHT, attention_mask=blocks(*TOTAL), position_ids=None)
    assert_close(row, padded_row(model, RIGHT), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "ran"), [(FULL[:, :5], r"\(1, 5\)"), (torch.ones(2, 13, dtype=torch.long), r"\(2, 13\)")]
)
def test_a_stream_of_another_length_is_refused(ids, ran):
    message = rf"ran on {ran} tokens; a recorded mask of \(3, 12\) means that or, packed, \(1, 26\)"
    with pytest.raises(CreditError, match=message):
        packed_row(tiny(), RIGHT, input_ids=ids, position_ids=None)


def test_the_row_of_a_token_that_packing_leaves_out_is_refused():
    ids = inputs(RIGHT)["input_ids"] + (1 - RIGHT)  # no id is the padding's, so the last token is asked for
    options = {"tap_options": {"row": "pad_token"}, "record": {"input_ids_BS": ids}}
    with pytest.raises(CreditError, match="that of a padding token, which packing leaves out"):
        packed_row(tiny(), RIGHT, **options)
    with pytest.raises(CreditError, match="pass record.. the input_ids of the recorded mask's shape"):
        packed_row(tiny(), RIGHT, tap_options={"row": "pad_token"}, record={"input_ids_BS": ids[:, 1:]})


@pytest.mark.parametrize("row", ["pad_token", "cls"])
def test_other_rows_of_packed_sequences(row):
    model = tiny()
    ids, ends = inputs(RIGHT)["input_ids"].clone(), score_positions(RIGHT)
    ids.scatter_(1, ends[:, None], 0)  # as where pad == eos: the row read is that of the token before
    shorter = RIGHT.scatter(1, ends[:, None], 0)
    options = {"tap_options": {"row": row}, "record": {"input_ids_BS": ids} if row == "pad_token" else {}}
    got = packed_row(model, RIGHT, input_ids=ids[RIGHT.bool()][None], **options)
    if row == "pad_token":
        same(got, rerun_eager_row(model, "last", shorter, **inputs(shorter)))
    else:
        assert torch.equal(got, torch.eye(12)[0].expand(3, -1))  # causal: the first token sees itself


options = st.fixed_dictionaries(
    {"window": st.sampled_from([None, 1, 3]), "causal": st.booleans()},
    optional={
        "softcap": st.just(2.0),
        "sinks_H": st.just(torch.tensor([-1.0, 0.0, 1.0, 2.0])),
        "scaling": st.just(0.3),
    },
)
masks = st.tuples(st.integers(1, 4), st.integers(1, 9)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(0, 1), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    )
)


@settings(max_examples=150, deadline=None)
@given(masks, st.integers(0, 2**16), st.sampled_from(ROWS), options)
def test_packed_maths_is_the_padded_maths(rows, seed, rule, options):
    mask = torch.tensor(rows).bool()
    if not mask.any():
        return
    generator = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(len(mask), 4, mask.shape[1], 2, generator=generator)
    key = 3 * torch.randn(len(mask), 2, mask.shape[1], 2, generator=generator)
    position = row_positions(rule, mask, mask.long(), 0)
    expected = attention_row(query, key, position, mask=mask, **options)
    stream = [x.transpose(1, 2)[mask].transpose(0, 1)[None] for x in (query, key)]
    packing = Packing(mask, position, stream[0].shape[2], None)
    assert_close(row_of_packed(packing, *stream, **options), expected, rtol=0, atol=1e-6)


def test_packed_row_under_autocast_is_fp32():
    query, key = torch.randn(2, 1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    packing = Packing(FULL[:, :1].expand(2, 6).bool(), torch.tensor([5, 2]), 12, None)
    expected = row_of_packed(packing, query, key)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(row_of_packed(packing, query, key), expected)
