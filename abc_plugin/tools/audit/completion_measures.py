"""One completion: what the removal of each token does to the score, and what each method's credit says it does.

A token is removed, not replaced: the sequence closes up behind it. So no neutral token has to be chosen, and the
reward model reads text of the kind that it knows. The score is then read at the last token that is left.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abc_plugin.config import ShapingConfig
from abc_plugin.credit.methods import PREFIX, Evidence, Method
from abc_plugin.credit.shaping import dropped, shape
from abc_plugin.credit.shapley import segments, shapley_values
from abc_plugin.tools.audit.audited_texts import Completion
from abc_plugin.tools.audit.correlations import spearman
from abc_plugin.tools.audit.reward_model import Explanation, RewardModel
from abc_plugin.tools.audit.summary_table import LEAVE_ONE_OUT, RANDOM, RECENCY

POINTS = 10  # a curve's steps: tokens are removed by tenths of the completion
EVIDENCE = ("attention", "prefix", "gradient", "contribution")  # what one forward of a reward model can give
COSTLY = ("shapley",)  # what many can, so that it is audited where it is asked for


def measure(
    model: RewardModel,
    completion: Completion,
    methods: dict[str, Method],
    shaping: ShapingConfig,
    spans: int | None = None,
) -> dict[str, Any]:
    """All that later steps need of one completion, as plain JSON values (numbers to six digits).

    effect[t] = score(whole) - score(without token t); credit and curves by method, among them ``random`` (one draw of
    random shares), ``recency`` (the later, the more) and ``leave_one_out`` (credit = effect); and the rank correlation
    of reward · row with the effects, of each layer's mean row and each head's.
    spans: with more tokens than that, t is not a token but one of so many spans of them, removed whole; credit and
    rows are summed over it.
    Raises NotFinite (RewardModel.scores).
    """
    prompt, ids = completion.prompt_ids, completion.ids
    starts = np.linspace(0, len(ids), min(len(ids), spans or len(ids)), endpoint=False).round().astype(int).tolist()
    bounds = list(zip(starts, [*starts[1:], len(ids)], strict=True))
    pieces = [ids[start:end] for start, end in bounds]
    left = [prompt + ids, prompt, *(prompt + sum(pieces[:t] + pieces[t + 1 :], []) for t in range(len(pieces)))]
    [_, empty, *without] = model.scores(left)
    explained = model.explain(prompt + ids)
    if any("shapley" in method.needs for method in methods.values()):
        explained.evidence["shapley"] = shapley_row(model, completion, pieces, explained.score, shaping.calls)

    def pooled(x_XT: Tensor) -> Tensor:
        return torch.from_numpy(np.add.reduceat(x_XT.double().numpy(), starts, axis=-1))

    effect_T = torch.tensor([explained.score - score for score in without], dtype=torch.float64)
    credit = {
        name: pooled(credit_of(method, completion, explained, empty, shaping)) for name, method in methods.items()
    }
    credit[RANDOM] = random_credit(len(pieces), explained.score, seed=completion.row)
    credit[RECENCY] = recency_credit(len(pieces), explained.score)
    credit[LEAVE_ONE_OUT] = effect_T
    rows_LHT, row_T = (
        pooled(row_XS[..., len(prompt) :]) for row_XS in (explained.rows_LHS, explained.evidence["attention"])
    )

    def agreement(row_T: Tensor) -> float:
        return spearman(explained.score * row_T, effect_T)

    return {
        "row": completion.row,
        "prompt": completion.prompt,
        "tokens": ["".join(completion.tokens[start:end]) for start, end in bounds],
        "reward": explained.score,
        "empty": empty,
        "effect": _plain(effect_T),
        "credit": {name: _plain(credit_T) for name, credit_T in credit.items()},
        "curves": curves(model, completion, pieces, credit, explained.score, empty),
        "layers": _plain([agreement(row_T) for row_T in rows_LHT.mean(1)]),
        "heads": _plain([[agreement(row_T) for row_T in rows_HT] for rows_HT in rows_LHT]),
        "configured": _plain(agreement(row_T)),
    }


def credit_of(
    method: Method, completion: Completion, explained: Explanation, empty: float, shaping: ShapingConfig
) -> Tensor:
    """The method's credit of the score for each token of the completion, before beta, (T,), score units.

    ``prefix`` pays the prompt's own score, ``empty``, with the first token, which did not earn it. Here its scores are
    counted from there: credit[t] = score up to and with t - score before t, for all tokens.
    """
    first, ids = len(completion.prompt_ids), torch.tensor([completion.prompt_ids + completion.ids])
    action_mask_BA = torch.arange(1, ids.shape[1])[None] >= first
    evidence = {f"{name}_BA": explained.evidence[name][None, 1:] for name in method.needs}
    start = empty if method.credit is PREFIX.credit else 0.0
    if start:
        evidence["prefix_BA"] = evidence["prefix_BA"] - start
    special_BA = torch.tensor([[False] * (first - 1) + completion.special])
    shaped = shape(
        method,
        [Evidence(ids, action_mask_BA, **evidence)],
        torch.tensor([explained.score - start]),
        beta=1.0,
        dropped_BA=dropped(shaping.dropped, action_mask_BA, special_BA),
        entropy_floor=shaping.entropy_floor,
    )
    return shaped.credit_BA[0, first - 1 :]


def shapley_row(
    model: RewardModel, completion: Completion, pieces: list[list[int]], whole: float, calls: int
) -> Tensor:
    """Shapley values of the pieces, merged where the calls are few, each on its last token, (S,), score units."""
    prompt, ids = completion.prompt_ids, torch.tensor(completion.ids)
    ends_BT = torch.zeros(1, len(ids), dtype=torch.bool)
    ends_BT[0, torch.tensor([len(piece) for piece in pieces]).cumsum(0) - 1] = True
    segment_BT = segments(ends_BT, torch.ones_like(ends_BT), calls)

    def score(kept_BT: Tensor) -> Tensor:
        return torch.tensor(model.scores([prompt + ids[kept_BT[0]].tolist()]))

    value_BT = shapley_values(score, torch.tensor([whole]), segment_BT, calls, seeds=[completion.row])
    return torch.cat([torch.zeros(len(prompt)), value_BT[0]])


def random_credit(tokens: int, reward: float, seed: int) -> Tensor:
    """reward · shares drawn evenly from all that sum to 1, (T,)."""
    generator = torch.Generator().manual_seed(seed)
    weight_T = torch.empty(tokens, dtype=torch.float64).exponential_(generator=generator)
    return reward * weight_T / weight_T.sum()


def recency_credit(tokens: int, reward: float) -> Tensor:
    """reward · (t + 1) / sum_u (u + 1), (T,): what credit is worth that knows of a token only how late it comes.

    Late tokens move the score of many reward models more, and their attention favours late tokens.
    """
    number_T = torch.arange(1, tokens + 1, dtype=torch.float64)
    return reward * number_T / number_T.sum()


def removal_order(credit_T: Tensor, seed: int) -> list[int]:
    """Tokens from the highest credit to the lowest; equal credit in random order, the same for the same seed."""
    shuffled = torch.randperm(len(credit_T), generator=torch.Generator().manual_seed(seed))
    return shuffled[credit_T[shuffled].argsort(descending=True, stable=True)].tolist()


def curves(
    model: RewardModel,
    completion: Completion,
    pieces: list[list[int]],
    credit: dict[str, Tensor],
    whole: float,
    empty: float,
) -> dict[str, dict[str, list[float]]]:
    """Score after k tenths of the completion's pieces (tokens, or spans of them) are removed, k = 0 to POINTS.

    "highest": those of highest credit go first; the faithful curve falls early.  "lowest": those of lowest credit
    (most negative) go first; the faithful one rises, or stays up.  Read backwards, "lowest" is insertion: the score
    when those of highest credit are put into an empty completion first, each at its position.
    """
    counts = [round(k * len(pieces) / POINTS) for k in range(POINTS + 1)]
    left: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for name, credit_T in credit.items():
        order = removal_order(credit_T, completion.row)
        left[name, "highest"] = [tuple(sorted(order[count:])) for count in counts]
        left[name, "lowest"] = [tuple(sorted(order[: len(pieces) - count])) for count in counts]
    known = {tuple(range(len(pieces))): whole, (): empty}
    wanted = sorted({kept for curve in left.values() for kept in curve} - set(known))
    texts = [completion.prompt_ids + sum((pieces[t] for t in kept), []) for kept in wanted]
    known |= dict(zip(wanted, model.scores(texts), strict=True))
    return {
        name: {way: _plain([known[kept] for kept in left[name, way]]) for way in ("highest", "lowest")}
        for name in credit
    }


def _plain(values: Any) -> Any:
    """Numbers, nested as they were, to six digits; None for NaN."""
    if hasattr(values, "tolist"):
        return _plain(values.tolist())
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return None if math.isnan(values) else float(f"{values:.6g}")
