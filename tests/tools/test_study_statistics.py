"""A study's statistics: by hand, against simulated runs whose truth is known, and by what must not change them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_tables import condition, pair

from abc_plugin.tools.study import learning_curves
from abc_plugin.tools.study.comparisons import EQUAL_KL, analyse, per_run
from abc_plugin.tools.study.inference import (
    Estimate,
    Paired,
    coverage_of_two_errors,
    deviation_ratio,
    holm,
    mean,
    paired,
)
from abc_plugin.tools.study.learning_curves import at_equal_kl, centred, crossing, frontier, late_rise, steps_to_rise
from abc_plugin.tools.study.table import Table
from abc_plugin.tools.study.verdict import claims

near = pytest.approx
numbers = st.floats(-50, 50).map(lambda x: round(x, 2))


def ends(estimate):
    return estimate.value, estimate.low, estimate.high


# by hand


def test_mean_with_student_t_and_with_two_standard_errors():
    """1, 2, 3: mean 2, s = 1, n = 3, t_2 = 4.302653: 2 ± 4.302653 / sqrt 3; 2 standard errors are 2 / sqrt 3."""
    assert ends(mean([1, 2, 3]).estimate) == near((2, 2 - 2.4841377, 2 + 2.4841377))
    assert mean([1, 2, 3]).two_errors == near(1.1547005)
    assert mean([7.0]).estimate == Estimate(7.0, None, None) and mean([7.0]).two_errors is None


def test_two_standard_errors_are_no_95_percent():
    """t with 1 degree of freedom is Cauchy's: P(|t| < 2) = 2 atan(2) / pi; with 2: 2 / sqrt(2 + 4)."""
    assert coverage_of_two_errors(2) == near(2 * math.atan(2) / math.pi)
    assert coverage_of_two_errors(3) == near(2 / math.sqrt(6))
    assert coverage_of_two_errors(10) == near(0.923, abs=5e-4)


def test_pitman_and_morgan():
    """Squares of x about its mean 20, of y 5, products 8: s_x / s_y = 2, r = 0.8.

    Of sums and differences: (20 - 5) / sqrt((20 + 5 + 16)(20 + 5 - 16)) = 0.780869, which with n - 2 = 2 degrees has
    p = 1 - 0.780869. K = 1 + (1 - 0.64) 4.302653² = 7.664616; K ∓ sqrt(K² - 1) = 0.0655170, 15.263714.
    """
    test = deviation_ratio([0, 4, 2, 6], [0, 1, 2, 3])
    assert test.p == near(1 - 0.780869, abs=1e-6)
    assert ends(test.ratio) == near((2, 2 * math.sqrt(0.0655170), 2 * math.sqrt(15.263714)), rel=1e-4)


def test_ratios_of_spread_that_have_no_test():
    assert deviation_ratio([1], [2]) is None and deviation_ratio([1, 2], [3, 3]) is None
    assert deviation_ratio([1, 3], [1, 2]).ratio == Estimate(2.0) and deviation_ratio([1, 3], [1, 2]).p is None
    assert deviation_ratio([5, 5, 5], [1, 2, 3]).p is None
    shifted = deviation_ratio([1.1, 2.1, 4.1], [1, 2, 4])
    assert ends(shifted.ratio) == near((1, 1, 1)) and shifted.p == 1.0


def test_paired_differences():
    """Differences 1, 2, 3: t = 2 sqrt 3, p = 1 - t / sqrt(2 + t²) with 2 degrees.

    t_2 has quantiles (2q - 1) / sqrt(2 q (1 - q)): at 0.8 1.0606602. s = 1, n = 3.
    """
    test = paired([2, 4, 6], [1, 2, 3])
    assert (test.n, test.p) == (3, near(1 - math.sqrt(12 / 14)))
    assert ends(test.difference) == near((2, 2 - 2.4841377, 2 + 2.4841377))
    assert test.detectable == near((4.3026527 + 1.0606602) / math.sqrt(3))


