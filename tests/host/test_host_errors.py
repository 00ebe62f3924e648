"""Bad input: one line that names the value and the remedy, exit status 2, before any model is loaded."""

import json
import shutil

import pytest
from conftest import local_flags, run_python

from abc_plugin import cli
from abc_plugin.credit import methods
from abc_plugin.host.import_openrlhf import import_host


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    """These must fail before training; reaching it fails the test."""
    import_host()
    from abc_plugin.local import driver

    monkeypatch.setattr(driver, "_train", lambda args: pytest.fail("training was started"))


def output(capsys, words):
    assert cli.main(["local", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("abc-rlhf: error: ")
    return error


def prompts(tmp_path, *rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD_ROWS = [{"input": "The film", "other": 1}] * 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_shaping": "abcd"}, r"--reward_shaping 'abcd' is not registered; registered: abc, abc_d, "),
        ({"shaping.beta": 1.2}, r"--shaping.beta 1.2 is outside [0, 1]"),
        ({"shaping.layer": 7, "reward_shaping": "abc"}, "layer 7 is out of range"),
        (
            {"actor.model_name_or_path": "/nowhere/policy"},
            "--actor.model_name_or_path /nowhere/policy: no such directory",
        ),
        ({"reward.model_name_or_path": "./rm"}, "--reward.model_name_or_path ./rm: no such directory"),
        (
            {"data.prompt_dataset": "/nowhere/p.jsonl"},
            "--data.prompt_dataset /nowhere/p.jsonl (split 'train') cannot be",
        ),
        ({"data.input_key": "question"}, "has no key 'question', only input; set --data.input_key"),
        ({"data.label_key": "answer"}, "has no key 'answer', only input; set --data.label_key"),
        (
            {"train.batch_size": 16},
            "a rollout has 8 completions (--rollout.batch_size 8, --rollout.n_samples_per_prompt 1",
        ),
        (
            {"rollout.max_new_tokens": 48},
            "--rollout.max_new_tokens 48 leaves no room for a prompt in --data.max_len 48",
        ),
        ({"rollout.temperature": 0}, "--rollout.temperature 0.0: PPO needs sampled completions"),
        ({"rollout.micro_batch_size": 0}, "OpenRLHF refused the flags: integer division or modulo by zero"),
        ({"algo.advantage.is_correction_level": "token"}, "--algo.advantage.is_correction_level token does not work"),
        ({"actor.model_name_or_path": None}, "--actor.model_name_or_path is missing"),
        ({"reward.model_name_or_path": None}, "--reward.model_name_or_path is missing"),
        ({"data.prompt_dataset": None}, "--data.prompt_dataset is missing"),
        ({"data.prompt_split": "test"}, "(split 'test') cannot be read"),
        ({"ds.attn_implementation": "flash_attention_2"}, "needs a CUDA device and there is none; use sdpa"),
        ({"ds.value_head_prefix": "value"}, "has no weight value.weight"),
        (
            {"ds.ring_attn_size": 2},
            "OpenRLHF refused the flags: Only support `--packing_samples` with vLLM. (one process",
        ),
        (
            {"reward.remote_url": "http://localhost/score"},
            "--reward.remote_url ['http://localhost/score'] does not work",
        ),
        ({"train.agent_func_path": "a.py"}, "--train.agent_func_path a.py does not work with abc-rlhf local: agents"),
        ({"train.unknown": 3}, "unrecognized arguments: --train.unknown 3"),
        ({"train.batch_size": "many"}, "invalid int value: 'many'"),
    ],
)
def test_flags(tiny, tmp_path, capsys, changes, message):
    words = local_flags(tiny, tmp_path, **changes)
    if "cuda" in message.lower():
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    assert message in output(capsys, words)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*GOOD_ROWS, {"input": " \n", "other": 1}], "has an empty prompt in row 9 (key 'input'); remove the row"),
        ([*GOOD_ROWS, {"input": None, "other": 1}], "has an empty prompt in row 9"),
        ([{"input": 5, "other": 1}] * 8, "has a prompt that is no text in row 1 (key 'input'): 5"),
        ([{"input": [{"role": "user"}], "other": 1}] * 8, "lists of messages with --data.apply_chat_template"),
        (
            GOOD_ROWS[:3],
            "a rollout has 3 completions (--rollout.batch_size 8, --rollout.n_samples_per_prompt 1, 3 prom",
        ),
    ],
)
def test_datasets(tiny, tmp_path, capsys, rows, message):
    words = local_flags(tiny, tmp_path, **{"data.prompt_dataset": prompts(tmp_path, *rows)})
    assert message in output(capsys, words)


@pytest.mark.parametrize("flag", ["reward.model_name_or_path", "critic.model_name_or_path"])
def test_a_model_with_another_tokenizer(tiny, tmp_path, capsys, flag):
    other = shutil.copytree(tiny / "reward_model", tmp_path / "other")
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ġthe"], vocabulary["Ġa"] = vocabulary["Ġa"], vocabulary["Ġthe"]
    path.write_text(json.dumps(tokenizer))
    error = output(capsys, local_flags(tiny, tmp_path, **{flag: other}))
    assert f"--{flag} {other} and the policy" in error
    assert "must share a tokenizer, but the token 'Ġ" in error
    assert "use a model trained with the policy's tokenizer" in error


