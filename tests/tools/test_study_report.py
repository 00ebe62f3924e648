"""``abc-rlhf study report``: its files, its words, its pictures, and what it refuses."""

import csv
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_support import outline, pixels
from study_tables import condition, rows, write

from abc_plugin.cli import main
from abc_plugin.errors import UserError
from abc_plugin.tools.study import curves, figures, verdict, words
from abc_plugin.tools.study.comparisons import Analysis, analyse
from abc_plugin.tools.study.document import Grid, Section, as_html, as_markdown
from abc_plugin.tools.study.reading import locate, read
from abc_plugin.tools.study.report_command import as_json
from abc_plugin.tools.study.statistics import Estimate
from abc_plugin.tools.study.table import Table

METHODS = (("none", ""), ("abc", 0.8), ("abc", 1.0), ("uniform", 0.8))


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(curves, "RESAMPLES", 200)


def study(directory, **changes):
    """A study's directory of four methods, two lambdas and three seeds."""
    directory.mkdir(exist_ok=True)
    table = [row for x in (0.95, 1.0) for row in rows(METHODS, **{"lambda": x}, **changes)]
    write(directory / "results.csv", table)
    return directory


def report(*words_):
    return main(["study", "report", *map(str, words_)])


FILES = [
    "report.md",
    "report.json",
    "report.html",
    "reward.png",
    "kl.png",
    "value_loss.png",
    "frontier.png",
    "differences.png",
    "sweep_beta.png",
    "sweep_lambda.png",
]


# files


