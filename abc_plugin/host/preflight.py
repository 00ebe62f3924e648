"""What can be refused on Ray before a GPU is taken."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path

from abc_plugin.config import ShapingConfig
from abc_plugin.credit import methods
from abc_plugin.errors import UserError
from abc_plugin.host.checks import READ, check_models, is_absent, read_data
from abc_plugin.host.options import flag, option


def preflight(args: Namespace, shaping: ShapingConfig) -> None:
    """Check models, heads, tokenizers and the attention tap from files alone.

    With a remote reward there is no reward model here; its replies are checked when they come. Models that are not on
    this machine are checked by the reward model's worker before it loads (``args.shaping_checked`` is False then).
    Raises UserError as ``checks.check_models``, and for settings that a remote reward cannot heed.
    """
    for source in ("reward.remote_url", "train.agent_func_path"):
        if option(args, source):
            _remote(flag(args, source), shaping)
            return
    paths = [option(args, f"{name}.model_name_or_path") for name in ("actor", "reward", "critic")]
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
    for field in dataclasses.fields(shaping):
        given = getattr(shaping, field.name)
        if field.name not in ("method", "beta") and given != getattr(default, field.name):
            raise UserError(
                f"{field.metadata['flag']} {given} means nothing with {source}: it is the business of whoever scores "
                "(abc-rlhf serve-rm takes --shaping.layer and --shaping.recovery)"
            )
    if shaping.dense and methods.load(shaping.method).needs_attention:
        print(
            f"abc_plugin: {source} is set: --reward_shaping {shaping.method} needs credit_spans in every reply "
            "(abc-rlhf serve-rm sends them); a reply without ends the run"
        )


def _prompts(args: Namespace) -> list[str]:
    """Some prompts for both tokenizers to read, where they lie in a file on this machine; flat hosts' are not read."""
    if not hasattr(args, "data") or not Path(args.data.prompt_dataset or "").is_file():
        return []
    return [prompt for prompt in read_data(args)[args.data.input_key][:READ] if isinstance(prompt, str)]
