"""Which checkpoint a run goes on from, which it refuses, and which are kept: on directories without models."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError
from abc_plugin.host.arguments import settings_of
from abc_plugin.host.import_openrlhf import import_host
from abc_plugin.local import checkpoints
from abc_plugin.local.checkpoints import Checkpoints

PROMPTS = ["one", "two"]
FILE = io.BytesIO()
torch.save(torch.zeros(100), FILE)
SIZE = FILE.tell()


def arguments(path, **changes):
    """What the host's parser gives, as far as it matters here; changes by dotted name."""
    flat = {
        "ckpt.path": str(path),
        "ckpt.load_enable": True,
        "ckpt.save_steps": 1,
        "ckpt.disable_ds": False,
        "ckpt.max_num": 3,
        "ds.use_universal_ckpt": False,
        "train.enable_ema": False,
        "train.seed": 42,
        "train.num_episodes": 1,
        "train.max_epochs": 1,
        "train.batch_size": 2,
        "train.micro_batch_size": 1,
        "rollout.batch_size": 2,
        "rollout.n_samples_per_prompt": 1,
        "actor.adam.lr": 1e-3,
        "actor.adam.betas": (0.9, 0.95),
        "logger.wandb.run_name": "ppo_now",
        "logger.wandb.key": "secret",
    } | changes
    root = SimpleNamespace(shaping=ShapingConfig())
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            node = vars(node).setdefault(parent, SimpleNamespace())
        setattr(node, last, value)
    return root


def write(run, step, parts=checkpoints.PARTS):
    for part in parts:
        directory = run.directory(step, part)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "state.pt").write_bytes(FILE.getvalue())


def saved(path, *steps, **changes):
    """Complete checkpoints of these steps."""
    run = prepare(path, **changes)[0]
    for step in steps:
        run.begin(step)
        write(run, step)
        run.finish(step, math.inf, math.inf)
    return run


def prepare(path, prompts=PROMPTS, **changes):
    args = arguments(path, **changes)
    return checkpoints.prepare(args, settings_of(args, prompts)), args


