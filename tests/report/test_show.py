"""abc-rlhf show and the recorded completions: what is read, the terminal, the pictures and the page."""

import io
import json
import re
import webbrowser

import numpy as np
import pytest
from PIL import Image
from report_support import make_run, outline, sample, write_samples
from rich.console import Console

from abc_plugin import cli
from abc_plugin.errors import UserError
from abc_plugin.report import heatmap, show, training
from abc_plugin.report.records import by_step, read_records, record_of
from abc_plugin.report.samples import Sample
from abc_plugin.report.style import tint

EVIL = "<script>alert(1)</script>\"'&"


def line(step=1, tokens=("a", " b"), credit=(0.25, 0.75), run="first", **changes):
    """The fields of one record."""
    length = len(tokens)
    fields = {"run": run, "step": step, "sample": 7, "method": "abc", "beta": 0.8, "truncated": True, "reward": 1.5}
    fields |= {"spread_reward": 1.5, "prompt": "p", "special": [], "tokens": list(tokens), "credit": list(credit)}
    fields |= {"ids": list(range(100, 100 + length)), "shaped_reward": [0.5] * length, "kl_penalty": [-0.01] * length}
    fields |= {"value": [1.0] * length, "advantage": [-2.0] * length, "return": [3.0] * length}
    return fields | changes


def write(directory, *lines):
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "completions.jsonl"
    path.write_text("".join(json.dumps(fields) + "\n" for fields in lines), encoding="utf-8")
    return path


def said(capsys, *words):
    """What ``abc-rlhf show`` prints, without the line breaks of the terminal's width."""
    assert cli.main(["show", *map(str, words)]) == 0
    return capsys.readouterr().out


# records


def test_records_are_read_by_step_with_their_columns(tmp_path):
    path = write(tmp_path, line(1), line(10, value=None), line(10, sample=3))
    records, notes = read_records(path)
    assert notes == [] and {step: len(found) for step, found in by_step(records).items()} == {1: 1, 10: 2}
    assert records[0].columns["advantage"] == [-2.0, -2.0] and "value" not in records[1].columns
    assert records[0].numbers(1) == [
        ("id", "101"),
        ("shaped reward", "+0.500"),
        ("KL penalty", "-0.010"),
        ("value", "+1.000"),
        ("advantage", "-2.00"),
        ("return", "+3.000"),
    ]


def test_the_caption_says_what_the_host_made_of_the_score():
    assert record_of(line()).caption == "step 1 · sample 7 · score 1.50 · abc, β 0.8 · 2 tokens, truncated"
    grouped = record_of(line(spread_reward=-0.25, method="none", truncated=False)).caption
    assert grouped.endswith("score 1.50, after baseline and clipping -0.25 · none · 2 tokens")


def test_a_resumed_process_replaces_what_it_repeats_and_a_new_run_everything(tmp_path):
    kept = [line(step, run="first") for step in (1, 10, 20, 30)] + [line(20, run="second", reward=9.0)]
    assert [(r.step, r.reward) for r in read_records(write(tmp_path, *kept))[0]] == [(1, 1.5), (10, 1.5), (20, 9.0)]
    again = [*kept, line(1, run="third")]
    assert [r.run for r in read_records(write(tmp_path, *again))[0]] == ["third"]


def test_a_line_cut_short_is_skipped_with_a_note_wherever_it_stands(tmp_path):
    path = write(tmp_path, line(1), line(10))
    whole = path.read_text()
    path.write_text(whole[:-30])
    assert [r.step for r in read_records(path)[0]] == [1]
    path.write_text(whole[:-30] + "\n" + json.dumps(line(10, run="second")) + "\n")
    records, [note] = read_records(path)
    assert [r.step for r in records] == [1, 10]
    assert "completions.jsonl:2 is cut short" in note


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([1], "not an object"),
        ({"prompt": "p", "tokens": [], "credit": [], "reward": 1}, "lacks run, step"),
        (line(ids=[1]), "2 tokens but 1 of ids"),
        (line(value=["x", 1]), "value is not a list of numbers"),
        (line(step="1"), "step '1' makes no sense"),
        (line(spread_reward=None), "spread_reward None makes no sense"),
        (line(credit=(0.5, 0.6)), "credit sums to 1.1"),
    ],
)
def test_a_foreign_line_is_named(tmp_path, fields, message):
    path = write(tmp_path, line(), fields)
    with pytest.raises(UserError, match=rf"completions\.jsonl:2: .*{re.escape(message)}") as error:
        read_records(path)
    assert "\n" not in str(error.value)


# terminal


def test_the_last_step_is_shown_with_numbers_and_what_else_there_is(tmp_path, capsys):
    write(tmp_path, line(1), line(10, tokens=["Hi", " you"], sample=3))
    out = said(capsys, tmp_path)
    assert "step 10 · sample 3 · score 1.50" in out and "step 1 ·" not in out
    assert "Hi[25] you[75]" in out  # no colours here, so numbers
    assert re.search(r"1\s+you\s+75\.0 %\s+101\s+\+0\.500\s+-0\.010\s+\+1\.000\s+-2\.00\s+\+3\.000", out)
    assert "recorded steps: 1, 10 (--step N)" in re.sub(r"\s+", " ", out)
    assert "step 1 · sample 7" in said(capsys, tmp_path, "--step", 1)


