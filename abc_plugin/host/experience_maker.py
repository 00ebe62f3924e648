"""The experience maker: the host's own, with per-token credit in place of the final reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from openrlhf.models.utils import compute_reward
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from torch import Tensor

from abc_plugin.config import ShapingConfig
from abc_plugin.credit import methods
from abc_plugin.credit.metrics import credit_metrics, mean_disagreement, negative_share, without_attention
from abc_plugin.credit.redistribute import last_action
from abc_plugin.credit.shaping import Shaped, dropped, shape, slope
from abc_plugin.errors import CreditError, NotFinite
from abc_plugin.host.arguments import DISCOUNTED, GROUPED
from abc_plugin.host.model_workers import EvidenceBatch
from abc_plugin.text.remote_credit import SPANS, token_row
from abc_plugin.text.segment_ends import segment_ends

GROUP_NORM, EPSILON = "group_norm", 1e-9  # the estimator that divides by the group's deviation, and what it adds to it


# What policy and critic are trained on, by the experience's field: each (B, A).
TRAINED_ON = {
    "action_log_probs": "a log-probability by the policy",
    "base_action_log_probs": "a log-probability by the reference",
    "values": "a value by the critic",
    "returns": "a return",
    "advantages": "an advantage",
}


class RewardParts(NamedTuple):
    """What one experience's per-token reward consists of."""

    score_B: Tensor  # as scored, before the host's length penalties, baseline and clipping
    credit_BA: Tensor  # the method's, in any unit; its sign is kept where the method is signed
    shaped_BA: Tensor  # reward units, without the KL penalty
    penalty_BA: Tensor  # reward units
    value_BA: Tensor | None  # the critic's


