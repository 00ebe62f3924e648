"""Gradient x input of the score on each token's embedding, from the forward that runs anyway and one backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map_only

from abc_plugin.attention.layers import model_name, pretrained
from abc_plugin.attention.values import TokenValues
from abc_plugin.errors import UserError


class GradientTimesInput:
    """Reads gradient[b,s] = sum_d embedding[b,s,d] · d score[b] / d embedding[b,s,d], in the score's units.

        gradient = GradientTimesInput(reward_model)
        with gradient.record(attention_mask_BS) as recording:
            reward_B = reward_model(input_ids_BS, attention_mask_BS)          # under no_grad, too
        recording.row_BS                                                            # fp32, (B, S), signed

    The first order of what zeroing a token's embedding would change; captum's InputXGradient on the embeddings. The
    model is frozen: its parameters need no gradient from here on. The score is that of the same forward.
    Raises UserError for a split model (ring or tensor parallelism), which has no one graph to go back through.
    """

    def __init__(self, model: Any) -> None:
        self._name = model_name(model)
        self._model = pretrained(model)
        self._embedding = self._model.get_input_embeddings()
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
        """As ``tap.AttentionTap.record``, on one process."""
        if ring_group is not None or head_group is not None:
            raise UserError(f"gradients of {self._name} cannot be had where it is split over processes")
        recording = TokenValues(attention_mask_BS, self.describe())
        embedded: list[Tensor] = []
        before: list[bool] = []  # the caller's grad mode, during a forward

        def start(*_: object) -> None:
            before.append(torch.is_grad_enabled())
            torch.set_grad_enabled(True)

        def restore() -> None:
            while before:
                torch.set_grad_enabled(before.pop())

        def watch(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        def finish(_module: nn.Module, _args: tuple, output: Any) -> Any:
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
