"""abc-rlhf show and the recorded completions: what is read, the terminal and the pictures."""

import io
import json
import re
import webbrowser

import numpy as np
import pytest
from PIL import Image
from report_support import outline, recorded, sample, words, write_records, write_samples
from rich.console import Console
from snapshots import assert_snapshot

from abc_plugin import cli
from abc_plugin.errors import UserError
from abc_plugin.report import heatmap_png, show
from abc_plugin.report.recorded_completions import by_step, read_records, record_of
from abc_plugin.report.recorded_steps_html import fragment
from abc_plugin.report.samples_file import Sample
from abc_plugin.report.token_colours import heat, tint


def printed(capsys, *arguments):
    """What ``abc-rlhf show`` prints."""
    assert cli.main(["show", *map(str, arguments)]) == 0
    return capsys.readouterr().out


# records


def test_records_are_read_by_step_with_their_columns(tmp_path):
    path = write_records(tmp_path, recorded(1), recorded(10, value=None), recorded(10, sample=3))
    records, notes = read_records(path)
    assert notes == [] and {step: len(group) for step, group in by_step(records).items()} == {1: 1, 10: 2}
    assert records[0].columns["advantage"] == [-2.0, -2.0] and "value" not in records[1].columns
    numbers = {"id": "101", "shaped reward": "+0.500", "KL penalty": "-0.010", "value": "+1.000"}
    assert records[0].numbers(1) == numbers | {"advantage": "-2.00", "return": "+3.000"}


def test_the_caption_says_what_the_host_made_of_the_score():
    assert record_of(recorded()).caption == "step 1 · sample 7 · score 1.50 · abc, β 0.8 · 2 tokens, truncated"
    grouped = record_of(recorded(spread_reward=-0.25, method="none", truncated=False)).caption
    assert grouped.endswith("score 1.50, after baseline and clipping -0.25 · none · 2 tokens")


def test_a_resumed_process_replaces_what_it_repeats_and_a_new_run_everything(tmp_path):
    kept = [recorded(step, run="first") for step in (1, 10, 20, 30)] + [recorded(20, run="second", reward=9.0)]
    assert [(r.step, r.reward) for r in read_records(write_records(tmp_path, *kept))[0]] == [
        (1, 1.5),
        (10, 1.5),
        (20, 9.0),
    ]
    again = [*kept, recorded(1, run="third")]
    assert [r.run for r in read_records(write_records(tmp_path, *again))[0]] == ["third"]


def test_a_line_cut_short_is_skipped_with_a_note_wherever_it_stands(tmp_path):
    path = write_records(tmp_path, recorded(1), recorded(10))
    whole = path.read_text()
    path.write_text(whole[:-30])
    assert [r.step for r in read_records(path)[0]] == [1]
    path.write_text(whole[:-30] + "\n" + json.dumps(recorded(10, run="second")) + "\n")
    records, [note] = read_records(path)
    assert [r.step for r in records] == [1, 10]
    assert "completions.jsonl:2 is cut short" in note


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([1], "not an object"),
        ({"prompt": "p", "tokens": [], "credit": [], "reward": 1}, "lacks run, step"),
        (recorded(ids=[1]), "2 tokens but 1 numbers of ids"),
        (recorded(value=["x", 1]), "value ['x', 1] is not a list of finite numbers"),
        (recorded(step="1"), "step '1' is not a whole number"),
        (recorded(spread_reward=None), "spread_reward None is not a finite number"),
        (recorded(credit=(0.5, 0.6)), "credit sums to 1.1"),
    ],
)
def test_a_foreign_line_is_named(tmp_path, fields, message):
    path = write_records(tmp_path, recorded(), fields)
    with pytest.raises(UserError, match=rf"completions\.jsonl:2: .*{re.escape(message)}") as error:
        read_records(path)
    assert "\n" not in str(error.value)


# terminal


