"""OpenRLHF's own command-line parser, reused: a flag means here what it means there."""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib.util
import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, NoReturn

from abc_plugin.config import ShapingConfig
from abc_plugin.errors import UserError, first_line
from abc_plugin.output_directory import CONTENTS

CLI = "openrlhf.cli.train_ppo_ray"
# What the commands that run on this machine offer besides, by the host's flag: many CPUs have no fast bf16.
MORE_OPTIONS = {"--ds.param_dtype": {"choices": ["bf16", "fp16", "fp32"]}}

LIMITS = ("max_", "clip", "range")  # in the names of settings that may be infinite
COUNTS = ("batch_size", "samples_per_prompt", "max_samples", "num_episodes", "max_epochs", "max_num", "logging_steps")
SIZES = (".lr", ".eps", "weight_decay", "eps_clip", "low_high", "value_clip", "max_norm", "init_coef", "temperature")
# By the ends of settings' names: what they may be, in words and as a test. With others nothing is computed, or
# nonsense, or PyTorch ends the run once the models are loaded.
RANGES = (
    ((*COUNTS, "kl.horizon", "data.max_len"), "1 or more", lambda value: value >= 1),
    (SIZES, "0 or more", lambda value: value >= 0),
    (("kl.target",), "above 0", lambda value: value > 0),
    (("betas",), "in [0, 1)", lambda value: 0 <= value < 1),
    (("gamma", "lambd", "lr_warmup_ratio", "min_lr_ratio"), "in [0, 1]", lambda value: 0 <= value <= 1),
    (("top_p",), "in (0, 1]", lambda value: 0 < value <= 1),
    (("save_steps", "eval.steps"), "-1 (never), or 1 or more", lambda value: value == -1 or value >= 1),
    (("zero_stage",), "0, 1, 2 or 3", lambda value: value in (0, 1, 2, 3)),
    (("seed",), "0 or more, below 2^32", lambda value: 0 <= value < 2**32),
)


GROUPED = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")  # take the mean of the prompt's other responses off
DISCOUNTED = ("gae", "reinforce")  # the estimators for which the host takes gamma; for all others it is 1

# Methods whose credit a critic that starts as the reward model has in its values already: the difference that a token
# makes to the score of the text so far. Paid on top it counts twice, until the critic has unlearned it.
COUNTED_TWICE = ("uniform", "abc", "abc_d", "abc_d2")
# (1 - gamma) x tokens beyond which a reward on the last token is lost to most of the others: abc_signed at gamma 0.8
# earned more than none at gamma 1 with 30 tokens, and less with 64 (launch/study/small).
FORGOTTEN = 10


class _Parsed(BaseException):
    """Carries the parsed arguments out of the host's script."""


