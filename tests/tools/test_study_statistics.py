"""A study's statistics: by hand, against simulated runs whose truth is known, and by what must not change them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_tables import condition, pair, table

from abc_plugin.tools.study import learning_curves
from abc_plugin.tools.study.comparisons import OPEN, YES, analyse, per_run
from abc_plugin.tools.study.learning_curves import at_equal_kl, centred, change, crossing, frontier, steps_to_rise
from abc_plugin.tools.study.paired_statistics import Effect, Estimate, deviation_ratio, holm, paired, t_interval

near = pytest.approx


def ends(estimate):
    return estimate.value, estimate.low, estimate.high


# by hand


def test_mean_with_student_t():
    """1, 2, 3: mean 2, s = 1, n = 3, t_2 = 4.302653: 2 ± 4.302653 / sqrt 3."""
    assert ends(t_interval([1, 2, 3])) == near((2, 2 - 2.4841377, 2 + 2.4841377))
    assert t_interval([7.0]) == Estimate(7.0, None, None)


def test_pitman_and_morgan():
    """Squares of x about its mean 20, of y 5, products 8: s_x / s_y = 2, r = 0.8.

    Of sums and differences: (20 - 5) / sqrt((20 + 5 + 16)(20 + 5 - 16)) = 0.780869, which with n - 2 = 2 degrees has
    p = 1 - 0.780869. K = 1 + (1 - 0.64) 4.302653² = 7.664616; K ∓ sqrt(K² - 1) = 0.0655170, 15.263714.
    """
    test = deviation_ratio([0, 4, 2, 6], [0, 1, 2, 3])
    assert test.p == near(1 - 0.780869, abs=1e-6)
    assert ends(test.estimate) == near((2, 2 * math.sqrt(0.0655170), 2 * math.sqrt(15.263714)), rel=1e-4)


def test_ratios_of_spread_that_have_no_test():
    for x, y in (([1, 3], [1, 2]), ([1, 2, 4], [3, 3, 3]), ([5, 5, 5], [1, 2, 3])):
        assert deviation_ratio(x, y) is None
    assert deviation_ratio([1.1, 2.1, 4.1], [1, 2, 4]) == Effect(3, Estimate(1, 1, 1), 1.0)


def test_paired_differences():
    """Differences 1, 2, 3: t = 2 sqrt 3, p = 1 - t / sqrt(2 + t²) with 2 degrees."""
    test = paired([2, 4, 6], [1, 2, 3])
    assert (test.n, test.p) == (3, near(1 - math.sqrt(12 / 14)))
    assert ends(test.estimate) == near((2, 2 - 2.4841377, 2 + 2.4841377))
    assert [paired(x, [1, 2, 3]).p for x in ([1, 2, 3], [1.1, 2.1, 3.1])] == [1.0, 0.0]  # all the same
    assert paired([2.0], [1.0]) == Effect(1, Estimate(1.0))


def test_holm():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1, which may not fall below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == [near(0.03), near(0.06), near(0.06), near(0.02)]
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_smoothing_takes_as_many_steps_before_as_after():
    """Windows of 1, 3, 5, 5, 3, 1 steps."""
    assert centred(np.array([5.0, 1, 3, 3, 3, 10])) == near([5, 3, 3, 4, 16 / 3, 10])
    line = np.arange(12.0) * 3 - 7
    assert centred(line) == near(line)
    assert centred(np.array([[4.0]])) == near(4.0)


def test_crossing_is_linear_between_steps():
    curve, steps = np.arange(10.0)[None], np.arange(10.0) * 5 + 5  # 0 at step 5, 1 at step 10, ...
    at = [crossing(curve, steps, np.array([target]))[0] for target in (-1.0, 0.0, 4.5, 9.0, 9.1)]
    assert at == [5.0, 5.0, 27.5, 50.0, math.inf]


def ramp(length, steps=20):
    """(1, steps): 0 at the first step, 1 from ``length`` steps later on."""
    return np.minimum(np.arange(steps) / length, 1.0)[None]


NUMBERED = np.arange(1.0, 21)


def test_steps_to_rise():
    """Start 0, end 1, target 0.9.

    The baseline's ramp of 10, smoothed, is 0.88 at step 10 and 0.94 at step 11: it reaches 0.9 at 10 1/3. The ramp of
    5 is 0.88 at step 6 and 0.96 at step 7: 6 1/4. Neither changes for rewards that are lower by 100.
    """
    for shift in (0.0, -100.0):
        found = steps_to_rise(ramp(5) + shift, ramp(10) + shift, NUMBERED)
        assert found.target == near(0.9 + shift)
        assert (found.steps.value, found.baseline_steps.value) == near((6.25, 10 + 1 / 3))
        assert found.ratio == Estimate(near(6.25 / (10 + 1 / 3)))
    assert ends(steps_to_rise(np.repeat(ramp(5), 5, 0), np.repeat(ramp(10), 5, 0), NUMBERED).steps) == near(
        (6.25,) * 3
    )
    assert steps_to_rise(np.repeat(ramp(5), 4, 0), np.repeat(ramp(10), 4, 0), NUMBERED).steps.low is None


def test_steps_to_a_rise_that_is_not_reached_or_not_there():
    never = steps_to_rise(np.repeat(ramp(10) / 2, 5, 0), np.repeat(ramp(10), 5, 0), NUMBERED)
    assert ends(never.steps) == (math.inf,) * 3 == ends(never.ratio)
    assert steps_to_rise(ramp(5), np.zeros((1, 20)), NUMBERED) is None
    # One seed of five never gets there: only the (4/5)^5 draws without it do, since it pulls the mean to 4/5 at most.
    some = steps_to_rise(np.concatenate([ramp(5)] * 4 + [0 * ramp(5)]), np.repeat(ramp(10), 5, 0), NUMBERED)
    assert some.steps.high == math.inf and math.isinf(some.steps.value) and some.steps.low == near(6.25)


def test_change_from_the_first_step_and_within_the_last_ten():
    """Slopes 0.2, 0.4, 0.6 a step: the second half of the last 10 steps is 5 steps on, so higher by 1, 2, 3."""
    slopes, climb = np.array([[0.2], [0.4], [0.6]]), np.arange(24.0)
    assert ends(change(slopes * climb, late=True)) == near((2, 2 - 2.4841377, 2 + 2.4841377))
    assert change(climb[None]) == Estimate(18.5)  # the mean of 14 to 23, from 0
    late = [change(climb[None, :steps], late=True).value for steps in (24, 5, 1)]
    assert late == [5.0, 3.0, 0.0]  # 3 = 3.5 - 0.5, without the step in the middle


def test_frontier_keeps_the_first_time_that_a_kl_is_reached():
    kl, reward = frontier(np.array([0.0, 2, 4, 4, 4, 4, 4]), np.arange(7.0))
    assert kl == near([0, 2, 2.8, 3.6, 4]) and reward == near([0, 1, 2, 3, 4])


def test_reward_at_equal_kl():
    """KL 0 to 9 and 0 to 4.5 nats, rewards 2 KL and 2 KL + 1: compared from 3.375, a quarter below 4.5, to 4.5."""
    fast, slow = np.arange(10.0), np.arange(10.0) / 2
    assert at_equal_kl(slow, 2 * slow + 1, fast, 2 * fast) == near((2 * 3.9375 + 1, 2 * 3.9375, 3.375, 4.5))
    assert at_equal_kl(slow + 20, slow, fast, fast) is None and at_equal_kl(0 * slow, slow, fast, fast) is None


def test_measures_per_run():
    climb = np.arange(20.0)[None]
    assert per_run(condition(reward=climb, kl=2 * climb).curves).to_dict("records") == [
        {"reward": 9.5, "reward_last": 14.5, "kl": 19.0, "kl_last": 29.0}
    ]


# simulated studies

SIMULATIONS = 1000
T = 30


def noise(random, shape, correlation=0.6):
    """Standard normal, correlated along the last axis from step to step."""
    fresh = random.standard_normal(shape)
    for step in range(1, shape[-1]):
        fresh[..., step] *= math.sqrt(1 - correlation**2)
        fresh[..., step] += correlation * fresh[..., step - 1]
    return fresh


def simulated(random, n=10, truth=0.25):
    """Rewards (n, T) of abc and none: a rise, effects of the seed common to both and of the run, and noise."""
    rise = 4 * (1 - np.exp(-np.arange(T) / 8))
    common = rise + 0.3 * random.standard_normal((n, 1))
    return [
        common + shift + 0.2 * random.standard_normal((n, 1)) + 0.4 * noise(random, (n, T)) for shift in (truth, 0.0)
    ]


def share(flags):
    return float(np.mean(list(flags)))


def holds(estimate, truth):
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize("pace", [0.7, 1.0, 1.6])
def test_coverage_of_steps_is_what_the_report_says(monkeypatch, pace):
    """Of methods slower, as fast and faster, with little and much noise: as the report says."""
    monkeypatch.setattr(learning_curves, "RESAMPLES", 500)
    random = np.random.default_rng(3)
    steps = np.arange(1.0, T + 1)

    def runs(seed, scale, wobble):
        pace = scale * np.exp(0.1 * random.standard_normal(seed.shape))
        level = 4 + seed + 0.15 * random.standard_normal(seed.shape)
        return level * (1 - np.exp(-np.arange(T) * pace / 8)) + wobble * noise(random, (len(seed), T))

    seed = 0.3 * random.standard_normal((40_000, 1))
    truth = steps_to_rise(*(runs(seed, scale, 0.0).mean(0, keepdims=True) for scale in (pace, 1.0)), steps)
    for n, (low, high) in {10: (91, 99), 5: (88, 99)}.items():
        for wobble in (0.15, 0.4):
            held = []
            for _ in range(SIMULATIONS // 2):
                seed = 0.3 * random.standard_normal((n, 1))
                found = steps_to_rise(runs(seed, pace, wobble), runs(seed, 1.0, wobble), steps)
                held.append([holds(found.steps, truth.steps.value), holds(found.ratio, truth.ratio.value)])
            for percent in 100 * np.mean(held, axis=0):
                assert low <= percent <= high, (n, wobble, percent)


@pytest.mark.parametrize("pace", [1.0, 0.5])
@pytest.mark.parametrize("shape", ["steady", "soon flat"])
def test_a_slower_method_on_the_same_frontier_is_no_worse_at_equal_kl(pace, shape):
    """Reward depends on KL alone; KL rises at half the pace: over training worse, at equal KL the same."""
    random = np.random.default_rng(4)

    def runs(pace, seed):
        way = np.linspace(0, 1, T) * pace
        kl = 0.6 * way if shape == "steady" else 0.6 * (1 - np.exp(-4 * way))
        level = 4.8 + seed + 0.15 * random.standard_normal((10, 1))
        reward = 0.2 + level * (1 - np.exp(-kl / 0.25)) + 0.15 * random.standard_normal((10, T))
        return kl * (1 + 0.02 * random.standard_normal((10, T))), reward

    differences, alarms = [], []
    for _ in range(100):
        seed = 0.3 * random.standard_normal((10, 1))
        (kl, reward), (base_kl, base_reward) = runs(pace, seed), runs(1.0, seed)
        pairs = [at_equal_kl(*run) for run in zip(kl, reward, base_kl, base_reward, strict=True)]
        found = paired(*np.transpose(pairs)[:2])
        differences.append(found.estimate.value)
        alarms.append(found.p < 0.05)
    assert abs(np.mean(differences)) < 0.02 and share(alarms) <= 0.12
    if pace < 1:
        assert (reward.mean(1) < base_reward.mean(1)).all()


# what must not matter

tables = st.integers(0, 10**6).map(lambda seed: simulated(np.random.default_rng(seed), n=5))


@given(tables, st.floats(-20, 20).map(lambda x: round(x, 1)))
@settings(deadline=None, max_examples=15)
def test_a_constant_on_all_rewards_changes_no_comparison(runs, shift):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning_curves, "RESAMPLES", 50)
        kl = [np.cumsum(np.ones((5, T)), 1) * pace for pace in (0.02, 0.03)]
        [old], [new] = (analyse(pair(runs[0] + by, runs[1] + by, *kl)).comparisons for by in (0.0, shift))
    for name, test in old.tests.items():
        assert ends(test.estimate) == near(ends(new.tests[name].estimate), rel=1e-6, abs=1e-9)
        assert test.p == near(new.tests[name].p, rel=1e-4, abs=1e-12)
    assert len(old.tests) == 6 and ends(old.steps.steps) == near(ends(new.steps.steps), rel=1e-6)


# which conditions are compared


def constant(method, value, credit="", group="", seeds=(1, 2, 3)):
    made = condition(method, value + 0.1 * np.arange(len(seeds))[:, None] + np.arange(12) / 10, None, credit, group)
    made.curves["reward"].index = list(seeds)
    return made


def test_each_condition_is_compared_within_its_group():
    analysis = analyse(
        table(
            constant("none", 0.0, group="length 24"),
            constant("abc", 1.0, " β 0.8", "length 24"),
            constant("abc", 4.0, " β 1", "length 24"),
            constant("abc_signed", 2.0, " β 0.8", "length 24"),
            constant("uniform", 3.0, " β 0.8", "length 24"),
            constant("none", 5.0, group="length 48"),
            constant("abc", 1.0, " β 1", "length 96"),
        )
    )
    assert [(c.condition.label, c.other.label, c.tests["reward"].estimate.value) for c in analysis.comparisons] == [
        ("abc β 0.8", "none", near(1.0)),
        ("abc β 1", "none", near(4.0)),
        ("abc_signed β 0.8", "none", near(2.0)),
        ("uniform β 0.8", "none", near(3.0)),
        ("abc β 0.8", "uniform β 0.8", near(-2.0)),  # of the same credit settings
        ("abc_signed β 0.8", "uniform β 0.8", near(-1.0)),
    ]
    assert "Without a baseline (method none with the same settings): abc β 1, length 96." in analysis.warnings


def test_pairs_are_of_the_seeds_that_both_have():
    analysis = analyse(table(constant("none", 0.0, seeds=(2, 3, 9)), constant("abc", 1.0)))
    [found] = analysis.comparisons
    # Seeds 2 and 3 are abc's second and third (+0.1, +0.2) and the baseline's first and second (+0.0, +0.1).
    assert found.seeds == [2, 3] and found.tests["reward"].estimate.value == near(1.1)
    assert "abc against none: compared on the 2 seeds that both have; only one has 1, 9." in analysis.warnings


@pytest.mark.parametrize(("length", "outcome"), [(24, OPEN), (10, YES)])
def test_a_baseline_that_still_rises_is_said_once_and_decides_no_claim_of_steps(length, outcome):
    base, fast = (0.1 * np.arange(5)[:, None] + ramp(steps, 24) for steps in (length, 2))
    analysis = analyse(table(condition("none", base), *(condition("abc", fast, None, beta) for beta in ("5", "1"))))
    rising = outcome == OPEN
    assert len([warning for warning in analysis.warnings if "No plateau yet" in warning]) == rising
    said, number = list(analysis.comparisons[0].claims().values())[1]
    assert said == outcome and ("still rises" in number) == rising
    assert analysis.comparisons[0].steps.ratio.high <= 0.5  # the number stays


def test_runs_without_more_than_the_last_ten_steps_are_said():
    said = [analyse(table(condition("none", np.ones((2, steps))))).warnings for steps in (1, 10, 11)]
    assert said[0] == said[1] == ["Some runs have at most 10 steps: the last 10 are all of them."] and said[2] == []


@pytest.mark.parametrize(("lifted", "without"), [((5, 5, 5), 3), ((5, 0, 0), 1)])
def test_pairs_that_share_no_kl_are_named(lifted, without):
    climb, rewards = np.linspace(0, 1, 12), np.arange(3)[:, None] + np.linspace(0, 1, 12)
    analysis = analyse(pair(rewards, rewards, climb + np.array(lifted)[:, None], np.tile(climb, (3, 1))))
    assert f"abc β 0.8 against none: {without} of 3 pairs share no KL: not in reward at equal KL." in analysis.warnings
    [claims] = [each.claims() for each in analysis.comparisons]
    assert ([*claims.values()][-1] == (OPEN, "no KL in common")) == (without == 3)
