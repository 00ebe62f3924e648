"""Every registered method, by a walk over the registry: a new one keeps the same promises, or stands in EXCEPTIONS."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abc_plugin.credit import methods
from abc_plugin.credit.methods import Evidence
from abc_plugin.credit.redistribute import last_action
from abc_plugin.credit.shaping import entropy, shape

# What a method does not promise, and why.
EXCEPTIONS = {
    "scale": {"prefix": "the score of a prefix has units of its own: only the sum scales with the reward"},
    "sign": {"prefix": "as above", "grad_input": "|reward| keeps a token's sign where the reward is negative"},
    "order": {"prefix": "a score is a difference to the one before", "none": "all on the last action"},
}
for of_score in ("abc_signed", "shapley"):
    EXCEPTIONS["scale"][of_score] = EXCEPTIONS["sign"][of_score] = "parts of the score have its units"
    EXCEPTIONS["order"][of_score] = "the rest lies on the last action"
SIGNED = {"prefix", "grad_input", "abc_signed", "shapley"}
METHODS = {name: methods.load(name) for name in methods.available()}
METHODS |= {"abc_signed": methods.ABC_SIGNED, "shapley": methods.SHAPLEY}
NAMES = sorted(METHODS)


def evidence_of(seed, rows, width, density, scale=1.0):
    """Random evidence of every kind, as one batch: rows without actions and several spans among them."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=rng) < density
    given = {}
    for need in methods.NEEDS:
        value = torch.randn(rows, width, generator=rng) * scale
        given[f"{need}_BA"] = value if need in ("prefix", "gradient", "contribution", "shapley") else value.abs()
    return Evidence(torch.randint(2, 50, (rows, width + 1), generator=rng), mask, **given)


def each(function, evidence):
    """The evidence with ``function`` applied to all its tensors."""
    return Evidence(**{name: function(value) for name, value in vars(evidence).items()})


@st.composite
def batches(draw):
    rows, width, seed = draw(st.integers(1, 5)), draw(st.integers(1, 33)), draw(st.integers(0, 2**31))
    evidence = evidence_of(seed, rows, width, draw(st.floats(0, 1)), 10.0 ** draw(st.integers(-6, 3)))
    reward_B = torch.randn(rows, generator=torch.Generator().manual_seed(seed)) * 10.0 ** draw(st.integers(-3, 2))
    return evidence, reward_B


def tolerance(evidence, reward_B):
    """Rounding of fp32 at the size of what is added up."""
    return 1e-5 * float(1 + reward_B.abs().max() + evidence.prefix_BA.abs().max())


def test_the_exceptions_are_of_registered_methods():
    assert set(NAMES) >= {"none", "uniform", "abc", "abc_d", "abc_d2", "prefix", "grad_input"}
    for kind in EXCEPTIONS.values():
        assert set(kind) <= set(NAMES)
    assert {name for name in NAMES if METHODS[name].weights is None} == SIGNED


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(batch=batches(), beta=st.floats(0, 1))
def test_credit_is_fp32_conserved_and_on_the_actions(name, batch, beta):
    evidence, reward_B = batch
    method, mask = METHODS[name], evidence.action_mask_BA
    credit = method.credit(evidence, reward_B)
    assert credit.dtype == torch.float32 and credit.shape == mask.shape
    assert torch.isfinite(credit).all() and (credit[~mask] == 0).all()
    kept = torch.where(mask.any(1), reward_B, 0.0)
    torch.testing.assert_close(credit.sum(1), kept, atol=tolerance(evidence, reward_B), rtol=1e-5)
    shaped = shape(method, [evidence], reward_B, beta=beta)
    assert shaped.reward_BA.dtype == torch.float32 and (shaped.reward_BA[~mask] == 0).all()
    torch.testing.assert_close(shaped.reward_BA.sum(1), kept, atol=tolerance(evidence, reward_B), rtol=1e-5)
    mixed = beta * credit + (1 - beta) * reward_B[:, None] * last_action(mask)
    torch.testing.assert_close(shaped.reward_BA, mixed, atol=tolerance(evidence, reward_B), rtol=1e-5)
    assert (shaped.share_BA >= 0).all() and (shaped.share_BA.sum(1) < 1 + 1e-5).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(batch=batches(), seed=st.integers(0, 2**31))
