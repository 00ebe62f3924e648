"""Lets an unmodified OpenRLHF be imported and run on a machine without vLLM, flash-attn or CUDA."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from abc_plugin.errors import UserError
from abc_plugin.host.supported_releases import check_signatures, check_version

# What OpenRLHF imports at module level from packages that one process never calls; of Ray only the decorator runs.
OPTIONAL = {
    "ray": ("ray", "ray.util", "ray.util.placement_group", "ray.util.scheduling_strategies", "ray.util.queue"),
    "vllm": ("vllm", "vllm.inputs", "vllm.utils"),
    "flash_attn": ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"),
}


class _Absent(types.ModuleType):
    """A module whose every name is a function that says which package is missing; ``remote`` leaves a class as is."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_args: object, **_kwargs: object) -> None:
            raise UserError(f"{self.__name__}.{name} was called, but {self.__name__.split('.')[0]} is not installed")

        return missing

    @classmethod
    def remote(cls, actor: type | None = None, **_options: object) -> Any:
        """In place of ``@ray.remote`` and ``@ray.remote(num_gpus=1)``."""
        return cls.remote if actor is None else actor


@contextlib.contextmanager
def optional_packages() -> Iterator[None]:
    """Within the block, importing an absent package of OPTIONAL yields stand-ins that refuse to be called.

    They leave ``sys.modules`` afterwards, so that transformers and others still find the package absent.
    """
    absent = [name for package, names in OPTIONAL.items() if not _importable(package) for name in names]
    sys.modules.update({name: _Absent(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _importable(package: str) -> bool:
    """Whether the package imports; flash-attn without its CUDA extension is found but does not."""
    if importlib.util.find_spec(package) is None:
        return False
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


class _CpuDevice(str):
    """What OpenRLHF gets for the current CUDA device: usable as a device, and ``f"cuda:{device}"`` still parses."""

    def __format__(self, spec: str) -> str:
        return "0"


def without_cuda() -> None:
    """Answer OpenRLHF's calls into torch.cuda on a machine without it; does nothing where CUDA is available.

    DeepSpeed is told to use its CPU accelerator, and kept from compiling its shared-memory collectives.
    """
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("set_device", "synchronize", "empty_cache", "current_stream"):
        setattr(torch.cuda, name, lambda *_args, **_kwargs: None)
    torch.cuda.current_device = lambda: _CpuDevice("cpu")
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def torch_dtype(param_dtype: str) -> torch.dtype:
    """The host's convert_to_torch_dtype, which does not know "fp32"."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[param_dtype]


def import_host(*, local: bool = True) -> None:
    """Import OpenRLHF's PPO stack with whatever this machine has; a second call changes nothing.

    ``local``: for the local driver, which runs with fewer versions.
    Raises UserError when OpenRLHF or one of its required packages is missing, or its version or code is not supported.
    """
    # Before the stand-ins: these probe for flash-attn and vLLM, and must find them absent.
    wanted = ("transformers", "datasets", "peft", "deepspeed", "torchdata")
    missing = [name for name in (*wanted, "openrlhf") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; run bash launch/environment.sh, or pip install them")
    check_version(local=local)
    without_cuda()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel("ERROR")  # kernels that nothing here asks for
    for name in wanted:
        importlib.import_module(name)
    importlib.import_module("transformers").utils.is_flash_attn_2_available()  # its answer is cached
    importlib.import_module("datasets").disable_progress_bars()
    with optional_packages():
        importlib.import_module("openrlhf.cli.train_ppo_ray")
        check_signatures(local=local)
    importlib.import_module("openrlhf.utils.utils").convert_to_torch_dtype = torch_dtype
    if not torch.cuda.is_available():
        strategy = importlib.import_module("openrlhf.utils.deepspeed.deepspeed")
        strategy.init_device_mesh = lambda _device, *args, **kwargs: init_device_mesh("cpu", *args, **kwargs)


def import_cluster_host(*, on_cpu: bool) -> None:
    """Import OpenRLHF's stack for a Ray cluster, where nothing may be a stand-in.

    ``on_cpu``: prepare this process for a cluster without GPUs first.
    Raises UserError when a package is missing, or OpenRLHF's version or code is not what the plugin supports.
    """
    required = ("ray", "deepspeed", "vllm", "flash_attn", "transformers", "openrlhf")
    if missing := [name for name in required if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"not installed: {', '.join(missing)}; pip install 'openrlhf[vllm]', or to try it on a CPU bash "
            "launch/environment.sh ray and use .venv-ray/bin/abc-rlhf"
        )
    check_version()
    if on_cpu:
        importlib.import_module("abc_plugin.host.cluster_on_cpu").worker_setup()
    try:
        importlib.import_module("openrlhf.cli.train_ppo_ray")
    except ImportError as error:
        raise UserError(f"OpenRLHF does not import here: {error}") from None
    check_signatures()
