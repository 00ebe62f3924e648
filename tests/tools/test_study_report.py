"""``abc-rlhf study report``: its files and tables, and what it refuses."""

import html
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_python
from report_support import outline, pixels
from snapshots import assert_snapshot
from study_tables import pair, rows, write

from abc_plugin.cli import main
from abc_plugin.errors import UserError
from abc_plugin.tools.study import learning_curves, report_files, study_figures
from abc_plugin.tools.study.comparisons import Comparison, analyse
from abc_plugin.tools.study.paired_statistics import Effect, Estimate
from abc_plugin.tools.study.results_table import locate, read

METHODS = (("none", ""), ("abc", 0.8), ("abc", 1.0), ("abc_signed", 0.8), ("uniform", 0.8))
PICTURES = ["differences.png", "reward.png", "kl.png", "frontier.png"]
FILES = ["report.md", "report.json", "report.html", *PICTURES]


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
    monkeypatch.setattr(study_figures, "draw", lambda *_: ({}, {}))


# files


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study's directory of five methods, two lambdas and three seeds, with its report."""
    directory = tmp_path_factory.mktemp("study")
    write(directory / "results.csv", [row for x in (0.95, 1.0) for row in rows(METHODS, **{"lambda": x})])
    assert report(directory) == 0
    return directory


def test_report_of_a_study(study, capsys):
    before = {path.name: path.read_bytes() for path in study.iterdir()}
    assert before.keys() == {"results.csv", *FILES}
    assert report(study) == 0  # over its own files, which stay byte for byte
    assert {path.name: path.read_bytes() for path in study.iterdir()} == before
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].endswith(" ".join(str(study / name) for name in FILES))
    text, numbers = (study / "report.md").read_text(), json.loads((study / "report.json").read_text())
    assert_snapshot(text.replace(str(study), "STUDY"), "study_report.md")
    assert len(numbers["differences"]) == 2 * (4 + 2) and len(numbers["means"]) == 10
    first = numbers["differences"][0]
    assert (first["condition"], first["method"], first["against"]) == ("λ 0.95", "abc β 0.8", "none")
    assert (
        f"| λ 0.95 | abc β 0.8 | none | 3 | {Effect(3, Estimate(**first['reward over training']['estimate']))}" in text
    )


def test_page_is_whole_and_by_itself(study):
    page = (study / "report.html").read_text()
    parsed = outline(page)
    assert parsed.tags.count("img") == 4 and all(request.startswith("data:image/png") for request in parsed.requests)
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())
    for line in html.unescape(re.sub(r"[*\\]", "", (study / "report.md").read_text())).splitlines():
        assert line.startswith(("|", "![", "<!--", "Made by")) or line.strip("#- ") in text.replace("*", "")


def test_pictures_show_something(study):
    for name in PICTURES:
        image = np.asarray(pixels((study / name).read_bytes()))
        assert image.shape[1] >= 800 and len({tuple(pixel) for pixel in image.reshape(-1, 3)[::29]}) > 20, name


def test_the_order_of_rows_and_columns_and_the_format_change_nothing(tmp_path):
    table, numbers = rows(METHODS), []
    for order, name in enumerate(("a.csv", "b.csv", "c.jsonl")):
        np.random.default_rng(order).shuffle(table)
        path = write(tmp_path / name, [dict(sorted(row.items(), reverse=order == 1)) for row in table])
        numbers.append(report_files.as_json(analyse(read(path))))
    assert numbers[0] == numbers[1] == numbers[2]


def test_files_that_are_not_ours_are_left_alone(tmp_path):
    ours, notes = f"<!-- {report_files.MARK} -->".encode(), tmp_path / "report.md"
    notes.write_text("# my own notes, made with abc-rlhf study report\n" * 20)
    with pytest.raises(UserError, match=f"{notes} is not a file of abc-rlhf study report; choose another --out"):
        report_files.write(tmp_path, {"report.html": ours, "report.md": ours})
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"] and notes.read_text().startswith("# my own")
    with pytest.raises(UserError, match=f"cannot write to {notes}"):
        report_files.write(notes, {"report.md": ours})