def test_paired_differences_that_are_all_the_same():
    assert paired([1, 2, 3], [1, 2, 3]).p == 1.0
    assert paired([1.1, 2.1, 3.1], [1, 2, 3]).p == 0.0
    assert paired([2.0], [1.0]) == Paired(1, Estimate(1.0))


def test_holm():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1, which may not fall below the one before; None does not count."""
    assert holm([0.01, 0.04, 0.03, None, 0.005]) == [near(0.03), near(0.06), near(0.06), None, near(0.02)]
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([None]) == [None] and holm([]) == []


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


NUMBERED = tuple(range(1, 21))


def test_steps_to_rise():
    """Start 0, end 1, target 0.9.

    The baseline's ramp of 10, smoothed, is 0.88 at step 10 and 0.94 at step 11: it reaches 0.9 at 10 1/3. The ramp of
    5 is 0.88 at step 6 and 0.96 at step 7: 6 1/4. Neither changes for rewards that are lower by 100.
    """
    for shift in (0.0, -100.0):
        found = steps_to_rise(ramp(5) + shift, ramp(10) + shift, NUMBERED)
        assert found.target == near(0.9 + shift)
        assert (found.steps.value, found.baseline_steps.value) == near((6.25, 10 + 1 / 3))
        assert found.ratio == Estimate(near(6.25 / (10 + 1 / 3))) and found.never is None
    many = steps_to_rise(np.repeat(ramp(5), 5, 0), np.repeat(ramp(10), 5, 0), NUMBERED)
    assert ends(many.steps) == near((6.25,) * 3) and many.never == 0.0
    assert steps_to_rise(np.repeat(ramp(5), 4, 0), np.repeat(ramp(10), 4, 0), NUMBERED).steps.low is None


def test_steps_to_a_rise_that_is_not_reached_or_not_there():
    never = steps_to_rise(np.repeat(ramp(10) / 2, 5, 0), np.repeat(ramp(10), 5, 0), NUMBERED)
    assert ends(never.steps) == (math.inf,) * 3 == ends(never.ratio) and never.never == 1.0
    assert steps_to_rise(ramp(5), np.zeros((1, 20)), NUMBERED) is None
    # One seed of five never gets there: only the (4/5)^5 draws without it do, since it pulls the mean to 4/5 at most.
    some = steps_to_rise(np.concatenate([ramp(5)] * 4 + [0 * ramp(5)]), np.repeat(ramp(10), 5, 0), NUMBERED)
    assert some.never == near(1 - 0.8**5, abs=0.02)
    assert some.steps.high == math.inf and math.isinf(some.steps.value) and some.steps.low == near(6.25)


def test_a_baseline_that_still_rises_at_its_end():
    """Slopes 0.2, 0.4, 0.6 a step: the second half of the last 10 steps is 5 steps on, so higher by 1, 2, 3."""
    slopes, climb = np.array([[0.2], [0.4], [0.6]]), np.arange(24.0)
    assert ends(late_rise(slopes * climb)) == near((2, 2 - 2.4841377, 2 + 2.4841377))  # as of three seeds: no sign
    assert late_rise(slopes + climb).sign == 1 == late_rise(slopes + np.minimum(climb, 20)).sign
    assert late_rise(slopes + np.minimum(climb, 14)).sign == 0  # flat from the first of its last 10 steps on
    assert late_rise(climb[None]) == Estimate(5.0) and late_rise(climb[None, :1]) is None
    assert late_rise(climb[None, :5]) == Estimate(3.0)  # 3.5 - 0.5, without the step in the middle
    assert steps_to_rise(ramp(5), ramp(10), NUMBERED).late_rise == Estimate(0.0)


def test_frontier_keeps_the_first_time_that_a_kl_is_reached():
    kl, reward = frontier(np.array([0.0, 2, 4, 4, 4, 4, 4]), np.arange(7.0))
    assert kl == near([0, 2, 2.8, 3.6, 4]) and reward == near([0, 1, 2, 3, 4])


def test_reward_at_equal_kl():
    """KL 0 to 9 and 0 to 4.5 nats, rewards 2 KL and 2 KL + 1: compared from 3.375, a quarter below 4.5, to 4.5."""
    fast, slow = np.arange(10.0), np.arange(10.0) / 2
    found = at_equal_kl(slow, 2 * slow + 1, fast, 2 * fast)
    assert (found.low, found.high) == near((3.375, 4.5))
    assert (found.reward, found.baseline) == near((2 * 3.9375 + 1, 2 * 3.9375))
    assert at_equal_kl(slow + 20, slow, fast, fast) is None and at_equal_kl(0 * slow, slow, fast, fast) is None


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


@pytest.fixture(scope="module")
def many():
    """The runs of 1000 simulated studies of 10 seeds with a true difference: (1000, 2, 10, T)."""
    random = np.random.default_rng(1)
    return np.array([simulated(random) for _ in range(SIMULATIONS)])


def share(flags):
    return float(np.mean(list(flags)))


def holds(estimate, truth):
    return estimate.low <= truth <= estimate.high


TRUE_MEAN = float(np.mean(4 * (1 - np.exp(-np.arange(T) / 8))))


def test_nominal_coverage(many):
    means = [mean(none) for none in many.mean(-1)[:, 1]]
    assert 0.93 <= share(holds(each.estimate, TRUE_MEAN) for each in means) <= 0.97
    assert 0.93 <= share(holds(paired(*both).difference, 0.25) for both in many.mean(-1)) <= 0.97
    assert 0.93 <= share(holds(paired(*both).difference, 0.25) for both in many[..., -10:].mean(-1)) <= 0.97
    by_errors = share(abs(each.estimate.value - TRUE_MEAN) <= each.two_errors for each in means)
    assert by_errors == near(coverage_of_two_errors(10), abs=0.02) and by_errors < 0.95
    ratios = [deviation_ratio(*both) for both in many.mean(-1)]
    assert 0.93 <= share(holds(each.ratio, 1.0) for each in ratios) <= 0.97
    assert 0.03 <= share(each.p < 0.05 for each in ratios) <= 0.07


def test_the_difference_that_could_be_seen_is_seen_in_four_studies_of_five(many):
    """The true difference of the simulation is 0.25, the spread of differences that which gives the power."""
    differences = np.subtract(*many.mean(-1).transpose(1, 0, 2))
    detectable = float(np.mean([paired(each, 0 * each).detectable for each in differences]))
    shifted = differences - 0.25 + detectable
    assert share(paired(each, 0 * each).p < 0.05 for each in shifted) == near(0.8, abs=0.03)


def test_false_alarms_are_as_many_as_they_say():
    random = np.random.default_rng(2)
    runs = np.array([[x.mean(1) for x in simulated(random, truth=0.0)] for _ in range(SIMULATIONS)])
    p_values = [paired(*both).p for both in runs]
    assert 0.03 <= share(p < 0.05 for p in p_values) <= 0.07
    # Of five comparisons without a difference, Holm's correction leaves a false alarm in at most 5 % of reports.
    families = [p_values[i : i + 5] for i in range(0, SIMULATIONS, 5)]
    assert share(min(holm(family)) < 0.05 for family in families) <= 0.09
    assert share(min(family) < 0.05 for family in families) >= 0.15


@pytest.mark.parametrize("pace", [0.7, 1.0, 1.6])
def test_coverage_of_steps_is_what_the_report_says(monkeypatch, pace):
    """Of methods slower, as fast and faster, with little and much noise: within HELD, which the report quotes."""
    monkeypatch.setattr(learning_curves, "RESAMPLES", 500)
    random = np.random.default_rng(3)
    steps = tuple(range(1, T + 1))

    def runs(seed, scale, wobble):
        pace = scale * np.exp(0.1 * random.standard_normal(seed.shape))
        level = 4 + seed + 0.15 * random.standard_normal(seed.shape)
        return level * (1 - np.exp(-np.arange(T) * pace / 8)) + wobble * noise(random, (len(seed), T))

    seed = 0.3 * random.standard_normal((40_000, 1))
    truth = steps_to_rise(*(runs(seed, scale, 0.0).mean(0, keepdims=True) for scale in (pace, 1.0)), steps)
    for n, (low, high) in learning_curves.HELD.items():
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
        found = paired([one.reward for one in pairs], [one.baseline for one in pairs])
        differences.append(found.difference.value)
        alarms.append(found.p < 0.05)
    assert abs(np.mean(differences)) < 0.02 and share(alarms) <= 0.12
    if pace < 1:
        assert (reward.mean(1) < base_reward.mean(1)).all()


# what must not matter

tables = st.integers(0, 10**6).map(lambda seed: simulated(np.random.default_rng(seed), n=5))


@given(tables, st.floats(-20, 20).map(lambda x: round(x, 1)))
@settings(deadline=None, max_examples=15)
def test_a_constant_on_all_rewards_moves_means_and_nothing_else(runs, shift):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning_curves, "RESAMPLES", 50)
        kl = [np.cumsum(np.ones((5, T)), 1) * pace for pace in (0.02, 0.03)]
        before, after = (analyse(pair(runs[0] + by, runs[1] + by, *kl)) for by in (0.0, shift))
    assert [s.means["reward"].estimate.value + shift for s in before.summaries] == near(
        [s.means["reward"].estimate.value for s in after.summaries]
    )
    old, new = before.comparisons[0], after.comparisons[0]
    for name in ("reward", "reward_last", EQUAL_KL, "kl"):
        assert ends(old.paired[name].difference) == near(ends(new.paired[name].difference), abs=1e-9)
        assert old.paired[name].p == near(new.paired[name].p, rel=1e-4, abs=1e-12)
    assert ends(old.spread["reward"].ratio) == near(ends(new.spread["reward"].ratio), rel=1e-6)
    assert ends(old.steps.steps) == near(ends(new.steps.steps), rel=1e-6)


@given(st.lists(st.tuples(numbers, numbers), min_size=4, max_size=7))
@settings(deadline=None, max_examples=40)
def test_tests_and_intervals_agree(both):
    x, y = (np.array(side) for side in zip(*both, strict=True))
    forth, back = paired(x, y), paired(y, x)
    assert forth.difference.value == near(-back.difference.value) and forth.p == near(back.p)
    assert forth.difference.low == near(-back.difference.high)
    if min(abs(forth.difference.low), abs(forth.difference.high)) > 1e-6:
        assert (forth.p < 0.05) == (forth.difference.sign != 0)
    ratio = deviation_ratio(x, y)
    if ratio is not None and ratio.p is not None and 0.051 < ratio.p < 0.999:
        assert holds(ratio.ratio, 1.0)
    if ratio is not None and ratio.p is not None and ratio.p < 0.049:
        assert not holds(ratio.ratio, 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms())
@settings(deadline=None, max_examples=60)
def test_holm_keeps_the_order_and_never_helps(p_values, random):
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    order = list(range(len(p_values)))
    random.shuffle(order)
    assert holm([p_values[i] for i in order]) == [adjusted[i] for i in order]


# which conditions are compared


def constant(method, value, beta=None, seeds=3, **settings):
    return condition(method, value + 0.1 * np.arange(seeds)[:, None] + np.arange(12) / 10, beta=beta, **settings)


def compared(*conditions):
    names = list(conditions[0].settings)
    analysis = analyse(Table(list(conditions), names, []))
    return [
        (c.condition.settings, c.other.settings, c.paired["reward"].difference.value) for c in analysis.comparisons
    ], analysis.warnings


def test_baselines_are_of_the_same_settings_but_those_of_credit():
    none, other = constant("none", 0.0, length=24.0), constant("none", 5.0, length=48.0)
    abc, uniform = constant("abc", 1.0, 0.8, length=24.0), constant("uniform", 3.0, 0.8, length=24.0)
    found, warnings = compared(none, abc, uniform, other, constant("abc", 1.0, 1.0, length=96.0))
    assert found == [
        (abc.settings, none.settings, near(1.0)),
        (uniform.settings, none.settings, near(3.0)),
        (abc.settings, uniform.settings, near(-2.0)),
    ]
    [warning] = [warning for warning in warnings if "Without a baseline" in warning]
    assert "length 96" in warning and "length 24" not in warning


def test_settings_that_change_a_run_of_the_baseline_need_a_baseline_of_their_own():
    name = "shaping.tokenizer_check"
    none, other = (constant("none", value, **{name: check}) for value, check in ((0.0, "map"), (5.0, "off")))
    abc, alone = (constant("abc", 1.0, 0.8, **{name: check}) for check in ("map", "strict"))
    found, warnings = compared(none, other, abc, alone)
    assert found == [(abc.settings, none.settings, near(1.0))]
    assert "Without a baseline" in warnings[0] and "strict" in warnings[0]
    layers = [constant("abc", 1.0, 0.8, **{"shaping.layer": layer}) for layer in ("last", "3")]
    found, _ = compared(constant("none", 0.0, **{"shaping.layer": None}), *layers)
    assert [against["method"] for _, against, _ in found] == ["none", "none"]


def test_a_baseline_that_still_rises_is_said_once_and_decides_no_claim_of_steps():
    def table(length):
        base = 0.1 * np.arange(5)[:, None] + ramp(length, 24)
        fast = 0.1 * np.arange(5)[:, None] + ramp(2, 24)
        methods = [condition("none", base), *(condition("abc", fast, beta=beta) for beta in (0.5, 1.0))]
        return analyse(Table(methods, ["method", "beta"], []))

    rising, flat = table(24), table(10)
    said = [warning for warning in rising.warnings if "none still rises in its last 10 steps, by 0.2" in warning]
    assert len(said) == 1 and "it has no plateau yet" in said[0]
    assert flat.warnings == []
    for analysis, outcome in ((rising, "undecided"), (flat, "seen")):
        (said, number), *_ = [row[1] for row in claims(analysis).values()]
        assert said == outcome and number.endswith("which still rises in its last 10 steps") == (analysis is rising)
        assert analysis.comparisons[0].steps.ratio.high <= 0.5  # the number stays


def test_runs_without_more_than_the_last_ten_steps_are_named():
    lengths = [analyse(Table([condition("none", np.ones((2, steps)))], [], [])).warnings for steps in (1, 10, 11)]
    said = "Runs of {} steps: the last 10 are all of them."
    assert lengths == [[said.format(1)], [said.format(10)], []]


def test_pairs_that_share_no_kl_are_named_also_where_none_does():
    climb, rewards = np.linspace(0, 1, 12), np.arange(3)[:, None] + np.linspace(0, 1, 12)
    for lifted, without in (((5, 5, 5), 3), ((5, 0, 0), 1)):
        kl = climb + np.array(lifted)[:, None]
        analysis = analyse(pair(rewards, rewards, kl, np.tile(climb, (3, 1))))
        assert (
            f"abc β 0.8 against none: {without} of 3 pairs share no KL: not in reward at equal KL."
            in analysis.warnings
        )
        [outcomes] = claims(analysis).values()
        assert (outcomes[-1] == ("undecided", "no KL in common")) == (without == 3)
    [outcomes] = claims(analyse(pair(rewards, rewards))).values()
    assert outcomes[-1] == ("undecided", "")  # no KL was logged


def test_pairs_are_of_the_seeds_that_both_have():
    base = replace(constant("none", 0.0), seeds=(2, 3, 9))
    [(_, _, difference)], warnings = compared(base, constant("abc", 1.0, 0.8))
    # Seeds 2 and 3 are abc's second and third (+0.1, +0.2) and the baseline's first and second (+0.0, +0.1).
    assert difference == near(1.1)
    assert "2 seeds that both have; only one has 1, 9" in warnings[0]


def test_measures_per_run():
    run = {"reward": np.arange(20.0)[None], "kl": np.arange(20.0)[None] * 2}
    assert [per_run(run, name)[0] for name in ("reward", "reward_last", "kl", "kl_last")] == [9.5, 14.5, 19.0, 29.0]
    assert per_run(run, "value_loss") is None
