"""A study's plan: what it says, what is refused, and that the plans of launch/study say what the scripts beside do."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from abc_plugin import cli
from abc_plugin.host.import_openrlhf import import_host
from abc_plugin.local import flag_values as host_flags
from abc_plugin.tools.study import run_settings
from abc_plugin.tools.study.plan import OWNED, command_words, read_plan
from abc_plugin.tools.study.run_settings import Run, columns, give_names, resolve, text

import_host()

from abc_plugin.host import model_checks  # noqa: E402

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "launch" / "study").glob("*.yaml"))

EXAMPLE = """
out: runs/x
flags:
  actor.model_name_or_path: ${HERE}/policy
  algo.advantage.lambd: 0.95
  actor.adam.betas: [0.9, 0.999]
  ds.load_in_4bit: true
runs:
  - {reward_shaping: [none, uniform], train.seed: 1..3}
  - {reward_shaping: abc, shaping.beta: [0.8, 1.0], train.seed: [7, -1..0]}
smoke:
  train.seed: [1, 2]
  shaping.beta: 0.5
  data.max_samples: 8
"""


@pytest.fixture
def plan_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HERE", "/here")

    def write(content: str) -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(content)
        return path

    return write


def varied(plan) -> list[tuple[str, ...]]:
    """The runs' own values, in the order in which their block names the flags."""
    return [tuple(words[0] for name, words in run.items() if name not in plan.common) for run in plan.runs]


def test_a_plan_is_the_union_of_its_grids(plan_file):
    plan = read_plan(plan_file(EXAMPLE))
    assert plan.driver == "local" and plan.out == "runs/x" and plan.keep_policies is False
    assert plan.common == {
        "actor.model_name_or_path": ("/here/policy",),
        "algo.advantage.lambd": ("0.95",),
        "actor.adam.betas": ("0.9", "0.999"),
        "ds.load_in_4bit": ("true",),
    }
    assert varied(plan) == [
        *[("none", "1"), ("none", "2"), ("none", "3"), ("uniform", "1"), ("uniform", "2"), ("uniform", "3")],
        *[("abc", "0.8", "7"), ("abc", "0.8", "-1"), ("abc", "0.8", "0")],
        *[("abc", "1.0", "7"), ("abc", "1.0", "-1"), ("abc", "1.0", "0")],
    ]
    assert shlex.join(command_words(plan.runs[0])) == (
        "--actor.model_name_or_path /here/policy --algo.advantage.lambd 0.95 --actor.adam.betas 0.9 0.999 "
        "--ds.load_in_4bit --reward_shaping none --train.seed 1"
    )
    assert command_words({"ds.load_in_4bit": ("false",), "train.seed": ("1",)}) == ["--train.seed", "1"]


def test_smoke_replaces_the_values_of_the_blocks_that_have_the_flag_and_the_common_ones(plan_file):
    plan = read_plan(plan_file(EXAMPLE), smoke=True)
    assert plan.out == "runs/x-smoke"
    assert varied(plan) == [("none", "1"), ("none", "2"), ("uniform", "1"), ("uniform", "2")] + [
        ("abc", "1"),
        ("abc", "2"),
    ]
    assert plan.common["data.max_samples"] == ("8",) and plan.common["shaping.beta"] == ("0.5",)
    assert "train.seed" not in plan.common


def test_the_frozen_plan_reads_as_the_same(plan_file, tmp_path):
    plan = read_plan(plan_file(EXAMPLE), smoke=True)
    (tmp_path / "frozen.yaml").write_text(plan.text)
    again = read_plan(tmp_path / "frozen.yaml")
    assert (again.common, again.runs, again.text) == (plan.common, plan.runs, plan.text)


def test_a_plan_like_another_says_only_what_it_changes(plan_file, tmp_path):
    path = plan_file(EXAMPLE)
    (tmp_path / "other.yaml").write_text(
        "like: plan.yaml\nflags: {data.max_len: 96}\nruns: [{train.seed: 1..2}]\nsmoke: {data.max_samples: 4}"
    )
    base, plan = read_plan(path), read_plan(tmp_path / "other.yaml")
    assert plan.common == base.common | {"data.max_len": ("96",)} and plan.driver == base.driver
    assert varied(plan) == [("1",), ("2",)] and plan.out is None  # runs and place are its own
    small = read_plan(tmp_path / "other.yaml", smoke=True)
    assert small.common["data.max_samples"] == ("4",) and varied(small) == [("1",), ("2",)]


