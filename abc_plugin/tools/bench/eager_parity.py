"""``abc-rlhf bench parity``: is the row the one that eager attention computes? Every family, layer and padding."""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from abc_plugin.attention.attach import attach
from abc_plugin.attention.full_matrix import rerun_eager_rows
from abc_plugin.errors import CreditError, UserError
from abc_plugin.tools.bench.kernels import cpu_flash, use_implementation
from abc_plugin.tools.bench.model_families import ALL, COMMON, FAMILIES, tiny

FP32, BF16 = 1e-6, 2e-2  # largest difference; largest L1 distance of the renormalised rows

# Padded on the right, on the left, not at all, and cut to a single real token.
RIGHT = torch.tensor([[1] * 9 + [0] * 3, [1] * 5 + [0] * 7, [1] * 12])
LEFT = RIGHT.flip(1)
NONE = torch.ones(3, 12, dtype=torch.long)
ONE = torch.tensor([[0] * 11 + [1], [1] + [0] * 11, [0] * 5 + [1] + [0] * 6])
PADDED = torch.cat([RIGHT, LEFT, ONE])

# In bf16 two kernels' rounding makes the layers' inputs differ, whatever reads the row. Large weights blow that up,
# and a router turns it into another expert, so weights are smaller and every token goes to all experts.
TAME = {"initializer_range": 0.1, "num_experts_per_tok": 4}
HEADINGS = ("family", "special", "read by", *ALL, "eager re-run", "bf16")
READ_BY = {"AttentionTap": "tap", "OwnWeights": "own weights"}


@dataclass
class Parity:
    """One family's errors against eager attention by implementation, and its refusals."""

    family: str
    read_by: str = ""
    fp32: dict[str, float] = field(default_factory=dict)  # largest difference, all layers and paddings
    bf16: dict[str, float] = field(default_factory=dict)  # largest L1 distance, all layers
    rerun: dict[str, float] = field(default_factory=dict)  # fp32, of the eager re-run
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """What is not as the family's entry says, in words."""
        entry = FAMILIES[self.family]
        faults = [f"{name} was to be exact, but: {self.refused[name]}" for name in entry.exact if name in self.refused]
        faults += [f"{name} was to be refused, and is not" for name in entry.refused if name not in self.refused]
        measured = (("fp32", self.fp32, FP32), ("eager re-run", self.rerun, FP32), ("bf16", self.bf16, BF16))
        for kind, errors, limit in measured:
            wrong = {name: error for name, error in errors.items() if not error <= limit}
            faults += [f"{kind} under {name} is off by {error:.1e}" for name, error in wrong.items()]
        return faults


def inputs(mask_BS: Tensor) -> dict[str, Tensor]:
    """Random ids, and the position_ids that OpenRLHF derives from the mask."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, COMMON["vocab_size"], mask_BS.shape, generator=generator).to(mask_BS.device) * mask_BS
    positions = (mask_BS.cumsum(-1) - 1).masked_fill(mask_BS == 0, 1)
    return {"input_ids": ids, "position_ids": positions}


def accepted_inputs(model: nn.Module, mask_BS: Tensor) -> dict[str, Tensor]:
    """Those of the inputs that the model takes; OPT counts positions by the mask itself."""
    takes = set(inspect.signature(type(model).forward).parameters)
    takes -= {"position_ids"} if type(model).__name__ == "OPTModel" else set()
    return {name: value for name, value in inputs(mask_BS).items() if name in takes}


def check(family: str, device: str = "cpu") -> Parity:
    """Compare one family's rows to eager ones, and note what is refused and why."""
    entry, parity = FAMILIES[family], Parity(family)
    model, half = tiny(family).to(device), tiny(family, **TAME).bfloat16().to(device)
    padded, none, right = (mask_BS.to(device) for mask_BS in (PADDED, NONE, RIGHT))
    masks: list[tuple[Tensor, dict[int, Tensor]]] = []
    for name in entry.exact + entry.refused:
        use_implementation(model, name)
        try:
            masks = masks or [(mask_BS, eager_rows(model, mask_BS)) for mask_BS in (padded, none)]
            parity.fp32[name], parity.read_by = largest(model, "auto", difference, masks)
            parity.rerun[name], _ = largest(model, "eager-rerun", difference, masks)
        except (UserError, CreditError) as refusal:
            parity.refused[name] = str(refusal)
    expected = [(right, eager_rows(half, right))] if parity.fp32 else []
    for name in entry.exact + entry.only_bf16:
        if name not in parity.refused:
            parity.bf16[name], _ = largest(use_implementation(half, name), "auto", distance, expected)
    return parity


