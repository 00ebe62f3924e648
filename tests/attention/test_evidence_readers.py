"""What methods read of a reward model: the score at every token, gradient x input, some heads; over families."""

from contextlib import ExitStack

import pytest
import torch
from recovery_models import LEFT, NONE, RIGHT, PackedRewardModel, inputs, scored, tiny, tiny_reward_model

from abc_plugin.attention import attach
from abc_plugin.attention.evidence_readers import (
    GradientTimesInput,
    PrefixScores,
    attach_readers,
    padded,
    record,
    rows,
)
from abc_plugin.attention.query_positions import score_positions
from abc_plugin.errors import CreditError, UserError

CAUSAL = ("llama", "qwen3", "gpt2", "gemma3", "mixtral", "qwen3_next", "gpt_neox", "falcon_h1", "bloom", "gptj")
BOTH_WAYS = ("modernbert", "bert", "eurobert", "deberta_v2")


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_the_score_at_a_token_is_that_of_the_sequence_cut_off_behind_it(family):
    model, ids = scored(family), torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    with PrefixScores(model).record(mask) as recording:
        whole = model(ids, mask)
    row = recording.row_BS
    assert torch.equal(row[[0, 1], [8, 5]], whole)
    assert (row[1, 6:] == 0).all()
    for b, end in ((0, 1), (0, 4), (0, 8), (1, 3)):
        cut = model(ids[b : b + 1, :end], mask[b : b + 1, :end])
        torch.testing.assert_close(row[b, end - 1], cut[0], atol=1e-5, rtol=0)
    assert row[0].std() > 0.05  # far from constant: a shifted row cannot pass


@pytest.mark.parametrize("family", BOTH_WAYS)
def test_a_model_that_looks_ahead_is_refused_by_name(family):
    with pytest.raises(UserError, match=r"Model reads its tokens in both directions .*use --reward_shaping abc"):
        PrefixScores(scored(family))


def test_a_model_without_a_scalar_head_is_refused():
    with pytest.raises(UserError, match="LlamaModel has no scalar score head"):
        PrefixScores(tiny("llama"))


@pytest.mark.parametrize("padding", [NONE, LEFT, RIGHT])
def test_gradient_times_input_is_that_of_autograd_and_of_captum(padding):
    captum = pytest.importorskip("captum.attr")
    model = tiny_reward_model()
    ids, mask = inputs(padding)["input_ids"], padding
    position = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        plain = model(ids, mask, position)
        with GradientTimesInput(model).record(mask) as recording:
            score = model(ids, mask, position)
        assert not torch.is_grad_enabled()
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(GradientTimesInput(model).record(mask))
        model(ids, mask, position)
    assert torch.is_grad_enabled()  # whichever of the two ends first
    assert torch.equal(score, plain) and not score.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())

    def of_embeddings(embedded):
        hidden = model.model(inputs_embeds=embedded, attention_mask=mask, position_ids=position).last_hidden_state
        return model.score(hidden).squeeze(-1).gather(1, score_positions(mask)[:, None]).squeeze(1)

    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    expected = captum.InputXGradient(of_embeddings).attribute(embedded).sum(-1) * mask
    torch.testing.assert_close(recording.row_BS, expected.detach(), atol=1e-6, rtol=1e-5)
    assert (recording.row_BS < 0).any() and (recording.row_BS > 0).any()


def test_gradients_of_an_encoder_and_of_a_hybrid():
    ids, mask = torch.randint(1, 64, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    for family in ("bert", "qwen3_next", "gpt2"):
        model = scored(family)
        reader = GradientTimesInput(model)
        reader._model = model  # no PreTrainedModel is the outermost here
        with torch.no_grad(), reader.record(mask) as recording:
            model(ids, mask)
        assert recording.row_BS.abs().min() > 0


def test_a_forward_that_fails_leaves_the_grad_mode_as_it_was():
    model = tiny_reward_model()
    with torch.no_grad():
        with pytest.raises(TypeError), GradientTimesInput(model).record(torch.ones(1, 3)):
            model(torch.ones(1, 3, dtype=torch.long))
        assert not torch.is_grad_enabled()
        with GradientTimesInput(model).record(torch.ones(1, 3)) as recording:
            pass
    with pytest.raises(CreditError, match="it ran 0 times in one record"):
        recording.row_BS  # noqa: B018
    with pytest.raises(UserError, match="split over processes"), GradientTimesInput(model).record(None, head_group=1):
        pass


@pytest.mark.parametrize("padding", [LEFT, RIGHT])
@torch.no_grad()
def test_packed_samples_read_as_padded_ones(padding):
    ids, mask = inputs(padding)["input_ids"], padding
    plain, packed = tiny_reward_model(), tiny_reward_model(PackedRewardModel)
    read = []
    for model, extra in ((plain, [inputs(mask)["position_ids"]]), (packed, [])):
        readers = attach_readers(model, {"attention", "prefix", "gradient", "contribution", "policy"})
        assert list(readers) == ["attention", "prefix", "gradient", "contribution"]
        with record(readers, mask) as recordings:
            score = model(ids, mask, *extra)
        read.append(rows(recordings) | {"score": score})
    for name, expected in read[0].items():
        torch.testing.assert_close(read[1][name], expected, atol=1e-5, rtol=1e-4)


def test_values_of_another_stream_are_refused():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    assert padded(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), mask).tolist() == [[1.0, 2.0, 0.0], [0.0, 3.0, 4.0]]
    assert padded(torch.tensor([[1.0, 2.0, 9.0], [9.0, 3.0, 4.0]]), mask)[1].tolist() == [0.0, 3.0, 4.0]
    with pytest.raises(CreditError, match=r"ran on \(1, 5\) tokens"):
        padded(torch.zeros(1, 5), mask)


@torch.no_grad()
def test_some_heads_are_averaged_and_unknown_ones_refused():
    model, ids, mask = tiny_reward_model(), inputs(NONE)["input_ids"], NONE
    per_head = attach(model, per_head=True)
    with per_head.record(mask) as recording:
        model(ids, mask)
    expected = recording.row_BHS[:, [0, 3]].mean(1)
    per_head.close()
    subset = attach(model, heads=[0, 3])
    with subset.record(mask) as recording:
        model(ids, mask)
    assert torch.equal(recording.row_BS, expected)
    assert subset.describe().endswith("heads 0, 3")
    subset.close()
    with pytest.raises(UserError, match="--shaping.heads 4: the layer has 4 heads, 0 to 3"):
        attach(model, heads=[1, 4])
    attach(model).close()  # the refused one left nothing behind


@pytest.mark.parametrize("family", ["bloom", "mpt", "codegen"])
def test_heads_of_attention_modules_without_a_config(family):
    model = tiny(family)
    attach(model, heads=[0]).close()
    with pytest.raises(UserError, match="--shaping.heads 99: the layer has"):
        attach(model, heads=[99])
