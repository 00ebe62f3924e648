"""Which layer and heads follow the removals: chosen on half of the prompts, reported on the other half.

The best of a hundred heads looks good by luck alone on the completions that it was chosen on. What is said of a chosen
layer, head or set of heads is therefore measured on completions that had no part in the choice, and the heads said to
follow the removals, or to run against them, are those whose interval, widened for the number of heads (Bonferroni),
lies above 0, or below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from abc_plugin.tools.audit.shares import PLACES
from abc_plugin.tools.audit.stats import LEVEL, Interval, difference, interval, spearman
from abc_plugin.tools.audit.summary import prompts

CHOICES = 3  # layer, head, set of heads: any may be recommended, so their intervals are widened for three
SIGNED, SIZE = 0, 1  # entries of an agreement: of reward · row with the effects, of the row with their sizes


@dataclass(frozen=True)
class Choice:
    """A layer, or heads of it, chosen on one half, and its rank correlation with leave-one-out on the other."""

    layer: int
    heads: list[int] | None  # None: all
    chosen: float  # on the half that it was chosen on: too good
    reported: Interval | None
    over_configured: Interval | None  # paired difference to the configured row


@dataclass(frozen=True)
class Map:
    """Mean rank correlations of rows with leave-one-out, NaN where undefined, and what follows from them."""

    layers: list[int]
    configured: int  # index among ``layers``
    read: list[int] | None  # heads of that layer that are read; None: all
    signed_LH: np.ndarray
    size_LH: np.ndarray
    signed_L: np.ndarray  # of the mean row over a layer's heads
    size_L: np.ndarray
    shares_LH: dict[str, np.ndarray]  # ``shares.PLACES``, means over prompts
    shares_L: dict[str, np.ndarray]  # of the mean row
    carrying: list[tuple[int, int]]  # (layer, head) whose widened interval lies above 0
    against: list[tuple[int, int]]  # and below
    present: Interval | None  # the configured row on the reporting half
    layer: Choice | None  # None where every row is constant, so that no correlation is defined
    head: Choice | None
    kept: Choice | None  # heads of the configured layer with a mean above 0 on the choosing half; None: all, or none


def halves(records: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Indices of the completions of every other prompt, in order of appearance, and of the rest."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts(records)))}
    parity = [number[record["prompt"]] % 2 for record in records]
    return [i for i, odd in enumerate(parity) if not odd], [i for i, odd in enumerate(parity) if odd]


def map_heads(records: list[dict[str, Any]], layers: list[int], configured: int, read: list[int] | None = None) -> Map:
    """The map and the choices; see the module's text. ``read``: heads of the configured layer; None: all."""
    groups = prompts(records)
    choosing, reporting = halves(records)
    heads_NLH = _array([record["heads"] for record in records])
    pairs_NL = _array([record["layers"] for record in records])
    signed_NLH, layers_NL = heads_NLH[..., SIGNED], pairs_NL[..., SIGNED]
    number = signed_NLH[0].size
    widened = {
        (layer, head): interval(_column(signed_NLH[:, i, head]), groups, 1 - (1 - LEVEL) / number)
        for i, layer in enumerate(layers)
        for head in range(signed_NLH.shape[2])
    }
    lies = {name: _over_prompts([record["attention"][name] for record in records], groups) for name in PLACES}
    present_N = _array([record["configured"][SIGNED] for record in records])

    def report(layer: int, heads: list[int] | None, column_N: np.ndarray) -> Choice:
        ours, theirs = ([_column(column)[i] for i in reporting] for column in (column_N, present_N))
        half = [groups[i] for i in reporting]
        over = interval(difference(ours, theirs), half, 1 - (1 - LEVEL) / CHOICES)
        return Choice(layer, heads, float(_mean(column_N[choosing])), interval(ours, half), over)

    best, best_head = _best(_mean(layers_NL[choosing])), _best(_mean(signed_NLH[choosing]))
    own_H = _mean(signed_NLH[choosing, configured])
    good = [head for head, value in enumerate(own_H) if value > 0]
    part = 0 < len(good) < len(own_H)
    return Map(
        layers=layers,
        configured=configured,
        read=read,
        signed_LH=_mean(signed_NLH),
        size_LH=_mean(heads_NLH[..., SIZE]),
        signed_L=_mean(layers_NL),
        size_L=_mean(pairs_NL[..., SIZE]),
        shares_LH={name: values_LX[:, 1:] for name, values_LX in lies.items()},
        shares_L={name: values_LX[:, 0] for name, values_LX in lies.items()},
        carrying=[place for place, estimate in widened.items() if estimate and estimate.sign > 0],
        against=[place for place, estimate in widened.items() if estimate and estimate.sign < 0],
        present=interval([_column(present_N)[i] for i in reporting], [groups[i] for i in reporting]),
        layer=report(layers[best[0]], None, layers_NL[:, best[0]]) if best else None,
        head=report(layers[best_head[0]], [best_head[1]], signed_NLH[:, *best_head]) if best_head else None,
        kept=report(layers[configured], good, _subset(records, good)) if part else None,
    )


def _subset(records: list[dict[str, Any]], heads: list[int]) -> np.ndarray:
    """Rank correlation of the configured layer's mean row over those heads, per completion, (N,)."""
    columns = []
    for record in records:
        rows_HT = np.array(record["configured_heads"])[heads]
        columns.append(spearman(record["reward"] * rows_HT.mean(0), record["effect"]))
    return _array(columns)


def _over_prompts(nested: list, groups: list[str]) -> np.ndarray:
    """Mean over prompts of each prompt's mean, NaN left out."""
    values, of = _array(nested), np.array(groups)
    return _mean(np.stack([_mean(values[of == prompt]) for prompt in dict.fromkeys(groups)]))


def _best(values: np.ndarray) -> tuple[int, ...] | None:
    """Indices of the largest value that is defined; None where none is."""
    if np.isnan(values).all():
        return None
    return tuple(int(i) for i in np.unravel_index(np.nanargmax(values), values.shape))


def _array(nested: list) -> np.ndarray:
    return np.array(nested, dtype=float)  # None becomes NaN


def _column(values_N: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values_N]


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    count = (~np.isnan(values)).sum(0)
    return np.where(count > 0, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)
