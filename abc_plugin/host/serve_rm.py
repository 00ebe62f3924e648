"""``abc-rlhf serve-rm``: OpenRLHF's reward server (openrlhf.cli.serve_rm, all its flags) whose replies carry credit.

For ``--reward.remote_url http://HOST:PORT/get_reward`` of ``abc-rlhf ray``. POST /get_reward takes

    {"query": [text, ...]}                         whole texts, prompt and response, as OpenRLHF sends them

and answers, beside the host's reply, with the attention of the token each score was read at:

    {"rewards": [r, ...], "scores": [r, ...], "extra_logs": {"credit_spans": [[[start, end, weight], ...], ...]}}

one list of spans per query; characters start to end of the query carry that weight. With --reward_shaping abc_signed
also "contribution_spans", what those characters add to the score: signed, in its units. GET /health names the model.
Requests that wait share a forward of up to --batch_size texts (default 32).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import math
import socket
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from abc_plugin.config import ShapingConfig, add_flags, split_flags
from abc_plugin.credit.methods import load
from abc_plugin.errors import UserError, first_line
from abc_plugin.host.import_openrlhf import import_host
from abc_plugin.text.remote_credit import SPANS
from abc_plugin.text.tokenizer_mapping import SURROGATE, piece_spans

CLI = "openrlhf.cli.serve_rm"
HEEDED = ("method", "layer", "heads", "recovery")
TOGETHER = 32  # texts of a forward without --batch_size
FILLING = 0.05  # of a forward's time, that one which is not full waits for more texts
Gone = Callable[[], Awaitable[bool]]  # whether a request's client has closed its connection


class Text(NamedTuple):
    """A query in the reward model's tokens, as far as ``--data.max_len`` lets it be read."""

    ids: list[int]
    spans: list[list[float]]  # characters [start, end) that each of ``ids`` stands for


class CreditServer:
    """The host's loaded reward model and tokenizer (its RewardModelProxy), scoring with credit."""

    def __init__(self, proxy: Any, shaping: ShapingConfig) -> None:
        from abc_plugin.attention.evidence_readers import attach_readers

        self.proxy = proxy
        options = {"layer": shaping.layer, "recovery": shaping.recovery, "heads": shaping.head_list}
        self.readers = attach_readers(proxy.reward_model, {"attention", *load(shaping.method).needs}, **options)
        self.forwards = SharedForwards(self.score, proxy.batch_size or TOGETHER)
        self._reader = ThreadPoolExecutor(1)

    def describe(self) -> str:
        """What is sent, and from which layer."""
        return "; ".join(reader.describe() for reader in self.readers.values())

    async def reply(self, queries: list[str], gone: Gone) -> dict[str, Any]:
        """Scores and credit spans of whole texts, in order. Raises ValueError naming a query without a score."""
        # One thread, as fast tokenizers are not safe for several; not that of the forwards, which it would hold up.
        texts = await asyncio.get_running_loop().run_in_executor(self._reader, self.encode, queries)
        scored = await self.forwards.of(texts, gone)
        rewards = [one.pop("reward") for one in scored]
        for index, (reward, logs) in enumerate(zip(rewards, scored, strict=True)):
            for what, values in {"reward": [[reward]], **logs}.items():
                if bad := [value for *_, value in values if not math.isfinite(value)]:
                    raise ValueError(f"the {what} of query {index} is {bad[0]}: {queries[index][:60]!r}")
        logs = {name: [one[name] for one in scored] for name in scored[0]}
        return {"rewards": rewards, "scores": rewards, "extra_logs": logs}

    def encode(self, queries: list[str]) -> list[Text]:
        """Whole texts as the host's tokenize_fn reads them. Raises ValueError naming a query without tokens."""
        # Half of a surrogate pair, which JSON can spell, is no text to a tokenizer.
        texts = [SURROGATE.sub("\ufffd", query) for query in queries]
        options = {"max_length": self.proxy.max_length, "truncation": True, "return_offsets_mapping": True}
        tokens = self.proxy.tokenizer(texts, add_special_tokens=False, **options)
        encoded, cut = [], []
        for text, encoding in zip(texts, tokens.encodings, strict=True):
            ids, offsets, end = encoding.ids, encoding.offsets, len(text)
            if not ids:
                raise ValueError(f"the query {text[:60]!r} has no tokens, and so no score")
            if encoding.overflowing:
                cut, end = [*cut, text], max(end for _, end in offsets)
            encoded.append(Text(ids, piece_spans(self.proxy.tokenizer, text[:end], ids, offsets).tolist()))
        if cut:
            _log(
                f"{len(cut)} of {len(texts)} queries were cut at --data.max_len {self.proxy.max_length} "
                f"tokens: their score and credit know nothing of the rest ({cut[0][:60]!r}…)"
            )
        return encoded

    @torch.no_grad()
    def score(self, texts: list[Text]) -> list[dict[str, Any]]:
        """One forward: the reward of each text and, under its name in extra_logs, what comes with it."""
        from abc_plugin.attention.evidence_readers import record, rows

        tokens = self.proxy.tokenizer.pad({"input_ids": [text.ids for text in texts]}, return_tensors="pt")
        mask_BS, device = tokens["attention_mask"], self.proxy.reward_model.device
        with record(self.readers, mask_BS.to(device)) as recordings:
            reward_B = self.proxy.reward_model(tokens["input_ids"].to(device), mask_BS.to(device))
        scored: list[dict[str, Any]] = [{"reward": reward} for reward in reward_B.float().tolist()]
        for need, row_BS in rows(recordings).items():
            for one, text, row_S, real_S in zip(scored, texts, row_BS, mask_BS.bool(), strict=True):
                values = zip(text.spans, row_S[real_S].tolist(), strict=True)
                one[SPANS[need]] = [[*span, value] for span, value in values if value]
        return scored


