"""How the tap attaches, what it survives, and what it refuses rather than give a wrong row."""

import copy
import gc
import pickle
import weakref
from contextlib import ExitStack

import pytest
import torch
from cpu_flash import cpu_flash, use_implementation
from recovery_models import LEFT, RIGHT, inputs, tiny, tiny_reward_model
from torch.testing import assert_close
from transformers import AttentionInterface, BitsAndBytesConfig, LlamaForSequenceClassification, LlamaModel
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from abc_plugin.attention.matrix import rerun_eager_row
from abc_plugin.attention.positions import score_positions
from abc_plugin.attention.tap import AttentionTap
from abc_plugin.errors import CreditError, UserError

EAGER = modeling_llama.eager_attention_forward
FEED = inputs(RIGHT)


@pytest.fixture(autouse=True)
def restored():
    """Every test leaves transformers' tables as it found them."""
    yield
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert ALL_ATTENTION_FUNCTIONS["flash_attention_2"] is flash_attention_forward
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
    assert modeling_llama.eager_attention_forward is EAGER


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def attach():
    taps = []

    def attach(model, layer="last_full", **options):
        taps.append(AttentionTap(model, layer, **options))
        return taps[-1]

    yield attach
    for tap in taps:
        tap.close()


def expect(model, layer="last_full", mask=RIGHT, feed=None):
    return rerun_eager_row(model, layer, mask, **(inputs(mask) if feed is None else feed))


def run(tap, model, mask=RIGHT, **options):
    with torch.no_grad(), tap.record(mask) as recording:
        model(attention_mask=mask, **inputs(mask), **options)
    return recording.row_BS


