"""LoRA and QLoRA in one process: adapters by the host, one base for policy and reference and, if wanted, the critic.

The host puts the adapters on (models/actor.py and models/model.py). Three things it does not: its reference would be
a second copy of the policy's base, its critic's value head is frozen beside the adapters, and what it saves does not
load: it copies the whole model, ends on ZeRO-3's 4-bit weights, and names the base by a path relative to wherever it
ran.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import openrlhf.models.model as host_models
import torch
from openrlhf.models import Actor
from openrlhf.trainer.ray.launcher import ReferenceModelActor
from openrlhf.utils.utils import convert_to_torch_dtype
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from abc_plugin.errors import UserError, first_line
from abc_plugin.host.install import undecorated
from abc_plugin.host.model_workers import RestoredCritic, keep_gradients_exact
from abc_plugin.local.distributed_ranks import gather_zero3

MERGED = "merged"  # the merged model's directory, within the adapter's
NF4 = BitsAndBytesConfig(  # as OpenRLHF loads its models with --ds.load_in_4bit (models/actor.py and models/model.py)
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


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
        merge = self.args.shaping.merge_adapter and isinstance(model, Actor)
        save_adapter(unwrapped, tokenizer, output_dir, merge=merge, writes=self.is_rank_0())


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
    """The host's critic worker with adapters and a value head that is trained, on the policy's base if so wanted.

    The host's LoraConfig names no head, so PEFT freezes it, or puts an adapter on it where all linear layers get one.
    """

    def init_model_from_pretrained(self, strategy: AdapterStrategy, pretrain: str, max_steps: int) -> None:
        """Host signature."""
        config = AutoConfig.from_pretrained(pretrain, trust_remote_code=True)
        head = getattr(config, "value_head_prefix", strategy.args.ds.value_head_prefix)
        rebound = {"LoraConfig": partial(LoraConfig, modules_to_save=[head], exclude_modules=[head])}
        if strategy.args.shaping.share_base:
            policy = strategy.policy.model.module
            rebound["_get_critic_model"] = partial(_critic_on_base, policy, host_models._get_critic_model)
            strategy.print(f"abc_plugin: the critic's base is the policy's, {pretrain}")
        # The host's loader is one function: it makes config and class itself, by these names.
        with mock.patch.multiple(host_models, **rebound):
            super().init_model_from_pretrained(strategy, pretrain, max_steps)


def _critic_on_base(policy: PeftModel, host_class: Any, *args: Any) -> type[nn.Module]:
    """The host's class of critic; loading one puts it on the policy's base instead of reading a checkpoint.

    A second adapter in the policy's own modules would have to be switched on and off around every call, and PEFT
    changes requires_grad with it, under the optimizer's hooks. With modules of its own the critic keeps its adapter,
    its value head and its optimizer to itself; only the frozen tensors are the same objects. The host still adds
    adapter and head, and initialises the head: its rule for a critic whose path is the policy's.
    """

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


def base_of(policy: PeftModel) -> PreTrainedModel:
    """The model under the adapter, in modules of its own over the policy's very parameters and buffers."""
    tensors = [*policy.parameters(), *policy.buffers()]
    tensors += [layer.weight.quant_state for layer in quantised_layers(policy)]
    return copy.deepcopy(policy, {id(tensor): tensor for tensor in tensors}).unload()


def policy_description(args: Namespace) -> str:
    """What a run leaves and how plain transformers, with peft installed, loads it: for the run's last lines."""
    output = args.ckpt.output_dir
    if not args.ds.lora.rank:
        return output
    quantised = (
        ', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
        "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)"
    )
    load = f'AutoModelForCausalLM.from_pretrained("{output}", dtype=torch.bfloat16'
    load += quantised if args.ds.load_in_4bit else ""
    merged = f"\nmerged: {output}/{MERGED}, a plain model" if args.shaping.merge_adapter else ""
    return f"{output}, a LoRA adapter of {args.actor.model_name_or_path}; {load}) loads both{merged}"


