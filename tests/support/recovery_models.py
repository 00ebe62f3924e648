"""Tiny random models for the recovery tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaModel, LlamaPreTrainedModel

from abc_plugin.attention.positions import score_positions
from abc_plugin.tools.bench.families import COMMON, FAMILIES, WINDOW, tiny
from abc_plugin.tools.bench.parity import LEFT, NONE, ONE, RIGHT, accepted_inputs, inputs

__all__ = ["COMMON", "FAMILIES", "LEFT", "NONE", "ONE", "RIGHT", "WINDOW"]
__all__ += ["PackedRewardModel", "RewardModel", "Scored", "inputs", "tiny", "tiny_reward_model"]


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

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        stream = ids[mask == 1][None]
        position = (mask.cumsum(1) - 1)[mask == 1][None]
        hidden = self.model(stream, position_ids=position, use_cache=False).last_hidden_state
        values = torch.zeros(mask.shape).masked_scatter(mask == 1, self.score(hidden).squeeze(-1))
        return values.gather(1, score_positions(mask)[:, None]).squeeze(1)


def tiny_reward_model(kind: type[RewardModel] = RewardModel, **changes: object) -> RewardModel:
    torch.manual_seed(0)
    return kind(LlamaConfig(**COMMON | changes)).eval()


class Scored(nn.Module):
    """Any family's base model with a scalar head, read at the mask's last token as OpenRLHF reads it."""

    def __init__(self, family: str, **changes: object) -> None:
        super().__init__()
        self.base = tiny(family, **changes)
        self.config = self.base.config
        torch.manual_seed(1)
        self.score = nn.Linear(32, 1, bias=False)
        self.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        feed = accepted_inputs(self.base, mask) | {"input_ids": ids}
        values = self.score(self.base(attention_mask=mask, use_cache=False, **feed)[0]).squeeze(-1)
        return values.gather(1, score_positions(mask)[:, None]).squeeze(1)