def same(row, expected):
    assert_close(row, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_the_models_output_is_bit_identical_with_and_without_the_tap(model, attach, implementation, mask):
    use_implementation(model, implementation)
    with cpu_flash(), torch.no_grad():
        before = model(attention_mask=mask, **inputs(mask)).last_hidden_state
        with attach(model).record(mask) as recording:
            during = model(attention_mask=mask, **inputs(mask)).last_hidden_state
        after = model(attention_mask=mask, **inputs(mask)).last_hidden_state
    assert torch.equal(before, during) and torch.equal(before, after)
    assert recording.fired == 1


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
def test_close_restores_everything(model, implementation):
    use_implementation(model, implementation)
    before = {name: dict(part.__dict__) for name, part in model.named_modules()}
    state = list(model.state_dict())
    tap = AttentionTap(model)
    assert list(model.state_dict()) == state
    tap.close()
    tap.close()
    assert {name: dict(part.__dict__) for name, part in model.named_modules()} == before
    with pytest.raises(CreditError, match="closed; attach again"), tap.record(RIGHT):
        pass


def test_describe_names_layer_class_and_implementation(model, attach):
    tap = attach(model, "1")
    assert (tap.layer_index, tap.num_layers, tap.implementation) == (1, 3, "sdpa")
    assert tap.describe() == "attention row of layer 1 of 3 (LlamaAttention, sdpa)"


def test_one_tap_records_again_and_again_and_layers_differ(model, attach):
    tap = attach(model, "0")
    for mask in (RIGHT, LEFT, RIGHT):
        same(run(tap, model, mask), expect(model, "0", mask))
    assert not torch.allclose(run(tap, model), expect(model, "1"), atol=1e-2)


def test_outside_a_block_the_tap_is_idle(model, attach):
    tap = attach(model)
    with torch.no_grad(), tap.record(RIGHT) as recording:
        model(attention_mask=RIGHT, **FEED)
    row = recording.row_BS.clone()
    model(attention_mask=LEFT, **inputs(LEFT))
    assert recording.fired == 1 and torch.equal(recording.row_BS, row)


def test_two_models_at_once(attach):
    one, two = tiny(), tiny("llama", num_key_value_heads=4)
    tap_one, tap_two = attach(one), attach(two, "0")
    with torch.no_grad(), tap_one.record(RIGHT) as first, tap_two.record(LEFT) as second:
        one(attention_mask=RIGHT, **FEED)
        two(attention_mask=LEFT, **inputs(LEFT))
    same(first.row_BS, expect(one))
    same(second.row_BS, expect(two, "0", LEFT))
    with torch.no_grad(), tap_two.record(RIGHT) as recording:
        tap_one.close()
        two(attention_mask=RIGHT, **FEED)
    same(recording.row_BS, expect(two, "0"))  # still watched after the other has gone


def test_several_taps_on_one_model_each_get_their_row(model, attach):
    taps = {layer: attach(model, layer) for layer in ("0", "last_full", "2")}
    with ExitStack() as blocks, torch.no_grad():
        recordings = {layer: blocks.enter_context(tap.record(RIGHT)) for layer, tap in taps.items()}
        model(attention_mask=RIGHT, **FEED)
    for layer, recording in recordings.items():
        same(recording.row_BS, expect(model, layer))


def test_a_tap_that_never_fired_says_so(model, attach):
    with attach(model).record(RIGHT) as recording:
        tiny()(attention_mask=RIGHT, **FEED)
    with pytest.raises(CreditError, match="layer 2 of 3 .* was not called; .* run the tapped model itself"):
        _ = recording.row_BS


def test_two_forwards_in_one_block_are_refused(model, attach):
    with torch.no_grad(), attach(model).record(RIGHT) as recording:
        model(attention_mask=RIGHT, **FEED)
        model(attention_mask=RIGHT, **FEED)
    with pytest.raises(CreditError, match="ran 2 times in one record"):
        _ = recording.row_BS


def test_nested_blocks_are_refused_and_the_outer_one_goes_on(model, attach):
    tap = attach(model)
    with torch.no_grad(), tap.record(RIGHT) as recording:
        with pytest.raises(CreditError, match="recording already"), tap.record(RIGHT):
            pass
        model(attention_mask=RIGHT, **FEED)
    same(recording.row_BS, expect(model))


@pytest.mark.parametrize("when", ["before the layer", "inside the layer", "after the forward"])
def test_an_exception_inside_the_block_leaves_no_residue(model, attach, when):
    def fail(*args):
        raise ZeroDivisionError

    tap = attach(model)
    part = {"before the layer": model.layers[0], "inside the layer": model.layers[2].self_attn.o_proj}.get(when)
    hook = part.register_forward_pre_hook(fail) if part else None
    with pytest.raises(ZeroDivisionError), torch.no_grad(), tap.record(RIGHT):
        model(attention_mask=RIGHT, **FEED)
        fail()
    if hook:
        hook.remove()
    assert tap.recording is None
    same(run(tap, model), expect(model))


def test_an_exception_in_the_attention_function_leaves_no_residue(model, attach):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    AttentionInterface.register("sdpa", broken)
    try:
        tap = attach(model)
        with pytest.raises(ZeroDivisionError), tap.record(RIGHT):
            model(attention_mask=RIGHT, **FEED)
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    same(run(tap, model), expect(model))


def test_copies_of_a_tapped_model_carry_no_tap(model, attach):
    tap = attach(model)
    with torch.no_grad(), tap.record(RIGHT) as recording:
        twin = copy.deepcopy(model)
        twin(attention_mask=RIGHT, **FEED)
        model(attention_mask=RIGHT, **FEED)
    assert recording.fired == 1
    own = attach(twin, "0")
    same(run(own, twin), expect(twin, "0"))
    thawed = pickle.loads(pickle.dumps(model))
    same(run(attach(thawed), thawed), expect(model))


class Counting:
    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("around_the_watch", [False, True])
def test_a_foreign_override_after_the_tap_is_watched_and_kept(model, attach, around_the_watch):
    tap = attach(model)
    with tap.record(RIGHT):
        foreign = Counting(ALL_ATTENTION_FUNCTIONS["sdpa"] if around_the_watch else sdpa_attention_forward)
        ALL_ATTENTION_FUNCTIONS["sdpa"] = foreign
    try:
        for calls in (3, 6):
            same(run(tap, model), expect(model))
            assert foreign.calls == calls and ALL_ATTENTION_FUNCTIONS["sdpa"] is foreign
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_a_foreign_registration_after_the_tap_takes_effect(model, attach):
    tap = attach(model)
    foreign = Counting(sdpa_attention_forward)
    AttentionInterface.register("sdpa", foreign)
    try:
        same(run(tap, model), expect(model))
        assert foreign.calls == 3
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)