# tables


def conditions(tmp_path, *table):
    made = read(write(tmp_path / "t.csv", [row for some in table for row in some]))
    return made, [condition.name for condition in made.conditions if condition.method == "abc"]


def test_a_condition_is_named_by_what_differs(tmp_path):
    usual = {"lambda": 0.95, "critic.model_name_or_path": "/a/x/model", "estimator": "gae"}
    two = ({"lambda": 1.0, "length": 16}, {"lambda": 1.0, "length": 8}, {"lambda": 0.5, "length": 8})
    _, names = conditions(tmp_path, *(rows(**each) for each in two))
    assert names == ["abc β 0.8, λ 0.5, length 8", "abc β 0.8, λ 1, length 8", "abc β 0.8, λ 1, length 16"]
    made, names = conditions(
        tmp_path,
        rows(**usual | {"critic.model_name_or_path": "/a/y/model"}),
        rows(**usual | {"critic.model_name_or_path": "", "estimator": "reinforce"}),
        rows(**usual | {"lambda": 1}),
        rows(METHODS, **usual),
    )
    assert made.usual == "critic x, estimator gae, λ 0.95" and not made.together
    ours = (
        "β 0.8, the usual",
        "β 1, the usual",
        "β 0.8, critic –, estimator reinforce",
        "β 0.8, λ 1",
        "β 0.8, critic y",
    )
    assert sorted(names) == sorted(f"abc {each}" for each in ours)


def test_settings_that_vary_one_to_one_are_named_by_one_of_them(tmp_path):
    """As in launch/study/paper_imdb_lengths.yaml: a KL target of its own for each length."""
    made, names = conditions(tmp_path, *(rows(**{"algo.kl.target": 6 / n, "length": n}) for n in (30, 60)))
    assert names == ["abc β 0.8, length 60", "abc β 0.8, length 30"] and made.together == "algo.kl.target with length"


def test_many_conditions_and_methods_are_one_table_first(tmp_path):
    usual = {"estimator": "gae", "algo.advantage.gamma": 1.0, "length": 16}
    others = ({}, {"algo.advantage.gamma": 0.9}, {"estimator": "rloo"}, {"length": 32})
    methods = (*METHODS[:2], *METHODS[3:], ("prefix", 0.8))
    made, _ = conditions(tmp_path, *(rows(methods, seed=n, **usual | each) for n, each in enumerate(others)))
    name, overview = next(iter(report_files.tables(analyse(made)).items()))
    assert name == "overview" and [*overview["condition"]] == ["the usual", "γ 0.9", "length 32", "estimator rloo"]
    assert [*overview][1:] == ["seeds", "reward of none", *(f"{each} β 0.8" for each, _ in sorted(methods[1:]))]
    assert (
        overview.map(lambda cell: re.fullmatch(r"[−\d.]+ \[[−\d.]+, [−\d.]+\]( \*)?", cell) is not None)
        .iloc[:, 3:]
        .all(axis=None)
    )
    assert len(report_files.tables(analyse(made))["claims"]) == 8  # of abc and abc_signed


def test_settings_of_credit_make_no_second_baseline_but_those_that_change_its_runs_do(tmp_path):
    def twice(name):
        return conditions(tmp_path, *([row | {name: value} for row in rows()] for value in ("map", "off")))[0]

    assert len(twice("shaping.tokenizer_check").conditions) == 4
    with pytest.raises(UserError, match="row 73: this step of this run is there twice"):
        twice("shaping.drop")
    once = [row | {"shaping.drop": "off"} for row in rows() if row["method"] == "abc"]
    made, names = conditions(tmp_path, rows(), once)
    assert names == ["abc β 0.8", "abc β 0.8, shaping.drop off"] and len(analyse(made).comparisons) == 2