def test_top_takes_the_tokens_with_most_credit_in_the_order_of_the_text(tmp_path, capsys):
    tokens, credit = ["t0", "t1", "t2", "t3"], [0.3, -0.1, -0.4, 0.2]
    write(tmp_path, line(tokens=tokens, credit=credit))
    rows = re.findall(r"^ *\d+ +(t\d)", said(capsys, tmp_path, "--top", 2), re.M)
    assert rows == ["t0", "t2"]
    assert re.findall(r"^ *\d+ +(t\d)", said(capsys, tmp_path, "--sample", 7), re.M) == tokens
    assert re.findall(r"^ *\d+ +(t\d)", said(capsys, tmp_path, "--top", 0), re.M) == tokens


def test_colours_are_there_where_the_terminal_has_some_and_numbers_where_not():
    record = record_of(line(tokens=["hot", " cold", "tool"], credit=[0.6, -0.4, None], special=[0]))
    colour = show.heat(record, colour=True)
    styles = {colour.plain[span.start : span.end]: span.style for span in colour.spans}
    assert styles["hot"].bgcolor.name == tint(0.375, negative=False) and styles["hot"].italic  # 1.2 / 3.2
    assert styles[" cold"].bgcolor.name == tint(0.8 / 2.8, negative=True)
    assert styles["tool"].dim and styles["tool"].bgcolor is None
    assert colour.plain == "hot coldtool"
    assert show.heat(record, colour=False).plain == "hot[60] cold[-40]tool"
    assert show.coloured(Console(force_terminal=True, color_system="truecolor", no_color=False))
    assert not show.coloured(Console(force_terminal=True, color_system="truecolor", no_color=True))
    assert not show.coloured(Console(file=io.StringIO(), force_terminal=False))


def test_markup_and_control_characters_of_a_token_stay_text(tmp_path, capsys):
    write(tmp_path, line(tokens=["[red]x[/red]", "\x1b[31m"], prompt="[bold]\x1b[2J"))
    out = said(capsys, tmp_path)
    assert "[red]x[/red]" in out and "\\u001b[31m" in out and "\x1b" not in out


def test_samples_of_evaluate_are_shown_too(tmp_path, capsys):
    path = write_samples(tmp_path / "after.jsonl", [sample(f"prompt {i}", reward=float(i)) for i in range(9)])
    out = said(capsys, path)
    assert re.findall(r"^prompt (\d)$", out, re.M) == ["8", "6", "3", "0"]  # evenly spaced ranks
    assert re.findall(r"^prompt (\d)$", said(capsys, path, "--sample", 5), re.M) == ["5"]


def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys):
    write(tmp_path / "run", line(1), line(10))
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "completions.jsonl").write_text("Dear diary\n")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "completions.jsonl").write_text("")
    evaluated = write_samples(tmp_path / "after.jsonl", [sample()])
    for words, message in (
        ([tmp_path / "absent"], "absent does not exist"),
        ([empty], "has no completions.jsonl; runs record completions unless --shaping.show_every is 0"),
        ([tmp_path / "foreign"], "holds 1 lines, none a record"),
        ([tmp_path / "nothing"], "holds nothing; train with --shaping.show_every"),
        ([tmp_path / "run", "--step", 7], "--step 7 was not recorded; recorded steps: 1, 10"),
        ([tmp_path / "run", "--sample", 3], "--sample 3 is not there; samples: 7"),
        ([evaluated, "--step", 1], "not of a training run and has no steps"),
        ([evaluated, "--html"], "abc-rlhf report RUN_DIR --after"),
        ([tmp_path / "run", "--png", evaluated], "cannot write"),
    ):
        assert cli.main(["show", *map(str, words)]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


# page


def test_the_page_is_whole_safe_and_asks_for_nothing(tmp_path, capsys):
    evil = line(tokens=[EVIL, "b"], prompt=EVIL, method=EVIL)
    write(tmp_path, line(1), evil | {"step": 2})
    assert "page: " in said(capsys, tmp_path, "--html")
    html = (tmp_path / "completions.html").read_text(encoding="utf-8")
    parsed = outline(html)
    assert "script" not in parsed.tags and parsed.requests == [] and "://" not in html
    assert html.count("&lt;script&gt;") == 4  # caption, prompt, token and its hover text
    assert html.count("<details") == 2 and html.count("<details open") == 1
    assert "credit 25.0 % (0.5 × uniform) · id 100 · shaped reward +0.500 · KL penalty -0.010 · value +1.000" in html
    assert html.count("advantage, as the policy") == 4  # caption and label of a chart per completion


def test_open_hands_the_page_to_the_browser(tmp_path, capsys, monkeypatch):
    write(tmp_path, line())
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url))  # None: there is none
    assert "no browser was found" in said(capsys, tmp_path, "--open")
    assert opened == [(tmp_path / "completions.html").resolve().as_uri()]