def parse(argv: list[str], command: str = "local", script: str = CLI, **names: Any) -> Namespace:
    """``args`` as a script of the host hands them to its ``train`` or reward server: validated, and nested as there.

    ``command`` stands for the program's name in help and errors; ``names`` of the script's module are used as given.

    The parser is not importable: it stands under ``if __name__ == "__main__"``, below imports of the whole training
    stack. So only that block is run, from the line that makes the parser (a patched host asks its plugins before), and
    with names of our own for ``argparse.ArgumentParser`` and for what would use the arguments. ``--help`` ends there,
    before any import.
    Raises UserError for what the host's script refuses, and when it is not installed.
    """
    if importlib.util.find_spec("openrlhf") is None:
        raise UserError("not installed: openrlhf; run bash launch/environment.sh, or pip install it")

    more_options = {} if command == "ray" else MORE_OPTIONS

    class Parser(argparse.ArgumentParser):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"prog": f"abc-rlhf {command}"})

        def add_argument(self, *flags: str, **options: Any) -> argparse.Action:
            return super().add_argument(*flags, **options | more_options.get(flags[0], {}))

        def parse_args(self) -> Namespace:
            return super().parse_args(argv)

        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message} (flags are OpenRLHF's: {self.prog} --help)")

    def stop(args: Namespace) -> NoReturn:
        raise _Parsed(args)

    names |= {"argparse": SimpleNamespace(**vars(argparse) | {"ArgumentParser": Parser})}
    try:
        exec(_parsing_code(script), names | {"train": stop, "RewardModelProxy": stop})
    except _Parsed as parsed:
        _check_numbers(parsed.args[0])
        return parsed.args[0]
    except UserError:
        raise
    except Exception as error:  # assertions, and what the script trips over when a value makes no sense
        reason = first_line(error)
        hint = " (one process runs without vLLM engines)" if command == "local" else ""
        raise UserError(f"OpenRLHF refused the flags: {reason}{hint}") from None
    raise RuntimeError(f"{script} ended without using its arguments: this OpenRLHF version is not supported")


def flat(args: Namespace, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The host's nested settings by their dotted names."""
    for name, value in vars(args).items():
        if isinstance(value, SimpleNamespace):  # what the host nests its settings in
            yield from flat(value, f"{prefix}{name}.")
        elif name != "shaping":
            yield f"{prefix}{name}", value


def flag_values(args: Namespace) -> dict[str, Any]:
    """Every setting of a run, the host's and the plugin's, by its flag."""
    ours = {setting.metadata["flag"]: getattr(args.shaping, setting.name) for setting in fields(ShapingConfig)}
    return {f"--{name}": value for name, value in flat(args)} | ours


def settings_of(args: Namespace, prompts: Iterable[object] | None = None) -> dict[str, Any]:
    """``flag_values``, as JSON gives them back, and a hash of each model's files and, where given, of the prompts."""
    from abc_plugin.attention.model_files import contents

    values = flag_values(args)
    if prompts is not None:
        digest = hashlib.sha256()
        for prompt in prompts:
            digest.update(json.dumps(prompt).encode() + b"\n")
        values[f"--data.prompt_dataset{CONTENTS}"] = digest.hexdigest()[:12]
    for name, value in flat(args):
        if name.endswith("model_name_or_path") and value:
            values[f"--{name}{CONTENTS}"] = ",".join(map(contents, map(str.strip, value.split(","))))
    del values["--logger.wandb.key"]  # what this returns is written down
    return json.loads(json.dumps(values, default=str))


def _check_numbers(args: Namespace) -> None:
    """No setting is NaN or outside its range, and none infinite but limits. Raises UserError."""
    for name, value in flat(args):
        numbers = value if isinstance(value, list | tuple) else [value]
        for number in (each for each in numbers if isinstance(each, int | float)):
            unlimited = number in (math.inf, -math.inf) and any(word in name for word in LIMITS)
            if not math.isfinite(number) and not unlimited:
                raise UserError(f"--{name} {number} is nothing to compute with; give a finite number")
            for ends, words, right in RANGES:
                if name.endswith(ends) and not right(number):
                    raise UserError(f"--{name} {number} has no meaning; give a number that is {words}")
        if name.endswith("clip_range") and numbers[0] > numbers[1]:
            raise UserError(f"--{name} {numbers[0]} {numbers[1]} allows no reward; write the smaller end first")


def reward_models(args: Namespace) -> list[str]:
    """The paths of ``--reward.model_name_or_path``, which has commas between several."""
    return [path.strip() for path in (args.reward.model_name_or_path or "").split(",") if path.strip()]


def announce(args: Namespace, shaping: ShapingConfig) -> None:
    """Say what the method costs, and where it is not expected to gain anything. After ``check_models``."""
    from abc_plugin.credit import methods  # imports torch, for which --help need not wait

    if not shaping.dense:
        return
    name, needs = f"--reward_shaping {shaping.method}", methods.load(shaping.method).needs
    critic, advantage = args.critic.model_name_or_path, args.algo.advantage
    estimator, gamma, lambd = advantage.estimator, advantage.gamma, advantage.lambd
    longest = args.rollout.max_new_tokens or args.data.max_len
    long, shorter = (lambd > 0.8, "lambd 0.5") if estimator == "gae" else (True, "gamma 0.8")
    counted_twice = shaping.method in COUNTED_TWICE and critic in reward_models(args) and not shaping.share_base
    for holds, line in (
        (
            gamma != 1 and estimator not in DISCOUNTED,
            f"--algo.advantage.gamma {gamma} discounts credit; without it OpenRLHF has 1 for {estimator}",
        ),
        (
            gamma == 1 and long and "prefix" in needs,
            f"{name} earned more with --algo.advantage.{shorter}: its credit comes near its token, and a short "
            "horizon leaves the noise of later ones out (README.md)",
        ),
        (
            estimator != "gae" and "contribution" in needs and (1 - gamma) * longest > FORGOTTEN,
            f"WARNING: {name} leaves a rest of the reward with the last token, which --algo.advantage.gamma {gamma} "
            f"takes from most tokens of completions as long as {longest}: use gamma 1",
        ),
        (
            "shapley" in needs,
            f"{name} runs the reward model {shaping.calls} more times per response (--shaping.calls): "
            f"{shaping.calls + 1} times the cost of scoring it",
        ),
        (
            counted_twice,
            f"WARNING: {name} seldom gains where the critic starts as the reward model ({critic}), whose values tell "
            "it already; use --reward_shaping none or prefix with --algo.advantage.lambd 0.5",
        ),
    ):
        if holds:
            print(f"abc_plugin: {line}")


@functools.cache
def _parsing_code(module: str) -> CodeType:
    """The host's script from ``parser = argparse.ArgumentParser()`` to its end, after its imports of Python's own."""
    path = importlib.util.find_spec(module).origin
    script = ast.parse(Path(path).read_text(encoding="utf-8"), path)
    imports = [
        node
        for node in script.body
        if (isinstance(node, ast.Import) and all(_is_own(alias.name) for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and _is_own(node.module))
    ]
    block = next(node.body for node in reversed(script.body) if isinstance(node, ast.If))
    start = next(at for at, node in enumerate(block) if isinstance(node, ast.Assign))
    return compile(ast.Module([*imports, *block[start:]], type_ignores=[]), path, "exec")


def _is_own(module: str) -> bool:
    return module in sys.stdlib_module_names and module != "argparse"
