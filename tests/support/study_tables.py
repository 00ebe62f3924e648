"""Tables for the tests of a study's report."""

import csv
import json

import numpy as np
import pandas as pd

from abc_plugin.tools.study.results_table import Condition, Table


def condition(method="none", reward=None, kl=None, credit="", group=""):
    """A condition in memory; reward and kl are (N, T)."""
    curves = {
        name: np.asarray(values, dtype=float)
        for name, values in {"reward": reward, "kl": kl}.items()
        if values is not None
    }
    seeds, steps = (range(1, size + 1) for size in curves["reward"].shape)
    return Condition(method, credit, group, {name: pd.DataFrame(each, seeds, steps) for name, each in curves.items()})


def table(*conditions):
    return Table(list(conditions), "", "", [], True)


def pair(reward, base, kl=None, base_kl=None):
    """A table of abc and its baseline."""
    return table(condition("none", base, base_kl), condition("abc", reward, kl, " β 0.8"))


def rows(methods=(("none", ""), ("abc", 0.8)), seeds=(1, 2, 3), steps=12, seed=0, **settings):
    """A study's rows: reward rises with KL, the methods differ by seeded noise; each has the settings too."""
    random = np.random.default_rng(seed)
    return [
        dict(method=method, beta=beta, seed=s, step=step, reward=reward, kl=kl, value_loss=1.0 / step, **settings)
        for place, (method, beta) in enumerate(methods)
        for s in seeds
        for step in range(1, steps + 1)
        for kl in [round(0.05 * step * (1 - 0.1 * place) + 0.002 * random.standard_normal(), 4)]
        for reward in [round(float(np.sqrt(abs(kl))) * 4 + 0.3 * s + 0.1 * random.standard_normal(), 4)]
    ]


def write(path, table):
    """A CSV or JSONL of rows; the columns are all keys, in the order they come up."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
        return path
    names = list(dict.fromkeys(name for row in table for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(table)
    return path
