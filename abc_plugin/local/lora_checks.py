"""What can be refused of LoRA and 4-bit settings before a model is loaded, and what they will train."""

from __future__ import annotations

import warnings
from argparse import Namespace

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError
from abc_plugin.host.checks import refuse_adapter, refuse_without_lora
from abc_plugin.host.model_files import reward_models
from abc_plugin.local.quantised import bitsandbytes

ALL = "all-linear"


def check_settings(args: Namespace, shaping: ShapingConfig) -> None:
    """The settings fit each other. Raises UserError naming the first that does not, and the remedy."""
    ds, lora = args.ds, args.ds.lora
    refuse_adapter(args)
    if ds.load_in_4bit and not lora.rank:
        raise UserError("--ds.load_in_4bit freezes the weights, so there is nothing to train; add --ds.lora.rank 16")
    if ds.load_in_4bit and ds.param_dtype != "bf16":
        raise UserError(f"--ds.param_dtype {ds.param_dtype} does not go with --ds.load_in_4bit; use bf16")
    if ds.load_in_4bit:
        bitsandbytes()
    if not lora.rank:
        refuse_without_lora(shaping, "without --ds.lora.rank; add --ds.lora.rank 16")
        for name, default in (("alpha", 16), ("dropout", 0), ("target_modules", ALL)):
            if getattr(lora, name) != default:
                raise UserError(
                    f"--ds.lora.{name} {_words(getattr(lora, name))} means nothing without --ds.lora.rank; add "
                    "--ds.lora.rank 16"
                )
        return
    if args.ref.offload:
        raise UserError("--ref.offload means nothing with --ds.lora.rank: the reference is the policy; leave it out")
    if lora.rank < 0 or lora.alpha < 1 or not 0 <= lora.dropout < 1:
        raise UserError(
            f"--ds.lora.rank {lora.rank}, --ds.lora.alpha {lora.alpha}, --ds.lora.dropout {lora.dropout}: rank and "
            "alpha must be 1 or more, dropout in [0, 1)"
        )
    if args.train.enable_ema:
        raise UserError("--train.enable_ema averages a model without adapters; leave it out with --ds.lora.rank")
    if shaping.share_base:
        _check_share(args)


def _check_share(args: Namespace) -> None:
    policy, critic = args.actor.model_name_or_path, args.critic.model_name_or_path
    if critic is None:
        raise UserError(
            f"--local.share_base: there is no critic with --algo.advantage.estimator "
            f"{args.algo.advantage.estimator}; leave it out"
        )
    if critic != policy:
        raise UserError(
            f"--local.share_base: the critic {critic} is another model than the policy; add "
            f"--critic.model_name_or_path {policy}"
        )
    if args.ds.zero_stage == 3:
        raise UserError("--local.share_base does not go with --ds.zero_stage 3, which splits the base; use 2")


def check_targets(args: Namespace) -> None:
    """Adapters find layers in policy and critic, and 4-bit weights in every model; says what is trained.

    Raises UserError for a model that is quantised already or has no layer that can be, and for
    ``--ds.lora.target_modules`` that match nothing in a model, or of which one matches in none.
    """
    if not args.ds.lora.rank:
        return
    trained = {f"--{name}.model_name_or_path": getattr(args, name).model_name_or_path for name in ("actor", "critic")}
    if args.ds.load_in_4bit:
        frozen = dict.fromkeys(reward_models(args), "--reward.model_name_or_path")
        for path, name in (frozen | {path: name for name, path in trained.items() if path}).items():
            _check_quantisable(name, path, _skeleton(path, causal=False))
    layers = [
        layer
        for name, path in trained.items()
        if path
        for layer in _check_adapter(args, name, path, _skeleton(path, causal="actor" in name))
    ]
    for target in [] if args.ds.lora.target_modules == ALL else args.ds.lora.target_modules:
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):  # PEFT's rule
            raise UserError(f"--ds.lora.target_modules {target} matches no layer of policy or critic")


def _skeleton(path: str, causal: bool) -> PreTrainedModel:
    """The model's modules without their weights."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    with torch.device("meta"):
        return (AutoModelForCausalLM if causal else AutoModel).from_config(config, trust_remote_code=True)


def _linear(model: nn.Module) -> dict[str, nn.Module]:
    """What transformers quantises (integrations/bitsandbytes.py): plain linear layers, and GPT-2's transposed ones."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }


def _check_quantisable(name: str, path: str, skeleton: PreTrainedModel) -> None:
    if before := getattr(skeleton.config, "quantization_config", None):
        method = before.get("quant_method") if isinstance(before, dict) else before.quant_method
        raise UserError(f"{name} {path} is quantised already ({method}); give the unquantised model, as the others")
    held = sum(layer.weight.numel() for layer in _linear(skeleton).values())
    if not held:
        raise UserError(
            f"{name} {path} ({type(skeleton).__name__}) has no linear layer that bitsandbytes could quantise; leave "
            "--ds.load_in_4bit out"
        )
    print(f"abc_plugin: {held / skeleton.num_parameters():.0%} of the weights of {path} in 4 bits, the rest in bf16")


def _check_adapter(args: Namespace, name: str, path: str, skeleton: PreTrainedModel) -> list[str]:
    """The layers that get an adapter."""
    targets, lora = args.ds.lora.target_modules, args.ds.lora
    tied = skeleton.get_output_embeddings() if skeleton.config.tie_word_embeddings else None
    linear = sorted({layer.rsplit(".", 1)[-1] for layer, module in _linear(skeleton).items() if module is not tied})
    remedy = f"its linear layers are {', '.join(linear)}"
    try:
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = get_peft_model(skeleton, config)
    except ValueError as error:
        reason = "match no layer" if "not found" in str(error) or not targets else str(error).split(". ")[0]
        raise UserError(f"--ds.lora.target_modules {_words(targets)} of {name} {path}: {reason}; {remedy}") from None
    matched = model.base_model.targeted_module_names
    if tied is not None and any(tied in skeleton.get_submodule(layer).modules() for layer in matched):
        raise UserError(
            f"--ds.lora.target_modules {_words(targets)} of {name} {path}: its output layer is tied to its embedding; "
            f"{remedy}"
        )
    trained, total = model.get_nb_trainable_parameters()
    print(f"abc_plugin: LoRA on {len(matched)} layers of {path}: {trained:,} of {total:,} parameters are trained")
    return matched


def _words(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
