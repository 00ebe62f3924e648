"""``abc-rlhf bench recovery``: time, memory and operations of a forward with credit, beside the same one without.

Time: CPU seconds (on CUDA wall seconds), as the median of paired ratios: every round runs every variant.
Memory: the peak of what tensors hold during the forward above what they held before it. On the CPU it is summed from
the allocator's own events, as torch.profiler reports them: exact and free of noise, where a process's resident set
would add pages that are kept, and could not go down again between variants. On CUDA: max_memory_allocated.
Operations: those of matrix products, counted by torch; what credit adds is 2·B·H·T·D for one query against T keys.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, LlamaConfig, LlamaModel, PreTrainedModel

from abc_plugin.attention.attach import attach
from abc_plugin.attention.recording import RowReader
from abc_plugin.errors import UserError

PLAIN, CREDIT, RERUN, EAGER = VARIANTS = ("plain", "credit", "eager re-run", "eager, all layers")
ORDERS = ((0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1))  # each variant follows each other one equally often


@dataclass(frozen=True)
class Cost:
    """What one size costs, by variant: seconds, one per round; bytes at the peak; operations of matrix products.

    A variant that does not fit into the GPU's memory is in none of them.
    """

    batch: int
    tokens: int
    seconds: dict[str, list[float]]
    peak: dict[str, int]
    operations: dict[str, int]

    def time_ratios(self, variant: str) -> tuple[float, float, float]:
        """Quartiles of the paired ratios to the plain forward: lower, median, upper."""
        ratios = [own / plain for own, plain in zip(self.seconds[variant], self.seconds[PLAIN], strict=True)]
        return tuple(statistics.quantiles(ratios, n=4)) if len(ratios) > 1 else (ratios[0],) * 3

    def memory_ratio(self, variant: str) -> float:
        """Peak above the model, over that of the plain forward."""
        return self.peak[variant] / self.peak[PLAIN]


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, draw if asked; 0. UserError on sizes below 1 and on a model that does not load."""
    if min(*args.tokens, *args.batch, args.repeats) < 1:
        raise UserError("--tokens, --batch and --repeats must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load(args.model, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device).eval()
    with closing(attach(model)) as recovery:
        about = recovery.describe()
    costs = [measure(model, batch, tokens, args.repeats) for batch in args.batch for tokens in args.tokens]
    console = Console()
    console.print(_table(costs, "wall" if device.type == "cuda" else "CPU", device))
    for line in (
        f"credit: {about}; eager, all layers: output_attentions=True",
        f"time: median of {args.repeats} paired rounds, with quartiles; memory: peak of tensors above the model",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    if args.png:
        from abc_plugin.tools.bench.plot import draw

        draw(costs, args.png)
        console.print(f"wrote {args.png}", highlight=False, soft_wrap=True)
    return 0


def _table(costs: list[Cost], clock: str, device: torch.device) -> Table:
    table = Table(
        title=f"A forward of batch × tokens on {device}: {clock} time, peak memory, operations added", box=SIMPLE
    )
    for heading in ("size", "forward", "time", "memory", "+ MFLOP"):
        table.add_column(heading, justify="left" if heading == "forward" else "right", no_wrap=True)
    for cost in costs:
        plain = (f"{1e3 * statistics.median(cost.seconds[PLAIN]):.1f} ms", f"{cost.peak[PLAIN] / 2**20:.1f} MB")
        table.add_row(f"{cost.batch} × {cost.tokens}", PLAIN, *plain, "")
        for variant in VARIANTS[1:]:
            if variant not in cost.peak:
                table.add_row("", variant, "out of memory", "", "")
                continue
            low, middle, high = cost.time_ratios(variant)
            ratios = (f"× {middle:.3f} [{low:.3f}, {high:.3f}]", f"× {cost.memory_ratio(variant):.3f}")
            table.add_row("", variant, *ratios, _added(cost) if variant == CREDIT else "")
        table.add_section()
    return table


def _added(cost: Cost) -> str:
    """Of credit only: torch counts none of the operations of sdpa's CPU kernel, which the eager variants replace."""
    return f"{(cost.operations[CREDIT] - cost.operations[PLAIN]) / 1e6:.3f}"


@torch.no_grad()
def measure(model: PreTrainedModel, batch: int, tokens: int, repeats: int) -> Cost:
    """All variants of one size, on random ids."""
    mask = torch.ones(batch, tokens, dtype=torch.long, device=model.device)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, tokens), device=model.device)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    peak, operations = {}, {}
    for variant in VARIANTS:  # also the warm-up
        try:
            with _prepared(variant, model, inputs) as forward:
                operations[variant] = _operations(forward)
                peak[variant] = peak_bytes(forward, model.device)
        except torch.OutOfMemoryError:
            operations.pop(variant, None)
    seconds: dict[str, list[float]] = {variant: [] for variant in peak}
    for repeat in range(repeats):
        for variant in (VARIANTS[place] for place in ORDERS[repeat % len(ORDERS)]):
            if variant in seconds:
                with _prepared(variant, model, inputs) as forward:
                    seconds[variant].append(seconds_of(forward, model.device))
    return Cost(batch, tokens, seconds, peak, operations)


@contextmanager
def _prepared(variant: str, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Iterator[Callable[[], object]]:
    """The forward of one variant, its model set up for it and afterwards as it was."""
    if variant == PLAIN:
        yield lambda: model(**inputs)
    elif variant == EAGER:
        implementation = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            yield lambda: model(**inputs, output_attentions=True)
        finally:
            model.set_attn_implementation(implementation)
    else:
        with closing(attach(model, recovery="auto" if variant == CREDIT else "eager-rerun")) as recovery:
            yield lambda: _recorded(recovery, model, inputs)


def _recorded(recovery: RowReader, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with recovery.record(inputs["attention_mask"]) as recording:
        model(**inputs)
    return recording.row_BS


def seconds_of(forward: Callable[[], object], device: torch.device) -> float:
    """CPU seconds, which other processes disturb less; on CUDA wall seconds between two synchronisations."""
    if device.type == "cpu":
        start = time.process_time()
        forward()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    forward()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(forward: Callable[[], object], device: torch.device) -> int:
    """Bytes that tensors hold at the most during the forward, above what they held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        forward()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or every use writes to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def _operations(forward: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def _load(path: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model at ``path`` as it was saved, or the built-in one in ``dtype``: flash kernels have no fp32."""
    if path is None:
        config = LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8)
        return LlamaModel(config).to(dtype)
    try:
        return AutoModel.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path} does not load: {str(error).splitlines()[0]}") from None
