"""The report's numbers by hand, what its pictures show."""

import math
import subprocess
import sys

import pytest
from report_support import KL, REWARD, from_one, pixels, ramp, write_events

from abc_plugin.errors import UserError
from abc_plugin.report import compare
from abc_plugin.report.curves import draw, over_seeds
from abc_plugin.report.scalars import Run, read_scalars

# scalars


def test_scalars_are_found_at_any_depth_in_step_order(tmp_path):
    write_events(tmp_path / "deep" / "er", {"train/kl": [(2, 0.5), (1, 0.25)], "train/reward": [(1, -1.0)]})
    assert read_scalars(tmp_path) == {"train/kl": [(1, 0.25), (2, 0.5)], "train/reward": [(1, -1.0)]}


def test_resumed_run_merges_by_step_and_the_later_file_wins(tmp_path):
    write_events(tmp_path / "z_first", {REWARD: from_one([1.0, 2.0, 3.0, 4.0]), "train/x": [(1, 7.0)]}, walltime=1000)
    write_events(tmp_path / "a_second", {REWARD: [(3, 30.0), (4, 40.0), (5, 50.0)]}, walltime=2000)
    scalars = read_scalars(tmp_path)
    assert scalars[REWARD] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert scalars["train/x"] == [(1, 7.0)]


def test_steps_lost_to_a_crash_do_not_survive_the_resume(tmp_path):
    write_events(tmp_path / "first", {REWARD: from_one([1.0, 2.0, 3.0, 4.0])}, walltime=1000)
    write_events(tmp_path / "second", {REWARD: [(3, 30.0)]}, walltime=2000)
    assert read_scalars(tmp_path)[REWARD] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_file_cut_short_counts_up_to_the_cut(tmp_path):
    write_events(tmp_path, {REWARD: from_one([1.0, 2.0, 3.0])})
    [path] = tmp_path.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[:-7])
    assert read_scalars(tmp_path)[REWARD] == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("file")])
def test_no_scalars_is_a_user_error_that_names_the_directory(tmp_path, make):
    make(tmp_path / "tb")
    with pytest.raises(UserError, match="tb"):
        read_scalars(tmp_path / "tb")


def test_report_imports_neither_torch_nor_openrlhf():
    code = "import sys, abc_plugin.report.command; print(sorted({'torch', 'openrlhf', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# comparison


def test_smooth_is_a_trailing_mean_over_five():
    assert compare.smooth([5.0, 1.0, 3.0, 3.0, 3.0, 10.0]) == [5.0, 3.0, 3.0, 3.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("values", "target", "step"),
    [
        ([0, 0, 0, 0, 0, 5, 5, 5, 5, 5], 1.0, 6),  # the window of step 6 is 0 0 0 0 5: reached exactly
        ([0, 0, 0, 0, 0, 5, 5, 5, 5, 5], 4.5, 10),
        ([9, 0, 0, 0, 0, 0, 0], 3.0, math.inf),  # one lucky first step is not a full window
        ([2, 2, 2, 2], 1.0, math.inf),
        ([2, 2, 2, 2, 2], 2.0, 5),
    ],
)
def test_steps_to_reach(values, target, step):
    assert compare.steps_to_reach(from_one(values), target) == step


def test_steps_to_reach_answers_in_steps_not_in_entries():
    assert compare.steps_to_reach([(10 * i, 1.0) for i in range(1, 8)], 1.0) == 50


def test_summary_by_hand():
    runs = [ramp("none#1", 10), ramp("abc#1", 2, kl=0.16), ramp("none#2", 10), ramp("abc#2", 6, kl=0.04)]
    none, abc = compare.summarise(runs)
    assert (none.group, abc.group) == ("none", "abc")
    assert none.last_reward == [1.0, 1.0]  # so 1.0 is the target: five steps after the ramp
    assert none.steps_to_baseline == [15, 15]
    assert abc.steps_to_baseline == [7, 11]
    assert abc.reward == pytest.approx([0.9, 0.7])
    assert abc.reward_per_sqrt_kl == pytest.approx([1 / 0.4, 1 / 0.2])
    assert none.cells() == [
        "none",
        "2",
        "20",
        "0.500 ± 0.000",
        "0.250 ± 0.000",
        "1.000 ± 0.000",
        "15",
        "2.000",
        "10.000 ± 0.000",
    ]
    # standard deviation of 0.9, 0.7 is 0.2 / sqrt 2; of 0.16, 0.04 it is 0.12 / sqrt 2
    assert abc.cells() == [
        "abc",
        "2",
        "20",
        "0.800 ± 0.141",
        "0.100 ± 0.085",
        "1.000 ± 0.000",
        "9",
        "3.750",
        "4.000 ± 2.828",
    ]
    assert len(compare.HEADER) == len(abc.cells())


