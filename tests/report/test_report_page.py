"""The report's samples files, its page and its command: what is escaped, what is counted, what is refused."""

import base64
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_support import (
    colours,
    make_run,
    outline,
    pixels,
    recorded,
    run_of,
    sample,
    words,
    write_events,
    write_records,
    write_samples,
)
from snapshots import assert_snapshot

from abc_plugin import cli
from abc_plugin.errors import UserError
from abc_plugin.report.html_templates import tokens
from abc_plugin.report.recorded_completions import record_of
from abc_plugin.report.recorded_steps_html import chart, section
from abc_plugin.report.report_page import Content, draw_curves, render
from abc_plugin.report.samples_file import pair_up, read_samples, spread_over_ranks
from abc_plugin.report.token_colours import SWATCHES, intensity, token_text, visible

EVIL = "<script>x</script>\"'&"
WRITTEN = Path(__file__).parent / "written"  # by an earlier version: files of a run and of abc-rlhf evaluate


def page_of(before=(), after=(), summary=None, run=None, runs=None, command="abc-rlhf report r", records=()):
    run = run or run_of(1.0, 2.0)
    return render(Content(run, runs or [run], list(before), list(after), summary or {}, command, list(records)))


# samples


def test_samples_are_read_in_order_and_blank_lines_skipped(tmp_path):
    samples = [sample("one", reward=1.0), sample("two\u2028", tokens=[], credit=[]), sample(credit=(1.5, -0.5))]
    path = tmp_path / "s.jsonl"
    path.write_text("\n\n".join(json.dumps(asdict(s), ensure_ascii=False) for s in samples), encoding="utf-8")
    assert read_samples(path) == samples


GOOD = {"prompt": "p", "tokens": ["a", "b"], "credit": [0.5, 0.5], "reward": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "p", "tokens": []}, "lacks credit, reward"),
        (GOOD | {"credit": [1.0]}, "2 tokens but 1 numbers of credit"),
        (GOOD | {"credit": [0.5, 0.6]}, "credit sums to 1.1, not to 1"),
        (GOOD | {"credit": [0.5, "x"]}, "credit [0.5, 'x'] is not a list of finite numbers"),
        (GOOD | {"credit": [0.5, math.nan]}, "credit [0.5, nan] is not a list of finite numbers"),
        (GOOD | {"tokens": "ab"}, "tokens 'ab' is not a list of strings"),
        (GOOD | {"prompt": 3}, "prompt 3 is not a string"),
        (GOOD | {"reward": math.inf}, "reward inf is not a finite number"),
        (GOOD | {"reward": True}, "reward True is not a finite number"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, fields, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(fields) + "\n")
    with pytest.raises(UserError) as error:
        read_samples(path)
    assert str(error.value) == f"{path}:2: {message}; write the file again with abc-rlhf evaluate"


def test_a_file_without_samples_is_refused(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="empty is empty"):
        read_samples(tmp_path / "empty")


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
def test_colour_is_monotone_in_credit_and_does_not_saturate(credit):
    drawn = colours(tokens.completion(sample(tokens=["x"] * len(credit), credit=credit)))
    ordered = [colour for _, colour in sorted(zip(credit, drawn, strict=True))]
    assert ordered == sorted(ordered)
    assert len(drawn) == len(credit) and len(set(drawn)) == len(set(credit))


def test_pointing_at_a_token_shows_its_numbers():
    html = tokens.completion(sample(tokens=["a", " b"], credit=[0.123, 0.877], reward=1.5))
    assert 'data-tip="“a” · credit 12.3 % (0.2 × uniform) · reward 1.50"' in html
    assert "credit 87.7 % (1.8 × uniform)" in html


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
    assert 'class="t special"' in tokens.completion(sample(tokens=[token, "x"]))
    assert 'class="t special"' not in tokens.completion(sample(tokens=["<b>", "x"]))


def test_legend_shows_negative_credit_only_where_there_is_some():
    assert colours(tokens.legend(signed=False))[: len(SWATCHES)] == sorted(round(intensity(r, 1), 4) for r in SWATCHES)
    assert min(colours(tokens.legend(signed=False))) == 0 and min(colours(tokens.legend(signed=True))) < -0.5


# page


