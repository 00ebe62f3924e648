"""abc-rlhf ray on the real stack: Ray, DeepSpeed, vLLM and OpenRLHF's own training, on a CPU. About a minute a run."""

import math
import os
import re
import signal
import subprocess

import psutil
import pytest
import torch
from ray_support import (
    CHANGES,
    CLONE,
    arrived,
    assert_identical,
    column,
    credit_by_sequence,
    expected_entropies,
    ray_flags,
    ray_python,
    run_ray,
    trained,
    wait_for,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stock(tiny, tmp_path_factory):
    return trained("stock", tiny, tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def abc_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("abc")


@pytest.fixture(scope="module")
def abc(tiny, abc_dir):
    return trained("abc", tiny, abc_dir, reward_shaping="abc")


def test_none_is_bit_identical_to_the_stock_command_line(tiny, tmp_path, stock):
    none = trained("abc", tiny, tmp_path, reward_shaping="none")
    assert len(none.steps) == 3
    assert_identical(none.steps, stock.steps)
    assert arrived(none.log) == 0


def test_credit_arrives_and_the_returns_are_the_stock_ones(stock, abc):
    assert len(abc.steps) == 3 and arrived(abc.log) == 1
    for name in ("RewardModelActor", "CriticModelActor", "PPOTrainer", "TrainingActor", "PPOTrainerAsync"):
        assert len(re.findall(rf"rebound openrlhf\.\S+\.{name} ->", abc.log)) == 1
    # The first step's rollouts are the same: credit moves the reward and keeps its sum.
    for ours, theirs in zip(abc.steps[0], stock.steps[0], strict=True):
        for name in ("sequences", "action_mask", "values", "rewards"):
            assert torch.equal(ours[name], theirs[name]), name
        torch.testing.assert_close(ours["info"]["return"], theirs["info"]["return"], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours["returns"], theirs["returns"])
    for step in range(3):
        assert column(abc, step, "credit_conservation_error").max() < 1e-5
        assert (column(abc, step, "credit_entropy") <= math.log(8) + 1e-5).all()


def test_policy_is_trained_and_its_weights_reach_vllm(tiny, abc, abc_dir):
    before, after = (load_file(one / "model.safetensors") for one in (tiny / "policy", abc_dir))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    gaps = [
        (one["rollout_log_probs"] - one["action_log_probs"])[one["action_mask"].bool()].abs().mean().item()
        for one in abc.steps[2]
    ]
    assert max(gaps) < 0.05, gaps  # without the sync they would differ by what two steps changed


def test_credit_metrics_are_logged(abc, abc_dir):
    events = EventAccumulator(str(next((abc_dir / "tensorboard").rglob("*tfevents*")).parent)).Reload()
    for name in ("credit_entropy", "credit_last_token", "credit_special_tokens", "credit_conservation_error"):
        assert [event.step for event in events.Scalars(f"train/{name}")] == [1, 2, 3]


@pytest.mark.more
def test_two_ranks_of_each_model_without_a_critic(tiny, tmp_path):
    """Two actor, reference and reward ranks; groups of two samples; credit after the groups' baseline."""
    changes = {f"{model}.num_gpus_per_node": 2 for model in ("actor", "ref", "reward")}
    changes |= {"algo.advantage.estimator": "reinforce_baseline", "rollout.n_samples_per_prompt": 2}
    changes |= {"rollout.batch_size": 4, "data.max_samples": 8, "rollout.micro_batch_size": 2}
    finished = trained("abc", tiny, tmp_path, reward_shaping="abc", **changes)
    assert len(finished.steps) == 2 and arrived(finished.log) == 1
    for one in finished.steps[0]:
        assert (one["info"]["credit_conservation_error"] < 1e-5).all()
    recovered = credit_by_sequence(finished.steps[0])
    assert recovered == pytest.approx(expected_entropies(tiny, finished.steps[0]), abs=0.03)  # bf16 against fp32


@pytest.mark.more
def test_a_killed_worker_is_named_and_the_run_continues_from_its_checkpoint(tiny, tmp_path):
    out = tmp_path / "run"
    steps = {"ckpt.save_steps": 1, "data.max_samples": 32, "logger.tensorboard_dir": out / "tensorboard"}
    flags = ray_flags(tiny, out, **CHANGES, **steps, reward_shaping="prefix")
    words = [ray_python(), CLONE / "tests" / "support" / "ray_run.py", "abc", tmp_path / "records", *map(str, flags)]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(words, stdout=log, stderr=log, cwd=tmp_path) as driver:
        try:
            saved = out / "checkpoints" / "_critic" / "global_step1"  # the critic saves last
            wait_for(lambda: saved.exists() and (tmp_path / "records/002.pt").exists(), driver, tmp_path / "log")
            [worker] = [one for one in psutil.Process(driver.pid).children(True) if "CreditRewardModel" in one.name()]
            worker.send_signal(signal.SIGKILL)
            status = driver.wait(300)
        except BaseException:
            driver.terminate()
            raise
    [output] = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("abc-rlhf: stopped")]
    assert status == 1 and "a Ray worker died" in output and "--ckpt.load_enable" in output

    done = len(list((tmp_path / "records").glob("*.pt")))
    resumed = run_ray("abc", tmp_path, [*flags, "--ckpt.load_enable"])
    assert resumed.status == 0, resumed.log[-4000:]
    assert arrived(resumed.log) == 1
    assert "'global_step': " in resumed.log and "'global_step': 0" not in resumed.log
    assert len(resumed.steps) > done  # records of both runs
    assert 0 < column(resumed, -1, "credit_negative_share").mean() < 1


@pytest.mark.more
def test_the_smoke_script(tmp_path):
    if not (CLONE / ".venv-ray").exists():
        pytest.skip("bash launch/environment.sh ray has not been run in this clone")
    command = ["bash", CLONE / "launch" / "ray" / "cpu_smoke.sh", "--data.max_samples", "8"]
    environment = os.environ | {"OUT": str(tmp_path / "smoke")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert arrived(done.stdout + done.stderr) == 1
    assert f"done: policy in {tmp_path / 'smoke'}" in done.stdout
    assert (tmp_path / "smoke" / "model.safetensors").exists()
