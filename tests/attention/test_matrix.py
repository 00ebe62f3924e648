"""Rows read off full matrices, by the fallback and the eager re-run: what they survive and what they refuse."""

import copy
import pickle

import pytest
import torch
from cpu_flash import cpu_flash, use_implementation
from recovery_models import LEFT, RIGHT, inputs, tiny, tiny_reward_model
from torch.testing import assert_close

from abc_plugin.attention import attach
from abc_plugin.attention.layers import OUTSIDE, attention_layers
from abc_plugin.attention.matrix import EagerRerun, OwnWeights, rerun_eager_row
from abc_plugin.errors import CreditError, UserError
from abc_plugin.tools.bench.families import FAMILIES

FEED = inputs(RIGHT)
READERS = {"fallback": ("gptj", OwnWeights), "re-run": ("llama", EagerRerun)}


@pytest.fixture(params=READERS)
def watched(request):
    family, reader = READERS[request.param]
    model = tiny(family)
    reader = reader(model)
    yield model, reader
    reader.close()


def run(reader, model, mask=RIGHT):
    with torch.no_grad(), reader.record(mask) as recording:
        model(attention_mask=mask, **inputs(mask))
    return recording.row_BS


def same(row, model, mask=RIGHT, layer="last_full"):
    assert_close(row, rerun_eager_row(model, layer, mask, **inputs(mask)), rtol=0, atol=1e-6)


def test_every_module_of_the_fallback_is_in_the_parity_table():
    models = [tiny(name) for name, family in FAMILIES.items() if family.exact == ("eager",) or name == "falcon"]
    kinds = {type(part).__name__ for model in models for part in attention_layers(model, outside=True).values()}
    assert kinds == set(OUTSIDE)


def test_outside_a_block_nothing_is_read_and_close_removes_the_hooks(watched):
    model, reader = watched
    with torch.no_grad():
        with reader.record(RIGHT) as recording:
            model(attention_mask=RIGHT, **FEED)
        row = recording.row_BS.clone()
        model(attention_mask=LEFT, **inputs(LEFT))
    assert recording.fired == 1 and torch.equal(recording.row_BS, row)
    assert len(reader.module._forward_hooks) == len(reader.module._forward_pre_hooks) == 1
    reader.close()
    assert not reader.module._forward_hooks and not reader.module._forward_pre_hooks


def test_a_reader_that_never_fired_or_fired_twice_says_so(watched):
    model, reader = watched
    with reader.record(RIGHT) as recording:
        pass
    with pytest.raises(CreditError, match="layer 2 of 3 .* was not called"):
        _ = recording.row_BS
    with torch.no_grad(), reader.record(RIGHT) as recording:
        model(attention_mask=RIGHT, **FEED)
        model(attention_mask=RIGHT, **FEED)
    with pytest.raises(CreditError, match="ran 2 times in one record"):
        _ = recording.row_BS
    with reader.record(RIGHT), pytest.raises(CreditError, match="recording already"), reader.record(RIGHT):
        pass


def test_a_row_that_is_not_finite_is_refused(watched):
    model, reader = watched
    with torch.no_grad():
        reader.module.q_proj.weight.fill_(torch.nan)
    with pytest.raises(CreditError, match="row of sequence 0, 1, 2 .* is not finite"):
        run(reader, model)


def test_an_exception_in_the_forward_leaves_no_residue(watched):
    model, reader = watched
    broken = reader.module.v_proj.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(reader, model)
    broken.remove()
    same(run(reader, model), model)


def test_copies_and_pickles_of_a_watched_model_are_not_read(watched):
    model, reader = watched
    with torch.no_grad(), reader.record(RIGHT) as recording:
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin(attention_mask=LEFT, **inputs(LEFT))
        model(attention_mask=RIGHT, **FEED)
    assert recording.fired == 1
    same(recording.row_BS, model)


def test_packed_split_and_cached_sequences_are_refused(watched):
    model, reader = watched
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]]), "input_ids": FEED["input_ids"][2:]}
    message = r"ran on \(1, 12\) tokens, the recorded mask is \(3, 12\): packed"
    with pytest.raises(CreditError, match=message), torch.no_grad(), reader.record(RIGHT):
        model(use_cache=False, **packed)
    past = model(input_ids=FEED["input_ids"], use_cache=True).past_key_values
    with pytest.raises(CreditError, match="a cache; run whole sequences without it"), reader.record(RIGHT):
        model(input_ids=FEED["input_ids"], past_key_values=past)
    with pytest.raises(CreditError, match="no ring or tensor parallelism"), reader.record(RIGHT, ring_group=object()):
        pass


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_one_stream_of_packed_sequences_is_refused_by_the_re_run(implementation):
    model = use_implementation(tiny(), implementation)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])
    ones = torch.ones(1, 12, dtype=torch.long)
    with cpu_flash(), torch.no_grad(), EagerRerun(model).record(ones) as recording:
        model(input_ids=FEED["input_ids"][2:], position_ids=positions, use_cache=False)
    with pytest.raises(CreditError, match="position_ids restart, so sequences are packed"):
        _ = recording.row_BS


