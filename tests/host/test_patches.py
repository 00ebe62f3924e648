"""The vendored way: each patch fits its releases, is small, gives the plugin loader, and can be taken out again."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import run_python
from host_releases import LAST_UNSUPPORTED, SUPPORTED, release

from abc_plugin.host import contract

PATCHES = Path(__file__).resolve().parents[2] / "patches"
APPLY = PATCHES / "apply.py"
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
from abc_plugin.host.imports import optional_packages, without_cuda
without_cuda()
{RUN}
with optional_packages():
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
"""
FLAT = ["--pretrain", "p", "--reward_pretrain", "r", "--vllm_num_engines", "0"]
DOTTED = ["--actor.model_name_or_path", "p", "--reward.model_name_or_path", "r", "--vllm.num_engines", "0"]

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


def apply(*words: object) -> subprocess.CompletedProcess:
    return run_python(APPLY, *words)


def plugin(directory: Path, name: str, value: str) -> None:
    """A distribution that registers an entry point, as pip would leave it in ``directory``."""
    metadata = directory / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[openrlhf.plugins]\n{name} = {value}\n")
    (directory / "toy_plugin.py").write_text(TOY)


def run_in(directory: Path, *words: object) -> subprocess.CompletedProcess:
    return run_python("-W", "ignore", *words, cwd=directory, env=os.environ | {"PYTHONPATH": str(directory)})


def run_fast(directory: Path, *argv: str) -> subprocess.CompletedProcess:
    """Run the host's script in ``directory`` with ``argv`` and with no entry points but those registered there."""
    return run_in(directory, "-S", "-c", FAST, *argv)


def flags_of(version: str) -> list[str]:
    return FLAT if re.match(r"0\.9\.|0\.10\.[01]\b", version) else DOTTED


def changed_lines(patch: Path) -> list[str]:
    return [line for line in patch.read_text().splitlines() if re.match(r"[+-](?!\+\+ |-- )", line)]


@pytest.mark.parametrize("patch", sorted(PATCHES.glob("*.patch")), ids=lambda patch: patch.name)
def test_a_patch_changes_at_most_twenty_lines_of_one_file(patch):
    assert 0 < len(changed_lines(patch)) <= 20
    assert re.findall(r"^\+\+\+ (.*)", patch.read_text(), re.M) == [f"b/{SCRIPT}"]


@pytest.mark.parametrize("version", SUPPORTED)
def test_apply_check_and_reverse_on_every_release(unpacked, version):
    directory = unpacked(version)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert (apply("--check", directory).returncode, apply("--reverse", directory).returncode) == (1, 0)

    first, again = apply(directory), apply(directory)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr
    assert first.stdout.startswith(f"OpenRLHF {version}, {directory / SCRIPT}: patched (openrlhf-")
    assert ": patched, nothing to do (" in again.stdout
    assert apply("--check", directory).returncode == 0
    assert contract.broken(directory / "openrlhf") == []

    back = apply("--reverse", directory)
    assert (back.returncode, apply("--check", directory).returncode) == (0, 1)
    assert ": restored (openrlhf-" in back.stdout
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("version", SUPPORTED)
def test_patched_a_plugin_is_called_before_the_flags_are_parsed(unpacked, version):
    directory = unpacked(version)
    plugin(directory, "toy", "toy_plugin:setup")
    argv = ["--toy", "story", *flags_of(version)]
    stock = run_fast(directory, *argv)
    assert stock.returncode == 2
    assert "unrecognized arguments: --toy story" in stock.stderr

    assert apply(directory).returncode == 0
    patched = run_fast(directory, *argv)
    assert patched.returncode == 0, patched.stderr
    assert f"script: {(directory / SCRIPT).resolve()}\n" in patched.stdout
    assert "[Plugin] toy = toy_plugin:setup\ntoy: story\n" in patched.stdout
    assert f"argv: {argv[2:]}\n" in patched.stdout


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("toy_plugin:fail", "RuntimeError: the plugin is out of order"),
        ("toy_plugin:absent", "AttributeError: module 'toy_plugin' has no attribute 'absent'"),
        ("no_such_plugin:setup", "ModuleNotFoundError: No module named 'no_such_plugin'"),
    ],
)
def test_a_plugin_that_fails_ends_the_run(unpacked, value, error):
    directory = unpacked(SUPPORTED[-1])
    plugin(directory, "toy", value)
    assert apply(directory).returncode == 0
    result = run_fast(directory, *DOTTED)
    assert result.returncode == 1
    assert f"[Plugin] toy = {value}" in result.stdout
    assert result.stderr.strip().splitlines()[-1] == error


