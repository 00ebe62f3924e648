"""What the CPU cluster changes, where, and that it leaves nothing behind; test_ray.py trains on it."""

import ast
import importlib
import importlib.util
import sys
import textwrap
import threading
import types
from pathlib import Path

import psutil
import pytest
import torch
from conftest import run_python

from abc_plugin.errors import UserError
from abc_plugin.host import cluster_on_cpu as cpu_cluster


def python(code: str) -> list[str]:
    """The lines that this code prints in a process of its own."""
    result = run_python("-c", textwrap.dedent(code))
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_importing_it_costs_nothing():
    names = ["torch", "ray", "deepspeed", "transformers", "openrlhf", "vllm"]
    assert python(f"""
        import sys, abc_plugin.host.cluster_on_cpu
        print([name for name in {names} if name in sys.modules])
    """) == ["[]"]  # fmt: skip


def test_the_environment_is_the_hosts_and_the_users(monkeypatch):
    source = Path(importlib.util.find_spec("openrlhf").submodule_search_locations[0], "cli", "train_ppo_ray.py")
    asked = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]
    hosts = {node.args[0].value: node.args[1].value for node in asked if ast.unparse(node.func) == "os.environ.get"}
    for name in cpu_cluster.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    environment = cpu_cluster.runtime_env()
    assert len(hosts) == 3 and hosts.items() <= environment["env_vars"].items()
    assert environment["env_vars"][cpu_cluster.SWITCH] == "1"
    module, _, name = environment["worker_process_setup_hook"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is cpu_cluster.worker_setup
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert cpu_cluster.runtime_env()["env_vars"]["VLLM_CPU_KVCACHE_SPACE"] == "7"


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """A module on sys.path whose patch notes its value, and the notes."""
    notes = []
    (tmp_path / "patched_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "patched_module", raising=False)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    return {"patched_module": lambda module: notes.append(module.value), "no_such_module": notes.append}, notes


def test_a_module_is_patched_when_it_is_imported_by_each_finder_and_not_before(patched):
    patches, notes = patched
    sys.meta_path[:0] = [cpu_cluster.AfterImport(patches), cpu_cluster.AfterImport(patches)]
    assert importlib.util.find_spec("patched_module") and not notes  # transformers looks for deepspeed like this
    importlib.import_module("patched_module")
    importlib.import_module("patched_module")
    assert notes == [1, 1]
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module("no_such_module")


def test_a_module_that_is_imported_is_patched_at_once(patched):
    patches, notes = patched
    importlib.import_module("patched_module")
    cpu_cluster.AfterImport(patches)
    assert notes == [1]


def test_the_vllm_plugin_leaves_other_machines_alone(monkeypatch):
    """It is called on GPU machines, too."""
    monkeypatch.delenv(cpu_cluster.SWITCH, raising=False)
    monkeypatch.setattr(cpu_cluster, "worker_setup", lambda: pytest.fail("set up without the switch"))
    cpu_cluster.vllm_plugin()


def test_a_worker_finds_a_cpu_where_the_host_asks_for_cuda():
    output = python("""
        import os, sys, types
        os.environ["ABC_RLHF_ON_CPU"] = "1"
        from abc_plugin.host import cluster_on_cpu as cpu_cluster
        cpu_cluster.vllm_plugin()
        cpu_cluster.worker_setup()
        assert len([one for one in sys.meta_path if isinstance(one, cpu_cluster.AfterImport)]) == 1
        import deepspeed, torch, transformers
        device = torch.cuda.current_device()
        print(torch.device(f"cuda:{device}"), torch.zeros(1, device=device).device)
        print(transformers.utils.is_flash_attn_2_available())
        packages = ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton")
        sys.modules.update({name: types.ModuleType(name) for name in packages})
        try:
            import flash_attn.ops.triton.cross_entropy
        except ImportError as error:
            print(error)
    """)
    assert output[-3:-1] == ["cuda:0 cpu", "False"] and "None in sys.modules" in output[-1]


@pytest.mark.parametrize(("kind", "params"), [("AdamW", {"lr": 1.0, "torch_adam": True}), ("Muon", {"lr": 1.0})])
def test_deepspeed_takes_pytorchs_adam(kind, params, monkeypatch):
    monkeypatch.setattr("abc_plugin.host.import_openrlhf.without_cuda", lambda: None)
    deepspeed = types.SimpleNamespace(initialize=lambda *args, config=None, **kwargs: (args, config, kwargs))
    cpu_cluster._without_cuda(deepspeed)
    args, config, kwargs = deepspeed.initialize(
        1, config={"optimizer": {"type": kind, "params": {"lr": 1.0}}}, model=2
    )
    assert (args, kwargs) == ((1,), {"model": 2}) and config["optimizer"]["params"] == params
    assert deepspeed.initialize(config={"train_batch_size": 1})[1] == {"train_batch_size": 1}  # an evaluation engine


def test_the_strategy_averages_and_meshes_on_the_cpu():
    class DeepspeedStrategy:
        def moving_average(self, model, ema, beta, device):
            return model, ema, beta, device

    strategy = types.SimpleNamespace(
        init_device_mesh=lambda *args, **kwargs: (args, kwargs), DeepspeedStrategy=DeepspeedStrategy
    )
    cpu_cluster._strategy_on_cpu(strategy)
    assert strategy.init_device_mesh("cuda", (1,), mesh_dim_names=("dp",)) == (
        ("cpu", (1,)),
        {"mesh_dim_names": ("dp",)},
    )
    assert DeepspeedStrategy().moving_average("model", "ema", 0.9, "cuda") == ("model", "ema", 0.9, "cpu")


def test_weights_are_received_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch, "empty", torch.empty)  # restored afterwards
    cpu_cluster._received_on_cpu(None)
    received = torch.empty((2, 3), dtype=torch.bfloat16, device="cuda")
    assert (received.device.type, received.shape, received.dtype) == ("cpu", (2, 3), torch.bfloat16)
    assert torch.empty(2, 3, device="meta").device.type == "meta" and torch.empty(4).shape == (4,)


def test_weights_are_broadcast_by_gloo():
    pynccl, store, received = types.SimpleNamespace(), torch.distributed.HashStore(), torch.zeros(3)
    cpu_cluster._gloo_for_nccl(pynccl)

    def member(rank: int, tensor: torch.Tensor) -> None:
        group = types.SimpleNamespace(store=store, rank=rank, world_size=2)
        pynccl.PyNcclCommunicator(group, device="cpu").broadcast(tensor, src=0, stream=None)

    sender = threading.Thread(target=member, args=(0, torch.tensor([1.0, 2.0, 3.0])))
    sender.start()
    member(1, received)
    sender.join()
    assert received.tolist() == [1.0, 2.0, 3.0]


def test_vllm_keeps_the_weight_it_computes_with():
    packed = []
    layers = types.SimpleNamespace(dispatch_cpu_unquantized_gemm=lambda layer, remove_weight: packed.append(layer))
    cpu_cluster._plain_weights(layers)
    linear, convolution = torch.nn.Linear(2, 1, bias=False), torch.nn.Conv1d(1, 1, 2)
    layers.dispatch_cpu_unquantized_gemm(linear, remove_weight=True)
    linear.weight.data = torch.tensor([[3.0, 4.0]])  # a new weight from the host
    assert linear.cpu_linear(torch.tensor([1.0, 1.0]), linear.weight, None).tolist() == [7.0]
    layers.dispatch_cpu_unquantized_gemm(convolution, remove_weight=True)
    assert packed == [convolution]


def test_start_refuses_what_cannot_work(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="vLLM is not installed here; run bash launch/environment.sh ray"):
        cpu_cluster.start()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    with pytest.raises(UserError, match="this machine has a GPU .H100., so run it without --on_cpu"):
        cpu_cluster.start()


CLUSTER = """
import importlib.util, os, psutil, sys, time
importlib.util.find_spec = (lambda find: lambda name: name == "vllm" or find(name))(importlib.util.find_spec)
from abc_plugin.host import cluster_on_cpu as cpu_cluster
cpu_cluster.start(num_gpus=2)
import ray

@ray.remote(num_gpus=1)
class Worker:
    def info(self):
        import subprocess, torch, deepspeed
        subprocess.Popen(["bash", "-c", "sleep 60 & wait"])  # as vLLM's engine has a worker, which Ray does not see
        return os.getpid(), ray.get_gpu_ids(), os.environ["DS_ACCELERATOR"], str(torch.cuda.current_device())

workers = [Worker.remote() for _ in range(2)]
for info in ray.get([worker.info.remote() for worker in workers]):
    print(*info)
print("PIDS", os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True)))
sys.stdout.flush()
os.kill(os.getpid(), 15)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_cluster_starts_and_leaves_nothing_when_its_driver_is_told_to_end():
    result = run_python("-c", CLUSTER)
    assert result.returncode == 143, result.stderr
    *workers, pids = [line.split() for line in result.stdout.splitlines() if line.endswith("cpu") or "PIDS" in line]
    assert sorted(worker[1:] for worker in workers) == [["[0]", "cpu", "cpu"], ["[1]", "cpu", "cpu"]], result.stdout
    assert {worker[0] for worker in workers} < set(pids) and len(pids) > 5
    assert not [pid for pid in pids[1:] if runs(int(pid))]


def runs(pid: int) -> bool:
    """Whether the process is there; one that ended and that nobody has waited for does not count."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
