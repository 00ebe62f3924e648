"""The reward model's worker: score and attention row from one forward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from openrlhf.trainer.ray.launcher import RewardModelActor
from torch import Tensor
from torch.distributed import ProcessGroup

from abc_plugin.credit import methods
from abc_plugin.host import normalisation
from abc_plugin.host.actors import undecorated
from abc_plugin.host.options import option
from abc_plugin.recovery.attach import attach


class ScoredBatch(NamedTuple):
    """What travels from the reward model to the experience maker, on the CPU."""

    reward_B: Tensor
    attention_BS: Tensor  # attention of the token the score is read at, over all positions, fp32


class CreditRewardModel(undecorated(RewardModelActor)):
    """OpenRLHF's reward-model worker; with a method that needs attention its forward returns a ScoredBatch."""

    attention: Any = None  # what attach gives

    def init_model_from_pretrained(self, strategy: object, pretrain: str) -> None:
        """Load the model as the host does, attach the tap and fire it once, before any rollout is made."""
        super().init_model_from_pretrained(strategy, pretrain)
        if normalisation.normalises(strategy.args):
            strategy.print(f"abc_plugin: reward normalisation restored: {normalisation.restore(self.model)}")
        shaping = strategy.args.shaping
        if shaping.dense and methods.load(shaping.method).needs_attention:
            self.attention = attach(self.model, layer=shaping.layer, recovery=shaping.recovery)
            strategy.print(f"abc_plugin: {self.attention.describe()}")
            self.forward(torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.long))

    def forward(self, sequences: Tensor, attention_mask: Tensor, **kwargs: object) -> Tensor | ScoredBatch:
        """Host signature. The row is that of ``attention_mask``'s last position, where the host reads the score."""
        if self.attention is None:
            return super().forward(sequences, attention_mask, **kwargs)
        with self.attention.record(attention_mask.to(torch.cuda.current_device()), **self._groups()) as recording:
            reward_B = super().forward(sequences, attention_mask, **kwargs)
        return ScoredBatch(reward_B, recording.row_BS.to("cpu"))

    def _groups(self) -> dict[str, ProcessGroup]:
        """The process groups over which this model's sequences and heads are split, where they are."""
        args, groups = self.strategy.args, {}
        if option(args, "ds.ring_attn_size") > 1:
            groups["ring_group"] = self.strategy.ring_attn_group
        if option(args, "ds.tensor_parallel_size") > 1:
            groups["head_group"] = self.strategy.ds_device_mesh["tp"].get_group()
        return groups
