"""Rollouts by transformers in the host's form: what is drawn, in which batches, and from which model."""

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from abc_plugin.errors import UserError
from abc_plugin.host.import_openrlhf import import_host

import_host()

from abc_plugin.local import rollout  # noqa: E402
from abc_plugin.local.rollout import Draw, generate  # noqa: E402

OPTIONS = {"seed": (1, 0), "batch_size": 2, "max_len": 24, "max_new_tokens": 6, "temperature": 1.0, "top_p": 1.0}
PROMPTS = ["I liked", "The plot of this film, which is long,", "A", "Two hours later", "It"]


@pytest.fixture(scope="module")
def policy(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny / "policy", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny / "policy")


def drawn(scores_BV, uniform_BT):
    return Draw(uniform_BT.double())(None, scores_BV).argmax(-1).tolist()


def test_a_token_is_drawn_where_the_cumulated_probability_passes_the_uniform_number():
    scores_BV = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(6, 4)
    uniform_B1 = torch.tensor([[0.0], [0.09], [0.11], [0.5], [0.61], [0.9999]])
    assert drawn(scores_BV, uniform_B1) == [0, 0, 1, 2, 3, 3]
    draw = Draw(torch.tensor([[0.05, 0.95]], dtype=torch.float64))  # the next token's number is the next column
    assert [draw(None, torch.tensor([[0.5, 0.5]]).log()).argmax(-1).item() for _ in range(2)] == [0, 1]


def test_drawing_follows_the_distribution_and_never_takes_what_is_ruled_out():
    scores_V = torch.tensor([-torch.inf, 0.3, -1.0, -torch.inf, 2.0, 0.3, -torch.inf])
    uniform_B1 = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    counts = torch.bincount(torch.tensor(drawn(scores_V.expand(1000, 7), uniform_B1)), minlength=7)
    assert (counts - 1000 * torch.softmax(scores_V, -1)).abs().max() <= 1
    assert counts[[0, 3, 6]].tolist() == [0, 0, 0]


def test_without_a_limit_of_its_own_a_response_ends_with_the_models_positions(policy):
    config = GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=1, vocab_size=49152)
    model, tokenizer = GPT2LMHeadModel(config).eval(), policy[1]
    options = OPTIONS | {"max_len": 32, "max_new_tokens": None, "batch_size": 2}
    short, long = generate(model, tokenizer, [" film" * 4, " film" * 20], **options)
    assert short["action_ranges"] == [(4, 32)] and long["action_ranges"] == [(20, 32)]


def test_ids_that_are_no_token_are_never_drawn(policy, monkeypatch):
    model, tokenizer = policy
    wide = copy.deepcopy(model)
    wide.resize_token_embeddings(49200)
    with torch.no_grad():
        wide.lm_head.weight[49152:] = 50 * wide.lm_head.weight[:48].abs()
    for temperature in (1.0, 0.0):
        drawn = generate(wide, tokenizer, PROMPTS, **OPTIONS | {"temperature": temperature})
        assert max(max(one["observation_tokens"]) for one in drawn) < 49152
    monkeypatch.setattr(rollout, "unknown_ids", lambda *_: [])
    assert max(max(one["observation_tokens"]) for one in generate(wide, tokenizer, PROMPTS, **OPTIONS)) >= 49152


def test_a_policy_whose_logits_are_nan_ends_the_run(policy):
    model, tokenizer = policy
    broken = copy.deepcopy(model)
    broken.lm_head.weight = nn.Parameter(torch.full_like(broken.lm_head.weight, torch.nan))
    for temperature in (1.0, 0.0):
        with pytest.raises(RuntimeError, match="the policy's logits are NaN"):
            generate(broken, tokenizer, PROMPTS, **OPTIONS | {"temperature": temperature})


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_completion_depends_neither_on_its_batch_nor_on_what_was_drawn_before(policy, changes):
    model, tokenizer = policy
    options = OPTIONS | changes
    torch.manual_seed(0)
    responses = generate(model, tokenizer, PROMPTS, **options)
    for prompt, response in zip(PROMPTS, responses, strict=True):  # in the host's form
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert response["observation_tokens"][: len(ids)] == ids
        assert response["action_ranges"] == [(len(ids), len(ids) + 6)]
        assert response["truncated"]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert generate(model, tokenizer, PROMPTS, **options | {"batch_size": 5}) == responses
    assert generate(model, tokenizer, PROMPTS[:2], **options) == responses[:2]
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # nothing global was drawn


def test_another_seed_another_step_and_another_place_draw_something_else(policy):
    model, tokenizer = policy
    one, *others = (
        generate(model, tokenizer, ["I liked", "I liked"], **OPTIONS | {"seed": seed})
        for seed in ((1, 0), (2, 0), (1, 1))
    )
    assert one[0] != one[1]
    assert all(other[0] != one[0] for other in others)