def refusal(path, prompts=PROMPTS, **changes):
    """The one line that it says."""
    with pytest.raises(UserError) as caught:
        prepare(path, prompts, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_starts_anew_where_there_is_nothing_and_says_so(tmp_path, capsys):
    run, args = prepare(tmp_path / "new")
    assert run.step == 0
    assert args.ckpt.load_enable is False  # the host looks for nothing
    assert "starts from its first step" in capsys.readouterr().out


def test_the_newest_complete_checkpoint_is_taken_under_the_runs_old_name(tmp_path, capsys):
    saved(tmp_path, 2, 10, 4)
    run, args = prepare(tmp_path, **{"logger.wandb.run_name": "ppo_later"})
    assert run.step == 4  # steps after one that was saved later are of a time that was given up
    assert args.ckpt.load_enable is True
    assert args.logger.wandb.run_name == "ppo_now"
    assert capsys.readouterr().out.endswith(f"goes on from step 4, {tmp_path}/complete/global_step4\n")


@pytest.mark.parametrize("part", checkpoints.PARTS)
def test_a_half_written_checkpoint_is_left_unread(tmp_path, part, capsys):
    run = saved(tmp_path, 2)
    write(run, 4, [part])
    assert prepare(tmp_path)[0].step == 2
    assert "half-written and left unread: the checkpoint of step 4\n" in capsys.readouterr().out


def test_only_half_written_checkpoints_of_our_own_are_no_obstacle(tmp_path):
    run = saved(tmp_path)
    write(run, 1, ["_actor"])
    assert prepare(tmp_path)[0].step == 0
    assert prepare(tmp_path, **{"ckpt.load_enable": False})[0].step == 0


def truncate(run):
    file = run.directory(4, "_critic") / "state.pt"
    file.write_bytes(file.read_bytes()[:-1])


def alter(run):
    file = run.directory(4, "_actor") / "state.pt"
    altered = bytearray(file.read_bytes())
    altered[altered.index(bytes(400))] = 1  # one of the numbers
    file.write_bytes(altered)


def lose(run):
    (run.directory(4, "_actor") / "state.pt").unlink()


def garble_the_manifest(run):
    (run.directory(4) / "manifest.json").write_text('{"step": 4')


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, f"_critic/global_step4/state.pt has {SIZE - 1} of {SIZE} bytes"),
        (alter, "_actor/global_step4/state.pt is altered"),
        (lose, "_actor/global_step4/state.pt is missing"),
        (garble_the_manifest, "complete/global_step4/manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, capsys, damage, says):
    damage(saved(tmp_path, 2, 4))
    assert prepare(tmp_path)[0].step == 2
    assert f"the checkpoint of step 4 is damaged and left unread: {tmp_path}/{says}\n" in capsys.readouterr().out


def test_nothing_whole_is_an_error_and_not_a_new_start(tmp_path):
    truncate(saved(tmp_path, 4))
    assert f"_critic/global_step4/state.pt has {SIZE - 1} of {SIZE} bytes" in refusal(tmp_path)


def test_another_configuration_is_refused_with_every_flag_that_differs(tmp_path):
    saved(tmp_path, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = refusal(tmp_path, ["one", "three"], **{"actor.adam.lr": 2e-3, "train.seed": 1})
    assert "--actor.adam.lr 0.001 (now 0.002), " in said
    assert "--train.seed 42 (now 1), " in said
    assert "--data.prompt_dataset (contents) " in said
    assert "betas" not in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_models_and_prompts_go_by_what_they_contain(tmp_path):
    models = [tmp_path / name for name in ("old", "moved", "other")]
    for model, text in zip(models, ("a", "a", "b"), strict=True):
        model.mkdir()
        (model / "chat_template.jinja").write_text(text)
    old, moved, other = ({"actor.model_name_or_path": str(model)} for model in models)
    saved(tmp_path / "run", 2, **old)
    assert prepare(tmp_path / "run", **moved)[0].step == 2
    assert "secret" not in (tmp_path / "run/complete/global_step2/manifest.json").read_text()
    assert "--actor.model_name_or_path (contents)" in refusal(tmp_path / "run", **other)
    (models[0] / "chat_template.jinja").write_text("b")  # the same path
    assert "--actor.model_name_or_path (contents)" in refusal(tmp_path / "run", **old)


def test_what_shapes_no_curve_may_change(tmp_path, capsys):
    saved(tmp_path, 2)
    run, _ = prepare(tmp_path, **{"ckpt.save_steps": 7, "ckpt.max_num": 1, "train.num_episodes": 9})
    assert run.step == 2
    assert "--train.num_episodes was 1 and is 9: the learning rate follows the new schedule" in capsys.readouterr().out


def test_another_number_of_ranks_is_refused(tmp_path, monkeypatch):
    saved(tmp_path, 2)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert "was saved by 1 ranks and this run has 2" in refusal(tmp_path)


def test_other_versions_are_said(tmp_path, capsys):
    run = saved(tmp_path, 2)
    manifest = run.directory(2) / "manifest.json"
    changed = json.loads(manifest.read_text())
    changed["versions"]["torch"] = "1.0"
    manifest.write_text(json.dumps(changed))
    assert prepare(tmp_path)[0].step == 2
    assert "WARNING: the checkpoint was made with torch 1.0, this is " in capsys.readouterr().out


def test_another_runs_checkpoints_are_not_written_among(tmp_path):
    saved(tmp_path, 2)
    assert "the last of step 2: add --ckpt.load_enable" in refusal(tmp_path, **{"ckpt.load_enable": False})
    run, _ = prepare(tmp_path, **{"ckpt.load_enable": False, "ckpt.save_steps": -1})  # writes none
    assert run.step == 0


@pytest.mark.parametrize("load", [True, False])
def test_checkpoints_that_another_program_wrote_are_refused(tmp_path, load):
    write(Checkpoints(tmp_path, {}, 1), 2, ["_actor", "_critic"])
    assert "abc-rlhf local did not write" in refusal(tmp_path, **{"ckpt.load_enable": load})


@pytest.mark.parametrize("disabled", [True, False])
def test_weights_without_an_optimiser_are_refused(tmp_path, disabled):
    (tmp_path / "global_step2_hf").mkdir()
    said = refusal(tmp_path, **{"ckpt.disable_ds": disabled})
    assert "--ckpt.disable_ds saves no optimiser" in said
    assert f"--actor.model_name_or_path {tmp_path}/global_step2_hf" in said


def test_what_checkpoints_cannot_hold_is_refused_before_the_first(tmp_path):
    refused = {"train.enable_ema": True, "ckpt.load_enable": False}
    assert "--train.enable_ema" in refusal(tmp_path, **refused)
    assert "--ds.use_universal_ckpt" in refusal(tmp_path, **{"ds.use_universal_ckpt": True})
    prepare(tmp_path, **refused | {"ckpt.disable_ds": True})


def test_old_checkpoints_go_when_the_new_one_is_complete_and_no_sooner(tmp_path):
    run = saved(tmp_path, 2, 4)
    (run.root / "_actor" / "best_global_step2").mkdir()
    (run.root / "global_step2_hf").mkdir()
    write(run, 3, ["_actor"])  # half-written
    write(run, 5, ["complete"])
    run.begin(6)
    write(run, 6)
    assert run.steps() == [4, 2]
    run.finish(6, 2, math.inf)
    for part in checkpoints.PARTS:
        assert run.present(part) == {6, 4}
    assert (run.root / "_actor" / "best_global_step2").exists()
    assert (run.root / "global_step2_hf").exists()


def test_memory_limits_what_is_kept_but_never_the_newest(tmp_path):
    run = saved(tmp_path, 2, 4)  # three files each
    run.begin(6)
    write(run, 6)
    run.finish(6, 9, 7 * SIZE / 1024**3)
    assert run.steps() == [6, 4]
    run.begin(8)
    write(run, 8)
    run.finish(8, 9, 0)
    assert run.steps() == [8]


def test_a_step_that_is_written_again_counts_only_once_it_is_complete_again(tmp_path):
    run = saved(tmp_path, 2, 4)
    run.begin(4)
    assert run.steps() == [2]


def test_random_numbers_go_on_as_they_would_have():
    import random

    import numpy as np

    import_host()
    from abc_plugin.local.resume import random_state, set_random_state

    def draw():
        return random.random(), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()

    draw()
    np.random.standard_normal()  # an odd number of normals: numpy keeps the second of a pair
    state = random_state()
    expected = draw()
    draw()
    set_random_state(state)
    assert draw() == expected
