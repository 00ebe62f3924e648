"""The README is executed: its scripts, its Python, and every command, flag and metric it names."""

import csv
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import abc_plugin
from abc_plugin.cli import COMMANDS, main
from abc_plugin.credit.metrics import credit_metrics
from abc_plugin.host import ray_driver
from abc_plugin.host.import_openrlhf import import_host
from abc_plugin.tools.study.plan import read_plan

import_host()

from abc_plugin.host import experience_maker as experience_maker  # noqa: E402
from abc_plugin.host import model_workers as reward_model  # noqa: E402

ROOT = Path(abc_plugin.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_are_the_ones_that_exist(capsys):
    assert set(re.findall(r"abc-rlhf ([a-z-]+)", README)) == set(COMMANDS)
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


def test_the_flags_exist(capsys):
    assert main(["local", "--help"]) == 0
    ray_driver._print_help()
    benches = [f"bench {name}" for name in ("recovery", "methods", "parity")]
    for command in ("evaluate", "report", "prepare", "show", "audit", "lab", "check-tokenizers", *benches):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
    known = capsys.readouterr().out
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w.]+", README))
    assert len(flags) > 8
    of_launchers = {"--module", "--nproc_per_node", "--num_gpus"}
    assert not {flag for flag in flags - of_launchers if flag not in known}


def test_the_metrics_are_the_ones_logged():
    zeros = torch.zeros(1, 1)
    logged = credit_metrics(zeros, zeros, zeros[0], zeros, zeros)
    others = {"credit_moved", "credit_without_attention", "credit_negative_share", "credit_disagreement"} | {
        "credit_scale"
    }
    metrics = (ROOT / "abc_plugin" / "host" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(credit_\w+)`", metrics)) == {*logged, *others}
    assert set(re.findall(r"`(credit_\w+)`", README)) <= {*logged, *others}
    sources = inspect.getsource(reward_model) + inspect.getsource(experience_maker)
    assert all(f'"{name}"' in sources for name in others)


def test_the_python_example_runs(tiny):
    text = (ROOT / "abc_plugin" / "attention" / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    model = AutoModelForSequenceClassification.from_pretrained(tiny / "reward_model").eval()
    ids = torch.randint(5, 1000, (2, 7))
    names = {"reward_model": model, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exec(code, names)
    torch.testing.assert_close(names["recording"].row_BS.sum(1), torch.ones(2))


def test_the_driver_example_runs():
    text = (ROOT / "launch" / "ray" / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    try:
        exec(code, names)
        launcher = importlib.import_module("openrlhf.trainer.ray.launcher")
        assert "CreditRewardModel" in repr(launcher.RewardModelActor)
    finally:
        names["uninstall"]()


def script(name, tiny, out, *flags, **environment):
    """Run a launch script, shortened, on the tiny models, in the environment that runs this test."""
    short = [
        "--local.train_layers",
        "1",
        "--data.max_samples",
        "32",
        "--rollout.batch_size",
        "16",
        "--rollout.micro_batch_size",
        "8",
    ]
    settings = environment | {"DEMO": str(tiny), "OUT": str(out), "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix}
    words = ["bash", str(ROOT / "launch" / name), *short, *flags]
    result = subprocess.run(words, capture_output=True, text=True, timeout=600, env=os.environ | settings)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_quickstart(tiny, tmp_path):
    out = tmp_path / "quickstart"
    said = script("quickstart.sh", tiny, out)
    assert "done: 2 steps" in said
    assert json.loads((out / "summary.json").read_text())["method"] == "abc"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "16 held-out prompts" in page
    assert (out / "curves.png").stat().st_size > 10_000
    assert len((out / "after.jsonl").read_text().splitlines()) == 16


@pytest.mark.parametrize("name", ["embedded", "embedded_horizon", "conditions", "lexicon", "horizon", "small"])
def test_a_committed_report_is_what_its_results_say(name, tmp_path, monkeypatch):
    committed = ROOT / "launch" / "study" / name
    monkeypatch.chdir(ROOT)
    assert main(["study", "report", f"launch/study/{name}/results.csv", "--out", str(tmp_path)]) == 0
    report = (committed / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()[:-1] == report.splitlines()[:-1]
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in committed.glob("*.png")}
    for variable in ("DEMO", "LEXICON", "SMALL", "OTHER"):
        monkeypatch.setenv(variable, variable.lower())
    with (committed / "results.csv").open(encoding="utf-8", newline="") as file:
        runs = {tuple(row.values())[: list(row).index("step")] for row in csv.DictReader(file)}
    planned = len(read_plan(ROOT / "launch" / "study" / f"{name}.yaml").runs)
    assert len(runs) == planned


# The rows of the README's table of studies, in order: the report that has each one's numbers.
STUDIES = (*["horizon"] * 6, "small", "embedded_horizon", "embedded", "conditions", "lexicon", "lexicon")


def test_the_readmes_studies_are_the_reports():
    [table] = re.findall(r"^\| condition .*\n\|[-|]*\n((?:\|.*\n)*)", README, re.MULTILINE)
    for row, study in zip(table.splitlines(), STUDIES, strict=True):
        report = (ROOT / "launch" / "study" / study / "report.md").read_text(encoding="utf-8")
        numbers = [cell.strip() for cell in row.split("|")[4:-1] if cell.strip()]
        assert numbers and all(number in report for number in numbers), (row, study)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 180
    for page in (
        ROOT / "README.md",
        *(ROOT / "launch").rglob("README.md"),
        *Path(abc_plugin.__file__).parent.rglob("README.md"),
    ):
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"
