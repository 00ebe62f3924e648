"""The scripts for the paper's tasks and for several ranks: their flags are OpenRLHF's, and SMOKE=1 runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
sys.path.insert(0, str(LAUNCH / "paper"))

import prompts  # noqa: E402
import scalar_head  # noqa: E402

SCRIPTS = {
    "paper/imdb_gpt2.sh": "REWARD_MODEL",
    "paper/tldr_gptj.sh": "REWARD_MODEL",
    "paper/hh_openllama.sh": "REWARD_MODEL",
    "torchrun.sh": "RANKS",
    "deepspeed.sh": "RANKS",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_smoke_mode_trains(script, tiny, tmp_path):
    bin_directory = Path(sys.executable).parent
    settings = {"SMOKE": "1", "DEMO": str(tiny), "OUT": str(tmp_path / "run"), "OMP_NUM_THREADS": "1"}
    environment = os.environ | settings | {"VIRTUAL_ENV": str(bin_directory.parent)}
    words = ["bash", str(LAUNCH / script), "--ds.attn_implementation", "eager"]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "done: 2 steps" in done.stdout
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_what_it_does_and_how_to_call_it(script):
    head = (LAUNCH / script).read_text().split("set -euo pipefail")[0]
    assert f"launch/{script}" in head and f"SMOKE=1 bash launch/{script}" in head and SCRIPTS[script] in head


def test_prompts_are_the_question_of_a_single_turn_or_the_first_words():
    two_turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    rows = [{"chosen": two_turns}, {"chosen": "\n\nHuman: why? \n\nAssistant: because"}]
    assert list(prompts.hh(rows)) == ["###Human: why? ###Assistant:"]
    review = "one<br />two three four five six seven eight nine " + "word " * 60
    [prompt] = prompts.imdb([{"text": "too short"}, {"text": review}])
    assert 2 <= len(prompt.split()) <= 8 and review.replace("<br />", " ").startswith(prompt)


def test_a_classifier_becomes_a_reward_model_with_the_difference_of_its_logits(tiny, tmp_path, capsys):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, num_labels=2, pad_token_id=0, initializer_range=0.2)
    torch.manual_seed(0)
    classifier = GPT2ForSequenceClassification(config).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(tiny / "policy").save_pretrained(tmp_path / "classifier")
    scalar_head.convert(str(tmp_path / "classifier"), str(tmp_path / "reward_model"))
    reward_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward_model").eval()
    ids = torch.arange(1, 13).reshape(2, 6)
    logits = classifier(ids).logits
    assert reward_model.config.num_labels == 1
    torch.testing.assert_close(reward_model(ids).logits[:, 0], logits[:, 1] - logits[:, 0])
    with pytest.raises(SystemExit, match="nothing was overwritten"):
        scalar_head.convert(str(tmp_path / "classifier"), str(tmp_path / "reward_model"))
    with pytest.raises(SystemExit, match="no linear head `score` of two labels"):
        scalar_head.convert(str(tmp_path / "reward_model"), str(tmp_path / "again"))
