"""From intervals to sentences. The first is the advice; nothing is called better that an interval does not carry."""

from __future__ import annotations

from typing import Any

from abc_plugin.tools.audit.heads import Choice, Map
from abc_plugin.tools.audit.measure import LEAVE_ONE_OUT, RANDOM, RECENCY
from abc_plugin.tools.audit.stats import LEVEL, Interval, difference, interval, needed
from abc_plugin.tools.audit.summary import prompts, values

Summary = dict[str, dict[str, Interval | None]]

WORDS = ((0.2, "weakly"), (0.5, "moderately"), (1.01, "closely"))  # a rank correlation below the number
MEASURES = {"spearman": "in rank correlation", "separation": "in the curves"}
BASELINES = {RANDOM: "random credit", RECENCY: "recency, credit that knows only how late a token comes,"}
NAMED = 4  # heads that a sentence names
PRECISE = 0.05  # half of an interval that settles most questions


def verdict(estimates: dict[str, Interval | None]) -> str:
    """How a method does against orders that know nothing: better, worse, no better or open.

    Both the rank correlation with leave-one-out and the separation of the curves are 0 in expectation for uniform and
    random credit. Both intervals above 0: better; both below: worse; one above: open; else no better. A random method
    is called better in at most 2.5 % of audits.
    """
    signs = [estimates[name].sign if estimates[name] else 0 for name in MEASURES]
    if signs[0] == signs[1]:
        return {1: "better", -1: "worse", 0: "no better"}[signs[0]]
    return "open" if max(signs) > 0 else "no better"


def advise(summary: Summary, records: list[dict[str, Any]], found: Map) -> list[str]:
    """The advice on the method audited (abc, or the first one given), then what supports or qualifies it."""
    method = "abc" if "abc" in summary else next(iter(summary))
    sentences = [
        _headline(method, summary),
        *_sizes(method, summary),
        *_baselines(method, summary, records),
        *_others(method, summary, records),
    ]
    if "abc" in summary:
        sentences += [*_choices(found), *_heads(found)]
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
        "open": f"Whether {name} credit of this model is better than uniform is open: one of two measures says so, "
        f"the other {'says the opposite' if min(rank.sign, apart.sign) < 0 else 'does not'}",
    }[verdict(own)]
    return f"{said} ({numbers}; 95 % intervals, {rank.n} prompts)."


def _sizes(method: str, summary: Summary) -> list[str]:
    """Whether it finds the tokens that matter, even if not which way."""
    size, rank = summary[method]["size"], summary[method]["spearman"]
    if size is None or rank is None or size.sign <= 0:
        return []
    but = "" if rank.sign > 0 else ", but not which of them raise the score and which lower it"
    return [f"It finds tokens that matter{but}: rank correlation with the sizes of the effects {size}."]


def _baselines(method: str, summary: Summary, records: list[dict[str, Any]]) -> list[str]:
    """Whether it knows more than chance, and more than that late tokens matter more."""
    if any(summary[method][kind] is None for kind in MEASURES):
        return []  # it orders no tokens, as the headline says
    gains = {said: _gains(method, name, records) for name, said in BASELINES.items() if name != method}
    return [f"Against {said} it is {_standing(gain)}: {_by(gain)}." for said, gain in gains.items() if gain]


def _of_ceiling(apart: Interval, summary: Summary) -> str:
    best = summary[LEAVE_ONE_OUT]["separation"]
    if best is None or best.low <= 0 or apart.mean <= 0:
        return ""
    return f"{100 * apart.mean / best.mean:.0f} % of leave-one-out's own"


def _others(method: str, summary: Summary, records: list[dict[str, Any]]) -> list[str]:
    """Which other methods are better than ``method``, by paired intervals widened for the methods' number."""
    others = [name for name in summary if name not in (method, RANDOM, RECENCY, LEAVE_ONE_OUT, "uniform")]
    level = 1 - (1 - LEVEL) / max(1, len(others))
    compared = {name: gains for name in others if (gains := _gains(name, method, records, level))}
    better = [name for name, gains in compared.items() if any(gain.sign > 0 for gain in gains.values())]
    both = [name for name in better if all(gain.sign > 0 for gain in compared[name].values())]
    if better:
        rank = {name: gains["spearman"].mean for name, gains in compared.items() if "spearman" in gains}
        best_first = sorted(both or better, key=lambda name: -rank.get(name, -1.0))
        said = [(_standing(compared[name]).capitalize(), name, _by(compared[name])) for name in best_first]
        return [f"{standing} is --reward_shaping {name}: {by}." for standing, name, by in said]
    if not compared:
        return []
    return [f"No other method audited ({', '.join(compared)}) is clearly better in either measure."]