def test_the_page_is_whole_safe_and_asks_for_nothing():
    samples, run = [sample(EVIL, tokens=[EVIL, "b"])], run_of(1.0, label=EVIL)
    record = record_of(recorded(tokens=[EVIL, "b"], prompt=EVIL, method=EVIL))
    html = page_of(samples, samples, {EVIL: EVIL, "n": 1.23456789, "list": [EVIL]}, run, [run, run], EVIL, [record])
    parsed = outline(html)
    assert "script" not in parsed.tags and "://" not in html and "1.23457" in html
    assert len(set(parsed.requests)) == 4  # pictures for narrow and wide, light and dark
    assert all(url.startswith("data:image/png;base64,") for url in parsed.requests)
    assert base64.b64decode(parsed.requests[-1].split(",")[1]) == draw_curves([run, run])


def test_what_the_page_says():
    """Before: mean 1, error sqrt(2 / 2); after: 3.5, sqrt(0.5 / 2); pairs +4 and +1: 2.5, sqrt(4.5 / 2)."""
    before = [sample("a", reward=0.0), sample("b", reward=2.0)]
    after = [sample("b", reward=3.0), sample("a", reward=4.0, credit=(-0.25, 0.75))]
    main = run_of(*range(1, 21), label="abc", **{"train/timing/generation": [3.0] * 20})
    records = [record_of(recorded(step)) for step in (1, 2)]
    html = page_of(
        before, after, {"method": "abc", "steps": 20}, main, [main, run_of(1.0, label="none")], "c", records
    )
    assert_snapshot(words(html), "report.txt")


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("", "", "Mean reward in training: 1.50 over the first 2 steps, 1.50 over the last 2."),
        ("a", "", "Mean reward on 1 held-out prompt: 1.00 before."),
        ("", "aab", "Mean reward of 3 completions of 2 held-out prompts: 1.00 ± 0.00 after."),
        ("ab", "a", "Mean reward: 1.00 ± 0.00 before (n = 2), 1.00 after (n = 1)."),
    ],
)
def test_the_headline_says_what_it_counts(before, after, sentence):
    assert f"<h1>{sentence}</h1>" in page_of(*([sample(p, reward=1.0) for p in ps] for ps in (before, after)))


