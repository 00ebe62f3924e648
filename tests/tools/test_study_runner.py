"""Studies that are run, killed, gone on with, and refused; real ones at the end."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import study_stand_in

from abc_plugin import cli
from abc_plugin.errors import UserError
from abc_plugin.tools.study import run_settings, runner, study_directory
from abc_plugin.tools.study.plan import OWNED
from abc_plugin.tools.study.run_settings import Run
from abc_plugin.tools.study.study_directory import Study

PLAN = """
flags: {algo.advantage.lambd: 0.95}
runs:
  - {reward_shaping: none, train.seed: 1..2}
  - {reward_shaping: abc, shaping.beta: [0.8, 1.0], train.seed: 1..2}
"""
HEADER = "method,beta,seed,step,reward,kl,value_loss"


class Call:
    """One call of the command in a process of its own."""

    def __init__(self, root: Path, plan: str, *options: str, **environment: str) -> None:
        self.starts = root / "starts.txt"
        (root / "plan.yaml").write_text(plan)
        words = [sys.executable, study_stand_in.__file__, "study", "plan.yaml", "--out", "out", *options]
        environment = os.environ | {"STARTS": str(self.starts)} | environment
        self.log = open(root / "output.txt", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            words,
            cwd=root,
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in background
        )

    def running(self) -> list[tuple[str, int]]:
        """(name, process) of every run that was started so far."""
        lines = self.starts.read_text().splitlines() if self.starts.exists() else []
        return [(name, int(pid)) for name, pid in map(str.split, lines)]

    def until(self, ready) -> None:
        deadline = time.monotonic() + 60
        while not ready() and self.process.poll() is None:
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)
        assert self.process.poll() is None, self.output()

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def ended(self, sign: int | None = None) -> int:
        if sign is not None:
            self.process.send_signal(sign)
        return self.process.wait(60)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Studies of this directory run in this process, their runs in others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STARTS", str(tmp_path / "starts.txt"))
    monkeypatch.setattr(run_settings, "ask_host", study_stand_in.answer)
    monkeypatch.setattr(runner, "PROGRAM", [sys.executable, study_stand_in.__file__])
    monkeypatch.setattr(runner, "POLL", 0.02)
    return tmp_path


def study(plan: str, *options: str) -> int:
    Path("plan.yaml").write_text(plan)
    return cli.main(["study", "plan.yaml", "--out", "out", "--jobs", "4", *options])


def started() -> list[str]:
    return [line.split()[0] for line in Path("starts.txt").read_text().splitlines()]


def rows(path="out/results.csv") -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


ONE = "flags: {reward_shaping: none}\nruns: [{train.seed: SEED}]\n"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_study_interrupted_three_times_ends_as_one_that_was_not(tmp_path):
    """Killed with its runs, killed alone, and by Ctrl-C; each time other runs are finished, others half done."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    assert Call(whole, PLAN, "--jobs", "6").ended() == 0

    call = Call(broken, PLAN, "--jobs", "2", SLOW="0.3")
    call.until(lambda: len(list(broken.glob("out/*/curve.csv"))) == 2 and len(call.running()) == 4)
    for pid in [call.process.pid, *(pid for _, pid in call.running()[2:])]:
        os.kill(pid, signal.SIGKILL)
    call.ended()
    done = {path.parent.name for path in broken.glob("out/*/curve.csv")}
    assert done == {"none-seed1", "abc-beta0.8-seed1"}  # seed by seed

    call = Call(broken, PLAN, "--jobs", "2", SLOW="20")
    call.until(lambda: len(call.running()) == 6)
    runs = [pid for _, pid in call.running()[4:]]
    assert call.ended(signal.SIGKILL) == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while any(map(alive, runs)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, runs))  # the system ends them with it

    call = Call(broken, PLAN, "--jobs", "2", SLOW="20")
    call.until(lambda: len(call.running()) == 8)
    begun = time.monotonic()
    assert call.ended(signal.SIGINT) == 130 and time.monotonic() - begun < runner.GRACE - 2
    assert "the same command goes on:\n  abc-rlhf study plan.yaml --out out --jobs 2" in call.output()
    assert not any(alive(pid) for _, pid in call.running())

    assert Call(broken, PLAN, "--jobs", "6").ended() == 0
    for name in ("results.csv", "plan.yaml"):
        assert (broken / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
    names = [name for name, _ in call.running()]
    assert len(names) > 6 and all(names.count(name) == 1 for name in done)  # what was finished ran once
    assert not list(broken.glob("out/.new-*"))


def test_the_tables_hold_every_step_of_every_run_and_nothing_of_time(here, capsys):
    assert study(PLAN) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 runs are finished in out: results.csv" in printed and "abc-rlhf study report out" in printed
    lines = Path("out/results.csv").read_text().splitlines()
    assert lines[0] == HEADER and len(lines) == 1 + 6 * 3
    assert not list(Path("out").rglob("*.safetensors")) and not list(Path("out").rglob("checkpoints"))
    assert [line.rsplit(",", 3)[0] for line in lines[1:]] == [
        f"{method},{seed},{step}" for method in ("abc,0.8", "abc,1", "none,") for seed in (1, 2) for step in (1, 2, 3)
    ]
    first = rows()[0]
    assert 0 < float(first["reward"]) < 1 and float(first["kl"]) == pytest.approx(0.1)
    assert float(first["value_loss"]) == pytest.approx(float(first["reward"]) / 3)
    timing = rows("out/timing.csv")
    assert [row["run"] for row in timing][:2] == ["abc-beta0.8-seed1", "abc-beta0.8-seed2"]
    assert all(float(row["seconds"]) > 0 and float(row["seconds_per_step"]) > 0 for row in timing)
    note = json.loads(Path("out/abc-beta1-seed2/run.json").read_text())
    assert note["settings"]["shaping.beta"] == "1" and note["command"][2] == "local"
    assert study(PLAN) == 0 and len(started()) == 6
    assert "6 of them finished before" in capsys.readouterr().out


def test_weights_of_finished_runs_go_unless_the_plan_keeps_them(here):
    one = ONE.replace("SEED", "1")
    assert study(one + "keep_policies: true\n") == 0
    run = Path("out/none-seed1")
    assert (run / "model.safetensors").exists() and (run / "checkpoints").is_dir()
    assert study(one) == 0 and len(started()) == 1
    assert not (run / "model.safetensors").exists() and not (run / "checkpoints").exists()
    assert {path.name for path in run.iterdir()} >= {"run.json", "curve.csv", "output.log", "tensorboard"}


@pytest.mark.parametrize(
    ("seed", "why"),
    [
        (13, "exit status 2\n  | loading\n  | abc-rlhf: error: thirteen is unlucky; take another\n  the log is out/"),
        (14, "its reward is nan in step 2"),
        (18, "its reward is inf in step 1"),
        (15, "it logged 2 steps, the last is 2, the plan has 3"),
        (17, "out/none-seed17 logged neither train/rollout/reward_mean nor train/reward"),
    ],
)
def test_a_run_that_fails_is_named_the_others_go_on_and_it_is_tried_again(here, capsys, monkeypatch, seed, why):
    plan = ONE.replace("SEED", f"[{seed}, 1]")
    assert study(plan) == 1
    printed = capsys.readouterr()
    assert f"none-seed{seed} failed: {why}" in printed.out
    assert f"1 failed: none-seed{seed}; 1 of 2 runs are finished in out" in printed.err
    assert {row["seed"] for row in rows()} == {"1"}
    assert not Path(f"out/none-seed{seed}/curve.csv").exists()
    if seed == 13:
        monkeypatch.setenv("MENDED", "plan.yaml")
        assert study(plan) == 0
        assert started().count("none-seed13") == 2 and started().count("none-seed1") == 1
        assert {row["seed"] for row in rows()} == {"1", "13"}


@pytest.mark.parametrize("foreign", ["results.csv", "plan.yaml", "none-seed1/model.safetensors"])
def test_a_directory_of_another_origin_is_refused_and_left_alone(here, capsys, foreign):
    path = Path("out") / foreign
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    assert study(PLAN) == 2
    said = f"out has files of another origin, such as {Path(foreign).parts[0]}; give another"
    assert said in capsys.readouterr().err
    assert [each for each in Path("out").rglob("*") if each.is_file()] == [path] and path.read_text() == "mine"
    Path("file").write_text("")
    assert cli.main(["study", "plan.yaml", "--out", "file"]) == 2
    assert "file is a file" in capsys.readouterr().err


def test_a_folder_in_a_runs_place_that_the_study_did_not_make_is_refused_and_left_alone(here, capsys):
    assert study(ONE.replace("SEED", "1")) == 0
    mine = Path("out/none-seed2/mine.txt")
    mine.parent.mkdir()
    mine.write_text("mine")
    assert study(ONE.replace("SEED", "[1, 3, 2]")) == 2
    assert "out/none-seed2 has no run.json" in capsys.readouterr().err
    assert mine.read_text() == "mine" and not Path("out/none-seed3").exists()  # nothing is begun


def test_a_damaged_study_is_named(here):
    study, plan = Study(Path("out")), SimpleNamespace(driver="local")
    Path("out/run").mkdir(parents=True)
    for text in ("", "{", "[]"):
        Path("out/plan.yaml").write_text(f"{study_directory.HEADER}\n{text}")
        with pytest.raises(UserError, match="out/plan.yaml is damaged; give another --out"):
            study.older(plan)
    Path("out/plan.yaml").write_text(f"{study_directory.HEADER}\ndriver: local")
    Path("out/run/run.json").write_text("{")
    with pytest.raises(UserError, match="out/run/run.json is damaged .*; remove its folder"):
        study.older(plan)


def test_a_plan_that_grows_goes_on_and_another_common_flag_is_a_column(here, capsys):
    assert study(PLAN) == 0
    assert study("driver: ray\n" + PLAN) == 2
    assert "out is a study with driver local, not ray" in capsys.readouterr().err
    # The same number in other words is the same flag; lambda 1 is new, so a column; seed 2 and beta 1 are kept.
    more = (
        PLAN.replace("0.95", "0.950") + "  - {reward_shaping: [none, abc], algo.advantage.lambd: 1.0, train.seed: 1}\n"
    )
    assert study(more) == 0
    assert set(started()[6:]) == {"none-lambda1-seed1", "abc-beta0.8-lambda1-seed1"}
    assert len(rows()) == 8 * 3 and {row["lambda"] for row in rows()} == {"0.95", "1"}
    # A study of all of them from the start has the same table.
    assert cli.main(["study", "plan.yaml", "--out", "whole", "--jobs", "4"]) == 0
    assert Path("whole/results.csv").read_bytes() == Path("out/results.csv").read_bytes()
    assert study(ONE.replace("SEED", "1").replace("none", "none, algo.advantage.lambd: 0.5")) == 0
    assert len(rows()) == 9 * 3 and {row["lambda"] for row in rows()} == {"0.5", "0.95", "1"}


def test_two_studies_do_not_share_a_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_settings, "ask_host", study_stand_in.answer)
    call = Call(tmp_path, ONE.replace("SEED", "1"), SLOW="20")
    call.until(lambda: call.running())
    assert cli.main(["study", "plan.yaml", "--out", "out"]) == 2
    assert f"out: a study is running there (process {call.process.pid})" in capsys.readouterr().err
    assert call.ended(signal.SIGTERM) == 143
    assert not any(alive(pid) for _, pid in call.running())