def test_where_many_settings_vary_labels_leave_the_commonest_unsaid(tmp_path):
    usual = {"lambda": 0.95, "kl_coef": 0.2, "estimator": "gae"}
    table = rows(**usual) + rows(**usual | {"kl_coef": 0.05}) + rows(**usual | {"estimator": "reinforce", "lambda": 1})
    found = read(write(tmp_path / "t.csv", table))
    assert [found.label(condition) for condition in found.conditions if condition.method == "abc"] == [
        "abc β 0.8, kl_coef 0.05",
        "abc β 0.8",
        "abc β 0.8, estimator reinforce, λ 1",
    ]
    assert report(tmp_path / "t.csv") == 0
    said = (tmp_path / "t-report" / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert said.index("Where not said otherwise: estimator gae, kl_coef 0.2, λ 0.95.") < said.index("against none (")
    base = rows(**usual | {"kl_coef": ""})  # a setting that some runs do not have is said where it is there
    found = read(write(tmp_path / "t.csv", table + base))
    labels = [found.label(condition) for condition in found.conditions if condition.method == "abc"]
    assert len(labels) == len(set(labels)) == 4 and "abc β 0.8" in labels and "abc β 0.8, kl_coef 0.2" in labels


def test_report_of_a_study(tmp_path, capsys):
    source = study(tmp_path / "study")
    assert report(source) == 0
    assert {path.name for path in source.iterdir()} == {"results.csv", *FILES}
    told = capsys.readouterr().out
    last = told.splitlines()[-1]
    assert last.endswith(" ".join(str(source / name) for name in FILES))
    text = (source / "report.md").read_text()
    numbers = json.loads((source / "report.json").read_text())
    assert len(numbers["verdicts"]) == 2 * (3 + 1) and len(numbers["conditions"]) == 8
    for sentence in numbers["verdicts"]:
        assert sentence in told and sentence.replace("<", "&lt;") in text
    mean = np.mean([float(row["reward"]) for row in csv.DictReader((source / "results.csv").open())][:36])
    assert numbers["conditions"][0]["label"] == "none, λ 0.95"
    assert numbers["conditions"][0]["means"]["reward"]["estimate"]["value"] == pytest.approx(mean)
    titles = re.findall("^## (.*)", text, re.M)
    assert titles == [
        "Verdicts",
        "The paper's claims",
        "Mean reward over training",
        "Paired differences",
        "Steps to 90 % of the baseline's rise",
        "Spread across seeds",
        "Reward against KL",
        "Value loss",
        "Sweeps",
        "What was read",
    ]
    assert set(re.findall(r"\]\((\w+\.png)\)", text)) == {name for name in FILES if name.endswith("png")}
    assert "holds the truth in 81.6 % with 3 seeds" in text


def test_page_is_whole_and_by_itself(tmp_path):
    source = study(tmp_path / "study")
    report(source, "--out", tmp_path / "out")
    parsed = outline((tmp_path / "out" / "report.html").read_text())
    assert parsed.tags.count("img") == 7 and all(request.startswith("data:image/png") for request in parsed.requests)
    assert [path.name for path in source.iterdir()] == ["results.csv"]


def test_same_table_gives_the_same_bytes_whatever_its_order(tmp_path, capsys):
    table = rows(METHODS[:2])
    files = []
    for place in range(3):
        path = tmp_path / str(place) / "mine.csv"
        path.parent.mkdir()
        np.random.default_rng(place).shuffle(table)
        shuffled = [dict(sorted(row.items(), reverse=place == 1)) for row in table]
        write(path, shuffled)
        assert report(path) == 0
        out = path.parent / "mine-report"
        files.append([(out / name).read_text().replace(str(path), "") for name in ("report.md", "report.json")])
    assert files[0] == files[1] == files[2]
    before = (out / "reward.png").read_bytes()
    assert report(path) == 0 and (out / "reward.png").read_bytes() == before  # its own files it may overwrite


def test_pictures_that_are_no_longer_drawn_are_removed_but_no_one_elses(tmp_path):
    source = study(tmp_path / "study")
    report(source)
    (source / "sweep_mine.png").write_bytes((source / "sweep_lambda.png").read_bytes())  # ours, but not listed
    (source / "sweep_beta.png").write_bytes(b"drawn by somebody else")  # listed, but not ours
    (tmp_path / "outside.png").write_bytes((source / "kl.png").read_bytes())
    numbers = json.loads((source / "report.json").read_text())
    assert numbers["figures"] == [name for name in FILES if name.endswith("png")]
    numbers["figures"].append("../outside.png")
    (source / "report.json").write_text(json.dumps(numbers))
    write(source / "results.csv", rows(METHODS[:2]))
    assert report(source) == 0
    left = {*FILES, "sweep_mine.png", "results.csv"} - {"sweep_lambda.png"}
    assert {path.name for path in source.iterdir()} == left and (tmp_path / "outside.png").exists()
    assert (source / "sweep_beta.png").read_bytes() == b"drawn by somebody else"


def test_pairs_are_said_to_share_their_prompts_only_with_this_trainer(tmp_path):
    report(write(tmp_path / "t.csv", rows()))
    text = (tmp_path / "t-report" / "report.md").read_text()
    share = "paired (with abc-rlhf local they share prompts, their order and the random numbers of sampling)"
    assert share in text and text.count("share prompts") == 1


def test_settings_of_credit_make_no_second_baseline_but_those_that_change_its_runs_do(tmp_path):
    def twice(name):
        table = [row | {name: value} for value in ("map", "off") for row in rows()]
        return read(write(tmp_path / "t.csv", table))

    assert len(twice("shaping.tokenizer_check").conditions) == 4
    with pytest.raises(UserError, match="step 1 of method none, seed 1 is there twice"):
        twice("shaping.drop")


def test_csv_and_jsonl_say_the_same(tmp_path):
    table = rows(METHODS)
    one, two = (analyse(read(write(tmp_path / name, table))) for name in ("a.csv", "a.jsonl"))
    assert verdict.sentences(one) == verdict.sentences(two) and len(verdict.sentences(one)) == 4


def test_least_table(tmp_path):
    """Only the four columns that must be there: no KL, no value loss, no beta."""
    table = [{name: row[name] for name in ("method", "seed", "step", "reward")} for row in rows()]
    assert report(write(tmp_path / "t.csv", table), "--out", tmp_path / "o") == 0
    assert sorted(path.name for path in (tmp_path / "o").glob("*.png")) == ["differences.png", "reward.png"]
    text = (tmp_path / "o" / "report.md").read_text()
    assert "KL over training" not in text.split("## Mean reward")[1] and "Value loss" not in text


# words


def test_one_seed_has_neither_interval_nor_test_and_the_report_says_so(tmp_path, capsys):
    assert report(write(tmp_path / "t.csv", rows(METHODS, seeds=(4,))), "--out", tmp_path / "o") == 0
    text = (tmp_path / "o" / "report.md").read_text()
    assert "One seed per condition: no interval and no test" in text
    assert "(1 paired seed, so no interval and no test): reward over training differs by" in text
    numbers = json.loads((tmp_path / "o" / "report.json").read_text())
    assert numbers["comparisons"][0]["paired"]["reward"]["p_t"] is None
    assert numbers["conditions"][0]["means"]["reward"]["estimate"]["low"] is None
    assert "nothing is tested" in capsys.readouterr().out.splitlines()[-1]


def test_seeds_that_only_one_condition_has_are_named(tmp_path, capsys):
    table = [row for row in rows(seeds=(1, 2, 3, 4)) if not (row["method"] == "abc" and row["seed"] == 2)]
    assert report(write(tmp_path / "t.csv", table)) == 0
    assert "compared on the 3 seeds that both have; only one has 2." in capsys.readouterr().out


def test_no_baseline_is_said(tmp_path, capsys):
    assert report(write(tmp_path / "t.csv", rows((("abc", 0.8), ("prefix", 0.8))))) == 0
    told = capsys.readouterr().out
    assert "Without a baseline" in told and "abc β 0.8; prefix β 0.8" in told
    assert "nothing is compared" in (tmp_path / "t-report" / "report.md").read_text()


def test_no_seed_in_common_is_said(tmp_path, capsys):
    table = rows((("none", ""),), seeds=(1, 2)) + rows((("abc", 1),), seeds=(3, 4))
    assert report(write(tmp_path / "t.csv", table)) == 0
    assert "no seed in common, so not compared" in capsys.readouterr().out


@pytest.mark.parametrize("bad, said", [(float("nan"), "nan"), ("", "missing"), ("-inf", "-inf")])
def test_kl_that_is_not_there_leaves_it_out_of_its_condition_and_says_so(tmp_path, capsys, bad, said):
    table = rows()
    table[-1]["kl"] = bad
    assert report(write(tmp_path / "t.csv", table)) == 0
    told = capsys.readouterr().out
    assert f"kl of method abc, beta 0.8, seed 3 is {said} at step 12: kl of this condition is left out." in told
    assert "NaN" not in (tmp_path / "t-report" / "report.json").read_text()


def made(reward, base, kl, base_kl, beta=0.8):
    """The analysis of abc and none on six seeds; each (6, 1) times a common rise of 16 steps."""
    rise = np.minimum(np.arange(16) / 4, 1.0)
    climb = np.arange(16) / 15
    ours = condition("abc", rise * reward, climb * kl, beta=beta)
    return analyse(Table([condition("none", rise * base, climb * base_kl), ours], ["method", "beta"], []))


SEEDS = np.arange(6.0)[:, None]


def test_verdict_of_a_clear_difference_and_of_none():
    wiggle = np.array([1.0, -1, 1, -1, 1, -1])[:, None]
    better = made(5 + 0.1 * SEEDS + 0.01 * wiggle, 4 + 0.1 * SEEDS, 1 + 0.01 * wiggle, 2 + 0 * SEEDS)
    [sentence] = verdict.sentences(better)
    assert re.fullmatch(
        r"abc β 0.8 against none \(6 paired seeds\): higher reward over training by [\d.]+ \[[\d., ]+\] "
        r"\(p < 0.001 after Holm\); higher reward at equal KL by .*; lower KL over training by .*\.",
        sentence,
    )
    assert verdict.headline(better).endswith("of 1 comparison: higher in 1, lower in 0, no difference seen in 0.")
    same = made(4 + 0.1 * SEEDS + 0.1 * wiggle, 4 + 0.1 * SEEDS, 2 + 0.1 * wiggle, 2 + 0 * SEEDS)
    [sentence] = verdict.sentences(same)
    assert sentence.count("no difference seen in") == 3 and "higher" not in sentence
    assert verdict.headline(same).endswith("no difference seen in 1.")


def test_claims_of_the_paper():
    """abc's rewards are ten times as high and spread a fifth as far, at half the KL; then the other way round."""
    none, abc = 4 + SEEDS, 40 + SEEDS / 5
    found = made(abc, none, 1 + SEEDS / 100, 2 + SEEDS / 50)
    [outcomes] = verdict.claims(found).values()
    assert [said for said, _ in outcomes] == ["seen"] * 5
    [outcomes] = verdict.claims(made(none, abc, 2 + SEEDS / 50, 1 + SEEDS / 100)).values()
    assert [said for said, _ in outcomes] == ["the opposite seen"] * 5
    [outcomes] = verdict.claims(made(none, none, 1 + 0 * SEEDS, 1 + 0 * SEEDS)).values()
    assert [said for said, _ in outcomes] == ["not seen"] * 5
    assert verdict.claim_lines(found)[1].endswith("of 1: seen in 1.")


@pytest.mark.parametrize(
    "ratio, said",
    [
        (Estimate(0.4, 0.3, 0.5), "seen"),
        (Estimate(0.45, 0.3, 0.6), "undecided"),
        (Estimate(0.7, 0.51, 0.9), "not seen"),
        (Estimate(0.9, 0.6, 1.2), "not seen"),
        (Estimate(1.3, 1.1, np.inf), "the opposite seen"),
        (Estimate(0.2), "undecided"),
    ],
)
def test_half_the_steps_is_judged_by_the_interval(ratio, said):
    steps = SimpleNamespace(ratio=ratio, late_rise=Estimate(0.1, -0.1, 0.3))
    outcome, number = verdict._half_the_steps(SimpleNamespace(steps=steps))
    assert outcome == said and number == f"{words.estimate(ratio)} of none's"
    assert verdict._half_the_steps(SimpleNamespace(steps=None))[0] == "undecided"


def test_json_says_never_where_a_reward_is_not_reached_and_null_where_there_is_no_interval():
    numbers = as_json(made(0.1 + SEEDS / 100, 4 + SEEDS, 1 + 0 * SEEDS, 1 + 0 * SEEDS))
    steps = json.loads(json.dumps(numbers, allow_nan=False))["comparisons"][0]["steps"]
    assert steps["steps"] == steps["ratio"] == dict.fromkeys(("value", "low", "high"), "never")
    assert steps["never"] == 1.0 and "never" in numbers["about"]
    few = slice(3)
    numbers = as_json(made(*(x[few] for x in (4 + SEEDS, 4 + SEEDS, 1 + 0 * SEEDS, 1 + 0 * SEEDS))))
    assert numbers["comparisons"][0]["steps"]["steps"]["low"] is None


def test_numbers_have_the_decimals_that_their_interval_bears():
    assert words.estimate(Estimate(-0.2134, -0.3721, -0.0547)) == "−0.21 [−0.37, −0.05]"
    assert words.size(Estimate(-0.2134, -0.3721, -0.0547)) == "0.21 [0.05, 0.37]"
    assert words.estimate(Estimate(1234.5, 1200.0, 1269.0)) == "1234 [1200, 1269]"
    assert words.estimate(Estimate(np.inf, 6.25, np.inf)) == "∞ [6.2, ∞]"
    assert words.estimate(Estimate(0.5)) == "0.500" and words.estimate(None) == "–"
    assert words.plus_minus(3.896, 0.1769) == "3.90 ± 0.18" and words.plus_minus(3.896, None) == "3.896"
    assert [words.p_value(p) for p in (0.00002, 0.0123, 0.5, 1.0, None)] == ["< 0.001", "0.012", "0.50", "1.00", "–"]
    assert words.estimate(Estimate(1.0, 1.0, 1.0)) == "1.000 [1.000, 1.000]"


def test_texts_escape_what_came_from_data():
    evil = "a|b<script>*x*](http://y)\n`"
    section = Section("T", [evil], [evil], [Grid((evil,), [[evil]], title=evil)])
    text = as_markdown("mark", evil, [section], evil)
    text, made_by = text.rsplit("\n\n", 1)
    assert (
        made_by.startswith("Made by `a|b<script>") and made_by.endswith("`.\n") and made_by.count("`") == 2
    )  # as code
    assert "<script>" not in text and "](http" not in text and "a\\|b" in text and "\\*x\\*" in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 3 and all(len(re.findall(r"(?<!\\)\|", line)) == 2 for line in table)
    page = as_html("mark", evil, [section], {}, evil)
    assert "<script>" not in page and outline(page)


@given(st.randoms(), st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3, unique=True))
@settings(deadline=None, max_examples=10)
def test_order_of_rows_changes_nothing(tmp_path_factory, random, seeds):
    table = rows(METHODS[:2], seeds=seeds, steps=3)
    path = tmp_path_factory.mktemp("tables") / "t.csv"
    sentences = verdict.sentences(analyse(read(write(path, table))))
    random.shuffle(table)
    assert verdict.sentences(analyse(read(write(path, table)))) == sentences