def test_completions_stand_side_by_side_from_the_largest_gain_on():
    before = [sample(f"prompt {i:02}", tokens=[f"old{i:02}"], credit=[1.0], reward=0.0) for i in range(24)]
    after = [sample(f"prompt {i:02}", tokens=[f"new{i:02}"], credit=[1.0], reward=float(i)) for i in range(24)]
    html = page_of(before, after)
    # ranks 1, 3, 5, ... 21 and 24 of gains 23, 22, ... 0; i * 23 // 11 for i = 0 ... 11 is 0, 2, 4, ... 20, 23
    expected = [23 - i * 23 // 11 for i in range(12)]
    assert re.findall(r">(?:old|new)(\d\d)<", html) == [f"{i:02}" for i in expected for _ in "ab"]
    assert "Rank 1 of 24, change +23.00" in html and "Rank 24 of 24, change +0.00" in html


def test_charts_by_hand():
    drawn = chart([1.0, -1.0, None, 3.0], "value")
    assert drawn["words"] == "value, per token in order: -1.00 to +3.00"
    # 60 units for a range of 4: zero at 45, one unit is 15; a token is 150 wide
    bars = [("pos", 0, 30, 127.5, 15), ("neg", 150, 45, 127.5, 15), ("pos", 450, 0, 127.5, 45)]
    assert (drawn["bars"], drawn["zero"]) == (bars, 45)


def test_of_a_long_run_evenly_spaced_steps_are_on_the_page():
    tokens = ["x"] * 1000
    records = [record_of(recorded(step, tokens=tokens, credit=[0.001] * 1000)) for step in range(10, 1010, 10)]
    html = section(records, [])
    steps = [int(step) for step in re.findall(r"<summary>Step (\d+)", html)]
    assert len(steps) == 20 and steps[0] == 10 and steps[-1] == 1000 and len(html) < 10_000_000
    assert "20 evenly spaced ones of 100" in html and html.count("<details open") == 1


# command


def test_files_of_an_earlier_version_are_reported(tmp_path, capsys):
    samples = ["--before", str(WRITTEN / "before.jsonl"), "--after", str(WRITTEN / "after.jsonl")]
    assert cli.main(["report", str(WRITTEN), *samples, "--out", str(tmp_path / "new" / "out")]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith(f"{tmp_path}/new/out/report.html {tmp_path}/new/out/curves.png")
    html = (tmp_path / "new" / "out" / "report.html").read_text(encoding="utf-8")
    assert pixels((tmp_path / "new" / "out" / "curves.png").read_bytes()).width > 1000
    assert f"Made by <code>abc-rlhf report {WRITTEN} --before" in html
    assert_snapshot(words(html).split("Made by")[0], "written.txt")


def test_compare_prints_and_embeds_the_table(tmp_path, capsys):
    """none ends at 0.5, which abc (2.0) reaches with its first full window and none#1 (0.0) never does."""
    labels = ("none#1", "none#2", "abc")
    runs = {label: make_run(tmp_path / label, [float(i)] * 6) for i, label in enumerate(labels)}
    compared = [f"{label}={directory}" for label, directory in runs.items()]
    assert cli.main(["report", runs["none#1"], "--out", str(tmp_path / "out"), "--compare", *compared]) == 0
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<td>(\w+)</td><td class=\"number\">(\d)</td>", html) == [("none", "2"), ("abc", "1")]
    assert "0.500 ± 0.707" in printed and "0.500 ± 0.707" in html
    assert ">5</td>" in html and "not reached (1 of 2)" in html
    assert not (tmp_path / "none#1" / "report.html").exists()


def test_a_run_not_among_the_compared_comes_first_under_its_name(tmp_path):
    mine, other = make_run(tmp_path / "mine"), make_run(tmp_path / "x")
    assert cli.main(["report", mine, "--compare", f"other={other}"]) == 0
    html = (tmp_path / "mine" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<td>(\w+)</td><td class=\"number\">1</td>", html) == ["mine", "other"]


def test_recorded_completions_are_reported_with_what_was_skipped(tmp_path):
    run = make_run(tmp_path / "run")
    path = write_records(tmp_path / "run", recorded(1), recorded(2, credit=(-0.25, 0.75)))
    path.write_text(path.read_text() + '{"run')
    assert cli.main(["report", run]) == 0
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Step 1: 1 completion with scores 1.50" in html and "completions.jsonl:3 is cut short" in html


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (b"", "completions.jsonl holds no record; train with --shaping.show_every"),
        ('{"run": "é'.encode()[:-1], "completions.jsonl:1 is cut short"),
        (b'{"a": 1}\n', "completions.jsonl:1: lacks prompt, tokens"),
    ],
)
def test_damaged_completions_and_summaries_leave_the_curves(tmp_path, capsys, content, note):
    run = make_run(tmp_path / "run")
    (tmp_path / "run" / "completions.jsonl").write_bytes(content)
    (tmp_path / "run" / "summary.json").write_bytes(content)
    (tmp_path / "run" / "tensorboard" / "tfevents").mkdir()  # no file
    assert cli.main(["report", run]) == 0
    assert note in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    said = capsys.readouterr().err
    assert note in said and ("summary.json is not JSON" in said or b"a" in content)
    assert cli.main(["show", run]) == 2 and "completions.jsonl" in capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys):
    run, empty = make_run(tmp_path / "run"), tmp_path / "empty"
    (empty / "tensorboard").mkdir(parents=True)
    write_events(tmp_path / "odd" / "tensorboard", {"eval/x": [(1, 1.0)]})
    one, two = (write_samples(tmp_path / f"{name}.jsonl", [sample(name)]) for name in ("one", "two"))
    for arguments, message in (
        ([str(tmp_path / "absent")], "absent does not exist"),
        ([str(empty)], "no TensorBoard scalars"),
        ([str(tmp_path / "odd")], "is it a PPO run"),
        ([run, "--before", str(tmp_path / "absent.jsonl")], "absent.jsonl"),
        ([run, "--before", one, "--after", two], "no prompt in common"),
        ([run, "--compare", "abc"], "'abc' is not LABEL=RUN_DIR"),
        ([run, "--compare", f"a={run}", f"a={run}"], "two runs labelled 'a'"),
        ([run, "--compare", f"run={empty}"], "also the name of RUN_DIR"),
        ([run, "--compare", "gone=nowhere"], "nowhere does not exist"),
        ([run, "--out", one], "choose another --out"),
    ):
        assert cli.main(["report", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "run" / "report.html").exists()
