"""From intervals to sentences. The first is the advice; nothing is called better that an interval does not carry."""

from __future__ import annotations

from typing import Any

from abc_plugin.audit.heads import Choice, Map
from abc_plugin.audit.measure import LEAVE_ONE_OUT, RANDOM, RECENCY
from abc_plugin.audit.stats import LEVEL, Interval, difference, interval, needed
from abc_plugin.audit.summary import prompts, values

Summary = dict[str, dict[str, Interval | None]]

WORDS = ((0.2, "weakly"), (0.5, "moderately"), (1.01, "closely"))  # a rank correlation below the number
PRECISE = 0.05  # half of an interval that settles most questions


def verdict(estimates: dict[str, Interval | None]) -> str:
    """How a method does against orders that know nothing: better, worse, no better or open.

    Both the rank correlation with leave-one-out and the separation of the curves are 0 in expectation for uniform and
    random credit. Both intervals above 0: better; both below: worse; one above, none below: open; else no better. A
    random method is called better in at most 2.5 % of audits.
    """
    signs = [estimates[name].sign if estimates[name] else 0 for name in ("spearman", "separation")]
    if signs[0] == signs[1]:
        return {1: "better", -1: "worse", 0: "no better"}[signs[0]]
    return "open" if sum(signs) > 0 else "no better"


def advise(summary: Summary, records: list[dict[str, Any]], found: Map) -> list[str]:
    """The advice on the method audited (abc, or the first one given), then what supports or qualifies it."""
    method = "abc" if "abc" in summary else next(iter(summary))
    sentences = [
        _headline(method, summary),
        *_sizes(method, summary),
        *_recency(method, summary, records),
        *_others(method, summary, records),
    ]
    if "abc" in summary:
        sentences += _layers(found)
    return sentences + _precision(method, summary)


def _headline(method: str, summary: Summary) -> str:
    own, name = summary[method], "ABC" if method == "abc" else method
    rank, apart = own["spearman"], own["separation"]
    if rank is None or apart is None:
        return f"{name} credit orders no tokens, so there is nothing to compare with what their removal does."
    numbers = (
        f"rank correlation with what removing each token does to the score {rank}, curves apart by {apart} score units"
    )
    if ceiling := _of_ceiling(apart, summary):
        numbers += f" ({ceiling})"
    degree = next(word for below, word in WORDS if abs(rank.mean) < below)
    said = {
        "better": f"{name} credit of this model is better than uniform: it follows, {degree}, which tokens moved the "
        "score",
        "worse": f"{name} credit of this model is worse than uniform: it points away from the tokens that moved the "
        "score",
        "no better": f"{name} credit of this model is no better than uniform: nothing shows that it follows which "
        "tokens moved the score",
        "open": f"Whether {name} credit of this model is better than uniform is open: one of two measures says so",
    }[verdict(own)]
    return f"{said} ({numbers}; 95 % intervals, {rank.n} prompts)."


def _sizes(method: str, summary: Summary) -> list[str]:
    """Whether it finds the tokens that matter, even if not which way."""
    size, rank = summary[method]["size"], summary[method]["spearman"]
    if size is None or rank is None or size.sign <= 0:
        return []
    but = "" if rank.sign > 0 else ", but not which of them raise the score and which lower it"
    return [f"It finds tokens that matter{but}: rank correlation with the sizes of the effects {size}."]


def _recency(method: str, summary: Summary, records: list[dict[str, Any]]) -> list[str]:
    """Whether what it knows is more than that late tokens matter more."""
    if verdict(summary[method]) not in ("better", "open"):
        return []
    gains = _gains(method, RECENCY, records)
    if all(gain is not None and gain.sign > 0 for gain in gains):
        return ["It knows more than how late a token comes: it is better than recency in both measures."]
    return [
        f"It is not clearly better than recency, credit that knows only how late a token comes: by {gains[0]} in rank "
        f"correlation, by {gains[1]} in the curves."
    ]


def _of_ceiling(apart: Interval, summary: Summary) -> str:
    best = summary[LEAVE_ONE_OUT]["separation"]
    if best is None or best.low <= 0 or apart.mean <= 0:
        return ""
    return f"{100 * apart.mean / best.mean:.0f} % of leave-one-out's own"


def _others(method: str, summary: Summary, records: list[dict[str, Any]]) -> list[str]:
    """Which other methods are better than ``method``, by paired intervals widened for the methods' number."""
    others = [name for name in summary if name not in (method, RANDOM, RECENCY, LEAVE_ONE_OUT, "uniform")]
    level = 1 - (1 - LEVEL) / max(1, len(others))
    both, one = [], []
    for name in others:
        gains = _gains(name, method, records, level)
        signs = [gain.sign if gain else 0 for gain in gains]
        said = f"{name}, by {gains[0]} in rank correlation and {gains[1]} score units in the curves"
        if min(signs) > 0:
            both.append((gains[0].mean, said))
        elif sum(signs) > 0:
            one.append(said)
    if both:
        return [f"Better in both measures is --reward_shaping {said}." for _, said in sorted(both, reverse=True)]
    if one:
        return [f"Better in one measure, and not worse in the other, is --reward_shaping {said}." for said in one]
    return [f"No other method audited ({', '.join(others)}) is better in either measure."] if others else []


def _gains(name: str, other: str, records: list[dict[str, Any]], level: float = LEVEL) -> list[Interval | None]:
    """Paired differences of two methods in the two measures of the verdict."""
    return [
        interval(difference(values(records, name, kind), values(records, other, kind)), prompts(records), level)
        for kind in ("spearman", "separation")
    ]


def _layers(found: Map) -> list[str]:
    total = found.signed_LH.size
    chosen = [choice for choice in (found.layer, found.head, found.kept) if choice is not None]
    return [
        *(_choice(choice, found.layers[found.configured]) for choice in chosen),
        f"Of {total} heads {len(found.carrying)} follow the removals and {len(found.against)} run against them, with "
        "intervals widened for their number.",
    ]


def _choice(choice: Choice, now: int) -> str:
    """What is said of a layer or heads chosen on one half, by the other half."""
    gain, where, flags = choice.over_configured, f"Layer {choice.layer}", f"--shaping.layer {choice.layer}"
    if choice.heads is None and choice.layer == now:
        return f"{where}, which is read now, is also the best on half of the prompts: {choice.reported} on the other."
    if choice.heads is not None:
        numbers = ",".join(map(str, choice.heads))
        where, flags = f"{where} head{'s' * (len(choice.heads) > 1)} {numbers}", f"{flags} --shaping.heads {numbers}"
    chosen = f"{where}, chosen on half of the prompts, has {choice.reported} on the other half"
    if gain is not None and gain.sign > 0:
        return f"{chosen}, {gain} more than what is read now: use {flags}."
    return f"{chosen}, not clearly more than what is read now (difference {gain})."


def _precision(method: str, summary: Summary) -> list[str]:
    rank = summary[method]["spearman"]
    if rank is None or needed(rank, PRECISE) <= rank.n:
        return []
    return [
        f"For an interval of ± {PRECISE} around the rank correlation, audit about {needed(rank, PRECISE)} prompts."
    ]