def eager_rows(model: nn.Module, mask_BS: Tensor) -> dict[int, Tensor]:
    """By the definition, every layer's."""
    return rerun_eager_rows(model, mask_BS, **accepted_inputs(model, mask_BS))


def largest(
    model: nn.Module,
    recovery: str,
    error: Callable[[Tensor, Tensor], float],
    masks: list[tuple[Tensor, dict[int, Tensor]]],
) -> tuple[float, str]:
    """(largest error over masks with their layers' expected rows, name of the class that recovered the rows)."""
    worst, read_by = 0.0, ""
    for mask_BS, expected in masks:
        with cpu_flash() as kernels, torch.no_grad(), ExitStack() as blocks:
            readers = [blocks.enter_context(closing(attach(model, str(layer), recovery))) for layer in expected]
            recordings = [blocks.enter_context(reader.record(mask_BS)) for reader in readers]
            model(attention_mask=mask_BS, **accepted_inputs(model, mask_BS))
        if bool(kernels) != ("flash" in model.config._attn_implementation):
            raise AssertionError(f"{type(model).__name__} did not run the attention that its configuration names")
        pairs = zip(recordings, expected.values(), strict=True)
        worst = max(worst, *(error(recording.row_BS, row_BS) for recording, row_BS in pairs))
        read_by = type(readers[0]).__name__
    return worst, read_by


def difference(row_BS: Tensor, expected_BS: Tensor) -> float:
    """Largest absolute difference."""
    return (row_BS - expected_BS).abs().max().item()


def distance(row_BS: Tensor, expected_BS: Tensor) -> float:
    """Largest L1 distance of the rows, each renormalised."""
    rows = (x_BS / x_BS.sum(1, keepdim=True) for x_BS in (row_BS, expected_BS))
    return torch.sub(*rows).abs().sum(1).max().item()


def run(args: argparse.Namespace) -> int:
    """Print the table as markdown while it is made, then the refusals; 0 if every family is as its entry says."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print("\n".join(HEAD))
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of models in which every layer has a window
        for family in FAMILIES:
            results.append(check(family))
            print(line(results[-1]), flush=True)
    print("\n".join(refusals(results)))
    faults = [f"{result.family}: {fault}" for result in results for fault in result.faults]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


HEAD = ("| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|")


def line(result: Parity) -> str:
    """The family's row of the table; errors are the largest, a dash stands for what does not exist."""
    cells = [result.family, FAMILIES[result.family].what, READ_BY.get(result.read_by, "refused")]
    cells += ["refused" if name in result.refused else _number(result.fp32.get(name)) for name in ALL]
    cells += [_number(max(errors.values(), default=None)) for errors in (result.rerun, result.bf16)]
    return "| " + " | ".join(cells) + " |"


def refusals(results: list[Parity]) -> list[str]:
    """The lines below the table."""
    refused = [result for result in results if result.refused]
    return [
        "\nRefused:\n",
        *(f"- {each.family} under {', '.join(each.refused)}: {next(iter(each.refused.values()))}" for each in refused),
        f"\n{sum(bool(result.fp32) for result in results)} of {len(results)} families are read",
    ]


def _number(error: float | None) -> str:
    return "–" if error is None else f"{error:.1e}"
