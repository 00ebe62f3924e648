"""OpenRLHF's workers with evidence: reward model and policy send back, from the forward that runs anyway, what credit
is made of; the critic and the reward model keep their normalisation."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from openrlhf.trainer.ray.launcher import RewardModelActor
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
from openrlhf.trainer.ray.ppo_critic import CriticModelActor
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import pad
from transformers import AutoConfig

from abc_plugin.attention import attach
from abc_plugin.attention.evidence_readers import attach_readers, record, rows
from abc_plugin.attention.layers import unwrap
from abc_plugin.attention.model_files import adapter_base
from abc_plugin.attention.query_positions import generating_rows
from abc_plugin.credit import methods
from abc_plugin.credit.methods import policy_need
from abc_plugin.credit.shapley import segments, shapley_values
from abc_plugin.errors import NotFinite
from abc_plugin.host.install import undecorated
from abc_plugin.host.model_checks import check_models
from abc_plugin.text.check_tokenizers import load_tokenizer
from abc_plugin.text.segment_ends import segment_ends
from abc_plugin.text.tokenizer_differences import compare
from abc_plugin.text.tokenizer_mapping import MappedBatch, map_batch


class EvidenceBatch(NamedTuple):
    """What travels from a worker to the experience maker in place of the host's tensor, on the CPU."""

    output: Tensor  # the host's own: scores (B,) of a reward model, log-probabilities (B, A) of the policy
    evidence: list[dict[str, Tensor]]  # one per reward model: a need's name -> (B, S) over all positions, fp32
    info: dict[str, Tensor]  # metrics (B,)


class OwnTokens:
    """Reads the policy's sequences as text in the reward model's own tokens (``--shaping.tokenizer_check map``)."""

    def __init__(self, args: Namespace, reward_model: str) -> None:
        fast = not args.data.disable_fast_tokenizer
        policy_path = adapter_base(args.actor.model_name_or_path) or args.actor.model_name_or_path
        policy, own = (load_tokenizer(path, use_fast=fast) for path in (policy_path, reward_model))
        other_ends = {*policy.generation_ends} - {own.tokenizer.eos_token_id}  # ids that are text to the model
        self.text = args.shaping.reward_text
        self.needed = bool(self.text != "plain" or other_ends or compare(policy, own).incompatibilities())
        self.tokenizers, self.ends = (policy.tokenizer, own.tokenizer), policy.ends
        config = AutoConfig.from_pretrained(reward_model, trust_remote_code=True)
        self.max_length = min(own.tokenizer.model_max_length, getattr(config, "max_position_embeddings", 10**9))

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
            ends=self.ends,
        )


