"""``abc`` against the authors' distribution, written here as loops from the paper's text, and where they part."""

import pytest
import torch
from recovery_models import tiny_reward_model

from abc_plugin.attention import attach
from abc_plugin.credit.methods import ABC, Evidence

PROMPT, LENGTH = 4, 11


def reference(attentions, prompt_length):
    """Section 3 and footnote 4, one padded sequence: per response token, a list of floats.

    attentions: of each layer [head][query][key]. The last layer, mean over heads; the prompt is cut off queries and
    keys; the last row that is left; normalised to sum to 1. As in the authors' code the last row is that of the last
    position, and the response is one stretch behind the prompt.
    """
    heads = attentions[-1]
    response = range(prompt_length, len(heads[0]))
    row = []
    for key in response:
        weight = 0.0
        for head in heads:
            weight += head[response[-1]][key] / len(heads)
        row.append(weight)
    total = sum(row)
    return [weight / total for weight in row]


@pytest.fixture(scope="module")
def model():
    return tiny_reward_model()


@torch.no_grad()
def matrices(model, ids, mask):
    """Every layer's attention of the first sequence, from an eager forward."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = model.model(ids, attention_mask=mask, output_attentions=True, use_cache=False)
    model.set_attn_implementation(before)
    return [layer[0].tolist() for layer in output.attentions]


@torch.no_grad()
def ours(model, ids, mask, action_mask):
    recovery = attach(model)
    with recovery.record(mask) as recording:
        model(ids, mask)
    recovery.close()
    return ABC.weights(Evidence(ids, action_mask, attention_BA=recording.row_BS[:, 1:]))


def sequence(rows=1, length=LENGTH):
    ids = torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(7))
    return ids, torch.ones_like(ids)


def actions(*spans, length=LENGTH):
    """Action mask of one row; spans are of the tokens' positions."""
    return torch.tensor([[any(a <= t < b for a, b in spans) for t in range(1, length)]]).long()


def test_abc_is_the_reference_on_a_full_sequence(model):
    ids, mask = sequence()
    weights = ours(model, ids, mask, actions((PROMPT, LENGTH)))
    expected = reference(matrices(model, ids, mask), PROMPT)
    torch.testing.assert_close(weights[0, PROMPT - 1 :], torch.tensor(expected), atol=1e-6, rtol=0)
    assert max(expected) > 1.5 * min(expected)  # far from uniform: another row or layer could not pass


def test_right_padding_moves_the_references_row_to_a_padding_token_and_leaves_ours(model):
    ids, mask = sequence()
    full = ours(model, ids, mask, actions((PROMPT, LENGTH)))
    ids, mask = (torch.nn.functional.pad(x, (0, 3)) for x in (ids, mask))
    mine = ours(model, ids, mask, actions((PROMPT, LENGTH), length=LENGTH + 3))
    torch.testing.assert_close(mine[:, : LENGTH - 1], full, atol=1e-6, rtol=0)
    theirs = torch.tensor(reference(matrices(model, ids, mask), PROMPT))[: LENGTH - PROMPT]
    assert (theirs - full[0, PROMPT - 1 :]).abs().max() > 0.02


def test_tokens_between_two_turns_get_credit_in_the_reference_and_none_here(model):
    ids, mask = sequence()
    weights = ours(model, ids, mask, actions((PROMPT, 6), (9, LENGTH)))[0]
    theirs = reference(matrices(model, ids, mask), PROMPT)
    chosen = [0, 1, 5, 6]  # of the response's tokens, those of the two turns
    kept = sum(theirs[t] for t in chosen)
    torch.testing.assert_close(
        weights[[3, 4, 8, 9]], torch.tensor([theirs[t] / kept for t in chosen]), atol=1e-6, rtol=0
    )
    assert (weights[[5, 6, 7]] == 0).all() and min(theirs[2:5]) > 0


def test_a_row_of_another_length_is_an_error_here_where_the_reference_pads_or_crops(model):
    ids, mask = sequence()
    with pytest.raises(ValueError, match=r"shape \(1, 10\), expected \(1, 12\)"):
        ours(model, ids, mask, actions((PROMPT, LENGTH), length=LENGTH + 2))
