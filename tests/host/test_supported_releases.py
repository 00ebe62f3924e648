"""What the plugin overrides and calls in OpenRLHF: there in every supported release, and missed wherever it is not."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from host_releases import SUPPORTED, on_the_index, release

from abc_plugin.errors import UserError
from abc_plugin.host import supported_releases
from abc_plugin.host.import_openrlhf import import_host

import_host()

from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402

ROOMS = Path(supported_releases.__file__).parents[1]
ALL = supported_releases.SIGNATURES | supported_releases.LOCAL_SIGNATURES
MAKER = "trainer.ppo_utils.experience_maker:RemoteExperienceMaker"

# One process imports what all releases import; a child of it per release checks that release.
CHECK = """
import os, sys
import deepspeed, datasets, peft, ray, torch, torchdata, transformers
failed = []
for directory in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.path.insert(0, directory)
        from abc_plugin.host.import_openrlhf import import_host
        import_host(local=os.path.basename(directory) >= "0.11")
        import openrlhf
        assert openrlhf.__file__.startswith(directory), openrlhf.__file__
        sys.exit(0)
    failed += [directory] * (os.waitpid(child, 0)[1] != 0)
sys.exit(" ".join(failed) or 0)
"""


@pytest.fixture(scope="module")
def releases(request) -> list[Path]:
    """Every release within the supported range, also those that came out since this was written."""
    supported = [*SUPPORTED, *(version for version in on_the_index() if version not in SUPPORTED and fits(version))]
    return [release(version, request.config.cache.mkdir("openrlhf")) for version in supported]


def fits(version: str, *, local: bool = False) -> bool:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(importlib.metadata, "version", lambda _name: version)
        try:
            supported_releases.check_version(local=local)
        except UserError as error:
            assert f"OpenRLHF {version} is not supported: " in str(error)
            assert "pip install --no-deps openrlhf==0.11.2" in str(error)
            return False
    return True


def test_every_supported_release_has_what_the_plugin_overrides_and_calls(releases):
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK, *releases], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("room", ["host", "local"])
def test_every_supported_release_has_the_flags_that_the_plugin_reads(releases, room):
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOMS / room).glob("*.py"))
    groups = "actor|critic|ref|reward|data|rollout|train|algo|ckpt|ds|vllm|logger"
    settings = set(re.findall(rf"\bargs\.((?:{groups})\.[a-z_0-9.]+[a-z_0-9])", sources))
    assert len(settings) > 10
    for directory in releases[3 if room == "local" else 0 :]:
        script = (directory / "openrlhf/cli/train_ppo_ray.py").read_text(encoding="utf-8")
        flags = set(re.findall(r'"--([a-z_0-9.]+)"', script))
        groups_of_flags = {flag.rpartition(".")[0] for flag in flags}  # args.ds.lora
        assert not {one for one in settings if one not in flags | groups_of_flags}, directory


@pytest.mark.parametrize("version", ["0.5.0", "0.10.1.post2", "0.12.0", "0.12.0rc1", "1.0", "main"])
def test_other_versions_are_refused_by_name(version):
    assert not fits(version)


def test_what_comes_within_the_range_is_not_refused():
    assert all(map(fits, ("0.10.2", "0.11.9", "0.11.3rc1", "0.11.2+mine")))
    assert fits("0.11.0", local=True) and not fits("0.10.4", local=True)


def test_a_host_that_is_not_installed_is_named(monkeypatch):
    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    with pytest.raises(UserError, match="OpenRLHF is not installed; pip install --no-deps openrlhf==0.11.2"):
        supported_releases.check_version()


def test_a_changed_host_is_refused_by_name(monkeypatch):
    assert supported_releases.differences(ALL) == []
    monkeypatch.setattr(RemoteExperienceMaker, "_flatten_results", lambda self, refs: refs)
    monkeypatch.delattr(RemoteExperienceMaker, "get_cumulative_returns")
    flattening, missing = supported_releases.differences(ALL)
    assert flattening == f"{MAKER}._flatten_results: expected (self, refs, duplicate_factor), not (self, refs)"
    assert missing.startswith(f"{MAKER}.get_cumulative_returns: missing (")
    with pytest.raises(UserError, match=r"is not what .*_flatten_results: .* \(and 1 more\); pip install --no-deps"):
        supported_releases.check_signatures()


@pytest.mark.parametrize("symbol", [symbol for symbol, expected in ALL.items() if expected])
def test_one_parameter_more_is_caught(symbol):
    expected = ALL[symbol]
    more = f"one_more, {expected}" if expected.endswith("...") else f"{expected}, one_more"
    assert len(supported_releases.differences({symbol: more})) == 1
    assert len(supported_releases.differences({symbol + "_": None})) == 1