def test_the_last_step_is_shown_with_numbers_and_what_else_there_is(tmp_path, capsys):
    write_records(tmp_path, recorded(1), recorded(10, tokens=["Hi", " you"], sample=3))
    out = printed(capsys, tmp_path)
    assert "step 10 · sample 3 · score 1.50" in out and "step 1 ·" not in out
    assert "Hi[25] you[75]" in out  # no colours here, so numbers
    assert re.search(r"1\s+you\s+75\.0 %\s+101\s+\+0\.500\s+-0\.010\s+\+1\.000\s+-2\.00\s+\+3\.000", out)
    assert "recorded steps: 1, 10 (--step N)" in re.sub(r"\s+", " ", out)
    assert "step 1 · sample 7" in printed(capsys, tmp_path, "--step", 1)


def test_top_takes_the_tokens_with_most_credit_in_the_order_of_the_text(tmp_path, capsys):
    tokens, credit = ["t0", "t1", "t2", "t3"], [0.3, -0.1, -0.4, 0.2]
    write_records(tmp_path, recorded(tokens=tokens, credit=credit))
    rows = re.findall(r"^ *\d+ +(t\d)", printed(capsys, tmp_path, "--top", 2), re.M)
    assert rows == ["t0", "t2"]
    assert re.findall(r"^ *\d+ +(t\d)", printed(capsys, tmp_path, "--sample", 7), re.M) == tokens
    assert re.findall(r"^ *\d+ +(t\d)", printed(capsys, tmp_path, "--top", 0), re.M) == tokens


def test_colours_are_there_where_the_terminal_has_some_and_numbers_where_not():
    record = record_of(recorded(tokens=["hot", " cold", "tool"], credit=[0.6, -0.4, None], special=[0]))
    colour = heat(record, colour=True)
    styles = {colour.plain[span.start : span.end]: span.style for span in colour.spans}
    assert styles["hot"].bgcolor.name == tint(0.375, negative=False) and styles["hot"].italic
    assert styles[" cold"].bgcolor.name == tint(0.8 / 2.8, negative=True)
    assert styles["tool"].dim and styles["tool"].bgcolor is None
    assert colour.plain == "hot coldtool"
    assert heat(record, colour=False).plain == "hot[60] cold[-40]tool"
    assert show.coloured(Console(force_terminal=True, color_system="truecolor", no_color=False))
    assert not show.coloured(Console(force_terminal=True, color_system="truecolor", no_color=True))
    assert not show.coloured(Console(file=io.StringIO(), force_terminal=False))


def test_markup_and_control_characters_of_a_token_stay_text(tmp_path, capsys):
    write_records(tmp_path, recorded(tokens=["[red]x[/red]", "\x1b[31m"], prompt="[bold]\x1b[2J"))
    out = printed(capsys, tmp_path)
    assert "[red]x[/red]" in out and "\\u001b[31m" in out and "\x1b" not in out


def test_samples_of_evaluate_are_shown_too(tmp_path, capsys):
    path = write_samples(tmp_path / "after.jsonl", [sample(f"prompt {i}", reward=float(i)) for i in range(9)])
    out = printed(capsys, path)
    assert re.findall(r"^prompt (\d)$", out, re.M) == ["8", "6", "3", "0"]  # evenly spaced ranks
    assert re.findall(r"^prompt (\d)$", printed(capsys, path, "--sample", 5), re.M) == ["5"]


def test_bad_input_is_one_line_and_exit_2(tmp_path, capsys):
    write_records(tmp_path / "run", recorded(1), recorded(10))
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "completions.jsonl").write_text("Dear diary\n")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "completions.jsonl").write_text("")
    evaluated = write_samples(tmp_path / "after.jsonl", [sample()])
    for arguments, message in (
        ([tmp_path / "absent"], "absent does not exist"),
        ([empty], "has no completions.jsonl; runs record completions unless --shaping.show_every is 0"),
        ([tmp_path / "foreign"], "foreign/completions.jsonl holds no record"),
        ([tmp_path / "nothing"], "holds no record; train with --shaping.show_every"),
        ([tmp_path / "run", "--step", 7], "--step 7 was not recorded; recorded steps: 1, 10"),
        ([tmp_path / "run", "--sample", 3], "--sample 3 is not there; samples: 7"),
        ([evaluated, "--step", 1], "not of a training run and has no steps"),
        ([evaluated, "--html"], "abc-rlhf report RUN_DIR --after"),
        ([tmp_path / "run", "--png", evaluated], "cannot write"),
    ):
        assert cli.main(["show", *map(str, arguments)]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


# page


def test_html_writes_a_page_beside_the_file_and_open_hands_it_to_the_browser(tmp_path, capsys, monkeypatch):
    write_records(tmp_path / "run", recorded(1), recorded(2, credit=(-0.25, 0.75)))
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url))  # None: there is none
    out = printed(capsys, tmp_path / "run", "--open")
    assert "no browser was found" in out and "page: " in out
    assert opened == [(tmp_path / "run" / "completions.html").resolve().as_uri()]
    html = (tmp_path / "run" / "completions.html").read_text(encoding="utf-8")
    parsed = outline(html)
    assert parsed.requests == [] and "://" not in html and 'class="t neg"' in html
    assert "credit 75.0 % (1.5 × uniform) · id 101 · shaped reward +0.500 · KL penalty -0.010 · value +1.000" in html
    assert_snapshot(words(html).split("Made by")[0], "completions.txt")


