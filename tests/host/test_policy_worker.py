"""ABC-D: the policy's worker, what is refused before models load, and real runs whose credit is the eager one."""

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import local_flags
from transformers import AutoModelForCausalLM, AutoTokenizer

from abc_plugin.cli import main
from abc_plugin.config import ShapingConfig
from abc_plugin.credit import methods
from abc_plugin.errors import CreditError, UserError
from abc_plugin.host.import_openrlhf import import_host

import_host()

from openrlhf.models import Actor  # noqa: E402
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor  # noqa: E402

from abc_plugin.host import install as plugin  # noqa: E402
from abc_plugin.host import model_checks  # noqa: E402
from abc_plugin.host.arguments import parse  # noqa: E402
from abc_plugin.host.install import undecorated  # noqa: E402
from abc_plugin.host.model_checks import preflight  # noqa: E402
from abc_plugin.host.model_workers import CreditPolicyModel  # noqa: E402

CLUSTER = ["--actor.num_gpus_per_node", "1", "--vllm.num_engines", "0", "--rollout.batch_size", "8"]
NEEDS = {"abc_d": "policy", "abc_d2": "policy_last"}


def arguments(*words, reward=("--reward.model_name_or_path", "x")):
    return parse([*reward, *CLUSTER, *map(str, words)])


def worker(tiny, monkeypatch, shaping, **options):
    """A worker whose policy is the host's own Actor in fp32, without its process group."""
    torch.manual_seed(0)
    actor = Actor(str(tiny / "policy"), attn_implementation="sdpa", **options).float()

    def load(self, strategy, pretrain, max_steps=None, vllm_engines=None):
        self.strategy, self.actor = strategy, actor

    monkeypatch.setattr(undecorated(PolicyModelActor), "init_model_from_pretrained", load)
    self = object.__new__(CreditPolicyModel)
    args = arguments()
    args.shaping = shaping
    strategy = SimpleNamespace(args=args, ring_attn_group=None, print=print)
    self.init_model_from_pretrained(strategy, str(tiny / "policy"), max_steps=3, vllm_engines=None)
    return self


@pytest.fixture
def batch():
    """Padding on the right, on the left, none; two turns in row 0, a response of one token in row 2."""
    ids = torch.randint(10, 40000, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 8 + [0], [0] * 3 + [1] * 6, [1] * 9])
    actions = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0], [0] * 4 + [1] * 4, [0] * 7 + [1]])
    return ids, actions, mask


def eager_credit(model, ids_S, positions, *, last_only=False):
    """Credit of the tokens at ``positions`` of one sequence, from the full matrix, one number at a time."""
    with torch.no_grad():
        weights_SS = model(ids_S[None], output_attentions=True, use_cache=False).attentions[-1][0].float().mean(0)
    steps = [position - 1 for position in positions][-1 if last_only else 0 :]
    seen = [[weights_SS[step, position] for step in steps if step >= position] for position in positions]
    means = torch.tensor([sum(column) / len(column) if column else 0.0 for column in seen])
    return means / means.sum() if means.sum() > 0 else torch.full_like(means, 1 / len(means))


def eager(tiny, **options):
    return AutoModelForCausalLM.from_pretrained(tiny / "policy", attn_implementation="eager", **options).eval()


@pytest.mark.parametrize("method", NEEDS)
def test_log_probs_are_the_stock_ones_and_the_credit_the_eager_one(tiny, monkeypatch, batch, method):
    ids, actions, mask = batch
    stock = worker(tiny, monkeypatch, ShapingConfig("abc")).forward(*batch)
    assert isinstance(stock, torch.Tensor)
    log_probs, [evidence], _ = worker(tiny, monkeypatch, ShapingConfig(method)).forward(*batch)
    assert torch.equal(log_probs, stock)
    row_BS = evidence[NEEDS[method]]
    assert row_BS.dtype == torch.float32 and row_BS.shape == ids.shape and not row_BS[mask == 0].any()
    fields = {f"{NEEDS[method]}_BA": row_BS[:, 1:]}
    weights_BA = methods.load(method).weights(methods.Evidence(ids, actions, **fields))
    model = eager(tiny, dtype=torch.float32)
    for row in range(3):
        start = int(mask[row].argmax())
        tokens = actions[row].nonzero().flatten() + 1
        credit = weights_BA[row][actions[row].bool()]
        real, positions = ids[row, mask[row].bool()], (tokens - start).tolist()
        expected = eager_credit(model, real, positions, last_only=method == "abc_d2")
        torch.testing.assert_close(credit, expected, rtol=0, atol=1e-6)
        assert credit[-1] == (1 if row == 2 else 0)  # no step sees the last token


