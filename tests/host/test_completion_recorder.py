"""Completions recorded in training: every number by hand, nothing of the host's changed, what goes to the trackers."""

import copy
import json
import math
import sys
import types

import pytest
import torch
from transformers import AutoTokenizer

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import CannotWrite
from abc_plugin.host.import_openrlhf import import_host

import_host()

from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController  # noqa: E402

from abc_plugin.host.arguments import parse  # noqa: E402
from abc_plugin.host.completion_recorder import Recorder, _shares  # noqa: E402
from abc_plugin.host.experience_maker import CreditExperienceMaker  # noqa: E402
from abc_plugin.report.recorded_completions import read_records  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny / "policy")


class Strategy:
    def __init__(self, args, rank):
        self.args, self.rank = args, rank

    def is_rank_0(self):
        return self.rank == 0


def trainer(tokenizer, out, shaping, *flags, rank=0):
    """What a Recorder sees of the host's trainer."""
    words = ["--reward.model_name_or_path", "x", "--actor.num_gpus_per_node", "1", "--vllm.num_engines", "0"]
    args = parse([*words, "--rollout.batch_size", "8", "--ckpt.output_dir", str(out), *flags])
    args.shaping = shaping
    strategy = Strategy(args, rank)
    maker = CreditExperienceMaker(None, None, None, None, FixedKLController(0.1), strategy, tokenizer)
    host = types.SimpleNamespace(args=args, strategy=strategy, tokenizer=tokenizer, experience_maker=maker)
    host.tensorboard_logger = host.wandb_logger = None
    maker.recorder = Recorder(host)
    return host


def batch(tokenizer):
    """Row 0: left padding, two turns with a tool's token between them, then right padding. Row 1: no action."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    say, hi, ok = (tokenizer.encode(text, add_special_tokens=False) for text in ("Say", " hi", "ok"))
    assert len(say) == len(hi) == len(ok) == 1
    row = [pad, *say, *hi, *ok, *say, end, pad]
    mask = [0, 1, 1, 0, 1, 0]  # action t chose token t + 1: " hi", "ok" and the end
    return [
        Experience(
            sequences=torch.tensor([row, row]),
            attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 0]] * 2),
            action_mask=torch.tensor([mask, [0] * 6]),
            values=torch.tensor([[9.0, 0.5, -0.25, 9.0, 1.0, 9.0]] * 2),
            kl=torch.tensor([[5.0, 1.0, -1.0, 5.0, 0.5, 5.0]] * 2),
            rewards=torch.tensor([2.0, 3.0]),
            truncated=torch.tensor([True, False]),
            response_length=torch.tensor([3, 0]),
            index=[0, 1],
            info={"reward": torch.tensor([2.0, 3.0])},
        )
    ]


def with_attention(experiences):
    for experience in experiences:
        experience.evidence = [{"attention": torch.tensor([[0.2, 0.3, 0.1, 0.3, 0.0, 0.1, 0.0]] * 2)}]
    return experiences


def make(host, experiences, step=1):
    """The maker's work on the experiences of a step, recorded."""
    maker, recorder = host.experience_maker, host.experience_maker.recorder
    recorder.step = step
    made = maker.compute_advantages_and_returns(experiences)
    if recorder.due:
        recorder.record(made, maker._parts)
    return made


def recorded(host, experiences):
    """The lines written while the maker works on the experiences, and what it made."""
    made = make(host, experiences)
    path = host.experience_maker.recorder.path
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines], made


def test_abc_by_hand(tokenizer, tmp_path):
    """Attention .1 .3 .1 on the three actions, reward 2, beta .8, KL coefficient .1."""
    host = trainer(tokenizer, tmp_path, ShapingConfig("abc", 0.8))
    [line], [made] = recorded(host, with_attention(batch(tokenizer)))  # the row without actions is not there
    assert line["prompt"] == "Say"  # no padding
    assert line["tokens"] == [" hi", "ok", "Say", tokenizer.eos_token]
    assert line["special"] == [3] and len(line["ids"]) == 4
    assert line["credit"] == [0.2, 0.6, None, 0.2]
    assert line["shaped_reward"] == pytest.approx([0.32, 0.96, None, 0.32 + 0.4], abs=1e-6)
    assert line["kl_penalty"] == pytest.approx([-0.1, 0.1, None, -0.05], abs=1e-6)
    assert line["value"] == [0.5, -0.25, None, 1.0]
    actions = torch.tensor([1, 2, 4])
    for name, tensor in (("advantage", made.advantages), ("return", made.returns)):
        assert [x for x in line[name] if x is not None] == pytest.approx(tensor[0, actions].tolist(), rel=1e-5)
    general = {
        name: line[name] for name in ("step", "sample", "method", "beta", "reward", "spread_reward", "truncated")
    }
    assert general == {
        "step": 1,
        "sample": 0,
        "method": "abc",
        "beta": 0.8,
        "reward": 2.0,
        "spread_reward": 2.0,
        "truncated": True,
    }


