"""The mean of several rows: by hand, against eager attention's whole matrix in many families, and its memory."""

import copy
import inspect
from contextlib import closing

import pytest
import torch
from cpu_flash import cpu_flash, use_implementation
from hypothesis import given, settings
from hypothesis import strategies as st
from recovery_models import FAMILIES, LEFT, NONE, RIGHT, inputs, tiny
from test_attention_row import KEY, QUERY
from test_layouts import packed
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from abc_plugin.attention import attach
from abc_plugin.attention.attention_row import averaged_matrix, averaged_row
from abc_plugin.attention.query_positions import generating_rows
from abc_plugin.errors import CreditError
from abc_plugin.tools.bench.eager_parity import BF16, FP32, accepted_inputs, distance

# Grouped queries, norm before the product, learned positions, partial rotary, windows, one projection, sinks, latent
# attention; and modules outside the attention interface, of the authors' own models.
READ = ("llama", "qwen3", "gpt2", "gpt_neox", "mistral_window", "gemma3", "phi3", "gpt_oss", "deepseek_v3")
READ += ("gptj", "gpt_neo", "bloom")


def asked(mask, seed=3):
    """Some of the real tokens, in several spans."""
    return (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.6) & mask.bool()


def eager_matrices(model, mask):
    """Every layer's weights by the model itself, mean over heads, (B, S, S)."""
    model = use_implementation(copy.deepcopy(model), "eager")
    with torch.no_grad():
        reported = model(attention_mask=mask, output_attentions=True, use_cache=False, **accepted_inputs(model, mask))
    return [weights.float().mean(1) for weights in reported.attentions]


def mean_by_loop(weights_BSS, queries):
    """For every token the mean over the asked queries that see it, one number at a time."""
    mean = torch.zeros(queries.shape)
    for b, s in torch.cartesian_prod(*map(torch.arange, queries.shape)).tolist():
        seen = [weights_BSS[b, p, s] for p in queries[b].nonzero().flatten() if weights_BSS[b, p, s] != 0]
        mean[b, s] = sum(seen) / len(seen) if seen else 0.0
    return mean


def recovered(model, layer, mask, queries, recovery="auto", feed=None, **options):
    with closing(attach(model, layer, recovery, **options)) as reader, cpu_flash():
        with torch.no_grad(), reader.record(mask, queries_BS=queries) as recording:
            model(**(feed or {"attention_mask": mask, **accepted_inputs(model, mask)}))
        return recording.row_BHS if options.get("per_head") else recording.row_BS


def test_mean_by_hand():
    """Rows of heads 1 : 2 : 5 and 3 : 1 : 4: the first token is seen by two queries, the second by one."""
    mean = averaged_row(QUERY, KEY, torch.tensor([[False, True, True]]), scaling=0.5)
    heads = [[(1 / 3 + 1 / 8) / 2, (2 / 3 + 2 / 8) / 2, 5 / 8], [(3 / 4 + 3 / 8) / 2, (1 / 4 + 1 / 8) / 2, 4 / 8]]
    assert_close(mean, torch.tensor([heads]))
    first = averaged_row(QUERY, KEY, torch.tensor([[True, True, False]]), scaling=0.5)
    assert_close(first[0, 0], torch.tensor([(1 + 1 / 3) / 2, 2 / 3, 0.0]))  # one query sees the second token
    assert not averaged_row(QUERY, KEY, torch.zeros(1, 3, dtype=torch.bool)).any()


def test_a_window_counts_only_the_queries_that_see_the_token():
    mean = averaged_row(QUERY, KEY, torch.ones(1, 3, dtype=torch.bool), scaling=0.5, window=2)
    assert_close(mean[0, 0], torch.tensor([(1 + 1 / 3) / 2, (2 / 3 + 2 / 7) / 2, 5 / 7]))