@pytest.mark.parametrize("shaping", [ShapingConfig("none"), ShapingConfig("abc"), ShapingConfig("abc_d", 0.0)])
def test_other_methods_leave_the_stock_worker(tiny, monkeypatch, batch, shaping):
    self = worker(tiny, monkeypatch, shaping)
    assert self.attention is None and isinstance(self.forward(*batch), torch.Tensor)
    plugin.install(shaping)
    try:
        assert importlib.import_module("openrlhf.cli.train_ppo_ray").PolicyModelActor is PolicyModelActor
    finally:
        plugin.uninstall()


@pytest.mark.parametrize("shaping", [ShapingConfig("abc_d"), None])
def test_on_ray_the_policys_worker_is_rebound_where_it_may_be_needed(shaping):
    lines = plugin.install(shaping)
    try:
        rebound = importlib.import_module("openrlhf.cli.train_ppo_ray").PolicyModelActor
        assert issubclass(undecorated(rebound), CreditPolicyModel)
        assert rebound._default_options == PolicyModelActor._default_options
        assert any("PolicyModelActor -> abc_plugin.host.model_workers.CreditPolicyModel" in line for line in lines)
    finally:
        plugin.uninstall()


def test_an_adapted_policy_is_read_below_its_adapter(tiny, monkeypatch, batch):
    lora = {"lora_rank": 4, "target_modules": "all-linear"}
    self = worker(tiny, monkeypatch, ShapingConfig("abc_d"), **lora)
    plain = worker(tiny, monkeypatch, ShapingConfig("abc_d"))
    base = self.forward(*batch).evidence[0]["policy"]
    torch.testing.assert_close(base, plain.forward(*batch).evidence[0]["policy"], rtol=0, atol=1e-6)  # B = 0 at first
    for name, parameter in self.actor.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    assert (self.forward(*batch).evidence[0]["policy"] - base).abs().max() > 1e-3
    with self.actor.model.disable_adapter():
        torch.testing.assert_close(self.forward(*batch).evidence[0]["policy"], base, rtol=0, atol=1e-6)


def test_generation_and_training_do_not_pay(tiny, monkeypatch, batch):
    self = worker(tiny, monkeypatch, ShapingConfig("abc_d"))
    monkeypatch.setattr(
        "abc_plugin.attention.query_key_tap.Recording.look", lambda *_: pytest.fail("a row was computed")
    )
    ids, actions, mask = batch
    self.actor.train()
    self.actor(ids, actions, mask).sum().backward()
    self.actor.model.generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0)


def test_a_tap_that_does_not_fire_stops_the_worker_at_the_start(tiny, monkeypatch):
    monkeypatch.setattr("abc_plugin.attention.query_key_tap.Recording.look", lambda *_: None)
    with pytest.raises(CreditError, match="was not called"):
        worker(tiny, monkeypatch, ShapingConfig("abc_d"))


def test_a_method_that_needs_both_rows_is_refused(monkeypatch):
    both = methods.share(lambda evidence: evidence.policy_BA, "policy", "policy_last")
    monkeypatch.setattr(methods, "load", lambda name: both)
    with pytest.raises(UserError, match="--reward_shaping abc_d needs policy and policy_last at once"):
        methods.policy_need(ShapingConfig("abc_d"))


