"""LoRA and QLoRA in one process: adapters by the host, one base for policy and reference and, if wanted, the critic.

The host puts the adapters on (models/actor.py and models/model.py). Three things it does not: its reference would be
a second copy of the policy's base, its critic's value head is frozen beside the adapters, and what it saves does not
load (adapter_files.py).
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from functools import partial
from typing import Any
from unittest import mock

import openrlhf.models.model as host_models
from openrlhf.models import Actor
from openrlhf.trainer.ray.launcher import ReferenceModelActor
from openrlhf.utils.utils import convert_to_torch_dtype
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoConfig

from abc_plugin.host.install import undecorated
from abc_plugin.host.worker import RestoredCritic, keep_gradients_exact
from abc_plugin.local import lora_files as adapter_files
from abc_plugin.local import shared_base


def rebinds(args: Namespace) -> list[tuple[str, str, type]]:
    """Module, name and value of the host's classes that a run with ``--ds.lora.rank`` replaces."""
    if not args.ds.lora.rank:
        return []
    return [
        ("cli.train_ppo_ray", "ReferenceModelActor", AdapterOffReference),
        ("cli.train_ppo_ray", "CriticModelActor", AdapterCritic),
    ]


class AdapterStrategy:
    """Mixed into the local driver's strategy, through which every model passes to be wrapped and saved."""

    policy: Actor | None = None  # the one that is trained, once it is wrapped

    def prepare(self, *models: Any) -> Any:
        """Host signature. Remembers the policy, keeps the gradients of 4-bit layers exact, and one dtype in training.

        PEFT makes adapters in fp32 beside a head in bf16; ZeRO-2 casts both to bf16 and keeps fp32 masters, ZeRO-3
        takes the parameters as they are, and only of one dtype.
        """
        for entry in models:
            model = entry[0] if isinstance(entry, tuple) else entry
            if repacking := keep_gradients_exact(model):
                self.print(
                    f"abc_plugin: {repacking} 4-bit layers would lose their gradients to bitsandbytes' repacking for "
                    "inference on this CPU: switched off"
                )
            if isinstance(entry, tuple) and self.args.ds.lora.rank:
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.to(convert_to_torch_dtype(self.args.ds.param_dtype))
                self.policy = model if isinstance(model, Actor) else self.policy
        return super().prepare(*models)

    def save_model(self, model: Any, tokenizer: Any, output_dir: str, **kwargs: object) -> None:
        """Host signature. Adapters are saved here, everything else by the host."""
        unwrapped = self._unwrap_model(model)
        if not isinstance(unwrapped, PeftModel):
            super().save_model(model, tokenizer, output_dir, **kwargs)
            return
        merged = self.args.shaping.merge_adapter and isinstance(model, Actor)
        adapter_files.save(unwrapped, tokenizer, output_dir, merged=merged, writes=self.is_rank_0())


class AdapterOffReference(undecorated(ReferenceModelActor)):
    """The host's reference worker on the policy's own weights, with the adapter off: no second copy.

    log pi_ref = log pi of the base alone, to the bit: the same layers in the same dtype, and no adapter in the sum.
    """

    def init_model_from_pretrained(self, strategy: AdapterStrategy, pretrain: str) -> None:
        """Host signature; the policy is loaded before (host: cli/train_ppo_ray.py)."""
        self._setup_distributed(strategy)
        self.model = strategy.policy
        strategy.print(f"abc_plugin: the reference is the policy {pretrain} with its adapter off")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Host signature. The policy's worker sets train mode itself before it trains."""
        self.model.eval()
        with self.model.model.module.disable_adapter():
            return super().forward(*args, **kwargs)


class AdapterCritic(undecorated(RestoredCritic)):
    """The host's critic worker with adapters and a value head that is trained; ``--local.share_base``: shared_base.py.

    The host's LoraConfig names no head, so PEFT freezes it, or puts an adapter on it where all linear layers get one.
    """

    def init_model_from_pretrained(self, strategy: AdapterStrategy, pretrain: str, max_steps: int) -> None:
        """Host signature."""
        config = AutoConfig.from_pretrained(pretrain, trust_remote_code=True)
        head = getattr(config, "value_head_prefix", strategy.args.ds.value_head_prefix)
        with_head = partial(LoraConfig, modules_to_save=[head], exclude_modules=[head])
        shared = strategy.args.shaping.share_base
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(host_models, "LoraConfig", with_head))
            if shared:
                stack.enter_context(shared_base.critic_on(strategy.policy.model.module))
                strategy.print(f"abc_plugin: the critic's base is the policy's, {pretrain}")
            super().init_model_from_pretrained(strategy, pretrain, max_steps)
