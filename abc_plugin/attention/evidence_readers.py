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

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map_only

from abc_plugin.attention.attach import attach
from abc_plugin.attention.layers import attention_layers, mixing_layer, model_name, pretrained, score_head
from abc_plugin.attention.packed_sequences import Packing
from abc_plugin.attention.process_groups import rank_and_size, sum_over
from abc_plugin.attention.query_positions import score_positions
from abc_plugin.attention.row_reader import MIXED, is_rerun
from abc_plugin.attention.signed_contribution import ContributionReader
from abc_plugin.errors import CreditError, UserError

BIDIRECTIONAL = ("DisentangledSelfAttention",)  # of layers.OUTSIDE: modules that do not say so themselves


def attach_readers(
    model: Any,
    needs: Collection[str],
    *,
    layer: str = "last_full",
    recovery: str = "auto",
    heads: Sequence[int] | None = None,
) -> dict[str, Any]:
    """One reader per need that a reward model can answer; others are left out.

    layer: of attention and contribution.  recovery, heads: of the attention only, as ``attach``.
    Raises UserError where the model cannot be read so, naming it.
    """
    makers = {
        "attention": lambda: attach(model, layer=layer, recovery=recovery, heads=heads),
        "prefix": lambda: PrefixScores(model),
        "gradient": lambda: GradientTimesInput(model),
        "contribution": lambda: ContributionReader(model, layer),
    }
    return {name: make() for name, make in makers.items() if name in needs}


@contextmanager
def record(readers: dict[str, Any], attention_mask_BS: Tensor, **groups: ProcessGroup) -> Iterator[dict[str, Any]]:
    """Record with every reader during one forward; groups: ``ring_group``, ``head_group``, as ``RowReader.record``."""
    with ExitStack() as stack:
        recordings = {name: reader.record(attention_mask_BS, **groups) for name, reader in readers.items()}
        yield {name: stack.enter_context(recording) for name, recording in recordings.items()}


def rows(recordings: dict[str, Any]) -> dict[str, Tensor]:
    """What was recorded, fp32 (B, S), on the CPU."""
    return {name: recording.row_BS.float().cpu() for name, recording in recordings.items()}


class TokenValues:
    """One number per token, kept from one forward, at its padded position also when samples were packed."""

    def __init__(
        self, mask_BS: Tensor, reader: str, mixing: str | None, ring_group: ProcessGroup | None = None
    ) -> None:
        self._mask_BS, self._reader, self._ring_group = mask_BS.bool(), reader, ring_group
        self._mixing = mixing  # of ``layers.mixing_layer``
        self._kept: list[Tensor] = []

    def keep(self, value: Tensor) -> None:
        """Of every token that ran: of the padded batch (B, S), or of the stream (1, L) of the mask's tokens."""
        if self._mixing and value.shape != self._mask_BS.shape:
            raise CreditError(f"{self._reader}: {MIXED.format(self._mixing)}")
        self._kept.append(padded(value.detach().float(), self._mask_BS.to(value.device), self._ring_group))

    @property
    def row_BS(self) -> Tensor:
        """fp32 (B, S), 0 on padding. Raises CreditError unless one forward ran and its values are finite."""
        if len(self._kept) != 1:
            raise CreditError(f"{self._reader}: it ran {len(self._kept)} times in one record(); run one forward of it")
        if not bool(self._kept[0].isfinite().all()):
            raise CreditError(f"{self._reader}: not finite; check the model's weights and precision")
        return self._kept[0]


