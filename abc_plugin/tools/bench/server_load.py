"""``abc-rlhf bench server``: texts per second of ``abc-rlhf serve-rm`` under many clients, against batched forwards.

A round: every client posts its text TURNS times, each after its last reply came; then the same texts in forwards of
``--batch`` texts of the plain model, in this process, without tokenising, credit, JSON or HTTP. The two take turns, so
that what else the machine does disturbs both.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from abc_plugin.errors import UserError
from abc_plugin.tools.bench.forward_cost import load

TURNS = 8  # texts of a client in a round


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0. Raises UserError on sizes below 1, and where the model or the server does not start."""
    if min(args.clients, args.batch, args.tokens, args.repeats) < 1:
        raise UserError("--clients, --batch, --tokens and --repeats must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = "bf16" if device.type == "cuda" else "fp32"
    tokenizer = load(AutoTokenizer, args.model, padding_side="left")
    model = load(AutoModel, args.model, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[name])
    model, texts = model.to(device).eval(), _texts(tokenizer, args.clients, args.tokens)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    parts = [texts[start : start + args.batch] for start in range(0, len(texts), args.batch)]
    batches = [tokenizer(part, add_special_tokens=False, padding=True, return_tensors="pt") for part in parts]
    batches = [batch.to(device) for batch in batches]
    words = ["--reward.model_name_or_path", args.model, "--ds.attn_implementation", "sdpa", "--ds.param_dtype", name]
    rounds: list[tuple[float, float]] = []
    with _server([*words, "--batch_size", str(args.batch)]) as port:
        _ask(port, texts, 1)
        for _ in tqdm(range(args.repeats), unit="round", leave=False, disable=None):
            served = _rate(args.clients, lambda: _ask(port, texts, TURNS))
            rounds.append((served, _rate(args.clients, lambda: _forwards(model, batches))))
    ratios = sorted(served / plain for served, plain in rounds)
    served, plain = (statistics.median(rates) for rates in zip(*rounds, strict=True))
    print(
        f"{args.clients} clients, {args.tokens} tokens, {name} on {device}: {served:.1f} texts/s served with credit, "
        f"{plain:.1f} in forwards of {args.batch} texts without; ratio {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {args.repeats} rounds)"
    )
    return 0


def _texts(tokenizer: AutoTokenizer, count: int, tokens: int) -> list[str]:
    """Texts of about so many tokens, one per client."""
    words = [word for word in map(tokenizer.decode, range(min(len(tokenizer), 4000))) if word.strip().isalpha()]
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (count, tokens), generator=draw).tolist()
    drawn = [tokenizer("".join(words[at] for at in row), add_special_tokens=False)["input_ids"] for row in picks]
    return [tokenizer.decode(ids[:tokens]) for ids in drawn]


@contextmanager
def _server(words: list[str]) -> Iterator[int]:
    """The port of ``abc-rlhf serve-rm``, once it serves."""
    command = [sys.executable, "-m", "abc_plugin", "serve-rm", *words, "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            said = ""
            for line in server.stdout:
                said = line.strip() or said
                if serving := re.search(r"serving on http://127\.0\.0\.1:(\d+)/", line):
                    break
            else:
                raise UserError(f"the server did not start: {said}")
            yield int(serving[1])
        finally:
            server.terminate()


def _ask(port: int, texts: list[str], turns: int) -> None:
    """One client per text, all at once; each posts its text ``turns`` times."""

    def client(text: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        for _ in range(turns):
            connection.request("POST", "/get_reward", json.dumps({"query": [text]}))
            reply = connection.getresponse()
            body = reply.read()
            if reply.status != 200:
                raise UserError(f"the server answered {reply.status}: {body.decode()[:200]}")
        connection.close()

    with ThreadPoolExecutor(len(texts)) as clients:
        list(clients.map(client, texts))


@torch.no_grad()
def _forwards(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    for _ in range(TURNS):
        for batch in batches:
            model(**batch, use_cache=False).last_hidden_state.sum().item()  # waits for the device


def _rate(clients: int, work: Callable[[], None]) -> float:
    """Texts per second."""
    start = time.perf_counter()
    work()
    return clients * TURNS / (time.perf_counter() - start)
