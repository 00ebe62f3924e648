"""OpenRLHF's trainers on Ray with per-token credit: only their experience maker is another."""

from __future__ import annotations

from unittest import mock

from openrlhf.trainer import ppo_trainer, ppo_trainer_async

from abc_plugin.errors import CreditError
from abc_plugin.host.install import undecorated
from abc_plugin.host.maker import CreditExperienceMaker
from abc_plugin.host.recorder import Recorder


class WithCredit:
    """Mixed into a trainer of the host: while it is made, the experience maker's name stands for ours."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        # The host's constructor makes the maker by this name and has no argument for another.
        with mock.patch.object(ppo_trainer, "RemoteExperienceMaker", CreditExperienceMaker):
            super().__init__(*args, **kwargs)
        if not isinstance(self.experience_maker, CreditExperienceMaker):
            raise CreditError(f"{type(self).__name__} made no CreditExperienceMaker: this OpenRLHF is not supported")
        self.experience_maker.recorder = Recorder(self)

    def train_step(self, rollout_samples: list, global_step: int) -> tuple[dict, int]:
        """The host's step; the recorder is told its number, counted from 1."""
        self.experience_maker.recorder.step = global_step + 1
        return super().train_step(rollout_samples, global_step)


class CreditPPOTrainer(WithCredit, undecorated(ppo_trainer.PPOTrainer)):
    """The synchronous trainer."""


class CreditTrainingActor(WithCredit, undecorated(ppo_trainer_async.TrainingActor)):
    """The training half of the asynchronous trainer."""


class CreditPPOTrainerAsync(undecorated(ppo_trainer_async.PPOTrainerAsync)):
    """The asynchronous trainer; it makes its training half in its own process, where the name is rebound again."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        from abc_plugin.host.install import install

        install(None)
        super().__init__(*args, **kwargs)
