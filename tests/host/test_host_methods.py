"""Methods, options and ensembles in real runs: OpenRLHF's train() in this process, and what is refused before it."""

import json
import math
import re
import shutil

import pytest
import torch
from conftest import as_words, local_flags, run_settings
from local_runs import scalars
from safetensors.torch import load_file, save_file

from abc_plugin.cli import main
from abc_plugin.config import ShapingConfig, split_flags
from abc_plugin.errors import UserError
from abc_plugin.host.import_openrlhf import import_host

import_host()

from abc_plugin.host import model_checks  # noqa: E402
from abc_plugin.host.arguments import parse, reward_models  # noqa: E402
from abc_plugin.host.model_checks import preflight  # noqa: E402
from abc_plugin.local.flag_checks import parse_for_one_process  # noqa: E402
from abc_plugin.text.segment_ends import segment_ends  # noqa: E402


@pytest.fixture(scope="module")
def second(tiny, tmp_path_factory):
    """A second reward model: the first one's trunk with another head."""
    directory = tmp_path_factory.mktemp("second") / "reward_model"
    shutil.copytree(tiny / "reward_model", directory)
    weights = load_file(directory / "model.safetensors")
    weights["score.weight"] = weights["score.weight"].flip(1).contiguous()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


OPTIONS = {"shaping.drop": "special,sinks", "shaping.entropy_floor": 0.99, "shaping.heads": "1"}
RUNS = {  # each makes one step, which warms up; "prefix" two
    "prefix": {"reward_shaping": "prefix", "shaping.beta": 0.5, "data.max_samples": 16},
    "grad_input": {"reward_shaping": "grad_input", "shaping.segment": "sentence"},
    "options": {"reward_shaping": "abc", **OPTIONS},
    "both": {
        "reward_shaping": "prefix",
        "reward.model_name_or_path": "both",
        "algo.advantage.estimator": "group_norm",
        "rollout.n_samples_per_prompt": 2,
    },
    "signed": {"reward_shaping": "abc_signed"},
    "shapley": {"reward_shaping": "shapley", "shaping.calls": 3},
}


@pytest.fixture(scope="module")
def runs(tiny, second, local_runs, tmp_path_factory):
    """The scalars that each run logged, and where it wrote."""
    base = tmp_path_factory.mktemp("runs")
    both = f"{tiny / 'reward_model'},{second}"
    for name, changes in RUNS.items():
        path = both if "reward.model_name_or_path" in changes else tiny / "reward_model"
        changes = {"data.max_samples": 8, "shaping.show_every": 0} | changes | {"reward.model_name_or_path": path}
        local_runs.done(local_flags(tiny, base / name, **changes))
    return {name: (logged(base / name), base / name) for name in RUNS}


def logged(out):
    return {tag.removeprefix("train/"): [value for _, value in points] for tag, points in scalars(out).items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_logs_its_credit_and_conserves_the_reward(runs, name):
    figures, _ = runs[name]
    assert max(figures["credit_conservation_error"]) < 1e-5
    signed = RUNS[name]["reward_shaping"] in ("prefix", "grad_input", "abc_signed", "shapley")
    assert ("credit_negative_share" in figures) == signed
    assert ("credit_disagreement" in figures) == ("reward_disagreement" in figures) == name.startswith("both")
    assert ("shapley_segments" in figures) == (name == "shapley")
    assert ("credit_scale" in figures) == (name == "signed")
    if name in ("prefix", "grad_input", "shapley"):
        assert 0.0 < figures["credit_negative_share"][0] < 1.0


def test_prefix_credit_trains_the_policy(runs, tiny):
    before, after = (load_file(path / "model.safetensors") for path in (tiny / "policy", runs["prefix"][1]))
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_options_act_in_a_run(runs):
    figures = runs["options"][0]
    assert figures["credit_last_token"] == [0.0]
    assert figures["credit_entropy"][0] == pytest.approx(0.99 * math.log(7), abs=1e-4)  # the floor, of 7 tokens kept
    assert runs["grad_input"][0]["credit_last_token"][0] > 0.5  # few sentences end in 8 random tokens


def test_an_ensemble_says_how_far_apart_it_is(runs):
    both = runs["both"][0]
    assert both["reward_disagreement"][0] > 0.1
    assert 0.005 < both["credit_disagreement"][0] <= 1.0


def refused(tiny, out, on_ray=False, **changes):
    """The error with which a run of these settings is refused."""
    settings = run_settings(tiny, out) | changes
    if on_ray:
        settings |= {"vllm.num_engines": 1, "actor.num_gpus_per_node": 1}
    shaping, words = split_flags(as_words(settings))
    with pytest.raises(UserError) as error:
        if on_ray:
            preflight(parse(words), shaping)
        else:
            args, _ = parse_for_one_process(words, shaping)
            model_checks.check_models(args, shaping)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_shaping": "grad_input", "ds.zero_stage": 3}, "ZeRO-3 frees each layer's weights"),
        ({"reward_shaping": "grad_input", "reward.offload": True}, "--reward.offload True stands in the way"),
        ({"reward_shaping": "grad_input", "shaping.drop": "special"}, "gives signed credit.*leave --shaping.drop"),
        ({"reward_shaping": "prefix", "shaping.entropy_floor": 0.5}, "gives signed credit.*--shaping.entropy_floor"),
        ({"reward_shaping": "prefix", "shaping.layer": "0"}, "prefix reads no attention: leave --shaping.layer 0 out"),
        ({"reward_shaping": "uniform", "shaping.heads": "0"}, "uniform reads no attention: leave --shaping.heads"),
        ({"reward_shaping": "abc_d", "shaping.heads": "0"}, "abc_d reads the policy's attention: leave"),
        ({"reward_shaping": "abc_signed", "shaping.drop": "special"}, "gives signed credit.*leave --shaping.drop"),
        ({"reward_shaping": "abc_signed", "shaping.layer": "0"}, "layer 0 of 2 is to be read, .*give --shaping.layer"),
        ({"reward_shaping": "abc_signed", "ds.tensor_parallel_size": 2}, "it splits each layer over processes"),
        ({"reward_shaping": "abc_signed", "shaping.calls": 8}, "reads no parts of a response: .*or use shapley"),
        ({"reward_shaping": "abc", "shaping.heads": "0,9"}, "--shaping.heads 9: the layer has 2 heads, 0 to 1"),
        ({"reward_shaping": "prefix", "shaping.tokenizer_check": "map"}, "the reward model's tokens end elsewhere"),
        ({"reward_shaping": "abc", "shaping.segment": "turn"}, "a response is one turn.*use sentence"),
        ({"shaping.layer": "0"}, "--shaping.layer 0 changes credit, and --reward_shaping none gives none"),
    ],
)
def test_settings_that_a_method_cannot_heed_are_refused(tiny, tmp_path, changes, message):
    assert re.search(message, refused(tiny, tmp_path, **changes))


