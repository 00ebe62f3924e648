"""The bias lab: its expectations against closed forms, autograd, simulation and a broken method; its command."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

import abc_plugin.tools.lab
from abc_plugin import cli
from abc_plugin.credit.methods import ABC, GRAD_INPUT, NONE, PREFIX, UNIFORM, Method
from abc_plugin.tools.lab import findings_text
from abc_plugin.tools.lab.gradient_bias import Case, cases, measure, settings
from abc_plugin.tools.lab.mdp import Completions
from abc_plugin.tools.lab.policy_gradient import (
    CRITICS,
    advantages,
    ascend,
    critic_values,
    expected_gradient,
    true_gradient,
    variance,
)
from abc_plugin.tools.lab.random_processes import (
    Tables,
    draw,
    leave_one_out,
    paper_example,
    prefix_critic,
    shaped,
    shapley,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def start(space, tables):
    policy_MPV = space.policy(tables.theta_MPV)
    return policy_MPV, space.probability(policy_MPV)


def followed(space, tables, method, kind, beta, critic="exact", lambda_=1.0):
    policy_MPV, p_MN = start(space, tables)
    dense_MNL = shaped(space, tables, method, kind, beta)
    critic = prefix_critic(space, tables) if critic == "prefix" else critic
    advantage_MNL = advantages(space, p_MN, dense_MNL, critic, lambda_, seed=7)
    return expected_gradient(space, policy_MPV, p_MN, advantage_MNL)


def truth(space, tables):
    return true_gradient(space, *start(space, tables), tables.reward_MN)


@pytest.fixture(scope="module", params=[False, True], ids=["fixed length", "ends"])
def process(request):
    space = Completions(3, 3, ends=request.param)
    return space, draw(space, 5, seed=1)


def test_the_example_turns_around_at_five_ninths():
    gradients = paper_example((0.0, 0.6, 1.0, 5 / 9))
    assert list(gradients.values()) == pytest.approx([0.125, -0.01, -0.1, 0.0], abs=1e-7)


def test_completions_are_counted_in_base_v():
    space = Completions(3, 2)
    assert space.tokens_NL.tolist() == [list(pair) for pair in itertools.product(range(3), repeat=2)]
    assert space.sequences_NS[5].tolist() == [3, 3, 1, 2]
    assert space.mask_NL.all()
    assert (space.N, space.prefixes) == (9, 4)


def test_token_zero_ends_a_completion():
    space = Completions(2, 3, ends=True)
    possible = space.tokens_NL[space.possible_N].tolist()
    assert possible == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert space.mask_NL[space.possible_N].sum(1).tolist() == [1, 2, 3, 3]
    p_1N = space.probability(space.policy(torch.zeros(1, space.prefixes, 2, dtype=torch.double)))
    assert p_1N[0, space.possible_N].tolist() == [0.5, 0.25, 0.125, 0.125]
    assert p_1N.sum() == 1.0


def test_the_true_gradient_is_that_of_autograd(process):
    space, tables = process
    theta_MPV = tables.theta_MPV.clone().requires_grad_()
    objective = 0.0
    for n in range(space.N):  # written out: prefix after prefix, without the tree's reshapes
        first, p_M = 0, 1.0
        for t in range(space.L):
            prefix = int(sum(space.tokens_NL[n, u] * space.V ** (t - 1 - u) for u in range(t)))
            if space.mask_NL[n, t]:
                p_M = p_M * theta_MPV[:, first + prefix].softmax(-1)[:, space.tokens_NL[n, t]]
            elif space.tokens_NL[n, t] != 0:
                p_M = 0.0
            first += space.V**t
        objective = objective + p_M * tables.reward_MN[:, n]
    objective.sum().backward()
    torch.testing.assert_close(truth(space, tables), theta_MPV.grad, **EXACT)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize(("method", "kind"), [(NONE, ""), (PREFIX, "random"), (PREFIX, "ideal")])
def test_none_and_any_potential_of_the_prefix_are_unbiased_at_lambda_one(process, method, kind, critic):
    space, tables = process
    for beta in (0.25, 0.5, 1.0):  # which fp32 holds, as it does the tables
        gradient = followed(space, tables, method, kind, beta, critic)
        torch.testing.assert_close(gradient, truth(space, tables), **EXACT)


def test_with_an_exact_critic_lambda_changes_nothing_and_with_a_wrong_one_it_biases(process):
    space, tables = process
    for method, kind in ((NONE, ""), (ABC, "random"), (GRAD_INPUT, "aligned")):
        by_lambda = [followed(space, tables, method, kind, 0.5, "exact", x) for x in (0.0, 0.7, 1.0)]
        torch.testing.assert_close(by_lambda[0], by_lambda[2], **EXACT)
        torch.testing.assert_close(by_lambda[1], by_lambda[2], **EXACT)
    for critic in ("zero", "noisy"):
        assert (followed(space, tables, NONE, "", 0.0, critic, 0.7) - truth(space, tables)).abs().max() > 1e-3


def test_uniform_credit_only_rescales_each_position_unless_lengths_differ():
    space = Completions(3, 4)
    tables = draw(space, 4, seed=2)
    pairs = zip(*map(space.levels, (followed(space, tables, UNIFORM, "", 0.5), truth(space, tables))), strict=True)
    for t, (rescaled, true) in enumerate(pairs):
        torch.testing.assert_close(rescaled, (1 - 0.5 * t / 4) * true, **EXACT)
    space = Completions(3, 4, ends=True)
    tables = draw(space, 32, seed=0)
    assert ((followed(space, tables, UNIFORM, "", 1.0) * truth(space, tables)) < -1e-9).any()


def test_credit_of_the_past_is_the_whole_bias(process):
    """The formula of README.md: g = true - beta · sum_t E[d log pi(t) · credit before t]."""
    space, tables = process
    policy_MPV, p_MN = start(space, tables)
    credit_MNL = shaped(space, tables, ABC, "random", 1.0)
    past_MNL = credit_MNL.cumsum(2) - credit_MNL
    expected = truth(space, tables) - 0.5 * expected_gradient(space, policy_MPV, p_MN, past_MNL)
    torch.testing.assert_close(followed(space, tables, ABC, "random", 0.5), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("critic", "lambda_"), [("exact", 1.0), ("zero", 0.9), ("noisy", 0.5)])
def test_gradient_and_variance_are_those_of_each_completion_written_out(critic, lambda_):
    space = Completions(3, 3, ends=True)
    tables = draw(space, 1, seed=3)
    policy_MPV, p_MN = start(space, tables)
    dense_MNL = shaped(space, tables, ABC, "random", 0.8)
    value_MNL = critic_values(space, p_MN, dense_MNL, critic, seed=7)
    each = torch.zeros(space.N, space.prefixes, space.V, dtype=torch.double)
    for n in range(space.N):  # by loops, without the tree's reshapes
        first, prefix = 0, 0
        for t in range(space.L):
            token = int(space.tokens_NL[n, t])
            if space.mask_NL[n, t]:
                advantage = 0.0
                for u in range(t, space.L):
                    after = value_MNL[0, n, u + 1] if u + 1 < space.L else 0.0
                    delta = dense_MNL[0, n, u] + after - value_MNL[0, n, u]
                    advantage += lambda_ ** (u - t) * delta
                each[n, first + prefix] -= advantage * policy_MPV[0, first + prefix]
                each[n, first + prefix, token] += advantage
            first, prefix = first + space.V**t, prefix * space.V + token
    p_N11 = p_MN[0, :, None, None]
    mean = (p_N11 * each).sum(0)
    advantage_MNL = advantages(space, p_MN, dense_MNL, critic, lambda_, seed=7)
    g_MPV = expected_gradient(space, policy_MPV, p_MN, advantage_MNL)
    torch.testing.assert_close(g_MPV[0], mean, **EXACT)
    expected = (p_N11 * (each - mean).square()).sum()
    torch.testing.assert_close(variance(space, policy_MPV, p_MN, advantage_MNL, g_MPV)[0], expected, **EXACT)


def test_exact_values_are_the_mean_return_to_go_by_hand():
    space = Completions(2, 2)
    policy_MPV = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]], dtype=torch.double)
    p_MN = space.probability(policy_MPV)
    torch.testing.assert_close(p_MN, torch.tensor([[0.125, 0.125, 0.675, 0.075]], dtype=torch.double))
    dense_MNL = torch.tensor([[[1.0, 2.0], [0.0, 4.0], [1.0, 0.0], [3.0, 10.0]]], dtype=torch.double)
    value_MNL = critic_values(space, p_MN, dense_MNL, "exact")
    mean = 0.125 * 3 + 0.125 * 4 + 0.675 * 1 + 0.075 * 13
    torch.testing.assert_close(value_MNL[0, :, 0], torch.full((4,), mean, dtype=torch.double))
    torch.testing.assert_close(value_MNL[0, :, 1], torch.tensor([3.0, 3.0, 1.0, 1.0], dtype=torch.double))


def test_aligned_evidence_is_leave_one_out():
    space = Completions(2, 2)
    effect = leave_one_out(space, torch.tensor([[1.0, 2.0, 5.0, 10.0]], dtype=torch.double))
    assert effect[0].tolist() == [[-2.0, -0.5], [-4.0, 0.5], [2.0, -2.5], [4.0, 2.5]]


def test_shapley_values_are_mean_effects_over_all_orders():
    space = Completions(2, 3)
    reward_MN = torch.tensor([[1.0, 2.0, 5.0, 10.0, -3.0, 0.5, 7.0, 2.0]], dtype=torch.double)
    cube = reward_MN[0].unflatten(0, (2, 2, 2))

    def kept(tokens, positions):  # mean reward where the other positions are left open
        cut = cube[tuple(int(tokens[t]) if t in positions else slice(None) for t in range(3))]
        return cut.mean()

    value_NL = shapley(space, reward_MN)[0]
    for tokens, values_L in zip(space.tokens_NL, value_NL, strict=True):
        for t in range(3):
            orders = list(itertools.permutations(range(3)))
            before = [order[: order.index(t)] for order in orders]
            mean = sum(kept(tokens, {*first, t}) - kept(tokens, first) for first in before) / len(orders)
            assert values_L[t] == pytest.approx(float(mean), abs=1e-12)
    torch.testing.assert_close(value_NL.sum(1), reward_MN[0] - reward_MN.mean(), **EXACT)


def test_under_the_prefix_critic_prefix_credit_counts_twice_until_it_is_unlearned():
    """By hand: phi of nothing 1, of "1" 3, r of "11" 5; so the prefix moves the score by 2 and by 2."""
    space = Completions(2, 2)
    score_NT = torch.tensor([[1, 0.5, 0], [1, 0.5, 1], [1, 3, 2], [1, 3, 5]], dtype=torch.double)
    tables = Tables(score_NT[None, :, 2], torch.zeros(1, 3, 2).double(), {("prefix", "ideal"): score_NT[None]})
    critic_MNL = prefix_critic(space, tables)
    assert critic_MNL[0].tolist() == [[1, 0.5], [1, 0.5], [1, 3], [1, 3]]
    p_MN = space.probability(space.policy(tables.theta_MPV))

    def of_11(method, beta, critic, lambda_):
        dense_MNL = shaped(space, tables, method, "ideal" if beta else "", beta)
        return advantages(space, p_MN, dense_MNL, critic, lambda_)[0, 3].tolist()

    assert of_11(NONE, 0.0, critic_MNL, 0.0) == [2.0, 2.0]  # sparse reward: the differences, free
    assert of_11(PREFIX, 1.0, critic_MNL, 0.0) == [4.0, 0.0]  # twice, and at the end what was too much comes off
    assert of_11(PREFIX, 0.5, critic_MNL, 0.0) == [3.0, 1.0]
    assert of_11(NONE, 0.0, critic_MNL, 0.5) == [3.0, 2.0] and of_11(PREFIX, 1.0, critic_MNL, 0.5) == [4.0, 0.0]
    assert of_11(NONE, 0.0, critic_MNL, 1.0)[0] == of_11(PREFIX, 1.0, critic_MNL, 1.0)[0] == 4.0
    unlearned_MNL = critic_MNL - 0.5 * (critic_MNL - critic_MNL[..., :1])
    assert of_11(PREFIX, 0.5, unlearned_MNL, 0.0) == [2.0, 2.0]


def test_the_doubled_count_scales_each_position_by_what_lambda_forgets():
    """README.md: at position t, with the ideal score, 1 + beta·(1 - lambda^(L-t))."""
    space = Completions(3, 4)
    tables = draw(space, 4, seed=2)
    pairs = (followed(space, tables, PREFIX, "ideal", 0.5, "prefix", 0.7), truth(space, tables))
    for t, (doubled, true) in enumerate(zip(*map(space.levels, pairs), strict=True)):
        torch.testing.assert_close(doubled, (1 + 0.5 * (1 - 0.7 ** (3 - t))) * true, rtol=1e-3, atol=1e-4)


def test_the_policy_does_not_attend_to_its_last_token_nor_know_it():
    space = Completions(3, 3, ends=True)
    row_NL = draw(space, 1, seed=0).evidence_MNL["policy_last", "random"][0]
    index = {tuple(tokens): n for n, tokens in enumerate(space.tokens_NL.tolist())}
    assert row_NL[index[1, 2, 1], 2] == 0.0
    assert row_NL[index[2, 0, 0]].tolist()[1:] == [0.0, pytest.approx(row_NL[index[2, 0, 0], 2])]
    assert torch.equal(row_NL[index[1, 2, 1]], row_NL[index[1, 2, 2]])
    assert not torch.equal(row_NL[index[1, 2, 1]], row_NL[index[2, 2, 1]])


def test_rewards_are_standardised_and_alike_for_strings_that_differ_behind_the_end():
    space = Completions(3, 3, ends=True)
    for rewards in ("table", "sum"):
        reward_MN = draw(space, 2, seed=0, rewards=rewards, offset=1.5).reward_MN
        possible = reward_MN[:, space.possible_N]
        torch.testing.assert_close(possible.mean(1), torch.full((2,), 1.5, dtype=torch.double), rtol=0, atol=1e-5)
        torch.testing.assert_close(possible.std(1), torch.ones(2, dtype=torch.double), rtol=0, atol=1e-5)
        assert torch.equal(reward_MN, reward_MN[:, space.canonical_N])


def test_ascent_on_the_sparse_reward_reaches_the_optimum_and_on_the_example_credit_does_not():
    space = Completions(3, 3)
    tables = draw(space, 16, seed=4)
    dense_MNL = shaped(space, tables, NONE, "", 0.0)
    p_MN = space.probability(ascend(space, tables.theta_MPV, dense_MNL, steps=400))
    assert ((p_MN * tables.reward_MN).sum(1) > tables.reward_MN.amax(1) - 0.01).all()

    space = Completions(2, 2)  # the example: attention on the first token 0.9 if the second is 1, else 0
    credit = torch.tensor([[0.0, 0.5], [0.9, 0.1], [0.0, 0.5], [0.9, 0.1]], dtype=torch.double)
    p_MN = space.probability(ascend(space, torch.zeros(1, 3, 2, dtype=torch.double), credit[None]))
    assert p_MN[0, space.tokens_NL[:, 1] == 1].sum() < 1e-6


def rows_of(method, beta=0.5, name="it", kind="ideal", critic="exact", lambdas=(1.0,)):
    space = Completions(3, 3)
    tables = draw(space, 6, seed=5)
    wanted = settings([Case(name, method, kind), Case("none", NONE, "")], [beta], list(lambdas))
    return list(measure(space, tables, wanted, critic, 0))


def test_a_method_whose_credit_is_one_token_early_or_late_is_caught():
    def late(by):
        def credit(evidence, reward_B):
            prompt_BA, string_BA = PREFIX.credit(evidence, reward_B).split([1, 3], 1)
            return torch.cat([prompt_BA, string_BA.roll(by, 1)], 1)

        return Method(frozenset({"prefix"}), credit)

    none, right = rows_of(PREFIX)
    assert findings_text.is_unbiased(none)
    assert findings_text.is_unbiased(right)
    for by in (1, -1):
        wrong = rows_of(late(by))[1]
        assert not findings_text.is_unbiased(wrong)
        assert wrong.values["cosine"].max() < 0.999
        assert "Biased" in findings_text.verdict(findings_text.summarise([none, wrong]))[1]


def test_verdicts_sort_methods_by_their_numbers():
    rows = rows_of(UNIFORM, 0.8, "uniform", "") + rows_of(ABC, 0.8, "abc", "random")[1:]
    unbiased, straight, biased, kept = findings_text.verdict(findings_text.summarise(rows))
    assert unbiased == "Unbiased in every setting: none."
    assert straight == "Biased, but no logit is pushed the wrong way: uniform."
    assert biased == "Biased, and some logits are pushed the wrong way: abc, random."
    assert "uniform" in kept
    wrong_critic = rows_of(ABC, 0.8, "abc", "random", critic="noisy", lambdas=(1.0, 0.9))
    assert findings_text.verdict(findings_text.summarise(wrong_critic))[0].endswith(
        "the wrong way: none; abc, random."
    )


def test_ascent_follows_the_lambda_unless_the_critic_is_exact():
    one, half = rows_of(PREFIX, kind="random", critic="zero", lambdas=(1.0, 0.5))[2:]
    assert (one.values["best"] - half.values["best"]).abs().max() > 1e-3
    one, half = rows_of(PREFIX, kind="random", critic="exact", lambdas=(1.0, 0.5))[2:]
    assert torch.equal(one.values["best"], half.values["best"])
    assert (one.values["noise"] - half.values["noise"]).abs().max() > 1e-3
    for name in ("cosine", "norm_ratio"):  # unbiased is direction and length
        values = one.values | {name: torch.full_like(one.values[name], 0.999)}
        assert findings_text.is_unbiased(one) and not findings_text.is_unbiased(
            dataclasses.replace(one, values=values)
        )


def test_methods_whose_evidence_cannot_be_made_are_skipped_by_name():
    made, skipped = cases({"none": NONE, "abc": ABC, "oracle": Method(frozenset({"text"}), NONE.credit)})
    assert [case.label for case in made] == ["none", "abc, random", "abc, aligned"]
    assert skipped == ["oracle"]


SMALL = ["lab", "--vocabulary=2", "--length=3", "--reward_models=3", "--betas=1"]
SMALL += ["--methods", "abc", "uniform", "--lambdas", "1", "0.5"]


def test_the_command_writes_what_it_prints_and_keeps_results_of_other_settings(tmp_path, capsys):
    command = [*SMALL, "--out", str(tmp_path)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "+0.1250   +0.0800   +0.0350   -0.0100   -0.0550   -0.1000" in printed
    assert printed.splitlines()[-1].endswith(" ".join(str(tmp_path / f"lab.{x}") for x in ("json", "md", "png")))
    written = (tmp_path / "lab.json").read_text()
    result = json.loads(written, parse_constant=pytest.fail)  # no NaN, no Infinity
    credits = (("none", "", 0.0), ("abc", "random", 1.0), ("abc", "aligned", 1.0), ("uniform", "", 1.0))
    assert [(row["method"], row["evidence"], row["beta"], row["lambda"]) for row in result["rows"]] == [
        (*credit, lambda_) for credit in credits for lambda_ in (1.0, 0.5)
    ]
    assert result["rows"][0]["unbiased"] and not result["rows"][2]["unbiased"]
    assert all(set(findings_text.COLUMNS) <= set(row) for row in result["rows"])
    table = (tmp_path / "lab.md").read_text()
    assert "| abc, aligned | 1 | 0.5 |" in table and result["verdict"][0] in table
    assert (tmp_path / "lab.png").read_bytes().startswith(b"\x89PNG")

    assert cli.main(command) == 0
    assert cli.main([*command, "--seed", "1"]) == 2
    assert "of a lab with other settings; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "lab.json").read_text() == written
    (tmp_path / "other" / "lab.png").mkdir(parents=True)  # known before anything is computed
    assert cli.main([*command, "--out", str(tmp_path / "other")]) == 2
    assert "--out" in (said := capsys.readouterr()).err and "lab.png cannot be written" in said.err and not said.out


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("--methods abc abc_signed uniform prefix --betas 0.8 --lambdas 1", 9),
        ("--methods abc abc_signed prefix --betas 0.8 --lambdas 0.95 --critic prefix --rewards sum", 8),
    ],
)
def test_the_tables_of_the_readme_are_what_the_command_writes(words, count, tmp_path):
    assert cli.main(["lab", *words.split(), "--out", str(tmp_path)]) == 0
    readme = Path(abc_plugin.tools.lab.__file__).with_name("README.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in (tmp_path / "lab.md").read_text(encoding="utf-8").splitlines() if line[:6] != "| beta"]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.count("|") > 10]
    assert len(table) == 2 + count
    for label, beta, _, *values in [row for row in table if row[0] != "---"]:
        assert f"| {' | '.join([label, beta, *values])} |" in readme


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--vocabulary 1", "--vocabulary 1 is too small; the least is 2"),
        ("--length 0", "--length 0 is too small; the least is 1"),
        ("--reward_models 0", "--reward_models 0 is too small; the least is 1"),
        ("--betas 0.5 1.5", "--betas 1.5 is outside [0, 1]"),
        ("--betas nan", "--betas nan is outside [0, 1]"),
        ("--lambdas -0.1", "--lambdas -0.1 is outside [0, 1]"),
        ("--reward_mean 11", "--reward_mean 11 is outside [-10, 10]"),
        ("--vocabulary 10 --length 5", "--length 5 has more than 20,000 completions; lower --length or --vocabulary"),
        ("--vocabulary 2 --length 1000000", "lower --length or --vocabulary"),
        ("--reward_models 1000000", "at most"),
        ("--methods abc abx", "--methods 'abx' is not registered; registered: abc"),
        ("--out /dev/null/x", "cannot be written: Not a directory"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(words, message, tmp_path, capsys):
    assert cli.main(["lab", "--out", str(tmp_path / "lab"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "lab").exists()


def test_tokens_of_one_position_and_every_registered_method_run(tmp_path):
    words = "lab --vocabulary 2 --length 1 --reward_models 2 --betas 1 --lambdas 1 --out"
    assert cli.main([*words.split(), str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "lab.json").read_text())["rows"]
    assert len(rows) > 7 and all(row["unbiased"] for row in rows)  # all reward is on the only token