LACKS = {
    "one seed": rows(METHODS, seeds=(4,)),
    "no baseline": rows((("abc", 0.8), ("prefix", 0.8))),
    "a baseline of another name": [row | {"method": row["method"].replace("none", "RLHF")} for row in rows()],
    "no seed in common": rows((("none", ""),), seeds=(1, 2)) + rows((("abc", 1),), seeds=(3, 4)),
    "nothing but a baseline": rows((("none", ""),)),
    "no KL": [{name: row[name] for name in ("method", "seed", "step", "reward")} for row in rows()],
    "KL of one condition": rows()[:-1] + [rows()[-1] | {"kl": "nan"}],
    "no KL of distributions": rows()[:-1] + [rows()[-1] | {"kl": -455}],
}


def test_what_is_missing_is_said(tmp_path, undrawn):
    said = []
    for case, table in LACKS.items():
        assert report(write(tmp_path / "t.csv", table)) == 0
        text = (tmp_path / "t-report" / "report.md").read_text().replace(str(tmp_path), "")
        kept = [line for line in text.splitlines()[2:] if line.startswith(("#", "-", "|")) and "---" not in line]
        said += [f"{case}:", *kept, ""]
    assert_snapshot("\n".join(said), "study_lacks.md")
    assert "KL: as in the table; its unit is not known here." in text


def made(reward, base, kl, base_kl):
    """abc against none on six seeds; each (6, 1) times a common rise of 16 steps."""
    rise, climb = np.minimum(np.arange(16) / 4, 1.0), np.arange(16) / 15
    return analyse(pair(rise * reward, rise * base, climb * kl, climb * base_kl))


SEEDS = np.arange(6.0)[:, None]


def test_claims_of_the_paper():
    """abc's rewards are ten times as high and spread a fifth as far, at half the KL; then the other way round."""
    none, abc = 4 + SEEDS, 40 + SEEDS / 5 + np.tile([[0.01], [0]], (3, 1))
    for outcome, analysis in {
        "seen": made(abc, none, 1 + SEEDS / 100, 2 + SEEDS / 50),
        "the opposite seen": made(none, abc, 2 + SEEDS / 50, 1 + SEEDS / 100),
        "not seen": made(none, none, 1 + 0 * SEEDS, 1 + 0 * SEEDS),
    }.items():
        assert [said for said, _ in analysis.comparisons[0].claims().values()] == [outcome] * 5


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
    flat = pair(np.ones((3, 20)), np.ones((3, 20))).conditions
    found = Comparison(*reversed(flat), [1, 2, 3], steps=SimpleNamespace(ratio=ratio))
    assert found._half_the_steps() == (outcome, str(ratio))


def test_json_says_never_where_a_reward_is_not_reached_and_null_where_there_is_no_interval():
    late, few = [0.1 + SEEDS / 100, 4 + SEEDS, 1 + 0 * SEEDS, 1 + 0 * SEEDS], slice(3)
    [found] = json.loads(report_files.as_json(made(*late)))["steps"]
    assert found["ratio"] == dict.fromkeys(("value", "low", "high"), "never")
    [found] = json.loads(report_files.as_json(made(*(each[few] for each in late))))["steps"]
    assert found["ratio"] == {"value": "never", "low": None, "high": None}


def test_numbers_have_the_decimals_that_their_interval_bears():
    assert str(Estimate(-0.2134, -0.3721, -0.0547)) == "−0.21 [−0.37, −0.05]"
    assert str(Estimate(1234.5, 1200.0, 1269.0)) == "1234 [1200, 1269]"
    assert str(Estimate(np.inf, 6.25, np.inf)) == "∞ [6.2, ∞]"
    assert str(Estimate(0.5)) == "0.500" and str(Estimate(1.0, 1.0, 1.0)) == "1.000 [1.000, 1.000]"
    one = [str(Effect(3, Estimate(0.5), p, p)) for p in (0.00002, 0.0123, 0.5, 1.0, None)]
    assert one == ["0.500, p < 0.001", "0.500, p 0.012", "0.500, p 0.50", "0.500, p 1.00", "0.500"]


