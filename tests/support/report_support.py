"""Runs, samples and pages for the tests of the report."""

import io
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from abc_plugin.report import page
from abc_plugin.report.samples import Sample
from abc_plugin.report.scalars import Run

REWARD, KL, SECONDS = "train/rollout/reward_mean", "train/kl", "train/timing/step_total"


def write_events(directory, scalars, walltime=1000.0):
    """One event file: scalars is {tag: [(step, value), ...]}."""
    writer = SummaryWriter(str(directory))
    for tag, curve in scalars.items():
        for step, value in curve:
            writer.add_scalar(tag, value, step, walltime=walltime + step)
    writer.close()


def from_one(values):
    return list(enumerate(values, 1))


def make_run(directory, values=(1.0, 2.0, 3.0), **more):
    write_events(directory / "tensorboard" / "name", {REWARD: from_one(values), **more})
    return str(directory)


def sample(prompt="p", tokens=("a", "b"), credit=(0.25, 0.75), reward=0.0):
    return Sample(prompt, list(tokens), list(credit), reward)


def write_samples(path, samples):
    path.write_text("".join(json.dumps(asdict(s)) + "\n" for s in samples), encoding="utf-8")
    return str(path)


def page_of(before=(), after=(), summary=None, run=None, runs=None, command="abc-rlhf report r"):
    run = run or Run("r", {REWARD: from_one([1.0, 2.0])})
    return page.render(page.Content(run, runs or [run], list(before), list(after), summary or {}, command))


def ramp(label, start, kl=0.25):
    """Reward 0 up to step ``start``, then 1, over 20 steps; the first takes 100 s, the others ``start`` s."""
    scalars = {REWARD: [0.0] * start + [1.0] * (20 - start), KL: [kl] * 20, SECONDS: [100.0] + [start] * 19}
    return Run(label, {tag: from_one(values) for tag, values in scalars.items()})


def colours(html):
    """Signed intensity of each token, in order."""
    found = re.findall(r'<span class="t( neg)?(?: special)?" style="--c:([0-9.]+)"', html)
    return [-float(c) if negative else float(c) for negative, c in found]


class Outline(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.requests = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.requests += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(html):
    parsed = Outline()
    parsed.feed(html)
    assert parsed.open == []
    return parsed


def pixels(png):
    image = Image.open(io.BytesIO(png))
    image.load()
    return image.convert("RGB")
