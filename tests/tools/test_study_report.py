"""``abc-rlhf study report``: its files, its sentences, its pictures, and what it refuses."""

import csv
import html
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_python
from report_support import outline, pixels
from snapshots import assert_snapshot
from study_tables import condition, rows, write

from abc_plugin.cli import main
from abc_plugin.errors import UserError
from abc_plugin.tools.study import document, figures, learning_curves, verdict
from abc_plugin.tools.study.comparisons import analyse
from abc_plugin.tools.study.inference import Estimate, Mean, p_text
from abc_plugin.tools.study.table import Table, locate, read

METHODS = (("none", ""), ("abc", 0.8), ("abc", 1.0), ("uniform", 0.8))
PICTURES = ["reward", "kl", "value_loss", "frontier", "differences", "sweep_beta", "sweep_lambda"]
FILES = ["report.md", "report.json", "report.html", *(f"{name}.png" for name in PICTURES)]


@pytest.fixture(autouse=True, scope="module")
def few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning_curves, "RESAMPLES", 200)
        yield


def report(*words):
    return main(["study", "report", *map(str, words)])


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without pictures, which take longest."""
    monkeypatch.setattr(figures, "draw", lambda *_: ({}, {}))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study's directory of four methods, two lambdas and three seeds, with its report."""
    directory = tmp_path_factory.mktemp("study")
    write(directory / "results.csv", [row for x in (0.95, 1.0) for row in rows(METHODS, **{"lambda": x})])
    assert report(directory) == 0
    return directory


# files


def test_report_of_a_study(study, capsys):
    before = {path.name: path.read_bytes() for path in study.iterdir()}
    assert before.keys() == {"results.csv", *FILES}
    assert report(study) == 0  # over its own files, which stay byte for byte
    assert {path.name: path.read_bytes() for path in study.iterdir()} == before
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].endswith(" ".join(str(study / name) for name in FILES))
    text, numbers = (study / "report.md").read_text(), json.loads((study / "report.json").read_text())
    assert_snapshot(text.replace(str(study), "STUDY"), "study_report.md")
    assert len(numbers["verdicts"]) == 2 * (3 + 1) and len(numbers["conditions"]) == 8
    for sentence in numbers["verdicts"]:
        assert sentence in printed and sentence.replace("<", "&lt;") in text
    mean = np.mean([float(row["reward"]) for row in csv.DictReader((study / "results.csv").open())][:36])
    assert numbers["conditions"][0]["label"] == "none, λ 0.95"
    assert numbers["conditions"][0]["means"]["reward"]["estimate"]["value"] == pytest.approx(mean)
    assert sorted(numbers["figures"]) == sorted(re.findall(r"\]\((\w+\.png)\)", text))


def test_page_is_whole_and_by_itself(study):
    page = (study / "report.html").read_text()
    parsed = outline(page)
    assert parsed.tags.count("img") == 7 and all(request.startswith("data:image/png") for request in parsed.requests)
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())
    for line in html.unescape(re.sub(r"[*\\]", "", (study / "report.md").read_text())).splitlines():
        assert line.startswith(("|", "![", "<!--", "Made by")) or line.strip("#- ") in text


def test_the_order_of_rows_and_columns_and_the_format_change_nothing(tmp_path):
    table, numbers = rows(METHODS), []
    for order, name in enumerate(("a.csv", "b.csv", "c.jsonl")):
        np.random.default_rng(order).shuffle(table)
        path = write(tmp_path / name, [dict(sorted(row.items(), reverse=order == 1)) for row in table])
        numbers.append(json.dumps(document.as_json(analyse(read(path)))))
    assert numbers[0] == numbers[1] == numbers[2]


OURS = f"<!-- {document.MARK} -->".encode()


def test_pictures_that_are_no_longer_drawn_are_removed_but_no_one_elses(tmp_path):
    out = tmp_path / "out"
    listed = ["kl.png", "sweep_mine.png", "../outside.png"]
    numbers = json.dumps({"made_by": document.MARK, "figures": listed}).encode()
    document.write(out, {"report.json": numbers, "kl.png": OURS, "sweep_ours.png": OURS})
    (out / "sweep_mine.png").write_bytes(b"drawn by somebody else")  # listed, but not ours; sweep_ours is not listed
    (tmp_path / "outside.png").write_bytes(OURS)
    document.write(out, {"report.json": numbers})
    assert {path.name for path in out.iterdir()} == {"report.json", "sweep_mine.png", "sweep_ours.png"}
    assert (tmp_path / "outside.png").exists()


