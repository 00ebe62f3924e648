"""What can be refused on Ray before a GPU is taken."""

from __future__ import annotations

from argparse import Namespace

from abc_plugin.config import ShapingConfig
from abc_plugin.credit import methods
from abc_plugin.host.checks import check_models, is_absent
from abc_plugin.host.options import flag, option


def preflight(args: Namespace, shaping: ShapingConfig) -> None:
    """Check models, heads, tokenizers and the attention tap from files alone, for methods that move reward.

    With a remote reward there is no reward model here; its replies are checked when they come. Models that lie on the
    workers' disks only are checked there.
    Raises UserError as ``checks.check_models``.
    """
    if not shaping.dense and shaping.tokenizer_check == "strict":
        return
    for source in ("reward.remote_url", "train.agent_func_path"):
        if option(args, source):
            if methods.load(shaping.method).needs_attention:
                print(
                    f"abc_plugin: {flag(args, source)} is set: --reward_shaping {shaping.method} needs credit_spans "
                    "in every reply (abc-rlhf serve-rm sends them); a reply without ends the run"
                )
            return
    paths = [option(args, f"{name}.model_name_or_path") for name in ("actor", "reward", "critic")]
    if absent := [path for path in paths if path and is_absent(path)]:
        print(f"abc_plugin: not on this machine, so checked when the workers load them: {', '.join(absent)}")
        return
    check_models(args, shaping, runs_here=False)
