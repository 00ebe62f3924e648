"""The report's samples files, its page and its command: what is escaped, what is counted, what is refused."""

import base64
import json
import math
import re
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_support import (
    REWARD,
    colours,
    from_one,
    make_run,
    outline,
    page_of,
    pixels,
    sample,
    write_events,
    write_samples,
)

from abc_plugin import cli
from abc_plugin.errors import UserError
from abc_plugin.report import page
from abc_plugin.report.curves import draw
from abc_plugin.report.samples import mean_and_error, pair_up, read_samples, spread_over_ranks
from abc_plugin.report.scalars import Run
from abc_plugin.report.tokens import SWATCHES, completion, intensity, legend, token_text, visible

# samples


def test_standard_error_by_hand():
    # 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14 / 3, error sqrt(14 / 3 / 4)
    assert mean_and_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 12)))
    assert mean_and_error([2.0]) == (2.0, None)


def test_samples_are_read_in_order_and_blank_lines_skipped(tmp_path):
    samples = [sample("one", reward=1.0), sample("two\u2028", tokens=[], credit=[]), sample(credit=(1.5, -0.5))]
    path = tmp_path / "s.jsonl"
    text = "\n\n".join(json.dumps(asdict(s), ensure_ascii=False) for s in samples)
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
    assert spread_over_ranks([3, 1, 2], float, 1) == [(1, 3)]


@given(st.lists(st.floats(-10, 10), min_size=13, max_size=60))
def test_spread_keeps_both_ends_and_never_repeats(values):
    chosen = spread_over_ranks(values, float, 12)
    ranks = [rank for rank, _ in chosen]
    assert len(set(ranks)) == 12 and ranks == sorted(ranks)
    assert chosen[0] == (1, max(values)) and chosen[-1] == (len(values), min(values))
    gaps = {b - a for a, b in zip(ranks, ranks[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1


# tokens


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
