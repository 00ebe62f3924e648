"""abc-rlhf report: numbers by hand, what the page escapes, what the picture shows, what is refused."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from abc_plugin import cli
from abc_plugin.errors import UserError
from abc_plugin.report import compare, page
from abc_plugin.report.curves import draw, over_seeds
from abc_plugin.report.samples import Sample, mean_and_error, pair_up, read_samples, spread_over_ranks
from abc_plugin.report.scalars import Run, read_scalars
from abc_plugin.report.tokens import SWATCHES, completion, intensity, legend, token_text, visible

REWARD, KL, SECONDS = "train/rollout/reward_mean", "train/kl", "train/timing/step_total"


def write_events(directory, scalars, walltime=1000.0):
    """One event file: scalars is {tag: [(step, value), ...]}."""
    writer = SummaryWriter(str(directory))
    for tag, curve in scalars.items():
        for step, value in curve:
            writer.add_scalar(tag, value, step, walltime=walltime + step)
    writer.close()


def from_one(values):
    return list(enumerate(values, 1))


def make_run(directory, values=(1.0, 2.0, 3.0), **more):
    write_events(directory / "tensorboard" / "name", {REWARD: from_one(values), **more})
    return str(directory)


def sample(prompt="p", tokens=("a", "b"), credit=(0.25, 0.75), reward=0.0):
    return Sample(prompt, list(tokens), list(credit), reward)


def write_samples(path, samples):
    path.write_text("".join(json.dumps(vars(s)) + "\n" for s in samples), encoding="utf-8")
    return str(path)


def page_of(before=(), after=(), summary=None, run=None, runs=None, command="abc-rlhf report r"):
    run = run or Run("r", {REWARD: from_one([1.0, 2.0])})
    return page.render(page.Content(run, runs or [run], list(before), list(after), summary or {}, command))


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


def ramp(label, start, kl=0.25):
    """Reward 0 up to step ``start``, then 1, over 20 steps; the first takes 100 s, the others ``start`` s."""
    scalars = {REWARD: [0.0] * start + [1.0] * (20 - start), KL: [kl] * 20, SECONDS: [100.0] + [start] * 19}
    return Run(label, {tag: from_one(values) for tag, values in scalars.items()})


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


# samples


def test_standard_error_by_hand():
    # 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14 / 3, error sqrt(14 / 3 / 4)
    assert mean_and_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 12)))
    assert mean_and_error([2.0]) == (2.0, None)


def test_samples_are_read_in_order_and_blank_lines_skipped(tmp_path):
    samples = [sample("one", reward=1.0), sample("two\u2028", tokens=[], credit=[]), sample(credit=(1.5, -0.5))]
    path = tmp_path / "s.jsonl"
    text = "\n\n".join(json.dumps(vars(s), ensure_ascii=False) for s in samples)
    path.write_text(text, encoding="utf-8")
    assert read_samples(path) == samples


GOOD = {"prompt": "p", "tokens": ["a", "b"], "credit": [0.5, 0.5], "reward": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        (json.dumps({"prompt": "p", "tokens": []}), "lacks credit, reward"),
        (json.dumps(GOOD | {"credit": [1.0]}), "2 tokens but 1 credit weights"),
        (json.dumps(GOOD | {"credit": [0.5, 0.6]}), "sums to 1.1"),
        (json.dumps(GOOD | {"credit": [0.5, "x"]}), "credit is not"),
        (json.dumps(GOOD | {"credit": [0.5, math.nan]}), "credit is not"),
        (json.dumps(GOOD | {"tokens": "ab"}), "tokens is not"),
        (json.dumps(GOOD | {"prompt": 3}), "prompt is not"),
        (json.dumps(GOOD | {"reward": math.inf}), "reward inf"),
        (json.dumps(GOOD | {"reward": True}), "reward True"),
    ],
)
def test_bad_line_is_named_with_its_file_and_number(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: .*{re.escape(message)}") as error:
        read_samples(path)
    assert "\n" not in str(error.value)


def test_missing_empty_and_binary_samples_files_are_refused(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in (("absent", "cannot read"), ("empty", "is empty"), ("binary", "UTF-8")):
        with pytest.raises(UserError, match=message):
            read_samples(tmp_path / name)


def test_pairs_match_the_kth_sample_of_a_prompt_with_its_kth():
    before = [sample("a", reward=1), sample("b", reward=2), sample("a", reward=3), sample("only before")]
    after = [sample("only after"), sample("a", reward=10), sample("b", reward=20), sample("a", reward=30)]
    assert [(x.reward, y.reward) for x, y in pair_up(before, after)] == [(1, 10), (2, 20), (3, 30)]
    with pytest.raises(UserError, match="no prompt in common"):
        pair_up(before[3:], after[:1])


def test_spread_over_ranks_by_hand():
    assert spread_over_ranks([3, 1, 2], float, 12) == [(1, 3), (2, 2), (3, 1)]
    assert spread_over_ranks(list(range(10)), float, 4) == [(1, 9), (4, 6), (7, 3), (10, 0)]


@given(st.lists(st.floats(-10, 10), min_size=13, max_size=60))
def test_spread_keeps_both_ends_and_never_repeats(values):
    chosen = spread_over_ranks(values, float, 12)
    ranks = [rank for rank, _ in chosen]
    assert len(set(ranks)) == 12 and ranks == sorted(ranks)
    assert chosen[0] == (1, max(values)) and chosen[-1] == (len(values), min(values))
    gaps = {b - a for a, b in zip(ranks, ranks[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1


# tokens


def colours(html):
    """Signed intensity of each token, in order."""
    found = re.findall(r'<span class="t( neg)?(?: special)?" style="--c:([0-9.]+)"', html)
    return [-float(c) if negative else float(c) for negative, c in found]


def test_intensity_by_hand():
    assert [intensity(r / 10, 10) for r in (0, 1, 2, 6, -2)] == pytest.approx([0, 1 / 3, 1 / 2, 3 / 4, 1 / 2])


@given(st.lists(st.floats(-0.5, 1.0).map(lambda x: round(x, 3)), min_size=1, max_size=40))
def test_colour_is_monotone_in_credit(credit):
    drawn = colours(completion(sample(tokens=["x"] * len(credit), credit=credit)))
    assert len(drawn) == len(credit)
    ordered = [colour for _, colour in sorted(zip(credit, drawn, strict=True))]
    assert ordered == sorted(ordered)
    # distinct weights keep distinct colours: the scale does not saturate
    assert len(set(drawn)) == len(set(credit))


def test_hover_says_token_share_and_reward():
    html = completion(sample(tokens=["a", " b"], credit=[0.123, 0.877], reward=1.5))
    assert 'data-tip="“a” · credit 12.3 % (0.2 × uniform) · reward 1.50"' in html
    assert "credit 87.7 % (1.8 × uniform)" in html


def test_markup_in_a_token_is_text():
    html = completion(sample(tokens=["<script>alert(1)</script>", '"><img src=x>'], credit=[0.5, 0.5]))
    assert "<script" not in html and "<img" not in html
    assert html.count("&lt;script&gt;") == 2  # once on the page, once in the hover text
    assert '"&gt;' not in html and "&quot;&gt;&lt;img" in html


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", " the"),
        ("\n\n", "↵\n↵\n"),
        ("  ", "··"),
        (" ", "·"),
        ("end ", "end·"),
        ("a  b", "a··b"),
        ("\t", "⇥\t"),
        ("", "∅"),
        ("\u200b\u202ex", "\\u200b\\u202ex"),
        ("\ud800", "\\ud800"),
        ("naïve—é", "naïve—é"),
    ],
)
def test_nothing_stays_invisible(token, shown):
    assert token_text(token) == shown
    visible(token).encode("utf-8")  # a lone surrogate would break the page


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", "<eos>", "[SEP]", "<end_of_turn>"])
def test_special_tokens_are_marked(token):
    assert 'class="t special"' in completion(sample(tokens=[token, "x"]))
    assert 'class="t special"' not in completion(sample(tokens=["<b>", "x"]))


def test_legend_shows_negative_credit_only_where_there_is_some():
    assert colours(legend(signed=False))[: len(SWATCHES)] == sorted(round(intensity(r, 1), 4) for r in SWATCHES)
    assert min(colours(legend(signed=False))) == 0 and min(colours(legend(signed=True))) < -0.5


# page


class Outline(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.requests = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.requests += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(html):
    parsed = Outline()
    parsed.feed(html)
    assert parsed.open == []
    return parsed


def test_page_is_whole_safe_and_asks_for_nothing():
    evil = "<script>x</script>\"'&"
    samples = [sample(evil, tokens=[evil, "b"])]
    run = Run(evil, {REWARD: from_one([1.0])})
    html = page_of(samples, samples, {evil: evil, "n": 1.23456789, "list": [evil]}, run, [run, run], evil)
    parsed = outline(html)
    assert "script" not in parsed.tags and "://" not in html
    assert len(parsed.requests) == 4 and all(url.startswith("data:image/png;base64,") for url in parsed.requests)
    assert "1.23457" in html
    assert f"Made by <code>{page.escape(evil)}</code>" in html


def test_embedded_pictures_are_the_curves():
    run = Run("r", {REWARD: from_one([1.0, 2.0])})
    urls = outline(page_of(run=run)).requests
    assert base64.b64decode(urls[-1].split(",")[1]) == draw([run])
    assert len(set(urls)) == 4  # narrow and wide, light and dark


def test_headline_by_hand():
    before = [sample("a", reward=0.0), sample("b", reward=2.0)]  # mean 1, error sqrt(2 / 2) = 1
    after = [sample("b", reward=3.0), sample("a", reward=4.0)]  # mean 3.5, error sqrt(0.5 / 2) = 0.5
    html = page_of(before, after)
    assert "<h1>Mean reward on 2 held-out prompts: 1.00 ± 1.00 before, 3.50 ± 0.50 after.</h1>" in html
    # pairs: +4 and +1, mean 2.5, error sqrt(4.5 / 2) = 1.5
    assert "Change on the same prompts: +2.50 ± 1.50 (2 pairs)" in html


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("", "", "Mean reward in training: 1.50 over the first 2 steps, 1.50 over the last 2."),
        ("a", "", "Mean reward on 1 held-out prompt: 1.00 before."),
        ("", "aab", "Mean reward of 3 completions of 2 held-out prompts: 1.00 ± 0.00 after."),
        ("ab", "a", "Mean reward: 1.00 ± 0.00 before (n = 2), 1.00 after (n = 1)."),
    ],
)
def test_headline_says_what_it_counts(before, after, sentence):
    assert f"<h1>{sentence}</h1>" in page_of(*([sample(p, reward=1.0) for p in ps] for ps in (before, after)))


def test_completions_stand_side_by_side_from_the_largest_gain_on():
    before = [sample(f"prompt {i:02}", tokens=[f"old{i:02}"], credit=[1.0], reward=0.0) for i in range(24)]
    after = [sample(f"prompt {i:02}", tokens=[f"new{i:02}"], credit=[1.0], reward=float(i)) for i in range(24)]
    html = page_of(before, after)
    # ranks 1, 3, 5, ... 21 and 24 of gains 23, 22, ... 0; i * 23 // 11 for i = 0 ... 11 is 0, 2, 4, ... 20, 23
    expected = [23 - i * 23 // 11 for i in range(12)]
    assert re.findall(r">(?:old|new)(\d\d)<", html) == [f"{i:02}" for i in expected for _ in "ab"]
    assert "12 of 24 pairs" in html and "none picked by hand" in html
    assert "Rank 1 of 24, change +23.00" in html and "Rank 24 of 24, change +0.00" in html


def test_first_and_last_steps_by_hand():
    run = Run("r", {REWARD: from_one(range(1, 21)), "train/timing/generation": from_one([3.0] * 20)})
    html = page_of(run=run)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html)
    assert cells[:4] == ["Reward of the rollouts", "reward model&#x27;s units", "5.5", "15.5"]
    assert cells[4:8] == ["Time to generate", "s per step", "3", "3"]


# curves


def pixels(png):
    image = Image.open(io.BytesIO(png))
    image.load()
    return image.convert("RGB")


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


def has_colour(image, hex_colour):
    want = tuple(int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return any(max(abs(a - b) for a, b in zip(want, c, strict=True)) < 6 for _, c in image.getcolors(1 << 24))


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


# command


def test_report_writes_both_files_and_prints_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text('{"method": "abc", "steps": 3}')
    before = write_samples(tmp_path / "b.jsonl", [sample("a", reward=0.0), sample("b", reward=2.0)])
    after = write_samples(tmp_path / "a.jsonl", [sample("a", reward=3.0), sample("b", reward=4.0)])
    assert cli.main(["report", run, "--before", before, "--after", after]) == 0
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert pixels((tmp_path / "run" / "curves.png").read_bytes()).width > 1000
    [line] = capsys.readouterr().out.splitlines()
    assert line == (
        "Mean reward on 2 held-out prompts: 1.00 ± 1.00 before, 3.50 ± 0.50 after. "
        f"{tmp_path}/run/report.html {tmp_path}/run/curves.png"
    )
    assert "<td>method</td><td>abc</td>" in html
    assert f"Made by <code>abc-rlhf report {run} --before {before} --after {after}</code>" in html


def test_compare_prints_and_embeds_the_table(tmp_path, capsys):
    runs = {
        label: make_run(tmp_path / label.replace("#", ""), [float(i)] * 6)
        for i, label in enumerate(("none#1", "none#2", "abc"))
    }
    out = tmp_path / "new" / "out"
    words = [f"{label}={directory}" for label, directory in runs.items()]
    assert cli.main(["report", runs["none#1"], "--out", str(out), "--compare", *words]) == 0
    printed, html = capsys.readouterr().out, (out / "report.html").read_text(encoding="utf-8")
    for text in (printed, html):
        assert "0.500 ± 0.707" in re.sub(r"\s+", " ", text)
    assert re.findall(r"<td>(\w+)</td><td class=\"number\">(\d)</td>", html) == [("none", "2"), ("abc", "1")]
    assert not (tmp_path / "none1" / "report.html").exists()
    # none ends at 0.5, which abc (2.0) reaches with its first full window and none#1 (0.0) never does
    assert ">5</td>" in html and "not reached (1 of 2)" in html


def test_run_not_among_the_compared_comes_first_under_its_name(tmp_path):
    mine, other = make_run(tmp_path / "mine"), make_run(tmp_path / "x")
    assert cli.main(["report", mine, "--compare", f"other={other}"]) == 0
    html = (tmp_path / "mine" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<td>(\w+)</td><td class=\"number\">1</td>", html) == ["mine", "other"]


def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys):
    run, empty = make_run(tmp_path / "run"), tmp_path / "empty"
    (empty / "tensorboard").mkdir(parents=True)
    write_events(tmp_path / "odd" / "tensorboard", {"eval/x": [(1, 1.0)]})
    broken = make_run(tmp_path / "broken")
    (tmp_path / "broken" / "summary.json").write_text("[1]")
    one, two = (write_samples(tmp_path / f"{name}.jsonl", [sample(name)]) for name in ("one", "two"))
    for words, message in (
        ([str(tmp_path / "absent")], "absent does not exist"),
        ([str(empty)], "no TensorBoard scalars"),
        ([str(tmp_path / "odd")], "is it a PPO run"),
        ([broken], "summary.json is not a JSON object"),
        ([run, "--before", str(tmp_path / "absent.jsonl")], "absent.jsonl"),
        ([run, "--before", one, "--after", two], "no prompt in common"),
        ([run, "--compare", "abc"], "'abc' is not LABEL=RUN_DIR"),
        ([run, "--compare", f"a={run}", f"a={run}"], "two runs labelled 'a'"),
        ([run, "--compare", f"run={broken}"], "also the name of RUN_DIR"),
        ([run, "--compare", "gone=nowhere"], "nowhere does not exist"),
        ([run, "--out", one], "choose another --out"),
    ):
        assert cli.main(["report", *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "run" / "report.html").exists()


def test_missing_argument_is_exit_2():
    with pytest.raises(SystemExit) as stop:
        cli.main(["report"])
    assert stop.value.code == 2
