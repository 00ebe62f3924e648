"""Rewards that come with the rollout: from an HTTP server, a reward function, an agent.

OpenRLHF sends them text and takes back, per sample, ``{"rewards": r, "scores"?: s, "extra_logs"?: {name: number}}``.
Credit travels in ``extra_logs`` under CREDIT, as a list of spans over that text:

    [[start, end, weight], ...]        characters start to end (exclusive) of the query carry this weight >= 0

so that the sender needs neither the policy's tokenizer nor its tokens. The query is what a server is sent: prompt and
response, tokenizer.decode(observation_tokens, skip_special_tokens=False), cut at the maximum length. An agent counts
in that text, too (its step() sees one without end tokens), and the host keeps the extra_logs of its last step only.
Weights have any scale; what lies on the prompt is dropped and the rest renormalised, as for a reward model's row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abc_plugin.errors import CreditError
from abc_plugin.text.spans import spread, token_spans

CREDIT = "credit_spans"


def attention_row(spans: Tensor, sequence_S: Tensor, tokenizer: object, where: str) -> tuple[Tensor, float]:
    """Spans over the text of a whole sequence -> weight per token (S,), fp32, and the share that had to be moved.

    ``sequence_S`` is one sequence without padding, prompt and response.
    Raises CreditError on spans of another shape, outside the text, negative, or not finite.
    """
    if not spans.numel():
        raise CreditError(f"{where}: {CREDIT} is empty; send [[start, end, weight], ...] over the query's characters")
    if spans.shape[-1] != 3:
        raise CreditError(f"{where}: {CREDIT} has shape {tuple(spans.shape)}, expected [[start, end, weight], ...]")
    spans_L3 = spans.reshape(-1, 3).double()
    text, of_tokens = token_spans(tokenizer, sequence_S.tolist())
    start, end, weight = spans_L3.T
    if not torch.isfinite(spans_L3).all() or (weight < 0).any():
        raise CreditError(f"{where}: {CREDIT} has NaN, infinite or negative entries")
    if (end < start).any():
        raise CreditError(f"{where}: {CREDIT} has a span that ends before it starts")
    if (start < 0).any() or (end > len(text)).any():
        raise CreditError(
            f"{where}: {CREDIT} reaches from {start.min():.0f} to {end.max():.0f}, but the query has {len(text)} "
            "characters: the credit belongs to another text, or was computed on a truncated one"
        )
    weight_S, moved = spread(weight, spans_L3[:, :2], of_tokens)
    return weight_S.float(), moved
