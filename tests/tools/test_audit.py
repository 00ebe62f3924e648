"""The audit on reward models whose score is known (audit_models.py): what it must find, and going on after a kill."""

import json
import shutil
from types import SimpleNamespace

import audit_models
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from abc_plugin.cli import main
from abc_plugin.config import ShapingConfig
from abc_plugin.credit import methods as registry
from abc_plugin.errors import UserError
from abc_plugin.tools.audit import command
from abc_plugin.tools.audit.completion_measures import credit_of, curves, removal_order
from abc_plugin.tools.audit.results_file import Results
from abc_plugin.tools.audit.reward_model import RewardModel

METHODS = ["abc", "uniform", "none", "shapley", "--shaping.calls", "17"]
OUTPUTS = ["agreement.png", "audit.html", "audit.json", "completions.jsonl", "curves.png", "heads.png"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Reward models whose last token attends to all words alike, to those that count, and to those that do not."""
    directory = tmp_path_factory.mktemp("audit")
    for name, attends in (("even", 0.0), ("attentive", 3.0), ("blind", -3.0)):
        audit_models.save_reward_model(directory / name, attends)
    audit_models.write_completions(directory / "good.jsonl", words=("good", "fine"))
    audit_models.write_completions(directory / "mixed.jsonl")
    return directory


def words(made, out, model="even", data="mixed", *more):
    options = {"--reward.model_name_or_path": made / model, "--data": made / f"{data}.jsonl", "--out": out}
    return ["audit", *(str(word) for pair in options.items() for word in pair), *more]


def audit(made, out, *args):
    assert main(words(made, out, *args)) == 0
    return json.loads((out / "audit.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def attentive(made, tmp_path_factory):
    """The directory of an audit that finds abc's credit good."""
    out = tmp_path_factory.mktemp("attentive")
    audit(made, out, "attentive", "good", "--methods", *METHODS)
    return out


def test_scores_effects_and_gradients_are_exact(made):
    """Even attention: the score is 4 · mean value, so all is worked by hand."""
    model = RewardModel(str(made / "even"), needs=frozenset({"attention", "gradient", "prefix"}))
    ids = audit_models.make_tokenizer()("w1 w2 good w3 bad w4 fine .").input_ids
    explained = model.explain(ids)
    assert explained.score == pytest.approx(4 * 0.6 / 8, abs=1e-6)
    assert explained.rows_LHS == pytest.approx(torch.full((1, 1, 8), 1 / 8), abs=1e-6)
    values = [0, 0, 1, 0, -1, 0, 0.6, 0]
    assert explained.evidence["gradient"].tolist() == pytest.approx([4 * value / 8 for value in values], abs=1e-5)
    assert explained.evidence["prefix"][:4].tolist() == pytest.approx([0, 0, 4 / 3, 1], abs=1e-5)
    without = model.scores([ids[:t] + ids[t + 1 :] for t in range(8)])
    assert without == pytest.approx([4 * (0.6 - value) / 7 for value in values], abs=1e-5)


def test_the_score_is_that_of_the_checkpoint_and_normalised_where_asked(made, tmp_path):
    ids = torch.tensor([audit_models.make_tokenizer()("w1 good w2 fine .").input_ids])
    expected = AutoModelForSequenceClassification.from_pretrained(made / "attentive")(ids).logits.item()
    shutil.copytree(made / "attentive", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mean": 0.25, "std": 2.0}))
    plain, normalised = (RewardModel(str(tmp_path), normalise=normalise) for normalise in (False, True))
    assert plain.scores(ids.tolist()) == pytest.approx([expected], abs=1e-6)
    assert normalised.scores(ids.tolist()) == pytest.approx([(expected - 0.25) / 2.0], abs=1e-6)


def test_it_finds_the_tokens_that_count_and_no_merit_in_chance(made, tmp_path, capsys):
    """The score depends on two words of each completion; even attention says nothing about them."""
    result = audit(made, tmp_path / "out", "even", "mixed")
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == OUTPUTS
    methods = result["methods"]
    names = "abc abc_signed grad_input none prefix uniform random recency leave_one_out"
    assert set(methods) == set(names.split())
    assert methods["leave_one_out"]["spearman"]["mean"] == pytest.approx(1.0)
    assert methods["grad_input"]["spearman"]["low"] > 0.8
    assert methods["grad_input"]["separation"]["low"] > 0
    assert methods["random"]["spearman"]["low"] < 0 < methods["random"]["spearman"]["high"]
    assert methods["uniform"]["spearman"] is None
    assert methods["abc"]["spearman"] is None
    assert result["advice"]["sentences"][0].startswith(
        "grad_input credit of this model follows, closely, which tokens"
    )
    assert result["advice"]["command"].endswith(" --reward_shaping grad_input")
    for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()[1:]:
        record = json.loads(line)
        first = max(range(9), key=lambda t: abs(record["effect"][t]))
        assert record["tokens"][first].strip() in audit_models.VALUES
    printed = capsys.readouterr().out
    assert "audit.html" in printed
    assert "To train without a critic, or with one from the policy (rank correlation" in printed
    assert printed.splitlines()[-1].startswith("With GAE and OpenRLHF's default critic")


def test_attention_to_the_tokens_that_count_is_found_better(attentive):
    result = json.loads((attentive / "audit.json").read_text())
    assert result["advice"]["sentences"][0].startswith("abc credit of this model follows, closely, which tokens")
    separation = {name: result["methods"][name]["separation"]["mean"] for name in ("abc", "shapley", "leave_one_out")}
    assert separation["abc"] == pytest.approx(separation["leave_one_out"], rel=0.01)
    assert separation["shapley"] == pytest.approx(separation["leave_one_out"], rel=0.01)  # each token is a segment
    assert result["heads"]["carrying"] == [[0, 0]] and result["heads"]["against"] == []
    assert result["heads"]["layer"]["layer"] == 0


def test_attention_to_the_other_tokens_is_found_worse_and_dropped_tokens_are_those_of_training(made, tmp_path):
    """Attention shuns the words that raise the score, so its credit runs against their effects."""
    result = audit(made, tmp_path, "blind", "good", "--methods", "abc", "none", "--shaping.drop", "sinks")
    assert result["methods"]["abc"]["spearman"]["high"] < 0
    assert result["advice"]["sentences"][0].startswith("Nothing shows that credit of this model follows which")
    assert result["advice"]["command"].endswith(" --reward_shaping none")
    assert result["heads"]["against"] == [[0, 0]]
    records = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()[1:]]
    assert all(record["credit"]["abc"][-1] == 0.0 for record in records)
    assert all(
        len(set(record["credit"]["none"][:-1])) == 1 for record in records
    )  # its only token is dropped: uniform


def test_a_killed_audit_goes_on_and_ends_with_identical_files(made, attentive, tmp_path, monkeypatch):
    measure, calls = command.measure, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(command, "measure", killed)
    again = words(made, tmp_path, "attentive", "good", "--methods", *METHODS)
    assert main(again) == 130
    written = tmp_path / "completions.jsonl"
    assert len(written.read_bytes().splitlines()) == 4  # the configuration and three completions
    with written.open("a") as file:
        file.write('{"row": 4, "prompt": "w')  # a kill in the midst of a line
    assert main(again) == 0
    assert len(calls) == 4 + 13
    for name in OUTPUTS:
        before, after = ((path / name).read_bytes().replace(bytes(path), b"OUT") for path in (attentive, tmp_path))
        assert before == after, name


def test_lengths_are_audits_of_their_own_and_spans_are_removed_whole(made, tmp_path, capsys):
    options = ("--methods", "abc", "uniform", "--tokens", "5", "9", "--spans", "6")
    assert main(words(made, tmp_path, "attentive", "good", *options)) == 0
    printed = capsys.readouterr().out
    records = {}
    for length in (5, 9):
        assert sorted(path.name for path in (tmp_path / str(length)).iterdir()) == OUTPUTS
        lines = (tmp_path / str(length) / "completions.jsonl").read_text().splitlines()
        records[length] = [json.loads(line) for line in lines[1:]]
    text = [[word.strip() for word in row["tokens"]] for row in (records[5][0], records[9][0])]
    assert [len(words) for words in text] == [5, 6] and " ".join(text[1]).split()[:5] == text[0]
    assert [word.count(" ") + 1 for word in text[1]] == [2, 1, 1, 2, 2, 1]  # nine tokens in six spans
    model = RewardModel(str(made / "attentive"))
    row, tokenizer = records[9][0], audit_models.make_tokenizer()
    prompt, pieces = tokenizer(row["prompt"]).input_ids, [tokenizer(piece).input_ids for piece in row["tokens"]]
    [whole, without] = model.scores([prompt + sum(pieces, []), prompt + sum(pieces[1:], [])])
    assert row["effect"][0] == pytest.approx(whole - without, abs=1e-5)
    assert sum(row["credit"]["abc"]) == pytest.approx(row["reward"], abs=1e-4)
    rows = [line.split()[:2] for line in printed.splitlines()]
    assert all([length, name] in rows for length in ("5", "9") for name in ("abc", "uniform", "leave-one-out"))
    assert main(words(made, tmp_path, "attentive", "good", *options[:3], "--tokens", "9", "--spans", "5")) == 2
    assert "another configuration (spans: 6 there, 5 here)" in capsys.readouterr().err


def test_results_of_another_configuration_are_refused_and_kept(made, attentive, capsys):
    before = {path: path.read_bytes() for path in attentive.iterdir()}

    def refused(*args):
        assert main(words(made, attentive, *args)) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("abc-rlhf: error: ") and "choose another --out" in error
        return error

    same = ("attentive", "good", "--methods", *METHODS)
    for args, name in (
        (("attentive", "good", "--methods", "uniform"), "methods"),
        (("attentive", "mixed", *same[2:]), "completions"),
        (("blind", *same[1:]), "model"),
        ((*same, "--shaping.drop", "sinks"), "drop"),
    ):
        assert f"another configuration ({name}: " in refused(*args)
    written = attentive / "completions.jsonl"
    written.write_bytes(before[written].replace(b'"format": 3, ', b"", 1))  # as earlier versions began it
    assert "was written by another version of the audit" in refused(*same)
    written.write_bytes(before[written])
    assert {path: path.read_bytes() for path in attentive.iterdir()} == before


def test_outputs_without_their_results_are_refused(tmp_path):
    (tmp_path / "audit.html").write_text("mine")
    with pytest.raises(UserError, match="holds audit.html but no completions.jsonl"):
        Results(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["audit.html"]
    (tmp_path / "audit.html").unlink()
    (tmp_path / "completions.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(UserError, match="is not an audit's"):
        Results(tmp_path, {})
    assert (tmp_path / "completions.jsonl").read_text() == '{"prompt": "p", "completion": "c"}\n'
    (tmp_path / "completions.jsonl").write_text('{"form')  # a kill in the midst of the first line
    assert Results(tmp_path, {}).records == []


def test_prefix_credit_leaves_the_prompts_own_score_out(made):
    """By hand: the score is 4 · the mean value of the text so far, the prompt's own 4 / 2."""
    model = RewardModel(str(made / "even"), needs=frozenset({"prefix"}))
    ids = audit_models.make_tokenizer()("good w1 w2 bad .").input_ids
    for length, scores in ((2, [2, 4 / 3, 0, 0]), (1, [4, 2, 4 / 3, 0, 0])):  # of the prompt, and then
        completion = SimpleNamespace(
            prompt_ids=ids[:length], ids=ids[length:], special=[False] * (len(ids) - length), row=1
        )
        [empty] = model.scores([completion.prompt_ids])
        credit_T = credit_of(registry.load("prefix"), completion, model.explain(ids), empty, ShapingConfig())
        steps = [after - before for before, after in zip(scores, scores[1:], strict=False)]
        assert credit_T.tolist() == pytest.approx(steps, abs=1e-5)


def test_memory_that_runs_out_halves_the_batch(made, monkeypatch):
    model = RewardModel(str(made / "even"))
    sequences = [[3 + i % 4] * (1 + i % 7) for i in range(40)]
    expected, sizes, score = model.scores(sequences), [], model._forward

    def small(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return score(batch)

    monkeypatch.setattr(model, "_forward", small)
    assert model.scores(sequences) == pytest.approx(expected, abs=1e-6)
    assert sizes[0] == 40 and sizes[-1] <= 3
    monkeypatch.setattr(model, "_forward", lambda batch: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        model.scores(sequences)


def test_curves_by_hand():
    """A score that is the sum of the ids: ten tokens, removed one by one."""
    model = SimpleNamespace(scores=lambda sequences: [float(sum(ids)) for ids in sequences])
    completion, pieces = SimpleNamespace(prompt_ids=[100], row=1), [[i] for i in range(1, 11)]
    credit = {"right": torch.arange(10.0), "signed": torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 0, 0, 0])}
    drawn = curves(model, completion, pieces, credit, whole=155.0, empty=100.0)
    assert drawn["right"]["highest"] == [155, 145, 136, 128, 121, 115, 110, 106, 103, 101, 100]
    assert drawn["right"]["lowest"] == [155, 154, 152, 149, 145, 140, 134, 127, 119, 110, 100]
    assert drawn["signed"]["highest"][:2] == [155, 153] and drawn["signed"]["lowest"][:2] == [155, 154]
    orders = [removal_order(torch.zeros(6), seed) for seed in range(200)]  # equal credit is removed in random order
    assert all(sorted(order) == list(range(6)) for order in orders)
    first = [order[0] for order in orders]
    assert all(15 <= first.count(token) <= 55 for token in range(6))  # 33 expected
    assert removal_order(torch.tensor([0.0, 2.0, -1.0]), 0) == [1, 0, 2]
