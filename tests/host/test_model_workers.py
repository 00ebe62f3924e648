"""The worker's row on OpenRLHF's own reward model."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import CreditError, NotFinite
from abc_plugin.host.import_openrlhf import import_host

import_host()

from openrlhf.models import get_llm_for_sequence_regression  # noqa: E402
from openrlhf.trainer.ray.launcher import BaseModelActor, RewardModelActor  # noqa: E402

from abc_plugin.attention.full_matrix import rerun_eager_row  # noqa: E402
from abc_plugin.host.arguments import parse  # noqa: E402
from abc_plugin.host.install import undecorated  # noqa: E402
from abc_plugin.host.model_workers import CreditRewardModel  # noqa: E402
from abc_plugin.host.ray_trainers import WithCredit  # noqa: E402
from abc_plugin.local.lora import plain_weight, quantised_layers  # noqa: E402

ONE_RANK = ["--actor.num_gpus_per_node", "1", "--vllm.num_engines", "0", "--rollout.batch_size", "8"]


def worker(tiny, monkeypatch, shaping, attention="sdpa", extra=(), args=None):
    """A worker whose model is loaded as the host loads it, without its process group."""
    args = args or parse(["--reward.model_name_or_path", "x", *ONE_RANK, *extra])
    args.shaping = shaping
    model = get_llm_for_sequence_regression(
        str(tiny / "reward_model"),
        "reward",
        attn_implementation=attention,
        normalize_reward=args.reward.normalize_enable,
        load_in_4bit=args.ds.load_in_4bit,
    ).eval()

    def load(self, strategy, pretrain):
        self.strategy, self.model = strategy, model

    monkeypatch.setattr(undecorated(RewardModelActor), "init_model_from_pretrained", load)
    self = object.__new__(CreditRewardModel)
    strategy = SimpleNamespace(args=args, ring_attn_group=None, print=print)
    self.init_model_from_pretrained(strategy, str(tiny / "reward_model"))
    return self


@pytest.fixture
def batch():
    """Right padding, left padding, none; lengths 9, 5, 6."""
    ids = torch.randint(10, 40000, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [0] * 3 + [1] * 6])
    return ids, mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", ["last_full", "0"])
def test_score_is_the_stock_one_and_the_row_is_the_eager_one(tiny, monkeypatch, batch, attention, layer):
    stock = worker(tiny, monkeypatch, ShapingConfig("none"), attention)
    expected_B = stock.forward(*batch, pad_sequence=True)
    tapped = worker(tiny, monkeypatch, ShapingConfig("abc", layer=layer), attention)
    reward_B, [evidence], _ = tapped.forward(*batch, pad_sequence=True)
    row_BS = evidence["attention"]
    assert torch.equal(reward_B, expected_B)
    ids, mask = batch
    position = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    reference_BS = rerun_eager_row(
        stock.model.model.float(), layer, mask, input_ids=ids, position_ids=position, use_cache=False
    )
    assert (row_BS - reference_BS).abs().sum(1).max() < 2e-2  # bf16 model against its fp32 copy
    assert (row_BS[mask == 0] == 0).all()
    torch.testing.assert_close(row_BS.sum(1), torch.ones(3))


@pytest.mark.parametrize("shaping", [ShapingConfig("none"), ShapingConfig("uniform"), ShapingConfig("abc", 0.0)])
def test_without_need_of_attention_the_worker_is_the_stock_one(tiny, monkeypatch, batch, shaping):
    self = worker(tiny, monkeypatch, shaping)
    assert self.members[0].readers == {}
    assert isinstance(self.forward(*batch), torch.Tensor)


def test_normalisation_that_the_host_loses_is_restored(tiny, tmp_path, monkeypatch, batch):
    shutil.copytree(tiny / "reward_model", tmp_path / "reward_model")
    config = json.loads((tmp_path / "reward_model/config.json").read_text()) | {"mean": 1.5, "std": 0.5}
    (tmp_path / "reward_model/config.json").write_text(json.dumps(config))
    plain_B, _, _ = worker(tmp_path, monkeypatch, ShapingConfig("abc")).forward(*batch)
    normal = worker(tmp_path, monkeypatch, ShapingConfig("abc"), extra=["--reward.normalize_enable"])
    assert (normal.model.mean, normal.model.std) == (1.5, 0.5)
    torch.testing.assert_close(normal.forward(*batch)[0], (plain_B - 1.5) / 0.5)


def test_a_tap_that_does_not_fire_stops_the_worker_at_the_start(tiny, monkeypatch):
    monkeypatch.setattr("abc_plugin.attention.query_key_tap.Recording.look", lambda *_args: None)
    with pytest.raises(CreditError, match="was not called"):
        worker(tiny, monkeypatch, ShapingConfig("abc"))


def test_an_ensemble_scores_the_mean_and_hands_over_what_each_model_says(tiny, tmp_path, monkeypatch, batch):
    shutil.copytree(tiny / "reward_model", tmp_path / "reward_model")
    weights = load_file(tmp_path / "reward_model/model.safetensors")
    weights["score.weight"] = weights["score.weight"].flip(1).contiguous()
    save_file(weights, tmp_path / "reward_model/model.safetensors", metadata={"format": "pt"})
    shaping = ShapingConfig("prefix")
    alone = [worker(home, monkeypatch, shaping).forward(*batch) for home in (tiny, tmp_path)]
    both = worker(tiny, monkeypatch, shaping)
    both.members += worker(tmp_path, monkeypatch, shaping).members
    reward_B, evidence, info = both.forward(*batch)
    first_B, second_B = (one.output.float() for one in alone)
    torch.testing.assert_close(reward_B, (first_B + second_B) / 2)
    torch.testing.assert_close(info["reward_disagreement"], (first_B - second_B).abs() / 2)
    for member, one in zip(evidence, alone, strict=True):
        assert torch.equal(member["prefix"], one.evidence[0]["prefix"])
    assert both.model is both.members[1].model


def test_shapley_values_are_those_of_the_text_without_the_others(tiny, monkeypatch, batch):
    """Two segments of each response, by hand: all four of its parts are scored alone, unpadded and closed up."""
    stock = worker(tiny, monkeypatch, ShapingConfig("none"))
    self = worker(tiny, monkeypatch, ShapingConfig("shapley", calls=3))
    for member in (stock, self):
        member.model.float()
    ids, mask = batch
    position_S = torch.arange(9)
    first, last = torch.tensor([2, 1, 5]), torch.tensor([8, 4, 8])  # of the actions: 7, 4 and 4 tokens, in halves
    acts_BS = (position_S >= first[:, None]) & mask.bool()
    reward_B, [evidence], info = self.forward(ids, mask, action_mask=acts_BS[:, 1:].long(), pad_sequence=True)
    assert torch.equal(reward_B, stock.forward(ids, mask, pad_sequence=True))
    assert info["shapley_segments"].tolist() == [2.0] * 3
    for b, row_S in enumerate(evidence["shapley"]):
        middle = int(first[b] + (last[b] - first[b] + 2) // 2)  # where the second half begins
        halves = (position_S >= first[b]) & (position_S < middle), (position_S >= middle) & acts_BS[b]

        def score(*held, b=b, halves=halves):
            left = ids[b][mask[b].bool() & ~acts_BS[b] | sum((halves[k] for k in held), torch.zeros(9).bool())]
            return stock.forward(left[None], torch.ones_like(left[None]), pad_sequence=True)[0]

        one = (score(0) - score() + score(0, 1) - score(1)) / 2
        expected_S = torch.zeros(9)
        expected_S[middle - 1], expected_S[last[b]] = one, score(0, 1) - score() - one
        torch.testing.assert_close(row_S, expected_S, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "need"), [("prefix", "prefix"), ("grad_input", "gradient"), ("abc_signed", "contribution")]
)
def test_reading_more_beside_the_score_leaves_it_as_it_was(tiny, monkeypatch, batch, method, need):
    stock_B = worker(tiny, monkeypatch, ShapingConfig("none")).forward(*batch)
    reward_B, [evidence], _ = worker(tiny, monkeypatch, ShapingConfig(method)).forward(*batch)
    assert torch.equal(reward_B, stock_B) and not reward_B.requires_grad
    row_BS, last_B = evidence[need], batch[1].shape[1] - 1 - batch[1].flip(1).argmax(1)
    assert (row_BS[batch[1] == 0] == 0).all() and row_BS.dtype == torch.float32
    if need == "prefix":
        assert torch.equal(row_BS[torch.arange(3), last_B], stock_B.float())


def test_the_score_of_a_prefix_is_normalised_as_the_score_is(tiny, tmp_path, monkeypatch, batch):
    shutil.copytree(tiny / "reward_model", tmp_path / "reward_model")
    config = json.loads((tmp_path / "reward_model/config.json").read_text()) | {"mean": 1.5, "std": 0.5}
    (tmp_path / "reward_model/config.json").write_text(json.dumps(config))
    normal = worker(tmp_path, monkeypatch, ShapingConfig("prefix"), extra=["--reward.normalize_enable"])
    reward_B, [evidence], _ = normal.forward(*batch)
    last_B = batch[1].shape[1] - 1 - batch[1].flip(1).argmax(1)
    torch.testing.assert_close(evidence["prefix"][torch.arange(3), last_B], reward_B.float(), atol=2e-2, rtol=1e-2)


def test_gradients_go_through_4_bit_weights_whatever_ran_before(tiny, monkeypatch, batch):
    pytest.importorskip("bitsandbytes")
    flags = ["--ds.load_in_4bit"]
    four = worker(tiny, monkeypatch, ShapingConfig("grad_input"), extra=flags)
    _, [first], _ = four.forward(*batch)
    with torch.no_grad():
        four.model(*batch)  # on some CPUs bitsandbytes would now repack the weights for a kernel without backward
    _, [second], _ = four.forward(*batch)
    assert torch.equal(first["gradient"], second["gradient"])
    full = worker(tiny, monkeypatch, ShapingConfig("grad_input"))
    for name, layer in four.model.named_modules():
        if quantised_layers(layer) == [layer]:
            full.model.get_submodule(name).weight.data = plain_weight(layer)
    _, [expected], _ = full.forward(*batch)
    pair = torch.stack([first["gradient"].flatten(), expected["gradient"].flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.99  # bf16 through another kernel


def test_a_subset_of_heads_is_read(tiny, monkeypatch, batch):
    rows = {}
    for heads in ("all", "0", "1"):
        _, [evidence], _ = worker(tiny, monkeypatch, ShapingConfig("abc", heads=heads)).forward(*batch)
        rows[heads] = evidence["attention"]
    torch.testing.assert_close((rows["0"] + rows["1"]) / 2, rows["all"])
    assert not torch.allclose(rows["0"], rows["1"])


def test_undecorated_finds_the_class_behind_ray():
    assert undecorated(RewardModelActor) is RewardModelActor.__ray_metadata__.modified_class
    assert undecorated(BaseModelActor) is BaseModelActor


def test_evidence_that_is_no_number_ends_the_run_where_the_score_is_one(tiny, monkeypatch, batch):
    whole = worker(tiny, monkeypatch, ShapingConfig("abc"))
    monkeypatch.setattr("abc_plugin.host.model_workers.rows", lambda _: {"attention": torch.full((3, 4), torch.inf)})
    with pytest.raises(NotFinite, match="the attention read of the reward model .*/reward_model is NaN or infinite"):
        whole.forward(*batch)


def test_a_score_that_is_no_number_ends_the_run_whatever_the_method(tiny, monkeypatch, batch):
    broken = worker(tiny, monkeypatch, ShapingConfig("none"))
    broken.model.score.weight.data.fill_(torch.nan)
    with pytest.raises(NotFinite, match="3 of 3 scores of the reward model .*/reward_model are NaN or infinite"):
        broken.forward(*batch, pad_sequence=True)


def test_a_metric_that_is_no_number_ends_the_run():
    class Host:
        def train_step(self, status, step):
            return status, step + 1

    class Trainer(WithCredit, Host):
        def __init__(self, dtype):
            self.args = SimpleNamespace(ds=SimpleNamespace(param_dtype=dtype))
            self.experience_maker = SimpleNamespace(recorder=SimpleNamespace())

    for status in ({"policy_loss": math.nan}, {"actor_grad_norm": math.inf}):
        [(name, value)] = status.items()
        with pytest.raises(NotFinite, match=f"{name} of step 3 is {value}"):
            Trainer("bf16").train_step(status, 2)
    assert Trainer("fp16").train_step({"actor_grad_norm": math.inf, "generated_samples": []}, 2)[1] == 3
