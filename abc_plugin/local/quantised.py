"""4-bit weights (NF4 by bitsandbytes): the only file that imports it."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from abc_plugin.errors import UserError

NF4 = BitsAndBytesConfig(  # as OpenRLHF loads its models with --ds.load_in_4bit (models/actor.py and models/model.py)
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def bitsandbytes() -> ModuleType:
    """The package. Raises UserError where it is missing or does not load."""
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"--ds.load_in_4bit needs bitsandbytes ({str(error).splitlines()[0]}); pip install bitsandbytes==0.50.2"
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
