"""From intervals to sentences, and to the command to run. Nothing is recommended that an interval does not carry."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from abc_plugin.config import ShapingConfig
from abc_plugin.credit.methods import Method
from abc_plugin.tools.audit.correlations import LEVEL, Interval, intervals
from abc_plugin.tools.audit.head_map import Choice, HeadMap
from abc_plugin.tools.audit.summary_table import LEAVE_ONE_OUT, RANDOM, RECENCY, Estimates, Summary, Tables, gain

DEGREES = ((0.2, "weakly"), (0.5, "moderately"), (1.01, "closely"))  # a rank correlation below the number
MEASURES = {"spearman": "rank correlation", "separation": "curves"}
AHEAD = {1: "clearly ahead", -1: "clearly behind", 0: "not clearly ahead"}  # by the sign of a difference's interval
MEASURED_AGAINST = ("none", "uniform", "shapley", RANDOM, RECENCY, LEAVE_ONE_OUT)  # baselines and costly yardsticks
MATTER = 0.5  # rank correlation of sizes above which attention is taken for the score's reason
SIZES = (
    "abc finds the tokens that matter, whichever way (rank correlation of sizes {:.2f}): with the one such model that "
    "was trained with, abc earned more than the sparse reward, whatever its signs; try it too."
)
NAMED = 4  # heads that a sentence names
DEFAULT_CRITIC = (
    "With GAE and OpenRLHF's default critic, a copy of the reward model, use --reward_shaping none with "
    "--algo.advantage.lambd 0.5: that critic's values tell credit from the first step. prefix on top learned faster, "
    "but no better at equal KL."
)
HORIZON = (
    "prefix earns by a short horizon, which leaves later tokens' noise out: add --algo.advantage.gamma 0.8 "
    "without a critic, --algo.advantage.lambd 0.5 with one from the policy."
)


class Advice(NamedTuple):
    """What an audit says: sentences, the conclusion first, and how to train."""

    sentences: list[str]
    command: str
    why: str


def advise(
    summary: Summary, tables: Tables, head_map: HeadMap, methods: dict[str, Method], shaping: ShapingConfig, path: str
) -> Advice:
    """The advice on the reward model at ``path``, of whose layer and heads ``shaping`` tells."""
    others = [name for name in tables if name not in MEASURED_AGAINST]
    level = 1 - (1 - LEVEL) / max(1, len(others))  # the best of several looks good by luck
    widened = {name: intervals(tables[name], level) for name in others}
    good = [name for name in others if verdict(widened[name]) == "better"]
    best = max(good, key=lambda name: widened[name]["spearman"].mean, default=None)
    qualified = _of_attention(summary["abc"]["size"], head_map) if "abc" in summary else []
    words = ["abc-rlhf", "ray", "…", "--reward.model_name_or_path", shlex.quote(path), "--reward_shaping"]
    if best is None:
        why = f"of no method ({', '.join(others) or 'none audited'}) do both intervals lie above 0"
        conclusion = f"Nothing shows that credit of this model follows which tokens moved the score: {why}."
        return Advice([conclusion, *qualified], " ".join([*words, "none"]), why)
    rank, apart = (widened[best][name] for name in MEASURES)
    degree = next(word for below, word in DEGREES if abs(rank.mean) < below)
    why = f"rank correlation {rank:.2f}, curves apart by {apart:.2f} score units"
    conclusion = (
        f"{best} credit of this model follows, {degree}, which tokens moved the score: {why}{_part(apart, summary)}; "
        f"95 % intervals over {rank.n} prompts, widened for the number of methods ({len(others)})."
    )
    against = [_compared(tables, best, name, level) for name in (*others, RANDOM, RECENCY) if name != best]
    return Advice([conclusion, *against, *qualified], " ".join([*words, best, *_options(methods[best], shaping)]), why)


def closing(advice: dict[int | None, Advice]) -> list[str]:
    """The command to run, by tokens of a completion where audits of several lengths differ, and the critic's part."""
    commands: dict[str, list[int | None]] = {}
    for length, one in advice.items():
        commands.setdefault(one.command, []).append(length)
    lines = []
    for command, lengths in commands.items():
        where = "" if None in lengths else f" with completions of {', '.join(map(str, lengths))} tokens"
        why = "; ".join(f"{f'{n}: ' if n else ''}{advice[n].why}" for n in lengths)
        lines += [f"To train{where} without a critic, or with one from the policy ({why}):", f"    {command}"]
    if any("--reward_shaping prefix" in command for command in commands):
        lines.append(HORIZON)
    if any(not command.endswith(" none") for command in commands):
        lines.append(DEFAULT_CRITIC)
    return lines


