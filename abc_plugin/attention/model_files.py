"""Whether a model's files are the model that will run, asked before anything is loaded.

Names and shapes are those of the files' headers. transformers itself matches them with the model, on the meta device,
so that what it renames, converts or ties while it loads is no difference here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    get_verbosity,
    is_progress_bar_enabled,
    set_verbosity,
    set_verbosity_error,
)

from abc_plugin.attention.layers import skeleton
from abc_plugin.errors import UserError, first_line

CONTENTS = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py"}  # the files of a model that count
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# For cached_file: None where there is no such file.
QUIET = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)


def is_absent(path: str) -> bool:
    """Whether ``path`` names a directory, rather than a model of the hub, and it is not on this machine."""
    return not Path(path).expanduser().is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1)


def adapter_base(path: str) -> str | None:
    """The base model's path where ``path`` is a directory that PEFT wrote, else None."""
    file = Path(path).expanduser() / "adapter_config.json"
    return _from_json(file, "base_model_name_or_path") if file.is_file() else None


def _from_json(file: str | Path, key: str) -> Any:
    """The value of a key of a JSON file. Raises UserError where there is none."""
    try:
        value = json.loads(Path(file).read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError):
        value = None
    if not value:
        raise UserError(f"{file} is damaged: {key} cannot be read from it; save the model again")
    return value


def read_config(flag: str, path: str) -> PretrainedConfig:
    """The model's config. Raises UserError naming ``flag`` where there is no model, or an adapter only."""
    if is_absent(path):
        raise UserError(f"{flag} {path}: no such directory")
    if base := adapter_base(path):
        raise UserError(f"{flag} {path} is a LoRA adapter of {base}; merge it into that first")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=True)
    except (OSError, ValueError, TypeError) as error:  # TypeError: config.json is no object
        raise UserError(f"{flag} {path} is not a Hugging Face model: {first_line(error)}") from None


def read_headers(flag: str, path: str) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, on the meta device; of a directory or the hub.

    Raises UserError when it has no weights, or a file of them is missing or damaged.
    """
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):  # transformers' order
        if (found := cached_file(path, name, **QUIET)) is None:
            continue
        names = [name]
        if name.endswith(".json"):
            names = sorted(set(_from_json(found, "weight_map").values()))
        tensors = {}
        for part in names:
            file = cached_file(path, part, **QUIET)
            try:
                tensors |= load_state_dict(file, map_location="meta")
            except Exception as error:  # no file, or one cut short: each reader has its own kinds of error
                reason = first_line(error) if file else "it is missing"
                raise UserError(f"{flag} {path}: {part} of its weights cannot be read: {reason}") from None
        return tensors
    raise UserError(f"{flag} {path} has no weights ({SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}); save the model there")


def contents(path: str) -> str:
    """A hash, twelve hex digits, of all that decides what a model computes and reads: weights, config, tokenizer.

    Of a file above a GiB the size and 64 evenly spaced MiB of it are taken, its header among them.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        root = Path(cached_file(path, "config.json")).parent
    digest = hashlib.sha256()
    for file in sorted(file for file in root.iterdir() if file.suffix in CONTENTS and file.is_file()):
        size = file.stat().st_size
        step = size // 64 if size > 2**30 else 2**20
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as data:
            for start in range(0, size, step):
                data.seek(start)
                digest.update(data.read(2**20))
    return digest.hexdigest()[:12]


def check_weights(
    flag: str,
    path: str,
    config: PretrainedConfig,
    kind: type[PreTrainedModel] | None = None,
    *,
    head: str | None = None,
    new_head: bool = False,
) -> None:
    """Every weight of the model is in the files, in its shape: others would be random, with a warning only.

    kind: the class that will be loaded; None: a causal language model.  head: the name of its scalar head.
    new_head: it may be missing, as a critic's.  Prints what of the files the model does not use.  Of a quantised
    checkpoint, whose names and shapes are its method's, only the head is asked.  Raises UserError.
    """
    tensors, config = read_headers(flag, path), copy.deepcopy(config)
    missing, mismatched, unused = [], [], []
    if not getattr(config, "quantization_config", None):
        if kind is None:
            kind = type(skeleton(config, runs_here=False, name=f"{flag} {path}", auto=AutoModelForCausalLM))
        config._attn_implementation = "eager"  # the run's own need not be installed on this machine
        options = {"device_map": "meta", "ignore_mismatched_sizes": True, "output_loading_info": True}
        with _quiet():
            model, report = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
        missing = [name for name in model.state_dict() if name in report["missing_keys"]]
        mismatched = sorted(report["mismatched_keys"])
        unused = sorted(name for name in report["unexpected_keys"] if re.search(rf"\.\d+\.|^{head}\.", name))
    elif head and f"{head}.weight" not in tensors:
        missing = [f"{head}.weight"]
    if missing == [f"{head}.weight"]:
        if not new_head:
            raise UserError(
                f"{flag} {path} has no weight {head}.weight: it is no reward model, or its scalar head has another "
                "name, which --ds.value_head_prefix can give"
            )
    elif missing:
        prefixed = next((name for name in sorted(tensors) if name.endswith(f".{missing[0]}")), None)
        remedy = f"its files have {prefixed}: save it under the model's own names" if prefixed else "save it whole"
        raise UserError(
            f"{flag} {path} lacks {len(missing)} weights of its model, the first {missing[0]}, which would be random; "
            f"{remedy}"
        )
    if mismatched:
        name, there, wanted = mismatched[0]
        if name == f"{head}.weight":
            raise UserError(
                f"{flag} {path}: its head {name} is no scalar of the model's width ({_shape(there)} instead of "
                f"{_shape(wanted)}); use a reward model with one output"
            )
        raise UserError(
            f"{flag} {path}: {name} is {_shape(there)} in its files and {_shape(wanted)} by its config.json "
            f"({len(mismatched)} such weights)"
        )
    if unused:
        print(f"abc_plugin: {flag} {path}: {len(unused)} weights of its files are left out, the first {unused[0]}")