def test_runs_are_given_their_gpus_and_threads(here, monkeypatch, capsys):
    monkeypatch.setenv("GPUS", "4")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(runner, "_cores", lambda: 8)
    plan = ONE.replace("SEED", "1..2")
    Path("plan.yaml").write_text(plan)
    for wrong in ("0,9", ""):
        assert cli.main(["study", "plan.yaml", "--out", "out", "--gpus", wrong]) == 2
        assert f"--gpus {wrong}: give numbers below 4" in capsys.readouterr().err
    assert not Path("out").exists()
    assert cli.main(["study", "plan.yaml", "--out", "out", "--gpus", "3,1"]) == 0
    environments = [json.loads(Path(f"out/none-seed{seed}/environment.json").read_text()) for seed in (1, 2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["3", "1"]
    assert {each["OMP_NUM_THREADS"] for each in environments} == {"4"}


@pytest.mark.parametrize(
    ("driver", "jobs", "gpus", "visible", "there", "slots"),
    [
        ("local", None, None, None, 0, [None, None]),
        ("local", 3, None, None, 0, [None] * 3),
        ("local", None, None, None, 3, ["0", "1", "2"]),
        ("local", None, None, "4,6", 2, ["4", "6"]),
        ("local", 3, None, "4,6", 2, ["4", "6", "4"]),
        ("local", None, "1", "4,6", 2, ["6"]),  # counted as PyTorch counts them
        ("ray", None, None, None, 4, [None]),
    ],
)
def test_how_many_runs_at_a_time(monkeypatch, driver, jobs, gpus, visible, there, slots):
    monkeypatch.setattr(runner, "_cores", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert runner._slots(driver, jobs, gpus, there) == slots
    with pytest.raises(UserError, match="--gpus 4,6: give numbers below"):
        runner._slots(driver, jobs, "4,6", there)


def test_a_run_with_checkpoints_goes_on_and_one_without_starts_anew(tmp_path):
    run, folder = Run({"train.seed": ("1",)}, {"train.seed": "1"}, 3, "none-seed1"), tmp_path / "none-seed1"
    for goes_on in (True, True, False):
        Study(tmp_path).prepare(run, ["command"], {}, goes_on=goes_on)
        assert json.loads((folder / "run.json").read_text())["flags"] == {"train.seed": ["1"]}
        assert {path.name for path in folder.iterdir()} <= {"run.json", "checkpoints" if goes_on else ""}
        (folder / "checkpoints").mkdir(exist_ok=True)


REAL = {"data.max_samples": 16, "ckpt.save_steps": 1, "actor.lr_scheduler": "constant"}


@pytest.mark.slow
def test_a_real_study_killed_and_gone_on_with_is_that_of_its_runs_alone(tiny, tmp_path):
    """Two methods, two steps each; the runs save checkpoints and go on from them."""
    common = conftest.run_settings(tiny, tmp_path) | REAL
    flags = "".join(f"  {name}: {value}\n" for name, value in common.items() if name not in OWNED)
    (tmp_path / "plan.yaml").write_text(f"flags:\n{flags}runs: [{{reward_shaping: [none, uniform], train.seed: 3}}]\n")
    words = [sys.executable, study_stand_in.__file__, "real", "study", "plan.yaml", "--out", "out", "--jobs", "2"]
    out = tmp_path / "out"
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not list(out.glob("*/checkpoints/complete/*/manifest.json")) and process.poll() is None:
        time.sleep(0.05)  # the first step of one run is saved
    process.kill()
    assert process.wait() == -signal.SIGKILL and not list(out.glob("*/curve.csv"))

    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {(row["method"], row["beta"], row["step"]): row for row in rows(out / "results.csv")}
    assert list(made) == [("none", "", "1"), ("none", "", "2"), ("uniform", "0.8", "1"), ("uniform", "0.8", "2")]
    # At one seed both methods see the same prompts and random numbers: what differs is what they learn from them.
    first, second = (made["none", "", "1"], made["uniform", "0.8", "1"])
    assert first["reward"] == second["reward"] and first["kl"] == second["kl"]
    assert first["value_loss"] != second["value_loss"]
    assert made["none", "", "2"]["reward"] != first["reward"]
    assert not list(out.rglob("*.safetensors")) and not list(out.rglob("checkpoints"))

    gone_on = next(path for path in out.glob("*-seed3") if "goes on from step" in (path / "output.log").read_text())
    more = REAL | {"reward_shaping": gone_on.name.split("-")[0], "train.seed": 3}
    alone = conftest.local_flags(tiny, tmp_path / "alone", **more)
    assert conftest.run_python("-m", "abc_plugin", "local", *alone).returncode == 0
    assert Study(tmp_path).finish(Run({}, {}, 2, "alone"), 1.0, keep_policy=True) is None
    assert (tmp_path / "alone" / "curve.csv").read_bytes() == (gone_on / "curve.csv").read_bytes()