def test_patched_the_real_command_line_knows_reward_shaping(unpacked):
    """With the host's real modules, and this package's own entry point beside another plugin's."""
    directory = unpacked(SUPPORTED[-1])
    plugin(directory, "toy", "toy_plugin:setup")
    assert apply(directory).returncode == 0
    result = run_in(directory, "-c", REAL, "--toy", "story", "--reward_shaping", "abc", *DOTTED)
    assert result.returncode == 0, result.stderr
    assert f"script: {(directory / SCRIPT).resolve()}\n" in result.stdout
    assert "toy: story\n" in result.stdout
    assert f"argv: {DOTTED}\n" in result.stdout
    assert re.search(r"reward model: .*CreditRewardModel", result.stdout), result.stdout


def test_patched_the_plugins_own_commands_are_not_disturbed(unpacked):
    """They run the host's script, and so its loader, to parse flags; what it would rebind would meet them twice."""
    directory = unpacked(SUPPORTED[-1])
    assert apply(directory).returncode == 0
    code = "; ".join(
        [
            "from abc_plugin.host.imports import import_host",
            "import_host()",
            "from openrlhf.trainer import ppo_trainer",
            "stock = ppo_trainer.PPOTrainer",
            "from abc_plugin.host.arguments import parse",
            f"args = parse({DOTTED})",
            "print(args.reward.model_name_or_path, ppo_trainer.PPOTrainer is stock)",
        ]
    )
    result = run_in(directory, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "r True"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.9.10", "0.10.1.post2", "0.10.4", "0.11.2"])  # 0.9.9 ships no tests
def test_patched_the_host_passes_its_own_tests(unpacked, version):
    directory = unpacked(version)
    assert apply(directory).returncode == 0
    result = run_in(directory, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert result.returncode == 0, result.stdout
    assert re.search(r"^\d+ passed", result.stdout, re.M)


def test_other_versions_are_refused_by_name(unpacked, tmp_path):
    directory = unpacked(LAST_UNSUPPORTED)
    before = (directory / SCRIPT).read_bytes()
    refused = apply(directory)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: no patch for OpenRLHF {LAST_UNSUPPORTED}; there are patches for ")
    assert (directory / SCRIPT).read_bytes() == before

    (metadata,) = directory.glob("openrlhf-*.dist-info")
    metadata.rename(directory / "openrlhf-0.12.0.dist-info")
    assert apply("--check", directory).stderr.startswith("error: no patch for OpenRLHF 0.12.0; ")


def test_a_file_changed_by_hand_is_refused(unpacked):
    directory = unpacked(SUPPORTED[-1])
    script = directory / SCRIPT
    script.write_text(script.read_text().replace("    # Ray and vLLM\n", "    # vLLM and Ray\n"))
    before = script.read_bytes()
    refused = apply(directory)
    assert refused.returncode == 2
    assert "has been changed by hand: openrlhf-0.11.0.patch neither fits nor is in it" in refused.stderr
    assert script.read_bytes() == before


def test_the_wrong_patch_for_a_version_does_not_fit(unpacked):
    """A release under another's version number: flat flags where dotted ones are expected."""
    directory = unpacked("0.10.1")
    (metadata,) = directory.glob("openrlhf-*.dist-info")
    metadata.rename(directory / "openrlhf-0.10.2.dist-info")
    assert "openrlhf-0.10.2.patch neither fits nor is in it" in apply(directory).stderr


def test_a_checkout_a_missing_host_and_a_missing_tool(unpacked, tmp_path):
    directory = unpacked("0.11.0")
    (metadata,) = directory.glob("openrlhf-*.dist-info")
    shutil.rmtree(metadata)
    assert "0 openrlhf-*.dist-info and no version.txt" in apply(directory).stderr
    (directory / "version.txt").write_text("0.11.0\n")
    assert apply("--check", directory).returncode == 1
    assert apply(tmp_path).stderr == f"error: {tmp_path} has no {SCRIPT}\n"
    without = run_python(APPLY, directory, env={"PATH": str(tmp_path)})
    assert without.stderr.startswith("error: the command patch is not installed; install it")
    assert without.returncode == 2


def test_the_installed_host_is_found_without_importing_it():
    result = apply("--check")
    assert str(contract.installed()[0]) in result.stdout, result.stderr