def test_texts_escape_what_came_from_data(tmp_path, undrawn):
    evil = "a|b<script>*x*](http://y)\u200b`"
    assert report(write(tmp_path / "t.csv", rows((("none", ""), (evil, 0.8)), **{"<b>": evil}))) == 0
    text, page = ((tmp_path / "t-report" / name).read_text() for name in ("report.md", "report.html"))
    assert not re.search(r"<script>|<b>|\]\(http|(?<!\\)\*x|\u200b", text)
    assert "<script>" not in page and "<b>" not in page and outline(page)


# refusals


def changed(index, **cells):
    def change(table):
        table[index] |= cells

    return change


def other_metric(table):
    for row in table:
        row["loss"] = row["step"] / 7


BAD = {
    "has no rows with reward": lambda table: [row.pop("reward") for row in table],
    "row 4: seed '?x'?": changed(3, seed="x"),
    "row 5: seed '?1.5'? is no whole number": changed(4, seed=1.5),
    "row 1: step ('nan'|None) is no whole number": changed(0, step=None),
    "row 1: reward 'high' is no finite number": changed(0, reward="high"),
    "row 15: reward 'NaN' is no finite number": changed(14, reward="NaN"),
    "row 72: reward '-inf' is no finite number": changed(-1, reward="-inf"),
    "row 1: kl '\\?' is no number": changed(0, kl="?"),
    "row 1: method None is no text": changed(0, method=""),
    "row 73: this step of this run is there twice": lambda table: table.append(dict(table[0])),
    "method abc, beta 0.8, seed 3 has 11 of 12 steps": lambda table: table.pop(),
    "unequal length: .* has 12 of 13 steps": changed(-1, step=99),
    "column 'loss' changes within a run": other_metric,
    "has no rows with method, seed, step, reward|cannot be read": lambda table: table.clear(),
}


@pytest.mark.parametrize("part", BAD)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_bad_tables_are_refused_by_file_row_and_value(tmp_path, capsys, part, suffix):
    table = rows()
    BAD[part](table)
    path = write(tmp_path / f"t{suffix}", table)
    assert report(path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error and re.search(part, error), error
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("t.csv", "method,seed,step,reward\nnone,1,1,2\nnone,1,1\n", "row 2: reward None is no finite number"),
        ("t.csv", "method,seed,step,reward\nnone,1,1,2,3\n", "more cells than the header"),
        ("t.csv", "method,seed,step,reward\nnone,1,1,2\nnone,1,2,2,3\n", "cannot be read (Error tokenizing"),
        ("t.csv", "method;seed;step;reward\nnone;1;1;2\n", "no rows with method, seed, step, reward; it has 1 with"),
        ("t.csv", "method,seed,step,reward,seed\nnone,1,1,2,1\n", "has two columns 'seed'"),
        ("t.csv", "", "cannot be read"),
        ("t.csv", b"\xff\xfe\x00", "UTF-8"),
        ("t.jsonl", '{"method": "none"\n', "not JSON"),
        ("t.jsonl", "[1]\n", "object"),
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
    for path, missing in {tmp_path: "results.csv", tmp_path / "nothere.csv": "nothere.csv"}.items():
        with pytest.raises(UserError, match=f"{missing} does not exist"):
            locate(path)


def test_it_says_what_it_lacks():
    code = "import sys; sys.modules['scipy'] = None; from abc_plugin.cli import main; main(['study', 'report', 'x'])"
    assert "abc-rlhf study report needs scipy; pip install 'abc-plugin[study]'" in run_python("-c", code).stderr