class ClientGone(Exception):
    """Nobody waits for the reply any more."""


@dataclass(eq=False)
class _Request:
    waiting: deque[Text]
    gone: Gone
    answer: asyncio.Future
    results: list[dict[str, Any] | Exception] = field(default_factory=list)


class SharedForwards:
    """Forwards of up to ``size`` texts of whatever requests wait, while the event loop stays free for others.

    One thread runs them one at a time, as a tap records one at a time. Requests take turns, so that one of many texts
    does not hold up those behind it.
    """

    def __init__(self, score: Callable[[list[Text]], list[dict[str, Any]]], size: int) -> None:
        self._score, self._size = score, size
        self._thread = ThreadPoolExecutor(1)
        self._requests: deque[_Request] = deque()
        self._running: asyncio.Task | None = None
        self._seconds = 0.0  # of the last forward

    async def of(self, texts: list[Text], gone: Gone) -> list[dict[str, Any]]:
        """What ``score`` gives for a request's texts, or raises for one; ClientGone where ``gone`` comes true."""
        request = _Request(deque(texts), gone, asyncio.get_running_loop().create_future())
        self._requests.append(request)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await request.answer

    async def _run(self) -> None:
        while self._requests:
            if sum(len(request.waiting) for request in self._requests) < self._size:
                await asyncio.sleep(FILLING * self._seconds)  # whoever just had a reply may be about to ask again
            taken = await self._next()
            if not taken:
                continue
            start, texts = time.monotonic(), [request.waiting.popleft() for request in taken]
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._each, texts)
            self._seconds = time.monotonic() - start
            for request, result in zip(taken, results, strict=True):
                request.results.append(result)
            for request in dict.fromkeys(taken):
                if request.answer.done():  # cancelled
                    continue
                if failed := [result for result in request.results if isinstance(result, Exception)]:
                    request.answer.set_exception(failed[0])
                elif request.waiting:
                    self._requests.append(request)
                else:
                    request.answer.set_result(request.results)

    def _each(self, texts: list[Text]) -> list[dict[str, Any] | Exception]:
        """``score`` of each text, or what went wrong with it: a forward that fails is done again in halves."""
        try:
            return self._score(texts)
        except Exception as error:  # e.g. out of memory, or of positions
            failure = error
        if len(texts) == 1:
            return [failure]
        _log(f"a forward of {len(texts)} texts failed ({failure}) and is done again in halves; lower --batch_size")
        half = len(texts) // 2
        return self._each(texts[:half]) + self._each(texts[half:])

    async def _next(self) -> list[_Request]:
        """The requests whose texts are next, one entry a text; those whose client is gone are dropped."""
        taken: list[_Request] = []
        while self._requests and len(taken) < self._size:
            request = self._requests.popleft()
            gone = await request.gone()
            if request.answer.done():  # cancelled
                continue
            if gone:
                request.answer.set_exception(ClientGone())
            else:
                taken += [request] * min(len(request.waiting), self._size - len(taken))
        return taken


