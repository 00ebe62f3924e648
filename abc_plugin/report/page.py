"""The report's page: one self-contained HTML file, everything that came from data escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from abc_plugin.report import compare
from abc_plugin.report.curves import draw
from abc_plugin.report.records import Record
from abc_plugin.report.samples import Sample, mean_and_error, pair_up, spread_over_ranks
from abc_plugin.report.scalars import REWARD, Run
from abc_plugin.report.style import document
from abc_plugin.report.tokens import completion, legend, visible
from abc_plugin.report.training import section

SHOWN = 12  # completions on the page

# (what, unit, tags) of the table of first and last steps.
METRICS = (
    ("Reward of the rollouts", "reward model's units", REWARD),
    ("Reward's standard deviation", "reward model's units", ("train/rollout/reward_std",)),
    ("Return (reward − KL penalty)", "reward model's units", ("train/return",)),
    ("KL from the starting policy", "nats per token", ("train/kl",)),
    ("Policy loss", "", ("train/policy_loss",)),
    ("Critic loss", "", ("train/critic_loss",)),
    ("Entropy of the credit", "nats", ("train/credit_entropy",)),
    ("Credit on the last token", "share", ("train/credit_last_token",)),
    ("Credit on special tokens", "share", ("train/credit_special_tokens",)),
    ("Error of the reward's sum", "reward model's units", ("train/credit_conservation_error",)),
    ("Time to generate", "s per step", ("train/timing/generation",)),
    ("Time to score", "s per step", ("train/timing/make_experience",)),
    ("Time to train", "s per step", ("train/timing/ppo_train",)),
)


@dataclass(frozen=True)
class Content:
    """What a page is made of."""

    run: Run
    runs: list[Run]  # with it, those it is compared with; [run] if none
    before: list[Sample]  # empty: not given
    after: list[Sample]
    summary: dict[str, Any]  # empty: no summary.json
    command: str  # the words that made the page, for its footer
    records: list[Record] = field(default_factory=list)  # completions recorded in training
    notes: list[str] = field(default_factory=list)  # about the records


def headline(content: Content) -> str:
    """One sentence: mean reward before and after with standard errors; the training reward if there are no samples."""
    named = [(samples, name) for samples, name in ((content.before, "before"), (content.after, "after")) if samples]
    if not named:
        reward = compare.values_of(content.run.curve(REWARD))
        n = min(compare.LAST, len(reward))
        first, last = compare.mean(reward[:n]), compare.mean(reward[-n:])
        return f"Mean reward in training: {first:.2f} over the first {n} steps, {last:.2f} over the last {n}."
    prompts = [sorted(sample.prompt for sample in samples) for samples, _ in named]
    same = prompts[0] == prompts[-1]
    parts = [f"{_estimate(samples)} {name}" + ("" if same else f" (n = {len(samples)})") for samples, name in named]
    return f"Mean reward{_sample_size(prompts[0]) if same else ''}: {', '.join(parts)}."


def _sample_size(prompts: list[str]) -> str:
    n, distinct = len(prompts), len(set(prompts))
    if n == distinct:
        return f" on {n} held-out prompt{'s' * (n > 1)}"
    return f" of {n} completions of {distinct} held-out prompt{'s' * (distinct > 1)}"


def _estimate(samples: list[Sample]) -> str:
    mean, error = mean_and_error([sample.reward for sample in samples])
    return f"{mean:.2f}" if error is None else f"{mean:.2f} ± {error:.2f}"


def render(content: Content) -> str:
    """The whole page."""
    sentence = headline(content)
    sections = [_samples_note(content), _summary(content.summary), _comparison(content.runs), _curves(content.runs)]
    sections += [_metrics(content.run), _completions(content.before, content.after)]
    sections += [section(content.records, content.notes)]
    return document(f"{content.run.label}: report", sentence, "".join(sections), visible(content.command))


def _samples_note(content: Content) -> str:
    if not (content.before or content.after):
        return ""
    note = "± is one standard error over completions."
    if content.before and content.after:
        pairs = pair_up(content.before, content.after)
        mean, error = mean_and_error([new.reward - old.reward for old, new in pairs])
        spread = "" if error is None else f" ± {error:.2f}"
        note = f"Change on the same prompts: {mean:+.2f}{spread} ({len(pairs)} pairs). {note}"
    return f'<p class="muted">{note}</p>'


def table(header: tuple[str, ...], rows: list[list[str]], numbers: int = 1, kind: str = "") -> str:
    """An HTML table; columns from index ``numbers`` on are right-aligned numbers."""

    def row(cells: Sequence[str], tag: str) -> str:
        opened = (f"<{tag}>" if i < numbers else f'<{tag} class="number">' for i in range(len(cells)))
        return (
            f"<tr>{''.join(f'{o}{escape(visible(cell))}</{tag}>' for o, cell in zip(opened, cells, strict=True))}</tr>"
        )

    head = f"<thead>{row(header, 'th')}</thead>" if header else ""
    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def _summary(summary: dict[str, Any]) -> str:
    if not summary:
        return ""
    return f"<h2>The run</h2>{table((), [[key, _plain(value)] for key, value in summary.items()], 2, 'pairs')}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _comparison(runs: list[Run]) -> str:
    if len(runs) == 1:
        return ""
    rows = [row.cells() for row in compare.summarise(runs)]
    return f'<h2>Compared</h2>{table(compare.HEADER, rows)}<p class="muted">{escape(compare.FOOTNOTE)}</p>'


def _curves(runs: list[Run]) -> str:
    """The PNG for wide and narrow screens in light and dark, embedded; the browser picks."""
    sources = "".join(
        f'<source media="{media}" srcset="{_embed(draw(runs, columns=columns, dark=dark))}">'
        for media, columns, dark in (
            ("(max-width: 640px) and (prefers-color-scheme: dark)", 1, True),
            ("(max-width: 640px)", 1, False),
            ("(prefers-color-scheme: dark)", 2, True),
        )
    )
    image = f'<img alt="Reward, KL and credit over the PPO steps" src="{_embed(draw(runs))}">'
    return f"<h2>Curves</h2><figure><picture>{sources}{image}</picture></figure>"


def _embed(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _metrics(run: Run) -> str:
    curves = [(what, unit, compare.values_of(run.curve(tags))) for what, unit, tags in METRICS if run.curve(tags)]
    rows = [
        [what, unit, *(f"{compare.mean(part):.3g}" for part in (values[: compare.LAST], values[-compare.LAST :]))]
        for what, unit, values in curves
    ]
    header = ("", "unit", f"first {compare.LAST} steps", f"last {compare.LAST} steps")
    return f"<h2>First and last steps</h2>{table(header, rows, 2)}"


def _completions(before: list[Sample], after: list[Sample]) -> str:
    if before and after:
        pairs = pair_up(before, after)
        chosen = spread_over_ranks(pairs, lambda pair: pair[1].reward - pair[0].reward, SHOWN)
        shown = [(rank, [("before", old), ("after", new)]) for rank, (old, new) in chosen]
        what, total = "pairs, at evenly spaced ranks of the reward change (rank 1: largest gain)", len(pairs)
    elif before or after:
        name = "before" if before else "after"
        chosen = spread_over_ranks(before or after, lambda sample: sample.reward, SHOWN)
        shown = [(rank, [(name, sample)]) for rank, sample in chosen]
        what, total = "completions, at evenly spaced ranks of the reward (rank 1: highest)", len(before or after)
    else:
        return ""
    how = f"{len(shown)} of {total} {what}, the first and the last among them; none picked by hand."
    signed = any(sample.signed for _, sides in shown for _, sample in sides)
    articles = "".join(_article(rank, total, sides) for rank, sides in shown)
    return f'<h2>Completions</h2><p class="muted">{how}</p>{legend(signed)}{articles}'


def _article(rank: int, total: int, sides: list[tuple[str, Sample]]) -> str:
    change = f", change {sides[1][1].reward - sides[0][1].reward:+.2f}" if len(sides) == 2 else ""
    cards = "".join(
        f'<div class="card"><h3>{name}: reward {sample.reward:.2f}</h3>'
        f'<div class="text">{completion(sample)}</div></div>'
        for name, sample in sides
    )
    return (
        f"<article><h3>Rank {rank} of {total}{change}</h3>"
        f'<div class="prompt">{escape(visible(sides[0][1].prompt))}</div><div class="sides">{cards}</div></article>\n'
    )
