"""The score head read at every token: what the score would be had the sequence ended there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from abc_plugin.attention.layers import attention_layers, model_name, unwrap
from abc_plugin.attention.values import TokenValues
from abc_plugin.errors import UserError

BIDIRECTIONAL = ("DisentangledSelfAttention",)  # of OUTSIDE: modules that do not say so themselves


class PrefixScores:
    """Reads phi[b,s] = head(hidden[b,s]) of every token from the forward that runs anyway.

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
        self._owner, self._head = _score_head(model)

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
        """As ``tap.AttentionTap.record``; the score head is whole on every process, so head_group changes nothing."""
        recording = TokenValues(attention_mask_BS, self.describe(), ring_group)

        def keep(_head: nn.Module, _args: tuple, value: Tensor) -> None:
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


def _score_head(model: Any) -> tuple[nn.Module, nn.Module]:
    """(the module that owns the scalar head, the head); of OpenRLHF's models, and of sequence classifiers."""
    for owner in unwrap(model).modules():
        head = getattr(owner, vars(owner).get("value_head_prefix", "score"), None)
        if isinstance(head, nn.Module) and getattr(head, "out_features", 1) == 1:
            return owner, head
    raise UserError(f"{model_name(model)} has no scalar score head: its score cannot be read at every token")
