"""A completion as HTML: every token on a background that shows its credit."""

from __future__ import annotations

import re
from html import escape

from abc_plugin.report.samples import Sample

# The usual ways to write a special token; the samples file holds texts, not ids, so this goes by looks.
SPECIAL = re.compile(r"<\|[^<>]*\|>|</?s>|<(pad|bos|eos|unk)>|<(start|end)_of_turn>|\[(PAD|SEP|CLS|UNK|EOS|BOS)\]")
SWATCHES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # times the uniform share, in the legend


def intensity(share: float, tokens: int) -> float:
    """Strength of a token's colour: r / (r + 2) with r = |share| · tokens, its multiple of the uniform share.

    In [0, 1): 0 without credit, 1/3 at the uniform share 1/tokens, strictly increasing, never saturated.
    """
    ratio = abs(share) * tokens
    return ratio / (ratio + 2.0)


def visible(text: str) -> str:
    """Text in which nothing is invisible or reorders its surroundings: ↵, ⇥, and \\u200b for what does not print."""
    marks = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍"}
    return "".join(marks.get(char) or (char if char.isprintable() else f"\\u{ord(char):04x}") for char in text)


def token_text(token: str) -> str:
    """As ``visible``; spaces that a reader could overlook (at the end, in a row) become middle dots."""
    if not token:
        return "∅"
    return re.sub(r"(?<= ) | (?= )| (?=\n)| $", "·", visible(token))


def token_span(token: str, share: float, tokens: int, reward: float) -> str:
    """One token: --c is its intensity, class ``neg`` negative credit, data-tip the numbers shown on hover."""
    classes = ["t"] + ["neg"] * (share < 0) + ["special"] * bool(SPECIAL.fullmatch(token.strip()))
    tip = f"“{visible(token)}” · credit {100 * share:.1f} % ({share * tokens:.1f} × uniform) · reward {reward:.2f}"
    return (
        f'<span class="{" ".join(classes)}" style="--c:{intensity(share, tokens):.4f}" '
        f'data-tip="{escape(tip)}" tabindex="-1">{escape(token_text(token))}</span>'
    )


def completion(sample: Sample) -> str:
    """All tokens of a sample."""
    if not sample.tokens:
        return '<span class="muted">(no tokens)</span>'
    length = len(sample.tokens)
    shares = zip(sample.tokens, sample.credit, strict=True)
    return "".join(token_span(token, share, length, sample.reward) for token, share in shares)


def legend(signed: bool) -> str:
    """What the colours and marks mean, with a swatch per multiple of the uniform share."""
    swatches = "".join(_swatch(ratio) for ratio in (*(-r for r in SWATCHES[:2:-1] if signed), *SWATCHES))
    negative = " Blue: negative credit, by its size." if signed else ""
    return (
        f'<div class="legend"><p class="swatches">{swatches}</p><p>Background: the token\'s share of the credit, as a '
        f"multiple of the uniform share 1/n in a response of n tokens.{negative} Credit is the weight that the method "
        "gives the token; the weights of a response sum to 100 %. Point at a token, or tap it, for its numbers.</p>"
        "<p><b>↵</b> newline, <b>⇥</b> tab, <b>·</b> space at an end or in a row, <b>∅</b> token without text of its "
        'own, <span class="t special" style="--c:0">dashed</span> special token.</p></div>'
    )


def _swatch(ratio: float) -> str:
    negative = " neg" if ratio < 0 else ""
    return f'<span class="t{negative}" style="--c:{intensity(ratio, 1):.4f}">{ratio:g}×</span>'
