"""The reward model's worker: the score, and what credit is made of, from one forward."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, NamedTuple

import torch
from openrlhf.trainer.ray.launcher import RewardModelActor
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import AutoConfig

from abc_plugin.attention.readers import attach_readers, record, rows
from abc_plugin.credit import methods
from abc_plugin.host import normalisation
from abc_plugin.host.checks import check_models
from abc_plugin.host.ensemble import mean_info, mean_score
from abc_plugin.host.options import option
from abc_plugin.host.ray_actors import undecorated
from abc_plugin.local.quantised import keep_gradients_exact
from abc_plugin.text.check import side
from abc_plugin.text.compare import compare
from abc_plugin.text.mapping import MappedBatch, map_batch


class ScoredBatch(NamedTuple):
    """What travels from the reward model to the experience maker, on the CPU."""

    reward_B: Tensor
    evidence: list[dict[str, Tensor]]  # one per reward model: a need's name -> (B, S) over all positions, fp32
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


class Member(NamedTuple):
    """One reward model of a worker."""

    model: Any
    readers: dict[str, Any]  # what attach_readers gives
    own_tokens: OwnTokens | None


class CreditRewardModel(undecorated(RewardModelActor)):
    """OpenRLHF's reward-model worker, of one reward model or, with commas in its path, of several.

    With a method that needs something of the reward model, with several, or with one that reads its own tokens
    (``--shaping.tokenizer_check map``), its forward returns a ScoredBatch.
    """

    members: list[Member]

    def init_model_from_pretrained(self, strategy: object, pretrain: str) -> None:
        """Load each model as the host does, attach the readers and fire them once, before any rollout is made."""
        if not getattr(strategy.args, "shaping_checked", True):  # the models were not on the driver's machine
            check_models(strategy.args, strategy.args.shaping)
        self.members = []
        for path in pretrain.split(","):
            super().init_model_from_pretrained(strategy, path.strip())
            self.members.append(self._member(strategy, path.strip()))
            self._setup_distributed = lambda _strategy: None  # the process group is there for the next one

    def _member(self, strategy: Any, path: str) -> Member:
        args, shaping = strategy.args, strategy.args.shaping
        if normalisation.normalises(args):
            strategy.print(f"abc_plugin: reward normalisation restored: {normalisation.restore(self.model)}")
        needs = methods.load(shaping.method).needs if shaping.dense else ()
        if "gradient" in needs:
            keep_gradients_exact(self.model)
        about = {"layer": shaping.layer, "recovery": shaping.recovery, "heads": shaping.head_list}
        member = Member(self.model, attach_readers(self.model, needs, **about), own_tokens(args, path))
        for reader in member.readers.values():
            strategy.print(f"abc_plugin: {reader.describe()}")
        if member.readers:
            self._score(member, torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.long))
        return member

    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor,
        action_mask: Tensor | None = None,
        prompts: list[str] | None = None,
        **kwargs: object,
    ) -> Tensor | ScoredBatch:
        """Host signature; the experience maker adds ``action_mask`` and ``prompts`` where text is mapped.

        The score, and a row of attention, are those of ``attention_mask``'s last position; of several models the score
        is the mean.
        """
        scored = [
            self._of(member, sequences, attention_mask, action_mask, prompts, **kwargs) for member in self.members
        ]
        reward_B, apart = mean_score([one.reward_B for one in scored])
        evidence, info = [one.evidence[0] for one in scored], mean_info([one.info for one in scored]) | apart
        return ScoredBatch(reward_B, evidence, info) if info or any(evidence) else reward_B

    def _of(
        self,
        member: Member,
        sequences: Tensor,
        attention_mask: Tensor,
        action_mask: Tensor | None,
        prompts: list[str] | None,
        **kwargs: object,
    ) -> ScoredBatch:
        """What one model makes of the policy's sequences, by the policy's tokens."""
        if member.own_tokens is None:
            reward_B, evidence = self._score(member, sequences, attention_mask, **kwargs)
            return ScoredBatch(reward_B, [evidence], {})
        mapped = member.own_tokens(sequences, attention_mask, action_mask, prompts)
        reward_B, evidence = self._score(member, mapped.input_ids_BL, mapped.attention_mask_BL, **kwargs)
        info = {"reward_truncated": mapped.truncated_B.float()}
        for name, row_BL in evidence.items():
            row_BS, _ = mapped.to_policy(row_BL)
            _, moved_B = mapped.to_policy(row_BL.abs())  # of signed rows the parts that move might cancel
            evidence[name] = row_BS.float()
            info["credit_moved"] = moved_B.float()
        return ScoredBatch(reward_B, [evidence], info)

    def _score(
        self, member: Member, sequences: Tensor, attention_mask: Tensor, **kwargs: object
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The host's forward, and what was read beside it."""
        self.model = member.model
        if not member.readers:
            return super().forward(sequences, attention_mask, **kwargs), {}
        mask_BS = attention_mask.to(torch.cuda.current_device())
        with record(member.readers, mask_BS, **self._groups()) as recordings:
            reward_B = super().forward(sequences, attention_mask, **kwargs)
        return reward_B, rows(recordings)

    def _groups(self) -> dict[str, ProcessGroup]:
        """The process groups over which this model's sequences and heads are split, where they are."""
        args, groups = self.strategy.args, {}
        if option(args, "ds.ring_attn_size") > 1:
            groups["ring_group"] = self.strategy.ring_attn_group
        if option(args, "ds.tensor_parallel_size") > 1:
            groups["head_group"] = self.strategy.ds_device_mesh["tp"].get_group()
        return groups
