"""Tiny random models for the recovery tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaModel, LlamaPreTrainedModel

from abc_plugin.attention.positions import score_positions
from abc_plugin.tools.bench.families import COMMON, FAMILIES, WINDOW, tiny
from abc_plugin.tools.bench.parity import LEFT, NONE, ONE, PADDINGS, RIGHT, inputs

__all__ = ["COMMON", "FAMILIES", "LEFT", "NONE", "ONE", "PADDINGS", "RIGHT", "WINDOW"]
__all__ += ["RewardModel", "inputs", "tiny", "tiny_reward_model"]


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


def tiny_reward_model() -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(LlamaConfig(**COMMON)).eval()