def test_a_damaged_tokenizer(tiny, tmp_path, capsys):
    other = shutil.copytree(tiny / "reward_model", tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text()[:5000])
    words = local_flags(tiny, tmp_path, **{"reward.model_name_or_path": other})
    assert f"--reward.model_name_or_path {other} has no usable tokenizer" in output(capsys, words)


@pytest.mark.parametrize(
    ("flag", "pattern", "message"),
    [
        ("reward.model_name_or_path", "tokenizer*", "has no usable tokenizer"),
        ("reward.model_name_or_path", "*.safetensors", "has no weights (model.safetensors or pytorch_model.bin)"),
        ("actor.model_name_or_path", "*.safetensors", "has no weights (model.safetensors or pytorch_model.bin)"),
        ("actor.model_name_or_path", "config.json", "is not a Hugging Face model"),
    ],
)
def test_an_incomplete_model_directory(tiny, tmp_path, capsys, flag, pattern, message):
    source = tiny / ("policy" if flag.startswith("actor") else "reward_model")
    broken = shutil.copytree(source, tmp_path / "broken", ignore=shutil.ignore_patterns(pattern))
    assert message in output(capsys, local_flags(tiny, tmp_path, **{flag: broken}))


def test_a_bin_checkpoint_without_a_head(tiny, tmp_path, capsys):
    import torch
    from safetensors.torch import load_file

    other = shutil.copytree(tiny / "reward_model", tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(tiny / "reward_model" / "model.safetensors")
    weights["other.weight"] = weights.pop("score.weight")
    torch.save(weights, other / "pytorch_model.bin")
    words = local_flags(tiny, tmp_path, **{"reward.model_name_or_path": other})
    assert "has no weight score.weight" in output(capsys, words)


def test_a_reward_model_the_tap_cannot_attach_to(tiny, tmp_path, capsys):
    import torch
    from safetensors.torch import save_file
    from transformers import BloomConfig, BloomModel

    odd = tmp_path / "odd"
    shutil.copytree(tiny / "reward_model", odd)
    model = BloomModel(BloomConfig(vocab_size=49152, hidden_size=32, n_layer=1, n_head=2))
    model.config.save_pretrained(odd)
    weights = {f"transformer.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights | {"score.weight": torch.zeros(1, 32)}, odd / "model.safetensors", {"format": "pt"})
    changes = {"reward.model_name_or_path": odd, "reward_shaping": "abc"}
    assert "BloomModel does not support" in output(capsys, local_flags(tiny, tmp_path, **changes))
    changes |= {"ds.attn_implementation": "eager", "shaping.recovery": "tap"}
    error = output(capsys, local_flags(tiny, tmp_path, **changes))
    assert "BloomModel is not supported" in error


def test_exit_status_and_one_line_in_a_process_of_its_own(tiny, tmp_path):
    result = run_python("-m", "abc_plugin", "local", *local_flags(tiny, tmp_path, **{"reward_shaping": "abd"}))
    assert result.returncode == 2
    assert result.stdout == ""
    known = ", ".join(methods.available())
    assert result.stderr.strip().splitlines() == [
        f"abc-rlhf: error: --reward_shaping 'abd' is not registered; registered: {known}"
    ]


def test_several_processes_without_a_launcher_are_refused(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = output(capsys, local_flags(tiny, tmp_path))
    assert (
        "WORLD_SIZE=2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start the ranks with torchrun" in error
    )


def test_batches_that_two_ranks_cannot_share_are_refused(tiny, tmp_path, capsys, monkeypatch):
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    error = output(capsys, local_flags(tiny, tmp_path, **{"rollout.micro_batch_size": 8}))
    assert "a rollout has 8 completions (8 prompts, --rollout.n_samples_per_prompt 1), which 2 ranks cannot" in error
    assert "--rollout.micro_batch_size 4 would do" in error


def test_help_shows_both_sets_of_flags(capsys):
    assert cli.main(["local", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--shaping.beta" in text
    assert "--algo.kl.init_coef" in text


def test_flags_about_a_cluster_are_ignored_and_named(tiny, tmp_path, capsys, monkeypatch):
    from abc_plugin.local import driver

    monkeypatch.setattr(driver, "_train", lambda args: 0)
    cluster = ["--vllm.num_engines", "4", "--actor.num_gpus_per_node=8", "--train.colocate_all", "--ds.enable_sleep"]
    assert cli.main(["local", *local_flags(tiny, tmp_path), *cluster]) == 0
    named = "--vllm.num_engines --actor.num_gpus_per_node --train.colocate_all --ds.enable_sleep"
    assert f"so these are ignored: {named}\n" in capsys.readouterr().out