def test_the_report_has_the_recorded_completions(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert cli.main(["report", run]) == 0
    assert "Completions in training" not in (tmp_path / "run" / "report.html").read_text()
    path = write(tmp_path / "run", line(1), line(2, credit=(-0.25, 0.75)))
    path.write_text(path.read_text() + '{"run')
    assert cli.main(["report", run]) == 0
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    outline(html)
    assert "Step 1: 1 completion with scores 1.50" in html and "cut short" in html
    assert 'class="t neg"' in html and "blue lowered it" in html


def test_charts_by_hand():
    record = record_of(line(tokens="abcd", credit=[0.25] * 4, value=[1.0, -1.0, None, 3.0]))
    chart = training._chart(record, "value", "value")
    assert "value, per token in order: -1.00 to +3.00" in chart
    # 60 units for a range of 4: zero at 45, one unit is 15
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="127.5" height="([\d.]+)"', chart)
    assert bars == [("pos", "0.0", "30.0", "15.0"), ("neg", "150.0", "45.0", "15.0"), ("pos", "450.0", "0.0", "45.0")]


def test_of_a_long_run_evenly_spaced_steps_are_on_the_page():
    tokens = ["x"] * 1000
    records = [record_of(line(step, tokens=tokens, credit=[0.001] * 1000)) for step in range(10, 1010, 10)]
    html = training.section(records, [])
    steps = [int(step) for step in re.findall(r"<summary>Step (\d+)", html)]
    assert len(steps) == 20 and steps[0] == 10 and steps[-1] == 1000
    assert "20 evenly spaced ones of 100" in html and len(html) < 10_000_000


# pictures


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)


def count(png, colour):
    want = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels(png).astype(int) - want).max(1) <= 2).sum())


def test_tokens_wrap_like_text_and_stay_whole():
    cells, rows = heatmap.lay_out(["abc", " def", "↵\n", "你好", " long", "wordlongerthanthat"], columns=8)
    assert [(c.token, c.row, c.column, c.text) for c in cells] == [
        (0, 0, 0, "abc"),
        (1, 0, 3, " def"),
        (2, 0, 7, "↵"),
        (3, 1, 0, "你好"),  # four columns
        (4, 2, 0, " long"),
        (5, 3, 0, "wordlong"),
        (5, 4, 0, "erthanth"),
        (5, 5, 0, "at"),
    ]
    assert rows == 6 and [c.last for c in cells] == [True] * 5 + [False, False, True]


def test_a_picture_shows_credit_by_its_sign():
    big = "wide token of many characters"
    plain = heatmap.draw([Sample("p", [big, "b"], [1.0, 0.0], 1.0)])
    signed = heatmap.draw([Sample("p", [big, "b"], [-1.0, 0.0], 1.0)])
    hot, cold = tint(0.5), tint(0.5, negative=True)  # 2 × uniform
    assert count(plain, hot) > 2000 > 100 > count(plain, cold)
    assert count(signed, cold) > count(plain, cold) + 2000
    assert heatmap.draw([Sample("p", [big, "b"], [1.0, 0.0], 1.0)]) == plain


def test_what_no_font_has_is_a_code_point_with_a_note():
    assert heatmap.drawable("naïve — ↵ ∅ ·") == ("naïve — ↵ ∅ ·", set(), set())
    unassigned = "\U0003fffd"  # no font has it
    text, families, missing = heatmap.drawable(f"a{unassigned}\u0378b")
    assert (text, families, missing) == ("a\\U0003fffd\\u0378b", set(), {unassigned, "\u0378"})
    assert "2 characters without a glyph" in heatmap._missing_note(missing) and heatmap._missing_note(set()) == ""


def test_png_writes_one_picture_per_completion(tmp_path, capsys):
    write(tmp_path, line(10), line(10, sample=8, tokens=["$\\frac$", "\n"]))
    assert "2 heat maps in" in said(capsys, tmp_path, "--png", tmp_path / "png")
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == ["step000010-sample0007.png", "step000010-sample0008.png"]
    assert all(Image.open(tmp_path / "png" / name).width > 1000 for name in names)


# What people with protanopia, deuteranopia and tritanopia see of linear RGB (Machado, Oliveira and Fernandes, 2009).
SIGHT = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(colour, sight):
    """CIE L*a*b* of #rrggbb."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(SIGHT[sight]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
def test_the_colours_are_told_apart_by_everyone(sight):
    strengths = [0.0, 1 / 3, 0.5, 2 / 3, 0.8]
    for negative in (False, True):
        light = [lab(tint(strength, negative=negative), sight)[0] for strength in strengths]
        assert all(a > b + 2 for a, b in zip(light, light[1:], strict=False))  # more credit is always darker
    for strength in strengths[1:]:
        apart = lab(tint(strength), sight) - lab(tint(strength, negative=True), sight)
        assert np.linalg.norm(apart) > 25  # 2 can just be seen
    assert (tint(0.0), tint(1.0), tint(1.0, negative=True)) == ("#ffffff", "#f07800", "#5a9bff")