def test_files_that_are_not_ours_are_left_alone(tmp_path):
    notes = tmp_path / "report.md"
    notes.write_text("# my own notes, made with abc-rlhf study report\n" * 20)
    with pytest.raises(UserError, match=f"{notes} is not a file of abc-rlhf study report; choose another --out"):
        document.write(tmp_path, {"report.html": OURS, "report.md": OURS})
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"] and notes.read_text().startswith("# my own")
    with pytest.raises(UserError, match=f"cannot write to {notes}"):
        document.write(notes, {"report.md": OURS})


# sentences


def test_least_table(tmp_path):
    """Only the four columns that must be there: no KL, no value loss, no beta."""
    table = [{name: row[name] for name in ("method", "seed", "step", "reward")} for row in rows()]
    assert report(write(tmp_path / "t.csv", table), "--out", tmp_path / "o") == 0
    assert sorted(path.name for path in (tmp_path / "o").glob("*.png")) == ["differences.png", "reward.png"]
    text = (tmp_path / "o" / "report.md").read_text()
    assert "KL over training" not in text.split("## Mean reward")[1] and "Value loss" not in text


def without_seed_2_of_abc():
    return [row for row in rows(seeds=(1, 2, 3, 4)) if not (row["method"] == "abc" and row["seed"] == 2)]


SAYS = {
    "one seed": (rows(METHODS, seeds=(4,)), ["(1 paired seed, so no interval and no test)", "nothing is tested"]),
    "a missing seed": (without_seed_2_of_abc(), ["compared on the 3 seeds that both have; only one has 2."]),
    "no baseline": (
        rows((("abc", 0.8), ("prefix", 0.8))),
        ["Without a baseline (method none", "abc β 0.8; prefix β 0.8", "nothing is tested"],
    ),
    "no seed in common": (
        rows((("none", ""),), seeds=(1, 2)) + rows((("abc", 1),), seeds=(3, 4)),
        ["no seed in common, so not compared"],
    ),
    "nothing but a baseline": (rows((("none", ""),)), ["nothing is tested"]),
}


@pytest.mark.parametrize("case", SAYS)
def test_what_is_missing_is_named(tmp_path, capsys, case):
    table, sentences = SAYS[case]
    assert report(write(tmp_path / "t.csv", table)) == 0
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in sentences)
    numbers = json.loads((tmp_path / "t-report" / "report.json").read_text())
    if case == "one seed":
        assert numbers["comparisons"][0]["paired"]["reward"]["p"] is None
        assert numbers["conditions"][0]["means"]["reward"]["estimate"]["low"] is None
        assert "One seed per condition: no interval and no test" in (tmp_path / "t-report" / "report.md").read_text()


@pytest.mark.parametrize("bad", [float("nan"), "", "-inf"])
def test_kl_that_is_not_there_leaves_it_out_of_its_condition_and_says_so(tmp_path, capsys, undrawn, bad):
    table = rows()
    table[-1]["kl"] = bad
    assert report(write(tmp_path / "t.csv", table)) == 0
    value = bad if bad == "-inf" else "missing or nan"
    named = f"kl of method abc, beta 0.8, seed 3 is {value} at step 12: kl of this condition is left out."
    assert named in capsys.readouterr().out
    assert "NaN" not in (tmp_path / "t-report" / "report.json").read_text()


def test_where_many_settings_vary_labels_leave_the_commonest_unsaid(tmp_path):
    usual = {"lambda": 0.95, "kl_coef": 0.2, "estimator": "gae"}
    table = rows(**usual) + rows(**usual | {"kl_coef": 0.05}) + rows(**usual | {"estimator": "reinforce", "lambda": 1})

    def labels(table):
        made = read(write(tmp_path / "t.csv", table))
        return made, [made.label(condition) for condition in made.conditions if condition.method == "abc"]

    made, names = labels(table)
    assert names == ["abc β 0.8, kl_coef 0.05", "abc β 0.8", "abc β 0.8, estimator reinforce, λ 1"]
    assert made.usual_label == "estimator gae, kl_coef 0.2, λ 0.95"
    _, names = labels(table + rows(**usual | {"kl_coef": ""}))  # a setting that some runs lack is there where it is
    assert len(names) == len(set(names)) == 4 and "abc β 0.8" in names and "abc β 0.8, kl_coef 0.2" in names


