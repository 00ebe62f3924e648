"""Rewards that come with the rollout: from an HTTP server, a reward function, an agent.

OpenRLHF sends them text and takes back, per sample, ``{"rewards": r, "scores"?: s, "extra_logs"?: {name: number}}``.
Credit travels in ``extra_logs`` as lists of spans over that text, under a key of SPANS for what a method needs:

    "credit_spans": [[start, end, weight], ...]          attention: weight >= 0, any scale, renormalised here
    "contribution_spans": [[start, end, part], ...]      contribution: signed, in the reward's units, taken as it is

Characters start to end (exclusive) of the query carry the value; what lies on the prompt is dropped. So the sender
needs neither the policy's tokenizer nor its tokens. The query is what a server is sent: prompt and response,
tokenizer.decode(observation_tokens, skip_special_tokens=False), cut at the maximum length. An agent counts in that
text, too (its step() sees one without end tokens), and the host keeps the extra_logs of its last step only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from abc_plugin.errors import CreditError
from abc_plugin.text.character_spans import spread, token_spans

SPANS = {"attention": "credit_spans", "contribution": "contribution_spans"}  # by the need that they answer


def check_reply(reply: dict[str, Any]) -> None:
    """Refuse what the host cannot make a tensor of. ``reply``: what an executor returns for one sample.

    Raises CreditError naming the sample by its prompt, the key, what came and what was expected.
    """
    where = f"the reply to the sample of the prompt {str(reply['prompt'])[:60]!r}"
    logs = reply.get("extra_logs", {})
    if not isinstance(logs, dict):
        raise CreditError(f"{where}: extra_logs is {str(logs)[:80]!r}, expected a dict of names and numbers")
    given = {key: reply[key] for key in ("reward", "scores") if reply.get(key) is not None}
    for key, value in (given | {f"extra_logs[{key!r}]": value for key, value in logs.items()}).items():
        spans = any(repr(name) in key for name in SPANS.values())
        expected = "[[start, end, value], ...], three numbers each" if spans else "a number"
        try:
            size = torch.tensor([value]).numel()
        except (TypeError, ValueError, RuntimeError):
            size = 0
        if not size and not (spans and value == []):
            raise CreditError(f"{where}: {key} is {str(value)[:80]!r}, expected {expected}")


def token_row(need: str, spans: Tensor, sequence_S: Tensor, tokenizer: object, where: str) -> tuple[Tensor, float]:
    """Spans over the text of a whole sequence -> value per token (S,), fp32, and the share that had to be moved.

    ``sequence_S`` is one sequence without padding, prompt and response.
    Raises CreditError on spans of another shape, outside the text, not finite, or, of attention, negative.
    """
    where = f"{where}: {SPANS[need]}"
    if not spans.numel():
        raise CreditError(f"{where} is empty; send [[start, end, value], ...] over the query's characters")
    if spans.shape[-1] != 3:
        raise CreditError(f"{where} has shape {tuple(spans.shape)}, expected [[start, end, value], ...]")
    spans_L3 = spans.reshape(-1, 3).double()
    text, of_tokens = token_spans(tokenizer, sequence_S.tolist())
    start, end, value = spans_L3.T
    if not torch.isfinite(spans_L3).all():
        raise CreditError(f"{where} has NaN or infinite entries")
    if need == "attention" and (value < 0).any():
        raise CreditError(f"{where} has negative entries; signed credit belongs under {SPANS['contribution']}")
    if (end < start).any():
        raise CreditError(f"{where} has a span that ends before it starts")
    if (start < 0).any() or (end > len(text)).any():
        raise CreditError(
            f"{where} reaches from {start.min():.0f} to {end.max():.0f}, but the query has {len(text)} "
            "characters: the credit belongs to another text, or was computed on a truncated one"
        )
    value_S, moved = spread(value, spans_L3[:, :2], of_tokens)
    return value_S.float(), moved
