"""``abc-rlhf audit``: whether credit says which tokens moved the reward model's score."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from abc_plugin.config import ShapingConfig, add_flags
from abc_plugin.credit import methods as registry
from abc_plugin.errors import CreditError, UserError

try:
    import numpy as np
    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    from abc_plugin.attention.model_files import check_reads, read_config
    from abc_plugin.tools.audit import pictures
    from abc_plugin.tools.audit.advice import advise
    from abc_plugin.tools.audit.audit_page import render
    from abc_plugin.tools.audit.completions import ADVISED, Completion, Reading, read
    from abc_plugin.tools.audit.head_map import map_heads
    from abc_plugin.tools.audit.measure import EVIDENCE, POINTS, measure
    from abc_plugin.tools.audit.results import Results
    from abc_plugin.tools.audit.reward_model import FLAG, RewardModel
    from abc_plugin.tools.audit.summary import STATISTICS, Summary, background, summarise, tabulate
except ModuleNotFoundError as error:
    raise UserError(f"abc-rlhf audit needs {error.name}; pip install 'abc-plugin[audit]'") from None

CONTRIBUTION = "contribution"  # evidence that not every reward model has (attention/contribution.py)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPING = ("layer", "heads", "drop", "entropy_floor")  # the settings that decide which token gets how much


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; those that OpenRLHF has too are named as there."""
    add = parser.add_argument
    add("--reward.model_name_or_path", required=True, metavar="MODEL", help="the reward model")
    add("--data", required=True, metavar="JSONL", help="prompts and completions, or what abc-rlhf evaluate wrote")
    add("--out", required=True, metavar="DIR", help="where the results go; an audit that was killed goes on there")
    add("--prompt_key", default="prompt", help="default prompt; a text, or messages for the chat template")
    add("--completion_key", default="completion", help="default completion")
    add(
        "--split", type=int, metavar="N", help="the completion key holds whole texts, whose first N tokens are prompts"
    )
    add("--append_eos", action="store_true", help="end each completion with EOS, as OpenRLHF trains reward models")
    add("--samples", type=int, default=128, help="completions audited, at evenly spaced lines of the file (128)")
    add("--methods", nargs="+", metavar="METHOD", help="default: every registered method a reward model can serve")
    add("--ds.value_head_prefix", default="score", metavar="NAME", help="name of the scalar head (score)")
    add("--reward.normalize_enable", action="store_true", help="normalise by the mean and std of the model's config")
    add("--dtype", choices=DTYPES, default="fp32", help="fp32; bf16 halves memory and rounds small effects away")
    add_flags(parser, SHAPING)


def run(args: argparse.Namespace) -> int:
    """Audit, write, print; 0. Raises UserError on bad input, before anything is computed or written."""
    options = vars(args)
    path = options[FLAG.removeprefix("--")]
    if "," in path:
        raise UserError(f"{FLAG} {path}: several reward models; audit one at a time, each with an --out of its own")
    shaping = ShapingConfig(**{name: options[f"shaping.{name}"] for name in SHAPING})
    methods = _methods(args.methods)
    if args.samples < 1 or (args.split is not None and args.split < 1):
        raise UserError(f"--samples {args.samples}, --split {args.split}: give at least 1")
    reading = Reading(args.prompt_key, args.completion_key, args.split, args.append_eos, args.samples)
    needs = frozenset().union(*(method.needs for method in methods.values()))
    config, tokenizer = read_config(FLAG, path), _tokenizer(path)
    check_reads(FLAG, path, config, max(tokenizer.get_vocab().values()), 0, "--data")
    model = RewardModel(
        path,
        layer=shaping.layer,
        heads=shaping.head_list,
        needs=needs - {CONTRIBUTION},
        head=options["ds.value_head_prefix"],
        normalise=options["reward.normalize_enable"],
        dtype=DTYPES[args.dtype],
    )
    if CONTRIBUTION in needs:
        methods = _with_contributions(model, methods, asked=args.methods is not None)
    completions = read(args.data, tokenizer, reading, model.window)
    configuration = {
        "model": model.fingerprint(),
        "completions": _digest(completions),
        "methods": list(methods),
        "layer": model.layers[model.configured],
        **{name: getattr(shaping, name) for name in SHAPING[1:]},
        "normalised": options["reward.normalize_enable"],
        "dtype": args.dtype,
        "points": POINTS,
    }
    results = Results(args.out, configuration)
    done = len(results.records)
    for completion in tqdm(completions[done:], "audit", len(completions), initial=done, unit="completion"):
        results.append(measure(model, completion, methods, shaping))
    audited = {"reward model": path, "data": f"{len(completions)} completions of {args.data}", **configuration}
    _report(Path(args.out), results.records, model, audited, _command_line(options))
    return 0