def test_settings_of_credit_make_no_second_baseline_but_those_that_change_its_runs_do(tmp_path):
    def twice(name):
        return read(write(tmp_path / "t.csv", [row | {name: value} for value in ("map", "off") for row in rows()]))

    assert len(twice("shaping.tokenizer_check").conditions) == 4
    with pytest.raises(UserError, match="step 1 of method none, seed 1 is there twice"):
        twice("shaping.drop")


def made(reward, base, kl, base_kl, beta=0.8):
    """The analysis of abc and none on six seeds; each (6, 1) times a common rise of 16 steps."""
    rise, climb = np.minimum(np.arange(16) / 4, 1.0), np.arange(16) / 15
    ours = condition("abc", rise * reward, climb * kl, beta=beta)
    return analyse(Table([condition("none", rise * base, climb * base_kl), ours], ["method", "beta"], []))


SEEDS = np.arange(6.0)[:, None]


def test_verdict_of_a_clear_difference_and_of_none():
    wiggle = np.array([1.0, -1, 1, -1, 1, -1])[:, None]
    better = made(5 + 0.1 * SEEDS + 0.01 * wiggle, 4 + 0.1 * SEEDS, 1 + 0.01 * wiggle, 2 + 0 * SEEDS)
    same = made(4 + 0.1 * SEEDS + 0.1 * wiggle, 4 + 0.1 * SEEDS, 2 + 0.1 * wiggle, 2 + 0 * SEEDS)
    lines = [[verdict.headline(each), *verdict.sentences(each), *verdict.claim_lines(each)] for each in (better, same)]
    assert_snapshot("\n".join(["Better:", *lines[0], "", "The same:", *lines[1]]), "study_verdicts.txt")


def test_claims_of_the_paper():
    """abc's rewards are ten times as high and spread a fifth as far, at half the KL; then the other way round."""
    none, abc = 4 + SEEDS, 40 + SEEDS / 5
    for outcome, analysis in {
        "seen": made(abc, none, 1 + SEEDS / 100, 2 + SEEDS / 50),
        "the opposite seen": made(none, abc, 2 + SEEDS / 50, 1 + SEEDS / 100),
        "not seen": made(none, none, 1 + 0 * SEEDS, 1 + 0 * SEEDS),
    }.items():
        [outcomes] = verdict.claims(analysis).values()
        assert [each for each, _ in outcomes] == [outcome] * 5


@pytest.mark.parametrize(
    "ratio, outcome",
    [
        (Estimate(0.4, 0.3, 0.5), "seen"),
        (Estimate(0.45, 0.3, 0.6), "undecided"),
        (Estimate(0.7, 0.51, 0.9), "not seen"),
        (Estimate(0.9, 0.6, 1.2), "not seen"),
        (Estimate(1.3, 1.1, np.inf), "the opposite seen"),
        (Estimate(0.2), "undecided"),
    ],
)
def test_half_the_steps_is_judged_by_the_interval(ratio, outcome):
    steps = SimpleNamespace(ratio=ratio, still_rises=False)
    assert verdict._half_the_steps(SimpleNamespace(steps=steps)) == (outcome, f"{ratio} of none's")
    assert verdict._half_the_steps(SimpleNamespace(steps=None))[0] == "undecided"


def test_json_says_never_where_a_reward_is_not_reached_and_null_where_there_is_no_interval():
    numbers = document.as_json(made(0.1 + SEEDS / 100, 4 + SEEDS, 1 + 0 * SEEDS, 1 + 0 * SEEDS))
    steps = json.loads(json.dumps(numbers, allow_nan=False))["comparisons"][0]["steps"]
    assert steps["steps"] == steps["ratio"] == dict.fromkeys(("value", "low", "high"), "never")
    assert steps["never"] == 1.0 and "never" in numbers["about"]
    few = slice(3)
    numbers = document.as_json(made(*(x[few] for x in (4 + SEEDS, 4 + SEEDS, 1 + 0 * SEEDS, 1 + 0 * SEEDS))))
    assert numbers["comparisons"][0]["steps"]["steps"]["low"] is None