class CreditExperienceMaker(RemoteExperienceMaker):
    """OpenRLHF's experience maker with ``--reward_shaping``.

    Evidence comes back with the workers' outputs and is kept on its experience; the attention of a remote reward comes
    as spans over the text. The host, after its baselines, penalties and clipping, hands each experience's reward to
    one of the two methods that make returns of it; there credit takes the reward's place, so that the return is
    unchanged. With ``none`` or beta 0 the host's own tensors pass through untouched.
    """

    recorder: Any = None  # completion_recorder.Recorder, or None where nothing is recorded

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.shaping = self.args.shaping
        self.method = methods.load(self.shaping.method)
        self.gamma = self.args.algo.advantage.gamma
        if self.shaping.dense and self.args.algo.advantage.estimator not in DISCOUNTED:
            self.args.algo.advantage.gamma = 1.0  # as the host would, which says so in every run
        self.announced = False
        self._received: list[list[EvidenceBatch]] = []  # by group of workers, in the order of the experiences
        # Whose return is still to come, with their scores and what each reward model shows of them.
        self._waiting: list[tuple[Experience, Tensor, list[methods.Evidence]]] = []
        self._parts: list[RewardParts] = []
        self._spans: dict[str, dict[int, Tensor]] = {}  # credit that came with remote rewards, by need and sample

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer; a vision model's is inside its processor."""
        return getattr(self.tokenizer, "tokenizer", self.tokenizer)

    @torch.no_grad()
    def make_experience_batch(self, rollout_samples: list[Experience]) -> list[Experience]:
        """The host's method between two checks: every reward is one number, and every response got its credit.

        Raises CreditError naming the sample.
        """
        _check_rewards(rollout_samples, from_rollout=self.reward_model_group is None)
        # What stays in info is logged as a number.
        self._spans = {
            need: {i: one.info.pop(key) for i, one in enumerate(rollout_samples) if key in one.info}
            for need, key in SPANS.items()
        }
        _check_logs(rollout_samples)
        experiences = super().make_experience_batch(rollout_samples)
        for experience in experiences:
            for name, what in TRAINED_ON.items():
                if (value_BA := getattr(experience, name, None)) is not None:
                    _check_finite(what, value_BA.where(experience.action_mask.bool(), 0.0), experience)
        if self.shaping.dense:
            if not all("credit_entropy" in experience.info for experience in experiences):
                raise CreditError(f"--reward_shaping {self.shaping.method} is on, but a batch got no credit")
            if not self.announced:
                print(f"abc_plugin: {_arrival(experiences)}", flush=True)
                self.announced = True
        if self._recording:
            self.recorder.record(experiences, self._parts)
        return experiences

    @property
    def _recording(self) -> bool:
        return self.recorder is not None and self.recorder.due

    @property
    def _in_parts(self) -> bool:
        return self.shaping.dense and "shapley" in self.method.needs

    def _dispatch_forward(self, group: object, sync_condition: bool, **batches: list) -> list:
        if group is self.reward_model_group and (self.shaping.tokenizer_check == "map" or self._in_parts):
            batches |= self._of_responses
        return super()._dispatch_forward(group, sync_condition, **batches)

    def _flatten_results(self, refs: list, duplicate_factor: int) -> list:
        results = super()._flatten_results(refs, duplicate_factor)
        if not (results and isinstance(results[0], EvidenceBatch)):
            return results
        self._received.append(results)
        return [batch.output for batch in results]

    @torch.no_grad()
    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        """The host's method; each experience also gets ``evidence`` where the method needs any.

        ``evidence`` is a list with one entry per reward model: a need's name -> (B, S) over the whole sequence.
        Raises CreditError when the reward came without it.
        """
        self._received = []
        self._of_responses = {
            "action_mask": [samples.action_mask for samples in samples_list],
            "prompts": [samples.prompts for samples in samples_list],
        }
        experiences = super().make_experience(samples_list)
        for batches in self._received:
            if len(batches) != len(experiences):
                raise CreditError(f"{len(batches)} batches of evidence for {len(experiences)} experiences")
        for row, experience in enumerate(experiences):
            batches = [received[row] for received in self._received]
            for batch in batches:
                experience.info |= batch.info
            if self.shaping.dense:
                experience.evidence = _by_member([batch.evidence for batch in batches])
                for need in sorted(self.method.needs & SPANS.keys()):
                    if not any(need in one for one in experience.evidence):
                        remote = {need: self._remote_rows(experience, need)}
                        experience.evidence = [one | remote for one in experience.evidence]
        return experiences

    def _remote_rows(self, experience: Experience, need: str) -> Tensor:
        """Values (B, S) from the spans that came with the rewards; counts what had to be moved."""
        row_BS, spans_of = torch.zeros(experience.sequences.shape), self._spans.get(need, {})
        moved = []
        for row, index in enumerate(experience.index):
            if index not in spans_of:
                raise CreditError(
                    f"--reward_shaping {self.shaping.method}: the reward of sample {index} came without credit. Its "
                    f"{need} is known where --reward.model_name_or_path scores, or a server started by abc-rlhf "
                    f"serve-rm --reward_shaping {self.shaping.method}, or a reward function that returns extra_logs"
                    f'["{SPANS[need]}"]; a rule has none: use --reward_shaping uniform, abc_d or none'
                )
            real = experience.attention_mask[row].bool()
            sequence_S, where = experience.sequences[row, real], f"sample {index}"
            row_BS[row, real], share = token_row(need, spans_of[index], sequence_S, self.text_tokenizer, where)
            acts = experience.action_mask[row].bool()
            if acts.any() and not row_BS[row, 1:][acts].any():
                raise CreditError(
                    f"sample {index}: all weight of its {SPANS[need]} lies on the prompt; they count characters of "
                    "the whole query, prompt and response"
                )
            moved.append(share)
        experience.info["credit_moved"] = torch.tensor(moved)
        return row_BS

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """The host's method, which hands every experience's reward to one of the two methods below, in order.

        Raises CreditError when evidence or a reward is missing or not usable, or when the host does not ask for the
        return of every experience exactly once.
        """
        self._parts = []
        if not self.shaping.dense and not self._recording:
            return super().compute_advantages_and_returns(experiences)
        if self.shaping.dense:
            for experience in experiences:
                _check_finite("the reward", experience.rewards, experience)
                experience.kl = experience.kl.float()  # the host gives the reward the penalty's dtype
        # The host's length penalties change the scores in place.
        scores = [one.info.get("reward", one.rewards).clone().reshape(-1) for one in experiences]
        members = [self._members(one) if self.shaping.dense else [] for one in experiences]
        if self.shaping.dense and "contribution" in self.method.needs:
            members = _fitted(experiences, members, torch.cat(scores))
        self._waiting = list(zip(experiences, scores, members, strict=True))
        experiences = super().compute_advantages_and_returns(experiences)
        if self._waiting:
            raise CreditError(f"OpenRLHF skipped the reward of {len(self._waiting)} experiences: their credit is lost")
        return experiences

    def get_advantages_and_returns(
        self, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
    ) -> tuple[Tensor, Tensor]:
        """The host's generalised advantages (``gae``) of the shaped reward."""
        shaped_BA = self._shaped(rewards, action_mask, values)
        return super().get_advantages_and_returns(values, shaped_BA, action_mask, gamma, lambd)

    def get_cumulative_returns(self, rewards: Tensor, action_mask: Tensor, gamma: float) -> Tensor:
        """The host's discounted sums (every estimator without a critic) of the shaped reward.

            return[b,t] = sum_{u >= t} gamma^(u - t)·reward[b,u]

        gamma: with credit that of ``--algo.advantage.gamma`` under every estimator. The host sets it to 1 for groups,
        whose sparse reward would only fade; credit comes near its token, and what is discounted is others' noise.
        """
        gamma = self.gamma if self.shaping.dense else gamma
        return super().get_cumulative_returns(self._shaped(rewards, action_mask), action_mask, gamma)

    def _shaped(self, reward_BA: Tensor, action_mask_BA: Tensor, value_BA: Tensor | None = None) -> Tensor:
        """Credit plus KL penalty (B, A), in place of the host's ``reward_BA``: final reward plus KL penalty."""
        if not self.shaping.dense and not self._recording:
            return reward_BA
        if not self._waiting or self._waiting[0][0].action_mask is not action_mask_BA:
            raise CreditError("OpenRLHF asked for the return of an experience out of turn, or asked twice")
        experience, score_B, members = self._waiting.pop(0)
        final_B, penalty_BA = self._split(experience, reward_BA)
        if self.shaping.dense:
            credit_BA, shaped_BA = self._redistribute(experience, members, final_B)
        else:
            credit_BA = last_action(action_mask_BA)
            shaped_BA = credit_BA * final_B[:, None]
        self._parts.append(RewardParts(score_B, credit_BA, shaped_BA, penalty_BA, value_BA))
        return shaped_BA + penalty_BA if self.shaping.dense else reward_BA

    def _split(self, experience: Experience, reward_BA: Tensor) -> tuple[Tensor, Tensor]:
        """The final reward (B,), after baseline and clipping, and the KL penalty (B, A) of the host's reward.

            reward[b,t] = final[b]·[t == last action of b] + penalty[b,t]           (host: models/utils.py)

        The penalty is the host's own of a reward of 0. Where the host takes no baseline off, the final reward is the
        experience's, to the bit; else it is the difference, which is known up to the rounding of the host's sum. A
        response without actions has no final reward.
        Raises CreditError where a reward stands elsewhere: then the host does not work as assumed.
        """
        mask_BA = experience.action_mask
        if self.shaping.dense:
            _check_finite("the KL penalty (the policy or the reference has diverged)", experience.kl, experience)
        zero_B = torch.zeros(len(mask_BA), dtype=reward_BA.dtype)
        penalty_BA = compute_reward(zero_B, self.kl_ctl.value, experience.kl, mask_BA, None)
        last_BA, acts_B = last_action(mask_BA).bool(), mask_BA.bool().any(1)
        before_BA = ~last_BA & acts_B[:, None]
        if not torch.allclose(reward_BA[before_BA], penalty_BA[before_BA], rtol=0, atol=0, equal_nan=True):
            raise CreditError("OpenRLHF's reward is not the final reward plus the KL penalty: unsupported version")
        final_BA = compute_reward(
            experience.rewards.reshape(-1), 0.0, torch.zeros_like(experience.kl), mask_BA, self.args.reward.clip_range
        )
        if not torch.equal(final_BA + penalty_BA, reward_BA):
            final_BA = reward_BA.double() - penalty_BA.double()
        return final_BA.where(last_BA, 0.0).sum(1).to(reward_BA.dtype), penalty_BA

    def _redistribute(
        self, experience: Experience, members: list[methods.Evidence], final_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Credit by the method, and the shaped reward, each (B, A); notes the metrics on the experience."""
        mask_BA = experience.action_mask
        deviation_B = None
        if self.method.needs & methods.SCORE_UNITS and self.args.algo.advantage.estimator == GROUP_NORM:
            deviation_B = experience.info["group_reward_std"] + EPSILON
        tokenizer, beta = self.text_tokenizer, self.shaping.beta
        shaped = shape_batch(self.shaping, self.method, members, final_B, tokenizer, beta, deviation_B)
        special_BA = special_actions(self.text_tokenizer, experience.sequences)
        experience.info |= credit_metrics(shaped.share_BA, shaped.reward_BA, final_B, mask_BA, special_BA)
        if self.method.weights is None:
            experience.info["credit_negative_share"] = negative_share(shaped.credit_BA)
        if len(members) > 1:
            apart_B = mean_disagreement(shaped.disagreement_BA, shaped.share_BA)
            experience.info["credit_disagreement"] = apart_B
        return (shaped.credit_BA if self.method.weights is None else shaped.share_BA), shaped.reward_BA

    def _members(self, experience: Experience) -> list[methods.Evidence]:
        """What the method needs, by reward model; takes it off the experience, which goes into the replay buffer."""
        return [self._evidence(experience, member) for member in vars(experience).pop("evidence", [{}])]

    def _evidence(self, experience: Experience, member: dict[str, Tensor]) -> methods.Evidence:
        """What the method needs of one reward model, by action. Raises CreditError where it is missing or misfits."""
        rows_BA = {}
        for name in sorted(self.method.needs):
            row_BS = member.get(name)
            if row_BS is None or row_BS.shape != experience.sequences.shape:
                shape_ = "none" if row_BS is None else tuple(row_BS.shape)
                raise CreditError(f"{name} row {shape_} for sequences of shape {tuple(experience.sequences.shape)}")
            _check_finite(f"the {name}", row_BS, experience)
            if name == "prefix" and self.args.algo.advantage.estimator in GROUPED:
                # The baseline has taken off the reward what the prompt scores by itself.
                row_BS = row_BS - row_BS.gather(1, experience.action_mask.int().argmax(1, keepdim=True))
            rows_BA[f"{name}_BA"] = row_BS[:, 1:]  # action t is the choice of token t + 1
        for name in rows_BA.keys() & {"attention_BA", "policy_BA", "policy_last_BA"}:
            without_B = without_attention(rows_BA[name], experience.action_mask)
            others_B = experience.info.get("credit_without_attention", without_B)  # of an ensemble's other members
            experience.info["credit_without_attention"] = torch.maximum(without_B, others_B)
        return methods.Evidence(experience.sequences, experience.action_mask, **rows_BA)


def _fitted(
    experiences: list[Experience], members: list[list[methods.Evidence]], score_N: Tensor
) -> list[list[methods.Evidence]]:
    """Each reward model's contributions, of all experiences, times their ``slope``; the metric is its mean."""
    scales = [slope(of_model, score_N) for of_model in zip(*members, strict=True)]
    if not all(scales):
        print(
            "abc_plugin: WARNING: in this batch contributions do not rise with the reward (credit_scale 0): the "
            "reward stays with the last tokens. Where it happens often, audit the reward model (abc-rlhf audit)",
            flush=True,
        )
    for one in experiences:
        one.info["credit_scale"] = torch.full((len(one.index),), sum(scales) / len(scales))
    return [
        [replace(each, contribution_BA=scale * each.contribution_BA) for each, scale in zip(own, scales, strict=True)]
        for own in members
    ]


def special_actions(tokenizer: Any, sequences_BS: Tensor) -> Tensor:
    """Actions whose token is one of the tokenizer's special ones, bool (B, A)."""
    return torch.isin(sequences_BS[:, 1:], torch.tensor(tokenizer.all_special_ids))


def shape_batch(
    shaping: ShapingConfig,
    method: methods.Method,
    members: Sequence[methods.Evidence],
    reward_B: Tensor,
    tokenizer: Any,
    beta: float,
    deviation_B: Tensor | None = None,
) -> Shaped:
    """``credit.shaping.shape`` with ``--shaping.drop``, ``--shaping.entropy_floor`` and ``--shaping.segment``."""
    sequences_BS, mask_BA = members[0].sequences_BS, members[0].action_mask_BA
    return shape(
        method,
        members,
        reward_B,
        beta=beta,
        dropped_BA=dropped(shaping.dropped, mask_BA, special_actions(tokenizer, sequences_BS)),
        entropy_floor=shaping.entropy_floor,
        ends_BA=segment_ends(shaping.segment, tokenizer, sequences_BS, mask_BA),
        deviation_B=deviation_B,
    )


def _by_member(groups: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """Evidence of several groups of workers by reward model; a group's only entry, the policy's, is every model's."""
    count = max(map(len, groups), default=1)
    return [
        {name: row for group in groups for name, row in group[member % len(group)].items()} for member in range(count)
    ]


def _check_rewards(samples: Sequence[Experience], *, from_rollout: bool) -> None:
    """Refuse rollouts whose reward is missing, a list or not finite, before anything is computed from them.

    Raises CreditError naming the sample. OpenRLHF itself logs a failed request and goes on without its reward, and
    takes one element of a token-level reward.
    """
    for index, sample in enumerate(samples):
        where = f"sample {index} of {len(samples)} (prompt {str(sample.prompts[0])[:60]!r})"
        if sample.rewards is None:
            if from_rollout:
                raise CreditError(
                    f"{where} came back without a reward: the reward server or function failed (its message is in the "
                    "log of RolloutRayActor). Nothing was trained on this batch; mend it and go on with "
                    "--ckpt.load_enable"
                )
        elif sample.rewards.numel() != 1:
            raise CreditError(
                f"{where} has a list of {sample.rewards.numel()} rewards: the host takes one scalar reward per "
                "response and would keep a single element of a list. Return their sum under "
                f'"rewards" and the tokens\' shares under extra_logs["{SPANS["attention"]}"] (launch/ray/README.md)'
            )
        elif not torch.isfinite(sample.rewards).all():
            raise NotFinite(f"{where} has the reward {sample.rewards.item()}: nothing was trained on it")


def _check_logs(samples: Sequence[Experience]) -> None:
    """Raises CreditError where not all have the same extra_logs: the host would give some the numbers of others."""
    for index, sample in enumerate(samples):
        if others := samples[0].info.keys() ^ sample.info.keys():
            raise CreditError(
                f"samples 0 and {index} (prompt {str(sample.prompts[0])[:60]!r}) have not the same extra_logs: "
                f"{', '.join(sorted(others))} came with one of them only; send every name with every reply"
            )


def _check_finite(what: str, value: Tensor, experience: Experience) -> None:
    bad_B = ~torch.isfinite(value.reshape(len(experience.index), -1)).all(1)
    if bad_B.any():
        samples = [index for index, bad in zip(experience.index, bad_B.tolist(), strict=True) if bad]
        raise NotFinite(f"{what} of sample {samples[0]} is NaN or infinite ({len(samples)} in its batch)")


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
