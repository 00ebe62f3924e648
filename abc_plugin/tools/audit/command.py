"""``abc-rlhf audit``: whether credit says which tokens moved the reward model's score."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from abc_plugin.config import ShapingConfig, add_flags
from abc_plugin.credit import methods as registry
from abc_plugin.errors import CreditError, UserError, first_line
from abc_plugin.output_directory import locked, refuse_models, writing

try:
    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    from abc_plugin.attention.model_files import check_reads, read_config
    from abc_plugin.tools.audit.advice import advise
    from abc_plugin.tools.audit.audit_outputs import Outcome, tell, write
    from abc_plugin.tools.audit.audited_texts import SHORTEST, Completion, Reading, read
    from abc_plugin.tools.audit.completion_measures import COSTLY, EVIDENCE, POINTS, measure
    from abc_plugin.tools.audit.head_map import map_heads
    from abc_plugin.tools.audit.results_file import Results
    from abc_plugin.tools.audit.reward_model import FLAG, RewardModel
    from abc_plugin.tools.audit.summary_table import summarise, tabulate
except ModuleNotFoundError as error:
    raise UserError(f"abc-rlhf audit needs {error.name}; pip install 'abc-plugin[audit]'") from None

CONTRIBUTION = "contribution"  # evidence that not every reward model has (attention/signed_contribution.py)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPING = ("layer", "heads", "drop", "entropy_floor", "calls")  # the settings that decide which token gets how much


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
    add(
        "--tokens",
        nargs="+",
        type=int,
        metavar="N",
        help="cut completions to these lengths, e.g. 16 64 256; each is an audit of its own, in DIR/N, of the "
        "completions that long (default: whole)",
    )
    add(
        "--spans",
        type=int,
        metavar="N",
        help="remove spans of tokens, N a completion, where it has more tokens than that: long ones cost less "
        "(default: single tokens)",
    )
    add("--samples", type=int, default=128, help="completions audited, at evenly spaced lines of the file (128)")
    add("--methods", nargs="+", metavar="METHOD", help="default: every registered method that one forward can serve")
    add("--ds.value_head_prefix", default="score", metavar="NAME", help="name of the scalar head (score)")
    add("--reward.normalize_enable", action="store_true", help="normalise by the mean and std of the model's config")
    add("--dtype", choices=DTYPES, default="fp32", help="fp32; bf16 halves memory and rounds small effects away")
    add_flags(parser, SHAPING)


def run(args: argparse.Namespace) -> int:
    """Audit each length, write, print; 0. Raises UserError on bad input, before anything is computed or written."""
    options = vars(args)
    path = options[FLAG.removeprefix("--")]
    if "," in path:
        raise UserError(f"{FLAG} {path}: several reward models; audit one at a time, each with an --out of its own")
    shaping = ShapingConfig(**{name: options[f"shaping.{name}"] for name in SHAPING})
    methods = _methods(args.methods)
    _check_numbers(args)
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
    out, lengths = Path(args.out), dict.fromkeys(args.tokens or [None])
    reading = Reading(args.prompt_key, args.completion_key, args.split, args.append_eos, args.samples)
    read_of = {n: read(args.data, tokenizer, replace(reading, tokens=n), model.window) for n in lengths}
    configuration = {
        "model": model.fingerprint(),
        "methods": list(methods),
        "layer": model.layers[model.configured],
        **{name: getattr(shaping, name) for name in SHAPING[1:]},
        "normalised": options["reward.normalize_enable"],
        "dtype": args.dtype,
        "spans": args.spans,
        "points": POINTS,
    }
    outcomes = {}
    refuse_models([out], {path: FLAG}, flag="--out")
    with locked("--out", out), writing(out, "the completions done are kept, and the same command goes on"):
        for length, completions in read_of.items():
            directory = out / str(length) if length else out
            of_these = configuration | {"completions": _digest(completions)}
            results = Results(directory, of_these)
            done, name = len(results.records), f"{length} tokens" if length else "audit"
            for completion in tqdm(completions[done:], name, len(completions), initial=done, unit="completion"):
                results.append(measure(model, completion, methods, shaping, args.spans))
            tables = tabulate(results.records)
            summary = summarise(tables)
            head_map = map_heads(results.records, model.layers, model.configured, model.heads)
            advice = advise(summary, tables, head_map, methods, shaping, path)
            audited = {"reward model": path, "data": f"{len(completions)} completions of {args.data}"} | of_these
            outcomes[length] = Outcome(results.records, summary, head_map, advice, audited)
            write(directory, outcomes[length], _command_line(options))
    tell(outcomes, out)
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    least = {"samples": 1, "split": 1, "spans": SHORTEST, "tokens": SHORTEST}
    for name, bound in least.items():
        given = getattr(args, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < bound:
                raise UserError(f"--{name} {number} is too small; the least is {bound}")


def _methods(names: list[str] | None) -> dict[str, registry.Method]:
    """The methods to audit, by name; of the registry's, those whose evidence a reward model can give."""
    if names is None:
        loaded = {name: registry.load(name) for name in registry.available()}
        return {name: method for name, method in loaded.items() if method.needs <= set(EVIDENCE)}
    loaded = {name: registry.load(name) for name in names}
    for name, method in loaded.items():
        if lacking := ", ".join(sorted(method.needs - {*EVIDENCE, *COSTLY})):
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
        raise UserError(f"{FLAG} {path} has no tokenizer: {first_line(error)}") from None


def _digest(completions: list[Completion]) -> str:
    """Sixteen hex digits over all ids."""
    text = json.dumps([(completion.prompt_ids, completion.ids) for completion in completions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _command_line(options: dict[str, Any]) -> str:
    """The command with all its settings: their names here are those of their flags."""
    words = ["abc-rlhf", "audit"]
    for name, value in options.items():
        if name != "command" and value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)
