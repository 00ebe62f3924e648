"""LoRA and QLoRA, for real: OpenRLHF's train() on tiny models, and what plain transformers makes of the results."""

import json
import re
import sys
from argparse import Namespace

import pytest
import torch
from conftest import as_words, local_flags
from peft import PeftModel
from safetensors.torch import load_file
from test_quantised import distance
from transformers import AutoModelForCausalLM

from abc_plugin.cli import main
from abc_plugin.config import ShapingConfig, split_flags
from abc_plugin.errors import UserError
from abc_plugin.host.import_openrlhf import import_host

import_host()

from abc_plugin.host.model_checks import preflight  # noqa: E402
from abc_plugin.host.model_workers import keep_gradients_exact  # noqa: E402
from abc_plugin.local import flag_checks  # noqa: E402
from abc_plugin.local.lora import NF4  # noqa: E402

IDS = torch.randint(3, 280, (4, 16), generator=torch.Generator().manual_seed(0))  # the probe's
COMMON = {"reward_shaping": "abc", "actor.adam.lr": 1e-2, "ds.lora.rank": 4, "ds.param_dtype": "bf16"}
RUNS = {
    "qlora": {
        "ds.load_in_4bit": True,
        "local.share_base": True,
        "local.merge_adapter": True,
        "actor.gradient_checkpointing_enable": True,
        "ds.lora.dropout": 0.1,
    },
    "lora": {"ds.zero_stage": 3, "ds.lora.target_modules": "q_proj", "critic.save_value_network": True},
}


@pytest.fixture(scope="module")
def runs(tiny, local_runs, tmp_path_factory):
    """Per run: its directory, what it printed, and what the probe saw."""
    done = {}
    for name, changes in RUNS.items():
        out = tmp_path_factory.mktemp(name)
        critic = {"critic.model_name_or_path": tiny / "policy"} if "local.share_base" in changes else {}
        flags = local_flags(tiny, out, **COMMON | changes | critic)
        said = local_runs.done(flags, variant=("probed", str(out / "facts.pt")))
        done[name] = (out, said, torch.load(out / "facts.pt", weights_only=False))
    return done


@pytest.mark.parametrize("name", RUNS)
def test_adapters_and_value_head_are_trained_and_nothing_else(runs, name):
    _, _, facts = runs[name]
    for model in ("policy", "critic"):
        assert facts[model]["changed"] == facts[model]["trained"]
        assert len(facts[model]["trained"]) == {"qlora": 28, "lora": 4}[name] + (model == "critic")
    heads = [parameter for parameter in facts["dtypes"] if "lora_" not in parameter]
    assert heads == ["base_model.model.score.modules_to_save.default.weight"]
    assert set(facts["dtypes"].values()) == {torch.bfloat16}


@pytest.mark.parametrize("name", RUNS)
def test_credit_arrives_and_the_first_step_has_no_kl(runs, name):
    history = runs[name][2]["history"]
    assert len(history) == 3
    assert history[0]["kl"] == 0
    assert all(step["credit_conservation_error"] < 1e-6 for step in history)
    assert all(0 < step["credit_entropy"] < 2.08 for step in history)


@pytest.mark.parametrize("name", RUNS)
def test_the_reference_is_the_base_alone_to_the_bit(runs, name):
    facts = runs[name][2]
    assert torch.equal(facts["reference"], facts["base"])
    assert (facts["log_probs"] - facts["base"]).abs().max() > 0.01


def test_a_shared_base_is_held_once_and_updates_stay_apart(runs):
    facts = runs["qlora"][2]
    adapters = 28 * 2 * 4 * 64 * 2  # an upper bound: tensors, rank, widest layer, bytes
    assert facts["policy_bytes"] < facts["bytes"] < facts["policy_bytes"] + adapters
    assert facts["touched"] == []
    assert runs["lora"][2]["touched"] == []


