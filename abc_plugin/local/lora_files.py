"""Saving what LoRA trained: a PEFT directory and, on request, the merged model.

The host's own saving copies the whole model, ends on ZeRO-3's 4-bit weights, and names the base by a path that is
relative to wherever it ran.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from abc_plugin.local.quantised import plain_weight
from abc_plugin.local.zero3 import gathered

MERGED = "merged"  # the merged model's directory, within the adapter's


def saved(args: Namespace) -> str:
    """What a run leaves and how plain transformers, with peft installed, loads it: for the run's last lines."""
    output = args.ckpt.output_dir
    if not args.ds.lora.rank:
        return output
    quantised = (
        ', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
        "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)"
    )
    load = f'AutoModelForCausalLM.from_pretrained("{output}", dtype=torch.bfloat16'
    merged = f"\nmerged: {output}/{MERGED}, a plain model" if args.shaping.merge_adapter else ""
    load += quantised if args.ds.load_in_4bit else ""
    return f"{output}, a LoRA adapter of {args.actor.model_name_or_path}; {load}) loads both{merged}"


def save(model: PeftModel, tokenizer: Any, output_dir: str, *, merged: bool, writes: bool) -> None:
    """Write adapter and tokenizer into ``output_dir``, which PEFT and AutoModelForCausalLM load on the base.

    Every rank calls it, since ZeRO-3 gathers; the one that ``writes`` writes.  merged: also ``output_dir/merged``.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with gathered(trained.values()):
        state = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}
    if writes:
        config = model.peft_config["default"]
        path = Path(config.base_model_name_or_path)
        config.base_model_name_or_path = str(path.resolve() if path.is_dir() else path)
        model.save_pretrained(output_dir, state_dict=state, save_embedding_layers=False)
        tokenizer.save_pretrained(output_dir)
    if merged:
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
        with gathered(layer.parameters() if own is not layer else own.parameters(recurse=False)):
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