# pictures


def test_pictures_keep_a_style_per_method_and_eight_conditions_a_panel(tmp_path):
    methods = [("none", ""), *((f"m{i}", beta) for i in range(5) for beta in (0.5, 1.0))]
    table = read(write(tmp_path / "t.csv", rows(methods, steps=4, length=8) + rows(methods[:2], steps=4, length=16)))
    panels = figures._panels(table, "reward")
    sizes = [(title, len(conditions)) for title, conditions in panels]
    assert sizes == [("length 8", 8), ("length 8", 4), ("length 16", 2)]
    assert all(conditions[0].method == "none" for _, conditions in panels)
    styles = figures._styles(table)
    assert len(set(styles.values())) == len(styles) == 11


def test_beta_sweep_starts_at_the_baseline():
    def at(method, beta, value):
        return condition(method, np.full((2, 3), value) + [[0.0], [2.0]], beta=beta)

    table = Table(
        [at("none", None, 1.0), at("abc", 0.5, 2.0), at("abc", 1.0, 3.0), at("lone", 1.0, 9.0)], ["beta"], []
    )
    lines = figures._sweep_lines(table, "beta")
    assert {label: {x: v.tolist() for x, v in points.items()} for label, points in lines.items()} == {
        "abc": {0.0: [1.0, 3.0], 0.5: [2.0, 4.0], 1.0: [3.0, 5.0]}
    }


