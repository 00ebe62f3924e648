"""abc-rlhf ray on the real stack with other sources of reward: agents, ensembles, rules, servers, other tokenizers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from ray_support import (
    CLONE,
    arrived,
    column,
    credit_by_sequence,
    expected_entropies,
    ray_flags,
    ray_python,
    run_ray,
    trained,
    wait_for,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel

pytestmark = pytest.mark.slow

# Runs with fewer workers, each of which imports the whole stack.
NO_REFERENCE = {"algo.kl.init_coef": 0}
NO_CRITIC = {"algo.advantage.estimator": "reinforce"}


def test_an_agent_of_two_turns_in_asynchronous_training_brings_its_own_credit(tiny, tmp_path):
    changes = {"train.agent_func_path": CLONE / "tests" / "support" / "two_turn_agent.py", "rollout.max_new_tokens": 4}
    changes |= {"train.async_enable": True} | NO_REFERENCE
    finished = trained("abc", tiny, tmp_path, reward_shaping="abc", **changes)
    assert len(finished.steps) == 3 and arrived(finished.log) == 1
    assert "CreditTrainingActor" in finished.log
    for one in finished.steps[0]:
        for mask_A, moved in zip(one["action_mask"], one["info"]["credit_moved"], strict=True):
            starts = (mask_A[1:] > mask_A[:-1]).sum() + mask_A[0]
            assert starts == 2 and moved == 0.0


def test_two_reward_models_on_packed_sequences_in_dynamic_batches(tiny, tmp_path):
    """The host packs under flash attention only; its kernels are a stand-in here, all else is the real path.

    Both reward models have the same trunk, so that their credit is that of one, and another head.
    """
    second = shutil.copytree(tiny / "reward_model", tmp_path / "second")
    weights = load_file(second / "model.safetensors")
    weights["score.weight"] = weights["score.weight"].flip(1).contiguous()
    save_file(weights, second / "model.safetensors", metadata={"format": "pt"})
    changes = {"ds.attn_implementation": "flash_attention_2", "ds.packing_samples": True}
    changes |= {"train.dynamic_batch_enable": True, "train.max_tokens_per_gpu": 96}
    changes |= {"reward.model_name_or_path": f"{tiny / 'reward_model'},{second}"} | NO_REFERENCE
    finished = trained("abc", tiny, tmp_path / "run", reward_shaping="abc", **changes)
    assert len(finished.steps) == 3 and arrived(finished.log) == 1
    recovered = credit_by_sequence(finished.steps[0])
    assert recovered == pytest.approx(expected_entropies(tiny, finished.steps[0]), abs=0.03)  # bf16 against fp32
    assert (column(finished, 0, "reward_disagreement") > 0).all()
    assert column(finished, 0, "credit_disagreement").max() < 1e-5
    assert column(finished, 0, "credit_conservation_error").max() < 1e-5


def test_the_policys_own_attention_credits_the_reward_of_a_rule(tiny, tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text("def reward_func(queries, prompts, labels):\n    return {'rewards': 0.01 * len(queries[0])}\n")
    changes = {"reward.model_name_or_path": None, "reward.remote_url": rule} | NO_CRITIC
    finished = trained("abc", tiny, tmp_path, reward_shaping="abc_d", **changes)
    assert len(finished.steps) == 3 and arrived(finished.log) == 1
    assert len(re.findall(r"rebound openrlhf\.\S+\.PolicyModelActor ->", finished.log)) == 1
    for step in range(3):
        assert column(finished, step, "credit_conservation_error").max() < 1e-5
        assert (column(finished, step, "credit_last_token") == 0).all()
    recovered = credit_by_sequence(finished.steps[0])
    assert recovered == pytest.approx(expected_of_policy(tiny, finished.steps[0]), abs=0.03)  # bf16 against fp32


def test_a_reward_server_gives_the_credit_of_the_model_on_the_cluster(tiny, tmp_path):
    model = ["--reward.model_name_or_path", tiny / "reward_model", "--ds.attn_implementation", "eager"]
    words = [ray_python(), "-m", "abc_plugin", "serve-rm", *model, "--host", "127.0.0.1", "--port", "15791"]
    output = tmp_path / "server.log"
    with open(output, "w") as log, subprocess.Popen(words, stdout=log, stderr=log, cwd=CLONE) as server:
        try:
            wait_for(lambda: "serving on" in output.read_text(), server, output)
            changes = {"reward.model_name_or_path": None, "reward.remote_url": "http://127.0.0.1:15791/get_reward"}
            changes |= NO_REFERENCE | NO_CRITIC
            finished = trained("abc", tiny, tmp_path / "run", reward_shaping="abc", **changes)
        finally:
            server.terminate()
    assert len(finished.steps) == 3 and arrived(finished.log) == 1
    remote, local = credit_by_sequence(finished.steps[0]), expected_entropies(tiny, finished.steps[0])
    same = [key for key in remote if remote[key] == pytest.approx(local[key], abs=0.03)]
    # Sampled tokens that the text does not give back when it is tokenized again are scored as other tokens.
    assert len(same) >= len(remote) - 2, (remote, local)


@pytest.mark.more
def test_a_reward_model_with_another_tokenizer(other, tmp_path):
    changes = {"reward.model_name_or_path": other / "reward_model", "shaping.tokenizer_check": "map"}
    finished = trained("abc", other, tmp_path, reward_shaping="abc", **changes)
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
