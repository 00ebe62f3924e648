"""``abc-rlhf bench methods``: what each method's evidence costs beside one forward of the model that it is read of.

Time and memory as in ``cost``: CPU seconds (on CUDA wall seconds) in paired rounds, peak of tensors above the model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from abc_plugin.attention.attach import attach
from abc_plugin.attention.positions import generating_rows
from abc_plugin.attention.readers import attach_readers, record, rows
from abc_plugin.errors import UserError
from abc_plugin.tools.bench.cost import peak_bytes, seconds_of

PLAIN = "plain"
METHODS = {
    "attention": "abc",
    "prefix": "prefix",
    "gradient": "grad_input",
    "policy": "abc_d",
    "policy_last": "abc_d2",
}
VARIANTS = (PLAIN, *METHODS)


def run(args: argparse.Namespace) -> int:
    """Measure and print a table; 0. Raises UserError on sizes below 1 and on a model that does not load."""
    if min(*args.tokens, args.batch, args.repeats) < 1:
        raise UserError("--tokens, --batch and --repeats must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load(args.model, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device).eval()
    clock = "wall" if device.type == "cuda" else "CPU"
    table = Table(title=f"A forward of {args.batch} × tokens on {device}: {clock} time, peak memory", box=SIMPLE)
    for heading in ("tokens", "method", "time", "memory"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for tokens in args.tokens:
        for row in _rows(tokens, *measure(model, args.batch, tokens, args.repeats)):
            table.add_row(*row)
        table.add_section()
    console = Console()
    console.print(table)
    console.print(
        f"{type(model).__name__}; median of {args.repeats} paired rounds with quartiles; abc_d and abc_d2 are read of "
        "the policy's own forward, over the second half as its response",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def measure(
    model: torch.nn.Module, batch: int, tokens: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """(seconds by variant, one per round; peak bytes by variant), on random ids."""
    ids = torch.randint(1, model.config.vocab_size, (batch, tokens), device=model.device)
    peak, seconds = {}, {variant: [] for variant in VARIANTS}
    for variant in VARIANTS:  # also the warm-up
        with _prepared(variant, model, ids) as forward:
            peak[variant] = peak_bytes(forward, model.device)
    for repeat in tqdm(range(repeats), desc=f"{tokens} tokens", unit="round"):
        for place in range(len(VARIANTS)):
            variant = VARIANTS[(place + repeat) % len(VARIANTS)]
            with _prepared(variant, model, ids) as forward:
                seconds[variant].append(seconds_of(forward, model.device))
    return seconds, peak


@contextmanager
def _prepared(variant: str, model: torch.nn.Module, ids: torch.Tensor) -> Iterator[Callable[[], object]]:
    """The forward of one variant, and what it reads; under no_grad, as OpenRLHF runs it."""
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if variant.startswith("policy"):
        acts_BA = torch.arange(ids.shape[1] - 1, device=ids.device).expand(len(ids), -1) >= ids.shape[1] // 2
        queries_BS = generating_rows(variant, acts_BA)
        with closing(attach(model)) as reader:

            @torch.no_grad()
            def forward() -> object:
                with reader.record(mask, queries_BS=queries_BS) as recording:
                    model(**inputs)
                return recording.row_BS

            yield forward
        return
    readers = attach_readers(model, {variant})

    @torch.no_grad()
    def forward() -> object:
        with record(readers, mask) as recordings:
            model(**inputs)
        return rows(recordings)

    yield forward
    for reader in readers.values():
        reader.close()


def _rows(tokens: int, seconds: dict[str, list[float]], peak: dict[str, int]) -> Iterator[tuple[str, ...]]:
    plain = statistics.median(seconds[PLAIN])
    yield str(tokens), "forward alone", f"{1e3 * plain:.0f} ms", f"{peak[PLAIN] / 2**20:.1f} MB"
    for variant, name in METHODS.items():
        ratios = [own / base for own, base in zip(seconds[variant], seconds[PLAIN], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        yield "", name, f"× {middle:.3f} [{low:.3f}, {high:.3f}]", f"× {peak[variant] / peak[PLAIN]:.2f}"


def _load(path: str | None, dtype: torch.dtype) -> torch.nn.Module:
    """The reward model at ``path``, or a random one."""
    if path is None:
        sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
        return LlamaForSequenceClassification(LlamaConfig(num_labels=1, pad_token_id=0, **sizes)).to(dtype)
    try:
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path} does not load: {str(error).splitlines()[0]}") from None
