"""install() and uninstall(): which names they touch, that they leave no trace, that workers import the subclasses."""

import importlib
import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest
from ray import cloudpickle

import abc_plugin
from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError
from abc_plugin.host.import_openrlhf import import_host

import_host()

import openrlhf.cli.train_ppo_ray as cli  # noqa: E402

from abc_plugin.host import install as plugin  # noqa: E402
from abc_plugin.host.install import as_actor, undecorated  # noqa: E402


def host_objects() -> dict:
    modules = ("cli.train_ppo_ray", "trainer.ray.launcher", "trainer.ray.ppo_critic", "trainer.ppo_trainer")
    modules += ("trainer.ppo_trainer_async", "utils", "utils.utils", "trainer.ppo_utils.experience_maker")
    objects = {}
    for name in modules:
        module = importlib.import_module(f"openrlhf.{name}")
        objects |= {(name, key): value for key, value in vars(module).items() if not key.startswith("__")}
    return objects


@pytest.fixture(autouse=True)
def leave_no_trace():
    before = host_objects()
    yield
    plugin.uninstall()
    after = host_objects()
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)


def changed(before: dict) -> set:
    return {key for key, value in host_objects().items() if value is not before[key]}


def test_exactly_these_names_are_rebound():
    before = host_objects()
    lines = plugin.install(ShapingConfig("uniform"))
    assert changed(before) == {
        ("trainer.ray.launcher", "RewardModelActor"),
        ("cli.train_ppo_ray", "RewardModelActor"),
        ("trainer.ray.ppo_critic", "CriticModelActor"),
        ("cli.train_ppo_ray", "CriticModelActor"),
        ("trainer.ppo_trainer", "PPOTrainer"),
        ("trainer.ppo_trainer_async", "GenerateSamplesActor"),
        ("trainer.ppo_trainer_async", "TrainingActor"),
        ("trainer.ppo_trainer_async", "PPOTrainerAsync"),
        ("utils.utils", "get_strategy"),
        ("utils", "get_strategy"),
        ("cli.train_ppo_ray", "get_strategy"),
    }
    assert len(lines) == 7 and "RewardModelActor -> abc_plugin.host.model_workers.CreditRewardModel" in lines[0]


def test_installing_twice_is_installing_once_and_uninstalling_twice_is_nothing():
    plugin.install(ShapingConfig("abc"))
    first = undecorated(cli.RewardModelActor)
    plugin.install(ShapingConfig("uniform"))
    assert undecorated(cli.RewardModelActor) is first
    assert sum("CreditRewardModel" in base.__name__ for base in first.__mro__) <= 2  # Ray adds a class of its own
    plugin.uninstall()
    plugin.uninstall()


def test_the_actors_keep_the_hosts_options_and_workers_import_them_by_name():
    stock = {name: plugin._load(name) for name, _ in plugin.REBOUND}
    plugin.install()
    for name, ours in plugin.REBOUND:
        rebound = plugin._load(name)
        assert rebound._default_options == stock[name]._default_options
        assert issubclass(undecorated(rebound), undecorated(stock[name]).__mro__[0])
        plain = plugin._load(ours)
        assert plain.__qualname__.isidentifier()  # no local class: pickled by reference
        assert len(cloudpickle.dumps(plain)) < 200
        assert pickle.loads(cloudpickle.dumps(plain)) is plain


def test_settings_travel_in_args_and_are_checked_once_before_any_actor(monkeypatch):
    checked = []
    monkeypatch.setattr("abc_plugin.host.model_checks.preflight", lambda args, shaping: checked.append(shaping))
    monkeypatch.setattr("openrlhf.utils.utils.get_strategy", stub := lambda args: SimpleNamespace(args=args))
    monkeypatch.setattr("openrlhf.utils.get_strategy", stub)
    shaping = ShapingConfig("uniform", 0.5)
    plugin.install(shaping)
    args = SimpleNamespace()
    get_strategy = importlib.import_module("openrlhf.utils").get_strategy
    assert get_strategy(args).args.shaping is shaping
    get_strategy(args)
    assert checked == [shaping]
    plugin.uninstall()


def test_an_unknown_method_or_a_plain_class_is_refused_and_nothing_is_left():
    before = host_objects()
    with pytest.raises(UserError, match="'nosuch' is not registered"):
        plugin.install(ShapingConfig("nosuch"))
    assert not changed(before)
    with pytest.raises(UserError, match="no Ray actor class"):
        as_actor(object, like=SimpleNamespace)


def test_a_changed_host_is_refused_before_anything_is_rebound(monkeypatch):
    before = host_objects()
    monkeypatch.setattr(
        "abc_plugin.host.install.check_version", lambda: (_ for _ in ()).throw(UserError("OpenRLHF 0.11.2 in x"))
    )
    with pytest.raises(UserError, match=r"OpenRLHF 0\.11\.2"):
        plugin.install(ShapingConfig("abc"))
    assert not changed(before)


def test_the_entry_point_takes_its_flags_out_of_the_command_line(monkeypatch, capsys):
    ours = ["--reward_shaping", "uniform", "--shaping.beta", "0.5"]
    monkeypatch.setattr("sys.argv", ["train", *ours[:2], "--actor.num_nodes", "2", *ours[2:]])
    plugin.openrlhf_plugin()
    assert sys.argv == ["train", "--actor.num_nodes", "2"]
    assert "rebound openrlhf.trainer.ppo_trainer.PPOTrainer" in capsys.readouterr().out


def test_names_of_the_users_own_modules_are_rebound_too(monkeypatch):
    stock = importlib.import_module("openrlhf.trainer.ppo_trainer").PPOTrainer
    driver = ModuleType("my_driver")
    driver.Trainer = stock  # from openrlhf... import PPOTrainer as Trainer
    monkeypatch.setitem(sys.modules, "my_driver", driver)
    plugin.install()
    assert driver.Trainer is importlib.import_module("openrlhf.trainer.ppo_trainer").PPOTrainer is not stock
    plugin.uninstall()
    assert driver.Trainer is stock


def test_every_name_of_the_interface_is_there():
    assert all(callable(getattr(abc_plugin, name)) for name in abc_plugin.__all__)
    assert abc_plugin.install is plugin.install
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        abc_plugin.nosuch  # noqa: B018
