"""``abc-rlhf ray``: OpenRLHF's own PPO on Ray, DeepSpeed and vLLM, with the reward shaped; all its flags."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
from argparse import Namespace

from abc_plugin.config import add_flags, split_flags
from abc_plugin.credit import methods
from abc_plugin.errors import CannotWrite, CreditError, Terminated, UserError, WorkerDied
from abc_plugin.host.arguments import parse, settings_of
from abc_plugin.host.import_openrlhf import import_cluster_host
from abc_plugin.output_directory import claimed, writing

ON_CPU = "--on_cpu"


def main(argv: list[str]) -> int:
    """Train; returns the exit status. Raises UserError for what can be refused before Ray is asked for a GPU."""
    args = parsed(argv)  # with --help the host's parser prints its part and ends here
    from abc_plugin.host.install import install
    from abc_plugin.host.model_checks import absent_models, preflight

    on_cpu, shaping = ON_CPU in argv, args.shaping
    preflight(args, shaping)
    for line in install():
        print(f"abc_plugin: rebound {line}")
    dense = f", beta {shaping.beta:g}" if shaping.dense else ": the host's own sparse reward"
    print(f"abc_plugin: reward shaping {shaping.method}{dense}", flush=True)
    if on_cpu and not importlib.import_module("ray").is_initialized():
        importlib.import_module("abc_plugin.host.cluster_on_cpu").start()
    # Where a model is not on this machine, nor need the directories be that the workers write.
    with contextlib.nullcontext() if absent_models(args) else claimed(args, settings_of(args)):
        return _train(args)


def parsed(argv: list[str]) -> Namespace:
    """The run's settings. Raises UserError for what one of the parsers refuses, or a host that is not supported."""
    shaping, host_argv = split_flags([word for word in argv if word != ON_CPU])
    methods.load(shaping.method)
    if {"-h", "--help"} & set(argv):
        _print_help()  # the host's parser adds its own and ends
    else:
        import_cluster_host(on_cpu=ON_CPU in argv)
    args = parse(host_argv, "ray")
    args.shaping = shaping
    return args


def _print_help() -> None:
    parser = argparse.ArgumentParser(prog="abc-rlhf ray", add_help=False, usage="abc-rlhf ray [flags]")
    add_flags(parser)
    parser.add_argument(ON_CPU, action="store_true", help="run the whole stack on this machine's CPU, to try it out")
    print(__doc__.strip(), parser.format_help(), "OpenRLHF's flags:", sep="\n\n", flush=True)


def _train(args: Namespace) -> int:
    import ray

    kept = f"checkpoints, if any, are in {args.ckpt.path}: --ckpt.load_enable goes on"
    try:
        with writing(args.ckpt.output_dir, kept):
            try:
                importlib.import_module("openrlhf.cli.train_ppo_ray").train(args)
            except (ray.exceptions.RayTaskError, ray.exceptions.RayActorError) as error:
                raise _cause(error) from error
    except SystemExit as error:  # what Ray makes of a SIGTERM
        if error.code not in (signal.SIGTERM, Terminated.status):
            raise
        print(f"abc-rlhf ray: stopped; {kept}")
        raise Terminated from None
    print(f"done: policy in {args.ckpt.output_dir}")
    return 0


def _cause(error: Exception) -> Exception:
    """What a worker raised, without Ray's wrapping, where it is one of ours or a worker's death."""
    import ray

    cause = error
    while isinstance(cause, ray.exceptions.RayTaskError):
        cause = cause.cause
    if isinstance(cause, UserError | CreditError | CannotWrite | OSError):  # of these, ``writing`` takes a full disk
        return cause
    if not isinstance(cause, ray.exceptions.RayActorError):
        return error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if "creation task" in lines[0]:  # its text ends as the traceback does: with the exception
        kind, _, reason = lines[-1].partition(": ")
        ours = {"abc_plugin.errors.UserError": UserError, "abc_plugin.errors.CreditError": CreditError}
        return ours[kind](reason) if kind in ours else WorkerDied(f"a Ray worker could not start: {lines[-1]}")
    return WorkerDied(
        f"a Ray worker died: {' '.join(lines)[:400]}. Nothing is trained on a half-finished step; go on from the last "
        "checkpoint with --ckpt.load_enable and the same flags (a process out of memory dies like this, too)"
    )
