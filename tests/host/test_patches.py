"""The vendored way: each patch fits its releases, is small, gives the plugin loader, and can be taken out again."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import run_python
from host_releases import SUPPORTED, release

PATCHES = Path(__file__).resolve().parents[2] / "patches"
SCRIPT = "openrlhf/cli/train_ppo_ray.py"

# Runs the host's script as __main__ up to the first thing that train() does, and says what it would have trained with.
RUN = f"""
import pathlib, runpy, sys
import ray

def stop():
    print("argv:", sys.argv[1:])
    print("reward model:", sys._getframe(1).f_globals["RewardModelActor"])
    raise SystemExit(0)

ray.is_initialized = stop
script = next(path for path in (pathlib.Path(entry) / "{SCRIPT}" for entry in sys.path) if path.exists())
print("script:", script.resolve())
"""
# Everything that the script imports, but its parser and itself, is a stand-in: a fraction of a second for any release.
FAST = f"""
import sys, types
from unittest import mock
for name in ("ray", "ray.util.placement_group", "openrlhf.trainer.ray", "openrlhf.trainer.ray.launcher",
             "openrlhf.trainer.ray.ppo_actor", "openrlhf.trainer.ray.ppo_critic"):
    sys.modules[name] = mock.MagicMock()
{RUN}
utils = types.ModuleType("openrlhf.utils")
utils.__path__, utils.get_strategy = [str(script.parents[1] / "utils")], None
sys.modules["openrlhf.utils"] = utils
runpy.run_path(str(script), run_name="__main__")
"""
# The real modules, with stand-ins for vLLM and flash-attn where they are absent.
REAL = f"""
from abc_plugin.host.import_openrlhf import optional_packages, without_cuda
without_cuda()
{RUN}
with optional_packages():
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
"""
FLAGS = ["--actor.model_name_or_path", "p", "--reward.model_name_or_path", "r", "--vllm.num_engines", "0"]

TOY = """
import argparse, sys

def setup():
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy", required=True)
    ours, sys.argv[1:] = parser.parse_known_args()
    print("toy:", ours.toy)

def fail():
    raise RuntimeError("the plugin is out of order")
"""


@pytest.fixture
def unpacked(request, tmp_path):
    """``unpacked(version)``: a copy of a release, as the directory that holds it, to be patched."""

    def copy(version: str) -> Path:
        source = release(version, request.config.cache.mkdir("openrlhf"))
        return shutil.copytree(source, tmp_path / version)

    return copy


def patch(directory: Path, *options: str) -> None:
    """What patches/README.md tells to run."""
    [version] = (path.name.split("-")[1] for path in directory.glob("openrlhf-*.dist-info"))
    name = "openrlhf-0.10.2.patch" if version.startswith("0.10.") else "openrlhf-0.11.0.patch"
    command = ["patch", "-p1", "--fuzz=0", "-d", str(directory), "-i", str(PATCHES / name), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def plugin(directory: Path, name: str, value: str) -> None:
    """A distribution that registers an entry point, as pip would leave it in ``directory``."""
    metadata = directory / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[openrlhf.plugins]\n{name} = {value}\n")
    (directory / "toy_plugin.py").write_text(TOY)


def run_in(directory: Path, *words: object) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH"))))
    return run_python("-W", "ignore", *words, cwd=directory, env=os.environ | {"PYTHONPATH": path})


def run_fast(directory: Path, *argv: str) -> subprocess.CompletedProcess:
    """Run the host's script in ``directory`` with ``argv`` and with no entry points but those registered there."""
    return run_in(directory, "-S", "-c", FAST, *argv)


@pytest.mark.parametrize("path", sorted(PATCHES.glob("*.patch")), ids=lambda path: path.name)
def test_a_patch_changes_at_most_twenty_lines_of_one_file(path):
    changed = [line for line in path.read_text().splitlines() if re.match(r"[+-](?!\+\+ |-- )", line)]
    assert 0 < len(changed) <= 20
    assert re.findall(r"^\+\+\+ (.*)", path.read_text(), re.M) == [f"b/{SCRIPT}"]


@pytest.mark.parametrize("version", SUPPORTED)
def test_on_every_release_a_plugin_is_called_before_the_flags_are_parsed(unpacked, version):
    directory = unpacked(version)
    before = (directory / SCRIPT).read_bytes()
    plugin(directory, "toy", "toy_plugin:setup")
    argv = ["--toy", "story", *FLAGS]
    stock = run_fast(directory, *argv)
    assert stock.returncode == 2 and "unrecognized arguments: --toy story" in stock.stderr

    patch(directory, "--dry-run")
    assert (directory / SCRIPT).read_bytes() == before
    patch(directory)
    patched = run_fast(directory, *argv)
    assert patched.returncode == 0, patched.stderr
    assert f"script: {(directory / SCRIPT).resolve()}\n" in patched.stdout
    assert "[Plugin] toy = toy_plugin:setup\ntoy: story\n" in patched.stdout
    assert f"argv: {argv[2:]}\n" in patched.stdout

    patch(directory, "-R")
    assert (directory / SCRIPT).read_bytes() == before


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("toy_plugin:fail", "RuntimeError: the plugin is out of order"),
        ("no_such_plugin:setup", "ModuleNotFoundError: No module named 'no_such_plugin'"),
    ],
)
def test_a_plugin_that_fails_ends_the_run(unpacked, value, error):
    directory = unpacked(SUPPORTED[-1])
    plugin(directory, "toy", value)
    patch(directory)
    result = run_fast(directory, *FLAGS)
    assert result.returncode == 1
    assert f"[Plugin] toy = {value}" in result.stdout
    assert result.stderr.strip().splitlines()[-1] == error


def test_patched_the_real_command_line_knows_reward_shaping(unpacked):
    """With the host's real modules, and this package's own entry point beside another plugin's."""
    directory = unpacked(SUPPORTED[-1])
    plugin(directory, "toy", "toy_plugin:setup")
    patch(directory)
    result = run_in(directory, "-c", REAL, "--toy", "story", "--reward_shaping", "abc", *FLAGS)
    assert result.returncode == 0, result.stderr
    assert f"script: {(directory / SCRIPT).resolve()}\n" in result.stdout
    assert "toy: story\n" in result.stdout
    assert f"argv: {FLAGS}\n" in result.stdout
    assert re.search(r"reward model: .*CreditRewardModel", result.stdout), result.stdout


def test_the_plugins_own_commands_parse_flags_without_calling_any_plugin(unpacked):
    directory = unpacked(SUPPORTED[-1])
    plugin(directory, "toy", "toy_plugin:fail")
    patch(directory)
    code = f"from abc_plugin.host.arguments import parse; print(parse({FLAGS}).reward.model_name_or_path)"
    result = run_in(directory, "-c", code)
    assert (result.returncode, result.stdout) == (0, "r\n"), result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.10.4", "0.11.2"])
def test_patched_the_host_passes_its_own_tests(unpacked, version):
    directory = unpacked(version)
    patch(directory)
    result = run_in(directory, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert result.returncode == 0, result.stdout
    assert re.search(r"^\d+ passed", result.stdout, re.M)