def test_a_run_at_beta_0_keeps_its_own_data():
    curves_ = [condition("none", np.ones((2, 3))), condition("abc", 2 * np.ones((2, 3)), beta=0.0)]
    table = Table([*curves_, condition("abc", 3 * np.ones((2, 3)), beta=1.0)], ["method", "beta"], [])
    assert figures._sweep_lines(table, "beta")["abc"][0.0].tolist() == [2.0, 2.0]


def test_a_sweep_leaves_out_what_varies_one_to_one_with_its_setting():
    """As in launch/study/paper_imdb_lengths.yaml: a KL target of its own for each length."""

    def table(*pairs):
        names = ["algo.kl.target", "length"]
        conditions = [
            condition(method, np.full((2, 3), value + place), beta=beta, **dict(zip(names, pair, strict=True)))
            for method, beta, value in (("none", None, 0.0), ("abc", 0.8, 10.0))
            for place, pair in enumerate(pairs)
        ]
        return Table(conditions, ["method", "beta", *names], [])

    together = table((0.2, 30.0), (0.1, 60.0))
    lines = figures._sweep_lines(together, "length")
    assert {label: {x: v[0] for x, v in points.items()} for label, points in lines.items()} == {
        "none": {30.0: 0.0, 60.0: 1.0},
        "abc β 0.8": {30.0: 10.0, 60.0: 11.0},
    }
    _, captions = figures.draw(analyse(together), "mark")
    assert "against length (with algo.kl.target)" in captions["sweep_length.png"]
    crossed = table((0.2, 30.0), (0.1, 60.0), (0.1, 30.0))
    assert list(figures._sweep_lines(crossed, "length")) == [
        "none, algo.kl.target 0.1",
        "abc β 0.8, algo.kl.target 0.1",
    ]


