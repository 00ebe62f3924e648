"""``abc-rlhf serve-rm``: OpenRLHF's reward server (openrlhf.cli.serve_rm, all its flags) whose replies carry credit.

For ``--reward.remote_url http://HOST:PORT/get_reward`` of ``abc-rlhf ray``. POST /get_reward takes

    {"query": [text, ...]}                         whole texts, prompt and response, as OpenRLHF sends them

and answers, beside the host's reply, with the attention of the token each score was read at:

    {"rewards": [r, ...], "scores": [r, ...], "extra_logs": {"credit_spans": [[[start, end, weight], ...], ...]}}

one list of spans per query; characters start to end of the query carry that weight. With --reward_shaping abc_signed
also "contribution_spans", what those characters add to the score: signed, in its units. GET /health names the model.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from abc_plugin.config import ShapingConfig, add_flags, split_flags
from abc_plugin.credit.methods import load
from abc_plugin.errors import UserError
from abc_plugin.host.imports import import_host
from abc_plugin.text.mapping import piece_spans
from abc_plugin.text.remote_credit import SPANS

CLI = "openrlhf.cli.serve_rm"
HEEDED = ("method", "layer", "heads", "recovery")


class CreditServer:
    """The host's loaded reward model and tokenizer (its RewardModelProxy), scoring with credit."""

    def __init__(self, proxy: Any, shaping: ShapingConfig) -> None:
        from abc_plugin.attention.readers import attach_readers

        self.proxy = proxy
        options = {"layer": shaping.layer, "recovery": shaping.recovery, "heads": shaping.head_list}
        self.readers = attach_readers(proxy.reward_model, {"attention", *load(shaping.method).needs}, **options)

    def describe(self) -> str:
        """What is sent, and from which layer."""
        return "; ".join(reader.describe() for reader in self.readers.values())

    @torch.no_grad()
    def reply(self, queries: list[str]) -> dict[str, Any]:
        """Scores and credit spans of whole texts, in order. Raises ValueError naming a query without a score."""
        rewards: list[float] = []
        spans: dict[str, list[list]] = {SPANS[need]: [] for need in self.readers}
        size = self.proxy.batch_size or len(queries)
        for start in range(0, len(queries), size):
            batch = queries[start : start + size]
            reward_B, batch_spans = self._score(batch)
            rewards += reward_B.float().tolist()
            for key, each in batch_spans.items():
                spans[key] += each
        for index, reward in enumerate(rewards):
            if not torch.isfinite(torch.tensor(reward)):
                raise ValueError(f"the reward of query {index} is {reward}: {queries[index][:60]!r}")
        return {"rewards": rewards, "scores": rewards, "extra_logs": spans}

    def _score(self, texts: list[str]) -> tuple[Tensor, dict[str, list[list]]]:
        from abc_plugin.attention.readers import record, rows

        # The host's tokenize_fn with the characters that each token covers.
        tokens = self.proxy.tokenizer(
            texts,
            return_tensors="pt",
            add_special_tokens=False,
            max_length=self.proxy.max_length,
            padding=True,
            truncation=True,
            return_offsets_mapping=True,
        )
        device = self.proxy.reward_model.device
        mask_BS = tokens["attention_mask"].to(device)
        with record(self.readers, mask_BS) as recordings:
            reward_B = self.proxy.reward_model(tokens["input_ids"].to(device), mask_BS)
        offsets_BS2 = tokens["offset_mapping"]
        ends = offsets_BS2[..., 1].amax(1).tolist()
        cut = [text for text, end in zip(texts, ends, strict=True) if end < len(text)]
        if cut:
            print(
                f"abc_plugin: {len(cut)} of {len(texts)} queries were cut at --data.max_len {self.proxy.max_length} "
                f"tokens: their score and credit know nothing of the rest ({cut[0][:60]!r}…)",
                file=sys.stderr,
                flush=True,
            )
        rows_BS = rows(recordings)
        credit: dict[str, list[list]] = {SPANS[need]: [] for need in rows_BS}
        for b, (text, end) in enumerate(zip(texts, ends, strict=True)):
            real_S = tokens["attention_mask"][b].bool()
            ids = tokens["input_ids"][b][real_S].tolist()
            spans = piece_spans(self.proxy.tokenizer, text[:end], ids, offsets_BS2[b][real_S].tolist()).tolist()
            for need, row_BS in rows_BS.items():
                values = row_BS[b][real_S].tolist()
                credit[SPANS[need]].append([[*span, x] for span, x in zip(spans, values, strict=True) if x])
        return reward_B, credit


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
    proxy, args = _load(host_argv)
    from abc_plugin.host.model_files import check_reward_head
    from abc_plugin.host.worker import restore_normalisation

    check_reward_head(args, args.reward.model_name_or_path, proxy.reward_model.config)
    if args.reward.normalize_enable:
        print(f"abc_plugin: reward normalisation restored: {restore_normalisation(proxy.reward_model)}")
    if not proxy.tokenizer.is_fast:
        raise UserError("a slow tokenizer gives no character offsets; leave --data.disable_fast_tokenizer out")
    server = CreditServer(proxy, shaping)
    url = f"http://{args.host}:{args.port}/get_reward"
    print(f"abc_plugin: {server.describe()}; serving on {url}", flush=True)
    importlib.import_module("uvicorn").run(_app(server), host=args.host, port=args.port, log_level="warning")
    return 0


def _load(argv: list[str]) -> tuple[Any, Any]:
    """The host's loaded reward model (its RewardModelProxy), and its arguments."""
    from abc_plugin.host.arguments import parse

    host = importlib.import_module(CLI)
    args = parse(argv, "serve-rm", CLI, hierarchize=host.hierarchize)
    try:
        return host.RewardModelProxy(args), args
    except Exception as error:  # whatever the host or transformers trip over while they load the model
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the reward model cannot be loaded: {reason} (abc-rlhf serve-rm --help)") from error


def _app(server: CreditServer) -> Any:
    fastapi = importlib.import_module("fastapi")
    app = fastapi.FastAPI()

    @app.post("/get_reward")
    async def get_reward(data: dict) -> dict:  # async: one at a time, as a tap records one forward at a time
        queries = data.get("query")
        usable = isinstance(queries, list) and queries and all(isinstance(query, str) and query for query in queries)
        if not usable:
            raise fastapi.HTTPException(422, 'send {"query": [text, ...]}, with at least one text and none empty')
        try:
            return server.reply(queries)
        except ValueError as error:  # the host logs the status and asks again; the reason stands in this server's log
            print(f"abc_plugin: {error}", file=sys.stderr, flush=True)
            raise fastapi.HTTPException(500, str(error)) from None

    @app.get("/health")
    def health() -> dict:
        return {"model": type(server.proxy.reward_model).__name__, "credit": server.describe()}

    return app


def _print_help() -> None:
    parser = argparse.ArgumentParser(prog="abc-rlhf serve-rm", add_help=False, usage="abc-rlhf serve-rm [flags]")
    add_flags(parser, HEEDED)
    print(__doc__.strip(), parser.format_help(), "OpenRLHF's flags:", sep="\n\n", flush=True)