class ResponseParts:
    """Scores parts of responses for ``--reward_shaping shapley``: tokens are removed, so that positions close up."""

    def __init__(self, args: Namespace) -> None:
        self.calls, self.segment, self.tokenizer = args.shaping.calls, args.shaping.segment, None
        if self.segment != "none":
            fast = not args.data.disable_fast_tokenizer
            self.tokenizer = load_tokenizer(args.actor.model_name_or_path, use_fast=fast).tokenizer

    def __call__(
        self,
        score: Callable[[Tensor, Tensor, Tensor], Tensor],
        whole_B: Tensor,
        sequences_BS: Tensor,
        attention_mask_BS: Tensor,
        action_mask_BA: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Shapley values (B, S), numbers of segments (B,). score: of ids, attention mask and action mask -> (B,)."""
        ends_BA = segment_ends(self.segment, self.tokenizer, sequences_BS, action_mask_BA)
        segment_BA = segments(ends_BA, action_mask_BA, self.calls)

        def score_kept(kept_BA: Tensor) -> Tensor:
            kept_BS = attention_mask_BS.bool() & pad(kept_BA, (1, 0), value=True)
            order_BS = (~kept_BS).int().argsort(dim=1, stable=True)[:, : int(kept_BS.sum(1).max())]
            acts_BS = pad(action_mask_BA, (1, 0)) * kept_BS
            ids, mask, acts = (x.gather(1, order_BS) for x in (sequences_BS, kept_BS.long(), acts_BS))
            return score(ids, mask, acts[:, 1:])

        seeds = (sequences_BS * attention_mask_BS).sum(1).tolist()
        value_BA = shapley_values(score_kept, whole_B, segment_BA, self.calls, seeds)
        return pad(value_BA, (1, 0)), (segment_BA.amax(1) + 1).float()


class Member(NamedTuple):
    """One reward model of a worker, with its readers."""

    path: str
    model: nn.Module
    readers: dict[str, Any]  # what attach_readers gives
    own_tokens: OwnTokens | None
    parts: ResponseParts | None

    @classmethod
    def of_model(cls, model: nn.Module, args: Namespace, path: str) -> Member:
        """Attach to a loaded model what the run's method needs. Raises UserError where it cannot be read so."""
        shaping = args.shaping
        needs = methods.load(shaping.method).needs if shaping.dense else ()
        if {"gradient", "contribution"} & set(needs):
            keep_gradients_exact(model)
        own = OwnTokens(args, path) if shaping.tokenizer_check == "map" else None
        readers = attach_readers(model, needs, layer=shaping.layer, recovery=shaping.recovery, heads=shaping.head_list)
        parts = ResponseParts(args) if "shapley" in needs else None
        return cls(path, model, readers, own if own and own.needed else None, parts)

    def score(
        self,
        forward: Callable[[Tensor, Tensor], Tensor],
        sequences_BS: Tensor,
        attention_mask_BS: Tensor,
        action_mask_BA: Tensor | None = None,
        prompts: list[str] | None = None,
        **groups: ProcessGroup,
    ) -> EvidenceBatch:
        """Scores by ``forward(ids, mask)``, with what is read beside it, both by the policy's tokens.

        Action mask and prompts are needed where the model reads its own tokens; the mask also for parts of responses.
        Raises NotFinite.
        """
        mapped, ids, mask = self._read(sequences_BS, attention_mask_BS, action_mask_BA, prompts)
        if not self.readers:
            reward_B, evidence = forward(ids, mask), {}
        else:
            with record(self.readers, mask.to(torch.cuda.current_device()), **groups) as recordings:
                reward_B = forward(ids, mask)
            evidence = rows(recordings)
        if not (finite_B := reward_B.isfinite()).all():
            bad = int((~finite_B).sum())
            raise NotFinite(f"{bad} of {len(reward_B)} scores of the reward model {self.path} are NaN or infinite")
        for name, row_BS in evidence.items():
            if not row_BS.isfinite().all():
                raise NotFinite(f"the {name} read of the reward model {self.path} is NaN or infinite")
        info = {}
        if mapped is not None:
            info["reward_truncated"] = mapped.truncated_B.float()
            for name, row_BL in evidence.items():
                row_BS, _ = mapped.to_policy(row_BL)
                _, moved_B = mapped.to_policy(row_BL.abs())  # of signed rows the parts that move might cancel
                evidence[name] = row_BS.float()
                info["credit_moved"] = moved_B.float()
        if self.parts is not None:
            evidence["shapley"], info["shapley_segments"] = self.parts(
                lambda *partial: forward(*self._read(*partial, prompts)[1:]),
                reward_B,
                sequences_BS,
                attention_mask_BS,
                action_mask_BA,
            )
        return EvidenceBatch(reward_B, [evidence], info)

    def _read(
        self, sequences_BS: Tensor, mask_BS: Tensor, action_mask_BA: Tensor | None, prompts: list[str] | None
    ) -> tuple[MappedBatch | None, Tensor, Tensor]:
        """What the model reads: ids and attention mask, mapped into its own tokens where it has some."""
        if self.own_tokens is None:
            return None, sequences_BS, mask_BS
        mapped = self.own_tokens(sequences_BS, mask_BS, action_mask_BA, prompts)
        return mapped, mapped.input_ids_BL, mapped.attention_mask_BL


def mean_batch(members: list[EvidenceBatch]) -> EvidenceBatch:
    """One batch of several reward models: mean score, every member's evidence, mean of each metric.

    ``reward_disagreement`` is the deviation of the scores, divisor M.
    """
    if len(members) == 1:
        return members[0]
    score_MB = torch.stack([one.output.float() for one in members])
    names = {name for one in members for name in one.info}
    info = {name: torch.stack([one.info[name] for one in members if name in one.info]).mean(0) for name in names}
    info["reward_disagreement"] = score_MB.std(0, correction=0)
    return EvidenceBatch(score_MB.mean(0), [evidence for one in members for evidence in one.evidence], info)


class CreditRewardModel(undecorated(RewardModelActor)):
    """OpenRLHF's reward-model worker, of one reward model or, with commas in its path, of several.

    With a method that needs something of the reward model, with several, or with one that reads its own tokens
    (``--shaping.tokenizer_check map``), its forward returns an EvidenceBatch. Each worker holds all of them, one after
    the other in each forward.
    """

    members: list[Member]

    def init_model_from_pretrained(self, strategy: Any, pretrain: str) -> None:
        """Load each model as the host does, attach the readers and fire them once, before any rollout is made."""
        if not getattr(strategy.args, "shaping_checked", True):  # the models were not on the driver's machine
            check_models(strategy.args, strategy.args.shaping)
        self.members = []
        for path in map(str.strip, pretrain.split(",")):
            super().init_model_from_pretrained(strategy, path)
            self._setup_distributed = lambda _strategy: None  # the process group is there for the next one
            if strategy.args.reward.normalize_enable:
                strategy.print(f"abc_plugin: reward normalisation restored: {restore_normalisation(self.model)}")
            member = Member.of_model(self.model, strategy.args, path)
            self.members.append(member)
            for reader in member.readers.values():
                strategy.print(f"abc_plugin: {reader.describe()}")
            if member.readers:
                two_tokens = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.long)
                member._replace(own_tokens=None).score(super().forward, *two_tokens, **self._groups())

    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor,
        action_mask: Tensor | None = None,
        prompts: list[str] | None = None,
        **kwargs: object,
    ) -> Tensor | EvidenceBatch:
        """Host signature; the experience maker adds ``action_mask`` and ``prompts`` where text is mapped or cut.

        The score, and a row of attention, are those of ``attention_mask``'s last position.
        """
        host_forward, scored = super().forward, []
        for member in self.members:
            self.model = member.model  # the host's forward runs it
            batch = member.score(
                lambda ids, mask: host_forward(ids, mask, **kwargs),
                sequences,
                attention_mask,
                action_mask,
                prompts,
                **self._groups(),
            )
            scored.append(batch)
        batch = mean_batch(scored)
        return batch if batch.info or any(batch.evidence) else batch.output

    def _groups(self) -> dict[str, ProcessGroup]:
        """The process groups over which this model's sequences and heads are split, where they are."""
        groups = _head_group(self.strategy)
        if self.strategy.args.ds.ring_attn_size > 1:
            groups["ring_group"] = self.strategy.ring_attn_group
        return groups