def _shape(size: Any) -> str:
    return "x".join(map(str, size))


def check_normalisation(flag: str, path: str, config: PretrainedConfig, asked: bool) -> None:
    """Mean and std of the scores in config.json are both there, as ``--reward.normalize_enable`` asks, or neither.

    Raises UserError.
    """
    given = {name: getattr(config, name) for name in ("mean", "std") if hasattr(config, name)}
    finite = all(isinstance(value, int | float) and math.isfinite(value) for value in given.values())
    if len(given) == 1 or not finite or given.get("std", 1) <= 0:
        raise UserError(
            f"{flag} {path}: its config.json has {given}: a mean and a std above 0 belong together; give both, or "
            "neither"
        )
    if asked and not given:
        raise UserError(
            f"--reward.normalize_enable: {flag} {path} has no mean and std of its scores in config.json, so nothing "
            "would be normalised; add them there, or leave it out"
        )


def check_reads(flag: str, path: str, config: PretrainedConfig, top_id: int, length: int, what: str) -> None:
    """The model has an embedding row for every id and a position for every token that it will be given.

    top_id: the greatest id.  length: of the longest sequence, in tokens, by the setting ``what``.  Raises UserError;
    only prints where positions are computed (rotary), and so have no end.
    """
    config = config.get_text_config()
    rows = getattr(config, "vocab_size", None)
    if rows is not None and top_id >= rows:
        raise UserError(
            f"{flag} {path} has {rows} embedding rows, none for the id {top_id} of the tokenizer whose ids it reads; "
            "use that tokenizer's model, or enlarge it (resize_token_embeddings) and save it again"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if not limit or length <= limit:
        return
    if not hasattr(config, "rope_parameters"):
        raise UserError(f"{what} {length} is more than the {limit} positions of {flag} {path}: lower it")
    print(
        f"abc_plugin: {flag} {path} was made for sequences of up to {limit} tokens (max_position_embeddings), and "
        f"{what} allows {length}"
    )


def check_savable(flag: str, path: str, tokenizer: Any) -> None:
    """What is saved beside the trained weights passes transformers' checks, which come at the end of a run only.

    Raises UserError.
    """
    base = adapter_base(path) or path
    with tempfile.TemporaryDirectory() as directory, _quiet():
        try:
            # A model without a generation_config.json gets one of its config.json.
            there = cached_file(base, GENERATION_CONFIG_NAME, **QUIET)
            name = GENERATION_CONFIG_NAME if there else CONFIG_NAME
            config = AutoConfig.from_pretrained(base, trust_remote_code=True)
            for part in (config, GenerationConfig.from_pretrained(base, config_file_name=name), tokenizer):
                part.save_pretrained(directory)
        except Exception as error:  # each file's writer has its own kinds of error
            reason = " ".join(str(error).split())
            raise UserError(f"{flag} {path}: transformers could not save the trained model again: {reason}") from None


def check_adapter(flag: str, path: str) -> None:
    """A LoRA adapter's weights are those of its config on its base. Raises UserError."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    base = adapter_base(path)
    model = skeleton(read_config(f"{flag} {path}: its base", base), runs_here=False, auto=AutoModelForCausalLM)
    file = Path(path).expanduser() / ADAPTER_WEIGHTS
    try:
        tensors = load_state_dict(file, map_location="meta")
        with torch.device("meta"):
            adapted = get_peft_model(model, PeftConfig.from_pretrained(path))
    except Exception as error:  # a missing or damaged file, or layers that the base does not have
        raise UserError(f"{flag} {path} is no adapter of {base}: {first_line(error)}") from None
    for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            there = _shape(tensors[name].shape) if name in tensors else "missing"
            raise UserError(
                f"{flag} {path} is no adapter of {base}: {name} is {there} in {ADAPTER_WEIGHTS} and "
                f"{_shape(tensor.shape)} on that base"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own words: what matters of them becomes an error of ours."""
    verbosity, bar = get_verbosity(), is_progress_bar_enabled()
    set_verbosity_error()
    disable_progress_bar()
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if bar:
            enable_progress_bar()
