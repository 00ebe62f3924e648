"""The reward model's worker: score and attention row from one forward."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, NamedTuple

import torch
from openrlhf.trainer.ray.launcher import RewardModelActor
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import AutoConfig

from abc_plugin.credit import methods
from abc_plugin.host import normalisation
from abc_plugin.host.actors import undecorated
from abc_plugin.host.checks import check_models
from abc_plugin.host.options import option
from abc_plugin.recovery import attach
from abc_plugin.tokenizers.check import side
from abc_plugin.tokenizers.compare import compare
from abc_plugin.tokenizers.mapping import MappedBatch, map_batch


class ScoredBatch(NamedTuple):
    """What travels from the reward model to the experience maker, on the CPU."""

    reward_B: Tensor
    attention_BS: Tensor | None  # of the token the score is read at, over all positions, fp32; None if not needed
    info: dict[str, Tensor]  # metrics (B,)


class OwnTokens:
    """Reads the policy's sequences as text in the reward model's own tokens (``--shaping.tokenizer_check map``)."""

    def __init__(self, args: Namespace, reward_model: str) -> None:
        fast = not option(args, "data.disable_fast_tokenizer")
        policy, own = (side(path, use_fast=fast) for path in (option(args, "actor.model_name_or_path"), reward_model))
        self.needed = bool(compare(policy, own).dangerous())
        self.tokenizers = (policy.tokenizer, own.tokenizer)
        config = AutoConfig.from_pretrained(reward_model, trust_remote_code=True)
        self.max_length = min(own.tokenizer.model_max_length, getattr(config, "max_position_embeddings", 10**9))
        self.text = args.shaping.reward_text

    def __call__(
        self, sequences_BS: Tensor, attention_mask_BS: Tensor, action_mask_BA: Tensor, prompts: list[str]
    ) -> MappedBatch:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts] if self.text == "chat" else None
        return map_batch(
            *self.tokenizers,
            sequences_BS,
            attention_mask_BS,
            action_mask_BA,
            max_length=self.max_length,
            special_tokens=self.text == "special",
            messages_B=turns,
        )


def own_tokens(args: Namespace, reward_model: str) -> OwnTokens | None:
    """The mapping where ``--shaping.tokenizer_check map`` has something to map, else None."""
    if args.shaping.tokenizer_check != "map":
        return None
    mapping = OwnTokens(args, reward_model)
    return mapping if mapping.needed else None


class CreditRewardModel(undecorated(RewardModelActor)):
    """OpenRLHF's reward-model worker.

    With a method that needs attention, or a model that reads its own tokens (``--shaping.tokenizer_check map``), its
    forward returns a ScoredBatch.
    """

    attention: Any = None  # what attach gives
    own_tokens: OwnTokens | None = None

    def init_model_from_pretrained(self, strategy: object, pretrain: str) -> None:
        """Load the model as the host does, attach the tap and fire it once, before any rollout is made."""
        args, shaping = strategy.args, strategy.args.shaping
        if not getattr(args, "shaping_checked", True):  # the models were not on the driver's machine
            check_models(args, shaping)
        super().init_model_from_pretrained(strategy, pretrain)
        if normalisation.normalises(args):
            strategy.print(f"abc_plugin: reward normalisation restored: {normalisation.restore(self.model)}")
        self.own_tokens = own_tokens(args, pretrain)
        if shaping.dense and methods.load(shaping.method).needs_attention:
            self.attention = attach(self.model, layer=shaping.layer, recovery=shaping.recovery)
            strategy.print(f"abc_plugin: {self.attention.describe()}")
            self._score(torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.long))

    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor,
        action_mask: Tensor | None = None,
        prompts: list[str] | None = None,
        **kwargs: object,
    ) -> Tensor | ScoredBatch:
        """Host signature; the experience maker adds ``action_mask`` and ``prompts`` where text is mapped.

        The row is that of ``attention_mask``'s last position, where the host reads the score.
        """
        if self.own_tokens is None:
            reward_B, row_BS = self._score(sequences, attention_mask, **kwargs)
            return reward_B if row_BS is None else ScoredBatch(reward_B, row_BS, {})
        mapped = self.own_tokens(sequences, attention_mask, action_mask, prompts)
        reward_B, row_BL = self._score(mapped.input_ids_BL, mapped.attention_mask_BL, **kwargs)
        info = {"reward_truncated": mapped.truncated_B.float()}
        if row_BL is None:
            return ScoredBatch(reward_B, None, info)
        row_BS, moved_B = mapped.to_policy(row_BL)
        return ScoredBatch(reward_B, row_BS.float(), info | {"credit_moved": moved_B.float()})

    def _score(self, sequences: Tensor, attention_mask: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """The host's forward; the row beside it where attention is needed."""
        if self.attention is None:
            return super().forward(sequences, attention_mask, **kwargs), None
        with self.attention.record(attention_mask.to(torch.cuda.current_device()), **self._groups()) as recording:
            reward_B = super().forward(sequences, attention_mask, **kwargs)
        return reward_B, recording.row_BS.to("cpu")

    def _groups(self) -> dict[str, ProcessGroup]:
        """The process groups over which this model's sequences and heads are split, where they are."""
        args, groups = self.strategy.args, {}
        if option(args, "ds.ring_attn_size") > 1:
            groups["ring_group"] = self.strategy.ring_attn_group
        if option(args, "ds.tensor_parallel_size") > 1:
            groups["head_group"] = self.strategy.ds_device_mesh["tp"].get_group()
        return groups
