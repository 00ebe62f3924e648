"""Tiny random models for the recovery tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaModel, LlamaPreTrainedModel

from abc_plugin.attention.query_positions import score_positions
from abc_plugin.tools.bench.eager_parity import LEFT, NONE, ONE, RIGHT, inputs
from abc_plugin.tools.bench.kernel_parity import Scored
from abc_plugin.tools.bench.model_families import COMMON, FAMILIES, WINDOW, tiny

__all__ = ["COMMON", "FAMILIES", "LEFT", "NONE", "ONE", "RIGHT", "WINDOW"]
__all__ += ["PackedRewardModel", "RewardModel", "inputs", "scored", "tiny", "tiny_reward_model"]


class RewardModel(LlamaPreTrainedModel):
    """Shaped like the class OpenRLHF derives: the base model under ``self.model`` and a scalar ``score`` head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        return self.score(hidden).squeeze(-1).gather(1, score_positions(attention_mask)[:, None]).squeeze(1)


class PackedRewardModel(RewardModel):
    """Runs on the stream of the mask's tokens, as OpenRLHF does with --ds.packing_samples."""

    forward = Scored.forward
    packed = True

    @property
    def base(self) -> LlamaModel:
        return self.model


def tiny_reward_model(kind: type[RewardModel] = RewardModel, **changes: object) -> RewardModel:
    torch.manual_seed(0)
    return kind(LlamaConfig(**COMMON | changes)).eval()


def scored(family: str, **changes: object) -> Scored:
    """Any family's base model with a scalar head, read at the mask's last token as OpenRLHF reads it."""
    base = tiny(family, **changes)
    torch.manual_seed(1)
    return Scored(base).eval()
