"""What every reader of a row promises, whatever recovers it: one interface, nothing left behind, errors by name."""

import copy
import pickle

import pytest
import torch
from cpu_flash import cpu_flash, use_implementation
from recovery_models import LEFT, RIGHT, inputs, tiny, tiny_reward_model
from torch.testing import assert_close

from abc_plugin.attention import attach
from abc_plugin.attention.full_matrix import rerun_eager_row
from abc_plugin.errors import CreditError, UserError

FEED = inputs(RIGHT)
KINDS = {
    "tap": ("llama", "auto", "sdpa"),
    "own weights": ("gptj", "auto", "eager"),
    "re-run": ("llama", "eager-rerun", "sdpa"),
}
UNDER_OTHERS = {
    "tap, flash": ("llama", "auto", "flash_attention_2"),
    "tap, eager": ("llama", "auto", "eager"),
    "re-run, flash": ("llama", "eager-rerun", "flash_attention_2"),
    "re-run, eager": ("llama", "eager-rerun", "eager"),
}


@pytest.fixture(params=KINDS)
def attached(request):
    family, recovery, _ = KINDS[request.param]
    model = tiny(family)
    reader = attach(model, recovery=recovery)
    yield model, reader
    reader.close()


def run(reader, model, mask=RIGHT, **options):
    with torch.no_grad(), reader.record(mask) as recording:
        model(attention_mask=mask, **inputs(mask), **options)
    return recording.row_BS


def same(row, model, mask=RIGHT, layer="last_full"):
    assert_close(row, rerun_eager_row(model, layer, mask, **inputs(mask)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "recovery", "implementation"), (KINDS | UNDER_OTHERS).values())
def test_one_interface_and_nothing_changes_for_the_model(family, recovery, implementation):
    """Output bit for bit the same; all rows and heads, again and again; closed is as never opened."""
    model = use_implementation(tiny(family), implementation)
    parts = {name: dict(part.__dict__) for name, part in model.named_modules()}
    hooks = {name: (len(part._forward_hooks), len(part._forward_pre_hooks)) for name, part in model.named_modules()}
    reader = attach(model, "-2", recovery, per_head=True)
    assert list(model.state_dict()) == list(tiny(family).state_dict())
    for mask in (RIGHT, LEFT):
        feed = inputs(mask)
        with cpu_flash(), torch.no_grad():
            before = model(attention_mask=mask, **feed).last_hidden_state
            with reader.record(mask) as recording:
                during = model(attention_mask=mask, **feed).last_hidden_state
            row = recording.row_BS.clone()
            after = model(attention_mask=mask, **feed).last_hidden_state  # outside the block: not looked at
        assert torch.equal(before, during) and torch.equal(before, after)
        assert recording.fired == 1 and torch.equal(recording.row_BS, row) and row.dtype == torch.float32
        same(row, model, mask, layer="1")
        assert recording.row_BHS.shape == (3, 4, 12) and recording.row_BHS.std(1).max() > 1e-2
        assert_close(recording.row_BHS.mean(1), row)
    reader.close()
    reader.close()
    assert {name: dict(part.__dict__) for name, part in model.named_modules()} == parts
    for name, part in model.named_modules():
        assert (len(part._forward_hooks), len(part._forward_pre_hooks)) == hooks[name]
    with pytest.raises(CreditError, match="closed; attach again"), reader.record(RIGHT):
        pass


@pytest.mark.parametrize("recovery", ["auto", "eager-rerun"])
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
def test_the_score_of_a_reward_model_is_bit_for_bit_its_own(recovery, implementation):
    model = use_implementation(tiny_reward_model(), implementation)
    with cpu_flash(), torch.no_grad():
        expected = model(attention_mask=LEFT, **inputs(LEFT))
        with attach(model, recovery=recovery).record(LEFT) as recording:
            score = model(attention_mask=LEFT, **inputs(LEFT))
    assert torch.equal(score, expected) and score.shape == (3,)
    assert model.model.layers[2].self_attn.config is model.config
    assert model.config._attn_implementation == implementation
    same(recording.row_BS, model, LEFT)


