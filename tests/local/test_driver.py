"""The local driver, for real: OpenRLHF's train() on tiny models, in processes of their own."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import local_flags, run_python
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from abc_plugin.cli import main
from abc_plugin.report.records import read_records

# The stock host in one process: everything of this driver but the plugin's experience maker and reward-model worker.
STOCK = """
import sys
from abc_plugin.host.imports import import_host
import_host()
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ray.launcher import RewardModelActor
from openrlhf.trainer.ray.ppo_critic import CriticModelActor
from abc_plugin.local import driver as local
from abc_plugin.host import trainers, worker
trainers.CreditExperienceMaker = RemoteExperienceMaker
worker.CreditRewardModel = RewardModelActor
worker.RestoredCritic = CriticModelActor
sys.exit(local.main(sys.argv[1:]))
"""


def scalars(out):
    [directory] = (out / "tensorboard").iterdir()
    events = EventAccumulator(str(directory)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Runs with equal flags but for the shaping: the stock host, none, beta 0 and abc."""
    wanted = {
        "stock": (["-c", STOCK], []),
        "none": (["-m", "abc_plugin", "local"], []),
        "beta0": (["-m", "abc_plugin", "local"], ["--reward_shaping", "abc", "--shaping.beta", "0"]),
        "abc": (["-m", "abc_plugin", "local"], ["--reward_shaping", "abc"]),
    }
    done = {}
    for name, (command, flags) in wanted.items():
        out = tmp_path_factory.mktemp(name)
        result = run_python(*command, *local_flags(tiny, out), *flags)
        assert result.returncode == 0, result.stderr[-3000:]
        done[name] = (out, result)
    return done


@pytest.mark.parametrize("name", ["none", "beta0"])
def test_shaping_off_trains_bit_identically_to_the_stock_host(runs, name):
    stock, other = (load_file(runs[run][0] / "model.safetensors") for run in ("stock", name))
    assert stock.keys() == other.keys()
    assert all(torch.equal(stock[key], other[key]) for key in stock)
    stock, other = scalars(runs["stock"][0]), scalars(runs[name][0])
    timings = {tag for tag in stock if "timing" in tag}
    assert {t: v for t, v in stock.items() if t not in timings} == {t: v for t, v in other.items() if t not in timings}


def test_abc_trains_another_policy_and_logs_its_metrics(runs, tiny):
    out, result = runs["abc"]
    assert "done: 3 steps" in result.stdout
    before, none, after = (load_file(path / "model.safetensors") for path in (tiny / "policy", runs["none"][0], out))
    key = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[key], after[key])
    assert not torch.equal(none[key], after[key])
    values = scalars(out)
    for metric in ("entropy", "last_token", "special_tokens", "conservation_error"):
        assert len(values[f"train/credit_{metric}"]) == 3
    assert max(values["train/credit_conservation_error"]) < 1e-6
    assert 0 < values["train/credit_entropy"][0] < 2.08  # ln 8: below uniform
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["reward_mean"] == pytest.approx(sum(values["train/rollout/reward_mean"]) / 3, abs=1e-6)


def test_completions_are_recorded_and_shown(runs, capsys):
    for method in ("none", "abc"):
        out, result = runs[method]
        records, notes = read_records(out / "completions.jsonl")
        assert [record.step for record in records] == [1] * 4 and notes == []
        assert f"completions: abc-rlhf show {out}" in result.stdout
        for record in records:
            assert sum(record.credit) == pytest.approx(1.0, abs=1e-4)
            assert (max(record.credit) == 1.0) == (method == "none" or len(record.tokens) == 1)
            assert sum(record.columns["shaped_reward"]) == pytest.approx(record.spread_reward, abs=1e-3)
            assert set(record.columns) == {"shaped_reward", "kl_penalty", "value", "advantage", "return"}
        assert main(["show", str(out)]) == 0
        said = capsys.readouterr().out
        assert "step 1 · sample" in said and "recorded steps: 1" in said
    [directory] = (out / "tensorboard").iterdir()
    [picture] = EventAccumulator(str(directory)).Reload().Images("completions/credit")
    assert picture.step == 1 and picture.width > 1000


def test_the_trained_policy_loads_in_transformers_and_evaluates(runs, tiny, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    out, _ = runs["abc"]
    AutoModelForCausalLM.from_pretrained(out)
    samples = tmp_path / "samples.jsonl"
    flags = {
        "actor.model_name_or_path": out,
        "reward.model_name_or_path": tiny / "reward_model",
        "data.prompt_dataset": tiny / "heldout.jsonl",
        "data.max_len": 48,
        "rollout.max_new_tokens": 8,
        "rollout.micro_batch_size": 5,
        "reward_shaping": "abc",
        "out": samples,
    }
    words = ["evaluate", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    assert main(words) == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    prompts = [json.loads(line)["input"] for line in (tiny / "heldout.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    mean = sum(line["reward"] for line in lines) / len(lines)
    assert f"mean reward {mean:.4f}" in said
    for line in lines:
        assert 1 <= len(line["tokens"]) <= 8
        assert len(line["credit"]) == len(line["tokens"])
        assert sum(line["credit"]) == pytest.approx(1.0, abs=1e-5)
    again = tmp_path / "again.jsonl"
    assert main([*words, "--out", str(again)]) == 0  # the same seed samples the same completions
    assert again.read_text() == samples.read_text()


def test_interrupt_keeps_the_checkpoints_and_resume_goes_on(tiny, tmp_path):
    flags = local_flags(
        tiny, tmp_path, **{"ckpt.save_steps": 1, "train.num_episodes": 50, "reward_shaping": "uniform"}
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "abc_plugin", "local", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs inherit it ignored
    )
    complete = tmp_path / "checkpoints" / "complete"
    deadline = time.time() + 200
    while time.time() < deadline and not list(complete.glob("*/manifest.json")):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err[-2000:]
    step = max(int(path.parent.name.removeprefix("global_step")) for path in complete.glob("*/manifest.json"))
    assert re.search(rf"stopped; checkpoints kept: step ([\d, ]+, )?{step} in {tmp_path}/checkpoints;", out)
    flags = local_flags(tiny, tmp_path, **{"train.num_episodes": step // 3 + 1, "reward_shaping": "uniform"})
    result = run_python("-m", "abc_plugin", "local", *flags, "--ckpt.load_enable")
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"done: {(step // 3 + 1) * 3} steps ({step} of them before the checkpoint)" in result.stdout


@pytest.mark.parametrize("method", ["abc", "uniform"])
def test_the_algorithms_of_the_host_run_with_credit(tiny, tmp_path, method):
    """A critic-free estimator with several samples per prompt, KL as a loss and ZeRO-3."""
    flags = local_flags(
        tiny,
        tmp_path,
        **{
            "algo.advantage.estimator": "group_norm",
            "rollout.n_samples_per_prompt": 2,
            "rollout.batch_size": 4,
            "data.max_samples": 8,
            "algo.kl.estimator": "k3",
            "ds.zero_stage": 3,
            "reward_shaping": method,
        },
    )
    result = run_python("-m", "abc_plugin", "local", *flags, "--algo.kl.use_loss")
    assert result.returncode == 0, result.stderr[-3000:]
    assert max(scalars(tmp_path)["train/credit_conservation_error"]) < 1e-6
