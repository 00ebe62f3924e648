"""Reward models as OpenRLHF reads them, in plain transformers: a base model and a scalar head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from abc_plugin.attention.positions import score_positions
from abc_plugin.errors import UserError

FLAG = "--reward.model_name_or_path"


def load_reward_model(
    path: str, *, head: str, dtype: torch.dtype, normalise: bool, attention: str | None = None, **options: Any
) -> PreTrainedModel:
    """The checkpoint at ``path`` as a base model with a scalar head (OpenRLHF: models/model.py, _get_reward_model).

    head: the scalar layer's name, where the config has no ``value_head_prefix``.  normalise: subtract the config's
    mean and divide by its std, as ``--reward.normalize_enable`` does.  attention: transformers' implementation.
    options: for ``from_pretrained``.
    Raises UserError where there is no model, no head, or a head that is no scalar.
    """
    if not Path(path).expanduser().is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"{FLAG} {path}: no such directory")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{FLAG} {path} is not a Hugging Face model: {str(error).splitlines()[0]}") from None
    config.normalize_reward = normalise
    if attention:
        config._attn_implementation = attention
    head = getattr(config, "value_head_prefix", head)
    with _quiet():
        try:
            model, report = reward_class(config, head).from_pretrained(
                path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{FLAG} {path} does not load: {str(error).splitlines()[0]}") from None
    if f"{head}.weight" in {name for name, *_ in report["mismatched_keys"]}:
        raise UserError(f"{FLAG} {path}: its head {head}.weight is no scalar; use a reward model with one output")
    if f"{head}.weight" in report["missing_keys"]:
        raise UserError(
            f"{FLAG} {path} has no weight {head}.weight: it is no reward model, or its scalar head has another name, "
            "which --ds.value_head_prefix can give"
        )
    if lost := sorted(report["missing_keys"]):
        raise UserError(f"{FLAG} {path} lacks {len(lost)} weights, {lost[0]} among them; save the whole model there")
    model.config.use_cache = False
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of loaded keys: what matters of it becomes an error of our own."""
    before = get_verbosity()
    set_verbosity_error()
    disable_progress_bar()
    try:
        yield
    finally:
        set_verbosity(before)


def reward_class(config: Any, head: str) -> type[PreTrainedModel]:
    """A class of the config's family with OpenRLHF's scalar head.

    score[b] = w · hidden[b, last 1 of mask b], less the mean over the std where the config says normalize_reward
    """
    if type(config) not in AutoModel._model_mapping:
        raise UserError(f"{FLAG}: {type(config).__name__} has no base model in transformers; use one that has")
    base = AutoModel._model_mapping[type(config)]

    class ScalarReward(base.__base__):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            setattr(self, self.base_model_prefix, base(config))
            self.value_head_prefix, self.normalize_reward = head, config.normalize_reward
            self.mean, self.std = getattr(config, "mean", 0.0), getattr(config, "std", 1.0)
            setattr(self, head, nn.Linear(config.get_text_config().hidden_size, 1, bias=False))
            self.post_init()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            trunk = getattr(self, self.base_model_prefix)
            hidden_BSD = trunk(input_ids, attention_mask=attention_mask).last_hidden_state
            values_BS = getattr(self, head)(hidden_BSD).squeeze(-1)
            score_B = values_BS.gather(1, score_positions(attention_mask)[:, None]).squeeze(1)
            if not self.normalize_reward:
                return score_B
            return (score_B - score_B.new_tensor(self.mean)) / score_B.new_tensor(self.std)  # OpenRLHF's are tensors

    return ScalarReward