def test_a_reader_that_never_fired_or_fired_twice_says_so(attached):
    model, reader = attached
    with reader.record(RIGHT) as recording:
        tiny()(attention_mask=RIGHT, **FEED)
    with pytest.raises(CreditError, match="layer 2 of 3 .* was not called; .* run the tapped model itself"):
        _ = recording.row_BS
    with torch.no_grad(), reader.record(RIGHT) as recording:
        model(attention_mask=RIGHT, **FEED)
        model(attention_mask=RIGHT, **FEED)
    with pytest.raises(CreditError, match="ran 2 times in one record"):
        _ = recording.row_BS


def test_nested_blocks_are_refused_and_the_outer_one_goes_on(attached):
    model, reader = attached
    with torch.no_grad(), reader.record(RIGHT) as recording:
        with pytest.raises(CreditError, match="recording already"), reader.record(RIGHT):
            pass
        model(attention_mask=RIGHT, **FEED)
    same(recording.row_BS, model)


@pytest.mark.parametrize("where", ["q_proj", "o_proj", "block"])
def test_an_exception_inside_the_block_leaves_no_residue(attached, where):
    model, reader = attached
    name = {"o_proj": "out_proj"}.get(where, where) if "GPTJ" in type(model).__name__ else where
    hook = None
    if where != "block":
        hook = getattr(reader.module, name).register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), reader.record(RIGHT):
        model(attention_mask=RIGHT, **FEED)
        _ = 1 / 0
    if hook:
        hook.remove()
    assert reader.recording is None
    same(run(reader, model), model)


def test_copies_and_pickles_are_not_read_and_can_be(attached):
    model, reader = attached
    with torch.no_grad(), reader.record(RIGHT) as recording:
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin(attention_mask=LEFT, **inputs(LEFT))
        model(attention_mask=RIGHT, **FEED)
    assert recording.fired == 1
    same(recording.row_BS, model)
    same(run(attach(twin, recovery="eager-rerun"), twin, LEFT), model, LEFT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("family", "recovery", "implementation"), (KINDS | UNDER_OTHERS).values())
def test_rows_that_are_not_finite_are_named(family, recovery, implementation, value):
    model = use_implementation(tiny(family), implementation)
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = value
    ids = FEED["input_ids"].masked_fill(FEED["input_ids"] == 63, 1)
    ids[1, 2] = 63
    with cpu_flash(), torch.no_grad(), attach(model, recovery=recovery).record(RIGHT) as recording:
        model(attention_mask=RIGHT, **FEED | {"input_ids": ids})
    with pytest.raises(CreditError, match=r"layer 2 of 3 .* the row of sequence 1 \(of 0 to 2\) is not finite"):
        _ = recording.row_BS


def test_caches_are_refused_when_filled_and_filled_once_when_fresh(attached):
    model, reader = attached
    past = model(input_ids=FEED["input_ids"], use_cache=True).past_key_values
    with pytest.raises(CreditError, match="a cache"), reader.record(RIGHT):
        model(input_ids=FEED["input_ids"], past_key_values=past)
    with torch.no_grad(), reader.record(RIGHT) as recording:
        past = model(attention_mask=RIGHT, use_cache=True, **FEED).past_key_values
    assert past.get_seq_length(2) == 12
    same(recording.row_BS, model)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recovery", ["auto", "eager-rerun"])