def test_what_cannot_be_read_is_refused_before_models_load(tiny, tmp_path):
    args = arguments("--actor.model_name_or_path", tiny / "policy", "--ds.attn_implementation", "eager")
    model_checks.check_policy(args, ShapingConfig("abc_d"))
    args.ds.ring_attn_size = 2
    model_checks.check_policy(args, ShapingConfig("abc"))
    with pytest.raises(UserError, match=r"--reward_shaping abc_d reads .* which --ds.ring_attn_size 2 splits; leave"):
        model_checks.check_policy(args, ShapingConfig("abc_d"))
    args.ds.ring_attn_size = 1
    with pytest.raises(UserError, match="reads the policy .*policy: layer 9 is out of range"):
        model_checks.check_policy(args, ShapingConfig("abc_d", layer="9"))
    shutil.copytree(tiny / "policy", tmp_path / "policy")
    (tmp_path / "policy/config.json").write_text(json.dumps({"model_type": "mamba2"}))
    args.actor.model_name_or_path = str(tmp_path / "policy")
    with pytest.raises(UserError, match="reads the policy .*policy: Mamba2Model is not supported"):
        model_checks.check_policy(args, ShapingConfig("abc_d"))


def test_a_rule_may_be_credited_by_the_policy(tiny):
    """With a remote reward no reward model is here: the policy is checked, and its layer may be chosen."""
    rule = ("--reward.remote_url", "rule.py")
    words = ["--actor.model_name_or_path", tiny / "policy", "--ds.attn_implementation", "eager"]
    args = arguments(*words, reward=rule)
    preflight(args, ShapingConfig("abc_d", layer="0"))
    with pytest.raises(UserError, match="layer 9 is out of range"):
        preflight(args, ShapingConfig("abc_d", layer="9"))
    with pytest.raises(UserError, match="--shaping.layer 0 means nothing with --reward.remote_url"):
        preflight(args, ShapingConfig("abc", layer="0"))


@pytest.fixture(scope="module")
def runs(tiny, local_runs, tmp_path_factory):
    """Two PPO steps by each method, all completions recorded."""
    done = {}
    for method in NEEDS:
        out = tmp_path_factory.mktemp(method)
        changes = {"data.max_samples": 16, "shaping.show_every": 1, "shaping.show_samples": 8}
        done[method] = (out, local_runs.done(local_flags(tiny, out, reward_shaping=method, **changes)))
    return done


@pytest.mark.parametrize("method", NEEDS)
def test_a_local_run_gives_the_first_policys_eager_credit(tiny, runs, method):
    out, output = runs[method]
    log = (out / "run.log").read_text()
    assert "done: 2 steps" in output and "abc_plugin: policy: attention row of layer 1 of 2" in log
    assert "abc_plugin: credit arrived: 8 responses" in log
    lines = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 8 + [2] * 8
    for line in lines:
        assert sum(line["shaped_reward"]) == pytest.approx(line["spread_reward"], abs=1e-4)
        assert line["credit"][-1] == 0
    model, tokenizer = eager(tiny, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(tiny / "policy")
    for line in lines[:8]:
        prompt = tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(prompt) == line["prompt"]
        positions = list(range(len(prompt), len(prompt) + len(line["ids"])))
        expected = eager_credit(model, torch.tensor(prompt + line["ids"]), positions, last_only=method == "abc_d2")
        credit = torch.tensor(line["credit"])
        assert (credit - expected).abs().sum() < 2e-2  # bf16
        assert (credit - 1 / len(credit)).abs().sum() > 0.1  # uniform would not pass


def test_evaluate_attributes_by_the_policy(tiny, runs, tmp_path):
    samples = tmp_path / "samples.jsonl"
    words = ["--actor.model_name_or_path", tiny / "policy", "--reward.model_name_or_path", tiny / "reward_model"]
    words += ["--data.prompt_dataset", tiny / "heldout.jsonl", "--data.max_len", 48, "--rollout.max_new_tokens", 6]
    words += ["--reward_shaping", "abc_d", "--out", samples]
    assert main(["evaluate", *map(str, words)]) == 0
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert lines
    for line in lines:
        assert line["credit"][-1] == 0 and sum(line["credit"]) == pytest.approx(1, abs=1e-5)