def test_a_fresh_cache_is_filled_once(watched):
    model, reader = watched
    with torch.no_grad(), reader.record(RIGHT) as recording:
        past = model(attention_mask=RIGHT, use_cache=True, **FEED).past_key_values
    assert past.get_seq_length(2) == 12
    same(recording.row_BS, model)


def test_the_fallback_refuses_train_mode_and_the_re_run_leaves_dropout_out():
    model = tiny("gptj", attn_pdrop=0.5)
    reader = OwnWeights(model)
    model.train()
    with pytest.raises(CreditError, match=r"in train mode its weights are after dropout; call model.eval\(\)"):
        run(reader, model)
    for family, dropout in (("gptj", "attn_pdrop"), ("llama", "attention_dropout")):
        model = tiny(family, **{dropout: 0.5})
        expected = rerun_eager_row(model, "0", RIGHT, **FEED)
        with torch.no_grad(), EagerRerun(model.train(), "0").record(RIGHT) as recording:
            torch.manual_seed(0)
            model(attention_mask=RIGHT, **FEED)
        if family == "llama":  # gptj also drops embeddings, so that what its layer is given differs
            assert_close(recording.row_BS, expected, rtol=0, atol=1e-6)
        assert all(part.training for part in model.modules())
        assert_close(recording.row_BS.sum(1), torch.ones(3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_read_once(reentrant):
    model = tiny().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with EagerRerun(model).record(RIGHT) as recording:
        model(attention_mask=RIGHT, **FEED).last_hidden_state.sum().backward()
    same(recording.row_BS, model)
    assert not recording.row_BS.requires_grad


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
def test_the_score_of_a_reward_model_is_bit_for_bit_the_same_under_the_re_run(implementation):
    model = use_implementation(tiny_reward_model(), implementation)
    with cpu_flash(), torch.no_grad():
        expected = model(attention_mask=LEFT, **inputs(LEFT))
        reader = EagerRerun(model)
        with reader.record(LEFT) as recording:
            score = model(attention_mask=LEFT, **inputs(LEFT))
    assert torch.equal(score, expected)
    assert model.model.layers[2].self_attn.config is model.config
    assert model.config._attn_implementation == implementation
    same(recording.row_BS, model, LEFT)


def test_falcons_score_moves_by_rounding_only():
    model, mask = tiny("falcon"), RIGHT
    with torch.no_grad():
        expected = model(attention_mask=mask, **FEED).last_hidden_state
        with attach(model).record(mask) as recording:
            read = model(attention_mask=mask, **FEED).last_hidden_state
    assert_close(read, expected, rtol=0, atol=2e-6)
    same(recording.row_BS, model)


@pytest.mark.parametrize("reader", [OwnWeights, EagerRerun])
def test_what_cannot_be_exact_is_refused_by_name(reader):
    with pytest.raises(UserError, match="FalconModel with alibi is not supported: .* counts its alibi twice"):
        reader(tiny("falcon_rw"))
    model = tiny("gemma2" if reader is EagerRerun else "llama")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(UserError, match="drops its softcap|LlamaModel is not supported: LlamaAttention hands out no"):
        reader(model)


@pytest.mark.parametrize("implementation", ["flex_attention", "paged|sdpa", None])
def test_a_change_of_implementation_is_followed_or_refused(implementation):
    model = tiny()
    reader = EagerRerun(model)
    model.set_attn_implementation("eager")
    same(run(reader, model), model)
    model.config._attn_implementation_internal = implementation
    with pytest.raises(UserError, match="of LlamaModel is not supported; use sdpa"):
        run(reader, model)


@pytest.mark.parametrize("first", [True, False])
def test_a_compiled_model_is_read_or_refused(watched, first):
    model, reader = watched
    torch.compiler.reset()
    if not first:
        reader.close()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(attention_mask=RIGHT, **FEED)
        reader = reader if first else type(reader)(model)
        with reader.record(RIGHT) as recording:
            compiled(attention_mask=RIGHT, **FEED)
    if first or recording.fired:
        same(recording.row_BS, model)
    else:
        with pytest.raises(CreditError, match="not a graph compiled before"):
            _ = recording.row_BS
    torch.compiler.reset()
