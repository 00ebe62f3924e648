"""Models and their layers: unwrapped, made without weights, and the layer that the setting ``layer`` names."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from abc_plugin.errors import UserError

REMEDY = "use a model such as llama, qwen2, qwen3, mistral, gemma3, gpt2 or opt"

# Attention modules that bypass transformers' attention interface and hand out the weights they compute themselves
# (their flash variants are other classes, and compute none). Only classes of the parity table belong here.
OUTSIDE = (
    "BloomAttention",
    "CodeGenAttention",
    "DisentangledSelfAttention",  # of deberta and deberta_v2
    "FalconAttention",
    "GPTJAttention",
    "GPTNeoSelfAttention",
    "MptAttention",
)

UNSOUND = {
    "DiffLlamaAttention": "its weights are the difference of two softmaxes, so there is no single row",
    "Zamba2Attention": "one attention module serves several layers",
    "ZambaAttention": "one attention module serves several layers",
}
FULL = ("full_attention", "attention", "hybrid")  # layer types of transformers' configs; hybrid: beside a linear part


def unwrap(model: Any) -> nn.Module:
    """The first nn.Module along ``.module`` and ``.model``: a holder that is no module itself may be passed."""
    inner = model
    while not isinstance(inner, nn.Module):
        inner = getattr(inner, "module", None) or getattr(inner, "model", None)
        if inner is None:
            kind = type(model).__name__
            raise UserError(f"{kind} holds no torch model under .module or .model; pass the model itself")
    return inner


def pretrained(model: Any) -> nn.Module:
    """The transformers model inside any wrappers (DeepSpeed, PEFT, a class of the user's), else the outermost one."""
    root = unwrap(model)
    return next((part for part in root.modules() if isinstance(part, PreTrainedModel)), root)


def model_name(model: Any) -> str:
    """Class name of the transformers model inside any wrappers."""
    return type(pretrained(model)).__name__


def score_head(model: Any) -> tuple[nn.Module, nn.Module]:
    """(the module that owns the scalar head, the head); of OpenRLHF's models, and of sequence classifiers.

    Raises UserError where there is none.
    """
    for owner in unwrap(model).modules():
        head = owner._modules.get(vars(owner).get("value_head_prefix", "score"))  # wrappers hand on what is not theirs
        if head is not None and getattr(head, "out_features", 1) == 1:
            return owner, head
    raise UserError(f"{model_name(model)} has no scalar score head: its score cannot be read at every token")


def skeleton(
    config: PretrainedConfig,
    implementation: str | None = None,
    *,
    name: str = "the model",
    runs_here: bool = True,
    auto: Any = AutoModel,
) -> PreTrainedModel:
    """A model of this structure without weights, on the meta device, to be asked for its layers and readers.

    implementation: of the attention, None for transformers' choice.  name: what errors call the model, e.g. its flag
    and path.  runs_here: whether this machine will run it, so that the implementation's package must be installed.
    auto: the transformers class that makes it.  Raises UserError where transformers cannot make it.
    """
    made = implementation if runs_here else "eager"
    try:
        with torch.device("meta"):
            model = auto.from_config(config, attn_implementation=made, trust_remote_code=True)
    except (ValueError, ImportError) as error:
        reason = str(error).split(". ")[0]
        raise UserError(f"{name} does not run under --ds.attn_implementation {implementation}: {reason}") from None
    if implementation is not None:
        model.config._attn_implementation = implementation
    return model


def attention_layers(model: Any, *, outside: bool = False) -> dict[int, nn.Module]:
    """The attention modules that a forward runs, by layer index, ascending.

    transformers gives each decoder attention its class name and ``layer_idx``; layers beyond the config's
    num_hidden_layers are never run.  outside: take the modules of OUTSIDE too, in order where they have no index.
    Raises UserError when there is none, or two for one layer, on the modules of UNSOUND and on encoder-decoders.
    """
    name, config = model_name(model), getattr(pretrained(model), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder, whose score has no single attention row; {REMEDY}")
    layers: dict[int, nn.Module] = {}
    for part in unwrap(model).modules():
        index = getattr(part, "layer_idx", None)
        if outside and type(part).__name__ in OUTSIDE:
            index = len(layers) if index is None else index
        elif index is None or "Attention" not in type(part).__name__ or not hasattr(part, "config"):
            continue
        if type(part).__name__ in UNSOUND:
            raise UserError(f"{name} is not supported: {UNSOUND[type(part).__name__]}; {REMEDY}")
        if index >= _layers_run(part, config):
            continue
        if index in layers:
            raise UserError(f"{name} has two attention modules in layer {index}; use a decoder-only model")
        layers[index] = part
    if not layers:
        raise UserError(f"{name} is not supported: it has no attention module of transformers' usual form; {REMEDY}")
    return dict(sorted(layers.items()))


def _layers_run(attention: nn.Module, config: Any) -> int:
    return getattr(attention, "config", config).num_hidden_layers


def forward_code(attention: nn.Module) -> Any:
    """The function that the module's class runs, without decorators."""
    return inspect.unwrap(type(attention).forward)


def uses_interface(attention: nn.Module) -> bool:
    """Whether the module calls its attention function through transformers' attention interface."""
    return "ALL_ATTENTION_FUNCTIONS" in forward_code(attention).__code__.co_names


def is_flash(implementation: str | None) -> bool:
    """Whether an attention implementation is flash attention on whole sequences.

    Kernels of the hub, such as "kernels-community/flash-attn", are; those on a paged cache, "paged|…", are not.
    """
    return implementation is not None and "flash" in implementation and "|" not in implementation


def check_implementation(implementation: str | None, config: Any, model: str) -> None:
    """UserError where the row of a model under this implementation would not be that of its attention."""
    if implementation not in ("eager", "sdpa") and not is_flash(implementation):
        raise UserError(f"attention {implementation!r} of {model} is not supported; use sdpa or flash_attention_2")
    if implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None:
        raise UserError(f"{model} is not supported under sdpa, which drops its softcap; use flash_attention_2")


def mixing_layer(model: Any) -> str | None:
    """A layer that carries a state or a convolution from token to token, by its class or kind; None where none does.

    Attention is told by masks or positions where packed samples begin; these layers are not (transformers 5.15 hands
    its own kernels no bounds, and OpenRLHF gives it positions only), so that samples would mix.
    """
    for part in unwrap(model).modules():
        if any(isinstance(child, nn.Conv1d) and child.groups > 1 for child in part.children()):  # one per channel
            return type(part).__name__
    types = getattr(getattr(pretrained(model), "config", None), "layer_types", None) or ()
    return "linear attention" if "linear_attention" in types else None


def is_full(attention: nn.Module) -> bool:
    """Whether a layer's queries see every earlier token (no sliding window, no chunks, not linear)."""
    config = getattr(attention, "config", None)
    types = getattr(config, "layer_types", None)
    if types is not None:
        return types[attention.layer_idx] in FULL
    if getattr(attention, "attention_type", None) == "local":  # gpt_neo
        return False
    config_window = getattr(config, "sliding_window", getattr(config, "attention_window_size", None))
    return getattr(attention, "sliding_window", config_window) is None


def target_layer(model: Any, layer: str = "last_full", *, outside: bool = False) -> tuple[nn.Module, int, int]:
    """(attention module, its layer index from 0, number of layers) for a ``--shaping.layer`` string.

    "last_full": the last layer with full attention; with none, the last one, and a warning.  "last": the last one.
    An index such as "3" or "-2": that layer.  outside: see ``attention_layers``.
    Raises UserError when the index is out of range or the layer has no single softmax attention, and as
    ``attention_layers`` does.
    """
    layers = attention_layers(model, outside=outside)
    total = _layers_run(next(iter(layers.values())), getattr(pretrained(model), "config", None))
    if layer in ("last_full", "last"):
        full = [index for index, part in layers.items() if is_full(part)]
        if layer == "last_full" and not full:
            warnings.warn(
                f"{model_name(model)} has no layer with full attention: layer {max(layers)} is read, and tokens "
                "outside its window get no credit",
                stacklevel=2,
            )
        index = full[-1] if layer == "last_full" and full else max(layers)
        return layers[index], index, total
    try:
        index = int(layer)
    except ValueError:
        raise UserError(f"layer {layer!r} is neither last_full, last nor a layer index such as -1") from None
    if not -total <= index < total:
        raise UserError(f"layer {layer} is out of range: {model_name(model)} has {total} layers, 0 to {total - 1}")
    index %= total
    if index not in layers:
        raise UserError(
            f"layer {layer} of {model_name(model)} has no softmax attention; layers with: {sorted(layers)}"
        )
    return layers[index], index, total