@pytest.mark.parametrize("method", ["prefix", "grad_input", "shapley"])
def test_a_remote_reward_has_attention_only(tiny, tmp_path, method):
    remote = {"reward.remote_url": "http://localhost:1/", "reward.model_name_or_path": None}
    said = refused(tiny, tmp_path, on_ray=True, reward_shaping=method, **remote)
    assert f"--reward_shaping {method} needs the reward model here" in said


def test_lists_of_reward_models_are_checked_one_by_one(tiny, second, other, tmp_path):
    paths = {
        f"{tiny / 'reward_model'},{tiny / 'reward_model'}": "give each reward model once",
        f"{tiny / 'reward_model'},": "give each reward model once",
        f"{tiny / 'reward_model'},{tmp_path / 'none'}": f"{tmp_path / 'none'}: no such directory",
        f"{tiny / 'reward_model'},{other / 'reward_model'}": "must share a tokenizer",
        f"{tiny / 'reward_model'},{tiny / 'policy'}": "has no weight score.weight",
    }
    for given, message in paths.items():
        assert message in refused(tiny, tmp_path, reward_shaping="abc", **{"reward.model_name_or_path": given})
    both = {"reward.model_name_or_path": f"{tiny / 'reward_model'},{second}", "algo.advantage.estimator": "gae"}
    args, _ = parse_for_one_process(local_flags(tiny, tmp_path, **both), ShapingConfig("abc"))
    model_checks.check_models(args, args.shaping)
    assert reward_models(args) == [str(tiny / "reward_model"), str(second)]
    assert args.critic.model_name_or_path == str(tiny / "reward_model")


def test_a_bidirectional_reward_model_has_no_score_of_a_prefix(tiny, tmp_path):
    from transformers import AutoConfig

    args, _ = parse_for_one_process(local_flags(tiny, tmp_path), ShapingConfig("prefix"))
    config = AutoConfig.for_model("bert", hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    with pytest.raises(UserError, match="BertModel reads its tokens in both directions"):
        model_checks.check_readers(args, "x", config, ShapingConfig("prefix"))


def test_sentences_end_where_their_last_token_is_written(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "policy")
    text = 'A dull film. Why?\nShe said "no." Then 3'
    ids = torch.tensor([tokenizer(" ")["input_ids"][:1] + tokenizer(text)["input_ids"]])
    mask = torch.ones(1, ids.shape[1] - 1, dtype=torch.long)
    ends = segment_ends("sentence", tokenizer, ids, mask)[0]
    closing = [tokenizer.decode([token]) for token, end in zip(ids[0, 1:].tolist(), ends.tolist(), strict=True) if end]
    assert [piece.strip(" ") for piece in closing] == [".", "?", "\n", '."', "3"]
    assert segment_ends("none", tokenizer, ids, mask) is None
    mask[0, 3:6] = 0  # two turns
    turns = segment_ends("turn", tokenizer, ids, mask)[0].nonzero().flatten().tolist()
    assert turns == [2, ids.shape[1] - 2]


@pytest.mark.parametrize("method", ["abc_signed", "shapley"])
def test_evaluate_gives_signed_shares_of_an_ensemble(tiny, second, tmp_path, method):
    out = tmp_path / "samples.jsonl"
    paths = {"reward.model_name_or_path": f"{tiny / 'reward_model'},{second}", "data.max_samples": 4}
    words = local_flags(tiny, tmp_path, reward_shaping=method, **paths)
    assert main(["evaluate", *words, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert sum(map(abs, line["credit"])) == pytest.approx(1.0, abs=1e-5)
        assert len(line["tokens"]) == len(line["credit"])