def save_adapter(model: PeftModel, tokenizer: Any, output_dir: str, *, merge: bool, writes: bool) -> None:
    """Write adapter and tokenizer into ``output_dir``, which PEFT and AutoModelForCausalLM load on the base.

    Every rank calls it, since ZeRO-3 gathers; the one that ``writes`` writes.  merge: also ``output_dir/merged``.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with gather_zero3(trained.values()):
        state = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}
    if writes:
        config = model.peft_config["default"]
        path = Path(config.base_model_name_or_path)
        config.base_model_name_or_path = str(path.resolve() if path.is_dir() else path)
        model.save_pretrained(output_dir, state_dict=state, save_embedding_layers=False)
        tokenizer.save_pretrained(output_dir)
    if merge:
        weights = merged_weights(model, keep=writes)
        if writes:
            _save_merged(model, weights, tokenizer, Path(output_dir) / MERGED)


def merged_weights(model: PeftModel, *, keep: bool = True) -> dict[str, Tensor]:
    """The base's weights with the adapter added, by the base's names, on the CPU.

    W + (alpha / rank) B A, where W is what the policy computed with: for a 4-bit base the dequantised weight, not the
    checkpoint's, since the adapter was trained against the quantisation's error too. Product and sum are each
    rounded to the base's dtype (bf16: by at most 2^-9 of each); the policy, which adds W x and B A x, does not. Its
    logits differ from the merged model's as those of any bf16 model do from its own in fp32.
    """
    state: dict[str, Tensor] = {}
    inside: set[nn.Module] = set()
    for name, layer in model.get_base_model().named_modules():
        if layer in inside:
            continue
        own = layer
        if isinstance(layer, LoraLayer):
            own = layer.get_base_layer()
            inside |= set(layer.modules())
        with gather_zero3(layer.parameters() if own is not layer else own.parameters(recurse=False)):
            for key, tensor in own.named_parameters(recurse=False):
                if key == "weight":
                    delta = None if own is layer else layer.get_delta_weight("default").detach()
                    tensor = plain_weight(own, delta)
                if keep:
                    state[f"{name}.{key}"] = tensor.detach().to("cpu", copy=True)  # gathered memory is used again
    return state


def _save_merged(model: PeftModel, weights: dict[str, Tensor], tokenizer: Any, path: Path) -> None:
    """Write a plain transformers model with these weights; it has no trace of adapter or quantisation."""
    config = copy.deepcopy(model.config)
    config.use_cache = True  # the host switches it off to train
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    if missing := [name for name, parameter in plain.named_parameters() if parameter.is_meta]:
        raise RuntimeError(f"no merged weight for {', '.join(missing)}; the adapter in {path.parent} is complete")
    plain.generation_config = model.generation_config
    plain.save_pretrained(path)
    tokenizer.save_pretrained(path)


def bitsandbytes() -> ModuleType:
    """The package. Raises UserError where it is missing or does not load."""
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"--ds.load_in_4bit needs bitsandbytes ({first_line(error)}); pip install bitsandbytes==0.50.2"
        ) from None
    return bitsandbytes


def quantised_layers(model: nn.Module) -> list[nn.Module]:
    """The model's Linear4bit layers; bitsandbytes is not imported for a model without."""
    return [layer for layer in model.modules() if type(layer._parameters.get("weight")).__name__ == "Params4bit"]


def plain_weight(layer: nn.Module, delta: Tensor | None = None) -> Tensor:
    """The layer's weight as its forward uses it, dequantised where it is in 4 bits, plus ``delta``, added in fp32.

    Returns it in the dtype it computes in, in the shape it had in the checkpoint: GPT-2's are transposed (in, out).
    """
    weight, quantised = layer.weight.detach(), quantised_layers(layer) == [layer]
    if quantised:
        weight = bitsandbytes().functional.dequantize_4bit(weight.data, layer.weight.quant_state)
    if delta is not None:
        weight = (weight.float() + delta.float()).to(weight.dtype)
    return weight.T if quantised and issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D) else weight
