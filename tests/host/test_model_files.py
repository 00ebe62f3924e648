"""Files that are not the model that would run are refused by name, whoever would load them, before anything loads."""

import contextlib
import json
import shutil

import pytest
import torch
from conftest import local_flags
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from abc_plugin import cli
from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError
from abc_plugin.host.import_openrlhf import import_host

import_host()

from abc_plugin.attention import model_files  # noqa: E402
from abc_plugin.attention.scalar_head import check_files  # noqa: E402
from abc_plugin.host.model_checks import check_models, preflight  # noqa: E402
from abc_plugin.local.flag_checks import parse_for_one_process  # noqa: E402

ACTOR, REWARD, CRITIC = (f"{name}.model_name_or_path" for name in ("actor", "reward", "critic"))


@pytest.fixture
def copies(tiny, tmp_path):
    """Policy and reward model, to be changed."""
    for name in ("policy", "reward_model"):
        shutil.copytree(tiny / name, tmp_path / name)
    return tmp_path


def change_weights(path, change):
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", {"format": "pt"})


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def prefixed(weights):
    return {f"module.{name}": value for name, value in weights.items()}


def refusal(check, *args, **kwargs):
    with pytest.raises(UserError) as error:
        check(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def local(tiny, tmp_path, shaping=None, **changes):
    return parse_for_one_process(local_flags(tiny, tmp_path / "out", **changes), shaping or ShapingConfig())[0]


FIRST = "model.embed_tokens.weight"


def test_a_checkpoint_under_other_names_is_refused_by_everyone_who_would_load_it(tiny, copies, tmp_path, capsys):
    for name in ("policy", "reward_model"):
        change_weights(copies / name, prefixed)
    policy, reward = copies / "policy", copies / "reward_model"
    says = f"weights of its model, the first {FIRST}, which would be random; its files have module.{FIRST}"
    for changes in (
        {ACTOR: policy},
        {REWARD: reward},
        {CRITIC: policy},
        {REWARD: f"{tiny / 'reward_model'},{reward}"},
    ):
        for check in (check_models, preflight):
            args = local(tiny, tmp_path, **changes)
            [(flag, path)] = changes.items()
            assert f"--{flag} {str(path).split(',')[-1]} lacks" in (said := refusal(check, args, args.shaping))
            assert says in said
    commands = {
        "evaluate": [*local_flags(tiny, tmp_path / "out", **{ACTOR: policy}), "--out", tmp_path / "samples.jsonl"],
        "audit": [f"--{REWARD}", reward, "--data", tiny / "prompts.jsonl", "--out", tmp_path / "audit"],
        "serve-rm": [f"--{REWARD}", reward, "--ds.attn_implementation", "sdpa"],
    }
    for command, words in commands.items():
        assert cli.main([command, *map(str, words)]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]


def drop(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def grow(name, *size):
    return lambda weights: weights | {name: torch.zeros(size)}


LAYER = "model.layers.1.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(LAYER), f"lacks 1 weights of its model, the first {LAYER}, which would be random; save it whole"),
        (
            grow("score.weight", 2, 32),
            "its head score.weight is no scalar of the model's width (2x32 instead of 1x32)",
        ),
        (
            grow("score.weight", 1, 64),
            "its head score.weight is no scalar of the model's width (1x64 instead of 1x32)",
        ),
        (grow(LAYER, 32, 64), f"{LAYER} is 32x64 in its files and 32x32 by its config.json (1 such weights)"),
        (grow("model.embed_tokens.weight", 8, 32), f"{FIRST} is 8x32 in its files and 49152x32 by its config.json"),
    ],
)
def test_names_and_shapes_are_the_configs(copies, change, message):
    change_weights(copies / "reward_model", change)
    assert message in refusal(check_files, str(copies / "reward_model"), head="score", normalise=False)


def test_weights_that_no_part_of_the_model_uses_are_said(copies, capsys):
    change_weights(copies / "reward_model", grow("model.layers.7.mlp.up_proj.weight", 2, 2))
    change_weights(copies / "reward_model", grow("score.bias", 1))
    check_files(str(copies / "reward_model"), head="score", normalise=False)
    assert "2 weights of its files are left out, the first model.layers.7.mlp" in capsys.readouterr().out


def test_shards_and_files_that_are_missing_or_cut_short(copies):
    path = copies / "policy"
    weights = load_file(path / "model.safetensors")
    names = sorted(weights)
    (path / "model.safetensors").unlink()
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, path / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = AutoConfig.from_pretrained(path)
    model_files.check_weights("--x", str(path), config)
    whole = (path / "b.safetensors").read_bytes()
    (path / "b.safetensors").write_bytes(whole[:-100])
    assert "b.safetensors of its weights cannot be read" in refusal(
        model_files.check_weights, "--x", str(path), config
    )
    (path / "b.safetensors").unlink()
    assert "b.safetensors of its weights cannot be read: it is missing" in refusal(
        model_files.check_weights, "--x", str(path), config
    )


