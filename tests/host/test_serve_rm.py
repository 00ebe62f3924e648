"""The reward server on the host's own script: scores as the host's, credit as spans of the query."""

import asyncio
import json
import os
import socket
import threading

import pytest
import torch

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError
from abc_plugin.host.import_openrlhf import import_host

import_host()

from abc_plugin.cli import main  # noqa: E402
from abc_plugin.host import serve_rm  # noqa: E402

QUERIES = ["The film was great.", "Naïve 🎬, and far too long for what little it has to say", "No."]


@pytest.fixture(scope="module")
def loaded(tiny):
    flags = ["--reward.model_name_or_path", str(tiny / "reward_model"), "--ds.attn_implementation", "eager"]
    return serve_rm._load(serve_rm._parsed([*flags, "--ds.param_dtype", "fp32"]))


@pytest.fixture
def server(loaded):
    made = serve_rm.CreditServer(loaded, ShapingConfig())
    yield made
    made.readers["attention"].close()


class Asked:
    """A request as the app reads it."""

    def __init__(self, body, gone=False):
        self.content, self.gone = body if isinstance(body, bytes) else json.dumps(body).encode(), gone

    async def body(self):
        return self.content

    async def is_disconnected(self):
        return self.gone


def post(server, *requests):
    """The replies to requests that come at the same time: what each returned or raised."""
    pytest.importorskip("fastapi")
    endpoint = route(serve_rm._app(server), "/get_reward")

    async def all_of_them():
        return await asyncio.gather(*map(endpoint, requests), return_exceptions=True)

    return asyncio.run(all_of_them())


def route(app, path):
    return next(one.endpoint for one in app.routes if one.path == path)


def reply(server, queries):
    (response,) = post(server, Asked({"query": queries}))
    return json.loads(response.body)


def test_scores_are_the_hosts_and_credit_lies_on_the_query(server):
    answer = reply(server, QUERIES)
    assert answer["rewards"] == answer["scores"] == pytest.approx(server.proxy.get_reward(QUERIES), abs=1e-5)
    for query, spans in zip(QUERIES, answer["extra_logs"]["credit_spans"], strict=True):
        assert sum(weight for *_, weight in spans) == pytest.approx(1.0, abs=1e-5)
        assert all(0 <= start < end <= len(query) and weight > 0 for start, end, weight in spans)


def test_signed_contributions_are_those_of_the_reader(loaded):
    server = serve_rm.CreditServer(loaded, ShapingConfig("abc_signed"))
    answer = reply(server, QUERIES)
    assert answer["rewards"] == pytest.approx(server.proxy.get_reward(QUERIES), abs=1e-5)
    assert answer["extra_logs"].keys() == {"credit_spans", "contribution_spans"}
    assert "contribution to the score by" in server.describe()
    [first, *_], values = answer["extra_logs"]["contribution_spans"], []
    for query, spans in zip(QUERIES, answer["extra_logs"]["contribution_spans"], strict=True):
        assert all(0 <= start < end <= len(query) for start, end, _ in spans)
        values += [value for *_, value in spans]
    assert min(values) < 0 < max(values)
    ids = server.proxy.tokenizer(QUERIES[0], return_tensors="pt", add_special_tokens=False)["input_ids"]
    reader = server.readers["contribution"]
    with torch.no_grad(), reader.record(torch.ones_like(ids)) as recording:
        server.proxy.reward_model(ids, torch.ones_like(ids))
    expected = recording.row_BS[0].float().tolist()
    assert [value for *_, value in first] == pytest.approx(expected, abs=1e-5)
    for one in server.readers.values():
        one.close()


def forwards(server, monkeypatch, size=32):
    """The sizes of the server's forwards from here on, of up to ``size`` texts."""
    sizes, score = [], server.score

    def counted(texts):
        sizes.append(len(texts))
        return score(texts)

    monkeypatch.setattr(server, "forwards", serve_rm.SharedForwards(counted, size))
    return sizes


def test_requests_that_wait_share_forwards_and_get_their_own_replies(server, monkeypatch):
    alone = [reply(server, [query]) for query in QUERIES]
    sizes = forwards(server, monkeypatch, size=4)
    server.forwards._seconds = 20.0  # so the first forward waits a second for the others, which are still read
    replies = post(server, *(Asked({"query": [query]}) for query in QUERIES * 3), Asked({"query": QUERIES}))
    assert sizes == [4, 4, 4]
    for response, single in zip(replies, alone * 3, strict=False):
        assert json.loads(response.body)["rewards"] == pytest.approx(single["rewards"], abs=1e-5)
    long = json.loads(replies[-1].body)
    assert long["rewards"] == pytest.approx([one["rewards"][0] for one in alone], abs=1e-5)
    for spans, single in zip(long["extra_logs"]["credit_spans"], alone, strict=True):
        assert [span[:2] for span in spans] == [span[:2] for span in single["extra_logs"]["credit_spans"][0]]