RUNS = "runs: [{train.seed: 1}]"
REFUSED = {
    "": "this file has none",
    "runs: [": "while parsing",
    "runs: [{[a, b]: 1}]": "found unhashable key",
    f"like: none.yaml\n{RUNS}": "none.yaml cannot be read: No such file",
    f"like: plan.yaml\n{RUNS}": "like 'plan.yaml' comes back to it",
    f"speed: 3\n{RUNS}": "Key 'speed' not in 'Schema'; a plan's keys are like, driver,",
    f"driver: slurm\n{RUNS}": "driver: Invalid value 'slurm', expected one of ['local', 'ray']",
    f"keep_policies: perhaps\n{RUNS}": "keep_policies: Value 'perhaps' is not a valid bool",
    f"{RUNS}\n{RUNS}": "'runs' is there twice",
    "flags: {}": "runs is empty",
    "runs: {train.seed: 1}": "runs is a list of such maps",
    "runs: [{train.seed: []}]": "train.seed: [] is no value",
    "runs: [{train.seed: 3..1}]": "the range 3..1 is empty",
    "runs: [{train.seed: }]": "train.seed: '' is no value",
    "runs: [{train.seed: {a: 1}}]": "is no value",
    f"flags: [a]\n{RUNS}": "flags and smoke map names to values",
    f"flags: {{data.max_len: '${{NOT_SET_ANYWHERE}}'}}\n{RUNS}": "Environment variable 'NOT_SET_ANYWHERE' not found",
    **{f"flags: {{{name}: x}}\n{RUNS}": f"{name} is the study's own business" for name in OWNED},
}


@pytest.mark.parametrize("content", REFUSED)
def test_a_wrong_plan_is_one_line_that_names_what_is_wrong(plan_file, content, tmp_path, capsys):
    path = plan_file(content)
    assert cli.main(["study", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"abc-rlhf: error: {path}: ") and REFUSED[content] in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_plan_that_is_not_there_or_names_no_directory(plan_file, tmp_path, capsys):
    assert cli.main(["study", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml cannot be read: No such file" in capsys.readouterr().err
    assert cli.main(["study", str(plan_file(RUNS))]) == 2
    assert "give --out DIR" in capsys.readouterr().err
    assert cli.main(["study", str(plan_file(RUNS)), "--jobs", "0"]) == 2


def setting(value: str = "1", **more: str) -> Run:
    values = {"reward_shaping": "abc", "shaping.beta": "0.8", "train.seed": "1"} | more
    values |= {"algo.advantage.lambd": value}
    return Run({name: (value,) for name, value in values.items() if value}, values)


def test_columns_and_names_tell_what_varies():
    none = {"reward_shaping": "none", "shaping.beta": ""}
    runs = [setting("1", **{"data.x": "/a/c"}), setting("0.95", **none | {"data.x": "/a/b"})]
    for run, made in zip(runs, ("/a/critic", ""), strict=True):  # of the same flag, as by an estimator without critic
        run.options["critic.x"], run.settings["critic.x"] = ("/a/critic",), made
    assert columns(runs) == ["reward_shaping", "shaping.beta", "algo.advantage.lambd", "data.x", "train.seed"]
    give_names(runs, [])
    assert [run.name for run in runs] == ["abc-beta0.8-lambda1-data.xc-seed1", "none-lambda0.95-data.xb-seed1"]


def test_a_run_that_is_there_keeps_its_folder_when_the_plan_grows():
    old, same, new = setting("1"), setting("1"), setting("0.95")
    old.name = "abc-beta0.8-seed1"
    give_names([same, new], [old])
    assert (same.name, new.name) == ("abc-beta0.8-seed1", "abc-beta0.8-lambda0.95-seed1")
    alike = [setting("a b"), setting("a_b")]
    give_names(alike, [old])
    assert [run.name for run in alike] == ["abc-beta0.8-lambdaa_b-seed1", "abc-beta0.8-lambdaa_b-seed1~2"]


def test_a_folders_name_fits_every_file_system_and_tells_runs_apart():
    runs = [setting("1", **{f"data.{'x' * 120}{i}": value for i in "ab"}) for value in ("/a/c", "/a/b")]
    give_names(runs, [])
    assert [len(run.name) for run in runs] == [200, 200] and runs[0].name != runs[1].name


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, "1"), (1.0, "1"), (0.95, "0.95"), (1e-5, "1e-05"), (None, ""), (True, "true"), ([0.9, 1.0], "0.9 1")],
)
def test_equal_numbers_read_the_same(value, expected):
    assert text(value) == expected


@pytest.fixture
def asked(monkeypatch):
    """The host is asked in this process, which has imported it."""
    monkeypatch.setattr(run_settings, "ask_host", host_flags.answer)


