"""A token to look at: its colour, its text with nothing invisible, its numbers. Credit is orange, negative blue.

The two are told apart by colour-blind readers, and each gets darker with its size.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any, NamedTuple

from abc_plugin.report.samples import Sample

HOT, COLD = (240, 120, 0), (90, 155, 255)  # of the strongest credit, red green blue
SWATCHES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # times the uniform share, in legends


def intensity(share: float, tokens: int) -> float:
    """Strength of a token's colour: r / (r + 2) with r = |share| · tokens, its multiple of the uniform share.

    In [0, 1): 0 without credit, 1/3 at the uniform share 1/tokens, strictly increasing, never saturated.
    """
    ratio = abs(share) * tokens
    return ratio / (ratio + 2.0)


def tint(strength: float, *, negative: bool = False) -> str:
    """A token's background on white, as #rrggbb; ``strength`` in [0, 1] as ``intensity`` gives it."""
    return "#" + "".join(f"{round(255 + (part - 255) * strength):02x}" for part in (COLD if negative else HOT))


def visible(text: str) -> str:
    """Text in which nothing is invisible or reorders its surroundings: ↵, ⇥, and \\u200b for what does not print."""
    marks = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍"}
    return "".join(marks.get(char) or (char if char.isprintable() else f"\\u{ord(char):04x}") for char in text)


def token_text(token: str) -> str:
    """As ``visible``; spaces that a reader could overlook (at the end, in a row) become middle dots."""
    if not token:
        return "∅"
    return re.sub(r"(?<= ) | (?= )| (?=\n)| $", "·", visible(token))


class Token(NamedTuple):
    """A token as a page shows it."""

    text: str
    tip: str  # its numbers, where one points at it
    intensity: float
    classes: str  # of CSS: neg negative credit, special, given not the policy's


def shown_tokens(sample: Any) -> list[Token]:
    """The tokens of a sample for the page."""
    shown = []
    for at, (token, share) in enumerate(zip(sample.tokens, sample.credit, strict=True)):
        marks = {"neg": share is not None and share < 0, "special": sample.special(at), "given": share is None}
        strength = intensity(share or 0.0, sample.actions)
        shown.append(Token(token_text(token), in_words(sample, at), strength, " ".join(m for m in marks if marks[m])))
    return shown


def in_words(sample: Sample, token: int) -> str:
    """All numbers of a token on one line, for hovering."""
    share, parts = sample.credit[token], [f"“{visible(sample.tokens[token])}”"]
    if share is None:
        parts.append("not chosen by the policy: no credit")
    else:
        parts.append(f"credit {100 * share:.1f} % ({share * sample.actions:.1f} × uniform)")
    return " · ".join(parts + [f"{what} {value}" for what, value in sample.numbers(token)])


def token_span(sample: Sample, token: int) -> str:
    """One token: --c its intensity, class ``neg`` negative credit, ``given`` not the policy's, data-tip numbers."""
    share = sample.credit[token]
    classes = ["t"] + ["neg"] * (share is not None and share < 0) + ["special"] * sample.special(token)
    classes += ["given"] * (share is None)
    return (
        f'<span class="{" ".join(classes)}" style="--c:{intensity(share or 0.0, sample.actions):.4f}" '
        f'data-tip="{escape(in_words(sample, token))}" tabindex="-1">{escape(token_text(sample.tokens[token]))}</span>'
    )


def completion(sample: Sample) -> str:
    """All tokens of a sample."""
    if not sample.tokens:
        return '<span class="muted">(no tokens)</span>'
    return "".join(token_span(sample, token) for token in range(len(sample.tokens)))


def legend(signed: bool) -> str:
    """What the colours and marks mean, with a swatch per multiple of the uniform share."""
    swatches = "".join(_swatch(ratio) for ratio in (*(-r for r in SWATCHES[:2:-1] if signed), *SWATCHES))
    rule = (
        "Signed credit: orange raised the reward, blue lowered it; absolute shares of a response sum to 100 %."
        if signed
        else "Credit is the weight that the method gives the token; the weights of a response sum to 100 %."
    )
    return (
        f'<div class="legend"><p class="swatches">{swatches}</p><p>Background: the token\'s share of the credit, as a '
        f"multiple of the uniform share 1/n in a response of n tokens. {rule} Point at a token, or tap it, for its "
        "numbers.</p>"
        "<p><b>↵</b> newline, <b>⇥</b> tab, <b>·</b> space at an end or in a row, <b>∅</b> token without text of its "
        'own, <span class="t special" style="--c:0">dashed</span> special token.</p></div>'
    )


def _swatch(ratio: float) -> str:
    negative = " neg" if ratio < 0 else ""
    return f'<span class="t{negative}" style="--c:{intensity(ratio, 1):.4f}">{ratio:g}×</span>'