def padded(value: Tensor, mask_BS: Tensor, ring_group: ProcessGroup | None = None) -> Tensor:
    """Values of a padded batch (B, S) or of its stream (1, L), as OpenRLHF packs it -> (B, S), 0 where the mask is 0.

    Raises CreditError on another shape.
    """
    if value.shape == mask_BS.shape and ring_group is None:
        return value.masked_fill(~mask_BS, 0.0)
    tokens = -(-int(mask_BS.sum()) // rank_and_size(ring_group)[1])  # the host pads the stream to a multiple of a ring
    if value.shape != (1, tokens):
        raise CreditError(f"the model ran on {tuple(value.shape)} tokens; the mask says {tuple(mask_BS.shape)}")
    packing = Packing(mask_BS, score_positions(mask_BS), tokens, ring_group)
    return sum_over(value[0][packing.index_BS] * packing.here_BS, ring_group)


class PrefixScores:
    """Reads phi[b,s] = head(hidden[b,s]) of every token: what the score would be had the sequence ended there.

        prefix = PrefixScores(reward_model)
        with prefix.record(attention_mask_BS) as recording:
            reward_B = reward_model(input_ids_BS, attention_mask_BS)
        recording.row_BS                                                            # fp32, (B, S)

    In a causal model phi at a token is the score of the sequence cut off behind it; at the mask's last token it is
    the score. Units are the score's: where the host's model normalises its reward, phi is normalised likewise.
    Raises UserError for a model that looks ahead, or without a scalar head.
    """

    def __init__(self, model: Any) -> None:
        check_causal(model)
        self._name = model_name(model)
        self._owner, self._head = score_head(model)
        self._mixing = mixing_layer(model)

    def describe(self) -> str:
        """One line for the log."""
        return f"score of every prefix of {self._name}"

    @contextmanager
    def record(
        self,
        attention_mask_BS: Tensor,
        *,
        ring_group: ProcessGroup | None = None,
        head_group: ProcessGroup | None = None,
    ) -> Iterator[TokenValues]:
        """As ``RowReader.record``; the score head is whole on every process, so head_group changes nothing."""
        recording = TokenValues(attention_mask_BS, self.describe(), self._mixing, ring_group)

        def keep(_head: nn.Module, _args: tuple, value: Tensor) -> None:
            if not is_rerun():
                recording.keep(self._normalised(value.squeeze(-1)))

        hook = self._head.register_forward_hook(keep)
        try:
            yield recording
        finally:
            hook.remove()

    def _normalised(self, value: Tensor) -> Tensor:
        """As the host's reward model normalises its score (openrlhf.models.model)."""
        if getattr(self._owner, "normalize_reward", False) and not self._owner.training:
            return (value - self._owner.mean) / self._owner.std
        return value

    def close(self) -> None:
        """Nothing stays attached between recordings."""


def check_causal(model: Any) -> None:
    """UserError for a model, with or without its head, whose tokens see what follows them."""
    ahead = [
        type(layer).__name__
        for layer in attention_layers(model, outside=True).values()
        if not getattr(layer, "is_causal", True) or type(layer).__name__ in BIDIRECTIONAL
    ]
    if ahead:
        raise UserError(
            f"{model_name(model)} reads its tokens in both directions ({ahead[0]}), so that its score at a token "
            "knows what follows; use --reward_shaping abc or grad_input, or a decoder as the reward model"
        )


class GradientTimesInput:
    """Reads gradient[b,s] = sum_d embedding[b,s,d] · d score[b] / d embedding[b,s,d], in the score's units.

        gradient = GradientTimesInput(reward_model)
        with gradient.record(attention_mask_BS) as recording:
            reward_B = reward_model(input_ids_BS, attention_mask_BS)          # under no_grad, too
        recording.row_BS                                                            # fp32, (B, S), signed

    The first order of what zeroing a token's embedding would change; captum's InputXGradient on the embeddings, here
    from the forward that runs anyway and one backward. The model is frozen: its parameters need no gradient from here
    on. The score is that of the same forward.
    Raises UserError for a split model (ring or tensor parallelism), which has no one graph to go back through.
    """

    def __init__(self, model: Any) -> None:
        self._name = model_name(model)
        self._model = pretrained(model)
        self._embedding = self._model.get_input_embeddings()
        self._mixing = mixing_layer(model)
        model.requires_grad_(False)  # or autograd would keep every layer's input for the weights' gradients

    def describe(self) -> str:
        """One line for the log."""
        return f"gradient x input of the score of {self._name}"

    @contextmanager
    def record(
        self,
        attention_mask_BS: Tensor,
        *,
        ring_group: ProcessGroup | None = None,
        head_group: ProcessGroup | None = None,
    ) -> Iterator[TokenValues]:
        """As ``RowReader.record``, on one process."""
        if ring_group is not None or head_group is not None:
            raise UserError(f"gradients of {self._name} cannot be had where it is split over processes")
        recording = TokenValues(attention_mask_BS, self.describe(), self._mixing)
        embedded: list[Tensor] = []
        before: list[bool] = []  # the caller's grad mode, during a forward

        def start(*_: object) -> None:
            if is_rerun():
                return
            before.append(torch.is_grad_enabled())
            torch.set_grad_enabled(True)

        def restore() -> None:
            while before:
                torch.set_grad_enabled(before.pop())

        def watch(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
            if is_rerun():
                return None
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        def finish(_module: nn.Module, _args: tuple, output: Any) -> Any:
            if is_rerun():
                return None
            score = output if isinstance(output, Tensor) else output[0]
            gradients = torch.autograd.grad(score.sum(), embedded)
            for leaf, gradient in zip(embedded, gradients, strict=True):
                recording.keep((leaf.float() * gradient.float()).sum(-1))
            restore()
            return tree_map_only(Tensor, Tensor.detach, output)

        with ExitStack() as hooks:
            hooks.callback(restore)  # where the forward fails in between
            for handle in (
                self._model.register_forward_pre_hook(start),
                self._embedding.register_forward_hook(watch),
                self._model.register_forward_hook(finish),
            ):
                hooks.callback(handle.remove)
            yield recording

    def close(self) -> None:
        """Nothing stays attached between recordings."""
