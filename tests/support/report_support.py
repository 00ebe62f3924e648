"""Runs, samples, records and pages for the tests of the report."""

import io
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pandas as pd
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from abc_plugin.report.logged_runs import Run
from abc_plugin.report.samples_file import Sample

REWARD, KL, SECONDS = "train/rollout/reward_mean", "train/kl", "train/timing/step_total"


def write_events(directory, scalars, walltime=1000.0):
    """One event file: scalars is {tag: [(step, value), ...]}."""
    writer = SummaryWriter(str(directory))
    for tag, events in scalars.items():
        for step, value in events:
            writer.add_scalar(tag, value, step, walltime=walltime + step)
    writer.close()


def make_run(directory, values=(1.0, 2.0, 3.0)):
    write_events(directory / "tensorboard" / "name", {REWARD: enumerate(values, 1)})
    return str(directory)


def curve(values, first=1):
    """Values by step, from ``first`` on."""
    return pd.Series(list(values), index=range(first, first + len(values)), dtype=float)


def run_of(*rewards, label="r", **more):
    return Run(label, {tag: curve(values) for tag, values in {REWARD: rewards, **more}.items()})


def ramp(label, start, kl=0.25):
    """Reward 0 up to step ``start``, then 1, over 20 steps; the first takes 100 s, the others ``start`` s."""
    rewards = [0.0] * start + [1.0] * (20 - start)
    return run_of(*rewards, label=label, **{KL: [kl] * 20, SECONDS: [100.0] + [start] * 19})


def sample(prompt="p", tokens=("a", "b"), credit=(0.25, 0.75), reward=0.0):
    return Sample(prompt, list(tokens), list(credit), reward)


def write_samples(path, samples):
    path.write_text("".join(json.dumps(asdict(s)) + "\n" for s in samples), encoding="utf-8")
    return str(path)


def recorded(step=1, tokens=("a", " b"), credit=(0.25, 0.75), run="first", **changes):
    """The fields of one record."""
    length = len(tokens)
    fields = {"run": run, "step": step, "sample": 7, "method": "abc", "beta": 0.8, "truncated": True, "reward": 1.5}
    fields |= {"spread_reward": 1.5, "prompt": "p", "special": [], "tokens": list(tokens), "credit": list(credit)}
    fields |= {"ids": list(range(100, 100 + length)), "shaped_reward": [0.5] * length, "kl_penalty": [-0.01] * length}
    fields |= {"value": [1.0] * length, "advantage": [-2.0] * length, "return": [3.0] * length}
    return fields | changes


def write_records(directory, *lines):
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "completions.jsonl"
    path.write_text("".join(json.dumps(fields) + "\n" for fields in lines), encoding="utf-8")
    return path


def colours(html):
    """Signed intensity of each token, in order."""
    tokens = re.findall(r'<span class="t( neg)?(?: special)?" style="--c:([0-9.]+)"', html)
    return [-float(c) if negative else float(c) for negative, c in tokens]


class Outline(HTMLParser):
    """Collects tags, requests and text; checks that tags close in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.requests, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.requests += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def outline(html):
    parsed = Outline()
    parsed.feed(html)
    assert parsed.open == []
    return parsed


def words(html):
    """A page's text, a line per element, for snapshots."""
    return "\n".join(line.strip() for line in "\n".join(outline(html).text).split("\n") if line.strip())


def pixels(png):
    image = Image.open(io.BytesIO(png))
    image.load()
    return image.convert("RGB")