def test_a_row_draws_from_the_model_at_the_temperature(policy):
    """At temperature 1 the first tokens of many rows have the model's own probabilities."""
    model, tokenizer = policy
    count = 400
    responses = generate(model, tokenizer, ["I liked"] * count, **OPTIONS | {"max_new_tokens": 1, "batch_size": count})
    ids = torch.tensor([tokenizer("I liked", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        probability_V = torch.softmax(model(ids).logits[0, -1], -1)
    likely = probability_V > probability_V.median()
    share = sum(likely[response["observation_tokens"][-1]].item() for response in responses) / count
    assert share == pytest.approx(probability_V[likely].sum().item(), abs=4 * 0.5 / count**0.5)


def test_the_end_token_closes_the_response_and_belongs_to_it(policy):
    model, tokenizer = policy
    ids = tokenizer("I liked", add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id

    def output(input_ids, **_):
        tail = torch.tensor([[7, eos, tokenizer.pad_token_id, 9, 9, 9]]).expand(len(input_ids), -1)
        return torch.cat([input_ids, tail], 1)

    ends = SimpleNamespace(eos_token_id=[eos, 5])
    config = policy[0].config
    fake = SimpleNamespace(generate=output, device="cpu", generation_config=ends, base_model=None, config=config)
    [response] = generate(fake, tokenizer, ["I liked"], **OPTIONS)
    assert response["observation_tokens"] == [*ids, 7, eos]
    assert response["action_ranges"] == [(2, 4)]
    assert not response["truncated"]


def test_a_batch_ends_with_its_last_open_row(policy):
    """Every second token ends a response here, and no forward is run once all have ended."""
    model, tokenizer = policy
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with mock.patch.object(model.generation_config, "eos_token_id", list(range(0, len(tokenizer), 2))):
        responses = generate(model, tokenizer, PROMPTS, **OPTIONS | {"batch_size": 5, "max_new_tokens": 16})
    handle.remove()
    lengths = [end - start for [(start, end)] in (response["action_ranges"] for response in responses)]
    assert 1 < len(calls) == max(lengths) < 16
    assert not any(response["truncated"] for response in responses)


def test_long_prompts_lose_their_front_and_empty_ones_are_refused(policy):
    model, tokenizer = policy
    [response] = generate(model, tokenizer, [" film" * 40], **OPTIONS)
    assert response["action_ranges"] == [(18, 24)]
    with pytest.raises(UserError, match="the prompt '' has no tokens"):
        generate(model, tokenizer, [""], **OPTIONS)


def test_prompts_are_cut_by_length_into_equal_batches_for_the_ranks():
    ids = [[0] * length for length in (5, 1, 4, 2, 3, 6)]
    assert rollout._batches(ids, 6, 1) == [[1, 3, 4, 2, 0, 5]]
    assert rollout._batches(ids, 4, 1) == [[1, 3, 4], [2, 0, 5]]
    assert rollout._batches(ids, 6, 2) == [[1, 3, 4], [2, 0, 5]]
    assert rollout._batches(ids, 2, 2) == [[1, 3], [4, 2], [0], [5]]
    assert rollout._batches(ids[:1], 4, 2) == [[0]]
    assert rollout._batches([*ids, [0] * 2, [0] * 2], 2, 1, by_length=True) == [
        [1],
        [3, 6],
        [7],
        [4],
        [2],
        [0],
        [5],
    ]


def test_as_many_rows_generate_together_as_the_logits_of_a_forward_take_memory():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=1000)).to(torch.bfloat16)
    # keys and values: 2 x 3 layers x 2 heads x 16 x 2 bytes = 384 bytes a token; logits: 1000 x (2 + 4) = 6000
    assert rollout.rows_at_once(model, 4) == 4 * 8  # of 15
    model.config.vocab_size = 200  # 1200 bytes
    assert rollout.rows_at_once(model, 4) == 4 * 3
    model.config.vocab_size = 10  # 60 bytes
    assert rollout.rows_at_once(model, 4) == 4


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)

    def get_output_embeddings(self):
        return self.inner


def test_the_heads_input_is_contiguous_while_generating(monkeypatch):
    module, seen = Remembers(), []
    monkeypatch.setattr(module.inner, "forward", lambda x: seen.append(x.is_contiguous()))
    states = torch.ones(3, 5, 2)[:, -1:]
    with rollout.ready_to_generate(SimpleNamespace(module=module)) as model:
        model(states)
    module(states)
    assert seen == [True, False]


def test_deepspeeds_hooks_are_off_while_generating_and_back_afterwards():
    module, calls = Remembers().train(), []
    module.inner.register_forward_pre_hook(lambda *_: calls.append("before"))
    module.register_forward_hook(lambda *_: calls.append("after"))
    with pytest.raises(KeyError), rollout.ready_to_generate(SimpleNamespace(module=module)) as model:
        assert not model.training
        model(torch.ones(1, 2))
        assert calls == []
        raise KeyError
    module(torch.ones(1, 2))
    assert calls == ["before", "after"]
