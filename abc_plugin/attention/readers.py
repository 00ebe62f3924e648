"""What methods need of a reward model, by name: each reader records one number per token during a forward.

readers = attach_readers(model, {"attention", "prefix"})
with record(readers, attention_mask_BS) as recordings:
    reward_B = model(input_ids_BS, attention_mask_BS)
rows(recordings)                                        # {"attention": (B, S) fp32, "prefix": (B, S) fp32}
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from abc_plugin.attention.attach import attach
from abc_plugin.attention.gradient import GradientTimesInput
from abc_plugin.attention.heads import HeadSubset
from abc_plugin.attention.prefix import PrefixScores


def attach_readers(
    model: Any,
    needs: Collection[str],
    *,
    layer: str = "last_full",
    recovery: str = "auto",
    heads: Sequence[int] | None = None,
) -> dict[str, Any]:
    """One reader per need that a reward model can answer; others are left out.

    heads: of the attention only, None for all. Raises UserError where the model cannot be read so, naming it.
    """
    attention = {"layer": layer, "recovery": recovery}
    makers = {
        "attention": lambda: attach(model, **attention) if heads is None else HeadSubset(model, heads, **attention),
        "prefix": lambda: PrefixScores(model),
        "gradient": lambda: GradientTimesInput(model),
    }
    return {name: make() for name, make in makers.items() if name in needs}


@contextmanager
def record(readers: dict[str, Any], attention_mask_BS: Tensor, **groups: ProcessGroup) -> Iterator[dict[str, Any]]:
    """Record with every reader during one forward; groups: ``ring_group``, ``head_group``, as the tap's record()."""
    with ExitStack() as stack:
        recordings = {name: reader.record(attention_mask_BS, **groups) for name, reader in readers.items()}
        yield {name: stack.enter_context(recording) for name, recording in recordings.items()}


def rows(recordings: dict[str, Any]) -> dict[str, Tensor]:
    """What was recorded, fp32 (B, S), on the CPU."""
    return {name: recording.row_BS.float().cpu() for name, recording in recordings.items()}