def _gains(name: str, other: str, records: list[dict[str, Any]], level: float = LEVEL) -> dict[str, Interval]:
    """Paired differences of two methods in the measures of the verdict, by name; without those not defined."""
    gains = {
        kind: interval(difference(values(records, name, kind), values(records, other, kind)), prompts(records), level)
        for kind in MEASURES
    }
    return {kind: gain for kind, gain in gains.items() if gain is not None}


def _standing(gains: dict[str, Interval]) -> str:
    """Where clearly better and where worse: "better in rank correlation and worse in the curves"."""
    parts = []
    for word, sign in (("better", 1), ("worse", -1)):
        where = [MEASURES[kind] for kind, gain in gains.items() if gain.sign == sign]
        parts += [f"{word} {'in both measures' if len(where) == len(MEASURES) else where[0]}"] if where else []
    if not parts:
        return "not clearly better or worse"
    return " and ".join(parts) + (" alone" if len(parts) == 1 and "both" not in parts[0] else "")


def _by(gains: dict[str, Interval]) -> str:
    return ", ".join(f"by {gain} {MEASURES[kind]}" for kind, gain in gains.items())


def _choices(found: Map) -> list[str]:
    chosen = [choice for choice in (found.layer, found.head, found.kept) if choice is not None]
    return [_choice(choice, found) for choice in chosen if choice.reported is not None]


def _choice(choice: Choice, found: Map) -> str:
    """What is said of a layer or heads chosen on one half, by the other half."""
    gain, where, flags = choice.over_configured, f"Layer {choice.layer}", f"--shaping.layer {choice.layer}"
    if choice.heads is not None:
        where, flags = f"{where} {_numbered(choice.heads)}", f"{flags} --shaping.heads {_listed(choice.heads)}"
    elif found.read is not None:
        where, flags = f"{where}, all heads", f"{flags} --shaping.heads all"
    if (choice.layer, choice.heads) == (found.layers[found.configured], found.read):
        return f"{where}, read now, is also what half of the prompts would choose: {choice.reported} on the other."
    chosen = f"{where}, chosen on half of the prompts, has {choice.reported} on the other half"
    if gain is not None and gain.sign > 0:
        return f"{chosen}, {gain} more than what is read now: use {flags}."
    return f"{chosen}, not clearly more than what is read now{'' if gain is None else f' (difference {gain})'}."


def _heads(found: Map) -> list[str]:
    """Which heads follow the removals and which run against them, and what follows for those read now."""
    total, now = found.signed_LH.size, found.layers[found.configured]
    read = list(range(found.signed_LH.shape[1])) if found.read is None else found.read
    against = [head for layer, head in found.against if layer == now and head in read]
    kept = [head for head in read if head not in against]
    sentences = [
        f"Of {total} heads {_named(found.carrying)} follow the removals and {_named(found.against)} run against them, "
        "with intervals widened for their number."
    ]
    if against and kept:
        sentences.append(f"To drop {_numbered(against)} of the layer read now, use --shaping.heads {_listed(kept)}.")
    elif against:
        sentences.append("All heads read now run against them: read another layer, or use another method.")
    return sentences


def _named(places: list[tuple[int, int]]) -> str:
    """How many, and the first few by name: "2 (layer 3 head 1, layer 5 head 0)"."""
    if not places:
        return "none"
    names = [f"layer {layer} head {head}" for layer, head in places[:NAMED]]
    more = [f"{len(places) - NAMED} more"] if len(places) > NAMED else []
    return f"{len(places)} ({', '.join(names + more)})"


def _numbered(heads: list[int]) -> str:
    return f"head{'s' * (len(heads) > 1)} {_listed(heads)}"


def _listed(heads: list[int]) -> str:
    return ",".join(map(str, heads))


def _precision(method: str, summary: Summary) -> list[str]:
    rank = summary[method]["spearman"]
    if rank is None or needed(rank, PRECISE) <= rank.n:
        return []
    return [
        f"For an interval of ± {PRECISE} around the rank correlation, audit about {needed(rank, PRECISE)} prompts."
    ]
