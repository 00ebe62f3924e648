"""The worker's row on OpenRLHF's own reward model, and rollouts by transformers in the host's form."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import CreditError, UserError
from abc_plugin.host.adapt import import_host

import_host()

from openrlhf.models import get_llm_for_sequence_regression  # noqa: E402
from openrlhf.trainer.ray.launcher import BaseModelActor, RewardModelActor  # noqa: E402

from abc_plugin.host.actors import undecorated  # noqa: E402
from abc_plugin.host.arguments import parse  # noqa: E402
from abc_plugin.host.generation import generate  # noqa: E402
from abc_plugin.host.reward_model import CreditRewardModel  # noqa: E402
from abc_plugin.recovery.rerun import rerun_eager_row  # noqa: E402

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
    reward_B, row_BS, _ = tapped.forward(*batch, pad_sequence=True)
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
    assert self.attention is None
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
    monkeypatch.setattr("abc_plugin.recovery.tap.Recording.look", lambda *_args: None)
    with pytest.raises(CreditError, match="was not called"):
        worker(tiny, monkeypatch, ShapingConfig("abc"))


def test_undecorated_finds_the_class_behind_ray():
    assert undecorated(RewardModelActor) is RewardModelActor.__ray_metadata__.modified_class
    assert undecorated(BaseModelActor) is BaseModelActor


@pytest.fixture(scope="module")
def policy(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny / "policy", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny / "policy")


OPTIONS = {"batch_size": 2, "max_len": 24, "max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0}


def test_rollouts_have_the_hosts_form(policy):
    model, tokenizer = policy
    prompts = ["I liked", "The plot of this film, which is long,", "A"]
    torch.manual_seed(0)
    responses = generate(model, tokenizer, prompts, **OPTIONS)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert response["observation_tokens"][: len(ids)] == ids
        assert response["action_ranges"] == [(len(ids), len(ids) + 6)]
        assert response["truncated"]


def test_padding_does_not_change_a_greedy_rollout(policy):
    model, tokenizer = policy
    prompts = ["I liked", "The plot of this film, which is long,", "A"]
    greedy = OPTIONS | {"temperature": 0.0}
    together = generate(model, tokenizer, prompts, **greedy | {"batch_size": 3})
    assert together == [generate(model, tokenizer, [prompt], **greedy)[0] for prompt in prompts]


def test_the_end_token_closes_the_response_and_belongs_to_it(policy):
    model, tokenizer = policy
    ids = tokenizer("I liked", add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id

    def output(input_ids, **_):
        tail = torch.tensor([[7, eos, tokenizer.pad_token_id, 9, 9, 9]]).expand(len(input_ids), -1)
        return torch.cat([input_ids, tail], 1)

    fake = SimpleNamespace(generate=output, device="cpu", generation_config=SimpleNamespace(eos_token_id=[eos, 5]))
    [response] = generate(fake, tokenizer, ["I liked"], **OPTIONS)
    assert response["observation_tokens"] == [*ids, 7, eos]
    assert response["action_ranges"] == [(2, 4)]
    assert not response["truncated"]


def test_long_prompts_lose_their_front_and_empty_ones_are_refused(policy):
    model, tokenizer = policy
    prompt = " film" * 40
    [response] = generate(model, tokenizer, [prompt], **OPTIONS)
    assert response["action_ranges"] == [(18, 24)]
    with pytest.raises(UserError, match="the prompt '' has no tokens"):
        generate(model, tokenizer, [""], **OPTIONS)
