"""The commands ``local`` and ``evaluate``: their words are read before anything heavy is imported."""

from __future__ import annotations

import argparse
import json
import statistics
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from abc_plugin.config import add_flags, split_flags

TRAIN = "``abc-rlhf local``: OpenRLHF's own train() in one process, without Ray cluster and vLLM."
EVALUATE = """``abc-rlhf evaluate``: sample from a policy on held-out prompts, score and attribute the completions.

Takes the flags of ``abc-rlhf local`` (model, data, sampling, shaping; what concerns training is ignored) and
``--out FILE`` for the samples, one JSON object a line: prompt, tokens, credit (the method's weights), reward.
"""


def main(argv: list[str]) -> int:
    """Train; returns the exit status. Raises UserError for anything that can be refused before training."""
    if {"-h", "--help"} & set(argv):
        return _help()
    from abc_plugin.local import distributed_ranks

    with distributed_ranks.only_first_rank_prints():
        args, ignored = settings(argv)
        from abc_plugin.local import driver

        return driver.run(args, ignored)


def evaluate(argv: list[str]) -> int:
    """Write the samples and print the mean reward with its standard error. Raises UserError on bad input."""
    parser = argparse.ArgumentParser(prog="abc-rlhf evaluate", description=EVALUATE, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="JSONL file for the samples")
    if {"-h", "--help"} & set(argv):
        add_flags(parser)
    own, rest = parser.parse_known_args(argv)
    args, _ = settings(rest, beta=1.0)  # the method's own credit is shown, and checked for
    from abc_plugin.host.model_checks import check_models
    from abc_plugin.host.prompt_dataset import read_data
    from abc_plugin.local import distributed_ranks, flag_checks
    from abc_plugin.local.evaluate import evaluate as sample
    from abc_plugin.output_directory import check_file, write_atomically, writing

    flag_checks.check_supported(args)
    distributed_ranks.refuse_several("evaluate")
    check_file("--out", own.out, args.data.prompt_dataset)
    data = read_data(args)
    check_models(args, args.shaping, data)
    samples = sample(args, data)
    rewards = [line["reward"] for line in samples]
    error = statistics.stdev(rewards) / len(rewards) ** 0.5 if len(rewards) > 1 else float("nan")
    print(
        f"mean reward {statistics.fmean(rewards):.4f} +- {error:.4f} (standard error) over {len(rewards)} completions "
        f"of {args.actor.model_name_or_path}; samples in {own.out}",
        flush=True,
    )
    with writing(own.out):
        write_atomically(own.out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in samples))
    return 0


def settings(argv: list[str], **shaping_changes: object) -> tuple[Namespace, list[str]]:
    """The run's settings, and the flags that are ignored. Raises UserError for what one of the parsers refuses."""
    from abc_plugin.credit import methods
    from abc_plugin.host.import_openrlhf import import_host

    shaping, host_argv = split_flags(argv)
    methods.load(shaping.method)
    import_host()
    from abc_plugin.local.flag_checks import parse_for_one_process

    return parse_for_one_process(host_argv, replace(shaping, **shaping_changes))


def _help() -> int:
    from abc_plugin.host.arguments import parse

    parser = argparse.ArgumentParser(prog="abc-rlhf local", add_help=False, usage="abc-rlhf local [flags]")
    add_flags(parser)
    print(TRAIN, parser.format_help(), "OpenRLHF's flags, as for openrlhf.cli.train_ppo_ray:", sep="\n\n")
    try:
        parse(["--help"])
    except SystemExit:
        return 0
    return 1