def test_trackers_get_a_page_of_some_records():
    html = fragment([record_of(recorded(tokens=["<script>", "b"])), record_of(recorded(2, value=None))])
    parsed = outline(html)
    assert "script" not in parsed.tags and parsed.tags.count("article") == 2
    assert parsed.tags.count("svg") == 3  # value and advantage; advantage


# pictures


def count(png, colour):
    shown = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int((np.abs(shown - list(bytes.fromhex(colour[1:]))).max(-1) <= 2).sum())


def test_a_picture_shows_credit_by_its_sign():
    big = "wide token of many characters"
    plain = heatmap_png.draw([Sample("p", [big, "b"], [1.0, 0.0], 1.0)])
    signed = heatmap_png.draw([Sample("p", [big, "b"], [-1.0, 0.0], 1.0)])
    hot, cold = tint(0.5), tint(0.5, negative=True)  # 2 × uniform
    assert count(plain, hot) > 2000 > 100 > count(plain, cold)
    assert count(signed, cold) > count(plain, cold) + 2000
    assert heatmap_png.draw([Sample("p", [big, "b"], [1.0, 0.0], 1.0)]) == plain


def test_of_a_long_prompt_the_end_and_of_a_long_completion_the_beginning_is_drawn():
    def height(prompt, count):
        png = heatmap_png.draw([Sample(prompt, ["token "] * count, [1 / count] * count, 1.0)], tokens=16)
        return Image.open(io.BytesIO(png)).height

    assert height("word " * 1000, 16) == height("word " * 2000, 16) > height("word", 16) + 100
    assert height("word", 16) == height("word", 1600)


def test_of_numbers_that_would_touch_the_largest_stands(monkeypatch):
    drawn = []
    monkeypatch.setattr(heatmap_png, "_write", lambda _axes, x, _y, text, **_look: drawn.append((x, text)))
    heatmap_png._draw_numbers(None, [(0.1, 9.5, "10"), (0.6, 10.5, "-60"), (0.05, 5.0, "5")], 0.0)
    assert drawn == [(10.5, "-60"), (5.0, "5")]


def test_what_no_font_has_is_a_code_point():
    assert heatmap_png.drawable("naïve — ↵ ∅ ·\n") == "naïve — ↵ ∅ ·\n"
    assert heatmap_png.drawable("a\U0003fffd\u0378b") == "a\\u3fffd\\u0378b"  # unassigned


def test_pictures_are_one_per_completion(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    write_records(tmp_path, recorded(10), recorded(10, sample=8, tokens=["$\\frac$", "<b>\n"], credit=(-0.4, 0.6)))
    out = printed(capsys, tmp_path, "--png", tmp_path / "png", "--svg", tmp_path / "svg")
    assert "2 heat maps in" in out and "2 SVGs in" in out
    for kind in ("png", "svg"):
        names = sorted(path.name for path in (tmp_path / kind).iterdir())
        assert names == [f"step000010-sample0007.{kind}", f"step000010-sample0008.{kind}"]
    assert Image.open(tmp_path / "png" / names[0].replace("svg", "png")).width > 1000
    svg = (tmp_path / "svg" / names[1]).read_text(encoding="utf-8")
    assert "url(http" not in svg and "&lt;b&gt;↵" in svg
    assert tint(0.8 / 2.8, negative=True) in svg and tint(1.2 / 3.2) in svg


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