def _methods(names: list[str] | None) -> dict[str, registry.Method]:
    """The methods to audit, by name; of the registry's, those whose evidence a reward model can give."""
    if names is None:
        loaded = {name: registry.load(name) for name in registry.available()}
        return {name: method for name, method in loaded.items() if method.needs <= set(EVIDENCE)}
    loaded = {name: registry.load(name) for name in names}
    for name, method in loaded.items():
        if not method.needs <= set(EVIDENCE):
            lacking = ", ".join(sorted(method.needs - set(EVIDENCE)))
            raise UserError(
                f"--methods {name} needs {lacking}, which a reward model alone does not give; leave it out"
            )
    return loaded


def _with_contributions(
    model: RewardModel, methods: dict[str, registry.Method], *, asked: bool
) -> dict[str, registry.Method]:
    """The methods, without those that need contributions where this model has none and they were not asked for."""
    try:
        model.read(CONTRIBUTION)
    except (UserError, CreditError) as error:
        if asked:
            raise UserError(f"--methods: {error}") from None
        print(f"abc-rlhf audit: without contributions, so without the methods that need them: {error}")
        return {name: method for name, method in methods.items() if CONTRIBUTION not in method.needs}
    return methods


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{FLAG} {path} has no tokenizer: {str(error).splitlines()[0]}") from None


def _digest(completions: list[Completion]) -> str:
    """Sixteen hex digits over all ids."""
    text = json.dumps([dataclasses.astuple(completion) for completion in completions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _command_line(options: dict[str, Any]) -> str:
    """The command with all its settings: their names here are those of their flags."""
    words = ["abc-rlhf", "audit"]
    for name, value in options.items():
        if name != "command" and value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def _report(
    out: Path, records: list[dict[str, Any]], model: RewardModel, audited: dict[str, Any], command: str
) -> None:
    """Write audit.json, audit.html and the pictures; print the table and the advice."""
    tables, scene = tabulate(records), background(records)
    summary, head_map = summarise(tables), map_heads(records, model.layers, model.configured, model.heads)
    sentences = advise(summary, tables, head_map)
    pngs = {
        "agreement": pictures.agreement(summary),
        "curves": pictures.curves(records),
        "heads": pictures.heads(head_map),
        "shares": pictures.shares(head_map, scene),
    }
    text = {"advice": sentences, "about": audited, "statistics": STATISTICS}
    numbers = {"methods": summary, "background": scene, "heads": head_map}
    (out / "audit.json").write_text(json.dumps(text | numbers, indent=1, default=_jsonable) + "\n", encoding="utf-8")
    page = render(records, summary, scene, sentences, audited, pngs, command)
    (out / "audit.html").write_text(page, encoding="utf-8")
    for name, png in pngs.items():
        (out / f"{name}.png").write_bytes(png)
    console = Console(highlight=False, markup=False)
    console.print(_table(summary))
    for sentence in sentences:
        console.print(sentence)
    if len(records) < ADVISED:
        console.print(f"Only {len(records)} completions: take {ADVISED} or more for a verdict to rely on.")
    files = ", ".join(["audit.json", *(f"{name}.png" for name in pngs)])
    console.print(f"the report is {out / 'audit.html'}; beside it {files}", soft_wrap=True)


def _jsonable(value: Any) -> Any:
    """Dataclasses as objects, arrays as lists with null for NaN."""
    if dataclasses.is_dataclass(value):
        return vars(value)
    return np.where(np.isnan(value), None, value).tolist()


def _table(summary: Summary) -> Table:
    table = Table(title="Credit against what removing each token does to the score", box=None, padding=(0, 2, 0, 0))
    columns = {"rank correlation": "spearman", "of sizes only": "size", "curves apart": "separation"}
    table.add_column("method", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for method, estimates in summary.items():
        cells = (f"{estimates[name]:.2f}" if estimates[name] else "–" for name in columns.values())
        table.add_row(pictures.label(method), *cells)
    return table
