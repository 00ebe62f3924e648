"""The policy's worker: log-probabilities, and the attention paid while generating, from one forward."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, NamedTuple

import torch
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
from torch import Tensor
from torch.distributed import ProcessGroup

from abc_plugin.attention import attach
from abc_plugin.attention.positions import generating_rows
from abc_plugin.credit.methods import policy_need
from abc_plugin.host.options import option
from abc_plugin.host.ray_actors import undecorated


def rebinds(args: Namespace) -> list[tuple[str, str, type]]:
    """Module, name and value of the host's class that a run which needs the policy's attention replaces."""
    return [("cli.train_ppo_ray", "PolicyModelActor", CreditPolicyModel)] if policy_need(args.shaping) else []


class PolicyBatch(NamedTuple):
    """What travels from the policy to the experience maker, on the CPU."""

    action_log_probs_BA: Tensor
    evidence: dict[str, Tensor]  # the need's name -> (B, S) over all positions, fp32


class CreditPolicyModel(undecorated(PolicyModelActor)):
    """OpenRLHF's policy worker; with a method that needs the policy's attention, its forward returns a PolicyBatch.

    The attention is that of the forward over the finished sequences which the host runs for its log-probabilities:
    causal, so its rows are those of the steps of the generation, without dropout and by the weights that generated (in
    asynchronous training a step newer). Generation and training are untouched.
    """

    attention: Any = None  # what attach gives
    need: str | None = None

    def init_model_from_pretrained(self, strategy: Any, pretrain: str, *args: object, **kwargs: object) -> None:
        """Host signature. Load the model as the host does, attach the tap and fire it once, before any rollout."""
        super().init_model_from_pretrained(strategy, pretrain, *args, **kwargs)
        shaping = strategy.args.shaping
        self.need = policy_need(shaping)
        if self.need is None:
            return
        self.attention = attach(self.actor, layer=shaping.layer, recovery=shaping.recovery)
        strategy.print(f"abc_plugin: policy: {self.attention.describe()}")
        self.forward(torch.tensor([[0, 1]]), torch.ones(1, 1, dtype=torch.long), torch.ones(1, 2, dtype=torch.long))

    def forward(
        self, sequences: Tensor, action_mask: Tensor, attention_mask: Tensor, *args: object, **kwargs: object
    ) -> Tensor | PolicyBatch:
        """Host signature."""
        if self.attention is None:
            return super().forward(sequences, action_mask, attention_mask, *args, **kwargs)
        mask_BS, queries_BS = attention_mask.to(torch.cuda.current_device()), generating_rows(self.need, action_mask)
        with self.attention.record(mask_BS, queries_BS=queries_BS, **self._heads()) as recording:
            log_probs_BA = super().forward(sequences, action_mask, attention_mask, *args, **kwargs)
        return PolicyBatch(log_probs_BA, {self.need: recording.row_BS.to("cpu")})

    def _heads(self) -> dict[str, ProcessGroup]:
        """The process group over which this model's heads are split, where they are."""
        if option(self.strategy.args, "ds.tensor_parallel_size") == 1:
            return {}
        return {"head_group": self.strategy.ds_device_mesh["tp"].get_group()}
