"""Rings and tensor parallelism in 2 and 4 gloo processes: every process gets the row of one process alone."""

import pytest
import torch
import torch.distributed as dist
from cpu_flash import cpu_ring_flash, use_implementation
from processes import own_group, spawn
from recovery_models import LEFT, RIGHT, inputs, tiny
from test_layouts import EMPTY, HOLES, padded_row, same
from torch import nn

from abc_plugin.attention.full_matrix import rerun_eager_row
from abc_plugin.attention.query_key_tap import AttentionTap
from abc_plugin.errors import CreditError

PROCESSES = 4
PAIRS, CROSSED = ((0, 1), (2, 3)), ((0, 2), (1, 3))
RING_MASKS = {
    "right": RIGHT,  # 26 tokens: padded to 28 in a ring of 4, boundaries inside slices, one sequence over three slices
    "left": LEFT,
    "holes": HOLES,  # 11 tokens: padded in a ring of 2 too
    "empty_rows": EMPTY,
    "one_sequence": torch.ones(1, 9, dtype=torch.long),
    "fewer_tokens_than_processes": torch.tensor([[1, 0], [1, 1]]),
}
RING_FAMILIES = ("llama", "gpt_oss")  # shared key heads; window and sinks
# name: (changes to the model, key heads of each process)
SHARDS = {
    "even": ({"num_attention_heads": 4, "num_key_value_heads": 4}, (2, 2)),
    "uneven": ({"num_attention_heads": 4, "num_key_value_heads": 4}, (3, 1)),
    "shared_keys_even": ({"num_attention_heads": 8, "num_key_value_heads": 2}, (1, 1)),
    "shared_keys_uneven": ({"num_attention_heads": 8, "num_key_value_heads": 4}, (1, 3)),
}


def ring_feed(mask, group):
    """This process's slice of the stream, as OpenRLHF's get_tensor_in_current_ring_attn_rank cuts it."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    feed = {name: value[mask.bool()][None] for name, value in inputs(mask).items()}
    feed = {name: nn.functional.pad(value, (0, -value.shape[1] % size)) for name, value in feed.items()}
    return {name: value.chunk(size, dim=1)[rank] for name, value in feed.items()} | {"use_cache": False}


def ring_record(model, mask, group, feed=None, per_head=False, **groups):
    use_implementation(model, "flash_attention_2")
    with cpu_ring_flash(mask, group), torch.no_grad():
        tap = AttentionTap(model, "last", per_head=per_head)
        try:
            with tap.record(mask, **groups) as recording:
                model(**feed or ring_feed(mask, group))
            return recording.row_BHS if per_head else recording.row_BS
        except CreditError as error:
            return str(error)
        finally:
            tap.close()


def shard(model, key_heads, group):
    """Keep this process's heads, as tensor parallelism does; the output projection sums over the processes."""
    rank = dist.get_rank(group)
    for layer in model.layers:
        attention = layer.self_attn
        width, groups = attention.head_dim, attention.num_key_value_groups
        keys = slice(sum(key_heads[:rank]) * width, sum(key_heads[: rank + 1]) * width)
        queries = slice(keys.start * groups, keys.stop * groups)
        for name, part in {"q_proj": queries, "k_proj": keys, "v_proj": keys}.items():
            projection = getattr(attention, name)
            projection.weight = nn.Parameter(projection.weight[part].clone())
        attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, queries].clone())
        attention.o_proj.register_forward_hook(lambda module, args, out: dist.all_reduce(out, group=group) or out)
    return model


def head_record(model, mask, implementation, per_head=False, **groups):
    tap = AttentionTap(use_implementation(model, implementation), "last", per_head=per_head)
    with torch.no_grad(), tap.record(mask, **groups) as recording:
        model(attention_mask=mask, **inputs(mask))
    try:
        return recording.row_BHS if per_head else recording.row_BS
    except CreditError as error:
        return str(error)
    finally:
        tap.close()


def refusal(recording):
    with pytest.raises(CreditError) as caught:
        _ = recording.row_BS
    return str(caught.value)


