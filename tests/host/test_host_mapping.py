"""A reward model with another tokenizer in the drivers: refused, mapped, or read on as asked."""

import json

import pytest
import tokenizer_zoo
import torch
from conftest import local_flags
from local_runs import scalars

from abc_plugin.cli import main
from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError
from abc_plugin.host.import_openrlhf import import_host

import_host()

from test_model_workers import worker  # noqa: E402

from abc_plugin.host.model_checks import check_models  # noqa: E402
from abc_plugin.host.model_workers import OwnTokens  # noqa: E402
from abc_plugin.local.flag_checks import parse_for_one_process  # noqa: E402
from abc_plugin.text import tokenizer_mapping  # noqa: E402


def flags(other, out, **changes):
    return local_flags(other, out, reward_shaping="abc", **changes)


MAP = {"shaping.tokenizer_check": "map"}


def test_strict_names_the_difference_and_every_way_on(other, tmp_path, capsys):
    assert main(["local", *flags(other, tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "must share a tokenizer, but " in said
    assert "use a model trained with the policy's tokenizer or --shaping.tokenizer_check map" in said
    assert "abc-rlhf check-tokenizers" in said


def checked(words, capsys, **shaping):
    args, _ = parse_for_one_process(words, ShapingConfig("abc", **shaping))
    check_models(args, args.shaping)
    return args, capsys.readouterr().out


def test_off_says_so_out_loud(other, tmp_path, capsys):
    words = local_flags(other, tmp_path)
    args, said = checked(words, capsys, tokenizer_check="off")
    assert "WARNING: --shaping.tokenizer_check off" in said and "credit are those of another text" in said
    assert args.critic.model_name_or_path == str(other / "reward_model")


def test_map_gives_the_critic_the_policys_tokens(other, tiny, tmp_path, capsys):
    args, said = checked(local_flags(other, tmp_path), capsys, tokenizer_check="map")
    assert "reads the text in its own tokens" in said and "the critic starts from the policy" in said
    assert args.critic.model_name_or_path == str(other / "policy")
    args, said = checked(local_flags(tiny, tmp_path), capsys, tokenizer_check="map")
    assert said == "" and args.critic.model_name_or_path == str(tiny / "reward_model")


def test_a_critic_of_its_own_with_another_tokenizer_is_refused(other, tiny, tmp_path, capsys):
    words = local_flags(tiny, tmp_path, **{"critic.model_name_or_path": other / "reward_model"})
    with pytest.raises(UserError, match="--critic.model_name_or_path .* must share a tokenizer"):
        checked(words, capsys, tokenizer_check="map")


def test_settings_that_do_not_go_together(other, tmp_path, capsys):
    with pytest.raises(UserError, match="--shaping.reward_text chat needs --shaping.tokenizer_check map"):
        ShapingConfig("abc", reward_text="chat")
    words = [*local_flags(other, tmp_path), "--data.apply_chat_template"]
    with pytest.raises(UserError, match="chat needs the bare prompts, but --data.apply_chat_template"):
        checked(words, capsys, tokenizer_check="map", reward_text="chat")
    words = [*local_flags(other, tmp_path), "--data.input_template", "User: {}"]
    with pytest.raises(UserError, match="chat needs the bare prompts, but --data.input_template"):
        checked(words, capsys, tokenizer_check="map", reward_text="chat")


def test_a_text_of_its_own_is_read_also_where_the_tokenizers_agree(tiny, tmp_path):
    def needed(text):
        shaping = ShapingConfig("abc", tokenizer_check="map", reward_text=text)
        args, _ = parse_for_one_process(local_flags(tiny, tmp_path), shaping)
        return OwnTokens(args, str(tiny / "reward_model")).needed

    assert [needed(text) for text in ("plain", "special", "chat")] == [False, True, True]


def test_a_reward_model_without_a_usable_chat_template_is_refused_before_it_is_loaded(other, tmp_path, capsys):
    with pytest.raises(UserError, match="--shaping.reward_text chat, --reward.model_name_or_path .*cannot be used"):
        checked(local_flags(other, tmp_path), capsys, tokenizer_check="map", reward_text="chat")


def test_the_worker_scores_the_text_in_its_own_tokens(other, tmp_path, monkeypatch):
    policy, own = tokenizer_zoo.load("smollm2"), tokenizer_zoo.load("gpt2")
    extra = ["--actor.model_name_or_path", str(other / "policy")]
    text = "The film was naïve 🎬 fun"
    ids = torch.tensor([policy(text, add_special_tokens=False)["input_ids"]])
    mask = torch.ones_like(ids)
    action_mask = torch.zeros(1, ids.shape[1] - 1, dtype=torch.long)
    action_mask[:, 3:] = 1
    mapped = worker(other, monkeypatch, ShapingConfig("abc", tokenizer_check="map"), extra=extra)
    reward_B, [evidence], info = mapped.forward(ids, mask, action_mask=action_mask, prompts=["The film"])
    alone = worker(other, monkeypatch, ShapingConfig("abc"))
    own_ids = torch.tensor([own(text, add_special_tokens=False)["input_ids"]])
    expected_B, [own], _ = alone.forward(own_ids, torch.ones_like(own_ids))
    torch.testing.assert_close(reward_B, expected_B)
    row_BS = evidence["attention"]
    torch.testing.assert_close(row_BS.sum(1), own["attention"].sum(1))
    assert row_BS.shape == ids.shape and info["credit_moved"] == 0.0 and info["reward_truncated"] == 0.0
    signed, own_signed = (
        worker(other, monkeypatch, shaping, extra=extra).forward(ids_, torch.ones_like(ids_), **parts).evidence[0]
        for shaping, ids_, parts in (
            (ShapingConfig("abc_signed", tokenizer_check="map"), ids, {"action_mask": action_mask, "prompts": [""]}),
            (ShapingConfig("abc_signed"), own_ids, {}),
        )
    )
    torch.testing.assert_close(signed["contribution"].sum(1), own_signed["contribution"].sum(1))
    shaping = ShapingConfig("shapley", tokenizer_check="map", calls=2, segment="sentence")
    _, [evidence], info = worker(other, monkeypatch, shaping, extra=extra).forward(
        ids, mask, action_mask=action_mask, prompts=["The film"]
    )
    alone_B = mapped.forward(ids[:, :4], mask[:, :4], action_mask=action_mask[:, :3] * 0, prompts=["The film"]).output
    torch.testing.assert_close(evidence["shapley"].sum(1), (expected_B - alone_B).float(), atol=0.02, rtol=0.02)
    assert info["shapley_segments"].tolist() == [1.0] and evidence["shapley"].count_nonzero() == 1  # one sentence
    uniform = worker(other, monkeypatch, ShapingConfig("uniform", tokenizer_check="map"), extra=extra)
    scored = uniform.forward(ids, mask, action_mask=action_mask, prompts=["The film"])
    torch.testing.assert_close(scored.output, expected_B)
    assert scored.evidence == [{}]


@pytest.mark.parametrize(("text", "special"), [("plain", False), ("special", True), ("chat", False)])
def test_what_the_reward_model_reads_is_as_asked(other, monkeypatch, text, special):
    asked = {}
    original = tokenizer_mapping.map_batch

    def spy(*args, **kwargs):
        asked.update(kwargs)
        return original(*args, **kwargs | {"messages_B": None})

    monkeypatch.setattr("abc_plugin.host.model_workers.map_batch", spy)
    extra = ["--actor.model_name_or_path", str(other / "policy")]
    shaping = ShapingConfig("abc", tokenizer_check="map", reward_text=text)
    self = worker(other, monkeypatch, shaping, extra=extra)
    self.forward(torch.tensor([[500, 600, 700]]), torch.ones(1, 3), action_mask=torch.ones(1, 2), prompts=["Hi"])
    turns = [[{"role": "user", "content": "Hi"}]] if text == "chat" else None
    assert asked == {"special_tokens": special, "messages_B": turns, "max_length": 1024, "ends": (2,)}


def test_a_run_with_mapped_credit(other, tmp_path, local_runs):
    local_runs.done(flags(other, tmp_path, **MAP, **{"data.max_samples": 8}))
    figures = scalars(tmp_path)
    assert all(len(figures[f"train/{name}"]) == 1 for name in ("credit_moved", "reward_truncated", "credit_entropy"))
    assert figures["train/credit_conservation_error"][0][1] < 1e-5


def test_evaluate_maps_as_the_run_does(other, tmp_path):
    out = tmp_path / "samples.jsonl"
    words = local_flags(other, tmp_path, reward_shaping="abc", **MAP, **{"data.max_samples": 4})
    assert main(["evaluate", *words, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert len(line["tokens"]) == len(line["credit"]) and sum(line["credit"]) == pytest.approx(1.0, abs=1e-5)