def verdict(estimates: Estimates) -> str:
    """How a method does against orders that know nothing: better, worse, no better or open.

    Both the rank correlation with leave-one-out and the separation of the curves are 0 in expectation for uniform and
    random credit. Both intervals above 0: better; both below: worse; one above: open; else no better. A random method
    is called better in at most 2.5 % of audits.
    """
    signs = {estimates[name].sign if estimates[name] else 0 for name in MEASURES}
    if len(signs) == 1:
        return {1: "better", -1: "worse", 0: "no better"}[signs.pop()]
    return "open" if max(signs) > 0 else "no better"


def _part(apart: Interval, summary: Summary) -> str:
    ceiling = summary[LEAVE_ONE_OUT]["separation"]
    return f" ({100 * apart.mean / ceiling.mean:.0f} % of leave-one-out's)" if ceiling and ceiling.low > 0 else ""


def _options(method: Method, shaping: ShapingConfig) -> list[str]:
    """The settings audited that differ from the defaults, those that the method uses; and beta where 1 earned more."""
    uses = {
        "layer": method.needs & {"attention", "contribution"},
        "heads": "attention" in method.needs,
        "drop": method.weights,
        "entropy_floor": method.weights,
    }
    given = {name: getattr(shaping, name) for name, used in uses.items() if used}
    given |= {"beta": 1} if "contribution" in method.needs else {}  # its rest stays with the last token anyway
    return [f"--shaping.{name} {value}" for name, value in given.items() if value != getattr(ShapingConfig(), name)]


def _compared(tables: Tables, best: str, other: str, level: float) -> str:
    """In what the best method is clearly ahead of another, by paired intervals."""
    gains = {name: by for name, by in gain(tables, best, other, MEASURES, level).items() if by}
    parts = [f"{AHEAD[by.sign]} in {MEASURES[name]} (by {by:.2f})" for name, by in gains.items()]
    return f"Against {other}: {', '.join(parts) or 'not comparable'}."


def _of_attention(sizes: Interval | None, head_map: HeadMap) -> list[str]:
    """What qualifies the advice on abc: the sizes, and other layers and heads."""
    choices = [_choice(choice, head_map) for choice in (head_map.layer, head_map.head) if choice and choice.reported]
    counts = (
        f"Of {head_map.signed_LH.size} heads {_named(head_map.carrying)} follow the removals and "
        f"{_named(head_map.against)} run against them, with intervals widened for their number."
    )
    found = [SIZES.format(sizes)] if sizes and sizes.low > MATTER else []
    return [*found, *choices, counts]


def _choice(choice: Choice, head_map: HeadMap) -> str:
    """What is said of a layer or head chosen on one half, by the other half."""
    name, settings, gain = f"Layer {choice.layer}", f"--shaping.layer {choice.layer}", choice.over_configured
    if choice.heads is not None:
        name, settings = f"{name} head {choice.heads[0]}", f"{settings} --shaping.heads {choice.heads[0]}"
    elif head_map.read is not None:
        name, settings = f"{name}, all heads", f"{settings} --shaping.heads all"
    if (choice.layer, choice.heads) == (head_map.layers[head_map.configured], head_map.read):
        return f"{name}, read now, is also what half of the prompts would choose: {choice.reported} on the other."
    compared = "not clearly more than what is read now" + (f" (difference {gain})" if gain else "")
    if gain and gain.sign > 0:
        compared = f"{gain} more than what is read now: for abc use {settings}"
    return f"{name}, chosen on half of the prompts, has {choice.reported} on the other half, {compared}."


def _named(heads: list[tuple[int, int]]) -> str:
    """How many, and the first few by name: "2 (layer 3 head 1, layer 5 head 0)"."""
    names = [f"layer {layer} head {head}" for layer, head in heads[:NAMED]]
    more = [f"{len(heads) - NAMED} more"] if len(heads) > NAMED else []
    return f"{len(heads)} ({', '.join(names + more)})" if heads else "none"
