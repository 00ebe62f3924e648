"""The local driver, for real: OpenRLHF's train() on tiny models, in processes of their own."""

import json
import re
import shutil
import signal

import pytest
import torch
from conftest import as_words, local_flags, run_python
from local_runs import scalars, summary, untimed, weights
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from abc_plugin.cli import main
from abc_plugin.report.recorded_completions import read_records

AGAIN = {"ckpt.save_steps": 2, "ckpt.load_enable": True}
RUNS = {"none": {}, "beta0": {"reward_shaping": "abc", "shaping.beta": 0}}
WITHOUT_RAY = "import sys; sys.modules['ray'] = None; from abc_plugin.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def runs(tiny, local_runs, tmp_path_factory):
    """Directory and output of runs with equal flags but for the shaping: the stock host, none, beta 0 and abc."""
    out = {name: tmp_path_factory.mktemp(name) for name in ("stock", *RUNS, "abc")}

    def flags(name, **changes):
        return local_flags(tiny, out[name], **{"ds.param_dtype": "bf16"} | changes)  # the host's default

    said = {name: local_runs.done(flags(name, **changes)) for name, changes in RUNS.items()}
    said["stock"] = local_runs.done(flags("stock"), variant=("stock", None))
    abc = run_python("-c", WITHOUT_RAY, "local", *flags("abc", reward_shaping="abc"))
    assert abc.returncode == 0, abc.stderr[-3000:]
    return {name: (out[name], said.get(name, abc.stdout)) for name in out}


@pytest.mark.parametrize("name", RUNS)
def test_shaping_off_trains_bit_identically_to_the_stock_host(runs, name):
    stock, other = (weights(runs[run][0]) for run in ("stock", name))
    assert stock.keys() == other.keys()
    assert all(torch.equal(stock[key], other[key]) for key in stock)
    assert untimed(scalars(runs["stock"][0])) == untimed(scalars(runs[name][0]))


def test_abc_trains_another_policy_and_logs_its_metrics(runs, tiny):
    out, said = runs["abc"]
    assert "done: 3 steps" in said and said.count("seldom gains where the critic starts") == 1
    before, none, after = (weights(path) for path in (tiny / "policy", runs["none"][0], out))
    key = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[key], after[key])
    assert not torch.equal(none[key], after[key])
    values = {tag: [value for _, value in events] for tag, events in scalars(out).items()}
    for metric in ("entropy", "last_token", "special_tokens", "conservation_error"):
        assert len(values[f"train/credit_{metric}"]) == 3
    assert max(values["train/credit_conservation_error"]) < 1e-6
    assert 0 < values["train/credit_entropy"][0] < 2.08  # ln 8: below uniform
    assert summary(out)["steps"] == 3
    assert summary(out)["reward_mean"] == pytest.approx(sum(values["train/rollout/reward_mean"]) / 3, abs=1e-6)


def test_completions_are_recorded_and_shown(runs, capsys):
    for method in ("none", "abc"):
        out, printed = runs[method]
        records, notes = read_records(out / "completions.jsonl")
        assert [record.step for record in records] == [1] * 4 and notes == []
        assert f"completions: abc-rlhf show {out}" in printed
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
    words = ["evaluate", *as_words(flags)]
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


def test_interrupt_keeps_the_checkpoints_and_resume_goes_on(tiny, local_runs, tmp_path):
    changes = {"ckpt.save_steps": 1, "reward_shaping": "uniform"}
    complete = tmp_path / "checkpoints" / "complete"
    flags = local_flags(tiny, tmp_path, **changes | {"train.num_episodes": 50})
    first = complete / "global_step1" / "manifest.json"
    status, said = local_runs.run(flags, end=(first, 0, signal.SIGINT))
    assert status == 130, said[-2000:]
    step = max(int(path.parent.name.removeprefix("global_step")) for path in complete.glob("*/manifest.json"))
    assert re.search(rf"stopped; checkpoints kept: step ([\d, ]+, )?{step} in {tmp_path}/checkpoints;", said)
    changes = {"train.num_episodes": step // 3 + 1, "reward_shaping": "uniform", "ckpt.load_enable": True}
    said = local_runs.done(local_flags(tiny, tmp_path, **changes))
    assert f"done: {(step // 3 + 1) * 3} steps ({step} of them before the checkpoint)" in said


@pytest.mark.parametrize("saves", [True, False])
def test_a_scheduler_that_ends_the_job_gets_a_checkpoint_first(tiny, local_runs, tmp_path, saves):
    changes = {"ckpt.save_steps": 1000 if saves else -1, "train.num_episodes": 50}
    recorded = tmp_path / "completions.jsonl"  # in the first step
    status, said = local_runs.run(local_flags(tiny, tmp_path, **changes), end=(recorded, 0, signal.SIGTERM))
    assert status == 143, said[-2000:]
    if not saves:
        assert "stopped; no checkpoint was complete" in said
        return
    [step] = [
        int(path.parent.name.removeprefix("global_step")) for path in tmp_path.glob("*/complete/*/manifest.json")
    ]
    assert f"stopped; checkpoints kept: step {step} in {tmp_path}/checkpoints; the same command" in said
    again = changes | {"ckpt.load_enable": True, "train.num_episodes": 1}
    assert (
        f"({step} of them before the checkpoint)" in local_runs.done(local_flags(tiny, tmp_path, **again)) or step > 3
    )


def test_a_full_disk_ends_in_one_line_that_says_what_is_kept(tiny, local_runs, tmp_path):
    flags = local_flags(tiny, tmp_path, **{"ckpt.save_steps": 2})
    status, said = local_runs.run(flags, variant=("full_disk", 3))
    assert status == 1
    [line] = [line for line in said.splitlines() if "cannot be written" in line]
    assert line.startswith(f"abc-rlhf: stopped: {tmp_path}")
    assert (
        f"checkpoints kept: step 2 in {tmp_path}/checkpoints; the same command with --ckpt.load_enable goes on" in line
    )
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / ".part").exists()
    assert "done: 3 steps" in local_runs.done(local_flags(tiny, tmp_path, **AGAIN))


def test_an_infinite_weight_of_the_critic_ends_the_run_by_name(tiny, local_runs, tmp_path):
    critic = shutil.copytree(tiny / "reward_model", tmp_path / "critic")
    weights = load_file(critic / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(weights, critic / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    status, said = local_runs.run(local_flags(tiny, out, **{"critic.model_name_or_path": critic}))
    assert status == 1
    assert "abc-rlhf: stopped: a value by the critic of sample 0 is NaN or infinite" in said
    assert not (out / "model.safetensors").exists()


def test_the_algorithms_of_the_host_run_with_credit(tiny, local_runs, tmp_path):
    """A critic-free estimator with several samples per prompt, KL as a loss and ZeRO-3."""
    changes = {
        "algo.advantage.estimator": "group_norm",
        "rollout.n_samples_per_prompt": 2,
        "rollout.batch_size": 4,
        "data.max_samples": 8,
        "algo.kl.estimator": "k3",
        "algo.kl.use_loss": True,
        "ds.zero_stage": 3,
        "reward_shaping": "abc",
    }
    local_runs.done(local_flags(tiny, tmp_path, **changes))
    assert max(value for _, value in scalars(tmp_path)["train/credit_conservation_error"]) < 1e-6
