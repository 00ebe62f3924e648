"""The reward server on the host's own script: scores as the host's, credit as spans of the query."""

import asyncio
import os

import pytest
import torch

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError
from abc_plugin.host.imports import import_host

import_host()

from abc_plugin.cli import main  # noqa: E402
from abc_plugin.host import serve_rm  # noqa: E402

QUERIES = ["The film was great.", "Naïve 🎬, and far too long for what little it has to say", "No."]


@pytest.fixture(scope="module")
def loaded(tiny):
    flags = ["--reward.model_name_or_path", str(tiny / "reward_model"), "--ds.attn_implementation", "eager"]
    return serve_rm._load(flags)


@pytest.fixture
def server(loaded):
    made = serve_rm.CreditServer(loaded[0], ShapingConfig())
    yield made
    made.readers["attention"].close()


def test_scores_are_the_hosts_and_credit_lies_on_the_query(server):
    reply = server.reply(QUERIES)
    assert reply["rewards"] == reply["scores"] == server.proxy.get_reward(QUERIES)
    for query, spans in zip(QUERIES, reply["extra_logs"]["credit_spans"], strict=True):
        assert sum(weight for *_, weight in spans) == pytest.approx(1.0, abs=1e-5)
        assert all(0 <= start < end <= len(query) and weight > 0 for start, end, weight in spans)


def test_signed_contributions_are_those_of_the_reader(loaded):
    server = serve_rm.CreditServer(loaded[0], ShapingConfig("abc_signed"))
    reply = server.reply(QUERIES)
    assert reply["rewards"] == server.proxy.get_reward(QUERIES)
    assert reply["extra_logs"].keys() == {"credit_spans", "contribution_spans"}
    assert "contribution to the score by" in server.describe()
    [first, *_], values = reply["extra_logs"]["contribution_spans"], []
    for query, spans in zip(QUERIES, reply["extra_logs"]["contribution_spans"], strict=True):
        assert all(0 <= start < end <= len(query) for start, end, _ in spans)
        values += [value for *_, value in spans]
    assert min(values) < 0 < max(values)
    ids = server.proxy.tokenizer(QUERIES[0], return_tensors="pt", add_special_tokens=False)["input_ids"]
    reader = server.readers["contribution"]
    with torch.no_grad(), reader.record(torch.ones_like(ids)) as recording:
        server.proxy.reward_model(ids, torch.ones_like(ids))
    expected = recording.row_BS[0].float().tolist()
    assert [value for *_, value in first] == pytest.approx(expected, rel=0.05, abs=0.01)  # bf16, other padding
    for one in server.readers.values():
        one.close()


@pytest.mark.parametrize("size", [1, 2])
def test_batches_change_nothing(server, monkeypatch, size):
    whole = server.reply(QUERIES)
    monkeypatch.setattr(server.proxy, "batch_size", size)
    split = server.reply(QUERIES)
    assert split["rewards"] == pytest.approx(whole["rewards"], abs=0.03)  # bf16, other padding
    for one, other in zip(*(reply["extra_logs"]["credit_spans"] for reply in (split, whole)), strict=True):
        assert [span[:2] for span in one] == [span[:2] for span in other]


def test_a_query_that_is_cut_is_reported(server, monkeypatch, capsys):
    monkeypatch.setattr(server.proxy, "max_length", 4)
    server.reply(QUERIES)
    assert "2 of 3 queries were cut at --data.max_len 4 tokens" in capsys.readouterr().err


def test_a_score_that_is_no_number_names_its_query(server, monkeypatch, capsys):
    monkeypatch.setattr(server, "_score", lambda texts: (torch.tensor([1.0, float("nan"), 2.0]), {}))
    with pytest.raises(ValueError, match="the reward of query 1 is nan: 'Naïve"):
        server.reply(QUERIES)
    fastapi = pytest.importorskip("fastapi")
    with pytest.raises(fastapi.HTTPException, match="500.*query 1 is nan"):
        asyncio.run(route(server, "/get_reward")({"query": QUERIES}))


@pytest.mark.parametrize("query", [None, [], "text", [""], [1]])
def test_requests_that_are_none(server, query):
    fastapi = pytest.importorskip("fastapi")
    with pytest.raises(fastapi.HTTPException, match="422.*send .*at least one text"):
        asyncio.run(route(server, "/get_reward")({"query": query}))


def route(server, path):
    return next(one.endpoint for one in serve_rm._app(server).routes if one.path == path)


def test_health_names_the_layer(server):
    assert "attention row of layer 1 of 2" in route(server, "/health")()["credit"]


def test_bad_input_is_one_line(capsys):
    assert main(["serve-rm", "--reward.model_name_or_path", os.devnull]) == 2
    output = capsys.readouterr().err.strip().splitlines()
    assert output[-1].startswith("abc-rlhf: error: the reward model cannot be loaded: ")
    with pytest.raises(UserError, match="--shaping.layer 'x'"):
        serve_rm.main(["--shaping.layer", "x"])
    with pytest.raises(UserError, match="sends attention and contribution; --reward_shaping prefix needs prefix"):
        serve_rm.main(["--reward_shaping", "prefix"])
