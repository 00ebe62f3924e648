"""The one way in: what it chooses, what it says about that, and what it refuses."""

import pytest
import torch
from cpu_flash import use_implementation
from recovery_models import RIGHT, inputs, tiny
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    Gemma3Config,
    Gemma3Model,
    LlamaConfig,
    ModernBertConfig,
)

from abc_plugin.attention import attach
from abc_plugin.errors import UserError
from abc_plugin.tools.bench.model_families import COMMON


@pytest.mark.parametrize(
    ("family", "recovery", "description"),
    [
        ("llama", "auto", "attention row of layer 2 of 3 (LlamaAttention, sdpa)"),
        ("llama", "tap", "attention row of layer 2 of 3 (LlamaAttention, sdpa)"),
        ("llama", "eager-rerun", "attention row of layer 2 of 3 (LlamaAttention, sdpa, eager re-run)"),
        ("bloom", "auto", "attention row of layer 2 of 3 (BloomAttention, eager, read from its own weights)"),
        ("bloom", "eager-rerun", "attention row of layer 2 of 3 (BloomAttention, eager, eager re-run)"),
        ("gemma3", "eager-rerun", "attention row of layer 1 of 3 (Gemma3Attention, sdpa, eager re-run)"),
    ],
)
def test_describe_says_what_is_in_use_and_on_which_layer(family, recovery, description):
    reader = attach(tiny(family), recovery=recovery)
    assert reader.describe() == description
    reader.close()


def test_a_recovery_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="recovery 'rerun' is none of auto, tap, eager-rerun"):
        attach(tiny(), recovery="rerun")


def test_the_tap_alone_refuses_what_it_cannot_reach_by_name():
    with pytest.raises(UserError, match="GPTJModel is not supported: .* bypasses transformers' attention interface"):
        attach(tiny("gptj"), recovery="tap")


READERS = [("llama", "auto"), ("llama", "eager-rerun"), ("gptj", "auto"), ("gptj", "eager-rerun")]


SMALL = {**COMMON, "num_labels": 1}
HEADS = {
    "mask": None,
    "pad_token": LlamaConfig(**SMALL),
    "cls": ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2, local_attention=4, classifier_pooling="cls"),
    "cls, fallback": DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p"], pooler_hidden_size=32),
}


@pytest.mark.parametrize("rule", [name for name in HEADS if HEADS[name]])
@pytest.mark.parametrize("recovery", ["auto", "eager-rerun"])
def test_the_row_is_that_of_the_token_whose_state_the_models_own_head_reads(rule, recovery):
    """Found by gradient: the score depends on the base model's last hidden state at one token only."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(HEADS[rule]).eval()
    ids = inputs(RIGHT)["input_ids"].clamp(min=3) * RIGHT
    ids[0, 8] = 0  # the last real token has the padding's id, as where pad == eos
    states = []
    hook = model.base_model.register_forward_hook(lambda *call: states.append(call[2].last_hidden_state))
    score = model(input_ids=ids, attention_mask=RIGHT).logits
    hook.remove()
    [gradient] = torch.autograd.grad(score.sum(), states[0])
    read = gradient.abs().sum(2).bool()
    assert torch.equal(read.sum(1), torch.ones(3, dtype=torch.long))
    reader = attach(model, recovery=recovery, row=rule.split(",")[0])
    with torch.no_grad(), reader.record(RIGHT, ids) as recording:
        model(input_ids=ids, attention_mask=RIGHT)
    assert torch.equal(recording.position_B, read.long().argmax(1))
    reader.close()
    use_implementation(model, "eager")
    weights = model(input_ids=ids, attention_mask=RIGHT, output_attentions=True).attentions[reader.layer_index]
    expected = weights[torch.arange(3), :, recording.position_B].mean(1)
    assert_close(recording.row_BS, expected, rtol=0, atol=1e-6)


def test_an_unknown_row_is_refused_by_all():
    for family, recovery in READERS:
        with pytest.raises(UserError, match="row 'first' is none of mask, pad_token, cls"):
            attach(tiny(family), recovery=recovery, row="first")


def test_a_model_of_images_and_text_is_read_in_its_text_part():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    text = {**COMMON, "layer_types": ["full_attention"] * 3}
    model = Gemma3Model._from_config(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()
    for recovery in ("auto", "eager-rerun"):
        reader = attach(model, recovery=recovery)
        assert "layer 2 of 3 (Gemma3Attention" in reader.describe()
        with torch.no_grad(), reader.record(RIGHT) as recording:
            model(attention_mask=RIGHT, **inputs(RIGHT))
        assert_close(recording.row_BS.sum(1), torch.ones(3))
        reader.close()
