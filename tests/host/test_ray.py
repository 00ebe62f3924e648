"""abc-rlhf ray on the real stack: Ray, DeepSpeed, vLLM and OpenRLHF's own training, on a CPU. About a minute a run."""

import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from ray_support import CLONE, RayRun, assert_identical, ray_flags, ray_python, run_ray
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel

from abc_plugin.attention import attach
from abc_plugin.credit.redistribute import response_weights

pytestmark = pytest.mark.slow

# Rollout log-probs show that vLLM has the trained weights.
CHANGES = {"actor.adam.lr": 1e-2, "algo.advantage.is_correction_level": "token"}
TESTS = CLONE / "tests"


def run(which: str, tiny: Path, out: Path, **changes: object) -> RayRun:
    flags = ray_flags(tiny, out, **{"logger.tensorboard_dir": out / "tensorboard"}, **CHANGES | changes)
    finished = run_ray(which, out, flags)
    assert finished.status == 0, finished.log[-4000:]
    return finished


def arrived(log: str) -> int:
    return len(re.findall(r"abc_plugin: credit arrived: \d+ responses", log))


def column(run: RayRun, step: int, name: str) -> torch.Tensor:
    return torch.cat([one["info"][name].float().flatten() for one in run.steps[step]])


@pytest.fixture(scope="module")
def stock(tiny, tmp_path_factory):
    return run("stock", tiny, tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def abc_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("abc")


@pytest.fixture(scope="module")
def abc(tiny, abc_dir):
    return run("abc", tiny, abc_dir, reward_shaping="abc")


def test_none_is_bit_identical_to_the_stock_command_line(tiny, tmp_path, stock):
    none = run("abc", tiny, tmp_path, reward_shaping="none")
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
    finished = run("abc", tiny, tmp_path, reward_shaping="abc", **changes)
    assert len(finished.steps) == 2 and arrived(finished.log) == 1
    for one in finished.steps[0]:
        assert (one["info"]["credit_conservation_error"] < 1e-5).all()
    recovered = credit_by_sequence(finished.steps[0])
    assert recovered == pytest.approx(expected_entropies(tiny, finished.steps[0]), abs=0.03)  # bf16 against fp32


def test_an_agent_of_two_turns_in_asynchronous_training_brings_its_own_credit(tiny, tmp_path):
    changes = {"train.agent_func_path": TESTS / "support" / "two_turn_agent.py", "rollout.max_new_tokens": 4}
    changes |= {"train.async_enable": True}
    finished = run("abc", tiny, tmp_path, reward_shaping="abc", **changes)
    assert len(finished.steps) == 3 and arrived(finished.log) == 1
    assert "CreditTrainingActor" in finished.log
    for one in finished.steps[0]:
        for mask_A, moved in zip(one["action_mask"], one["info"]["credit_moved"], strict=True):
            starts = (mask_A[1:] > mask_A[:-1]).sum() + mask_A[0]
            assert starts == 2 and moved == 0.0


def test_two_reward_models_on_packed_sequences_in_dynamic_batches(tiny, tmp_path, abc):
    """The host packs under flash attention only; its kernels are a stand-in here, all else is the real path.

    Both reward models have the same trunk, so that their credit is that of one, and another head.
    """
    second = shutil.copytree(tiny / "reward_model", tmp_path / "second")
    weights = load_file(second / "model.safetensors")
    weights["score.weight"] = weights["score.weight"].flip(1).contiguous()
    save_file(weights, second / "model.safetensors", metadata={"format": "pt"})
    changes = {"ds.attn_implementation": "flash_attention_2", "ds.packing_samples": True}
    changes |= {"train.dynamic_batch_enable": True, "train.max_tokens_per_gpu": 96}
    changes |= {"reward.model_name_or_path": f"{tiny / 'reward_model'},{second}"}
    finished = run("abc", tiny, tmp_path / "run", reward_shaping="abc", **changes)
    assert len(finished.steps) == 3 and arrived(finished.log) == 1
    by_sequence = [credit_by_sequence(one.steps[0]) for one in (finished, abc)]
    assert by_sequence[0].keys() == by_sequence[1].keys()
    for key, entropy in by_sequence[0].items():
        assert entropy == pytest.approx(by_sequence[1][key], abs=0.03)  # bf16, another kernel
    assert (column(finished, 0, "reward_disagreement") > 0).all()
    assert column(finished, 0, "credit_disagreement").max() < 1e-5
    assert column(finished, 0, "credit_conservation_error").max() < 1e-5


def test_the_policys_own_attention_credits_the_reward_of_a_rule(tiny, tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text("def reward_func(queries, prompts, labels):\n    return {'rewards': 0.01 * len(queries[0])}\n")
    changes = {"reward.model_name_or_path": None, "critic.model_name_or_path": tiny / "reward_model"}
    finished = run("abc", tiny, tmp_path, reward_shaping="abc_d", **changes, **{"reward.remote_url": rule})
    assert len(finished.steps) == 3 and arrived(finished.log) == 1
    assert len(re.findall(r"rebound openrlhf\.\S+\.PolicyModelActor ->", finished.log)) == 1
    for step in range(3):
        assert column(finished, step, "credit_conservation_error").max() < 1e-5
        assert (column(finished, step, "credit_last_token") == 0).all()
    recovered = credit_by_sequence(finished.steps[0])
    assert recovered == pytest.approx(expected_of_policy(tiny, finished.steps[0]), abs=0.03)  # bf16 against fp32


def expected_of_policy(tiny: Path, step: list[dict]) -> dict[tuple, float]:
    """The entropy of each sequence's credit by ABC-D, from the first policy in fp32, token by token."""
    model = AutoModel.from_pretrained(tiny / "policy", dtype=torch.float32, attn_implementation="eager").eval()
    entropies = {}
    for one in step:
        for sequence, mask_A in zip(one["sequences"], one["action_mask"], strict=True):
            actions = mask_A.nonzero().flatten().tolist()
            ids = sequence[None, : actions[-1] + 2]
            with torch.no_grad():
                weights_SS = model(ids, output_attentions=True).attentions[-1][0].mean(0)
            seen = [weights_SS[[row for row in actions if row > action], action + 1] for action in actions]
            mean_A = torch.stack([rows.mean() if len(rows) else torch.tensor(0.0) for rows in seen])
            key = tuple(sequence[action + 1].item() for action in actions)
            entropies[key] = torch.special.entr(mean_A / mean_A.sum()).sum().item()
    return entropies


def expected_entropies(tiny: Path, step: list[dict]) -> dict[tuple, float]:
    """The entropy of each sequence's credit, from the reward model in fp32, alone, one sequence at a time."""
    model = AutoModel.from_pretrained(tiny / "reward_model", dtype=torch.float32, attn_implementation="eager").eval()
    recovery, entropies = attach(model, recovery="eager-rerun"), {}
    for one in step:
        for sequence, mask_A in zip(one["sequences"], one["action_mask"], strict=True):
            end = int(mask_A.nonzero().max()) + 2
            ids, mask = sequence[None, :end], torch.ones(1, end, dtype=torch.long)
            with recovery.record(mask) as recording, torch.no_grad():
                model(ids, attention_mask=mask)
            weight_A = response_weights(recording.row_BS[:, 1:], mask_A[None, : end - 1])
            key = tuple(sequence[mask_A.nonzero().flatten() + 1].tolist())
            entropies[key] = torch.special.entr(weight_A).sum().item()
    return entropies


def credit_by_sequence(step: list[dict]) -> dict[tuple, float]:
    return {
        tuple(sequence[mask_A.nonzero().flatten() + 1].tolist()): entropy.item()
        for one in step
        for sequence, mask_A, entropy in zip(
            one["sequences"], one["action_mask"], one["info"]["credit_entropy"], strict=True
        )
    }


def test_a_reward_server_gives_the_credit_of_the_model_on_the_cluster(tiny, tmp_path, abc):
    model = ["--reward.model_name_or_path", tiny / "reward_model", "--ds.attn_implementation", "eager"]
    words = [ray_python(), "-m", "abc_plugin", "serve-rm", *model, "--host", "127.0.0.1", "--port", "15791"]
    output = tmp_path / "server.log"
    with open(output, "w") as log, subprocess.Popen(words, stdout=log, stderr=log, cwd=CLONE) as server:
        try:
            wait_for(lambda: "serving on" in output.read_text(), server, output)
            changes = {"reward.model_name_or_path": None, "reward.remote_url": "http://127.0.0.1:15791/get_reward"}
            changes |= {"critic.model_name_or_path": tiny / "reward_model"}
            finished = run("abc", tiny, tmp_path / "run", reward_shaping="abc", **changes)
        finally:
            server.terminate()
    assert len(finished.steps) == 3 and arrived(finished.log) == 1
    remote, local = (credit_by_sequence(one.steps[0]) for one in (finished, abc))
    same = [key for key in remote if remote[key] == pytest.approx(local[key], abs=0.03)]
    assert remote.keys() == local.keys()
    # Sampled tokens that the text does not give back when it is tokenized again are scored as other tokens.
    assert len(same) >= len(remote) - 2, (remote, local)


@pytest.mark.more
def test_a_reward_model_with_another_tokenizer(other, tmp_path):
    changes = {"reward.model_name_or_path": other / "reward_model", "shaping.tokenizer_check": "map"}
    finished = run("abc", other, tmp_path, reward_shaping="abc", **changes)
    assert len(finished.steps) == 3 and arrived(finished.log) == 1
    assert "the critic starts from the policy" in finished.log
    for step in range(3):
        assert column(finished, step, "credit_conservation_error").max() < 1e-5
        assert (column(finished, step, "credit_moved") <= 1).all()
        assert (column(finished, step, "reward_truncated") == 0).all()
    assert column(finished, 0, "reward").std() > 1e-3


@pytest.mark.more
def test_a_rule_that_sends_no_credit_is_told_what_to_use(tiny, tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text("def reward_func(queries, prompts, labels):\n    return {'rewards': 1.0 * len(queries[0])}\n")
    changes = {"reward.model_name_or_path": None, "critic.model_name_or_path": tiny / "reward_model"}
    flags = ray_flags(tiny, tmp_path, **changes, reward_shaping="abc", **{"reward.remote_url": rule})
    finished = run_ray("abc", tmp_path, flags)
    assert finished.status == 1 and not finished.steps
    [error] = [line for line in finished.log.splitlines() if line.startswith("abc-rlhf: stopped")]
    assert "reward of sample 0 came without credit" in error and "use --reward_shaping uniform, abc_d or none" in error


@pytest.mark.more
def test_a_killed_worker_is_named_and_the_run_continues_from_its_checkpoint(tiny, tmp_path):
    out = tmp_path / "run"
    steps = {"ckpt.save_steps": 1, "data.max_samples": 32, "logger.tensorboard_dir": out / "tensorboard"}
    flags = ray_flags(tiny, out, **CHANGES, **steps, reward_shaping="prefix")
    words = [ray_python(), TESTS / "support" / "ray_run.py", "abc", tmp_path / "records", *map(str, flags)]
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


def wait_for(condition, process: subprocess.Popen, log: Path, seconds: int = 300) -> None:
    """Poll until the condition holds; fail when the process ends first or time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.2)