def tiny_plan(tiny, runs: str, more: str = "") -> str:
    return f"""
flags:
  actor.model_name_or_path: {tiny}/policy
  reward.model_name_or_path: {tiny}/reward_model
  data.prompt_dataset: {tiny}/prompts.jsonl
  data.max_samples: 16
  data.max_len: 48
  rollout.max_new_tokens: 8
  rollout.batch_size: 8
  train.batch_size: 8
{more}
runs:
{runs}
"""


def test_the_host_completes_the_settings_and_counts_the_steps(asked, plan_file, tiny):
    blocks = """
  - {reward_shaping: [none, abc], train.seed: [5, 4]}
  - {reward_shaping: [none, abc], shaping.beta: [0.8, 1], train.seed: [5, 4]}
  - {reward_shaping: abc, algo.advantage.lambd: [1.0, 0.5], train.seed: 4, train.num_episodes: 2}
"""
    plan = read_plan(plan_file(tiny_plan(tiny, blocks)))
    old = plan.common | {"reward_shaping": ("none",), "data.input_key": ("input",)}
    runs, [old], answer = resolve(plan, {"old": old})
    give_names(runs, [old])
    # 16 prompts in rollouts of 8 are 2 steps; `abc` at beta 0.8 and `none` are in two blocks, and run once.
    assert [(run.name, run.steps) for run in runs] == [
        ("none-lambda1-train.num_episodes1-seed5", 2),
        ("abc-beta0.8-lambda1-train.num_episodes1-seed5", 2),
        ("abc-beta1-lambda1-train.num_episodes1-seed5", 2),
        ("none-lambda1-train.num_episodes1-seed4", 2),
        ("abc-beta0.8-lambda1-train.num_episodes1-seed4", 2),
        ("abc-beta1-lambda1-train.num_episodes1-seed4", 2),
        ("abc-beta0.8-lambda1-train.num_episodes2-seed4", 4),
        ("abc-beta0.8-lambda0.5-train.num_episodes2-seed4", 4),
    ]
    assert (old.settings["train.seed"], old.settings["shaping.beta"]) == ("42", "")
    assert {run.settings["data.input_key"] for run in runs} == {"input"}  # which only the older run names
    assert answer["gpus"] >= 0


HOST_REFUSES = {
    "reward_shaping: abcd": "--reward_shaping 'abcd' is not registered",
    "shaping.beta: 2": "--shaping.beta 2.0 is outside [0, 1]",
    "train.sed: 1": "unrecognized arguments: --train.sed 1",
    "train.see: 1": "unknown flag train.see",
    "train.seed: a": "invalid int value: 'a'",
    "actor.model_name_or_path: /nowhere/at/all": "/nowhere/at/all: no such directory",
    "help: true": "--help is no setting of a run",
}