def test_a_change_of_implementation_after_the_tap_is_followed(model, attach):
    tap = attach(model)
    model.set_attn_implementation("eager")
    same(run(tap, model), expect(model))
    assert tap.implementation == "eager"
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UserError, match="'flex_attention' of LlamaModel is not supported"):
        run(tap, model)


def test_a_tap_that_is_dropped_unclosed_leaves_nothing_and_frees_its_model():
    model = tiny()
    run(AttentionTap(model), model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_block_that_ends_before_the_one_it_encloses_leaves_nothing(model, attach):
    outer, inner = attach(model).record(RIGHT), attach(model, "0").record(RIGHT)
    first, second = outer.__enter__(), inner.__enter__()
    with torch.no_grad():
        model(attention_mask=RIGHT, **FEED)
        outer.__exit__(None, None, None)
        model(attention_mask=RIGHT, **FEED)
    inner.__exit__(None, None, None)
    assert (first.fired, second.fired) == (1, 2)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
def test_train_mode_gives_the_row_before_dropout(attach, implementation):
    model = tiny("llama", attention_dropout=0.5)
    expected = expect(model, "0")
    use_implementation(model, implementation).train()
    same(expect(model, "0"), expected)  # the definition is without dropout too
    with cpu_flash():
        same(run(attach(model, "0"), model), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_records_the_forward_not_the_recomputation(model, attach, reentrant):
    expected = expect(model)
    calls = Counting(sdpa_attention_forward)
    AttentionInterface.register("sdpa", calls)
    try:
        tap = attach(model)
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with tap.record(RIGHT) as recording:
            model(attention_mask=RIGHT, **FEED).last_hidden_state.sum().backward()
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert calls.calls == 6  # each of three layers ran twice
    same(recording.row_BS, expected)
    assert model.layers[0].self_attn.q_proj.weight.grad is not None


def test_gradients_are_the_same_with_the_tap(model, attach):
    def gradient():
        model.zero_grad()
        model(attention_mask=RIGHT, **FEED).last_hidden_state.square().sum().backward()
        return model.layers[2].self_attn.q_proj.weight.grad.clone()

    plain = gradient()
    with attach(model).record(RIGHT) as recording:
        tapped = gradient()
    assert torch.equal(plain, tapped) and not recording.row_BS.requires_grad


def test_autocast_leaves_the_row_in_fp32(model, attach):
    with torch.autocast("cpu", torch.bfloat16):
        row = run(attach(model), model)
    assert row.dtype == torch.float32
    assert_close(row.sum(1), torch.ones(3), rtol=0, atol=1e-6)  # a bf16 softmax misses 1 by 1e-3
    assert (row - expect(model)).abs().sum(1).max() < 0.05


def test_lora_adapters_are_part_of_the_row(model, attach):
    peft = pytest.importorskip("peft")
    plain = expect(model)
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    tap = attach(wrapped)
    assert (run(tap, wrapped) - plain).abs().max() > 1e-2
    same(run(tap, wrapped), expect(wrapped))
    with wrapped.disable_adapter():
        same(run(tap, wrapped), plain)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_right_padding_that_the_model_is_not_told_of_is_still_behind_the_causal_mask(model, attach, implementation):
    use_implementation(model, implementation)
    with cpu_flash(), torch.no_grad(), attach(model).record(RIGHT) as recording:
        model(input_ids=FEED["input_ids"])
    same(recording.row_BS, expect(model))


def test_eager_without_a_mask_is_not_causal(model, attach):
    def drop_mask(module, args, options):
        return args, {**options, "attention_mask": None}

    model.layers[2].self_attn.register_forward_pre_hook(drop_mask, with_kwargs=True)
    row = run(attach(use_implementation(model, "eager")), model)
    same(row, expect(model))
    assert (row > 0).all()


class Engine(torch.nn.Module):
    """As DeepSpeed's: the model under ``.module``."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
def test_a_reward_model_shaped_like_openrlhfs_in_an_engine(attach, implementation):
    model = use_implementation(tiny_reward_model(), implementation)
    engine = Engine(model)
    with cpu_flash(), torch.no_grad():
        expected = model(attention_mask=LEFT, **inputs(LEFT))
        with attach(engine).record(LEFT) as recording:
            reward = engine(attention_mask=LEFT, **inputs(LEFT))
    assert torch.equal(reward, expected) and reward.shape == (3,)
    same(recording.row_BS, expect(model, mask=LEFT))


PACKED = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]]), "input_ids": FEED["input_ids"][2:]}
FULL = torch.ones(1, 12, dtype=torch.long)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
@pytest.mark.parametrize("cache", [True, False])
def test_packed_sequences_recorded_with_a_mask_of_the_stream_are_refused(model, attach, implementation, cache):
    use_implementation(model, implementation)
    with cpu_flash(), torch.no_grad(), attach(model).record(FULL) as recording:
        model(use_cache=cache, **PACKED)
    with pytest.raises(CreditError, match="position_ids restart, so sequences are packed"):
        _ = recording.row_BS


def test_one_padded_sequence_is_not_taken_for_a_packed_one(model, attach):
    tap = attach(model)
    for mask in (LEFT[1:2], RIGHT[1:2], torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0]])):
        same(run(tap, model, mask), expect(model, mask=mask))


def test_keys_from_an_earlier_forward_are_refused(model, attach):
    past = model(input_ids=FEED["input_ids"], use_cache=True).past_key_values
    with pytest.raises(CreditError, match="24 keys for 12 tokens: a cache"), attach(model).record(RIGHT):
        model(input_ids=FEED["input_ids"], past_key_values=past)


def test_a_position_bias_is_refused(model, attach):
    with pytest.raises(CreditError, match="position_bias was passed"), attach(model).record(RIGHT):
        model(attention_mask=RIGHT, position_bias=torch.zeros(3, 4, 12, 12), **FEED)


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def layer_by_layer(model):
    for layer in model.layers:
        layer.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("compiled_as", "tap_first"), [(whole, True), (whole, False), (in_place, False), (layer_by_layer, False)]
)
def test_a_model_compiled_before_or_after_the_tap_gives_the_row(attach, tap_first, compiled_as):
    model = tiny(num_hidden_layers=1)
    expected = {mask: expect(model, mask=mask) for mask in (RIGHT, LEFT)}
    torch.compiler.reset()
    tap = attach(model) if tap_first else None
    compiled = compiled_as(model)
    with torch.no_grad():
        compiled(attention_mask=RIGHT, **FEED)
        tap = tap or attach(model)
        for mask, row in expected.items():
            with tap.record(mask) as recording:
                compiled(attention_mask=mask, **inputs(mask))
            same(recording.row_BS, row)
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["flash_attention_2", "eager"])
def test_rows_of_each_head(attach, family, implementation):
    model = use_implementation(tiny(family), "eager")
    weights = []
    hook = model.layers[2].self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    with torch.no_grad():
        model(attention_mask=LEFT, **inputs(LEFT))
    hook.remove()
    tap = attach(use_implementation(model, implementation), "last", per_head=True)
    with cpu_flash(), torch.no_grad(), tap.record(LEFT) as recording:
        model(attention_mask=LEFT, **inputs(LEFT))
    same(recording.row_BHS, weights[0][:, :, -1])
    assert recording.row_BHS.shape == (3, 4, 12)
    assert torch.equal(recording.row_BS, recording.row_BHS.mean(1))


def test_rows_of_heads_that_were_not_kept_are_refused(model, attach):
    with torch.no_grad(), attach(model).record(RIGHT) as recording:
        model(attention_mask=RIGHT, **FEED)
    with pytest.raises(CreditError, match="rows of heads were not kept; attach with per_head=True"):
        _ = recording.row_BHS


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_the_row_of_a_sequence_classifier_is_where_it_reads_its_score(attach, mask):
    base = tiny(pad_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification(base.config)
    classifier.num_labels, classifier.score = 1, torch.nn.Linear(32, 1, bias=False)
    classifier.model = base
    ids = inputs(mask)["input_ids"].clone()
    ids.scatter_(1, score_positions(mask)[:, None], 0)  # each response ends in EOS, whose id is the padding's
    tap = attach(classifier.eval(), row="pad_token")
    with torch.no_grad(), tap.record(mask, ids) as recording:
        score = classifier(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    position = score_positions(mask) - 1
    hidden = score.hidden_states[-1][torch.arange(3), position]
    assert_close(classifier.score(hidden), score.logits)
    read = mask.scatter(1, score_positions(mask)[:, None], 0)
    same(recording.row_BS, rerun_eager_row(base, "last_full", read, input_ids=ids))


def test_the_row_of_an_encoder_is_that_of_its_first_token(attach):
    model = tiny("bert")
    weights = []
    use_implementation(model, "eager")
    hook = model.encoder.layer[2].attention.self.register_forward_hook(
        lambda module, args, output: weights.append(output[1])
    )
    with torch.no_grad():
        model(input_ids=FEED["input_ids"], attention_mask=RIGHT)
    hook.remove()
    for implementation in ("sdpa", "flash_attention_2", "eager"):
        tap = attach(use_implementation(model, implementation), "last", row="cls")
        with cpu_flash(), torch.no_grad(), tap.record(RIGHT) as recording:
            model(input_ids=FEED["input_ids"], attention_mask=RIGHT)
        tap.close()
        same(recording.row_BS, weights[0][:, :, 0].mean(1))
        assert torch.equal(recording.row_BS > 0, RIGHT.bool())  # also what comes later


@pytest.mark.parametrize("ends", [{}, {8: 9}, {4: 2}, {4: 2, 8: 2}], ids=["as_is", "truncated", "inside", "both"])
def test_the_row_is_at_the_masks_end_wherever_end_tokens_are(attach, ends):
    model = tiny(pad_token_id=2, eos_token_id=2)
    ids = FEED["input_ids"].masked_fill(RIGHT == 0, 2)
    for position, token in ends.items():
        ids[0, position] = token
    with torch.no_grad(), attach(model).record(RIGHT) as recording:
        model(attention_mask=RIGHT, **FEED | {"input_ids": ids})
    assert recording.position_B.tolist() == [8, 4, 11]
    same(recording.row_BS, expect(model, feed=FEED | {"input_ids": ids}))


def test_an_unknown_row_is_refused(model):
    with pytest.raises(UserError, match="row 'last' is none of mask, pad_token, cls"):
        AttentionTap(model, row="last")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "eager"])
def test_rows_that_are_not_finite_are_named(model, attach, implementation, value):
    use_implementation(model, implementation)
    with torch.no_grad():
        model.embed_tokens.weight[63] = value
    ids = FEED["input_ids"].masked_fill(FEED["input_ids"] == 63, 1)
    ids[1, 2] = 63
    with cpu_flash(), torch.no_grad(), attach(model).record(RIGHT) as recording:
        model(attention_mask=RIGHT, **FEED | {"input_ids": ids})
    with pytest.raises(CreditError, match=r"layer 2 of 3 .* the row of sequence 1 \(of 0 to 2\) is not finite"):
        _ = recording.row_BS


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_model_whose_weights_are_fetched_layer_by_layer(model, attach, tmp_path, where):
    accelerate = pytest.importorskip("accelerate")
    expected = expect(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.layers[2].self_attn.q_proj.weight.device.type == "meta"
    same(run(attach(model), model), expected)


@pytest.mark.parametrize("layer", ["last", "0"])
def test_a_model_in_four_bits(attach, tmp_path, layer):
    pytest.importorskip("bitsandbytes")
    tiny(hidden_size=64, head_dim=16).save_pretrained(tmp_path)
    model = LlamaModel.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ).eval()
    assert type(model.layers[2].self_attn.q_proj).__name__ == "Linear4bit"
    for part in model.modules():
        part.support_avx512bf16_for_cpu = False  # it would repack the weights of a copied model differently
    expected = expect(model, layer)
    same(run(attach(model, layer), model), expected)
    unquantised = LlamaModel.from_pretrained(tmp_path).eval()
    assert (expected - expect(unquantised, layer)).abs().max() > 1e-3