def test_pictures_show_something(tmp_path):
    table = read(study(tmp_path / "s") / "results.csv")
    pngs, captions = figures.draw(analyse(table), "mark")
    assert list(pngs) == list(captions)
    for name, png in pngs.items():
        image = np.asarray(pixels(png))
        assert image.shape[1] >= 800 and len({tuple(pixel) for pixel in image.reshape(-1, 3)[::29]}) > 20, name


# refusals


def changed(index, **cells):
    def change(table):
        table[index] |= cells

    return change


def without(column):
    return lambda table: [row.pop(column) for row in table]


def doubled(table):
    table.append(dict(table[0]))


def shorter(table):
    table.pop()


def other_metric(table):
    for row in table:
        row["loss"] = row["step"] / 7


BAD = {
    "a column is missing": (without("reward"), ["no column reward"]),
    "seed is no number": (changed(3, seed="x"), ["line 5", "'x'"]),
    "seed is no whole number": (changed(3, seed=1.5), ["line 5", "1.5"]),
    "step is empty": (changed(0, step=""), ["line 2", "step"]),
    "reward is no number": (changed(0, reward="high"), ["line 2", "reward 'high'"]),
    "reward is NaN": (changed(14, reward="NaN"), ["line 16", "method none, seed 2, step 3", "nan"]),
    "reward is infinite": (changed(-1, reward="-inf"), ["abc, beta 0.8, seed 3, step 12", "-inf"]),
    "reward is empty": (changed(-1, reward=""), ["seed 3, step 12", "empty"]),
    "kl is no number": (changed(0, kl="?"), ["line 2", "kl '?'"]),
    "method is empty": (changed(0, method=""), ["line 2", "method"]),
    "a row is there twice": (doubled, ["line 74", "step 1", "method none, seed 1", "twice"]),
    "a run is shorter": (
        shorter,
        ["unequal", "beta 0.8, seed 3 has 11", "none, seed 1 has 12", "step 12"],
    ),
    "a step is another": (changed(-1, step=99), ["unequal", "seed 3"]),
    "a further metric": (other_metric, ["'loss'", "no setting"]),
    "no rows": (lambda table: table.clear(), ["no rows"]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_bad_tables_are_refused_by_file_line_and_value(tmp_path, capsys, case, suffix):
    change, said = BAD[case]
    table = rows()
    change(table)
    path = write(tmp_path / f"t{suffix}", table)
    assert report(path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error
    for part in said:
        number = re.fullmatch(r"line (\d+)", part)
        line = f"line {int(number[1]) - 1}" if number and suffix == ".jsonl" else part  # JSONL has no header
        assert line in error or (suffix == ".jsonl" and line.strip("'") in error)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("t.csv", "method,seed,step,reward\nnone,1,1\n", "line 2: 3 cells under 4 columns"),
        ("t.csv", "method,seed,step,reward,reward\n", "'reward'"),
        ("t.csv", "method;seed;step;reward\nnone;1;1;2\n", "no column method, seed, step, reward"),
        ("t.csv", "", "no rows"),
        ("t.csv", b"\xff\xfe\x00", "UTF-8"),
        ("t.jsonl", '{"method": "none"\n', "line 1 is not JSON"),
        ("t.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("t.jsonl", '{"method":"none","seed":1,"step":1,"reward":true}\n', "reward True"),
        ("t.jsonl", '{"method":"none","seed":1,"step":1,"reward":1,"x":[1]}\n', "x [1]"),
        ("t.xlsx", "x", "neither .csv nor .jsonl"),
    ],
)
def test_files_that_are_no_tables_are_refused(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read(locate(path))
    assert said in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_places_without_a_study_are_refused(tmp_path):
    with pytest.raises(UserError, match="nothere.csv does not exist"):
        locate(tmp_path / "nothere.csv")
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"is no study: it has holiday.jpg, but no results.csv"):
        locate(tmp_path)


@pytest.mark.parametrize("name", ["report.md", "report.html", "reward.png"])
def test_files_that_are_not_ours_are_left_alone(tmp_path, capsys, name):
    source = tmp_path / "study"
    source.mkdir()
    write(source / "results.csv", rows(steps=3))
    (source / name).write_text("# my own notes, made with abc-rlhf study report\n" * 20)
    before = {path: path.read_bytes() for path in source.iterdir()}
    assert report(source) == 2
    assert f"{source / name} is not of abc-rlhf study report" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_unwritable_out_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert report(write(tmp_path / "t.csv", rows()), "--out", tmp_path / "file") == 2
    assert f"cannot write to {tmp_path / 'file'}" in capsys.readouterr().err


def test_importing_it_needs_neither_torch_nor_the_host_and_says_what_it_lacks():
    code = "import sys, abc_plugin.tools.study.report_command; print({'torch', 'openrlhf', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    code = "import sys; sys.modules['scipy'] = None; from abc_plugin.cli import main; main(['study', 'report', 'x'])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert "abc-rlhf study report needs scipy; pip install 'abc-plugin[study]'" in told


def test_an_analysis_of_nothing_but_a_baseline_is_a_report(tmp_path):
    assert report(write(tmp_path / "t.csv", rows((("none", ""),)))) == 0
    assert isinstance(analyse(read(tmp_path / "t.csv")), Analysis)
