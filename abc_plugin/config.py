"""The plugin's settings: one frozen dataclass, the only home of names, defaults, help texts and checks."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from abc_plugin.errors import UserError

CHOICES = {
    "recovery": ("auto", "tap", "eager-rerun"),
    "tokenizer_check": ("strict", "map", "off"),
    "reward_text": ("plain", "special", "chat"),
    "segment": ("none", "sentence", "turn"),
}


def _setting(flag: str, default: Any, type_: type, help_: str) -> Any:
    return field(default=default, metadata={"flag": flag, "type": type_, "help": help_})


@dataclass(frozen=True)
class ShapingConfig:
    """How the scalar reward is spread over the tokens.

    Raises UserError when a value is out of range. That ``method`` names a registered method is checked by
    ``credit.methods.load``: others may register methods, so it is not a list kept here.
    """

    method: str = _setting(
        "--reward_shaping", "none", str, "none (sparse, the host's own), abc, uniform, or a registered method's name"
    )
    beta: float = _setting(
        "--shaping.beta", 0.8, float, "weight of the dense part in [0, 1]; 0 is the sparse reward (paper, eq. 8)"
    )
    layer: str = _setting(
        "--shaping.layer",
        "last_full",
        str,
        "layer whose attention is read, of the reward model or for abc_d of the policy: last_full (last with full "
        "attention), last, or an index (negative counts from the end)",
    )
    heads: str = _setting(
        "--shaping.heads", "all", str, "heads of that layer whose attention is averaged: all, or indices such as 0,3,5"
    )
    drop: str = _setting(
        "--shaping.drop",
        "none",
        str,
        "tokens whose share goes to the others: special, sinks (the last token, whose attention is read and which "
        "attends to itself), special,sinks or none",
    )
    entropy_floor: float = _setting(
        "--shaping.entropy_floor",
        0.0,
        float,
        "least entropy of a response's credit, as a fraction of that of uniform credit, in [0, 1]: mixed with uniform "
        "just enough",
    )
    segment: str = _setting(
        "--shaping.segment",
        "none",
        str,
        "credit is pooled on the last token of each sentence, or of each turn of an agent: none, sentence or turn",
    )
    calls: int = _setting(
        "--shaping.calls",
        16,
        int,
        "with shapley: runs of the reward model per response besides the one that scores it, at least 2; its segments "
        "are merged to at most (calls + 1) / 2",
    )
    recovery: str = _setting(
        "--shaping.recovery",
        "auto",
        str,
        "how attention is recovered: auto (from the forward that runs anyway), tap (only so), or eager-rerun (the "
        "reference, which runs the layer's attention a second time)",
    )
    tokenizer_check: str = _setting(
        "--shaping.tokenizer_check",
        "strict",
        str,
        "policy and reward model with different tokenizers: strict (refuse), map (the reward model reads the text in "
        "its own tokens, its credit is carried back by characters), or off (the reward model reads the policy's ids)",
    )
    reward_text: str = _setting(
        "--shaping.reward_text",
        "plain",
        str,
        "with map, what the reward model reads: plain (the sequence's text), special (and its own special tokens "
        "around it), or chat (prompt and response in its own chat template)",
    )
    show_every: int = _setting(
        "--shaping.show_every",
        10,
        int,
        "record completions with credit, value and advantage per token in step 1 and every so many steps, for "
        "abc-rlhf show and report; 0 never",
    )
    show_samples: int = _setting("--shaping.show_samples", 4, int, "completions recorded each time")
    share_base: bool = _setting(
        "--local.share_base", False, bool, "with LoRA: the critic is a second adapter and a head on the policy's base"
    )
    merge_adapter: bool = _setting(
        "--local.merge_adapter", False, bool, "with LoRA: also save the policy with the adapter merged into it"
    )

    train_layers: int = _setting(
        "--local.train_layers",
        0,
        int,
        "train only the last so many layers of policy and critic; the others are frozen and run once per completion, "
        "which is cheaper; 0 trains all",
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise UserError(f"--shaping.beta {self.beta} is outside [0, 1]; the reference runs used 0.8")
        if self.layer not in ("last_full", "last") and not self.layer.removeprefix("-").isdecimal():
            raise UserError(f"--shaping.layer {self.layer!r} is neither last_full, last nor a layer index such as -1")
        if self.heads != "all" and not all(word.isdecimal() for word in self.heads.split(",")):
            raise UserError(f"--shaping.heads {self.heads!r} is neither all nor a list of head indices such as 0,3,5")
        if unknown := self.dropped - {"special", "sinks"}:
            raise UserError(f"--shaping.drop {min(unknown)!r} is none of special, sinks, or special,sinks, or none")
        if not 0.0 <= self.entropy_floor <= 1.0:
            raise UserError(f"--shaping.entropy_floor {self.entropy_floor} is outside [0, 1]; 0 sets none")
        if self.calls < 2:
            raise UserError(
                f"--shaping.calls {self.calls}: Shapley values need the scores of the prompt alone and of a part of "
                "the response: give at least 2"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"--shaping.{name} {getattr(self, name)!r} is none of {', '.join(choices)}")
        if self.show_every < 0 or self.show_samples < 1:
            flag = f"--shaping.show_every {self.show_every}, --shaping.show_samples {self.show_samples}"
            raise UserError(f"{flag}: give 0 (never) or more, and at least 1 completion")
        if self.train_layers < 0:
            raise UserError(f"--local.train_layers {self.train_layers}: give the number of layers, or 0 to train all")
        if self.reward_text != "plain" and self.tokenizer_check != "map":
            raise UserError(f"--shaping.reward_text {self.reward_text} needs --shaping.tokenizer_check map")

    @property
    def dropped(self) -> frozenset[str]:
        """The kinds of ``--shaping.drop``."""
        return frozenset(self.drop.split(",")) - {"none"}

    @property
    def head_list(self) -> list[int] | None:
        """The indices of ``--shaping.heads``; None for all."""
        return None if self.heads == "all" else sorted({int(word) for word in self.heads.split(",")})

    @property
    def dense(self) -> bool:
        """Whether any reward moves off the last token."""
        return self.method != "none" and self.beta > 0.0


def add_flags(parser: argparse.ArgumentParser, names: Container[str] | None = None) -> None:
    """Add one flag per setting, or per one of those named, with the dataclass's default."""
    group = parser.add_argument_group("reward shaping (abc_plugin)")
    for setting in dataclasses.fields(ShapingConfig):
        if names is not None and setting.name not in names:
            continue
        flag, type_, help_ = (setting.metadata[key] for key in ("flag", "type", "help"))
        dest = f"shaping.{setting.name}"
        if type_ is bool:
            group.add_argument(flag, dest=dest, action="store_true", help=help_)
        else:
            help_ += f" (default {setting.default})"
            metavar = setting.name.upper()
            group.add_argument(flag, dest=dest, metavar=metavar, type=type_, default=setting.default, help=help_)


def split_flags(argv: list[str]) -> tuple[ShapingConfig, list[str]]:
    """Take the plugin's flags out of ``argv``; what is left is for OpenRLHF's own parser.

    Abbreviations are off, so a host flag is never mistaken for one of ours. A flag that starts like ours and is none
    of them (a typing slip such as ``--shaping.bta``) is refused here: the host would not know whose it is.
    """
    parser = argparse.ArgumentParser(prog="abc-rlhf", allow_abbrev=False, add_help=False, exit_on_error=False)
    add_flags(parser)
    try:
        ours, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    known = ", ".join(setting.metadata["flag"] for setting in dataclasses.fields(ShapingConfig))
    for word in rest:
        if word.startswith(("--shaping.", "--reward_shaping", "--local.")):
            raise UserError(f"unknown flag {word.split('=')[0]}; the plugin's flags are {known}")
    return ShapingConfig(**{name.removeprefix("shaping."): value for name, value in vars(ours).items()}), rest
