"""The rows of ``abc-rlhf bench gpu``: what is measured, and what is claimed of it."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from abc_plugin.errors import CreditError, UserError
from abc_plugin.tools.bench import eager_parity, forward_cost, gpu_commands, kernel_parity
from abc_plugin.tools.bench.forward_cost import CREDIT, PLAIN
from abc_plugin.tools.bench.kernels import PACKAGES, SDPA, SDPA_FLASH, VARLEN

Found = tuple[dict[str, Any], list[str]]  # figures by name; what is not as claimed
HOLDS, FAILS, ERROR, NOT_RUN = "holds", "FAILS", "ERROR", "not run"

MEMORY, TIME, STEP = 1.02, 1.05, 1.03  # at most, with credit: of a forward, its time, and a step's; without is 1
DIALOGUE_GIB = 24.0  # of the card
FAMILIES = ["llama", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gpt_oss"]
FAMILIES += ["deepseek_v3", "gpt2", "modernbert", "falcon"]


def _shape(hidden: int, inner: int, layers: int, heads: int, groups: int, words: int = 32000) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shape = dict(zip(names, (hidden, inner, layers, heads, groups), strict=True))
    return shape | {"head_dim": hidden // heads, "vocab_size": words}


@dataclass(frozen=True)
class Sizes:
    """Shapes of models by part.  tokens: of short and long forwards.  text: tokens of prompts, and of responses."""

    tokens: tuple[int, int]
    text: int
    completions: int
    repeats: int
    cost: dict[str, dict[str, Any]]  # by name; the first also of exact rows
    runs: dict[str, dict[str, dict[str, Any]]]


TINY, ONE_B = _shape(64, 256, 2, 4, 2, 64) | {"initializer_range": 0.1}, _shape(2048, 8192, 16, 32, 8)
DIALOGUE = {"policy": _shape(4096, 11008, 32, 32, 32), "reward_model": _shape(3200, 8640, 26, 32, 32)}  # OpenLLaMA's
SIZES = {
    "cuda": Sizes(
        tokens=(2048, 8192),
        text=256,
        completions=16,
        repeats=8,
        cost={"1B": ONE_B, "8B": _shape(4096, 14336, 32, 32, 8, 128256)},
        runs={"local": dict.fromkeys(gpu_commands.HEADED, _shape(512, 1408, 8, 8, 4)), "dialogue": DIALOGUE},
    ),
    "cpu": Sizes(
        tokens=(256, 512),
        text=4,
        completions=4,
        repeats=1,
        cost={"tiny": TINY},
        runs={part: dict.fromkeys(gpu_commands.HEADED, TINY) for part in ("local", "dialogue")},
    ),
}
QLORA = ["--ds.load_in_4bit", "--ds.lora.rank", "16", "--local.share_base", "--actor.gradient_checkpointing_enable"]


@dataclass(frozen=True)
class Row:
    """measure: (device, directory that the rows share) -> what was found.  seconds: the time limit."""

    part: str
    name: str
    measure: Callable[[str, Path], Found]
    seconds: int


def all_rows(device: str) -> list[Row]:
    """In the order of their worth: a short lease gives the first."""
    short, long = SIZES[device].tokens
    kernels = (SDPA, VARLEN, *PACKAGES) if device == "cuda" else (SDPA, VARLEN)  # one stand-in for all the others
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [(SDPA_FLASH, "llama", bf16, tokens, "full") for tokens in (short, long)]
    cases += [(kernel, "llama", bf16, short, layout) for kernel, layout in product(kernels, ("padded", "packed"))]
    cases += [(SDPA, "llama", fp32, short, layout) for layout in ("full", "padded", "packed")]
    cases += [(kernel, "llama", bf16, long, "padded") for kernel in kernels]
    cases += [(kernel, family, bf16, short, "padded") for family, kernel in product(kernel_parity.SPECIAL, kernels)]
    return [
        *(Row("exact", _words(*case), partial(_kernel, *case), 60) for case in cases),
        *(Row("exact", f"{family}, every layer and padding", partial(_family, family), 60) for family in FAMILIES),
        *(
            Row("cost", f"{name}, {tokens} tokens", partial(_cost, name, tokens), 120)
            for name, tokens in product(SIZES[device].cost, (short, long))
        ),
        *(
            Row(part, f"three steps, {what}, {method}", partial(_train, part, method), seconds)
            for part, what, seconds in (("local", "small", 120), ("dialogue", "7B by QLoRA, judge 3B", 300))
            for method in ("none", "abc")
        ),
        Row("serve", f"judge 3B, texts of {2 * SIZES[device].text} tokens", _serve, 240),
    ]


def _words(kernel: str, family: str, dtype: torch.dtype, tokens: int, layout: str) -> str:
    return f"{kernel}: {family}, {str(dtype).removeprefix('torch.')}, 2 × {tokens} tokens, {layout}"


@lru_cache(1)
def _scored(family: str, dtype: torch.dtype, device: str) -> kernel_parity.Scored:
    return kernel_parity.reward_model(family, dtype, device, [*SIZES[device].cost.values()][0])


def _kernel(kernel: str, family: str, dtype: torch.dtype, tokens: int, layout: str, device: str, _: Path) -> Found:
    whole, needs = tokens == SIZES[device].tokens[0], kernel_parity.SPECIAL.get(family, (None,))[0]
    return kernel_parity.compare(kernel, _scored(family, dtype, device), tokens, layout, whole, needs)


def _family(family: str, device: str, _: Path) -> Found:
    result = eager_parity.check(family, device)
    errors = {"fp32": result.fp32, "bf16": result.bf16}
    return {name: max(found.values(), default=float("nan")) for name, found in errors.items()}, result.faults


def _cost(name: str, tokens: int, device: str, _: Path) -> Found:
    shape = SIZES[device].cost[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = gpu_commands.random_model("reward_model", shape, dtype).eval()
    variants = forward_cost.RECOVERY | {"abc_signed": forward_cost.METHODS["abc_signed"]}
    result = forward_cost.measure(model, 1, tokens, SIZES[device].repeats, variants)
    seconds, peak, operations = (getattr(result, what) for what in ("seconds", "peak", "operations"))
    figures: dict[str, Any] = {"plain": f"{1e3 * median(seconds[PLAIN]):.1f} ms, {peak[PLAIN] / 2**20:.0f} MiB"}
    figures |= {
        variant: f"× {result.time_ratios(variant)[1]:.3f} time, × {result.memory_ratio(variant):.3f} memory"
        if variant in peak
        else "out of memory"
        for variant in [*variants][1:]
    }
    claims = {
        f"more than × {MEMORY} memory": result.memory_ratio(CREDIT) <= MEMORY,
        f"more than × {TIME} time": device == "cpu" or result.time_ratios(CREDIT)[1] <= TIME,
        "other operations than 2·H·T·D": operations[CREDIT] - operations[PLAIN] == 2 * shape["hidden_size"] * tokens,
    }
    return figures, [f"credit takes {what}" for what, holds in claims.items() if not holds]


def _models(part: str, device: str, out: Path) -> dict[str, Path]:
    shapes = SIZES[device].runs[part]
    return {kind: gpu_commands.random_checkpoint(out / part / kind, kind, shapes[kind], device) for kind in shapes}


def _train(part: str, method: str, device: str, out: Path) -> Found:
    models, sizes = _models(part, device, out), SIZES[device]
    flags = [*QLORA, "--critic.model_name_or_path", str(models["policy"])] if part == "dialogue" else []
    figures = gpu_commands.train(out / part / method, models, method, sizes.text, sizes.completions, flags)
    claims = {f"more than {DIALOGUE_GIB} GiB": figures.get("peak GiB", 0) <= DIALOGUE_GIB}
    before = gpu_commands.figures_of(out / part / "none")
    if part == "dialogue" and device == "cuda" and method != "none" and before:
        claims[f"more than × {TIME} of the scoring"] = figures["score s"] <= TIME * before["score s"]
        claims[f"more than × {STEP} of a step"] = figures["step s"] <= STEP * before["step s"]
    return figures, [f"it takes {what}" for what, holds in claims.items() if not holds]


def _serve(device: str, out: Path) -> Found:
    words = ["--model", str(_models("dialogue", device, out)["reward_model"]), "--tokens", str(2 * SIZES[device].text)]
    return {"found": gpu_commands.command("bench", "server", *words, "--clients", "32", "--batch", "16")}, []


def measured(row: Row, device: str, out: Path) -> dict[str, Any]:
    """status, figures, and why, of one row; what cannot run here says why."""
    try:
        figures, broken = row.measure(device, out)
        return {"status": FAILS if broken else HOLDS, "figures": figures, "why": "; ".join(broken)}
    except UserError as error:
        status, why = NOT_RUN, str(error)
    except torch.OutOfMemoryError:
        status, why = NOT_RUN, "out of memory"
    except CreditError as error:
        status, why = FAILS, str(error)
    except Exception as error:  # one row's, whatever it is
        traceback.print_exc()
        status, why = ERROR, f"{type(error).__name__}: {error}"
    return {"status": status, "figures": {}, "why": why.splitlines()[0]}


def answer(pipe: Connection, device: str, out: Path) -> None:
    """The process that measures: it sends what ``measured`` says of each row that it gets, and prints to gpu.log."""
    os.setsid()  # so that the commands that it starts end with it
    log = os.open(out.with_name("gpu.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(measured(pipe.recv(), device, out))