@pytest.mark.parametrize(
    ("starts", "text"),
    [
        ((2, 6, 20), "11 (1 of 3 not reached)"),
        ((2, 20, 20), "not reached (2 of 3)"),
        ((2, 20), "not reached (1 of 2)"),
    ],
)
def test_seeds_that_never_reach_the_baseline_are_counted(starts, text):
    runs = [ramp("none", 10)] + [ramp(f"abc#{seed}", start) for seed, start in enumerate(starts)]
    assert compare.summarise(runs)[1].cells()[6] == text


def test_what_cannot_be_said_is_a_dash():
    no_kl = Run("abc", {REWARD: from_one([1.0, 2.0])})
    assert compare.summarise([no_kl])[0].cells() == ["abc", "1", "2", "1.500", "–", "1.500", "–", "–", "–"]
    assert compare.summarise([ramp("abc", 2, kl=-0.1)])[0].cells()[-2] == "–"


def test_train_reward_serves_where_the_rollout_mean_was_not_logged():
    run = Run("old", {"train/reward": from_one([2.0, 4.0])})
    assert compare.summarise([run])[0].reward == [3.0]
    both = Run("new", {"train/reward": from_one([2.0, 4.0]), REWARD: from_one([5.0])})
    assert compare.summarise([both])[0].reward == [5.0]


# curves


def has_colour(image, hex_colour):
    want = tuple(int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return any(max(abs(a - b) for a, b in zip(want, c, strict=True)) < 6 for _, c in image.getcolors(1 << 24))


def test_picture_is_valid_and_shows_the_data():
    first, second = ([Run("r", {REWARD: from_one(values)})] for values in ([0.0, 1.0, 0.0], [1.0, 0.0, 1.0]))
    image = pixels(draw(first))
    assert image.width > 1000 and len(image.getcolors(1 << 24)) > 10
    assert draw(first) == draw(first)
    assert pixels(draw(first)).tobytes() != pixels(draw(second)).tobytes()


def test_credit_adds_a_row_and_narrow_screens_get_one_column():
    plain = Run("r", {REWARD: from_one([1.0]), KL: from_one([1.0])})
    credit = Run("r", plain.scalars | {"train/credit_entropy": from_one([2.0])})
    assert pixels(draw([credit])).height > 1.5 * pixels(draw([plain])).height
    assert pixels(draw([credit], columns=1)).height > 2 * pixels(draw([credit], columns=1)).width * 0.8
    assert pixels(draw([plain], dark=True)).getpixel((1, 1)) < (40, 40, 40)


def test_seeds_of_one_label_share_a_colour():
    runs = [Run(label, {REWARD: from_one([i, i + 1.0])}) for i, label in enumerate(("abc#1", "abc#2", "none"))]
    image = pixels(draw(runs))
    assert has_colour(image, "#0072B2") and has_colour(image, "#D55E00")  # abc, none
    assert not has_colour(image, "#009E73")  # a third colour would be a second seed drawn as a group of its own


def test_over_seeds_by_hand():
    curves = [[(1, 0.0), (2, 2.0), (3, 4.0)], [(2, 4.0), (3, 6.0), (4, 9.0)]]
    steps, mean, deviation = over_seeds(curves)  # trailing means 0, 1, 2 and 4, 5, 19/3
    assert steps == [2, 3]
    assert mean == [2.5, 3.5]
    assert deviation == pytest.approx([3 / math.sqrt(2), 3 / math.sqrt(2)])


def test_labels_are_text_not_formulas():
    runs = [Run(label, {REWARD: from_one([1.0, 2.0])}) for label in ("$\\frac$", "none")]
    assert pixels(draw(runs)).width > 1000


def test_curves_that_went_wrong_are_still_drawn():
    nan = Run("nan", {REWARD: from_one([1.0, math.nan, 2.0]), KL: from_one([math.inf, 1.0, -math.inf])})
    assert pixels(draw([nan, ramp("none#1", 3), ramp("none#2", 4)])).width > 1000
    assert "nan" in compare.summarise([nan])[0].cells()
