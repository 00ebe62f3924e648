"""How the tap attaches, what it survives, and what it refuses rather than give a wrong row."""

import gc
import weakref
from contextlib import ExitStack

import pytest
import torch
from cpu_flash import cpu_flash, use_implementation
from recovery_models import LEFT, RIGHT, inputs, tiny, tiny_reward_model
from torch.testing import assert_close
from transformers import AttentionInterface, BitsAndBytesConfig, LlamaModel
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from abc_plugin.attention.full_matrix import rerun_eager_row
from abc_plugin.attention.query_key_tap import AttentionTap
from abc_plugin.errors import CreditError

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


def test_a_reward_model_in_an_engine(attach):
    model = tiny_reward_model()
    engine = Engine(model)
    same(run(attach(engine), engine, LEFT), expect(model, mask=LEFT))


PACKED = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]]), "input_ids": FEED["input_ids"][2:]}
FULL = torch.ones(1, 12, dtype=torch.long)


def test_one_padded_sequence_is_not_taken_for_a_packed_one(model, attach):
    tap = attach(model)
    for mask in (LEFT[1:2], RIGHT[1:2], torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0]])):
        same(run(tap, model, mask), expect(model, mask=mask))


def test_a_position_bias_is_refused(model, attach):
    with pytest.raises(CreditError, match="position_bias was passed"), attach(model).record(RIGHT):
        model(attention_mask=RIGHT, position_bias=torch.zeros(3, 4, 12, 12), **FEED)


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
