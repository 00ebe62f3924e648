"""An output directory: writable at the start, one run's at a time, and of one run only."""

import errno
import json
from types import SimpleNamespace

import pytest

from abc_plugin.errors import CannotWrite, UserError
from abc_plugin.output_directory import LOCK, NOTE, claim, claimed, refuse_models, writing

SETTINGS = {"--reward_shaping": "abc", "--ds.lora.rank": 0, "--train.seed": 1, "--ckpt.save_steps": 5}


def run(out, settings=SETTINGS, *, critic=False, curves=None, **changes):
    ckpt = {"output_dir": str(out), "path": str(out / "checkpoints"), "save_steps": 1, "load_enable": False} | changes
    args = {
        "ckpt": SimpleNamespace(**ckpt),
        "critic": SimpleNamespace(save_value_network=critic),
        "logger": SimpleNamespace(tensorboard_dir=curves),
    }
    return claimed(SimpleNamespace(**args), settings)


def test_one_run_at_a_time_in_output_and_checkpoints(tmp_path):
    with run(tmp_path / "a"):
        for other in (tmp_path / "a", tmp_path / "b"):
            second = run(other, path=str(tmp_path / "a" / "checkpoints"))
            with pytest.raises(UserError, match="is another run's, which is not done"), second:
                pytest.fail("two at once")
        with run(tmp_path / "c", path=str(tmp_path / "a" / "checkpoints"), save_steps=-1):
            pass  # writes no checkpoints
    with run(tmp_path / "a"):
        assert (tmp_path / "a" / LOCK).exists()
    with run(tmp_path / "one", path=str(tmp_path / "one")):
        pass


def test_what_cannot_be_written_is_known_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    started = run(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="--ckpt.output_dir .*/file/out cannot be written: Not a directory"), started:
        pytest.fail("started")
    started = run(tmp_path / "out", curves=str(tmp_path / "file"))
    with pytest.raises(UserError, match="--logger.tensorboard_dir .*/file cannot be written: File exists"), started:
        pytest.fail("started")
    with run(tmp_path / "out", critic=True):
        (tmp_path / "out_critic" / "model.safetensors").write_text("")
    with run(tmp_path / "out"):
        pass
    another = run(tmp_path / "out", SETTINGS | {"--train.seed": 2}, critic=True)
    with pytest.raises(UserError, match="--critic.save_value_network .*/out_critic has model.safetensors"), another:
        pytest.fail("started")


def test_what_a_full_disk_leaves_is_said(tmp_path):
    for error in (OSError(errno.ENOSPC, "x"), RuntimeError("PytorchStreamWriter failed writing file data/0")):
        with pytest.raises(CannotWrite, match="/out cannot be written: .*; all else is kept$"):  # noqa: SIM117
            with writing(tmp_path / "out", "all else is kept"):
                raise error
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "none").read_text()


@pytest.mark.parametrize(
    "result", ["model-00001-of-00002.safetensors", "adapter_model.safetensors", "completions.jsonl"]
)
def test_a_directory_is_one_runs(tmp_path, result):
    claim("--x", tmp_path, SETTINGS | {"--train.seed": 2})
    claim("--x", tmp_path, SETTINGS)  # the other has left nothing
    assert json.loads((tmp_path / NOTE).read_text()) == SETTINGS
    (tmp_path / result).write_text("")
    claim("--x", tmp_path, SETTINGS | {"--ckpt.save_steps": 7})
    for change in ({"--reward_shaping": "none"}, {"--ds.lora.rank": 8}, {"--train.seed": 2}):
        [(name, value)] = change.items()
        with pytest.raises(UserError, match=rf"has {result} of a run that was made with other settings: {name} .*now"):
            claim("--x", tmp_path, SETTINGS | change)
    for damaged in ("", "[]", "{"):
        (tmp_path / NOTE).write_text(damaged)
        with pytest.raises(UserError, match=f"settings.json is damaged, so {result} may be of another run"):
            claim("--x", tmp_path, SETTINGS)
    (tmp_path / NOTE).unlink()
    with pytest.raises(UserError, match=f"has {result}, which no run left there that is known"):
        claim("--x", tmp_path, SETTINGS)


def test_curves_alone_are_a_runs_too(tmp_path):
    events = tmp_path / "tensorboard" / "run" / "events.out.tfevents.1"
    claim("--x", tmp_path, SETTINGS)
    events.parent.mkdir(parents=True)
    for size in (88, 400):  # of a run that ended before its first step, and after it
        events.write_bytes(b"x" * size)
        claim("--x", tmp_path, SETTINGS)
        if size == 88:
            claim("--x", tmp_path, SETTINGS | {"--train.seed": 2})
            claim("--x", tmp_path, SETTINGS)
    with pytest.raises(UserError, match=r"has tensorboard/run/events\.out"):
        claim("--x", tmp_path, SETTINGS | {"--train.seed": 2})


def test_a_models_own_directory_is_not_written(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "policy")
    refuse_models([tmp_path], {str(tmp_path / "policy"): "--actor.model_name_or_path"})
    with pytest.raises(UserError, match="--ckpt.output_dir: what is written would overwrite --actor.model_name_or_"):
        refuse_models([tmp_path / "link"], {str(tmp_path / "policy"): "--actor.model_name_or_path"})