def test_the_reward_models_head_is_not_quantised(runs, tiny):
    score = load_file(tiny / "reward_model" / "model.safetensors")["score.weight"]
    assert torch.equal(runs["qlora"][2]["score"], score.bfloat16())


@pytest.mark.parametrize("name", RUNS)
def test_plain_transformers_and_peft_load_the_trained_policy(runs, tiny, name, monkeypatch):
    out, said, facts = runs[name]
    monkeypatch.chdir("/")  # the base's path must not depend on where one stands
    kwargs = {"dtype": torch.bfloat16, "quantization_config": NF4 if name == "qlora" else None}
    base = AutoModelForCausalLM.from_pretrained(tiny / "policy", **kwargs)
    for model in (
        AutoModelForCausalLM.from_pretrained(out, **kwargs),
        PeftModel.from_pretrained(base, out, autocast_adapter_dtype=False),
    ):
        if name == "lora":  # DeepSpeed's ZeRO-3 rounds the rotary frequencies, which no checkpoint holds, to bf16
            for buffer in dict(model.named_buffers()).values():
                buffer.copy_(buffer.bfloat16())
        assert torch.equal(logits(model), facts["logits"])
    assert f'AutoModelForCausalLM.from_pretrained("{out}", dtype=torch.bfloat16' in said
    assert ("load_in_4bit" in said) == (name == "qlora")


def test_the_merged_policy_loads_as_a_plain_model(runs, tiny):
    out, said, facts = runs["qlora"]
    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert f"merged: {out}/merged" in said
    base = AutoModelForCausalLM.from_pretrained(tiny / "policy", dtype=torch.bfloat16)
    assert distance(logits(model), facts["logits"]) < 0.03 < distance(logits(base), facts["logits"])
    assert not (runs["lora"][0] / "merged").exists()


def logits(model):
    keep_gradients_exact(model)  # on this CPU bitsandbytes would fail on layers as narrow as these
    with torch.no_grad():
        return model.eval()(IDS, attention_mask=torch.ones_like(IDS)).logits.float()


def test_the_critic_is_saved_with_its_value_head(runs):
    directory = runs["lora"][0].with_name(runs["lora"][0].name + "_critic")
    weights = load_file(directory / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in weights
    assert len(weights) == 5


def test_an_adapter_evaluates(runs, tiny, tmp_path, capsys):
    flags = {
        "actor.model_name_or_path": runs["qlora"][0],
        "reward.model_name_or_path": tiny / "reward_model",
        "data.prompt_dataset": tiny / "heldout.jsonl",
        "data.max_len": 48,
        "rollout.max_new_tokens": 8,
        "rollout.micro_batch_size": 8,
        "reward_shaping": "abc",
        "out": tmp_path / "samples.jsonl",
    }
    assert main(["evaluate", *as_words(flags), "--ds.load_in_4bit"]) == 0
    assert "over 16 completions" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_that_split_a_4_bit_base_save_one_policy(tiny, local_runs, tmp_path):
    changes = {"ds.load_in_4bit": True, "ds.zero_stage": 3, "local.merge_adapter": True}
    local_runs.done(local_flags(tiny, tmp_path, **COMMON | changes), ranks=2)
    adapter = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=NF4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny / "policy", dtype=torch.bfloat16)
    assert distance(logits(merged), logits(adapter)) < 0.03 < distance(logits(base), logits(adapter))


