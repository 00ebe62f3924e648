"""Ray's calls, answered in this process: what OpenRLHF's train() needs to run without a cluster."""

from __future__ import annotations

import copy
import os
import types
from typing import Any

from abc_plugin.host.actors import undecorated


class InProcessRay:
    """Stands in for the name ``ray`` in the host's modules: a value is its own object reference."""

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def put(value: Any) -> Any:
        return value

    @staticmethod
    def get(ref: Any, **_: object) -> Any:
        return ref


class InProcessClass:
    """``handle = InProcessClass(cls).remote(...)`` makes a ``cls``; ``handle.method.remote(...)`` calls its method."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    def remote(self, *args: object, **kwargs: object) -> InProcessHandle:
        return InProcessHandle(self.cls(*args, **kwargs))


class InProcessHandle:
    def __init__(self, instance: object) -> None:
        self.instance = instance

    def __getattr__(self, method: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(remote=getattr(self.instance, method))


class InProcessGroup:
    """The host's RayActorGroup with one worker, in this process (host: trainer/ray/launcher.py).

    Batched arguments are deep-copied, as Ray copies by serialising: policy and critic each keep the experiences in a
    replay buffer of their own and change them in place.
    """

    def __init__(self, _num_nodes: int, _num_gpus_per_node: int, actor_class: type, **_placement: object) -> None:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        self.worker = undecorated(actor_class)(1, 0, address, port)

    def async_init_model_from_pretrained(self, *args: object, **kwargs: object) -> list:
        return [self.worker.init_model_from_pretrained(*args, **kwargs)]

    def async_save_model(self) -> list:
        return [self.worker.save_model()]

    def async_run_method(self, method_name: str, *args: object, **kwargs: object) -> list:
        return [getattr(self.worker, method_name)(*args, **kwargs)]

    def async_run_method_batch(self, method_name: str, **batches: list) -> list:
        count = len(next(iter(batches.values())))
        return [self.worker.execute_batch(method_name, copy.deepcopy(batches), 0, count)]
