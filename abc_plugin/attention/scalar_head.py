"""Reward models as OpenRLHF reads them, in plain transformers: a base model and a scalar head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from abc_plugin.attention.model_files import check_normalisation, check_weights, read_config
from abc_plugin.attention.query_positions import score_positions
from abc_plugin.errors import UserError, first_line

FLAG = "--reward.model_name_or_path"


def load_reward_model(
    path: str, *, head: str, dtype: torch.dtype, normalise: bool, attention: str | None = None, **options: Any
) -> PreTrainedModel:
    """The checkpoint at ``path`` as a base model with a scalar head (OpenRLHF: models/model.py, _get_reward_model).

    head: the scalar layer's name, where the config has no ``value_head_prefix``.  normalise: subtract the config's
    mean and divide by its std, as ``--reward.normalize_enable`` does.  attention: transformers' implementation.
    options: for ``from_pretrained``.
    Raises UserError where the files are not that model's (``check_files``).
    """
    config = check_files(path, head=head, normalise=normalise)
    if attention:
        config._attn_implementation = attention
    head = getattr(config, "value_head_prefix", head)
    disable_progress_bar()
    try:
        model = reward_class(config, head).from_pretrained(path, config=config, dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{FLAG} {path} does not load: {first_line(error)}") from None
    model.config.use_cache = False
    return model


def check_files(
    path: str, *, head: str, normalise: bool, flag: str = FLAG, new_head: bool = False
) -> PretrainedConfig:
    """The files at ``path`` are the whole of a model with a scalar head; returns its config. No weights are read.

    flag: what errors call the model.  new_head: the head may be missing, as a critic's.  Raises UserError.
    """
    config = read_config(flag, path)
    check_normalisation(flag, path, config, normalise and not new_head)
    config.normalize_reward = normalise
    head = getattr(config, "value_head_prefix", head)
    check_weights(flag, path, config, reward_class(config, head), head=head, new_head=new_head)
    return config


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
