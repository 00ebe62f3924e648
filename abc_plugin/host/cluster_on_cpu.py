"""Real Ray, DeepSpeed and vLLM (its CPU build) under an unmodified OpenRLHF on a machine without a GPU.

Every process of such a cluster first calls ``worker_setup``: the driver, Ray's workers and vLLM's engines. It imports
nothing heavy; each module of PATCHES is adjusted when, and only where, it gets imported.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import os
import signal
import sys
import types
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.machinery import ModuleSpec
from typing import Any

from abc_plugin.errors import UserError

SWITCH = "ABC_RLHF_ON_CPU"  # set to 1 in every process of such a cluster, and in no other
GRACE = 3.0  # seconds between Ray's shutdown and the end of what it left

# What the processes find in their environment unless the user has set it; the first three are the host's own defaults
# (cli/train_ppo_ray.py), which it would give to a Ray that it starts itself.
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "true",
    "NCCL_DEBUG": "WARN",
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",  # some seven processes share the machine
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process beside the engine's for its only worker
}


def runtime_env() -> dict[str, Any]:
    """Ray's runtime_env for a cluster without GPUs."""
    env_vars = {name: os.environ.get(name, default) for name, default in ENVIRONMENT.items()}
    return {"worker_process_setup_hook": f"{__name__}.worker_setup", "env_vars": env_vars | {SWITCH: "1"}}


def start(num_gpus: int = 8, environment: dict[str, Any] | None = None) -> None:
    """Start Ray on this machine with ``num_gpus`` GPUs that are not there; the host's train() keeps a Ray that is up.

    ``environment`` replaces ``runtime_env()``. Raises UserError where vLLM is missing or a GPU is present.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed here; run bash launch/environment.sh ray and use .venv-ray/bin/python")
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        raise UserError(f"this machine has a GPU ({torch.cuda.get_device_name()}), so run it without --on_cpu")
    worker_setup()
    # CPUs are pretended as well: each of the host's actors asks for one, and there are more actors than cores.
    importlib.import_module("ray").init(
        address="local",
        num_gpus=num_gpus,
        num_cpus=2 * num_gpus,
        include_dashboard=False,
        runtime_env=environment or runtime_env(),
    )
    atexit.register(stop)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # Ray's own would skip stop()


def stop() -> None:
    """End the Ray that ``start`` started and all its processes; called when this process ends (SIGKILL aside).

    Ray alone leaves its actors and vLLM's engine running for up to half a minute.
    """
    psutil, ray = importlib.import_module("psutil"), importlib.import_module("ray")
    processes = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=GRACE)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@functools.cache
def worker_setup() -> None:
    """Prepare this process; a second call changes nothing."""
    for name, default in ENVIRONMENT.items():
        os.environ.setdefault(name, default)
    os.environ[SWITCH] = "1"
    # flash-attn's Python part (bert_padding) imports with an empty CUDA extension. Transformers still finds flash
    # attention unavailable, as it asks for a CUDA device. The host's use of its Triton kernels falls back to PyTorch.
    sys.modules.setdefault("flash_attn_2_cuda", types.ModuleType("flash_attn_2_cuda"))
    sys.modules["flash_attn.ops.triton.cross_entropy"] = None
    sys.meta_path.insert(0, AfterImport(PATCHES))


def vllm_plugin() -> None:
    """Entry point of ``vllm.general_plugins``: every vLLM process calls it, wherever abc_plugin is installed.

    vLLM's engine is a process of its own, which Ray's hook does not reach. Does nothing unless SWITCH is set.
    """
    if os.environ.get(SWITCH) == "1":
        worker_setup()


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``patches[name](module)`` right after that module is executed, or now where it already is."""

    def __init__(self, patches: dict[str, Callable[[Any], None]]) -> None:
        self.patches = patches
        for name in patches.keys() & sys.modules.keys():
            patches[name](sys.modules[name])

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if name not in self.patches:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:  # it may be asked for without being executed, so nothing is patched here
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), self.patches[name](module))
        return spec


def _without_cuda(deepspeed: Any) -> None:
    """Answer the host's calls into torch.cuda; keep DeepSpeed from compiling C++ for its collectives and its Adam."""
    from abc_plugin.host.import_openrlhf import without_cuda

    without_cuda()
    original = deepspeed.initialize

    def initialize(*args: Any, config: dict[str, Any] | None = None, **kwargs: Any) -> tuple:
        if config and config.get("optimizer", {}).get("type") == "AdamW":
            config["optimizer"]["params"]["torch_adam"] = True
        return original(*args, config=config, **kwargs)

    deepspeed.initialize = initialize


def _strategy_on_cpu(strategy: Any) -> None:
    """The host's strategy asks for a mesh of CUDA devices, and for its moving average (EMA) on "cuda"."""
    init_device_mesh, moving_average = strategy.init_device_mesh, strategy.DeepspeedStrategy.moving_average
    strategy.init_device_mesh = lambda _device, *args, **kwargs: init_device_mesh("cpu", *args, **kwargs)
    strategy.DeepspeedStrategy.moving_average = lambda self, model, ema, beta, _device: moving_average(
        self, model, ema, beta, "cpu"
    )


def _received_on_cpu(_vllm_worker_wrap: Any) -> None:
    """The host's vLLM worker receives weights into ``torch.empty(shape, dtype=dtype, device="cuda")``."""
    import torch

    original = torch.empty

    def empty(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return original(*size, device="cpu" if device == "cuda" else device, **kwargs)

    torch.empty = empty


def _gloo_for_nccl(pynccl: Any) -> None:
    """The group over which the host broadcasts weights to vLLM, on gloo instead of NCCL."""
    import torch.distributed as dist

    class GlooCommunicator:
        def __init__(self, group: Any, device: object = None) -> None:
            store = dist.PrefixStore("weights", group.store)
            self.group = dist.ProcessGroupGloo(store, group.rank, group.world_size, timedelta(minutes=5))

        def broadcast(self, tensor: Any, src: int, stream: object = None) -> None:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = src, 0
            self.group.broadcast([tensor], options).wait()

    pynccl.PyNcclCommunicator = GlooCommunicator


def _plain_weights(layers: Any) -> None:
    """vLLM's CPU linear layers pack their weight and drop it, so that the host's weights could not be loaded again."""
    from torch.nn.functional import linear

    original = layers.dispatch_cpu_unquantized_gemm

    def keep_weight(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = linear
        else:
            original(layer, remove_weight)

    layers.dispatch_cpu_unquantized_gemm = keep_weight


PATCHES: dict[str, Callable[[Any], None]] = {
    "deepspeed": _without_cuda,
    "openrlhf.utils.deepspeed.deepspeed": _strategy_on_cpu,
    "openrlhf.trainer.ray.vllm_worker_wrap": _received_on_cpu,
    "vllm.distributed.device_communicators.pynccl": _gloo_for_nccl,
    "vllm.model_executor.layers.utils": _plain_weights,
}
