"""The experience maker: the host's own, with per-token credit in place of the final reward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from openrlhf.trainer.ppo_utils import experience_maker as host
from openrlhf.trainer.ppo_utils.experience import Experience
from torch import Tensor

from abc_plugin.credit import methods
from abc_plugin.credit.metrics import credit_metrics, mean_disagreement, negative_share, without_attention
from abc_plugin.errors import CreditError
from abc_plugin.host.credited import shape_batch, special_actions
from abc_plugin.host.options import flag
from abc_plugin.host.policy_worker import PolicyBatch
from abc_plugin.host.worker import ScoredBatch
from abc_plugin.text import remote_credit


class CreditExperienceMaker(host.RemoteExperienceMaker):
    """OpenRLHF's experience maker with ``--reward_shaping``.

    Evidence comes back with the reward, is split off in ``_flatten_results`` and kept on its experience; the attention
    of a remote reward comes as spans over the text. The credit made of it replaces the final reward inside the host's
    ``compute_reward``, after the host's baselines, penalties and clipping, so that the return is unchanged. No host
    method is copied; with ``none`` or beta 0 the host's own runs untouched.
    """

    parts: dict[int, tuple[Tensor, Tensor, Tensor]] | None = None  # rewards' parts by mask, while records.py asks

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.shaping = self.args.shaping
        self.method = methods.load(self.shaping.method)
        self.announced = False
        self._scored: list[ScoredBatch] = []
        self._from_policy: list[dict[str, Tensor]] = []
        self._spans: dict[int, Tensor] = {}

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer; a vision model's is inside its processor."""
        return getattr(self.tokenizer, "tokenizer", self.tokenizer)

    @torch.no_grad()
    def make_experience_batch(self, rollout_samples: list[Experience]) -> list[Experience]:
        """The host's method between two checks: every reward is one number, and every response got its credit.

        Raises CreditError naming the sample.
        """
        resume = flag(self.args, "ckpt.load_enable")
        remote_credit.check_rewards(rollout_samples, from_rollout=self.reward_model_group is None, resume=resume)
        self._spans = remote_credit.take_spans(rollout_samples)
        experiences = super().make_experience_batch(rollout_samples)
        if self.shaping.dense:
            if not all("credit_entropy" in experience.info for experience in experiences):
                raise CreditError(f"--reward_shaping {self.shaping.method} is on, but a batch got no credit")
            if not self.announced:
                print(f"abc_plugin: {_arrival(experiences)}", flush=True)
                self.announced = True
        return experiences

    def _flatten_results(self, refs: list, duplicate_factor: int) -> list:
        results = super()._flatten_results(refs, duplicate_factor)
        if results and isinstance(results[0], ScoredBatch):
            self._scored = results
            return [scored.reward_B for scored in results]
        if results and isinstance(results[0], PolicyBatch):
            self._from_policy = [batch.evidence for batch in results]
            return [batch.action_log_probs_BA for batch in results]
        return results

    def _dispatch_forward(self, group: object, sync_condition: bool, **batches: list) -> list:
        if group is self.reward_model_group and self.shaping.tokenizer_check == "map":
            batches |= self._for_mapping
        return super()._dispatch_forward(group, sync_condition, **batches)

    @torch.no_grad()
    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        """The host's method; each experience also gets ``evidence`` where the method needs any.

        ``evidence`` is a list with one entry per reward model: a need's name -> (B, S) over the whole sequence.
        Raises CreditError when the reward came without it.
        """
        self._scored, self._from_policy = [], []
        self._for_mapping = {
            "action_mask": [samples.action_mask for samples in samples_list],
            "prompts": [samples.prompts for samples in samples_list],
        }
        experiences = super().make_experience(samples_list)
        if self._scored and len(self._scored) != len(experiences):
            raise CreditError(f"{len(self._scored)} batches of evidence for {len(experiences)} experiences")
        for experience, scored in zip(experiences, self._scored, strict=False):
            experience.info |= scored.info
        if self.shaping.dense:
            for row, experience in enumerate(experiences):
                experience.evidence = self._scored[row].evidence if self._scored else self._remote(experience)
                if self._from_policy:
                    experience.evidence = [member | self._from_policy[row] for member in experience.evidence]
        return experiences

    def _remote(self, experience: Experience) -> list[dict[str, Tensor]]:
        return [{"attention": self._remote_rows(experience)} if "attention" in self.method.needs else {}]

    def _remote_rows(self, experience: Experience) -> Tensor:
        """Weights (B, S) from the spans that came with the rewards; counts what had to be moved."""
        row_BS = torch.zeros(experience.sequences.shape)
        moved = []
        for row, index in enumerate(experience.index):
            if index not in self._spans:
                raise CreditError(
                    f"--reward_shaping {self.shaping.method}: the reward of sample {index} came without credit. Its "
                    f"attention is known where {flag(self.args, 'reward.model_name_or_path')} scores, or a server "
                    "started by abc-rlhf serve-rm, or a reward function that returns "
                    f'extra_logs["{remote_credit.CREDIT}"]; a rule has none: use --reward_shaping uniform, '
                    "abc_d or none"
                )
            real = experience.attention_mask[row].bool()
            row_BS[row, real], share = remote_credit.attention_row(
                self._spans[index], experience.sequences[row, real], self.text_tokenizer, f"sample {index}"
            )
            acts = experience.action_mask[row].bool()
            if acts.any() and not row_BS[row, 1:][acts].sum() > 0:
                raise CreditError(
                    f"sample {index}: all weight of its credit_spans lies on the prompt; they count characters of the "
                    "whole query, prompt and response"
                )
            moved.append(share)
        experience.info["credit_moved"] = torch.tensor(moved)
        return row_BS

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """The host's method, with its ``compute_reward`` replaced for the length of the call.

        Raises CreditError when an experience has no evidence, when evidence or a reward is not usable, or when the
        host does not ask for the reward of every experience exactly once.
        """
        if not self.shaping.dense:
            return super().compute_advantages_and_returns(experiences)
        # The host hands compute_reward the experience's own action_mask object: that ties credit to experience.
        waiting = {id(experience.action_mask): (experience, self._members(experience)) for experience in experiences}
        stock = host.compute_reward

        def compute_reward(
            r: Tensor, kl_coef: float, kl: Tensor, action_mask: Tensor, reward_clip_range: tuple
        ) -> Tensor:
            if id(action_mask) not in waiting:
                raise CreditError("OpenRLHF asked for the reward of an experience without credit, or asked twice")
            experience, members = waiting.pop(id(action_mask))
            return self._shaped_reward(stock, experience, members, r, kl_coef, kl, reward_clip_range)

        with mock.patch.object(host, "compute_reward", compute_reward):
            experiences = super().compute_advantages_and_returns(experiences)
        if waiting:
            raise CreditError(f"OpenRLHF skipped the reward of {len(waiting)} experiences: their credit is lost")
        return experiences

    def _members(self, experience: Experience) -> list[methods.Evidence]:
        """What the method needs, by reward model; takes it off the experience."""
        _check_finite("the reward", experience.rewards, experience)
        return [self._evidence(experience, member) for member in vars(experience).pop("evidence", [{}])]

    def _evidence(self, experience: Experience, member: dict[str, Tensor]) -> methods.Evidence:
        """What the method needs of one reward model, by action. Raises CreditError where it is missing or misfits."""
        rows_BA = {}
        for name in sorted(self.method.needs):
            row_BS = member.get(name)
            if row_BS is None or row_BS.shape != experience.sequences.shape:
                found = "none" if row_BS is None else tuple(row_BS.shape)
                raise CreditError(f"{name} row {found} for sequences of shape {tuple(experience.sequences.shape)}")
            _check_finite(f"the {name}", row_BS, experience)
            if name == "prefix":  # a prompt of one token lies before the actions: the others count from its score
                row_BS = row_BS - row_BS[:, :1] * experience.action_mask[:, :1]
            rows_BA[f"{name}_BA"] = row_BS[:, 1:]  # action t is the choice of token t + 1
        for name in rows_BA.keys() & {"attention_BA", "policy_BA", "policy_last_BA"}:
            without_B = without_attention(rows_BA[name], experience.action_mask)
            others_B = experience.info.get("credit_without_attention", without_B)  # of an ensemble's other members
            experience.info["credit_without_attention"] = torch.maximum(without_B, others_B)
        return methods.Evidence(experience.sequences, experience.action_mask, **rows_BA)

    def _shaped_reward(
        self,
        stock: Callable,
        experience: Experience,
        members: list[methods.Evidence],
        reward_B: Tensor,
        kl_coef: float,
        kl_BA: Tensor,
        clip_range: tuple,
    ) -> Tensor:
        """Credit plus the host's KL penalty (B, A), fp32; both parts come from the host's own compute_reward."""
        mask_BA, kl_BA = experience.action_mask, kl_BA.float()
        _check_finite("the KL penalty (the policy or the reference has diverged)", kl_BA, experience)
        penalty_BA = stock(torch.zeros_like(reward_B), kl_coef, kl_BA, mask_BA, None)
        clipped_B = stock(reward_B, 0.0, torch.zeros_like(kl_BA), mask_BA, clip_range).sum(1)
        shaped = shape_batch(self.shaping, self.method, members, clipped_B, self.text_tokenizer, self.shaping.beta)
        special_BA = special_actions(self.text_tokenizer, experience.sequences)
        experience.info |= credit_metrics(shaped.share_BA, shaped.reward_BA, clipped_B, mask_BA, special_BA)
        if self.method.weights is None:
            experience.info["credit_negative_share"] = negative_share(shaped.credit_BA)
        if len(members) > 1:
            apart_B = mean_disagreement(shaped.disagreement_BA, shaped.share_BA)
            experience.info["credit_disagreement"] = apart_B
        if self.parts is not None:
            credit_BA = shaped.credit_BA if self.method.weights is None else shaped.share_BA
            self.parts[id(mask_BA)] = (credit_BA, shaped.reward_BA, penalty_BA)
        return shaped.reward_BA + penalty_BA


def _check_finite(what: str, value: Tensor, experience: Experience) -> None:
    bad_B = ~torch.isfinite(value.reshape(len(experience.index), -1)).all(1)
    if bad_B.any():
        samples = [index for index, bad in zip(experience.index, bad_B.tolist(), strict=True) if bad]
        raise CreditError(f"{what} of sample {samples[0]} is NaN or infinite ({len(samples)} in its batch)")


def _arrival(experiences: list[Experience]) -> str:
    """One line of proof for the first step."""
    mean = {
        name: torch.cat([experience.info[name] for experience in experiences]).mean().item()
        for name in ("credit_entropy", "credit_last_token", "credit_conservation_error")
    }
    length = torch.cat([experience.action_mask.sum(1) for experience in experiences]).float().mean().item()
    return (
        f"credit arrived: {sum(len(experience.index) for experience in experiences)} responses of {length:.1f} "
        f"tokens, entropy {mean['credit_entropy']:.2f} nats (uniform {math.log(max(length, 1.0)):.2f}), share on "
        f"the last token {mean['credit_last_token']:.2f}, conservation error {mean['credit_conservation_error']:.1e}"
    )