def test_rows_do_not_depend_on_their_batch_or_padding(name, batch, seed):
    evidence, reward_B = batch
    method = METHODS[name]
    whole = method.credit(evidence, reward_B)
    order = torch.randperm(len(reward_B), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(method.credit(each(lambda x: x[order], evidence), reward_B[order]), whole[order])
    wider = each(lambda x: torch.nn.functional.pad(x, (3, 2)), evidence)
    off = torch.tensor([0.7] * 3 + [0.0] * whole.shape[1] + [0.7] * 2)
    noise = {
        field: value + off
        for field, value in vars(wider).items()
        if field.endswith("_BA") and field != "action_mask_BA"
    }  # what lies on padding must not matter
    padded = method.credit(Evidence(wider.sequences_BS, wider.action_mask_BA, **noise), reward_B)
    torch.testing.assert_close(padded[:, 3:-2], whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(batch=batches(), seed=st.integers(0, 2**31))
def test_evidence_in_another_order_is_credit_in_that_order(name, batch, seed):
    """Of the tokens that are no actions, too: only what lies on an action counts, not where it lies."""
    evidence, reward_B = batch
    method, width = METHODS[name], evidence.action_mask_BA.shape[1]
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    moved = Evidence(evidence.sequences_BS, *[value[:, order] for value in list(vars(evidence).values())[1:]])
    if name not in EXCEPTIONS["order"]:
        expected = method.credit(evidence, reward_B)[:, order]
        torch.testing.assert_close(method.credit(moved, reward_B), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(EXCEPTIONS["order"]))
def test_the_exceptions_of_order_are_some(name):
    method, evidence, reward_B = METHODS[name], evidence_of(3, 4, 9, 0.7), torch.tensor([2.0, -1.0, 0.5, 3.0])
    moved = Evidence(evidence.sequences_BS, *[value.flip(1) for value in list(vars(evidence).values())[1:]])
    assert not torch.allclose(method.credit(moved, reward_B), method.credit(evidence, reward_B).flip(1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "factor"), [("scale", 4.0), ("sign", -2.0)])
def test_credit_scales_with_the_reward(name, kind, factor):
    method, evidence, reward_B = METHODS[name], evidence_of(3, 4, 9, 0.7), torch.tensor([2.0, -1.0, 0.5, 3.0])
    scaled, expected = method.credit(evidence, factor * reward_B), factor * method.credit(evidence, reward_B)
    if name in EXCEPTIONS[kind]:
        assert not torch.allclose(scaled, expected)
    else:
        torch.testing.assert_close(scaled, expected)


@pytest.mark.parametrize("name", NAMES)
def test_options_compose_with_every_method_and_keep_the_sum(name):
    method, evidence, reward_B = METHODS[name], evidence_of(5, 4, 12, 0.7), torch.tensor([2.0, -1.0, 0.5, 3.0])
    other = evidence_of(6, 4, 12, 0.7)
    members = [evidence, Evidence(evidence.sequences_BS, evidence.action_mask_BA, *list(vars(other).values())[2:])]
    mask = evidence.action_mask_BA
    options = {"dropped_BA": torch.arange(12) % 3 == 0, "entropy_floor": 0.9, "ends_BA": torch.arange(12) % 4 == 3}
    for chosen in ([], ["ends_BA"], ["dropped_BA"], ["entropy_floor"], list(options)):
        given = {option: options[option] for option in chosen}
        if "dropped_BA" in given:
            given["dropped_BA"] = given["dropped_BA"].expand_as(mask)
        if "ends_BA" in given:
            given["ends_BA"] = given["ends_BA"].expand_as(mask)
        shaped = shape(method, members, reward_B, beta=0.8, **given)
        torch.testing.assert_close(shaped.reward_BA.sum(1), torch.where(mask.any(1), reward_B, 0.0))
        assert (shaped.reward_BA[~mask] == 0).all()
        assert ((shaped.disagreement_BA >= 0) & (shaped.disagreement_BA <= 1)).all()
        if "ends_BA" in given:
            allowed = (given["ends_BA"] & mask) | last_action(mask).bool()
            assert (shaped.credit_BA[~allowed] == 0).all()
        if given.keys() == {"entropy_floor"} and method.weights is not None:
            enough = 0.9 * mask.sum(1).clamp_min(1).float().log()
            assert (entropy(shaped.share_BA) >= enough - 1e-4).all()