def test_none_has_all_credit_on_the_last_token_and_clipping_shows(tokenizer, tmp_path):
    host = trainer(tokenizer, tmp_path, ShapingConfig("none"), "--reward.clip_range", "-1", "1")
    [line], _ = recorded(host, batch(tokenizer))
    assert line["credit"] == [0.0, 0.0, None, 1.0]
    assert line["shaped_reward"] == [0.0, 0.0, None, 1.0]
    assert line["kl_penalty"] == pytest.approx([-0.1, 0.1, None, -0.05], abs=1e-6)
    assert (line["reward"], line["spread_reward"]) == (2.0, 1.0)


def test_without_a_critic_there_is_no_value(tokenizer, tmp_path):
    host = trainer(tokenizer, tmp_path, ShapingConfig("uniform"), "--algo.advantage.estimator", "reinforce")
    experiences = batch(tokenizer)
    experiences[0].values = None
    [line], _ = recorded(host, experiences)
    assert line["value"] is None and len(line["advantage"]) == 4
    [record], _ = read_records(Recorder(host).path)
    assert "value" not in record.columns and "advantage" in record.columns


@pytest.mark.parametrize("method", ["none", "abc"])
@pytest.mark.parametrize("estimator", ["gae", "reinforce"])
def test_the_host_computes_the_same_with_and_without(tokenizer, tmp_path, method, estimator):
    host = trainer(tokenizer, tmp_path, ShapingConfig(method), "--algo.advantage.estimator", estimator)
    rng = torch.random.get_rng_state()
    lines, [seen] = recorded(host, with_attention(batch(tokenizer)) if method == "abc" else batch(tokenizer))
    assert lines and torch.equal(rng, torch.random.get_rng_state())
    again = with_attention(batch(tokenizer)) if method == "abc" else batch(tokenizer)
    host.experience_maker.recorder = None
    [plain] = host.experience_maker.compute_advantages_and_returns(again)
    assert vars(seen).keys() == vars(plain).keys() and seen.info.keys() == plain.info.keys()
    for name in ("advantages", "returns", "rewards", "values"):
        assert torch.equal(getattr(seen, name), getattr(plain, name))


def test_only_the_steps_asked_for_and_only_on_rank_0(tokenizer, tmp_path):
    def due(every, rank=0):
        host = trainer(tokenizer, tmp_path, ShapingConfig("none", show_every=every), rank=rank)
        recorder, steps = host.experience_maker.recorder, []
        for recorder.step in range(1, 13):
            steps += [recorder.step] if recorder.due else []
        return steps

    assert due(5) == [1, 5, 10]
    assert due(1) == list(range(1, 13))
    assert due(0) == due(5, rank=1) == []


def test_completions_are_chosen_at_evenly_spaced_ranks_of_the_score(tokenizer, tmp_path):
    host = trainer(tokenizer, tmp_path, ShapingConfig("uniform", show_samples=3))
    experiences = [copy.deepcopy(batch(tokenizer)[0]) for _ in range(7)]
    for number, (experience, score) in enumerate(zip(experiences, (3, 9, 1, 7, 5, 2, 4), strict=True)):
        experience.index = [2 * number, 2 * number + 1]
        experience.rewards = torch.tensor([float(score), 100.0])
        experience.info = {"reward": experience.rewards}
    lines, _ = recorded(host, experiences)
    assert [line["reward"] for line in lines] == [9.0, 4.0, 1.0]  # ranks 1, 4 and 7; 100 has no tokens
    assert [line["sample"] for line in lines] == [2, 12, 4]


