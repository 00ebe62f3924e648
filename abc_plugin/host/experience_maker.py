"""The experience maker: the host's own, with per-token credit in place of the final reward."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from openrlhf.trainer.ppo_utils import experience_maker as host
from openrlhf.trainer.ppo_utils.experience import Experience
from torch import Tensor

from abc_plugin.credit import methods
from abc_plugin.credit.metrics import credit_metrics
from abc_plugin.credit.redistribute import redistribute
from abc_plugin.errors import CreditError
from abc_plugin.host.reward_model import ScoredBatch


class CreditExperienceMaker(host.RemoteExperienceMaker):
    """OpenRLHF's experience maker with ``--reward_shaping``.

    The attention row comes back with the reward, is split off in ``_flatten_results`` and kept on its experience. The
    credit made of it replaces the final reward inside the host's ``compute_reward``, after the host's baselines,
    penalties and clipping, so that the return is unchanged. No host method is copied; with ``none`` or beta 0 the
    host's own runs untouched.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.shaping = self.args.shaping
        self.method = methods.load(self.shaping.method)
        self._attention: list[Tensor] = []

    def _flatten_results(self, refs: list, duplicate_factor: int) -> list:
        results = super()._flatten_results(refs, duplicate_factor)
        if results and isinstance(results[0], ScoredBatch):
            self._attention = [scored.attention_BS for scored in results]
            return [scored.reward_B for scored in results]
        return results

    @torch.no_grad()
    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        """The host's method; each experience also gets ``attention_BS`` where the method needs it.

        Raises CreditError when the reward came without attention.
        """
        experiences = super().make_experience(samples_list)
        if self.shaping.dense and self.method.needs_attention:
            if len(self._attention) != len(experiences):
                raise CreditError(
                    f"--reward_shaping {self.shaping.method}: {len(self._attention)} attention rows for "
                    f"{len(experiences)} experiences. Attention comes from --reward.model_name_or_path; a remote or "
                    "rule-based reward has none: use --reward_shaping uniform or none there"
                )
            for experience, row_BS in zip(experiences, self._attention, strict=True):
                experience.attention_BS = row_BS
        self._attention = []
        return experiences

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        """The host's method, with its ``compute_reward`` replaced for the length of the call.

        Raises CreditError when an experience has no attention row, when a row does not fit its experience, or when the
        host does not ask for the reward of every experience exactly once.
        """
        if not self.shaping.dense:
            return super().compute_advantages_and_returns(experiences)
        # The host hands compute_reward the experience's own action_mask object: that ties credit to experience.
        waiting = {id(experience.action_mask): (experience, self._weight(experience)) for experience in experiences}
        stock = host.compute_reward

        def compute_reward(
            r: Tensor, kl_coef: float, kl: Tensor, action_mask: Tensor, reward_clip_range: tuple
        ) -> Tensor:
            if id(action_mask) not in waiting:
                raise CreditError("OpenRLHF asked for the reward of an experience without credit, or asked twice")
            experience, weight_BA = waiting.pop(id(action_mask))
            return self._shaped_reward(stock, experience, weight_BA, r, kl_coef, kl, reward_clip_range)

        with mock.patch.object(host, "compute_reward", compute_reward):
            experiences = super().compute_advantages_and_returns(experiences)
        if waiting:
            raise CreditError(f"OpenRLHF skipped the reward of {len(waiting)} experiences: their credit is lost")
        return experiences

    def _weight(self, experience: Experience) -> Tensor:
        """The method's weights (B, A); takes the attention row off the experience."""
        row_BS = vars(experience).pop("attention_BS", None)
        if self.method.needs_attention and (row_BS is None or row_BS.shape != experience.sequences.shape):
            found = "none" if row_BS is None else tuple(row_BS.shape)
            raise CreditError(f"attention row {found} for sequences of shape {tuple(experience.sequences.shape)}")
        row_BA = None if row_BS is None else row_BS[:, 1:]  # action t is the choice of token t + 1
        return self.method.weights(methods.Evidence(experience.sequences, experience.action_mask, row_BA))

    def _shaped_reward(
        self,
        stock: Callable,
        experience: Experience,
        weight_BA: Tensor,
        reward_B: Tensor,
        kl_coef: float,
        kl_BA: Tensor,
        clip_range: tuple,
    ) -> Tensor:
        """Credit plus the host's KL penalty (B, A), fp32; both parts come from the host's own compute_reward."""
        mask_BA, kl_BA = experience.action_mask, kl_BA.float()
        penalty_BA = stock(torch.zeros_like(reward_B), kl_coef, kl_BA, mask_BA, None)
        if not torch.isfinite(penalty_BA).all():
            raise CreditError("the KL penalty has NaN or infinite entries: the policy or the reference has diverged")
        clipped_B = stock(reward_B, 0.0, torch.zeros_like(kl_BA), mask_BA, clip_range).sum(1)
        dense_BA = redistribute(clipped_B, weight_BA, mask_BA, beta=self.shaping.beta)
        special_BA = torch.isin(experience.sequences[:, 1:], torch.tensor(self.tokenizer.all_special_ids))
        experience.info |= credit_metrics(weight_BA, dense_BA, clipped_B, mask_BA, special_BA)
        return dense_BA + penalty_BA
