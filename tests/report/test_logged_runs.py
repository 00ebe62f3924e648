"""Runs: what is read of event files, the table and the curves of several by hand."""

import math

import pytest
from report_support import KL, REWARD, curve, pixels, ramp, run_of, write_events

from abc_plugin.errors import UserError
from abc_plugin.report import logged_runs as runs
from abc_plugin.report.report_page import draw_curves, over_seeds


def scalars(directory):
    return {tag: list(values.items()) for tag, values in runs.read_scalars(directory).items()}


def test_scalars_are_read_at_any_depth_in_step_order(tmp_path):
    write_events(tmp_path / "deep" / "er", {"train/kl": [(2, 0.5), (1, 0.25)], "train/reward": [(1, -1.0)]})
    assert scalars(tmp_path) == {"train/kl": [(1, 0.25), (2, 0.5)], "train/reward": [(1, -1.0)]}


def test_a_resumed_run_merges_by_step_and_steps_lost_to_a_crash_do_not_survive(tmp_path):
    write_events(tmp_path / "z", {REWARD: enumerate([1.0, 2.0, 3.0, 4.0], 1), "train/x": [(1, 7.0)]}, walltime=1000)
    write_events(tmp_path / "a", {REWARD: [(3, 30.0)]}, walltime=2000)
    assert scalars(tmp_path) == {REWARD: [(1, 1.0), (2, 2.0), (3, 30.0)], "train/x": [(1, 7.0)]}


def test_a_file_cut_short_counts_up_to_the_cut(tmp_path):
    write_events(tmp_path, {REWARD: enumerate([1.0, 2.0, 3.0], 1)})
    [path] = tmp_path.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[:-7])
    assert scalars(tmp_path)[REWARD] == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("file")])
def test_no_scalars_is_a_user_error_that_names_the_directory(tmp_path, make):
    make(tmp_path / "tb")
    with pytest.raises(UserError, match="tb"):
        runs.read_scalars(tmp_path / "tb")


def test_smooth_is_a_trailing_mean_over_five():
    assert runs.smooth(curve([5.0, 1.0, 3.0, 3.0, 3.0, 10.0])).tolist() == [5.0, 3.0, 3.0, 3.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("values", "target", "step"),
    [
        ([0, 0, 0, 0, 0, 5, 5, 5, 5, 5], 1.0, 6),  # the window of step 6 is 0 0 0 0 5: reached exactly
        ([0, 0, 0, 0, 0, 5, 5, 5, 5, 5], 4.5, 10),
        ([9, 0, 0, 0, 0, 0, 0], 3.0, math.inf),  # one lucky first step is not a full window
        ([2, 2, 2, 2], 1.0, math.inf),
        ([2, 2, 2, 2, 2], 2.0, 5),
        ([2, math.nan, 2, 2, 2, 2, 2], 2.0, 7),  # a window with NaN has no mean
    ],
)
def test_steps_to_reach(values, target, step):
    assert runs.steps_to_reach(curve(values), target) == step


def test_steps_to_reach_answers_in_steps_not_in_entries():
    logged = curve([1.0] * 7)
    logged.index *= 10
    assert runs.steps_to_reach(logged, 1.0) == 50


def test_comparison_by_hand():
    """none reaches its own end, 1.0, five steps after its ramp at 10. abc: KL 0.16 and 0.04; over training 0.9, 0.7.

    Standard deviation of 0.9, 0.7 is 0.2 / sqrt 2; of 0.16, 0.04 it is 0.12 / sqrt 2. 1 / 0.4 and 1 / 0.2: mean 3.75.
    """
    table = runs.comparison(
        [ramp("none#1", 10), ramp("abc#1", 2, kl=0.16), ramp("none#2", 10), ramp("abc#2", 6, kl=0.04)]
    )
    none, abc = (
        ["none", "2", "20", "0.500±0.000", "0.250±0.000", "1.000±0.000", "15", "2.000", "10.000±0.000"],
        ["abc", "2", "20", "0.800±0.141", "0.100±0.085", "1.000±0.000", "9", "3.750", "4.000±2.828"],
    )
    assert [[cell.replace(" ", "") for cell in row] for row in table.to_numpy()] == [none, abc]


