"""``abc-rlhf bench gpu``: whether the claims hold on this machine's card, as a table to paste into a report.

Rows are measured in a process beside this one, a part of the table in each, so that a crash or a hang costs one row.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from abc_plugin import __version__
from abc_plugin.errors import UserError
from abc_plugin.tools.bench.gpu_checks import ERROR, FAILS, NOT_RUN, Row, all_rows, answer

PACKAGES = ("torch", "transformers", "openrlhf", "deepspeed", "peft", "bitsandbytes", "flash-attn", "ray")
PROCESSES = multiprocessing.get_context("spawn")
STARTUP = 120  # seconds in which a process imports everything
Worker = tuple[BaseProcess, Connection]


def measure(rows: list[Row], device: str, out: Path, minutes: float) -> Iterator[dict[str, Any]]:
    """Of each row: part, name, status, figures, why, seconds.  out: a directory that the rows share, made here."""
    out.mkdir(parents=True)
    end, worker, part = time.monotonic() + 60 * minutes, None, ""
    try:
        for row in rows:
            start = time.monotonic()
            if start >= end:
                result = _no_answer(NOT_RUN, f"the {minutes:g} minutes were over")
            else:
                limit = row.seconds
                if row.part != part or not worker[0].is_alive():
                    _stop(worker)
                    worker, part, limit = _start(device, out), row.part, limit + STARTUP
                result = _ask(worker, row, min(limit, end - start))
            yield {"part": row.part, "name": row.name, **result, "seconds": round(time.monotonic() - start, 1)}
    finally:
        _stop(worker)


def _start(device: str, out: Path) -> Worker:
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=answer, args=(there, device, out), daemon=True)
    process.start()
    there.close()
    return process, here


def _ask(worker: Worker, row: Row, seconds: float) -> dict[str, Any]:
    """What the process answers within these seconds; else it is ended, and this says why there is nothing."""
    process, pipe = worker
    try:
        pipe.send(row)
        if pipe.poll(seconds):
            return pipe.recv()
        _stop(worker)
        return _no_answer(NOT_RUN, f"stopped after {seconds:.0f} s")
    except (EOFError, OSError):
        process.join()
        return _no_answer(ERROR, f"its process ended with status {process.exitcode}; see gpu.log")


def _no_answer(status: str, why: str) -> dict[str, Any]:
    return {"status": status, "figures": {}, "why": why}


def _stop(worker: Worker | None) -> None:
    """End it, with the commands that it started."""
    if worker:
        process, _ = worker
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def machine(device: str) -> dict[str, str]:
    """The card's name and memory, and the versions of what runs on it."""
    name = "CPU, tiny models: a trial of the script"
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        name = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    found = {each.name.lower(): each.version for each in importlib.metadata.distributions()}
    versions = {each: found[each] for each in PACKAGES if each in found}
    return {"device": name, "abc-plugin": __version__, "python": platform.python_version()} | versions


def line(result: dict[str, Any]) -> str:
    """The result's row of the table."""
    figures = [
        f"{name} {f'{value:.3g}' if isinstance(value, float) else value}" for name, value in result["figures"].items()
    ]
    found = "; ".join([*figures, *filter(None, [result["why"]])]).replace("|", "/")
    return f"| {result['part']} | {result['name']} | {result['status']} | {found} |"


def run(args: argparse.Namespace) -> int:
    """Print the table while it is made, and write it; 1 where a claim fails or a row ends in an error."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA device; --device cpu tries the script on tiny models")
    rows = [row for row in all_rows(args.device) if args.rows in f"{row.part}: {row.name}"]
    if not rows:
        raise UserError(f"--rows {args.rows!r} is in no row's name")
    out, about = Path(args.out), machine(args.device)
    shutil.rmtree(out / "work", ignore_errors=True)  # of a call that was killed
    lines = [f"# {about['device']}", "", ", ".join(f"{name} {about[name]}" for name in [*about][1:]), ""]
    lines += ["| part | what | | found |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    results = []
    for result in measure(rows, args.device, out / "work", args.minutes):
        results.append(result)
        lines.append(line(result))
        print(lines[-1], flush=True)
        (out / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (out / "gpu.json").write_text(json.dumps({**about, "rows": results}, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out / "work")
    counts = Counter(result["status"] for result in results)
    print(f"\n{', '.join(f'{count} {status}' for status, count in counts.items())}; {out}: gpu.md, gpu.json, gpu.log")
    return 1 if counts[FAILS] + counts[ERROR] else 0