def main(argv: list[str]) -> int:
    """Serve until interrupted; returns the exit status."""
    shaping, host_argv = split_flags(argv)
    if shaping != replace(ShapingConfig(), **{name: getattr(shaping, name) for name in HEEDED}):
        raise UserError(
            "abc-rlhf serve-rm always sends the attention that --reward_shaping abc needs; of the plugin's flags it "
            "takes --reward_shaping, --shaping.layer, --shaping.heads and --shaping.recovery, the others belong to "
            "the training"
        )
    if unknown := load(shaping.method).needs - SPANS.keys():
        raise UserError(
            f"abc-rlhf serve-rm sends {' and '.join(SPANS)}; --reward_shaping {shaping.method} needs {min(unknown)}: "
            "use abc or abc_signed, or leave it out"
        )
    if {"-h", "--help"} & set(argv):
        _print_help()
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"not installed: {', '.join(missing)}; pip install fastapi uvicorn")
    import_host(local=False)
    args = _parsed(host_argv)
    listening = _bound(args.host, args.port)
    proxy = _load(args)
    from abc_plugin.host.model_workers import restore_normalisation

    if args.reward.normalize_enable:
        print(f"abc_plugin: reward normalisation restored: {restore_normalisation(proxy.reward_model)}")
    if not proxy.tokenizer.is_fast:
        raise UserError("a slow tokenizer gives no character offsets; leave --data.disable_fast_tokenizer out")
    server = CreditServer(proxy, shaping)
    url = f"http://{args.host}:{listening.getsockname()[1]}/get_reward"  # not args.port, which may be 0: any
    print(f"abc_plugin: {server.describe()}; serving on {url}", flush=True)
    uvicorn = importlib.import_module("uvicorn")
    uvicorn.Server(uvicorn.Config(_app(server), log_level="warning")).run([listening])
    return 0


def _parsed(argv: list[str]) -> Namespace:
    from abc_plugin.host.arguments import parse

    return parse(argv, "serve-rm", CLI, hierarchize=importlib.import_module(CLI).hierarchize)


def _bound(host: str, port: int) -> socket.socket:
    """Listens before the model is loaded: a port that is taken is known at once, and who asks early only waits."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot serve on --host {host} --port {port}: {reason}; choose another --port") from None


def _load(args: Namespace) -> Any:
    """The host's loaded reward model (its RewardModelProxy)."""
    from abc_plugin.host.model_checks import check_served

    check_served(args)
    try:
        return importlib.import_module(CLI).RewardModelProxy(args)
    except Exception as error:  # whatever the host or transformers trip over while they load the model
        reason = first_line(error)
        raise UserError(f"the reward model cannot be loaded: {reason} (abc-rlhf serve-rm --help)") from error


def _app(server: CreditServer) -> Any:
    fastapi = importlib.import_module("fastapi")
    app = fastapi.FastAPI()

    async def get_reward(request: Any) -> Any:
        queries = _queries(await request.body())
        if queries is None:
            raise fastapi.HTTPException(422, 'send {"query": [text, ...]}, with at least one text and none empty')
        try:
            reply = await server.reply(queries, request.is_disconnected)
        except ClientGone:
            return fastapi.Response(status_code=499)
        except Exception as error:  # the host logs the status and asks again; the reason stands in this server's log
            _log(str(error))
            raise fastapi.HTTPException(500, str(error)) from None
        return fastapi.Response(json.dumps(reply), media_type="application/json")

    app.add_route("/get_reward", get_reward, methods=["POST"])

    @app.get("/health")
    def health() -> dict:
        return {"model": type(server.proxy.reward_model).__name__, "credit": server.describe()}

    return app


def _queries(body: bytes) -> list[str] | None:
    try:
        queries = json.loads(body)["query"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    usable = isinstance(queries, list) and queries and all(isinstance(query, str) and query for query in queries)
    return queries if usable else None


def _log(message: str) -> None:
    print(f"abc_plugin: {message}", file=sys.stderr, flush=True)


def _print_help() -> None:
    parser = argparse.ArgumentParser(prog="abc-rlhf serve-rm", add_help=False, usage="abc-rlhf serve-rm [flags]")
    add_flags(parser, HEEDED)
    print(__doc__.strip(), parser.format_help(), "OpenRLHF's flags:", sep="\n\n", flush=True)