def worker(rank):
    groups = {2: own_group(rank, PAIRS), 4: dist.group.WORLD}
    pair, crossed = groups[2], own_group(rank, CROSSED)
    saved = {}
    for family in RING_FAMILIES:
        model = tiny(family)
        for name, mask in RING_MASKS.items():
            for size, group in groups.items():
                saved["ring", family, name, size] = ring_record(model, mask, group, ring_group=group)
    model = tiny()
    saved["ring heads"] = ring_record(model, RIGHT, pair, ring_group=pair, per_head=True)
    saved["ring, group not named"] = ring_record(model, RIGHT, pair)
    swapped = ring_feed(RIGHT, pair) | {"position_ids": ring_feed(RIGHT, pair)["position_ids"].flip(1)}
    saved["ring, other positions"] = ring_record(model, RIGHT, pair, feed=swapped, ring_group=pair)
    shifted = ring_feed(RIGHT, pair) | {"position_ids": 1 + ring_feed(RIGHT, pair)["position_ids"]}
    saved["ring, shifted positions"] = ring_record(model, RIGHT, pair, feed=shifted, ring_group=pair)
    tap = AttentionTap(use_implementation(model, "sdpa"))
    with torch.no_grad(), tap.record(RIGHT, ring_group=pair) as recording:
        model(**ring_feed(RIGHT, pair))
    saved["ring, no flash"] = refusal(recording)
    tap.close()
    for name, (changes, key_heads) in SHARDS.items():
        model = shard(tiny("llama", **changes), key_heads, pair)
        for implementation in ("sdpa", "eager"):
            row = head_record(model, RIGHT, implementation, head_group=pair)
            saved["heads", name, implementation] = row
        saved["heads", name, "per head"] = head_record(model, RIGHT, "sdpa", per_head=True, head_group=pair)
        mean = head_record(model, RIGHT, "sdpa", head_group=pair, queries_BS=RIGHT.bool())
        saved["heads", name, "mean"] = mean
        saved["heads", name, "group not named"] = head_record(model, RIGHT, "sdpa")
    saved["heads, not split"] = head_record(tiny(), RIGHT, "sdpa", head_group=pair)
    changes, key_heads = SHARDS["shared_keys_uneven"]
    model = shard(tiny("llama", **changes), key_heads, crossed)
    saved["ring of shards"] = ring_record(model, RIGHT, pair, ring_group=pair, head_group=crossed)
    return saved


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return spawn(worker, PROCESSES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mask", RING_MASKS)
@pytest.mark.parametrize("family", RING_FAMILIES)
def test_ring_row_is_the_padded_eager_row_on_every_process(ranks, family, mask, size):
    expected = padded_row(tiny(family), RING_MASKS[mask])
    for saved in ranks:
        same(saved["ring", family, mask, size], expected)


def heads_of_one_process(model, mask):
    tap = AttentionTap(model, "last", per_head=True)
    with torch.no_grad(), tap.record(mask) as recording:
        model(attention_mask=mask, **inputs(mask))
    tap.close()
    same(recording.row_BS, rerun_eager_row(model, "last", mask, **inputs(mask)))
    return recording.row_BHS


def test_ring_rows_of_each_head(ranks):
    expected = heads_of_one_process(tiny(), RIGHT)
    for saved in ranks:
        same(saved["ring heads"], expected)


def test_a_ring_that_is_not_named_is_refused(ranks):
    for saved in ranks:
        assert (
            "ran on (1, 13) tokens; a recorded mask of (3, 12) means that or, packed, (1, 26)"
            in (saved["ring, group not named"])
        )


def test_a_ring_whose_attention_stays_on_its_process_is_refused(ranks):
    for saved in ranks:
        assert "in a ring its attention must be flash attention without a mask" in saved["ring, no flash"]


@pytest.mark.parametrize("case", ["ring, other positions", "ring, shifted positions"])
def test_a_ring_slice_with_other_positions_is_refused(ranks, case):
    for saved in ranks:
        assert "position_ids do not begin where the recorded mask's sequences begin" in saved[case]


@pytest.mark.parametrize("shards", SHARDS)
def test_row_over_sharded_heads_is_the_row_of_one_process(ranks, shards):
    model = tiny("llama", **SHARDS[shards][0])
    expected = rerun_eager_row(model, "last", RIGHT, **inputs(RIGHT))
    heads = heads_of_one_process(model, RIGHT)
    for saved in ranks:
        same(saved["heads", shards, "sdpa"], expected)
        same(saved["heads", shards, "eager"], expected)
        same(saved["heads", shards, "per head"], heads)


@pytest.mark.parametrize("shards", SHARDS)
def test_mean_of_rows_over_sharded_heads_is_that_of_one_process(ranks, shards):
    expected = head_record(tiny("llama", **SHARDS[shards][0]), RIGHT, "sdpa", queries_BS=RIGHT.bool())
    for saved in ranks:
        same(saved["heads", shards, "mean"], expected)


@pytest.mark.parametrize("shards", SHARDS)
def test_sharded_heads_whose_group_is_not_named_are_refused(ranks, shards):
    changes, key_heads = SHARDS[shards]
    heads = changes["num_attention_heads"]
    for rank, saved in enumerate(ranks):
        own = key_heads[rank % 2] * heads // changes["num_key_value_heads"]
        assert f"this process ran {own} of {heads} heads" in saved["heads", shards, "group not named"]


def test_a_head_group_over_which_the_heads_are_not_split_is_refused(ranks):
    for saved in ranks:
        assert "this process ran 4 of 4 heads; under tensor parallelism" in saved["heads, not split"]


def test_ring_and_sharded_heads_together(ranks):
    expected = rerun_eager_row(tiny("llama", **SHARDS["shared_keys_uneven"][0]), "last", RIGHT, **inputs(RIGHT))
    for saved in ranks:
        same(saved["ring of shards"], expected)