def test_gradient_checkpointing_is_read_once_and_gradients_are_the_same(recovery, reentrant):
    def gradient(model):
        model.zero_grad()
        model(attention_mask=RIGHT, **FEED).last_hidden_state.square().sum().backward()
        return model.layers[2].self_attn.q_proj.weight.grad.clone()

    model = tiny().train()
    plain = gradient(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with attach(model, recovery=recovery).record(RIGHT) as recording:
        read = gradient(model)
    assert torch.equal(plain, read) and not recording.row_BS.requires_grad
    same(recording.row_BS, model)


@pytest.mark.parametrize(("family", "recovery", "implementation"), [*KINDS.values(), *UNDER_OTHERS.values()])
def test_train_mode_gives_the_row_before_dropout_or_is_refused(family, recovery, implementation):
    model = use_implementation(tiny(family, attention_dropout=0.5, attn_pdrop=0.5), implementation)
    expected = rerun_eager_row(model, "0", RIGHT, **FEED)
    reader = attach(model, "0", recovery)
    with cpu_flash():
        if family == "gptj":
            with pytest.raises(CreditError, match=r"in train mode its weights are after dropout; call model.eval\(\)"):
                run(reader, model.train())
            return
        assert_close(run(reader, model.train()), expected, rtol=0, atol=1e-6)
    assert all(part.training for part in model.modules())


def test_the_re_run_in_train_mode_leaves_dropout_out_where_the_layer_computes_its_own_weights():
    model = tiny("gptj", attn_pdrop=0.5).train()
    assert_close(run(attach(model, recovery="eager-rerun"), model).sum(1), torch.ones(3))


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def layer_by_layer(model):
    for layer in model.layers:
        layer.compile(backend="eager")
    return model


COMPILED = [("auto", whole, True), ("auto", whole, False), ("auto", in_place, False), ("auto", layer_by_layer, False)]
COMPILED += [("eager-rerun", whole, True), ("eager-rerun", whole, False)]


@pytest.mark.parametrize(("recovery", "compiled_as", "first"), COMPILED)
def test_a_model_compiled_before_or_after_is_read_or_refused(recovery, compiled_as, first):
    model = tiny(num_hidden_layers=1)
    expected = {mask: rerun_eager_row(model, "0", mask, **inputs(mask)) for mask in (RIGHT, LEFT)}
    torch.compiler.reset()
    reader = attach(model, recovery=recovery) if first else None
    compiled = compiled_as(model)
    with torch.no_grad():
        compiled(attention_mask=RIGHT, **FEED)
        reader = reader or attach(model, recovery=recovery)
        for mask, row in expected.items():
            with reader.record(mask) as recording:
                compiled(attention_mask=mask, **inputs(mask))
            if first or recovery == "auto" or recording.fired:
                assert_close(recording.row_BS, row, rtol=0, atol=1e-6)
            else:
                with pytest.raises(CreditError, match="not a graph compiled before"):
                    _ = recording.row_BS
    torch.compiler.reset()


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
@pytest.mark.parametrize("recovery", ["auto", "eager-rerun"])
def test_packed_sequences_recorded_with_a_mask_of_the_stream_are_refused(recovery, implementation):
    model, ones = use_implementation(tiny(), implementation), torch.ones(1, 12, dtype=torch.long)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])
    with cpu_flash(), torch.no_grad(), attach(model, recovery=recovery).record(ones) as recording:
        model(input_ids=FEED["input_ids"][2:], position_ids=positions, use_cache=False)
    with pytest.raises(CreditError, match="position_ids restart, so sequences are packed"):
        _ = recording.row_BS


@pytest.mark.parametrize("recovery", ["auto", "eager-rerun"])
@pytest.mark.parametrize("implementation", ["flex_attention", "paged|flash_attention_2", "paged|sdpa", None])
def test_a_change_of_implementation_is_followed_or_refused_by_name(recovery, implementation):
    model = tiny()
    reader = attach(model, recovery=recovery)
    model.set_attn_implementation("eager")
    same(run(reader, model), model)
    assert reader.implementation == "eager"
    model.config._attn_implementation_internal = implementation
    for use in (lambda: run(reader, model), lambda: attach(model, recovery=recovery)):
        with pytest.raises(UserError, match="of LlamaModel is not supported; use sdpa") as error:
            use()
        assert repr(implementation) in str(error.value)


def test_rows_of_heads_that_were_not_kept_are_refused(attached):
    model, reader = attached
    with torch.no_grad(), reader.record(RIGHT) as recording:
        model(attention_mask=RIGHT, **FEED)
    with pytest.raises(CreditError, match="rows of heads were not kept; attach with per_head=True"):
        _ = recording.row_BHS
