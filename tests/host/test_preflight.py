"""What the Ray driver refuses before Ray is asked for anything, and what it makes of a worker's end."""

import errno
import shutil
from argparse import Namespace

import pytest
import ray
from conftest import local_flags
from recovery_models import tiny as tiny_model
from test_model_workers import worker

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import CannotWrite, CreditError, UserError, WorkerDied
from abc_plugin.host.import_openrlhf import import_host
from abc_plugin.output_directory import writing

import_host()

from abc_plugin.host import model_checks  # noqa: E402
from abc_plugin.host.arguments import announce  # noqa: E402
from abc_plugin.host.model_checks import preflight  # noqa: E402
from abc_plugin.host.ray_driver import _cause  # noqa: E402
from abc_plugin.local.flag_checks import parse_for_one_process  # noqa: E402


def checked(tiny, out, shaping=None, **changes):
    shaping = shaping or ShapingConfig("abc")
    args, _ = parse_for_one_process(local_flags(tiny, out, **changes), shaping)
    preflight(args, shaping)
    return args


@pytest.fixture
def headless(tiny, tmp_path):
    """The policy's weights where a reward model is expected."""
    return shutil.copytree(tiny / "policy", tmp_path / "headless")


def test_good_models_pass(tiny, tmp_path, capsys):
    assert checked(tiny, tmp_path).shaping_checked
    assert capsys.readouterr().out.count("seldom gains where the critic starts as the reward model") == 1
    # The kernels of the workers need not run on the driver's machine.
    assert checked(tiny, tmp_path, **{"ds.attn_implementation": "flash_attention_2"}).shaping_checked


@pytest.mark.parametrize(
    ("method", "estimator", "gamma", "tokens", "said"),
    [
        ("prefix", "rloo", 1, 8, "earned more with --algo.advantage.gamma 0.8"),
        ("prefix", "gae", 1, 8, "earned more with --algo.advantage.lambd 0.5"),
        ("abc_signed", "reinforce", 1, 110, None),
        ("abc_signed", "reinforce", 0.8, 30, None),
        ("abc_signed", "reinforce", 0.8, 64, "gamma 0.8 takes from most tokens of completions as long as 64"),
        ("abc_signed", "gae", 0.8, 64, None),
        ("prefix", "reinforce", 0.8, 110, None),
        ("prefix", "rloo", 0.8, 8, "--algo.advantage.gamma 0.8 discounts credit; without it OpenRLHF has 1 for rloo"),
        ("none", "rloo", 0.8, 8, None),
    ],
)
def test_a_horizon_is_told(tiny, tmp_path, capsys, method, estimator, gamma, tokens, said):
    changes = {"algo.advantage.estimator": estimator, "algo.advantage.gamma": gamma, "critic.model_name_or_path": None}
    changes |= {"rollout.max_new_tokens": tokens, "data.max_len": 128, "rollout.n_samples_per_prompt": 4}
    checked(tiny, tmp_path, ShapingConfig(method), **changes)
    told = [line for line in capsys.readouterr().out.splitlines() if "--algo.advantage." in line]
    assert len(told) == bool(said) and all(said in line for line in told)


@pytest.mark.parametrize("method", ["abc", "uniform", "none"])
def test_a_model_without_a_head_is_refused_whatever_the_method(tiny, tmp_path, headless, method):
    with pytest.raises(UserError, match="has no weight score.weight: it is no reward model"):
        checked(tiny, tmp_path, ShapingConfig(method), **{"reward.model_name_or_path": headless})


def test_prompts_are_read_before_any_worker(tiny, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="has no key 'input', only text; set --data.input_key"):
        checked(tiny, tmp_path, **{"data.prompt_dataset": tmp_path / "bad.jsonl"})


def test_models_of_other_machines_are_checked_by_the_worker(tiny, tmp_path, headless, monkeypatch, capsys):
    away = tmp_path / "away"
    args = checked(tiny, tmp_path, **{"actor.model_name_or_path": away, "reward.model_name_or_path": headless})
    assert args.shaping_checked is False
    assert f"not on this machine, so checked by the worker that loads it: {away}" in capsys.readouterr().out
    shutil.copytree(tiny / "policy", away)  # the worker has it
    with pytest.raises(UserError, match="has no weight score.weight"):
        worker(tiny, monkeypatch, args.shaping, args=args)


def test_map_needs_the_models_here(tiny, tmp_path):
    shaping = ShapingConfig("abc", tokenizer_check="map")
    with pytest.raises(UserError, match="map needs the models on the driver's machine too: .*away"):
        checked(tiny, tmp_path, shaping, **{"actor.model_name_or_path": tmp_path / "away"})


@pytest.mark.parametrize(
    "setting", [{"tokenizer_check": "map"}, {"tokenizer_check": "off"}, {"layer": "0"}, {"recovery": "tap"}]
)
def test_settings_that_a_remote_reward_cannot_heed(tiny, tmp_path, setting):
    changes = {"reward.model_name_or_path": None, "reward.remote_url": "http://x/get_reward"}
    args, _ = parse_for_one_process(local_flags(tiny, tmp_path), ShapingConfig())
    args.reward.remote_url = [changes["reward.remote_url"]]
    with pytest.raises(UserError, match="means nothing with --reward.remote_url: .*serve-rm takes --shaping.layer"):
        preflight(args, ShapingConfig("abc", **setting))


