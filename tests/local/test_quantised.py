"""4-bit weights on the CPU: the gradients that pass through them, and the weights that they stand for."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from abc_plugin.host.import_openrlhf import import_host

import_host()

from abc_plugin.host.model_workers import keep_gradients_exact  # noqa: E402
from abc_plugin.local.lora import NF4, merged_weights, plain_weight, quantised_layers  # noqa: E402

MODELS = {  # widths that are multiples of 64, the only ones that bitsandbytes can repack
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.1,
            tie_word_embeddings=True,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2, n_positions=32, initializer_range=0.1)
    ),
}
IDS = torch.randint(64, (4, 24), generator=torch.Generator().manual_seed(1))
repacks = pytest.mark.skipif(
    "avx512_bf16" not in Path("/proc/cpuinfo").read_text(), reason="bitsandbytes repacks on AVX512-BF16 CPUs only"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of the models above."""
    paths = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        paths[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(paths[name])
    return paths


def adapted(path, *, quantised, dtype=torch.bfloat16):
    """The model with an adapter that does something, the same for every dtype."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=NF4 if quantised else None)
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).bfloat16().to(dtype)
    return model


def dequantised(model, path, dtype):
    """The adapted model on plain weights of the values that ``model`` has in 4 bits."""
    plain = adapted(path, quantised=False, dtype=dtype)
    for ours, theirs in zip(layers(plain), layers(model), strict=True):
        ours.weight.data = plain_weight(theirs).to(dtype)
    return plain


def layers(model):
    return [module for name, module in model.named_modules() if name.endswith("base_layer")]


def gradients(model):
    """Of all adapters, as one vector; a parameter that gets none counts as zero."""
    model.train()
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    parts = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in parts])


def evaluate(model):
    model.eval()
    with torch.no_grad():
        return model(IDS).logits.float()


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_gradients_after_generation_are_those_of_the_dequantised_model(saved):
    model = adapted(saved["llama"], quantised=True)
    keep_gradients_exact(model)
    exact = gradients(dequantised(model, saved["llama"], torch.float32))
    noise = distance(gradients(dequantised(model, saved["llama"], torch.bfloat16)), exact)
    before = gradients(model)
    evaluate(model)
    after = gradients(model)
    assert torch.equal(after, before)
    assert distance(after, exact) < 1.5 * noise < 0.05


@repacks
def test_without_the_workaround_the_gradients_are_lost(saved):
    model = adapted(saved["llama"], quantised=True)
    exact = gradients(dequantised(model, saved["llama"], torch.float32))
    assert distance(gradients(model), exact) < 0.05
    evaluate(model)
    assert distance(gradients(model), exact) > 0.3
    assert keep_gradients_exact(adapted(saved["llama"], quantised=True)) == 21  # what the run's log counts


@pytest.mark.parametrize("name", MODELS)
def test_the_merged_weights_give_the_logits_of_the_adapted_model(saved, name):
    model = adapted(saved[name], quantised=False, dtype=torch.float32)
    wanted = evaluate(model)
    plain = AutoModelForCausalLM.from_pretrained(saved[name], dtype=torch.float32)
    assert (evaluate(plain) - wanted).abs().max() > 0.5  # the adapter does something
    missing, unexpected = plain.load_state_dict(merged_weights(model), strict=False)
    assert missing in ([], ["lm_head.weight"])  # tied
    assert not unexpected
    torch.testing.assert_close(evaluate(plain), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_4_bit_base_is_merged_as_it_was_trained_on(saved, name):
    """Within two roundings to bf16: of the dequantised weight plus the adapter's product, not of the checkpoint's."""
    model = adapted(saved[name], quantised=True)
    keep_gradients_exact(model)
    assert quantised_layers(model) == layers(model)
    merged = merged_weights(model)
    exact = merged_weights(dequantised(model, saved[name], torch.float32))
    checkpoint = merged_weights(adapted(saved[name], quantised=False, dtype=torch.float32))
    for key, weight in exact.items():
        torch.testing.assert_close(merged[key].float(), weight, rtol=2**-9, atol=2**-8 * weight.abs().max().item())
    far = [key for key, weight in exact.items() if (checkpoint[key] - weight).norm() > 0.05 * weight.norm()]
    assert len(far) == len(layers(model))
    plain = AutoModelForCausalLM.from_pretrained(saved[name], dtype=torch.bfloat16)
    plain.load_state_dict(merged, strict=False)
    noise = distance(evaluate(model), evaluate(dequantised(model, saved[name], torch.float32)))
    assert distance(evaluate(plain), evaluate(model)) < 2 * noise < 0.04
