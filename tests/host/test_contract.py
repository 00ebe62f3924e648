"""What the plugin relies on in OpenRLHF: there in every supported release, and missed wherever it is not."""

import ast
import importlib.metadata
import re
import shutil
import warnings
from pathlib import Path

import pytest
from conftest import run_python
from host_releases import LAST_UNSUPPORTED, SUPPORTED, on_the_index, release

from abc_plugin.errors import UserError
from abc_plugin.host import contract

MAKER = "trainer/ppo_utils/experience_maker.py"
LAUNCHER = "trainer/ray/launcher.py"


@pytest.fixture(autouse=True)
def _no_warnings_of_the_host():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        yield


@pytest.fixture(scope="module")
def host() -> Path:
    return contract.installed()[0]


@pytest.fixture
def copy(tmp_path, host) -> Path:
    """A copy of the installed host, to be broken: its directory for sys.path."""
    version = importlib.metadata.version("openrlhf")
    shutil.copytree(host, tmp_path / "openrlhf", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = tmp_path / f"openrlhf-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: openrlhf\nVersion: {version}\n")
    return tmp_path


def edit(copy: Path, file: str, old: str, new: str) -> None:
    path = copy / "openrlhf" / file
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{file} has no {old!r}: the test is out of date"
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_supported_release_keeps_the_contract(version, request):
    contract.refuse_unsupported(version)
    package = release(version, request.config.cache.mkdir("openrlhf")) / "openrlhf"
    assert contract.broken(package) == []
    assert contract.missing_flags(package) == []
    if version.startswith("0.11."):
        contract.refuse_unsupported(version, local=True)
        assert contract.broken(package, contract.LOCAL_CONTRACT) == []
    else:
        with pytest.raises(UserError, match=f"OpenRLHF {version} is not supported: abc-rlhf local needs >=0.11,<0.12"):
            contract.refuse_unsupported(version, local=True)


def test_releases_that_came_out_since_keep_the_contract(request):
    for version in set(on_the_index()) - set(SUPPORTED):
        try:
            contract.refuse_unsupported(version)
        except UserError:
            continue
        package = release(version, request.config.cache.mkdir("openrlhf")) / "openrlhf"
        if wrong := contract.broken(package) + contract.missing_flags(package):
            pytest.xfail(f"users of OpenRLHF {version} are refused: {wrong}")  # no commit did it


def test_the_release_before_is_refused_for_a_reason(request):
    package = release(LAST_UNSUPPORTED, request.config.cache.mkdir("openrlhf")) / "openrlhf"
    assert any("RemoteExperienceMaker._flatten_results" in finding for finding in contract.broken(package))


