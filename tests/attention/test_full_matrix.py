"""Rows read off full matrices, by the fallback and the eager re-run: what they survive and what they refuse."""

import pytest
import torch
from recovery_models import RIGHT, inputs, tiny
from torch.testing import assert_close

from abc_plugin.attention import attach
from abc_plugin.attention.full_matrix import EagerRerun, OwnWeights, rerun_eager_row
from abc_plugin.attention.layers import OUTSIDE, attention_layers
from abc_plugin.errors import CreditError, UserError
from abc_plugin.tools.bench.model_families import FAMILIES

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
