"""``abc-rlhf bench recovery`` and ``bench methods``: what credit costs beside the model's own forward.

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
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModel, AutoModelForSequenceClassification, LlamaConfig, PreTrainedModel

from abc_plugin.attention.attach import attach
from abc_plugin.attention.evidence_readers import attach_readers, record, rows
from abc_plugin.attention.query_positions import generating_rows
from abc_plugin.errors import UserError, first_line

Forward = Callable[[], object]
Read = tuple[dict[str, Tensor], Any]  # rows by need, and what the model returned
# Sets the model up for a forward, yields the forward, and leaves the model as it was.
Variant = Callable[[PreTrainedModel, dict[str, Tensor]], AbstractContextManager[Forward]]

PLAIN, CREDIT, RERUN, EAGER = "plain", "credit", "eager re-run", "eager, all layers"


@contextmanager
def _plain(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Iterator[Forward]:
    yield lambda: model(**inputs)


@contextmanager
def _eager(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Iterator[Forward]:
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield lambda: model(**inputs, output_attentions=True)
    finally:
        model.set_attn_implementation(implementation)


@contextmanager
def _evidence(
    need: str, model: PreTrainedModel, inputs: dict[str, Tensor], recovery: str = "auto"
) -> Iterator[Forward]:
    """What a method reads of the reward model."""
    with reading(model, {need}, recovery=recovery) as forward:
        yield lambda: forward(**inputs)


@contextmanager
def _policy_rows(which: str, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Iterator[Forward]:
    """What the policy attended to while it generated; the second half of the text is its response."""
    batch, tokens = inputs["input_ids"].shape
    acts_BA = torch.arange(tokens - 1, device=model.device).expand(batch, -1) >= tokens // 2

    def forward() -> Tensor:
        with reader.record(inputs["attention_mask"], queries_BS=generating_rows(which, acts_BA)) as recording:
            model(**inputs)
        return recording.row_BS

    with closing(attach(model)) as reader:
        yield forward


@contextmanager
def reading(model: nn.Module, needs: Collection[str], **options: str) -> Iterator[Callable[..., Read]]:
    """Within the block, a forward of the model that also reads ``needs``; options: of ``attach_readers``."""
    readers = attach_readers(model, needs, **options)

    def forward(**inputs: Any) -> Read:
        with record(readers, inputs["attention_mask"]) as recordings:
            output = model(**inputs)
        return rows(recordings), output

    try:
        yield forward
    finally:
        for reader in readers.values():
            reader.close()


RECOVERY: dict[str, Variant] = {
    PLAIN: _plain,
    CREDIT: partial(_evidence, "attention"),
    RERUN: partial(_evidence, "attention", recovery="eager-rerun"),
    EAGER: _eager,
}
METHODS: dict[str, Variant] = {
    PLAIN: _plain,
    "abc": partial(_evidence, "attention"),
    "abc_signed": partial(_evidence, "contribution"),
    "prefix": partial(_evidence, "prefix"),
    "grad_input": partial(_evidence, "gradient"),
    "abc_d": partial(_policy_rows, "policy"),
    "abc_d2": partial(_policy_rows, "policy_last"),
}
RANDOM = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
RANDOM |= {"num_labels": 1, "pad_token_id": 0}
# Torch counts none of sdpa's CPU kernel, which the eager variants replace.
COUNTED = (PLAIN, CREDIT, "abc")


@dataclass(frozen=True)
class Cost:
    """What one size costs, by variant: seconds, one per round; bytes at the peak; operations of those in COUNTED.

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
    recovery = args.measurement == "recovery"
    if min(*args.tokens, *args.batch, args.repeats) < 1:
        raise UserError("--tokens, --batch and --repeats must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Flash kernels have no fp32, many CPUs no fast bf16.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    auto = AutoModel if recovery else AutoModelForSequenceClassification
    if args.model is None:
        model = auto.from_config(LlamaConfig(**RANDOM), dtype=dtype)
    else:
        model = load(auto, args.model, dtype=dtype, num_labels=1)
    model = model.to(device).eval()
    with closing(attach(model)) as reader:
        notes = [f"credit: {reader.describe()}; eager, all layers: output_attentions=True"]
    if not recovery:
        notes = ["abc_d and abc_d2 are read of the policy's own forward, over the second half as its response"]
    variants = RECOVERY if recovery else METHODS
    sizes = [*itertools.product(args.batch, args.tokens)]
    total = len(sizes) * len(variants) * (1 + args.repeats)
    with tqdm(total=total, unit="variant", leave=False, disable=None) as bar:
        costs = [measure(model, *size, args.repeats, variants, bar.update) for size in sizes]
    console = Console()
    console.print(_table(costs, variants, device))
    notes.append(
        f"time: median of {args.repeats} paired rounds, with quartiles; memory: peak of tensors above the model"
    )
    if recovery and args.png:
        draw(costs, args.png)
        notes.append(f"wrote {args.png}")
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    return 0


def load(auto: Any, path: str, **options: Any) -> Any:
    """The model, or what else the class loads, at ``path``. Raises UserError."""
    try:
        return auto.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path} does not load: {first_line(error)}") from None


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    batch: int,
    tokens: int,
    repeats: int,
    variants: dict[str, Variant] = RECOVERY,
    advance: Callable[[], object] = lambda: None,
) -> Cost:
    """All variants of one size, on random ids; over the rounds, each follows each other one equally often.

    advance: called after each variant of the warm-up and of every round.
    """
    ids = torch.randint(1, model.config.get_text_config().vocab_size, (batch, tokens), device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    peak, operations = {}, {}
    for name, variant in variants.items():  # also the warm-up
        try:
            with variant(model, inputs) as forward:
                if name in COUNTED:
                    operations[name] = _operations(forward)
                peak[name] = peak_bytes(forward, model.device)
        except torch.OutOfMemoryError:
            operations.pop(name, None)
        advance()
    seconds: dict[str, list[float]] = {name: [] for name in peak}
    for turn in range(repeats):
        for name in in_turn([*variants], turn):
            if name in seconds:
                with variants[name](model, inputs) as forward:
                    seconds[name].append(seconds_of(forward, model.device))
            advance()
    return Cost(batch, tokens, seconds, peak, operations)


def in_turn(names: list[str], turn: int) -> list[str]:
    """A row of a balanced design (Williams 1949): each name follows each other one equally often.

    An even number of names takes as many rounds for it, an odd one twice as many, half of them backwards.
    """
    zigzag = [(step + 1) // 2 if step % 2 else -(step // 2) for step in range(len(names))]
    order = [names[(turn + offset) % len(names)] for offset in zigzag]
    return order[::-1] if turn // len(names) % 2 else order


def seconds_of(forward: Forward, device: torch.device) -> float:
    """CPU seconds, which other processes disturb less; on CUDA wall seconds between two synchronisations."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize = (lambda: None) if device.type == "cpu" else partial(torch.cuda.synchronize, device)
    synchronize()
    start = clock()
    forward()
    synchronize()
    return clock() - start


def peak_bytes(forward: Forward, device: torch.device) -> int:
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


def _operations(forward: Forward) -> int:
    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def _table(costs: list[Cost], variants: dict[str, Variant], device: torch.device) -> Table:
    clock = "wall" if device.type == "cuda" else "CPU"
    table = Table(
        title=f"A forward of batch × tokens on {device}: {clock} time, peak memory, operations added", box=SIMPLE
    )
    for heading in ("size", "forward", "time", "memory", "+ MFLOP"):
        table.add_column(heading, justify="left" if heading == "forward" else "right", no_wrap=True)
    for cost in costs:
        plain = (f"{1e3 * statistics.median(cost.seconds[PLAIN]):.1f} ms", f"{cost.peak[PLAIN] / 2**20:.1f} MB")
        table.add_row(f"{cost.batch} × {cost.tokens}", PLAIN, *plain, "")
        for name in [*variants][1:]:
            if name not in cost.peak:
                table.add_row("", name, "out of memory", "", "")
                continue
            low, middle, high = cost.time_ratios(name)
            added = (cost.operations.get(name, 0) - cost.operations[PLAIN]) / 1e6
            table.add_row(
                "",
                name,
                f"× {middle:.3f} [{low:.3f}, {high:.3f}]",
                f"× {cost.memory_ratio(name):.3f}",
                f"{added:.3f}" if name in COUNTED else "",
            )
        table.add_section()
    return table


def draw(costs: list[Cost], path: str) -> None:
    """Two panels over tokens: time and peak memory over the plain forward's; one line per variant and batch size."""
    try:
        from abc_plugin.report import plots
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'abc-plugin[report]'") from None
    batches, ticks = ({getattr(cost, size) for cost in costs} for size in ("batch", "tokens"))
    with plots.style():
        figure, (time_axes, memory_axes) = plots.panels(2)
        for variant, look in plots.looks([*RECOVERY][1:]).items():
            for batch, line in zip(sorted(batches), itertools.cycle(plots.LINES)):  # noqa: B905
                drawn = [cost for cost in costs if cost.batch == batch and variant in cost.peak]
                rows = sorted((c.tokens, *c.time_ratios(variant), c.memory_ratio(variant)) for c in drawn)
                tokens, low, middle, high, memory = zip(*rows, strict=True) if rows else ((),) * 5
                form = {"color": look.colour, "linestyle": line, "marker": look.marker}
                label = variant if len(batches) == 1 else f"{variant}, batch {batch}"
                time_axes.plot(tokens, middle, label=label, **form)
                plots.band(time_axes, tokens, low, high, look)
                memory_axes.plot(tokens, memory, **form)
        for axes, title in ((time_axes, "Time"), (memory_axes, "Peak memory above the model")):
            axes.set_title(f"{title}, ratio to the plain forward")
            axes.set_xlabel("tokens")
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(ticks), labels=sorted(ticks))
            axes.minorticks_off()
            axes.axhline(1.0, color=plots.LIGHT.ink, linewidth=0.8)
        memory_axes.set_yscale("log")
        memory_axes.yaxis.set_major_formatter("{x:g}")
        plots.legend(figure, columns=3)
        picture = plots.png(figure)
    try:
        Path(path).write_bytes(picture)
    except OSError as error:
        raise UserError(f"--png {path} cannot be written: {error.strerror}") from None
