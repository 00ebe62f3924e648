"""Runs the host's stock command line, or abc-rlhf ray, on Ray without a GPU, seeded and recorded: a main program.

    python tests/support/ray_run.py stock RECORDS <flags>
    python tests/support/ray_run.py abc RECORDS <flags>

Every PPO step's experiences are saved to RECORDS/<step>.pt. The host seeds its model workers only; here every process
is seeded, each request to vLLM too, and samples are taken in the order of their prompts, not of their arrival, so that
two runs can be compared bit by bit. Ray's workers import this file for its hook.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import runpy
import sys
import zlib
from collections import Counter
from pathlib import Path

from abc_plugin.host import cluster_on_cpu as cpu_cluster

RECORDS, SEED = "ABC_TEST_RECORDS", 0
INPUTS = ("sequences", "action_mask", "action_log_probs", "rollout_log_probs", "values", "rewards")
FIELDS = (*INPUTS, "advantages", "returns")


def main(argv: list[str]) -> int:
    """Start Ray, run the command line with the flags, end Ray."""
    which, records, *flags = argv
    environment = cpu_cluster.runtime_env()
    environment["worker_process_setup_hook"] = "ray_run.worker_setup"
    here = os.path.dirname(os.path.abspath(__file__))
    environment["env_vars"] |= {
        "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))),
        RECORDS: str(Path(records).resolve()),
    }
    cpu_cluster.start(environment=environment)
    if which == "abc":
        from abc_plugin.cli import main as abc_rlhf

        return abc_rlhf(["ray", *flags])
    sys.argv = ["train_ppo_ray", *flags]
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
    return 0


def worker_setup() -> None:
    """Ray's hook: the plugin's own, then seeds and records."""
    cpu_cluster.worker_setup()
    random.seed(SEED)
    sys.meta_path.insert(0, cpu_cluster.AfterImport(PATCHES))


def _own_seeds(async_llm: object) -> None:
    """Each request its own generator, so that what is sampled does not depend on which requests share a batch."""
    original, asked = async_llm.AsyncLLM.generate, Counter()

    def generate(self: object, prompt: dict, sampling_params: object, **kwargs: object) -> object:
        tokens = tuple(prompt["prompt_token_ids"])
        asked[tokens] += 1
        sampling_params.seed = zlib.crc32(repr((tokens, asked[tokens])).encode())
        return original(self, prompt, sampling_params, **kwargs)

    async_llm.AsyncLLM.generate = generate


def _in_order(samples_generator: object) -> None:
    cls = samples_generator.SamplesGenerator
    original = cls._generate_vllm

    def generate(self: object, *args: object, **kwargs: object) -> tuple:
        experiences, *rest = original(self, *args, **kwargs)
        return sorted(experiences, key=lambda one: (one.prompts, one.sequences.tolist())), *rest

    cls._generate_vllm = generate


def _record(experience_maker: object) -> None:
    cls = experience_maker.RemoteExperienceMaker
    original, directory = cls.compute_advantages_and_returns, Path(os.environ[RECORDS])

    def compute(self: object, experiences: list) -> list:
        experiences = original(self, experiences)
        directory.mkdir(parents=True, exist_ok=True)
        step = len(list(directory.glob("*.pt"))) + 1
        kept = [{name: getattr(one, name) for name in FIELDS} | {"info": dict(one.info)} for one in experiences]
        importlib.import_module("torch").save(kept, directory / f"{step:03d}.pt")
        return experiences

    cls.compute_advantages_and_returns = compute


def _flash_on_cpu(modeling_utils: object) -> None:
    """``flash_attention_2``, which packing needs, by the stand-in for its kernels."""
    from cpu_flash import cpu_flash, flash_utils

    KEPT.enter_context(cpu_flash())
    modeling_utils.lazy_import_flash_attention = flash_utils.lazy_import_flash_attention
    modeling_utils.PreTrainedModel._flash_attn_can_dispatch = lambda *_args, **_kwargs: True


KEPT = contextlib.ExitStack()
PATCHES = {
    "transformers.modeling_utils": _flash_on_cpu,
    "torch": lambda torch: torch.manual_seed(SEED),
    "numpy": lambda numpy: numpy.random.seed(SEED),
    "vllm.v1.engine.async_llm": _own_seeds,
    "openrlhf.trainer.ppo_utils.samples_generator": _in_order,
    "openrlhf.trainer.ppo_utils.experience_maker": _record,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