@pytest.mark.parametrize("family", READ)
def test_the_mean_is_that_of_the_eager_matrix(family):
    """Every layer, implementation and padding to 1e-6; by the re-run, too."""
    model = tiny(family)
    for mask in (RIGHT, LEFT, NONE):
        queries = asked(mask)
        expected = [mean_by_loop(weights, queries) for weights in eager_matrices(model, mask)]
        for name in FAMILIES[family].exact:
            use_implementation(model, name)
            for layer, expected_BS in enumerate(expected):
                row = recovered(model, str(layer), mask, queries)
                assert row.dtype == torch.float32
                assert_close(row, expected_BS, rtol=0, atol=FP32)
            assert_close(recovered(model, "0", mask, queries, "eager-rerun"), expected[0], rtol=0, atol=FP32)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral_window"])
def test_in_bf16_the_mean_is_near(family):
    model = tiny(family, initializer_range=0.1).bfloat16()
    for mask in (RIGHT, LEFT):
        queries = mask.bool()
        expected = mean_by_loop(eager_matrices(model, mask)[2], queries)
        assert distance(recovered(model, "2", mask, queries), expected) < BF16
        assert distance(mask / mask.sum(1, keepdim=True), expected) > 2 * BF16  # so that it means something


def test_one_query_is_its_row_and_heads_are_kept():
    model = tiny()
    last = torch.zeros_like(RIGHT).scatter(1, RIGHT.sum(1, keepdim=True) - 1, 1)
    with closing(attach(model)) as tap, torch.no_grad(), tap.record(RIGHT) as recording:
        model(attention_mask=RIGHT, **inputs(RIGHT))
    assert_close(recovered(model, "last_full", RIGHT, last), recording.row_BS, rtol=0, atol=1e-7)
    per_head = recovered(model, "last_full", RIGHT, last, per_head=True)
    assert per_head.shape == (3, 4, 12)
    assert_close(per_head.mean(1), recording.row_BS, rtol=0, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 9), st.sampled_from([None, 1, 3]))
def test_blocks_of_any_size_give_the_mean_of_the_matrix(seed, rows, window):
    generator = torch.Generator().manual_seed(seed)
    query, key = (2 * torch.randn(2, heads, 8, 4, generator=generator) for heads in (4, 2))
    real = torch.rand(2, 8, generator=generator) < 0.8
    queries = (torch.rand(2, 8, generator=generator) < 0.5) & real
    options = {"mask": real.long(), "window": window}
    mean = averaged_row(query, key, queries, rows=rows, **options)
    one_by_one = [
        averaged_row(query, key, torch.eye(8, dtype=torch.bool)[position].expand(2, -1), **options)
        for position in range(8)
    ]
    assert_close(mean, averaged_matrix(torch.stack(one_by_one, 2), queries))


def test_packed_sequences_give_the_padded_mean():
    for family in ("llama", "mistral_window", "gpt_oss"):
        model = use_implementation(tiny(family), "flash_attention_2")
        queries = asked(RIGHT)
        for mask, at in ((RIGHT, queries), (LEFT, queries.flip(1))):
            padded = recovered(model, "last", mask, at)
            assert_close(recovered(model, "last", mask, at, feed=packed(mask)), padded, rtol=0, atol=FP32)


def test_what_it_cannot_read_is_refused():
    model = tiny()
    with pytest.raises(CreditError, match="a row asked for is that of a padding token"):
        recovered(model, "last", RIGHT, NONE)
    with pytest.raises(CreditError, match=r"queries of \(3, 11\) for a mask of \(3, 12\)"):
        recovered(model, "last", RIGHT, RIGHT[:, 1:])
    with pytest.raises(CreditError, match="under flash attention only"):
        recovered(model, "last", RIGHT, asked(RIGHT), feed=packed(RIGHT))
    with closing(attach(model)) as tap, pytest.raises(CreditError, match="use no ring attention"):
        tap.record(RIGHT, queries_BS=RIGHT, ring_group="a ring").__enter__()


