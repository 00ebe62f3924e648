"""Prompts and rollouts that would be lost in part: refused, or said, at the start."""

import re
from argparse import Namespace

import pytest
import tokenizer_zoo
from conftest import local_flags
from transformers import AutoTokenizer

from abc_plugin import cli
from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError
from abc_plugin.host.import_openrlhf import import_host

import_host()

from abc_plugin.host.model_checks import preflight  # noqa: E402
from abc_plugin.host.prompt_dataset import check_lengths, check_rollouts, read_data, rendered  # noqa: E402
from abc_plugin.local.flag_checks import parse_for_one_process  # noqa: E402


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        (24, {}, None),
        (18, {}, "the last rollout of an episode has 2 completions, .* give --data.max_samples 16"),
        (20, {}, "has 4 completions, which fill no whole --train.batch_size 8 .* give --data.max_samples 16"),
        (20, {"n_samples": 2}, None),
        (20, {"max_epochs": 2}, None),  # the four fill a batch twice
        (18, {"max_epochs": 4}, "has 2 completions"),  # no micro-batch
        (6, {"batch_size": 4}, "a rollout has 6 completions, no multiple of --train.batch_size 4: OpenRLHF carries"),
        (20, {"ranks": 2, "batch_size": 16, "n_samples": 2}, "has 8 completions, which fill no whole"),
        (18, {"dynamic": True}, None),
        (24, {"freezing": 2}, None),
        (24, {"freezing": 3}, "--critic.freezing_steps 3: the run has 3 steps, so the policy would never be trained"),
    ],
)
def test_no_step_leaves_a_rest(prompts, changes, message):
    values = {"batch_size": 8, "n_samples": 1, "max_epochs": 1, "ranks": 1, "dynamic": False, "freezing": -1}
    values |= changes
    train = Namespace(
        batch_size=values["batch_size"],
        micro_batch_size=4,
        num_episodes=1,
        max_epochs=values["max_epochs"],
        dynamic_batch_enable=values["dynamic"],
    )
    rollout = Namespace(batch_size=8, n_samples_per_prompt=values["n_samples"])
    critic = Namespace(freezing_steps=values["freezing"])
    args = Namespace(train=train, rollout=rollout, critic=critic, algo=Namespace(dynamic_filtering_enable=False))
    try:
        check_rollouts(args, prompts, values["ranks"], saves=True)
    except UserError as error:
        assert message and re.search(message, str(error))
    else:
        assert message is None


def test_without_checkpoints_a_carried_gradient_is_only_said(tiny, tmp_path, capsys):
    words = {"data.max_samples": 24, "rollout.batch_size": 12}
    args, _ = parse_for_one_process(local_flags(tiny, tmp_path, **words), ShapingConfig())
    check_rollouts(args, 24, 1)
    assert "a rollout has 12 completions, no multiple of --train.batch_size 8: the rest waits" in (
        capsys.readouterr().out
    )


def test_local_and_ray_refuse_a_tail_before_a_model_is_read(tiny, tmp_path, capsys):
    changes = {"data.max_samples": 18, "actor.model_name_or_path": "/nowhere/at/all"}
    words = local_flags(tiny, tmp_path, **changes)
    assert cli.main(["local", *words]) == 2
    assert "give --data.max_samples 16" in capsys.readouterr().err
    args, shaping = parse_for_one_process(words, ShapingConfig())[0], ShapingConfig()
    with pytest.raises(UserError, match="give --data.max_samples 16"):
        preflight(args, shaping)


def test_prompts_that_lose_their_front_are_counted_and_empty_ones_refused(tiny, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "policy")

    def check(**changes):
        args, _ = parse_for_one_process(local_flags(tiny, tmp_path, **changes), ShapingConfig())
        texts = rendered(args, read_data(args), tokenizer)
        lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        check_lengths(args, texts, tokenizer)
        return lengths, capsys.readouterr().out

    lengths, said = check(**{"data.max_len": 12})
    cut = sum(length > 4 for length in lengths)
    assert 0 < cut < 24
    assert f"{cut} of 24 prompts lose their front: --data.max_len 12 less --rollout.max_new_tokens 8" in said
    assert f"leaves 4 tokens (longest {max(lengths)})" in said
    assert check()[1] == ""
    for template in ({"data.apply_chat_template": True}, {"data.input_template": "{} What do you say of this film?"}):
        with pytest.raises(UserError, match="of row 1, .* tokens long, .* leaves the last 4, which are the template"):
            check(**{"data.max_len": 12} | template)


def test_a_prompt_without_a_token_is_named(tiny, tmp_path):
    args, _ = parse_for_one_process(local_flags(tiny, tmp_path), ShapingConfig())
    check_lengths(args, ["a", "?!"], tokenizer_zoo.load("bert"))
    with pytest.raises(UserError, match=r"prompts.jsonl: row 2, '\\x01', has no tokens; remove it"):
        check_lengths(args, ["a", "\x01"], tokenizer_zoo.load("bert"))


