"""What stands in for absent packages must refuse to be used, and leave no trace."""

import sys

import pytest

from abc_plugin.errors import UserError
from abc_plugin.host import import_openrlhf as adapt


def test_stand_ins_import_refuse_and_leave(monkeypatch):
    monkeypatch.setattr(adapt, "OPTIONAL", {"no_such_engine": ("no_such_engine", "no_such_engine.inner")})
    with adapt.optional_packages():
        from no_such_engine import remote
        from no_such_engine.inner import Params

        assert remote(int) is int and remote(num_gpus=1)(int) is int  # Ray's decorator
        with pytest.raises(UserError, match="no_such_engine.inner.Params was called, but no_such_engine is not inst"):
            Params(temperature=1.0)
    assert not any(name.startswith("no_such_engine") for name in sys.modules)


def test_a_present_package_is_left_alone(monkeypatch):
    monkeypatch.setattr(adapt, "OPTIONAL", {"json": ("json", "json.decoder")})
    import json

    with adapt.optional_packages():
        assert sys.modules["json"] is json
    assert sys.modules["json"] is json


def test_a_missing_host_is_named(monkeypatch):
    find_spec = adapt.importlib.util.find_spec
    monkeypatch.setattr(
        adapt.importlib.util, "find_spec", lambda name: None if name in ("openrlhf", "peft") else find_spec(name)
    )
    with pytest.raises(UserError, match="not installed: peft, openrlhf; run bash launch/environment.sh"):
        adapt.import_host()
