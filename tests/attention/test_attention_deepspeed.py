"""Under real DeepSpeed, in 2 gloo processes: ZeRO-3, also offloaded, and tensor parallelism."""

import importlib
import os

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from recovery_models import RIGHT, inputs, tiny, tiny_reward_model
from test_layouts import same

from abc_plugin.attention.full_matrix import rerun_eager_row
from abc_plugin.attention.query_key_tap import AttentionTap
from abc_plugin.attention.signed_contribution import ContributionReader

pytest.importorskip("deepspeed")

# Nothing is kept or fetched ahead, so that every use of a parameter is a gathering of its own.
ZERO3 = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
STAGES = {"zero3": ZERO3, "offloaded": ZERO3 | {"offload_param": {"device": "cpu", "pin_memory": False}}}
HEADS = {"even": 4, "uneven": 3}


def engine_of(model, zero, **config):
    """An evaluation engine as openrlhf.utils.deepspeed makes it."""
    import deepspeed

    config |= {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1}
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    engine.eval()
    return engine


def count_gathers():
    """A list that grows by one with every gathering of parameters."""
    partition = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    gathered, gather = [], partition._dist_allgather_fn

    def counted(input_tensor, output_tensor, group=None):
        gathered.append(output_tensor.numel())
        return gather(input_tensor, output_tensor, group)

    partition._dist_allgather_fn = counted
    return gathered


def zero3(model, zero, gathered):
    """(row, gatherings of a plain forward, of one with the tap, of one that uses a projection twice)."""
    engine = engine_of(model, zero)
    attention = engine.module.layers[2].self_attn
    assert attention.q_proj.weight.numel() == 0  # partitioned

    def gatherings():
        before = len(gathered)
        engine(attention_mask=RIGHT, **inputs(RIGHT))
        return gathered[before:]

    plain = gatherings()
    tap = AttentionTap(engine)
    with tap.record(RIGHT) as recording:
        tapped = gatherings()
    tap.close()
    attention.k_proj.register_forward_pre_hook(lambda module, args: (attention.q_proj(args[0]), None)[1])
    twice = gatherings()
    engine.destroy()
    return recording.row_BS, plain, tapped, twice


def contributions(zero):
    """Rows of two forwards: the second is fetched in the order that DeepSpeed learnt from the first."""
    engine = engine_of(tiny_reward_model(), zero)
    recorded = []
    for _ in range(2):
        with ContributionReader(engine).record(RIGHT) as recording:
            engine(**inputs(RIGHT), attention_mask=RIGHT)
        recorded.append(recording.row_BS)
    engine.destroy()
    return recorded


def tensor_parallel(heads):
    """(row, number of this process's heads) after the host's two steps, tp_model_init and initialize."""
    import deepspeed

    model = tiny(hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=heads)
    model = deepspeed.tp_model_init(model=model, tp_size=2, dtype=torch.float32)
    engine = engine_of(model, {"stage": 0}, tensor_parallel={"autotp_size": 2})
    tap = AttentionTap(engine)
    with tap.record(RIGHT, head_group=dist.group.WORLD) as recording:
        engine(attention_mask=RIGHT, **inputs(RIGHT))
    tap.close()
    return recording.row_BS, model.layers[2].self_attn.q_proj.weight.shape[0] // 8


@torch.no_grad()
def worker(rank):
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "LOCAL_SIZE": "2"}
    import deepspeed

    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # it would compile C++
    deepspeed.init_distributed("gloo")
    gathered = count_gathers()
    saved = {name: zero3(tiny(), zero, gathered) for name, zero in STAGES.items()}
    saved |= {("contribution", name): contributions(zero) for name, zero in STAGES.items()}
    return saved | {name: tensor_parallel(heads) for name, heads in HEADS.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return spawn(worker, 2, tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("stage", STAGES)
def test_zero3_gives_the_eager_row_and_gathers_no_parameter_more(ranks, stage):
    expected = rerun_eager_row(tiny(), "last_full", RIGHT, **inputs(RIGHT))
    for saved in ranks:
        row, plain, tapped, twice = saved[stage]
        same(row, expected)
        assert tapped == plain
        assert len(twice) == len(plain) + 1  # the count would show one more use


@pytest.mark.parametrize("stage", STAGES)
def test_zero3_gives_the_contributions_of_one_process(ranks, stage):
    model = tiny_reward_model()
    with torch.no_grad(), ContributionReader(model).record(RIGHT) as recording:
        model(**inputs(RIGHT), attention_mask=RIGHT)
    for saved in ranks:
        for row in saved["contribution", stage]:
            same(row, recording.row_BS)


@pytest.mark.parametrize(("split", "shares"), [("even", [2, 2]), ("uneven", [1, 2])])
def test_heads_that_deepspeed_splits_give_the_eager_row(ranks, split, shares):
    heads = HEADS[split]
    model = tiny(hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=heads)
    expected = rerun_eager_row(model, "last_full", RIGHT, **inputs(RIGHT))
    assert sorted(saved[split][1] for saved in ranks) == shares
    for saved in ranks:
        same(saved[split][0], expected)
