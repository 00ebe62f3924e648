"""``--local.share_base``: the critic on the policy's base, as a second tree of modules over the same tensors.

A second adapter in the policy's own modules would have to be switched on and off around every call, and PEFT changes
requires_grad with it, under the optimizer's hooks. With modules of its own the critic keeps its adapter, its value
head and its optimizer to itself; only the frozen tensors are the same objects.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import openrlhf.models.model as host_models
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from abc_plugin.local.quantised import quantised_layers


def base_of(policy: PeftModel) -> PreTrainedModel:
    """The model under the adapter, in modules of its own over the policy's very parameters and buffers."""
    tensors = [*policy.parameters(), *policy.buffers()]
    tensors += [layer.weight.quant_state for layer in quantised_layers(policy)]
    return copy.deepcopy(policy, {id(tensor): tensor for tensor in tensors}).unload()


@contextlib.contextmanager
def critic_on(policy: PeftModel) -> Iterator[None]:
    """Within the block, a critic that the host loads is made on the policy's base instead.

    The host still adds adapter and head, and initialises the head: its rule for a critic whose path is the policy's.
    """
    host_class = host_models._get_critic_model

    def on_base(*args: Any) -> type[nn.Module]:
        class SharedBaseCritic(host_class(*args)):
            @classmethod
            def from_pretrained(cls, _path: str, *, config: Any, torch_dtype: torch.dtype, **_: object) -> nn.Module:
                with torch.device("meta"):
                    critic = cls(config)
                base = base_of(policy)
                setattr(critic, critic.base_model_prefix, base.base_model)
                head = nn.Linear(config.hidden_size, 1, bias=False, dtype=torch_dtype, device=base.device)
                setattr(critic, critic.value_head_prefix, head)
                critic.mean, critic.std = torch.zeros(1), torch.ones(1)
                return critic

        return SharedBaseCritic

    with mock.patch.object(host_models, "_get_critic_model", on_base):
        yield
