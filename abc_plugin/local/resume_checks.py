"""Decides, before a model is loaded, whether a run resumes and from where."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError
from abc_plugin.local import ranks
from abc_plugin.local.checkpoints import PARTS, Checkpoints, versions

# Settings that do not shape the curve, by the beginning of their names; all others must be those of the checkpoint.
MAY_CHANGE = {
    "ckpt.": "where and how often checkpoints are saved",
    "logger.": "what is logged, and where",
    "vllm.": "there are no engines",
    "local_rank": "the launcher's",
    "shaping.show_": "completions that are recorded to look at",
    "local.merge_adapter": "how the policy is saved in the end",
    "train.num_episodes": "a run may be made longer or shorter; it is said that the learning rate's schedule changes",
}


def prepare(args: Namespace, prompts: Sequence[object]) -> Checkpoints:
    """Decide, before a model is loaded, where the run starts; sets ``args.ckpt.load_enable`` to whether it resumes.

    A run that goes on keeps its name, so that its curves stay one. Raises UserError when it cannot go on as asked, and
    when it would write among another run's checkpoints.
    """
    again, saves = args.ckpt.load_enable, args.ckpt.save_steps > 0 and not args.ckpt.disable_ds
    run = Checkpoints(Path(args.ckpt.path), settings_of(args, prompts), ranks.place().size, again=again)
    _check_kind(args, run, saves)
    if saves:
        _check_whole_batches(args, len(prompts))
    if again:
        _find(run)
        args.ckpt.load_enable = run.step > 0
    elif saves and (steps := run.steps()):
        raise UserError(
            f"--ckpt.path {run.root} has a run's checkpoints, the last of step {steps[0]}: add --ckpt.load_enable to "
            "go on from it, or give another directory, or remove this one"
        )
    if (saves or run.step) and ranks.place().rank == 0:
        args.logger.wandb.run_name = run.claim(args.logger.wandb.run_name)
    return run


def _find(run: Checkpoints) -> None:
    """Take the newest checkpoint that is whole, if there is one and it is this run's."""
    step = _newest_undamaged(run)
    if step is None:
        _say(f"--ckpt.load_enable: no complete checkpoint in {run.root}, the run starts from its first step")
        return
    run.manifest = run.read(step)
    _check_same(run)
    run.started -= run.manifest["seconds"]
    _say(f"goes on from step {step}, {run.directory(step)}")


def _check_kind(args: Namespace, run: Checkpoints, saves: bool) -> None:
    """Checkpoints of the kind asked for, or found, can be gone on from to the bit."""
    options, ours = args.ckpt, (run.root / "complete").is_dir()
    weights = sorted(run.root.glob("global_step*_hf"), key=lambda path: path.stat().st_mtime)
    if options.load_enable and (options.disable_ds or (weights and not ours)):
        remedy = f"--actor.model_name_or_path {weights[-1]} starts from its weights" if weights else "leave it out"
        raise UserError(
            f"--ckpt.load_enable cannot go on from {run.root}: --ckpt.disable_ds saves no optimiser; {remedy}"
        )
    if not (options.load_enable or saves):
        return
    if args.ds.use_universal_ckpt:
        raise UserError("--ds.use_universal_ckpt: this driver goes on only from checkpoints of its own; leave it out")
    if args.train.enable_ema:
        raise UserError(
            "--train.enable_ema: OpenRLHF's checkpoints lack the averaged weights, so no run can go on from them; "
            "leave it out, or save weights only with --ckpt.disable_ds --ckpt.save_hf"
        )
    if run.present("_actor") and not ours:
        raise UserError(
            f"--ckpt.path {run.root} has checkpoints that abc-rlhf local did not write: their data order and random "
            "numbers are unknown; give another directory"
        )


