"""``--local.train_layers``: only the top is trained, and what the frozen layers make of a completion is made once."""

import copy

import pytest
import torch
from conftest import local_flags
from local_runs import scalars, untimed, weights
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig, Qwen3Config

from abc_plugin.config import split_flags
from abc_plugin.errors import UserError
from abc_plugin.host.import_openrlhf import import_host

import_host()
from abc_plugin.local import flag_checks, frozen_layers  # noqa: E402

SMALL = {"vocab_size": 50, "num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1, intermediate_size=32, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, intermediate_size=32, head_dim=8),
    "gpt2": GPT2Config(vocab_size=50, n_layer=4, n_embd=16, n_head=2, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
    "gptj": GPTJConfig(vocab_size=50, n_layer=4, n_embd=16, n_head=2, rotary_dim=4),  # its layers return tuples
}
IDS = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])


def model_of(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def logits(model, ids=IDS, mask=MASK):
    return model(ids, attention_mask=mask, position_ids=positions(mask)).logits[mask.bool()]


def count_runs(model, layer):
    """A list that grows by one each time that part of a layer runs."""
    runs = []
    model.get_submodule(layer).register_forward_hook(lambda *_: runs.append(1))
    return runs


FIRST = {
    "llama": "model.layers.0.input_layernorm",
    "qwen3": "model.layers.0.input_layernorm",
    "gpt2": "transformer.h.0.ln_1",
    "gptj": "transformer.h.0.ln_1",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_known_rows_skip_the_frozen_layers_and_change_nothing(name):
    plain, model = model_of(name), model_of(name)
    trunk, runs = frozen_layers.Trunk(model, 2), count_runs(model, FIRST[name])
    assert torch.equal(logits(model), logits(plain))
    assert (len(runs), len(trunk.states)) == (1, 3)
    # the same rows in another order and between more padding, as another micro-batch has them
    order = [2, 0, 1]
    ids, mask = (torch.nn.functional.pad(rows[order], (2, 1)) for rows in (IDS, MASK))
    torch.testing.assert_close(logits(model, ids, mask), logits(plain, ids, mask), rtol=0, atol=1e-6)
    assert len(runs) == 1
    logits(model, ids.clone().index_fill_(1, torch.tensor([5]), 7), mask)
    assert len(runs) == 2, "a row that is not known runs"


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_whole_model_for_what_is_trained(name):
    plain, model = model_of(name), model_of(name)
    frozen_layers.freeze(plain, 2)
    frozen_layers.freeze(model, 2)
    frozen_layers.Trunk(model, 2)
    logits(model)
    for one in (plain, model):
        logits(one).square().sum().backward()
    trained = {parameter for parameter, value in model.named_parameters() if value.requires_grad}
    layers = {parameter.split(".")[2] for parameter in trained if ".layers." in parameter or ".h." in parameter}
    assert layers == {"2", "3"}
    assert any("norm" in p or "ln_f" in p for p in trained) and not any("embed" in p or "wte" in p for p in trained)
    assert ("lm_head.weight" in trained) == (name in ("qwen3", "gptj")), (
        "a head tied to the embedding is frozen with it"
    )
    for parameter, value in plain.named_parameters():
        mine = model.get_parameter(parameter).grad
        assert (mine is None) == (value.grad is None) == (parameter not in trained)
        if mine is not None:
            torch.testing.assert_close(mine, value.grad)


def test_states_are_shared_by_equal_weights_only():
    policy, reference, other = model_of("llama"), model_of("llama"), model_of("llama")
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    trunks = tuple(frozen_layers.Trunk(model, 2) for model in (policy, reference, other))
    for at, trunk in enumerate(trunks):
        trunk.share(trunks[:at])
    runs = count_runs(reference, FIRST["llama"])
    logits(policy)
    assert torch.equal(logits(reference), logits(model_of("llama"))) and not runs
    assert trunks[2].states is not trunks[0].states
    policy.model.layers[2].mlp.up_proj.weight.data += 1  # a trained layer may differ
    later = frozen_layers.Trunk(policy, 2)
    later.share(trunks)
    assert later.states is trunks[0].states


def test_generation_passes_through():
    plain, model = model_of("llama"), model_of("llama")
    trunk = frozen_layers.Trunk(model, 2)
    logits(model)
    settings = {"attention_mask": MASK[:2], "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS[:2], **settings), plain.generate(IDS[:2], **settings))
    assert len(trunk.states) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_what_generation_passed_is_kept(name):
    plain, model = model_of(name), model_of(name)
    trunk = frozen_layers.Trunk(model, 2)
    prompt, mask = IDS[:2, :4], MASK[:2, :4]
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    sequences = [out[0, 2:].tolist(), out[1, :7].tolist()]  # the second ended two tokens before the other
    for one in (model, plain):  # a model without frozen layers has none to keep
        frozen_layers.keep_generated(one, sequences, [2, 0])
    runs = count_runs(model, FIRST[name])
    whole = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
    whole[1, 7:] = 0
    found, wanted = (
        torch.zeros(2, 9, 50).masked_scatter_(whole.bool()[..., None], logits(one, out, whole))
        for one in (model, plain)
    )
    found[0, 8] = wanted[0, 8]  # after the last token, which was drawn and never read
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert not runs and len(trunk.states) == 2


def test_a_model_whose_layers_are_no_list():
    model = copy.deepcopy(model_of("llama"))
    model.model.layers = model.model.layers[:3]
    with pytest.raises(UserError, match="LlamaForCausalLM has no list of its 4 layers"):
        frozen_layers.layers_of(model)


@pytest.fixture(scope="module")
def runs(tiny, local_runs, tmp_path_factory):
    """The same run with kept states and without, in fp32."""
    outs = {}
    for variant in ("unchanged", "without_kept_states"):
        outs[variant] = tmp_path_factory.mktemp(variant)
        changes = {"local.train_layers": 1, "reward_shaping": "abc", "train.max_epochs": 2}
        local_runs.done(local_flags(tiny, outs[variant], **changes), variant=(variant, None))
    return outs


def test_kept_states_change_no_figure_of_a_run(runs):
    kept, plain = (untimed(scalars(out)) for out in runs.values())
    assert set(kept) == set(plain)
    for name, events in kept.items():
        assert [value for _, value in events] == pytest.approx([v for _, v in plain[name]], rel=1e-4, abs=1e-5), name
    kept, plain = (weights(out) for out in runs.values())
    for name, value in kept.items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=2e-5)


def test_only_the_top_layer_is_trained(runs, tiny):
    before, after = weights(tiny / "policy"), weights(runs["unchanged"])
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert {name for name in before if ".layers.1." in name and "proj" in name} <= changed
    assert all(".layers.1." in name or name == "model.norm.weight" for name in changed)
    assert "LlamaForCausalLM: the last 1 of 2 layers are trained" in (runs["unchanged"] / "run.log").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local.train_layers": 2}, "--actor.model_name_or_path .*policy has 2 layers; give fewer, or leave"),
        ({"local.train_layers": -1}, "--local.train_layers -1: give the number of layers, or 0"),
        ({"local.train_layers": 1, "ds.lora.rank": 4}, "1 does not go with --ds.lora.rank: an adapter freezes"),
        (
            {"local.train_layers": 1, "reward_shaping": "abc_d", "shaping.layer": 0},
            "--reward_shaping abc_d reads the policy's layer 0, which --local.train_layers 1 freezes .*; train 2, or",
        ),
        ({"local.train_layers": 1, "ds.zero_stage": 3}, "1 does not go with --ds.zero_stage 3, which splits; use 2"),
        (
            {"local.train_layers": 1, "actor.gradient_checkpointing_enable": True},
            "does not go with --actor.gradient_checkpointing_enable: checkpointed layers run again",
        ),
    ],
)
def test_settings_that_do_not_fit(tiny, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        shaping, words = split_flags(local_flags(tiny, tmp_path / "out", **changes))
        frozen_layers.check_settings(flag_checks.parse_for_one_process(words, shaping)[0], shaping)