@pytest.mark.parametrize("wrong", HOST_REFUSES)
def test_what_the_host_or_a_runs_checks_refuse_is_refused_before_any_run(
    asked, plan_file, tiny, tmp_path, capsys, wrong
):
    blocks = f"  - {{{wrong}}}\n  - {{reward_shaping: none, train.seed: 1}}"
    plan = plan_file(tiny_plan(tiny, blocks))
    assert cli.main(["study", str(plan), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"abc-rlhf: error: {plan}: ") and HOST_REFUSES[wrong] in error
    assert f"[run: {wrong.replace(': ', ' ')}]" in error or "unknown flag" in error
    assert not (tmp_path / "out").exists()


def flags_of(script: str, environment: dict[str, str], tmp_path: Path, call: str = "") -> dict[str, str]:
    """The flags with which a script would start ``abc-rlhf local``."""
    stand_in = tmp_path / "bin" / "abc-rlhf"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environment = os.environ | {"VIRTUAL_ENV": str(tmp_path)} | environment
    words = ["bash", "-c", f"source {script}; {call}"] if call else ["bash", script]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    flags: dict[str, list[str]] = {}
    for word in done.stdout.split("\n")[1:-1]:
        if word.startswith("--"):
            flags[word[2:]] = values = []
        else:
            values.append(word)
    return {name: " ".join(values) or "true" for name, values in flags.items()}


PAPER = {
    "paper_imdb": ("imdb_gpt2", {}),
    "paper_imdb_lengths": ("imdb_gpt2", {"data.max_len": "176"}),  # room for the longest completions
    "paper_tldr": ("tldr_gptj", {}),
    "paper_hh": ("hh_openllama", {}),
}
FROM_HERE = {"PROMPTS": str(ROOT / "setup.py"), "REWARD_MODEL": "their/reward"}


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_plan_has_the_flags_of_its_script(name, tmp_path, monkeypatch):
    script, other = PAPER[name]
    for variable, value in (FROM_HERE | {"POLICY": "their/policy"}).items():
        monkeypatch.setenv(variable, value)
    plan = read_plan(ROOT / "launch" / "study" / f"{name}.yaml")
    environment = {
        "POLICY": plan.common["actor.model_name_or_path"][0],
        "REWARD_MODEL": plan.common["reward.model_name_or_path"][0],
        "PROMPTS": str(ROOT / "setup.py") if script != "tldr_gptj" else "trl-lib/tldr",
    }
    theirs = flags_of(f"launch/paper/{script}.sh", environment, tmp_path)
    assert theirs.pop("reward_shaping") == "abc"  # which the plan varies
    for name in OWNED:
        theirs.pop(name, None)
    assert {name: " ".join(words) for name, words in plan.common.items()} == theirs | other


def test_the_embedded_plan_has_the_flags_of_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO", "demo")
    plan = read_plan(ROOT / "launch" / "study" / "embedded.yaml")
    theirs = flags_of("launch/imdb.sh", {"DEMO": "demo"}, tmp_path, "train OUT")
    theirs.pop("ds.param_dtype", None)  # the script's answer to a CPU without fast bf16
    ours = {name: " ".join(words) for name, words in plan.common.items() if name != "shaping.show_every"}
    assert ours == {name: words for name, words in theirs.items() if name not in OWNED}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_plans_in_small_are_runs_that_the_host_takes(asked, path, tiny, monkeypatch):
    for variable in ("POLICY", "REWARD_MODEL", "PROMPTS"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("DEMO", "SMALL", "OTHER", "LEXICON"):  # as study.sh sets them
        monkeypatch.setenv(variable, str(tiny))
    monkeypatch.setattr(model_checks, "check_models", lambda *_: None)  # those of the embedded ones take their time
    plan = read_plan(path, smoke=True)
    runs, _, _ = resolve(plan, {})
    assert {run.settings["train.seed"] for run in runs} == {"1", "2"}
    assert {run.steps for run in runs} == {2} and len(runs) >= 4
    methods = {run.settings["reward_shaping"] for run in runs}
    assert "none" in methods and methods & {"abc", "abc_signed"}


def test_a_host_that_cannot_be_asked_is_no_silent_default(monkeypatch):
    monkeypatch.setattr(run_settings.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with status 1"):
        run_settings.ask_host({})


def test_values_are_text_until_the_host_reads_them(plan_file):
    """YAML would make False of off, 8 of 010 and 90 of 1:30."""
    plan = read_plan(plan_file("runs: [{a: [off, 010, 1:30, 1e-5, null, true]}]"))
    assert varied(plan) == [("off",), ("010",), ("1:30",), ("1e-5",), ("null",), ("true",)]


@pytest.mark.parametrize(
    ("words", "smoke", "called"),
    [
        ([], "", "demo study {root}/launch/study/embedded.yaml"),
        (["launch/study/paper_hh.yaml", "--out", "x y"], "", " study {root}/launch/study/paper_hh.yaml --out x y"),
        (["launch/study/lexicon.yaml"], "", "demo lexicon study {root}/launch/study/lexicon.yaml"),
        (["launch/study/lexicon.yaml"], "1", "demo demo demo study {root}/launch/study/lexicon.yaml --smoke"),
        (["launch/study/small.yaml"], "", " lexicon small study {root}/launch/study/small.yaml"),
        (["launch/study/horizon.yaml"], "", " small study {root}/launch/study/horizon.yaml"),
    ],
)
def test_the_script_prepares_what_the_plan_needs(tmp_path, words, smoke, called):
    stand_in = tmp_path / "bin" / "abc-rlhf"
    stand_in.parent.mkdir()
    stand_in.write_text(
        "#!/usr/bin/env bash\n"
        'case "$*" in prepare*--lexicon*) echo lexicon;; prepare*--small*) echo small;; prepare*) echo demo;; '
        '*) echo "${DEMO:-}${LEXICON:+ $LEXICON}${SMALL:+ $SMALL} $*";; esac\n'
    )
    stand_in.chmod(0o755)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DEMO", "SMOKE", "SMALL", "OTHER", "LEXICON")
    }
    environment |= {"VIRTUAL_ENV": str(tmp_path), "SMOKE": smoke}
    done = subprocess.run(
        ["bash", "launch/study/study.sh", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == called.format(root=ROOT)