@pytest.mark.parametrize("version", ["0.5.0", LAST_UNSUPPORTED, "0.12.0", "0.12.0rc1", "1.0", "main"])
def test_other_versions_are_refused_by_name(version):
    expected = (
        f"OpenRLHF {version} is not supported: abc_plugin needs >=0.9.9,<0.12; pip install --no-deps openrlhf==0.11.2"
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        contract.refuse_unsupported(version)


@pytest.mark.parametrize("version", ["0.11.9", "0.11.3rc1", "0.11.2+mine"])
def test_what_comes_within_the_range_is_not_refused(version):
    contract.refuse_unsupported(version)


# What is broken (file, old, new), and the finding that must name it.
MUTATIONS = {
    "renamed argument": (
        LAUNCHER,
        "attention_mask: Optional[torch.Tensor] = None,\n        packed_seq_lens=None,\n        pad_sequence=False",
        "mask: Optional[torch.Tensor] = None,\n        packed_seq_lens=None,\n        pad_sequence=False",
        "RewardModelActor.forward: expected (self, sequences, attention_mask=None, packed_seq_lens=None, "
        "pad_sequence=False), found (self, sequences, mask=None, packed_seq_lens=None, pad_sequence=False)",
    ),
    "removed function": (
        MAKER,
        "def _flatten_results(",
        "def _gather_results(",
        "RemoteExperienceMaker._flatten_results: expected (self, refs, duplicate_factor), found nothing",
    ),
    "another mask object": (
        MAKER,
        "action_mask=experience.action_mask,\n                reward_clip_range",
        "action_mask=experience.action_mask.bool(),\n                reward_clip_range",
        "RemoteExperienceMaker.compute_advantages_and_returns: expected `reward = compute_reward(",
    ),
    "no longer an actor": (
        LAUNCHER,
        "@ray.remote(num_gpus=1)\nclass RewardModelActor",
        "class RewardModelActor",
        "RewardModelActor: expected @ray.remote class(BaseModelActor), found class(BaseModelActor)",
    ),
    "moved": (
        MAKER,
        "from openrlhf.models.utils import compute_approx_kl, compute_reward",
        "from openrlhf.models.rewards import compute_approx_kl, compute_reward",
        "compute_reward: expected from openrlhf.models.utils, found from openrlhf.models.rewards",
    ),
    "score read elsewhere": (
        "models/model.py",
        "reward = values.gather(dim=1, index=eos_indices).squeeze(1)",
        "reward = values.mean(1)",
        "_get_reward_model.RewardModel.forward: expected `reward = values.gather(",
    ),
    "unreadable": (
        "utils/utils.py",
        "def get_strategy(args):",
        "def get_strategy(args:",
        "cannot be read (SyntaxError)",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_changed_host_is_caught(copy, mutation):
    file, old, new, finding = MUTATIONS[mutation]
    edit(copy, file, old, new)
    (found,) = contract.broken(copy / "openrlhf")
    assert found.startswith(file)
    assert finding in found


def test_a_file_that_is_gone_is_caught(copy):
    (copy / "openrlhf/trainer/ppo_trainer_async.py").unlink()
    assert contract.broken(copy / "openrlhf") == ["trainer/ppo_trainer_async.py: cannot be read (FileNotFoundError)"]


def test_a_renamed_flag_is_caught(copy):
    edit(copy, "cli/train_ppo_ray.py", '"--reward.remote_url"', '"--reward.url"')
    assert contract.missing_flags(copy / "openrlhf") == [
        "cli/train_ppo_ray.py: expected the flag --reward.remote_url or --remote_rm_url, found neither"
    ]


ROWS = [
    pytest.param(table, file, symbol, id=f"{file}:{symbol}")
    for table in (contract.CONTRACT, contract.LOCAL_CONTRACT)
    for file, symbols in table.items()
    for symbol in symbols
]


@pytest.mark.parametrize(("table", "file", "symbol"), ROWS)
def test_no_row_is_idle(table, file, symbol, host, tmp_path):
    """Without the symbol, with one parameter more, or with one of its fragments changed the row complains."""
    needs, source = table[file][symbol], (host / file).read_text(encoding="utf-8")
    without = ast.parse(source)
    parent = contract._find(without, symbol.rpartition(".")[0]) if "." in symbol else without
    parent.body = [node for node in parent.body if symbol.split(".")[-1] not in contract._names(node)] or [ast.Pass()]
    more = ast.parse(source)
    arguments = getattr(contract._find(more, symbol), "args", None)
    changed = [re.sub(r"([A-Za-z])(\w*)([^A-Za-z]*)$", r"\1_\2\3", fragment) for fragment in needs.body]  # last name
    texts = [ast.unparse(without)]
    texts += [ast.unparse(ast.parse(source)).replace(*pair) for pair in zip(needs.body, changed, strict=True)]
    if arguments is not None:
        arguments.kwonlyargs.append(ast.arg("one_more"))
        arguments.kw_defaults.append(None)
        texts.append(ast.unparse(more))
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    for text in texts:
        (tmp_path / file).write_text(text, encoding="utf-8")
        (finding,) = contract.broken(tmp_path, {file: {symbol: needs}})
        assert f"{file} {symbol}: expected " in finding


def test_the_installed_host_is_checked_without_importing_it(copy):
    code = "import sys; from abc_plugin.host.contract import refuse_broken_host as check; check(local=True); "
    code += "print([name for name in ('openrlhf', 'ray', 'torch', 'transformers') if name in sys.modules])"
    stock = run_python("-c", code)
    assert stock.stdout == "[]\n", stock.stderr

    edit(copy, MAKER, "def _flatten_results(self, refs, duplicate_factor)", "def _flatten_results(self, refs)")
    edit(copy, "utils/utils.py", "def get_strategy(args)", "def get_strategy(args, cluster)")
    changed = run_python("-c", code, env={"PYTHONPATH": str(copy)})
    version = importlib.metadata.version("openrlhf")
    assert changed.stderr.strip().splitlines()[-1] == (
        f"abc_plugin.errors.UserError: OpenRLHF {version} in {copy / 'openrlhf'} is not what abc_plugin was written "
        "against: utils/utils.py get_strategy: expected (args), found (args, cluster) (and 1 more); pip install "
        "--no-deps --force-reinstall openrlhf==0.11.2"
    )


def test_a_host_without_metadata_or_none_at_all_is_named(copy, monkeypatch):
    monkeypatch.setattr(contract.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match="OpenRLHF is not installed; pip install --no-deps openrlhf==0.11.2"):
        contract.refuse_broken_host()
    monkeypatch.undo()

    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(contract.importlib.metadata, "version", unknown)
    with pytest.raises(UserError, match="has no version: install it"):
        contract.refuse_broken_host()
