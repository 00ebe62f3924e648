"""Contributions to the score: against autograd on the last layer's values, over families; what is refused, by name."""

import pytest
import torch
from cpu_flash import cpu_flash, use_implementation
from recovery_models import (
    COMMON,
    FAMILIES,
    LEFT,
    NONE,
    RIGHT,
    PackedRewardModel,
    RewardModel,
    inputs,
    scored,
    tiny,
    tiny_reward_model,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from abc_plugin.attention.evidence_readers import attach_readers, record, rows
from abc_plugin.attention.layers import forward_code, target_layer
from abc_plugin.attention.signed_contribution import ContributionReader
from abc_plugin.errors import CreditError, UserError

IDS = inputs(NONE)["input_ids"]
# Families whose last layer has no attention, and those outside transformers' attention interface.
NO_LAST = ("qwen3_next", "qwen3_5", "granitemoehybrid", "minimax", "nemotron_h", "lfm2", "jamba", "bamba")
BESIDE = ("falcon_h1",)  # mixes tokens beside its attention, too
OUTSIDE = ("deberta", "deberta_v2", "bloom", "mpt", "falcon", "gptj", "gpt_neo", "codegen")
READ = [name for name, family in FAMILIES.items() if family.exact and name not in (*NO_LAST, *BESIDE, *OUTSIDE)]


def by_autograd(model, ids, mask):
    """(gradient x value) of the last layer, summed over heads and widths; eager, through the whole model."""
    use_implementation(model, "eager")
    module, _, _ = target_layer(model, "last")
    names, values = forward_code(module).__globals__, []
    eager = names["eager_attention_forward"]

    def detached(part, query, key, value, *args, **kwargs):
        if part is module:
            values.append(value.detach().requires_grad_())
            value = values[0]
        return eager(part, query, key, value, *args, **kwargs)

    names["eager_attention_forward"] = detached
    try:
        score_B = model(ids, mask)
    finally:
        names["eager_attention_forward"] = eager
    [gradient] = torch.autograd.grad(score_B.sum(), values)
    return (gradient * values[0]).sum((1, 3)).detach(), score_B.detach()


@torch.no_grad()
def contribution(model, ids, mask, layer="last"):
    reader = ContributionReader(model, layer)
    with cpu_flash(), reader.record(mask) as recording:
        score_B = model(ids, mask)
    return recording.row_BS, score_B


def same(row, expected, tolerance=1e-5):
    assert row.dtype == torch.float32
    assert (row - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("family", READ)
def test_it_is_gradient_times_value(family):
    """Every implementation and padding, to 1e-5 of the largest; the score is bit for bit the model's own."""
    model = scored(family)
    for mask in (RIGHT, LEFT, NONE):
        ids = IDS * mask
        expected, score_B = by_autograd(model, ids, mask)
        assert (expected < 0).any() and (expected > 0).any() and not expected[mask == 0].any()
        for name in FAMILIES[family].exact:
            use_implementation(model, name)
            row, score = contribution(model, ids, mask)
            same(row, expected)
            torch.testing.assert_close(score, score_B, rtol=0, atol=1e-4)
            with torch.no_grad(), cpu_flash():
                assert torch.equal(score, model(ids, mask))


@pytest.mark.parametrize("padding", [LEFT, RIGHT, torch.cat([RIGHT[:2], torch.zeros(1, 12, dtype=torch.long)])])
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_packed_samples_contribute_as_padded_ones(padding, implementation):
    plain, packed = (tiny_reward_model(PackedRewardModel) for _ in range(2))
    plain.packed = False
    ids, mask = IDS * padding, padding
    expected, _ = by_autograd(plain, ids, mask)
    row, _ = contribution(use_implementation(packed, implementation), ids, mask)
    same(row, expected * mask.any(1)[:, None])


def test_beside_the_other_readers_everything_is_as_alone():
    model, needs = tiny_reward_model(), ("attention", "prefix", "gradient", "contribution")
    alone = {}
    for chosen in (*[{need} for need in needs], set(needs)):
        readers = attach_readers(model, chosen)
        with torch.no_grad(), record(readers, RIGHT) as recordings:
            score_B = model(IDS, RIGHT)
        found = rows(recordings)
        alone |= found if len(chosen) == 1 else {}
    for need in needs:
        assert torch.equal(found[need], alone[need])
    reader = attach_readers(model, {"contribution"})["contribution"]
    assert reader.describe() == "contribution to the score by layer 2 of 3 (LlamaAttention, sdpa)"
    with torch.no_grad(), reader.record(RIGHT) as recording:
        assert torch.equal(model(IDS, RIGHT), score_B)
    assert recording.row_BHS.shape == (3, 4, 12)  # the attention that they are made of


def test_a_normalised_score_a_classifier_and_a_scaled_head_are_in_the_scores_units():
    model = tiny_reward_model()
    expected, _ = contribution(model, IDS, RIGHT)

    class Normalised(RewardModel):
        def forward(self, *args):
            return (super().forward(*args) - 3.0) / 0.5

    normalised = tiny_reward_model(Normalised)
    same(contribution(normalised, IDS, RIGHT)[0], 2 * expected)
    classifier = LlamaForSequenceClassification(LlamaConfig(**COMMON, num_labels=1)).eval()
    classifier.model, classifier.score = model.model, model.score
    with torch.no_grad(), ContributionReader(classifier).record(RIGHT) as recording:
        classifier(input_ids=IDS * RIGHT, attention_mask=RIGHT)
    plain, _ = contribution(model, IDS * RIGHT, RIGHT)
    same(recording.row_BS, plain)


def test_a_head_of_several_layers_is_gone_through():
    model = tiny_reward_model()
    width, torch_nn = model.score.in_features, torch.nn
    model.score = torch_nn.Sequential(torch_nn.Linear(width, 8), torch_nn.Tanh(), torch_nn.Linear(8, 1))
    expected, _ = by_autograd(model, IDS, RIGHT)
    same(contribution(use_implementation(model, "sdpa"), IDS, RIGHT)[0], expected)


@pytest.mark.parametrize("how", ["autocast", "bf16"])
def test_in_half_precision_it_is_near(how):
    model = tiny_reward_model()
    expected, _ = contribution(model, IDS, RIGHT)
    if how == "bf16":
        row, _ = contribution(model.bfloat16(), IDS, RIGHT)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            row, _ = contribution(model, IDS, RIGHT)
    same(row, expected, tolerance=0.1)
    assert expected.abs().min(1).values.max() < 0.1 * expected.abs().max() < expected.abs().max()


def test_lora_compile_and_offload_are_part_of_it():
    peft, accelerate = pytest.importorskip("peft"), pytest.importorskip("accelerate")
    model = tiny_reward_model()
    plain, _ = contribution(model, IDS, RIGHT)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with torch.no_grad(), ContributionReader(model).record(RIGHT) as recording:
            compiled(IDS, RIGHT)
        same(recording.row_BS, plain)
    torch.compiler.reset()
    config = peft.LoraConfig(target_modules=["v_proj", "o_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_reward_model(), config).eval()
    expected, _ = by_autograd(adapted, IDS, RIGHT)
    row, _ = contribution(use_implementation(adapted, "sdpa"), IDS, RIGHT)
    same(row, expected)
    assert (row - plain).abs().max() > 1e-2
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    same(contribution(model, IDS, RIGHT)[0], plain)


def test_a_model_in_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_reward_model(hidden_size=64, head_dim=16).save_pretrained(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)).eval()
    for part in model.modules():
        part.support_avx512bf16_for_cpu = False  # whose kernel has no backward
    expected, _ = by_autograd(model, IDS, RIGHT)
    row, _ = contribution(use_implementation(model, "sdpa"), IDS, RIGHT)
    same(row, expected, tolerance=1e-4)


@pytest.mark.parametrize("family", [*NO_LAST, "gemma3", "llama4", *OUTSIDE])
def test_models_whose_last_layer_cannot_be_read_are_refused_by_name(family):
    with pytest.raises(UserError, match="layer . of 3 is to be read, .*; (give|its last)|Model is not supported"):
        ContributionReader(scored(family))
    if family in ("gemma3", "llama4"):
        ContributionReader(scored(family), "last")


def test_a_model_without_a_head_and_one_split_over_processes_are_refused():
    with pytest.raises(UserError, match="LlamaModel has no scalar score head"):
        ContributionReader(tiny())
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
    with pytest.raises(UserError, match="BertForSequenceClassification has no scalar score head"):  # it reads [CLS]
        ContributionReader(BertForSequenceClassification(BertConfig(**sizes, num_labels=1)))
    reader = ContributionReader(tiny_reward_model())
    for groups in ({"ring_group": "a ring"}, {"head_group": "heads"}):
        with pytest.raises(UserError, match="cannot be had of several rows, a ring or split heads"):
            reader.record(RIGHT, **groups).__enter__()


@pytest.mark.parametrize("case", ["beside", "other token"])
def test_a_score_that_is_not_that_of_the_last_token_alone_is_refused(case):
    model = scored("falcon_h1") if case == "beside" else tiny_reward_model()
    if case == "other token":  # a head that also reads the first token, as a pooling encoder's
        model.score.register_forward_hook(lambda part, args, output: output + 3 * output[:, :1])
    with torch.no_grad(), ContributionReader(model).record(RIGHT) as recording:
        model(IDS * RIGHT, RIGHT)
    with pytest.raises(CreditError, match="the score is not that of each sequence's last token"):
        _ = recording.row_BS


def test_what_would_give_a_wrong_number_is_refused_by_name():
    model = tiny_reward_model()
    reader = ContributionReader(model)
    with pytest.raises(CreditError, match="run RewardModel, which owns the score head"), reader.record(RIGHT):
        model.model(IDS, attention_mask=RIGHT)
    with pytest.raises(CreditError, match=r"in train mode .* call model.eval\(\)"), reader.record(RIGHT):
        model.train()(IDS, RIGHT)
    model.eval()
    with torch.no_grad():
        model.score.weight[0, 3] = torch.nan
        with reader.record(RIGHT) as recording:
            model(IDS, RIGHT)
    with pytest.raises(CreditError, match="not finite, so the model's value or the score's gradient is not"):
        _ = recording.row_BS


def test_a_forward_that_fails_leaves_the_model_as_it_was():
    model = tiny_reward_model()
    expected, _ = contribution(model, IDS, RIGHT)
    parts = {name: dict(part.__dict__) for name, part in model.named_modules()}
    hook = model.score.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), ContributionReader(model).record(RIGHT):
        model(IDS, RIGHT)
    hook.remove()
    assert {name: dict(part.__dict__) for name, part in model.named_modules()} == parts
    same(contribution(model, IDS, RIGHT)[0], expected, tolerance=0)