@pytest.mark.parametrize(
    ("starts", "text"),
    [
        ((2, 6, 20), "11 (1 of 3 not reached)"),
        ((2, 20, 20), "not reached (2 of 3)"),
        ((2, 20), "not reached (1 of 2)"),
    ],
)
def test_seeds_that_never_reach_the_baseline_are_counted(starts, text):
    several = [ramp("none", 10)] + [ramp(f"abc#{seed}", start) for seed, start in enumerate(starts)]
    assert runs.comparison(several).iloc[1, 6] == text


def test_what_was_not_logged_is_a_dash_and_what_diverged_is_nan():
    assert [*runs.comparison([run_of(1.0, 2.0)]).iloc[0]] == ["r", "1", "2", "1.500", "–", "1.500", "–", "–", "–"]
    assert runs.comparison([ramp("abc", 2, kl=-0.1)]).iloc[0, 7] == "–"
    assert runs.comparison([run_of(1.0, math.nan)]).iloc[0, 3] == "nan"


def test_train_reward_serves_where_the_rollout_mean_was_not_logged():
    old = runs.Run("old", {"train/reward": curve([2.0, 4.0])})
    both = runs.Run("new", old.scalars | {REWARD: curve([5.0])})
    assert runs.comparison([old, both]).iloc[:, 3].tolist() == ["3.000", "5.000"]


def test_over_seeds_by_hand():
    curves = [curve([0.0, 2.0, 4.0]), curve([4.0, 6.0, 9.0], first=2)]
    mean, deviation = over_seeds(curves)  # trailing means 0, 1, 2 and 4, 5, 19/3
    assert list(mean.items()) == [(2, 2.5), (3, 3.5)]
    assert deviation.tolist() == pytest.approx([3 / math.sqrt(2), 3 / math.sqrt(2)])


# the picture


def has_colour(image, hex_colour):
    want = bytes.fromhex(hex_colour[1:])
    return any(max(abs(a - b) for a, b in zip(want, c, strict=True)) < 6 for _, c in image.getcolors(1 << 24))


def test_the_picture_is_the_same_for_the_same_data_only():
    first, second = draw_curves([run_of(0.0, 1.0, 0.0)]), draw_curves([run_of(1.0, 0.0, 1.0)])
    assert first == draw_curves([run_of(0.0, 1.0, 0.0)]) != second
    assert pixels(first).width > 1000


def test_credit_adds_a_row_and_narrow_screens_get_one_column():
    plain = run_of(1.0, **{KL: [1.0]})
    credit = run_of(1.0, **{KL: [1.0], "train/credit_entropy": [2.0]})
    assert pixels(draw_curves([credit])).height > 1.5 * pixels(draw_curves([plain])).height
    narrow = pixels(draw_curves([credit], columns=1))
    assert narrow.height > 1.6 * narrow.width
    assert pixels(draw_curves([plain], dark=True)).getpixel((1, 1)) < (40, 40, 40)


def test_seeds_of_one_label_share_a_colour():
    image = pixels(
        draw_curves([runs.Run(label, run_of(i, i + 1.0).scalars) for i, label in enumerate(("a#1", "a#2", "none"))])
    )
    assert has_colour(image, "#0072B2") and has_colour(image, "#D55E00")  # a, none
    assert not has_colour(image, "#009E73")  # a third colour would be a second seed drawn as a group of its own


def test_curves_that_went_wrong_and_labels_like_formulas_are_drawn():
    nan = run_of(1.0, math.nan, 2.0, label="$\\frac$", **{KL: [math.inf, 1.0, -math.inf]})
    assert pixels(draw_curves([nan, ramp("none#1", 3), ramp("none#2", 4)])).width > 1000