def test_numbers_have_the_decimals_that_their_interval_bears():
    assert str(Estimate(-0.2134, -0.3721, -0.0547)) == "−0.21 [−0.37, −0.05]"
    assert str(abs(Estimate(-0.2134, -0.3721, -0.0547))) == "0.21 [0.05, 0.37]"
    assert str(Estimate(1234.5, 1200.0, 1269.0)) == "1234 [1200, 1269]"
    assert str(Estimate(np.inf, 6.25, np.inf)) == "∞ [6.2, ∞]"
    assert str(Estimate(0.5)) == "0.500" and Estimate(0.5).interval == "–"
    assert str(Estimate(1.0, 1.0, 1.0)) == "1.000 [1.000, 1.000]"
    assert str(Mean(Estimate(3.896), 0.1769)) == "3.90 ± 0.18" and str(Mean(Estimate(3.896), None)) == "3.896"
    assert [p_text(p) for p in (0.00002, 0.0123, 0.5, 1.0, None)] == ["< 0.001", "0.012", "0.50", "1.00", "–"]


def test_texts_escape_what_came_from_data(tmp_path, undrawn):
    evil = "a|b<script>*x*](http://y)\u200b`"
    path = write(tmp_path / "t.csv", rows((("none", ""), (evil, 0.8)), **{"<b>": evil}))
    assert report(path) == 0
    text, page = ((tmp_path / "t-report" / name).read_text() for name in ("report.md", "report.html"))
    assert not re.search(r"<script>|<b>|\]\(http|(?<!\\)\*x|\u200b", text)
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (5, 7, 8, 11) for line in tables) and len(tables) == 13
    assert "<script>" not in page and "<b>" not in page and outline(page)


# pictures


def test_pictures_keep_a_style_per_method_and_eight_conditions_a_panel(tmp_path):
    methods = [("none", ""), *((f"m{i}", beta) for i in range(5) for beta in (0.5, 1.0))]
    table = read(write(tmp_path / "t.csv", rows(methods, steps=4, length=8) + rows(methods[:2], steps=4, length=16)))
    panels = figures._panels(table, "reward")
    sizes = [(title, len(conditions)) for title, conditions in panels]
    assert sizes == [("length 8", 8), ("length 8", 4), ("length 16", 2)]
    assert all(conditions[0].method == "none" for _, conditions in panels)
    looks = figures._looks(table)
    assert len(set(looks.values())) == len(looks) == 11


def at(method, beta, value, **settings):
    return condition(method, np.full((2, 3), value) + [[0.0], [2.0]], beta=beta, **settings)


def sweep(name, *conditions):
    """First run of each point, by line."""
    lines = figures._sweep_lines(Table(list(conditions), ["method", *list(conditions[0].settings)[1:]], []), name)
    return {label: {x: values[0] for x, values in points.items()} for label, points in lines.items()}


def test_beta_sweep_starts_at_the_baseline_but_for_methods_with_a_run_at_beta_0():
    conditions = [at("none", None, 1.0), at("abc", 0.5, 2.0), at("abc", 1.0, 3.0), at("lone", 1.0, 9.0)]
    assert sweep("beta", *conditions) == {"abc": {0.0: 1.0, 0.5: 2.0, 1.0: 3.0}}
    assert sweep("beta", *conditions, at("abc", 0.0, 4.0)) == {"abc": {0.0: 4.0, 0.5: 2.0, 1.0: 3.0}}


def test_a_sweep_leaves_out_what_varies_one_to_one_with_its_setting():
    """As in launch/study/paper_imdb_lengths.yaml: a KL target of its own for each length."""

    def conditions(*pairs):
        return [
            at(method, beta, value + number, **dict(zip(("algo.kl.target", "length"), pair, strict=True)))
            for method, beta, value in (("none", None, 0.0), ("abc", 0.8, 10.0))
            for number, pair in enumerate(pairs)
        ]

    together = conditions((0.2, 30.0), (0.1, 60.0))
    assert sweep("length", *together) == {"none": {30.0: 0.0, 60.0: 1.0}, "abc β 0.8": {30.0: 10.0, 60.0: 11.0}}
    table = Table(together, ["method", "beta", "algo.kl.target", "length"], [])
    assert "against length (with algo.kl.target)" in figures.draw(analyse(table), "mark")[1]["sweep_length.png"]
    crossed = conditions((0.2, 30.0), (0.1, 60.0), (0.1, 30.0))
    assert list(sweep("length", *crossed)) == ["none, algo.kl.target 0.1", "abc β 0.8, algo.kl.target 0.1"]