def _check_whole_batches(args: Namespace, prompts: int) -> None:
    """No step leaves part of a gradient to the next: the host would, and no checkpoint of DeepSpeed holds it."""
    train, rollout, size = args.train, args.rollout, ranks.place().size
    window = train.batch_size // (train.micro_batch_size * size)
    rest = prompts % rollout.batch_size
    rollouts = [("a rollout", rollout.batch_size)] if prompts > rest else []
    if rest and train.num_episodes > 1:  # nothing comes after the last
        rollouts.append(("the last rollout of an episode", rest))
    for which, count in rollouts:
        samples = count * rollout.n_samples_per_prompt
        if samples // (train.micro_batch_size * size) * train.max_epochs % window:
            whole = count == rest and prompts > rest
            remedy = f"--data.max_samples {prompts - rest}" if whole else "another --train.batch_size"
            raise UserError(
                f"{which} has {samples} completions, no multiple of --train.batch_size {train.batch_size}: OpenRLHF "
                f"carries the rest's gradient into the next step, but not into a checkpoint; give {remedy}, or leave "
                "--ckpt.save_steps out"
            )


def _newest_undamaged(run: Checkpoints) -> int | None:
    """The newest complete checkpoint whose files are all there; says which ones are passed over."""
    complete = run.steps()
    half = run.present(*PARTS) - set(complete)
    if newer := sorted(step for step in half if step > max(complete, default=0)):
        _say(f"half-written and left unread: the checkpoint of step {', '.join(map(str, newer))}")
    for step in complete:
        if (damage := run.damage(step)) is None:
            return step
        _say(f"the checkpoint of step {step} is damaged and left unread: {damage}")
    if complete:
        raise UserError(f"no checkpoint in {run.root} is whole: {damage}; give another --ckpt.path to start anew")
    return None


def _check_same(run: Checkpoints) -> None:
    """The checkpoint was made with the same settings and as many ranks; other versions are only said."""
    manifest, where = run.manifest, run.directory(run.step)
    if manifest["ranks"] != run.ranks:
        raise UserError(
            f"{where} was saved by {manifest['ranks']} ranks and this run has {run.ranks}: the optimiser's state is "
            f"split among them; start it with {manifest['ranks']}"
        )
    then, now = manifest["settings"], run.settings
    other = [name for name in then if name in now and then[name] != now[name]]
    if refused := [f"{name} {then[name]} (now {now[name]})" for name in other if not _free(name)]:
        raise UserError(
            f"{where} was made with other settings: {', '.join(refused)}; give them as they were, or another "
            "--ckpt.path to start anew"
        )
    for name in {"--train.num_episodes"} & set(other):
        _say(f"{name} was {then[name]} and is {now[name]}: the learning rate follows the new schedule from here on")
    for name, version in versions().items():
        if manifest["versions"].get(name) != version:
            _say(
                f"WARNING: the checkpoint was made with {name} {manifest['versions'].get(name)}, this is {version}: "
                "the curve may differ from an uninterrupted one"
            )


def _free(name: str) -> bool:
    return name.removeprefix("--").startswith(tuple(MAY_CHANGE))


def by_flag(args: Namespace) -> dict[str, Any]:
    """Every setting of a run, the host's and the plugin's, by its flag."""
    ours = {setting.metadata["flag"]: getattr(args.shaping, setting.name) for setting in fields(ShapingConfig)}
    return {f"--{name}": value for name, value in _flat(args)} | ours


def settings_of(args: Namespace, prompts: Iterable[object]) -> dict[str, Any]:
    """``by_flag``, as JSON gives it back, and a hash of the prompts."""
    flat = by_flag(args)
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt).encode() + b"\n")
    flat["--data.prompt_dataset (contents)"] = digest.hexdigest()[:12]
    return json.loads(json.dumps(flat, default=str))


def _flat(namespace: Namespace, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(namespace).items():
        if isinstance(value, SimpleNamespace):  # what the host nests its settings in
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "shaping":
            yield f"{prefix}{name}", value


def _say(line: str) -> None:
    print(f"abc-rlhf local: {line}")
