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
import pandas as pd

from abc_plugin.tools.audit.estimates import CONCENTRATION, LEVEL, Interval, interval, intervals, spearman
from abc_plugin.tools.audit.summary import Record, prompts

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
class HeadMap:
    """Rank correlations of rows with leave-one-out, means over completions, NaN where undefined; what follows."""

    layers: list[int]
    configured: int  # index among ``layers``
    read: list[int] | None  # heads of that layer that are read; None: all
    signed_LH: np.ndarray
    size_LH: np.ndarray
    signed_L: np.ndarray  # of the mean row over a layer's heads
    size_L: np.ndarray
    shares_LH: dict[str, np.ndarray]  # ``estimates.CONCENTRATION``, means over prompts
    shares_L: dict[str, np.ndarray]  # of the mean row
    carrying: list[tuple[int, int]]  # (layer, head) whose widened interval lies above 0
    against: list[tuple[int, int]]  # and below
    present: Interval | None  # the configured row on the reporting half
    layer: Choice | None  # None where every row is constant, so that no correlation is defined
    head: Choice | None
    kept: Choice | None  # heads of the configured layer with a mean above 0 on the choosing half; None: all, or none


def halves(index: pd.Index) -> np.ndarray:
    """True for the completions of every other prompt, in order of appearance: those to choose on."""
    return pd.factorize(index)[0] % 2 == 0


def map_heads(records: list[Record], layers: list[int], configured: int, read: list[int] | None = None) -> HeadMap:
    """The map and the choices; see the module's text. ``read``: heads of the configured layer; None: all."""
    index = prompts(records)
    choosing = halves(index)
    heads_NLH2, rows_NL2 = (np.array([record[key] for record in records], float) for key in ("heads", "layers"))
    number = heads_NLH2.shape[2]
    columns = pd.MultiIndex.from_product([layers, range(number)])
    head_rows = pd.DataFrame(heads_NLH2[..., SIGNED].reshape(len(records), -1), index, columns)
    layer_rows = pd.DataFrame(rows_NL2[..., SIGNED], index, layers)
    present = pd.Series([record["configured"][SIGNED] for record in records], index, float)
    widened = intervals(head_rows, 1 - (1 - LEVEL) / len(columns))

    def report(layer: int, heads: list[int] | None, column: pd.Series) -> Choice:
        over = interval((column - present)[~choosing], 1 - (1 - LEVEL) / CHOICES)
        return Choice(layer, heads, float(column[choosing].mean()), interval(column[~choosing]), over)

    layer, best = _best(layer_rows[choosing]), _best(head_rows[choosing])
    own = head_rows[layers[configured]][choosing].mean()
    good = own.index[own > 0].tolist()
    shares_LX = {
        name: _mean(np.array([record["attention"][name] for record in records], float), index)
        for name in CONCENTRATION
    }
    return HeadMap(
        layers=layers,
        configured=configured,
        read=read,
        signed_LH=_mean(heads_NLH2[..., SIGNED]),
        size_LH=_mean(heads_NLH2[..., SIZE]),
        signed_L=_mean(rows_NL2[..., SIGNED]),
        size_L=_mean(rows_NL2[..., SIZE]),
        shares_LH={name: values_LX[:, 1:] for name, values_LX in shares_LX.items()},
        shares_L={name: values_LX[:, 0] for name, values_LX in shares_LX.items()},
        carrying=[key for key, estimate in widened.items() if estimate and estimate.sign > 0],
        against=[key for key, estimate in widened.items() if estimate and estimate.sign < 0],
        present=interval(present[~choosing]),
        layer=None if layer is None else report(layer, None, layer_rows[layer]),
        head=None if best is None else report(best[0], [best[1]], head_rows[best]),
        kept=report(layers[configured], good, _subset(records, good)) if 0 < len(good) < number else None,
    )


def _best(rows: pd.DataFrame) -> Any:
    """The column of the largest mean; None where none is defined."""
    means = rows.mean().dropna()
    return None if means.empty else means.idxmax()


def _subset(records: list[Record], heads: list[int]) -> pd.Series:
    """Rank correlation of the configured layer's mean row over those heads, per completion."""
    columns = []
    for record in records:
        row_T = np.array(record["configured_heads"])[heads].mean(0)
        columns.append(spearman(record["reward"] * row_T, record["effect"]))
    return pd.Series(columns, prompts(records))


def _mean(values_NX: np.ndarray, index: pd.Index | None = None) -> np.ndarray:
    """Mean over completions of what is not NaN, or over prompts (the index) of each prompt's mean; shape X."""
    table = pd.DataFrame(values_NX.reshape(len(values_NX), -1), index)
    means = table.mean() if index is None else table.groupby(level=0).mean().mean()
    return means.to_numpy().reshape(values_NX.shape[1:])