def test_which_rows_generate():
    """Action t, the token at t + 1, is chosen by the row at t; two turns."""
    actions = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]])
    assert generating_rows("policy", actions).int().tolist() == [[0, 1, 1, 0, 1, 0], [0] * 6]
    assert generating_rows("policy_last", actions).int().tolist() == [[0, 0, 0, 0, 1, 0], [0] * 6]


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not function.is_view:
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("tokens", [512, 2048])
def test_no_tensor_has_the_square_of_the_tokens(tokens):
    """64 rows at a time: memory grows with the tokens, not with their square."""
    query, key = torch.randn(1, 2, tokens, 4), torch.randn(1, 1, tokens, 4)
    with Largest() as largest:
        averaged_row(query, key, torch.ones(1, tokens, dtype=torch.bool), mask=torch.ones(1, tokens))
    assert largest.elements == 2 * 64 * tokens < tokens * tokens


def generate_credit(model, prompt, length, *, late=False, last_only=False):
    """The authors' get_generator_attention_distribution, from the paper's repository, as a loop over generate's steps.

    late: as they have it, where the attention on a token stands at the one after it.
    """
    out = model.generate(
        prompt, max_new_tokens=length, do_sample=False, output_attentions=True, return_dict_in_generate=True
    )
    steps = [step[-1][0].mean(0)[-1, prompt.shape[1] :] for step in out.attentions[1:]]  # on the response so far
    if last_only:
        mean = steps[-1]
    else:
        mean = torch.stack([sum(row[j] for row in steps[j:]) / len(steps[j:]) for j in range(length - 1)])
    shares = torch.zeros(length)
    shares[slice(1, None) if late else slice(0, -1)] = mean
    return out.sequences, shares / shares.sum()


@pytest.mark.parametrize(("need", "last_only"), [("policy", False), ("policy_last", True)])
def test_abc_d_is_the_authors_but_for_their_shift_by_one(need, last_only):
    """On what generate itself attends to with its cache, against one forward over the finished sequence."""
    from abc_plugin.credit.methods import Evidence, load

    entry, length = FAMILIES["gpt_neox"], 7
    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(entry.model_type, **common, intermediate_size=48, initializer_range=0.3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    prompt = torch.tensor([[5, 9, 2, 33]])
    sequences, expected = generate_credit(model, prompt, length, last_only=last_only)
    _, theirs = generate_credit(model, prompt, length, late=True, last_only=last_only)

    actions = torch.tensor([[0] * 3 + [1] * length])
    mask = torch.ones_like(sequences)
    feed = {"input_ids": sequences, "attention_mask": mask, "use_cache": False}
    use_implementation(model, "sdpa")
    row_BS = recovered(model, "last", mask, generating_rows(need, actions), feed=feed)
    name = {"policy": "abc_d", "policy_last": "abc_d2"}[need]
    weights = load(name).weights(Evidence(sequences, actions, **{f"{need}_BA": row_BS[:, 1:]}))[0, 3:]
    assert_close(weights, expected, rtol=0, atol=1e-6)
    assert_close(weights[:-1], theirs[1:], rtol=0, atol=1e-6)
    assert weights[-1] == 0 and theirs[0] == 0
    assert (weights - 1 / length).abs().max() > 0.02  # far from uniform


def test_every_option_of_the_rows_is_an_option_of_the_mean():
    from abc_plugin.attention.attention_row import attention_rows

    options = {"scaling": 0.3, "mask": None, "causal": False, "window": 2, "softcap": 2.0, "sinks_H": torch.ones(2)}
    assert list(options) == list(inspect.signature(attention_rows).parameters)[3:]
    plain = averaged_row(QUERY, KEY, torch.ones(1, 3, dtype=torch.bool))
    for name, value in options.items():
        changed = averaged_row(QUERY, KEY, torch.ones(1, 3, dtype=torch.bool), **{name: value})
        assert torch.equal(changed, plain) == (value is None), name