def test_a_long_request_takes_turns_with_others(server, monkeypatch):
    forwards(server, monkeypatch, size=2)
    done = []

    async def both():
        async def ask(name, queries):
            await server.reply(queries, Asked({}).is_disconnected)
            done.append(name)

        await asyncio.gather(ask("long", QUERIES * 4), ask("short", QUERIES[:1]))

    asyncio.run(both())
    assert done == ["short", "long"]


def test_gone_clients_are_dropped_and_one_bad_text_harms_nobody_else(server, monkeypatch):
    sizes = forwards(server, monkeypatch)
    broken, score = QUERIES[1], server.forwards._score

    def failing(texts):
        if any(len(text.ids) == length for text in texts):
            raise RuntimeError("out of memory")
        return score(texts)

    length = len(server.encode([broken])[0].ids)
    monkeypatch.setattr(server.forwards, "_score", failing)
    gone, good, bad, other = post(
        server,
        Asked({"query": QUERIES}, gone=True),
        *(Asked({"query": [query]}) for query in (QUERIES[0], broken, QUERIES[2])),
    )
    assert gone.status_code == 499 and str(bad) == "500: out of memory"
    assert sum(sizes) == 2 and [one.status_code for one in (good, other)] == [200, 200]


def test_a_cancelled_request_takes_no_other_with_it():
    free = threading.Event()
    shared = serve_rm.SharedForwards(lambda texts: free.wait(30) and [{"reward": text} for text in texts], 4)

    async def one_of_two_is_cancelled():
        first, second, third = (asyncio.create_task(shared.of([n], Asked({}).is_disconnected)) for n in (1, 2, 3))
        await asyncio.sleep(0.1)
        first.cancel()  # within its forward
        free.set()
        return await asyncio.wait_for(asyncio.gather(second, third), 30)

    assert asyncio.run(one_of_two_is_cancelled()) == [[{"reward": 2}], [{"reward": 3}]]


def test_health_answers_while_a_forward_runs(server, monkeypatch):
    pytest.importorskip("fastapi")
    free = threading.Event()
    monkeypatch.setattr(server, "forwards", serve_rm.SharedForwards(lambda texts: free.wait(30) and [], 1))

    async def health_during_a_forward():
        waiting = asyncio.create_task(server.forwards.of([None], Asked({}).is_disconnected))
        await asyncio.sleep(0.05)
        answer = route(serve_rm._app(server), "/health")()
        during = not waiting.done()
        free.set()
        waiting.cancel()
        return answer, during

    answer, during = asyncio.run(health_during_a_forward())
    assert during and "attention row of layer 1 of 2" in answer["credit"]


def test_a_query_that_is_cut_is_reported(server, monkeypatch, capsys):
    monkeypatch.setattr(server.proxy, "max_length", 4)
    server.encode(QUERIES)
    assert "2 of 3 queries were cut at --data.max_len 4 tokens" in capsys.readouterr().err


def test_a_score_that_is_no_number_names_its_query(server, monkeypatch):
    monkeypatch.setattr(server.forwards, "_score", lambda texts: [{"reward": float("nan")} for _ in texts])
    (error,) = post(server, Asked({"query": QUERIES}))
    assert str(error).startswith("500: the reward of query 0 is nan: 'The film")
    spans = [[0, 1, float("inf")]]
    monkeypatch.setattr(
        server.forwards, "_score", lambda texts: [{"reward": 0.0, "credit_spans": spans} for _ in texts]
    )
    (error,) = post(server, Asked({"query": QUERIES}))
    assert str(error).startswith("500: the credit_spans of query 0 is inf: 'The film")


def test_half_of_a_surrogate_pair_is_scored_as_the_replacement_character(server):
    assert reply(server, ["a \ud83c b"]) == reply(server, ["a \ufffd b"])


@pytest.mark.parametrize(
    "body", [b"", b"[1]", b"{", b"[" * 200_000, {}, *({"query": q} for q in (None, [], "text", [""], [1]))]
)
def test_requests_that_are_none(server, body):
    (error,) = post(server, Asked(body))
    assert str(error).startswith("422: send ") and "at least one text" in str(error)


def test_a_taken_port_is_known_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ["--reward.model_name_or_path", os.devnull, "--host", "127.0.0.1", "--port", port]
        assert main(["serve-rm", *words]) == 2
    assert f"cannot serve on --host 127.0.0.1 --port {port}: Address already in use" in capsys.readouterr().err


def test_bad_input_is_one_line(capsys):
    assert main(["serve-rm", "--reward.model_name_or_path", os.devnull]) == 2
    output = capsys.readouterr().err.strip().splitlines()
    assert output[-1] == f"abc-rlhf: error: --reward.model_name_or_path {os.devnull}: no such directory"
    with pytest.raises(UserError, match="--shaping.layer 'x'"):
        serve_rm.main(["--shaping.layer", "x"])
    with pytest.raises(UserError, match="sends attention and contribution; --reward_shaping prefix needs prefix"):
        serve_rm.main(["--reward_shaping", "prefix"])
