"""The prompt dataset, as the host reads it, before anything is loaded."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace

from datasets import Dataset
from openrlhf.datasets.utils import blending_datasets

from abc_plugin.errors import UserError


def quiet_strategy(args: Namespace) -> SimpleNamespace:
    """What the host's dataset functions want of a strategy, without its output."""
    return SimpleNamespace(print=lambda *_: None, is_rank_0=lambda: False, args=args)


def read_data(args: Namespace) -> Dataset:
    """The prompt dataset as the host reads it; refuses a missing key and a prompt that is empty or no text."""
    data_args = args.data
    source = f"--data.prompt_dataset {data_args.prompt_dataset}"
    try:
        data = blending_datasets(
            data_args.prompt_dataset,
            data_args.prompt_probs,
            quiet_strategy(args),
            args.train.seed,
            max_count=data_args.max_samples,
            dataset_split=data_args.prompt_split,
        )
    except Exception as error:  # datasets raises many kinds; each means the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        split = f"split {data_args.prompt_split!r}"
        raise UserError(f"{source} ({split}) cannot be read: {reason}") from None
    for name, key in (("input", data_args.input_key), ("label", data_args.label_key)):
        if key and key not in data.column_names:
            raise UserError(f"{source} has no key {key!r}, only {', '.join(data.column_names)}; set --data.{name}_key")
    data = data.select(range(min(data_args.max_samples, len(data))))
    for row, prompt in enumerate(data[data_args.input_key], start=1):
        where = f"in row {row} (key {data_args.input_key!r})"
        if prompt is None or prompt == [] or (isinstance(prompt, str) and not prompt.strip()):
            raise UserError(f"{source} has an empty prompt {where}; remove the row")
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and data_args.apply_chat_template):
            raise UserError(
                f"{source} has a prompt that is no text {where}: {str(prompt)[:60]}; give strings, or lists of "
                "messages with --data.apply_chat_template"
            )
    return data