def test_a_nan_score_is_counted_and_leaves_a_file_that_can_be_read(tokenizer, tmp_path, capsys):
    """Without shaping the host goes on with NaN; its advantages, whitened together, are all NaN then."""
    host = trainer(tokenizer, tmp_path, ShapingConfig("none"), "--algo.advantage.estimator", "reinforce")
    experiences = [copy.deepcopy(batch(tokenizer)[0]) for _ in range(2)]
    experiences[0].rewards = torch.tensor([math.nan, 1.0])
    experiences[0].info = {"reward": experiences[0].rewards}
    for experience, first in zip(experiences, (0, 2), strict=True):
        experience.index = [first, first + 1]
    [line], _ = recorded(host, experiences)
    assert line["sample"] == 2 and line["advantage"] == [None] * 4 and line["reward"] == 2.0
    assert "step 1: 1 rewards are NaN or infinite, not recorded" in capsys.readouterr().out
    [record], notes = read_records(tmp_path / "completions.jsonl")
    assert record.reward == 2.0 and not notes


def test_signed_credit_keeps_its_sign():
    credit_BA = torch.tensor([[1.0, -3.0, 0.0], [0.0, 0.0, 0.0], [0.25, 0.75, 0.0]])
    assert _shares(credit_BA).tolist() == [[0.25, -0.75, 0.0], [0.0, 0.0, 0.0], [0.25, 0.75, 0.0]]


def test_a_resumed_run_replaces_the_steps_it_repeats_and_a_killed_one_leaves_no_mess(tokenizer, tmp_path):
    host = trainer(tokenizer, tmp_path, ShapingConfig("uniform", show_every=1))
    first = host.experience_maker.recorder
    for step in (1, 2, 3, 4):
        make(host, batch(tokenizer), step)
    path = first.path
    path.write_bytes(path.read_bytes()[:-40])  # killed while it wrote step 4
    records, notes = read_records(path)
    assert [record.step for record in records] == [1, 2, 3]
    assert len(notes) == 1 and "completions.jsonl:4 is cut short" in notes[0]
    host.experience_maker.recorder = second = Recorder(host)
    second.run = first.run + "later"
    make(host, batch(tokenizer), 3)  # resumed from the checkpoint of step 2
    records, notes = read_records(path)
    assert [(record.step, record.run) for record in records] == [(1, first.run), (2, first.run), (3, second.run)]
    assert len(notes) == 1


def test_a_file_that_cannot_be_written_is_one_line(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    host = trainer(tokenizer, tmp_path / "file" / "out", ShapingConfig("none"))
    with pytest.raises(CannotWrite, match=r"completions\.jsonl cannot be written: .*--shaping\.show_every 0"):
        recorded(host, batch(tokenizer))


class Writer:
    def __init__(self):
        self.images = []

    def add_image(self, *args, **kwargs):
        self.images.append((args, kwargs))


def test_tensorboard_gets_a_picture_and_wandb_a_page(tokenizer, tmp_path):
    host = trainer(tokenizer, tmp_path, ShapingConfig("abc"))
    host.tensorboard_logger = types.SimpleNamespace(writer=Writer())
    logged = []
    wandb = types.SimpleNamespace(log=logged.append, Html=lambda text, inject: ("html", text, inject))
    host.wandb_logger = types.SimpleNamespace(handle=wandb)
    recorded(host, with_attention(batch(tokenizer)))
    [((tag, pixels, step), how)] = host.tensorboard_logger.writer.images
    assert (tag, step, how) == ("completions/credit", 1, {"dataformats": "HWC"})
    assert (
        pixels.shape[2] == 3 and pixels.shape[1] > 800 and len(set(map(tuple, pixels[:, 100:400].reshape(-1, 3)))) > 20
    )
    [log] = logged
    assert log["train/global_step"] == 1
    kind, page, inject = log["train/completions"]
    assert kind == "html" and not inject and "credit 60.0 %" in page and "<script" not in page


def test_without_matplotlib_the_run_goes_on_and_says_so_once(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "abc_plugin.report.heatmap_png", raising=False)
    host = trainer(tokenizer, tmp_path, ShapingConfig("none", show_every=1))
    host.tensorboard_logger = types.SimpleNamespace(writer=Writer())
    for step in (1, 2):
        make(host, batch(tokenizer), step)
    assert capsys.readouterr().out.count("matplotlib is not installed") == 1
    assert not host.tensorboard_logger.writer.images
    assert len(read_records(tmp_path / "completions.jsonl")[0]) == 2
