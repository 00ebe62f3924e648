"""OpenRLHF's trainers on Ray with per-token credit: only their experience maker is another."""

from __future__ import annotations

import math

from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

from abc_plugin.errors import NotFinite
from abc_plugin.host.completion_recorder import Recorder
from abc_plugin.host.experience_maker import CreditExperienceMaker
from abc_plugin.host.install import undecorated
from abc_plugin.text.remote_credit import check_reply


class CheckedReplies(SamplesGenerator):
    """The host's samples generator, which names what is wrong with a reply of a reward function, server or agent."""

    def __init__(self, host_generator: SamplesGenerator) -> None:
        vars(self).update(vars(host_generator))

    def _process_response_into_experience(self, response: dict, **generate_kwargs: object) -> Experience:
        """Host signature. Raises CreditError as ``check_reply``."""
        check_reply(response)
        return super()._process_response_into_experience(response, **generate_kwargs)


class WithCheckedReplies:
    """Mixed into what generates samples: the host's synchronous trainer, and the asynchronous one's other half."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.samples_generator = CheckedReplies(self.samples_generator)


class WithCredit:
    """Mixed into a trainer of the host: its experience maker is made again, as ours, of the same parts."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        host = self.experience_maker
        groups = (host.actor_model_group, host.critic_model_group, host.reward_model_group, host.initial_model_group)
        self.experience_maker = CreditExperienceMaker(*groups, host.kl_ctl, host.strategy, host.tokenizer)
        self.experience_maker.recorder = Recorder(self)

    def train_step(self, rollout_samples: list, global_step: int) -> tuple[dict, int]:
        """The host's step; the recorder is told its number, counted from 1. Raises NotFinite naming a metric."""
        self.experience_maker.recorder.step = global_step + 1
        status, step = super().train_step(rollout_samples, global_step)
        # In fp16 DeepSpeed lowers its loss scale until the gradients' norm is finite, and skips those updates.
        scaled = self.args.ds.param_dtype == "fp16"
        for name, value in status.items():
            if isinstance(value, float) and not math.isfinite(value) and not (scaled and name.endswith("grad_norm")):
                raise NotFinite(f"{name} of step {step} is {value}: the models are no longer what was trained")
        return status, step


class CreditPPOTrainer(WithCheckedReplies, WithCredit, undecorated(ppo_trainer.PPOTrainer)):
    """The synchronous trainer."""


class CreditTrainingActor(WithCredit, undecorated(ppo_trainer_async.TrainingActor)):
    """The training half of the asynchronous trainer."""


class CheckedSamplesActor(WithCheckedReplies, undecorated(ppo_trainer_async.GenerateSamplesActor)):
    """The generating half of the asynchronous trainer."""


class CreditPPOTrainerAsync(undecorated(ppo_trainer_async.PPOTrainerAsync)):
    """The asynchronous trainer; it makes its halves in its own process, where the names are rebound again."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        from abc_plugin.host.install import install

        install(None)
        super().__init__(*args, **kwargs)