def test_a_remote_reward_is_told_what_to_send(tiny, tmp_path, capsys):
    args, _ = parse_for_one_process(local_flags(tiny, tmp_path), ShapingConfig())
    args.train.agent_func_path, args.reward.model_name_or_path = "agent.py", None
    preflight(args, ShapingConfig("abc"))
    assert "--train.agent_func_path is set: --reward_shaping abc needs credit_spans" in capsys.readouterr().out
    preflight(args, ShapingConfig("uniform"))
    assert capsys.readouterr().out == ""
    args.algo.advantage.estimator, args.algo.advantage.gamma = "reinforce", 0.8
    args.rollout.max_new_tokens, args.data.max_len = 110, 128
    preflight(args, ShapingConfig("abc_signed"))
    said = capsys.readouterr().out
    assert "needs contribution_spans" in said and "WARNING: --reward_shaping abc_signed leaves a rest" in said


@pytest.mark.parametrize(
    ("shaping", "changes", "warned"),
    [
        *((ShapingConfig(method), {}, True) for method in ("uniform", "abc", "abc_d", "abc_d2")),
        *((ShapingConfig(method), {}, False) for method in ("none", "grad_input")),
        (ShapingConfig("abc", 0.0), {}, False),
        (ShapingConfig("abc", share_base=True), {}, False),
        (ShapingConfig("abc"), {"algo.advantage.estimator": "reinforce"}, False),
        (ShapingConfig("abc"), {"critic.model_name_or_path": "the reward model"}, True),
        (ShapingConfig("abc"), {"critic.model_name_or_path": "the policy"}, False),
    ],
)
def test_dense_credit_on_top_of_a_critic_that_has_it_is_warned_of(tiny, tmp_path, capsys, shaping, changes, warned):
    paths = {"the reward model": tiny / "reward_model", "the policy": tiny / "policy"}
    flags = local_flags(tiny, tmp_path, **{key: paths.get(value, value) for key, value in changes.items()})
    announce(parse_for_one_process(flags, shaping)[0], shaping)
    said = "use --reward_shaping none or prefix with --algo.advantage.lambd 0.5\n"
    printed = capsys.readouterr().out
    assert printed.endswith(said) and printed.count("\n") == 1 if warned else printed == ""


def test_what_shapley_costs_is_said(tiny, tmp_path, capsys):
    checked(tiny, tmp_path, ShapingConfig("shapley", calls=5))
    said = "shapley runs the reward model 5 more times per response (--shaping.calls): 6 times the cost of scoring it"
    assert said in capsys.readouterr().out


CREATION = """The actor died because of an error raised in its creation task, ray::PPOTrainer.__init__() (pid=1)
  File "x.py", line 1, in f
           ^^^^^
{}"""


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("abc_plugin.errors.UserError: no such file", UserError, "^no such file$"),
        ("abc_plugin.errors.CreditError: no credit", CreditError, "^no credit$"),
        ("ValueError: 3", WorkerDied, "^a Ray worker could not start: ValueError: 3$"),
    ],
)
def test_a_worker_that_could_not_start_says_why(text, kind, message):
    died = ray.exceptions.RayActorError()
    died.error_msg = CREATION.format(text)
    with pytest.raises(kind, match=message):
        raise _cause(died)


def test_a_worker_that_died_says_how_to_go_on():
    died = ray.exceptions.ActorDiedError()
    wrapped = ray.exceptions.RayTaskError(
        "fit", "traceback", ray.exceptions.RayTaskError("forward", "traceback", died)
    )
    with pytest.raises(
        WorkerDied, match="a Ray worker died: .* go on from the last checkpoint with --ckpt.load_enable"
    ):
        raise _cause(wrapped)
    other = ray.exceptions.RayTaskError("fit", "traceback", ValueError("3"))
    assert _cause(other) is other
    ours = ray.exceptions.RayTaskError("fit", "traceback", CreditError("lost"))
    with pytest.raises(CreditError, match="lost"):
        raise _cause(ours)
    full = ray.exceptions.RayTaskError("save_model", "traceback", OSError(errno.ENOSPC, "x", "/out/model.safetensors"))
    with pytest.raises(CannotWrite, match="/out/model.safetensors cannot be written: No space"), writing("/out"):
        raise _cause(full)


def test_packing_is_refused_where_samples_would_mix():
    args = Namespace(ds=Namespace(packing_samples=True))
    model_checks._check_packing(args, "--actor.model_name_or_path", "m", tiny_model("llama").config)
    with pytest.raises(UserError, match="--ds.packing_samples, --actor.* m: .* would mix in its layers of .*DeltaNet"):
        model_checks._check_packing(args, "--actor.model_name_or_path", "m", tiny_model("qwen3_next").config)
