"""What can be refused on Ray before a GPU is taken."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path

from abc_plugin.config import ShapingConfig
from abc_plugin.credit import methods
from abc_plugin.credit.methods import policy_need
from abc_plugin.errors import UserError
from abc_plugin.host.checks import READ, check_models, check_policy, is_absent, read_data
from abc_plugin.host.ensemble import reward_models
from abc_plugin.host.method_checks import check_method
from abc_plugin.host.options import flag, option
from abc_plugin.local.lora_checks import refuse_on_ray

SCORERS = ("layer", "heads", "recovery", "tokenizer_check", "reward_text")  # settings that only who scores can heed


def preflight(args: Namespace, shaping: ShapingConfig) -> None:
    """Check models, heads, tokenizers and the attention tap from files alone.

    With a remote reward there is no reward model here; its replies are checked when they come. Models that are not on
    this machine are checked by the reward model's worker before it loads (``args.shaping_checked`` is False then).
    Raises UserError as ``checks.check_models``, and for settings that a remote reward cannot heed.
    """
    refuse_on_ray(args, shaping)
    for source in ("reward.remote_url", "train.agent_func_path"):
        if option(args, source):
            check_method(args, shaping, remote=flag(args, source))
            _remote(flag(args, source), shaping)
            if not is_absent(option(args, "actor.model_name_or_path")):
                check_policy(args, shaping, runs_here=False)
            return
    paths = [option(args, f"{name}.model_name_or_path") for name in ("actor", "critic")] + reward_models(args)
    absent = [path for path in paths if path and is_absent(path)]
    args.shaping_checked = not absent
    if absent and shaping.tokenizer_check == "map":
        raise UserError(f"--shaping.tokenizer_check map needs the models on the driver's machine too: {absent[0]}")
    if absent:
        print(f"abc_plugin: not on this machine, so checked by the worker that loads it: {', '.join(absent)}")
    else:
        check_models(args, shaping, _prompts(args), runs_here=False)


def _remote(source: str, shaping: ShapingConfig) -> None:
    default = ShapingConfig()
    heeded = ("layer", "recovery") if policy_need(shaping) else ()
    for field in dataclasses.fields(shaping):
        given = getattr(shaping, field.name)
        if field.name in SCORERS and field.name not in heeded and given != getattr(default, field.name):
            raise UserError(
                f"{field.metadata['flag']} {given} means nothing with {source}: it is the business of whoever scores "
                "(abc-rlhf serve-rm takes --shaping.layer, --shaping.heads and --shaping.recovery)"
            )
    if shaping.dense and "attention" in methods.load(shaping.method).needs:
        print(
            f"abc_plugin: {source} is set: --reward_shaping {shaping.method} needs credit_spans in every reply "
            "(abc-rlhf serve-rm sends them); a reply without ends the run"
        )


def _prompts(args: Namespace) -> list[str]:
    """Some prompts for both tokenizers to read, where they lie in a file on this machine; flat hosts' are not read."""
    if not hasattr(args, "data") or not Path(args.data.prompt_dataset or "").is_file():
        return []
    return [prompt for prompt in read_data(args)[args.data.input_key][:READ] if isinstance(prompt, str)]
