"""From intervals to sentences. The first is the advice; nothing is called better that an interval does not carry."""

from __future__ import annotations

from abc_plugin.tools.audit.estimates import LEVEL, Interval, needed
from abc_plugin.tools.audit.head_map import Choice, HeadMap
from abc_plugin.tools.audit.summary import LEAVE_ONE_OUT, RANDOM, RECENCY, Estimates, Summary, Tables, gain

DEGREES = ((0.2, "weakly"), (0.5, "moderately"), (1.01, "closely"))  # a rank correlation below the number
HEADLINES = {
    "better": "{name} credit of this model is better than uniform: it follows, {degree}, which tokens moved the score",
    "worse": "{name} credit of this model is worse than uniform: it points away from the tokens that moved the score",
    "no better": "{name} credit of this model is no better than uniform: nothing shows that it follows which tokens "
    "moved the score",
    "open": "Whether {name} credit of this model is better than uniform is open: one of two measures says so, the "
    "other {contrary}",
}
MEASURES = {"spearman": "in rank correlation", "separation": "in the curves"}
WORDS = {1: "better", -1: "worse", 0: "not clearly different"}  # by the sign of a difference's interval
BASELINES = {RANDOM: "random credit", RECENCY: "recency, credit that knows only how late a token comes"}
NAMED = 4  # heads that a sentence names
PRECISE = 0.05  # half of an interval that settles most questions


def advise(summary: Summary, tables: Tables, head_map: HeadMap) -> list[str]:
    """The advice on the method audited (abc, or the first one given), then what supports or qualifies it."""
    method = "abc" if "abc" in summary else next(iter(summary))
    own = summary[method]
    sentences = [_headline("ABC" if method == "abc" else method, own, summary[LEAVE_ONE_OUT]["separation"])]
    if own["spearman"] and own["separation"]:
        sentences += _sizes(own)
        sentences += [
            f"Against {words}: {_compared(gains)}."
            for name, words in BASELINES.items()
            if name != method and (gains := _gains(tables, method, name))
        ]
    sentences += _other_methods(method, tables)
    if "abc" in summary:
        sentences += [_choice(choice, head_map) for choice in (head_map.layer, head_map.head, head_map.kept) if choice]
        sentences += _heads(head_map)
    if own["spearman"] and (enough := needed(own["spearman"], PRECISE)) > own["spearman"].n:
        sentences.append(f"For an interval of ± {PRECISE} around the rank correlation, audit about {enough} prompts.")
    return [sentence for sentence in sentences if sentence]


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


def _headline(name: str, own: Estimates, ceiling: Interval | None) -> str:
    rank, apart = own["spearman"], own["separation"]
    if rank is None or apart is None:
        return f"{name} credit orders no tokens, so there is nothing to compare with what their removal does."
    degree = next(word for below, word in DEGREES if abs(rank.mean) < below)
    contrary = "says the opposite" if min(rank.sign, apart.sign) < 0 else "does not"
    part = ""
    if ceiling and ceiling.low > 0 and apart.mean > 0:
        part = f" ({100 * apart.mean / ceiling.mean:.0f} % of leave-one-out's own)"
    return (
        f"{HEADLINES[verdict(own)].format(name=name, degree=degree, contrary=contrary)} (rank correlation with what "
        f"removing each token does to the score {rank}, curves apart by {apart} score units{part}; 95 % intervals, "
        f"{rank.n} prompts)."
    )


def _sizes(own: Estimates) -> list[str]:
    """Whether it finds the tokens that matter, even if not which way."""
    if own["size"] is None or own["size"].sign <= 0:
        return []
    but = "" if own["spearman"].sign > 0 else ", but not which of them raise the score and which lower it"
    return [f"It finds tokens that matter{but}: rank correlation with the sizes of the effects {own['size']}."]


def _gains(tables: Tables, method: str, other: str, level: float = LEVEL) -> dict[str, Interval]:
    """Paired differences of two methods by measure; without those not defined."""
    gains = gain(tables, method, other, MEASURES, level)
    return {name: estimate for name, estimate in gains.items() if estimate}


def _compared(gains: dict[str, Interval]) -> str:
    return ", ".join(f"{WORDS[gain.sign]} {MEASURES[name]} (by {gain})" for name, gain in gains.items())


def _other_methods(method: str, tables: Tables) -> list[str]:
    """Which other methods are better, the best first, by intervals widened for the methods' number."""
    others = [name for name in tables if name not in (method, RANDOM, RECENCY, LEAVE_ONE_OUT, "uniform")]
    level = 1 - (1 - LEVEL) / max(1, len(others))
    compared = {name: gains for name in others if (gains := _gains(tables, name, method, level))}
    wins = {name: sum(gain.sign > 0 for gain in gains.values()) for name, gains in compared.items()}
    most = max(wins.values(), default=0)
    if compared and not most:
        return [f"No other method audited ({', '.join(compared)}) is clearly better in either measure."]
    best = [name for name in compared if wins[name] == most]
    best.sort(key=lambda name: compared[name]["spearman"].mean if "spearman" in compared[name] else -1.0, reverse=True)
    return [f"--reward_shaping {name} against {method}: {_compared(compared[name])}." for name in best]


def _choice(choice: Choice, head_map: HeadMap) -> str:
    """What is said of a layer or heads chosen on one half, by the other half; "" where that half defines nothing."""
    if choice.reported is None:
        return ""
    name, settings, gain = f"Layer {choice.layer}", f"--shaping.layer {choice.layer}", choice.over_configured
    if choice.heads is not None:
        name, settings = f"{name} {_numbered(choice.heads)}", f"{settings} --shaping.heads {_listed(choice.heads)}"
    elif head_map.read is not None:
        name, settings = f"{name}, all heads", f"{settings} --shaping.heads all"
    if (choice.layer, choice.heads) == (head_map.layers[head_map.configured], head_map.read):
        return f"{name}, read now, is also what half of the prompts would choose: {choice.reported} on the other."
    compared = "not clearly more than what is read now" + (f" (difference {gain})" if gain else "")
    if gain and gain.sign > 0:
        compared = f"{gain} more than what is read now: use {settings}"
    return f"{name}, chosen on half of the prompts, has {choice.reported} on the other half, {compared}."


def _heads(head_map: HeadMap) -> list[str]:
    """Which heads follow the removals and which run against them, and what follows for those read now."""
    now = head_map.layers[head_map.configured]
    read = range(head_map.signed_LH.shape[1]) if head_map.read is None else head_map.read
    against = [head for layer, head in head_map.against if layer == now and head in read]
    kept = [head for head in read if head not in against]
    sentences = [
        f"Of {head_map.signed_LH.size} heads {_named(head_map.carrying)} follow the removals and "
        f"{_named(head_map.against)} run against them, with intervals widened for their number."
    ]
    if against and kept:
        sentences.append(f"To drop {_numbered(against)} of the layer read now, use --shaping.heads {_listed(kept)}.")
    elif against:
        sentences.append("All heads read now run against them: read another layer, or use another method.")
    return sentences


def _named(heads: list[tuple[int, int]]) -> str:
    """How many, and the first few by name: "2 (layer 3 head 1, layer 5 head 0)"."""
    names = [f"layer {layer} head {head}" for layer, head in heads[:NAMED]]
    more = [f"{len(heads) - NAMED} more"] if len(heads) > NAMED else []
    return f"{len(heads)} ({', '.join(names + more)})" if heads else "none"


def _numbered(heads: list[int]) -> str:
    return f"head{'s' * (len(heads) > 1)} {_listed(heads)}"


def _listed(heads: list[int]) -> str:
    return ",".join(map(str, heads))
