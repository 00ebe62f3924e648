"""The row and the signed contributions under a real kernel beside those in eager attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from abc_plugin.attention.full_matrix import rerun_eager_row
from abc_plugin.attention.query_positions import score_positions
from abc_plugin.tools.bench.eager_parity import BF16, FP32, accepted_inputs, difference, distance, inputs
from abc_plugin.tools.bench.forward_cost import Read, reading
from abc_plugin.tools.bench.kernels import running, use_implementation

LIMITS = {torch.float32: (difference, FP32, 1e-3), torch.bfloat16: (distance, BF16, 0.1)}
# Families with what not every kernel takes, and settings that make it weigh.
SPECIAL = {
    "gemma2": ("softcap", {"num_hidden_layers": 2, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "gpt_oss": ("sinks", {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 4}),
}
SINK = 6.0


class Scored(nn.Module):
    """A base model with a scalar head, read at each last token; ``packed``: run on a stream of the mask's tokens."""

    packed = False

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.config = base, base.config
        self.score = nn.Linear(base.config.hidden_size, 1, bias=False, dtype=base.dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real_BS = attention_mask.bool()
        feed = accepted_inputs(self.base, attention_mask) | {"input_ids": input_ids}
        if self.packed:
            feed = {name: value_BS[real_BS][None] for name, value_BS in feed.items()}
        else:
            feed["attention_mask"] = attention_mask
        value = self.score(self.base(use_cache=False, **feed)[0]).squeeze(-1)
        value_BS = value.new_zeros(real_BS.shape).masked_scatter(real_BS, value) if self.packed else value
        return value_BS.gather(1, score_positions(attention_mask)[:, None]).squeeze(1)


def reward_model(family: str, dtype: torch.dtype, device: str, shape: dict[str, Any]) -> Scored:
    """One with random weights, in eval mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape | SPECIAL.get(family, ("", {}))[1])
    with torch.device(device):
        model = Scored(AutoModel.from_config(config, dtype=dtype)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.fill_(SINK)
    return model


def batch(tokens: int, padded: bool, device: torch.device) -> dict[str, Tensor]:
    """Two sequences; padded: the first a little, on the left, the second by a third, on the right."""
    mask_BS = torch.ones(2, tokens, dtype=torch.long)
    if padded:
        mask_BS[0, : tokens // 16] = 0
        mask_BS[1, -tokens // 3 :] = 0
    return {"input_ids": inputs(mask_BS)["input_ids"].to(device), "attention_mask": mask_BS.to(device)}


def read(model: Scored, feed: dict[str, Tensor], *needs: str, **options: str) -> Read:
    """One forward, read as by ``forward_cost.reading``."""
    with reading(model, needs, **options) as forward:
        return forward(**feed)


@torch.no_grad()
def compare(
    kernel: str, model: Scored, tokens: int, layout: str, whole: bool, needs: str | None
) -> tuple[dict[str, float], list[str]]:
    """(errors by what was read, what is not as claimed). layout: full, padded or packed.

    whole: the reference is the whole model in eager attention; else only the read layer, for sequences so long that
    the matrices of all layers do not fit, and contributions are left out.  needs: as ``kernels.running``.
    """
    device, (error, limit, relative) = model.base.device, LIMITS[model.base.dtype]
    feed = batch(tokens, layout != "full", device)
    mask_BS = feed["attention_mask"]
    with running(kernel, device, needs) as (implementation, calls):
        model.packed = layout == "packed"
        plain_B = use_implementation(model, implementation)(**feed)
        found, score_B = read(model, feed, "attention", "contribution")
        expected, _ = ({}, None) if whole else read(model, feed, "attention", recovery="eager-rerun")
    model.packed = False
    if whole:
        others = accepted_inputs(model.base, mask_BS) | {"use_cache": False}
        expected, _ = read(use_implementation(model, "eager"), feed, "contribution")
        expected["attention"] = rerun_eager_row(model.base, "last_full", mask_BS, **others).cpu()
    figures = {"row": error(found["attention"], expected["attention"])}
    if whole:
        off_BS = (found["contribution"] - expected["contribution"]).abs()
        figures["contributions"] = (off_BS.sum() / expected["contribution"].abs().sum()).item()
    claims = {
        f"the row is off by more than {limit:g}": figures["row"] <= limit,
        f"contributions are off by more than {relative:g}": figures.get("contributions", 0.0) <= relative,
        "padding has credit": not any(row_BS[mask_BS.cpu() == 0].any() for row_BS in found.values()),
        "the score is another than without credit": torch.equal(plain_B, score_B),
        "the model did not run this kernel": bool(calls),
    }
    return figures, [fault for fault, holds in claims.items() if not holds]