def test_pictures_show_something(study):
    for name in PICTURES:
        image = np.asarray(pixels((study / f"{name}.png").read_bytes()))
        assert image.shape[1] >= 800 and len({tuple(pixel) for pixel in image.reshape(-1, 3)[::29]}) > 20, name


# refusals


def changed(index, **cells):
    def change(table):
        table[index] |= cells

    return change


def other_metric(table):
    for row in table:
        row["loss"] = row["step"] / 7


BAD = {
    "a column is missing": (lambda table: [row.pop("reward") for row in table], ["no column reward"]),
    "seed is no number": (changed(3, seed="x"), ["line 5", "'x'"]),
    "seed is no whole number": (changed(3, seed=1.5), ["line 5", "1.5"]),
    "step is empty": (changed(0, step=""), ["line 2", "step"]),
    "reward is no number": (changed(0, reward="high"), ["line 2", "reward 'high'"]),
    "reward is NaN": (changed(14, reward="NaN"), ["line 16", "method none, seed 2, step 3", "nan"]),
    "reward is infinite": (changed(-1, reward="-inf"), ["abc, beta 0.8, seed 3, step 12", "-inf"]),
    "reward is empty": (changed(-1, reward=""), ["seed 3, step 12", "empty"]),
    "kl is no number": (changed(0, kl="?"), ["line 2", "kl '?'"]),
    "method is empty": (changed(0, method=""), ["line 2", "method"]),
    "a row is there twice": (
        lambda table: table.append(dict(table[0])),
        ["line 74", "step 1", "method none, seed 1", "twice"],
    ),
    "a run is shorter": (lambda table: table.pop(), ["beta 0.8, seed 3 has 11", "none, seed 1 has 12", "step 12"]),
    "a step is another": (changed(-1, step=99), ["unequal", "seed 3"]),
    "a further metric": (other_metric, ["'loss'", "no setting"]),
    "no rows": (lambda table: table.clear(), ["no rows"]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_bad_tables_are_refused_by_file_line_and_value(tmp_path, capsys, case, suffix):
    change, parts = BAD[case]
    table = rows()
    change(table)
    path = write(tmp_path / f"t{suffix}", table)
    assert report(path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error
    for part in parts:
        number = re.fullmatch(r"line (\d+)", part)
        line = f"line {int(number[1]) - 1}" if number and suffix == ".jsonl" else part  # JSONL has no header
        assert line in error or (suffix == ".jsonl" and line.strip("'") in error)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("t.csv", "method,seed,step,reward\nnone,1,1\n", "line 2: 3 cells under 4 columns"),
        ("t.csv", "method,seed,step,reward,reward\n", "'reward'"),
        ("t.csv", "method;seed;step;reward\nnone;1;1;2\n", "no column method, seed, step, reward"),
        ("t.csv", "", "no rows"),
        ("t.csv", b"\xff\xfe\x00", "UTF-8"),
        ("t.jsonl", '{"method": "none"\n', "not JSON"),
        ("t.jsonl", "[1]\n", "object"),
        ("t.jsonl", '{"method":"none","seed":1,"step":1,"reward":true}\n', "reward True"),
        ("t.jsonl", '{"method":"none","seed":1,"step":1,"reward":1,"x":[1]}\n', "x [1]"),
        ("t.xlsx", "x", "neither .csv nor .jsonl"),
    ],
)
def test_files_that_are_no_tables_are_refused(tmp_path, name, content, part):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read(locate(path))
    assert part in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_directories_without_a_study_are_refused(tmp_path):
    with pytest.raises(UserError, match="nothere.csv does not exist"):
        locate(tmp_path / "nothere.csv")
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"is no study: it has holiday.jpg, but no results.csv"):
        locate(tmp_path)


def test_it_says_what_it_lacks():
    code = "import sys; sys.modules['scipy'] = None; from abc_plugin.cli import main; main(['study', 'report', 'x'])"
    assert "abc-rlhf study report needs scipy; pip install 'abc-plugin[study]'" in run_python("-c", code).stderr