REFUSING = (
    "{% for m in messages %}{% if 'x' in m.content %}{{ raise_exception('no x, please') }}{% endif %}a{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "changes", "message"),
    [
        (None, {"data.apply_chat_template": True}, "the policy's tokenizer has no chat template"),
        (
            REFUSING,
            {"data.apply_chat_template": True},
            "prompts.jsonl: the policy's chat template refuses row 2: no x",
        ),
        (
            None,
            {"data.input_template": "{prompt} {}"},
            r"'\{prompt\} \{\}' cannot be filled in \(KeyError: 'prompt'\)",
        ),
        (None, {"data.input_template": '{"q": {}}'}, "write other braces twice, {{ and }}"),
        (None, {"data.input_template": "{} {}"}, "cannot be filled in .IndexError"),
    ],
)
def test_a_template_that_does_not_take_a_prompt_names_it(tiny, tmp_path, template, changes, message):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "policy")
    tokenizer.chat_template = template
    args, _ = parse_for_one_process(local_flags(tiny, tmp_path, **changes), ShapingConfig())
    rows = [{args.data.input_key: text, args.data.label_key: ""} for text in ("good", "x")]
    with pytest.raises(UserError, match=message):
        rendered(args, rows, tokenizer)


def test_samples_are_not_written_over_the_prompts_nor_where_nothing_can_be(tiny, tmp_path, capsys):
    for out, says in (
        (tiny / "prompts.jsonl", "is what is read: it would be overwritten"),
        (tiny / "prompts.jsonl" / "x", "cannot be written: "),
    ):
        assert cli.main(["evaluate", *local_flags(tiny, tmp_path), "--out", str(out)]) == 2
        assert f"--out {out} {says}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("algo.kl.init_coef", "nan"),
        ("actor.adam.lr", "inf"),
        ("reward.clip_range", "nan 1"),
        ("actor.max_norm", "inf"),
        ("reward.clip_range", "-10 inf"),
    ],
)
def test_coefficients_are_finite_and_limits_may_be_infinite(tiny, tmp_path, flag, value):
    words = [*local_flags(tiny, tmp_path), f"--{flag}", *value.split()]
    if "inf" in value and flag != "actor.adam.lr":
        parse_for_one_process(words, ShapingConfig())
        return
    with pytest.raises(UserError, match=f"--{flag} (nan|inf) is nothing to compute with"):
        parse_for_one_process(words, ShapingConfig())


MEANINGLESS = """
    train.batch_size=0 train.micro_batch_size=-4 train.num_episodes=0 train.max_epochs=0 data.max_samples=0
    ckpt.max_num=0 ckpt.save_steps=0 ckpt.save_steps=-5 logger.logging_steps=0 train.seed=-1 ds.zero_stage=7
    actor.adam.lr=-0.1 actor.adam.eps=-1 critic.value_clip=-1 actor.eps_clip=-0.2 actor.lr_warmup_ratio=-1
    algo.kl.target=0 algo.kl.horizon=0 algo.kl.init_coef=-1 algo.advantage.gamma=2 rollout.top_p=0 rollout.top_p=1.5
"""


@pytest.mark.parametrize("flag", MEANINGLESS.split())
def test_numbers_without_meaning_are_refused_before_anything_is_read(tiny, tmp_path, flag):
    name, value = flag.split("=")
    with pytest.raises(UserError, match=rf"--{name} {value}(\.0)? has no meaning; give a number that is"):
        parse_for_one_process([*local_flags(tiny, tmp_path), f"--{flag}"], ShapingConfig())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"input": "a"}\n{"input": "b', r"p\.jsonl:2: not JSON"),
        (b'{"input": "a"}\n{"input": "b\x00"}\n', r"p\.jsonl:2: not JSON"),
        (b'{"input": "a"}\n{"input": "b", "input": "c"}\n', r"p\.jsonl:2: not JSON \(the key 'input' is there twice"),
        (b'{"input": "a"}\n{"input": "caf\xe9"}\n', r"no UTF-8 text"),
        (b'{"input": "a \\ud83c b"}\n', "cannot be read: JSON parse error"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tiny, tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    words = local_flags(tiny, tmp_path, **{"data.prompt_dataset": path})
    with pytest.raises(UserError, match=message):
        read_data(parse_for_one_process(words, ShapingConfig())[0])


def test_a_clip_range_has_its_smaller_end_first(tiny, tmp_path):
    words = [*local_flags(tiny, tmp_path), "--reward.clip_range", "10", "-10"]
    with pytest.raises(UserError, match="--reward.clip_range 10.0 -10.0 allows no reward"):
        parse_for_one_process(words, ShapingConfig())
