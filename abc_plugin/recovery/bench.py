"""``abc-rlhf bench``: what recovering the row costs, as ratios to the same forward without it."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import closing

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, LlamaConfig, LlamaModel, PreTrainedModel

from abc_plugin.errors import UserError
from abc_plugin.recovery.tap import AttentionTap

VARIANTS = ("plain", "tap", "eager")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="sequence lengths")
    parser.add_argument("--batch", type=int, default=1, help="sequences per forward")
    parser.add_argument("--repeats", type=int, default=12, help="rounds; each runs every variant once")
    parser.add_argument("--model", help="transformers decoder to load; default: a random llama, 8 layers, width 512")


def run(args: argparse.Namespace) -> int:
    """Time, print a table, return 0. Raises UserError on sizes below 1 and on a model that does not load."""
    if min(*args.tokens, args.batch, args.repeats) < 1:
        raise UserError("--tokens, --batch and --repeats must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load(args.model).to(device).eval()
    clock = "wall" if device.type == "cuda" else "CPU"
    with closing(AttentionTap(model)) as tap:
        about = tap.describe()
    table = Table(title=f"{clock} time per forward, batch {args.batch}, {device}")
    for heading in ("tokens", "plain, ms", "tap / plain", "eager, all layers / plain"):
        table.add_column(heading, justify="right")
    for tokens in args.tokens:
        seconds = measure(model, args.batch, tokens, args.repeats)
        plain_ms = 1e3 * statistics.median(seconds["plain"])
        table.add_row(str(tokens), f"{plain_ms:.1f}", *(_ratio(seconds, variant) for variant in VARIANTS[1:]))
    console = Console()
    console.print(table)
    console.print(f"tap: {about}; eager: output_attentions=True", highlight=False)
    console.print(f"medians of {args.repeats} rounds; ratios are paired, with quartiles in brackets", highlight=False)
    return 0


@torch.no_grad()
def measure(model: PreTrainedModel, batch: int, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per forward, one per round, of each variant; every round runs all of them, so that they pair up."""
    mask = torch.ones(batch, tokens, dtype=torch.long, device=model.device)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, tokens), device=model.device)
    for variant in VARIANTS:
        _seconds(variant, model, ids, mask)  # warm-up
    orders = list(itertools.permutations(VARIANTS))  # what runs before a forward moves its time: balance it out
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for repeat in range(repeats):
        for variant in orders[repeat % len(orders)]:
            seconds[variant].append(_seconds(variant, model, ids, mask))
    return seconds


def _seconds(variant: str, model: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor) -> float:
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, "use_cache": False}
    if variant == "plain":
        return _timed(lambda: model(**inputs), ids_BS.device)
    if variant == "tap":
        with closing(AttentionTap(model)) as tap:
            return _timed(lambda: _tapped(tap, model, inputs), ids_BS.device)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return _timed(lambda: model(**inputs, output_attentions=True), ids_BS.device)
    finally:
        model.set_attn_implementation(implementation)


def _tapped(tap: AttentionTap, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with tap.record(inputs["attention_mask"]) as recording:
        model(**inputs)
    return recording.row_BS


def _timed(forward: Callable[[], object], device: torch.device) -> float:
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


def _ratio(seconds: dict[str, list[float]], variant: str) -> str:
    ratios = [own / plain for own, plain in zip(seconds[variant], seconds["plain"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(ratios):.4f} [{low:.4f}, {high:.4f}]"


def _load(path: str | None) -> PreTrainedModel:
    if path is None:
        config = LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8)
        return LlamaModel(config)
    try:
        return AutoModel.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path} does not load: {str(error).splitlines()[0]}") from None
