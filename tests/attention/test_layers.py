"""Which layer the setting names, and what is refused by name."""

import warnings

import pytest
import torch
from recovery_models import tiny
from transformers import AlbertConfig, AlbertModel

from abc_plugin.attention.attach import RECOVERIES, attach
from abc_plugin.attention.layers import attention_layers, is_flash, is_full, skeleton, target_layer
from abc_plugin.attention.query_key_tap import AttentionTap
from abc_plugin.errors import UserError


def chosen(model, layer):
    module, index, total = target_layer(model, layer)
    assert module.layer_idx == index
    return index, total


@pytest.mark.parametrize(
    ("layer", "index"), [("last_full", 2), ("last", 2), ("0", 0), ("1", 1), ("2", 2), ("-1", 2), ("-3", 0)]
)
def test_layer_of_a_plain_decoder(layer, index):
    assert chosen(tiny("llama"), layer) == (index, 3)


@pytest.mark.parametrize(("family", "full"), [("gemma3", 1), ("gemma2", 1), ("gpt_oss", 1), ("qwen2_window", 0)])
def test_last_full_skips_sliding_layers(family, full):
    model = tiny(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(model, "last_full") == (full, 3)
    assert chosen(model, "last") == (2, 3)


def test_without_a_full_layer_the_last_is_read_with_a_warning():
    model = tiny("mistral_window")
    assert not any(map(is_full, attention_layers(model).values()))
    with pytest.warns(UserWarning, match="MistralModel has no layer with full attention: layer 2"):
        assert chosen(model, "last_full") == (2, 3)


@pytest.mark.parametrize(
    ("layer", "message"),
    [("3", "has 3 layers, 0 to 2"), ("-4", "has 3 layers"), ("first", "'first' is neither"), ("", "neither")],
)
def test_a_layer_that_does_not_exist_is_refused(layer, message):
    with pytest.raises(UserError, match=message):
        target_layer(tiny(), layer)


def test_layers_beyond_the_configured_number_are_not_run_and_not_chosen():
    model = tiny()
    model.config.num_hidden_layers = 2
    assert chosen(model, "last") == (1, 2)


class Holder:
    def __init__(self, **parts):
        self.__dict__.update(parts)


def test_holders_that_are_no_modules_are_looked_through():
    model = tiny()
    assert target_layer(Holder(model=Holder(module=model)), "last")[0] is model.layers[2].self_attn
    with pytest.raises(UserError, match="Holder holds no torch model"):
        target_layer(Holder(), "last")


@pytest.mark.parametrize(("family", "name"), [("falcon", "FalconModel"), ("bloom", "BloomModel"), ("mpt", "MptModel")])
def test_models_outside_the_attention_interface_are_refused_by_name(family, name):
    with pytest.raises(UserError, match=f"{name} is not supported: .*; use a model such as llama"):
        AttentionTap(tiny(family))


REFUSED = {
    "t5": "T5Model is an encoder-decoder, whose score has no single attention row",
    "bart": "BartModel is an encoder-decoder",
    "mamba2": "Mamba2Model is not supported: it has no attention module",
    "longformer": "LongformerModel is not supported",
    "diffllama": "DiffLlamaModel is not supported: its weights are the difference of two softmaxes",
    "zamba2": "Zamba2Model is not supported: one attention module serves several layers",
}


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.parametrize("recovery", RECOVERIES)
def test_models_without_one_softmax_row_are_refused_by_name_in_every_way(family, recovery):
    with pytest.raises(UserError, match=f"^{REFUSED[family]}.*; use a model such as llama"):
        attach(tiny(family), recovery=recovery)


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(UserError, match="Linear is not supported"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="AlbertModel is not supported"):
        attach(AlbertModel(AlbertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, embedding_size=8)))


def test_a_layer_without_attention_is_refused_with_those_that_have_it():
    model = tiny("jamba")
    assert chosen(model, "last") == chosen(model, "last_full") == (1, 3)
    for layer in ("0", "-1"):
        with pytest.raises(UserError, match=rf"layer {layer} of JambaModel has no softmax attention; .*: \[1\]"):
            target_layer(model, layer)


def test_a_second_attention_module_in_a_layer_is_refused():
    model = tiny()
    model.layers[1].crossattention = type(model.layers[1].self_attn)(model.config, 1)
    with pytest.raises(UserError, match="LlamaModel has two attention modules in layer 1; use a decoder-only"):
        target_layer(model, "last")


def test_flash_attention_is_what_runs_whole_sequences():
    """The row under flash attention is computed from its options; a paged cache has its keys elsewhere."""
    assert all(map(is_flash, ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn")))
    assert not any(map(is_flash, ("paged|flash_attention_2", "flex_attention", "sdpa", "eager", None)))


def test_a_skeleton_has_layers_and_no_weights_or_says_what_does_not_run():
    config = tiny("gemma3").config
    model = skeleton(config, "flash_attention_2", runs_here=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.config._attn_implementation == "flash_attention_2"
    assert target_layer(model, "last_full")[1:] == (1, 3)
    with pytest.raises(UserError, match="^--model M does not run under --ds.attn_implementation magic: .*attn"):
        skeleton(config, "magic", name="--model M")


def test_softcap_is_refused_under_sdpa_which_drops_it():
    model = tiny("gemma2")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(UserError, match="Gemma2Model is not supported under sdpa"):
        AttentionTap(model)