def test_an_adapter_is_its_configs_on_its_base(copies):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(copies / "policy"), LoraConfig(target_modules="all-linear")
    )
    model.save_pretrained(copies / "adapter")
    path = copies / "adapter"
    model_files.check_adapter("--x", str(path))
    whole = load_file(path / "adapter_model.safetensors")
    name = next(iter(whole))
    save_file(drop(name)(whole), path / "adapter_model.safetensors")
    assert f"{name} is missing in adapter_model.safetensors" in refusal(model_files.check_adapter, "--x", str(path))
    change_json(path / "adapter_config.json", target_modules=["query"])
    assert "is no adapter of" in refusal(model_files.check_adapter, "--x", str(path))


def short_gpt2(path, tokenizer, positions):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, num_labels=1, vocab_size=49152, n_positions=positions)
    GPT2ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_every_model_has_rows_and_positions_for_what_it_reads(tiny, copies, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "policy")
    gpt2 = short_gpt2(copies / "gpt2", tokenizer, 24)
    for changes in ({REWARD: gpt2}, {CRITIC: gpt2}, {REWARD: f"{tiny / 'reward_model'},{gpt2}"}):
        args = local(tiny, tmp_path, **changes)
        [flag] = changes
        assert f"--data.max_len 48 is more than the 24 positions of --{flag} {gpt2}: lower it" == refusal(
            check_models, args, args.shaping
        )
    assert cli.main(["serve-rm", f"--{REWARD}", str(gpt2), "--ds.attn_implementation", "sdpa"]) == 2
    assert "--data.max_len 2048 is more than the 24 positions" in capsys.readouterr().err
    change_json(copies / "reward_model" / "config.json", max_position_embeddings=16)  # rotary
    args = local(tiny, tmp_path, **{REWARD: copies / "reward_model"})
    check_models(args, args.shaping)
    assert "sequences of up to 16 tokens (max_position_embeddings), and --data.max_len allows 48" in (
        capsys.readouterr().out
    )
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(copies / "policy")
    args = local(tiny, tmp_path, **{ACTOR: copies / "policy"})
    assert "has 49152 embedding rows, none for the id 49152 of the tokenizer" in refusal(
        check_models, args, args.shaping
    )


def test_a_policy_with_rows_that_are_no_tokens_is_warned_of_on_ray(tiny, copies, tmp_path, capsys):
    change_weights(copies / "policy", grow(FIRST, 49280, 32))
    change_json(copies / "policy" / "config.json", vocab_size=49280)
    args = local(tiny, tmp_path, **{ACTOR: copies / "policy"})
    preflight(args, args.shaping)
    warning = "embedding rows for the ids 49152 to 49279, which are no tokens; vLLM may draw one"
    assert warning in capsys.readouterr().out
    check_models(args, args.shaping)
    assert warning not in capsys.readouterr().out
    cli.main(["check-tokenizers", str(copies / "policy"), str(copies / "reward_model")])
    said = " ".join(capsys.readouterr().out.split())
    assert "ids from 49152 on are no tokens: abc-rlhf local never draws one, vLLM under abc-rlhf ray may" in said


@pytest.mark.parametrize(
    ("given", "asked", "message"),
    [
        ({}, True, "--reward.normalize_enable: --reward.model_name_or_path .* has no mean and std"),
        ({"mean": 1.0}, True, r"config.json has {'mean': 1.0}: a mean and a std above 0 belong together"),
        ({"mean": 1.0}, False, r"config.json has {'mean': 1.0}"),  # OpenRLHF reads both, whether asked or not
        ({"mean": 1.0, "std": 0.0}, True, "a std above 0"),
        ({"mean": "1", "std": 1}, True, "a std above 0"),
        ({"mean": 1.0, "std": 2}, True, None),
        ({}, False, None),
    ],
)
def test_normalisation_needs_mean_and_deviation(copies, given, asked, message):
    change_json(copies / "reward_model" / "config.json", **given)
    with contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_files(str(copies / "reward_model"), head="score", normalise=asked)


def test_what_could_not_be_saved_at_the_end_is_refused_at_the_start(tiny, copies, tmp_path):
    change_json(copies / "policy" / "generation_config.json", temperature=0.9)
    for check in (check_models, preflight):
        args = local(tiny, tmp_path, **{ACTOR: copies / "policy"})
        said = refusal(check, args, args.shaping)
        assert "transformers could not save the trained model again: GenerationConfig is invalid" in said
        assert "You should set `do_sample=True` or unset `temperature`" in said
    (copies / "policy" / "generation_config.json").unlink()  # then transformers makes one of the config
    tokenizer = AutoTokenizer.from_pretrained(copies / "policy")
    model_files.check_savable("--x", str(copies / "policy"), tokenizer)
    change_json(copies / "policy" / "config.json", temperature=0.9)
    said = refusal(model_files.check_savable, "--x", str(copies / "policy"), tokenizer)
    assert "could not save the trained model again: GenerationConfig is invalid" in said


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"base_model_name_or_path": null, "weight_map": null}'])
def test_files_that_are_no_json_or_lack_their_key_are_named(copies, content):
    path = copies / "policy"
    (path / "adapter_config.json").write_text(content)
    assert "adapter_config.json is damaged: base_model_name_or_path cannot" in refusal(
        model_files.read_config, "--x", str(path)
    )
    (path / "model.safetensors").rename(path / "other")
    (path / "model.safetensors.index.json").write_text(content)
    assert "index.json is damaged: weight_map cannot be read" in refusal(model_files.read_headers, "--x", str(path))
