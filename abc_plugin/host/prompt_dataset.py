"""The prompt dataset, as the host reads it, before anything is loaded."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from openrlhf.datasets import PromptDataset
from openrlhf.datasets.utils import blending_datasets

from abc_plugin.errors import UserError, first_line
from abc_plugin.jsonl import read_jsonl


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
        if Path(data_args.prompt_dataset).suffix == ".jsonl" and Path(data_args.prompt_dataset).is_file():
            read_jsonl(data_args.prompt_dataset, "mend or remove the line")  # names a line that is no JSON
        error = error.__cause__ or error
        reason = first_line(error)
        split = f"split {data_args.prompt_split!r}"
        raise UserError(f"{source} ({split}) cannot be read: {reason}") from None
    for name, key in (("input", data_args.input_key), ("label", data_args.label_key)):
        if key and key not in data.column_names:
            raise UserError(f"{source} has no key {key!r}, only {', '.join(data.column_names)}; set --data.{name}_key")
    data = data.select(range(min(data_args.max_samples, len(data))))
    try:
        prompts = list(data[data_args.input_key])
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is no UTF-8 text ({error}); save it as such") from None
    for row, prompt in enumerate(prompts, start=1):
        where = f"in row {row} (key {data_args.input_key!r})"
        if prompt is None or prompt == [] or (isinstance(prompt, str) and not prompt.strip()):
            raise UserError(f"{source} has an empty prompt {where}; remove the row")
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and data_args.apply_chat_template):
            raise UserError(
                f"{source} has a prompt that is no text {where}: {str(prompt)[:60]}; give strings, or lists of "
                "messages with --data.apply_chat_template"
            )
    return data


def rendered(args: Namespace, rows: Iterable[dict], tokenizer: Any) -> list[str]:
    """The prompts as the policy is given them, in the chat template or the input template.

    Raises UserError where a template is missing or does not take a row, naming it.
    """
    template, row = args.data.input_template, 0
    if args.data.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise UserError("--data.apply_chat_template: the policy's tokenizer has no chat template; save one with it")

    def counted() -> Iterator[dict]:
        nonlocal row
        for row, fields in enumerate(rows, start=1):  # noqa: B007
            yield fields

    try:
        return PromptDataset(counted(), tokenizer, quiet_strategy(args), input_template=template).prompts
    except Exception as error:  # templates raise errors of their own
        reason = first_line(error)
        if template:
            raise UserError(
                f"--data.input_template {template!r} cannot be filled in ({type(error).__name__}: {reason}): "
                "{} stands for the prompt; write other braces twice, {{ and }}"
            ) from None
        raise UserError(
            f"--data.prompt_dataset {args.data.prompt_dataset}: the policy's chat template refuses row {row}: {reason}"
        ) from None


def check_lengths(args: Namespace, texts: Sequence[str], tokenizer: Any) -> None:
    """Prints how many prompts lose their front to ``--data.max_len``.

    Raises UserError where nothing else is left, and for a prompt without a token.

    texts: as ``rendered``.
    """
    longest, new = args.data.max_len, args.rollout.max_new_tokens
    room = longest - (new or 1)
    # A token has at least a byte; what has no letter or digit may have no token, as control characters in WordPiece.
    rows = [row for row, text in enumerate(texts) if len(text.encode()) >= room or not re.search(r"\w", text)]
    ids = tokenizer([texts[row] for row in rows], add_special_tokens=False)["input_ids"] if rows else []
    for row, tokens in zip(rows, ids, strict=True):
        if not tokens:
            raise UserError(
                f"--data.prompt_dataset {args.data.prompt_dataset}: row {row + 1}, {texts[row]!r}, has no tokens; "
                "remove it"
            )
    cut = {row: tokens for row, tokens in zip(rows, ids, strict=True) if len(tokens) > room}
    if not cut:
        return
    limit = f"--data.max_len {longest}" + (f" less --rollout.max_new_tokens {new}" if new else "")
    [empty] = rendered(args, [{args.data.input_key: "x", args.data.label_key: ""}], tokenizer)
    template = tokenizer(empty, add_special_tokens=False)["input_ids"][-room:]
    for row, tokens in cut.items():
        if tokens[-room:] == template:
            raise UserError(
                f"--data.prompt_dataset {args.data.prompt_dataset}: of row {row + 1}, {len(tokens)} tokens long, "
                f"{limit} leaves the last {room}, which are the template's own: the policy would not see the "
                "prompt; raise --data.max_len"
            )
    print(
        f"abc_plugin: {len(cut)} of {len(texts)} prompts lose their front: {limit} leaves {room} tokens "
        f"(longest {max(map(len, cut.values()))})"
    )


def check_rollouts(args: Namespace, prompts: int, ranks: int, *, saves: bool = False) -> None:
    """Every step trains on its whole rollout and leaves nothing to the next.

    ranks: that share out a batch.  saves: whether there are checkpoints, which hold no part of a gradient: then a
    rollout must fill whole training batches, otherwise only the last one of an episode, whose rest would be lost.
    Raises UserError; prints where OpenRLHF carries a rest's gradient into the next step.
    """
    train, rollout = args.train, args.rollout
    if args.algo.dynamic_filtering_enable or train.dynamic_batch_enable:  # their sizes are not known before
        return
    steps, frozen = train.num_episodes * math.ceil(prompts / rollout.batch_size), args.critic.freezing_steps
    if frozen >= steps:
        raise UserError(
            f"--critic.freezing_steps {frozen}: the run has {steps} steps, so the policy would never be trained; give "
            "fewer, or more --train.num_episodes"
        )
    unit, copies = train.micro_batch_size * ranks, rollout.n_samples_per_prompt

    def wastes(samples: int) -> bool:
        updates = samples // unit * train.max_epochs * unit / train.batch_size
        return samples % unit > 0 or updates == 0 or updates % 1 > 0

    rest = prompts % rollout.batch_size if prompts > rollout.batch_size else 0
    whole = min(prompts, rollout.batch_size) * copies
    if wastes(whole):
        words = f"a rollout has {whole} completions, no multiple of --train.batch_size {train.batch_size}"
        if saves:
            raise UserError(
                f"{words}: OpenRLHF carries the rest's gradient into the next step, but not into a checkpoint; give "
                "another --train.batch_size, or leave --ckpt.save_steps out"
            )
        print(f"abc_plugin: {words}: the rest waits for the next step, and that of the last step is not trained on")
    elif wastes(rest * copies) and rest:
        raise UserError(
            f"the last rollout of an episode has {rest * copies} completions, which fill no whole --train.batch_size "
            f"{train.batch_size} and would not be trained on; give --data.max_samples {prompts - rest}"
        )
