"""Ray's calls, answered in this process: what OpenRLHF's train() needs to run without a cluster."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import torch

from abc_plugin.errors import UserError
from abc_plugin.host.install import undecorated
from abc_plugin.local import distributed_ranks
from abc_plugin.local.distributed_ranks import TERMINATION

SMALLER_MODELS = "--ds.load_in_4bit with --ds.lora.rank 16, or several GPUs with --ds.zero_stage 3"
SMALLER_ROLLOUTS = "a smaller --rollout.micro_batch_size or --rollout.max_new_tokens"
# Method of a worker: (what it does, the flags that lower its need of memory).
MEMORY = {
    "init_model_from_pretrained": ("loading the models", SMALLER_MODELS),
    "gather": (
        "gathering the policy's weights to generate, which ZeRO-3 needs on every GPU",
        "--ds.load_in_4bit with --ds.lora.rank 16",
    ),
    "generate": ("generating", SMALLER_ROLLOUTS),
    "forward": ("scoring the rollout", SMALLER_ROLLOUTS),
    "fit": (
        "training",
        f"a smaller --train.micro_batch_size, --actor.gradient_checkpointing_enable, or {SMALLER_MODELS}",
    ),
}

# Stands in for the name ``ray`` in the host's modules: a value is its own object reference.
IN_PROCESS_RAY = SimpleNamespace(
    is_initialized=lambda: True, put=lambda value: value, get=lambda reference, **_options: reference
)


class InProcessClass:
    """``handle = InProcessClass(cls).remote(...)`` makes a ``cls``; ``handle.method.remote(...)`` calls its method."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    def remote(self, *args: object, **kwargs: object) -> InProcessHandle:
        return InProcessHandle(self.cls(*args, **kwargs))


class InProcessHandle:
    def __init__(self, instance: object) -> None:
        self.instance = instance

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.instance, method))


class InProcessGroup:
    """The host's RayActorGroup with one worker per rank, of which this process holds its own (host: launcher.py).

    Every rank makes the same calls; each sees what all workers returned, in the order of ranks. Batched arguments are
    deep-copied, as Ray copies by serialising: policy and critic each keep the experiences in a replay buffer of their
    own and change them in place.

    ``seconds`` adds up the time this rank's worker spent in each method.
    """

    def __init__(self, _num_nodes: int, _num_gpus_per_node: int, actor_class: type, **_placement: object) -> None:
        self.rank = distributed_ranks.current_rank()
        self.seconds: Counter[str] = Counter()
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        self.worker = undecorated(actor_class)(self.rank.count, self.rank.index, address, port)
        os.environ["LOCAL_RANK"] = str(self.rank.local_index)  # Ray's workers each see one GPU, and set this to 0

    def async_init_model_from_pretrained(self, *args: object, **kwargs: object) -> list:
        with memory_remedy("init_model_from_pretrained"):
            return [self.worker.init_model_from_pretrained(*args, **kwargs)]

    def async_save_model(self) -> list:
        """The end of a run, which nothing interrupts."""
        TERMINATION.waits = True
        return [self.worker.save_model()]

    def async_run_method(self, method_name: str, *args: object, **kwargs: object) -> list:
        with self._timed(method_name):
            result = getattr(self.worker, method_name)(*args, **kwargs)
        return distributed_ranks.gather(result)

    def async_run_method_batch(self, method_name: str, **batches: list) -> list:
        """Each rank's list of results for its chunk of the batch; chunks are cut as the host cuts them."""
        count = len(next(iter(batches.values())))
        if count % self.rank.count:  # a rank with fewer would leave the others waiting in a collective
            raise RuntimeError(f"{count} batches of {method_name} for {self.rank.count} ranks")
        chunk = count // self.rank.count
        mine = slice(self.rank.index * chunk, (self.rank.index + 1) * chunk)
        batches = {name: copy.deepcopy(values[mine]) for name, values in batches.items()}
        with self._timed(method_name):
            results = self.worker.execute_batch(method_name, batches, 0, chunk)
        return distributed_ranks.gather(results)

    @contextlib.contextmanager
    def _timed(self, method_name: str) -> Iterator[None]:
        started = time.perf_counter()
        with memory_remedy(method_name):
            yield
        self.seconds[method_name] += time.perf_counter() - started


@contextlib.contextmanager
def memory_remedy(method_name: str) -> Iterator[None]:
    """Within the block, running out of memory raises a UserError that names the flags which lower the need."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU it is a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        activity, remedy = MEMORY.get(method_name, (f"calling {method_name}", "a smaller model"))
        raise UserError(f"out of memory while {activity}: try {remedy}") from error
