"""Which layer and heads follow the removals: chosen on half of the prompts, reported on the other half.

The best of a hundred heads looks good by luck alone on the completions that it was chosen on. What is said of a chosen
layer or head is therefore measured on completions that had no part in the choice, and the heads said to follow the
removals, or to run against them, are those whose interval, widened for the number of heads (Bonferroni), lies above 0,
or below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from abc_plugin.tools.audit.correlations import LEVEL, Interval, interval, intervals
from abc_plugin.tools.audit.summary_table import Record, prompts

CHOICES = 2  # layer, head: both may be recommended, so their intervals are widened for two


@dataclass(frozen=True)
class Choice:
    """A layer, or one head of it, chosen on one half, and its rank correlation with leave-one-out on the other."""

    layer: int
    heads: list[int] | None  # None: all
    reported: Interval | None
    over_configured: Interval | None  # paired difference to the configured row


@dataclass(frozen=True)
class HeadMap:
    """Rank correlations of reward · row with leave-one-out: means over completions, NaN where undefined."""

    layers: list[int]
    configured: int  # index among ``layers``
    read: list[int] | None  # heads of that layer that are read; None: all
    signed_LH: np.ndarray
    signed_L: np.ndarray  # of the mean row over a layer's heads
    carrying: list[tuple[int, int]]  # (layer, head) whose widened interval lies above 0
    against: list[tuple[int, int]]  # and below
    layer: Choice | None  # None where every row is constant, so that no correlation is defined
    head: Choice | None


def halves(index: pd.Index) -> np.ndarray:
    """True for the completions of every other prompt, in order of appearance: those to choose on."""
    return pd.factorize(index)[0] % 2 == 0


def map_heads(records: list[Record], layers: list[int], configured: int, read: list[int] | None = None) -> HeadMap:
    """The map and the choices; see the module's text. ``read``: heads of the configured layer; None: all."""
    index = prompts(records)
    choosing = halves(index)
    heads_NLH, rows_NL = (np.array([record[key] for record in records], float) for key in ("heads", "layers"))
    columns = pd.MultiIndex.from_product([layers, range(heads_NLH.shape[2])])
    head_rows = pd.DataFrame(heads_NLH.reshape(len(records), -1), index, columns)
    layer_rows = pd.DataFrame(rows_NL, index, layers)
    present = pd.Series([record["configured"] for record in records], index, float)
    widened = intervals(head_rows, 1 - (1 - LEVEL) / len(columns))

    def choose(rows: pd.DataFrame) -> tuple[Any, Interval | None, Interval | None] | None:
        """The best column on one half; on the other its mean, and by how much that is more than the present one's."""
        means = rows[choosing].mean().dropna()
        if means.empty:
            return None
        column = rows[means.idxmax()]
        over = interval((column - present)[~choosing], 1 - (1 - LEVEL) / CHOICES)
        return means.idxmax(), interval(column[~choosing]), over

    layer, head = choose(layer_rows), choose(head_rows)
    return HeadMap(
        layers=layers,
        configured=configured,
        read=read,
        signed_LH=head_rows.mean().to_numpy().reshape(heads_NLH.shape[1:]),
        signed_L=layer_rows.mean().to_numpy(),
        carrying=[key for key, estimate in widened.items() if estimate and estimate.sign > 0],
        against=[key for key, estimate in widened.items() if estimate and estimate.sign < 0],
        layer=layer and Choice(layer[0], None, *layer[1:]),
        head=head and Choice(head[0][0], [head[0][1]], *head[1:]),
    )