Q = {"ds.load_in_4bit": True, "ds.lora.rank": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ds.load_in_4bit": True}, "nothing to train; add --ds.lora.rank 16"),
        ({"ds.lora.rank": -1}, "--ds.lora.rank -1, --ds.lora.alpha 16, --ds.lora.dropout 0: rank and alpha must be 1"),
        ({"ds.lora.rank": 4, "ds.lora.dropout": 1}, "dropout in [0, 1)"),
        ({"ds.lora.alpha": 8}, "--ds.lora.alpha 8 means nothing without --ds.lora.rank"),
        ({"ds.lora.target_modules": "q_proj"}, "--ds.lora.target_modules q_proj means nothing without --ds.lora.rank"),
        ({"local.share_base": True}, "--local.share_base means nothing without --ds.lora.rank; add --ds.lora.rank 16"),
        ({"local.merge_adapter": True}, "--local.merge_adapter means nothing without --ds.lora.rank"),
        ({"local.share_bases": True}, "unknown flag --local.share_bases; the plugin's flags are"),
        (Q | {"ds.param_dtype": "fp16"}, "--ds.param_dtype fp16 does not go with --ds.load_in_4bit; use bf16"),
        (Q | {"local.share_base": True}, "is another model than the policy; add --critic.model_name_or_path"),
        (
            Q | {"local.share_base": True, "ds.zero_stage": 3, "critic.model_name_or_path": True},
            "--local.share_base does not go with --ds.zero_stage 3, which splits the base; use 2",
        ),
        (
            Q | {"local.share_base": True, "algo.advantage.estimator": "reinforce"},
            "there is no critic with --algo.adv",
        ),
    ],
)
def test_settings_that_do_not_fit(tiny, tmp_path, changes, message):
    if changes.get("critic.model_name_or_path"):
        changes = changes | {"critic.model_name_or_path": tiny / "policy"}
    with pytest.raises(UserError, match=re.escape(message)):
        flag_checks.check_lora(parsed(local_flags(tiny, tmp_path, **changes)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["c_attn"],
            "match no layer; its linear layers are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (["norm"], "Target module LlamaRMSNorm((32,), eps=1e-05) is not supported"),
        (["lm_head"], "its output layer is tied to its embedding"),
        (["q_proj", "vv_proj"], "--ds.lora.target_modules vv_proj matches no layer of policy or critic"),
    ],
)
def test_targets_that_match_nothing(tiny, tmp_path, targets, message):
    words = [*local_flags(tiny, tmp_path, **{"ds.lora.rank": 4}), "--ds.lora.target_modules", *targets]
    with pytest.raises(UserError, match=re.escape(message)):
        flag_checks.check_lora_targets(parsed(words))


def parsed(words):
    shaping, words = split_flags(words)
    return flag_checks.parse_for_one_process(words, shaping)[0]


def refused(capsys, words):
    assert main(["local", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("abc-rlhf: error: ")
    return error


def test_models_that_cannot_be_quantised_or_trained(tiny, tmp_path, capsys, runs, monkeypatch):
    config = json.loads((tiny / "policy" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": NF4.to_dict()}))
    words = local_flags(tiny, tmp_path, **Q | {"actor.model_name_or_path": tmp_path})
    with pytest.raises(UserError, match=f"--actor.model_name_or_path {tmp_path} is quantised already .bitsandbytes.;"):
        flag_checks.check_lora_targets(parsed(words))
    for model in ("actor", "reward"):
        error = refused(capsys, local_flags(tiny, tmp_path, **{f"{model}.model_name_or_path": runs["lora"][0]}))
        assert f"--{model}.model_name_or_path {runs['lora'][0]} is a LoRA adapter of {tiny / 'policy'}" in error
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "--ds.load_in_4bit needs bitsandbytes" in refused(capsys, local_flags(tiny, tmp_path, **Q))


@pytest.mark.parametrize(("name", "value"), [("rank", 8), ("load_in_4bit", True)])
def test_on_ray_adapters_are_refused_by_name(name, value):
    lora = Namespace(rank=value if name == "rank" else 0)
    args = Namespace(ds=Namespace(lora=lora, load_in_4bit=name == "load_in_4bit"))
    with pytest.raises(
        UserError, match=rf"--ds\.(lora\.)?{name} {value} does not work on Ray: .*; use abc-rlhf local"
    ):
        preflight(args, ShapingConfig())
