"""Methods and ensembles on the real stack: Ray, DeepSpeed, vLLM and OpenRLHF's own training, on a CPU."""

import re
import shutil

import pytest
import torch
from ray_support import ray_flags, run_ray
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow


def test_prefix_credit_of_two_reward_models_on_packed_sequences(tiny, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(tiny / "reward_model", second)
    weights = load_file(second / "model.safetensors")
    weights["score.weight"] = weights["score.weight"].flip(1).contiguous()
    save_file(weights, second / "model.safetensors", metadata={"format": "pt"})
    changes = {
        "reward.model_name_or_path": f"{tiny / 'reward_model'},{second}",
        "data.max_samples": 8,
        "ds.packing_samples": True,
        "ds.attn_implementation": "flash_attention_2",
    }
    finished = run_ray("abc", tmp_path, ray_flags(tiny, tmp_path, reward_shaping="prefix", **changes))
    assert finished.status == 0, finished.log[-4000:]
    assert len(re.findall(r"abc_plugin: score of every prefix of RewardModel", finished.log)) == 2
    assert len(finished.steps) == 1
    info = {name: torch.cat([one["info"][name].flatten() for one in finished.steps[0]]) for name in METRICS}
    assert info["credit_conservation_error"].max() < 1e-5
    assert (info["reward_disagreement"] > 0).all() and 0 < info["credit_disagreement"].mean() <= 1
    assert 0 < info["credit_negative_share"].mean() < 1


METRICS = ("credit_conservation_error", "reward_disagreement", "credit_disagreement", "credit_negative_share")