class CreditPolicyModel(undecorated(PolicyModelActor)):
    """OpenRLHF's policy worker; with a method that needs the policy's attention, its forward returns an EvidenceBatch.

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
    ) -> Tensor | EvidenceBatch:
        """Host signature."""
        if self.attention is None:
            return super().forward(sequences, action_mask, attention_mask, *args, **kwargs)
        mask_BS, queries_BS = attention_mask.to(torch.cuda.current_device()), generating_rows(self.need, action_mask)
        with self.attention.record(mask_BS, queries_BS=queries_BS, **_head_group(self.strategy)) as recording:
            log_probs_BA = super().forward(sequences, action_mask, attention_mask, *args, **kwargs)
        return EvidenceBatch(log_probs_BA, [{self.need: recording.row_BS.to("cpu")}], {})


class RestoredCritic(undecorated(CriticModelActor)):
    """OpenRLHF's critic worker; with ``--reward.normalize_enable`` its values are normalised as configured."""

    def init_model_from_pretrained(self, strategy: Any, *args: object, **kwargs: object) -> None:
        """Host signature."""
        super().init_model_from_pretrained(strategy, *args, **kwargs)
        if strategy.args.reward.normalize_enable:
            restored = restore_normalisation(self.critic)
            strategy.print(f"abc_plugin: reward normalisation of the critic restored: {restored}")


def restore_normalisation(model: nn.Module) -> str:
    """Set mean and deviation of the host's reward or critic model from its config; returns what was set.

    The host (models/model.py, ``reward = (reward - mean) / std``) keeps them in buffers that are not saved, and
    transformers 5 makes such buffers without their values. 0 and 1 where the config has none.
    """
    regression = next(part for part in unwrap(model).modules() if "normalize_reward" in vars(part))
    values = {"mean": getattr(regression.config, "mean", 0.0), "std": getattr(regression.config, "std", 1.0)}
    for name, value in values.items():
        getattr(regression, name).fill_(value)
    return f"mean {values['mean']}, std {values['std']}"


def keep_gradients_exact(model: nn.Module) -> int:
    """Keep bitsandbytes from repacking the 4-bit weights for inference on the CPU; returns how many layers it would.

    On CPUs with AVX512-BF16 a Linear4bit rewrites its weight in place, in the first forward in evaluation mode without
    gradients, for a kernel that has no backward and knows no way back: every forward that trains then goes through
    that kernel too, and the layers below get no gradient (bitsandbytes 0.50.2, nn/modules.py Linear4bit.forward and
    autograd/_functions.py matmul_4bit). A PPO step generates before it trains, so it would always happen. Repacking
    also rounds the scales, and asserts that a layer's width is a multiple of 32. On other devices nothing changes.
    """
    layers = [layer for layer in model.modules() if getattr(layer, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def _head_group(strategy: Any) -> dict[str, ProcessGroup]:
    """The process group over which a model's heads are split, where they are."""
    if strategy.args.ds.tensor_parallel_size == 1:
        return {}
    return {"head_group": strategy.ds_device_mesh["tp"].get_group()}
