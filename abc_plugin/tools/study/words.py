"""Numbers as text: as many decimals as the interval's width makes worth reading."""

from __future__ import annotations

import math

from abc_plugin.tools.study.statistics import Estimate

NOTHING = "–"


def number(value: float | None, decimals: int = 3) -> str:
    """``−0.250``; – for None, ∞ for infinity. What rounds to 0 keeps its sign, as an interval's end."""
    if value is None:
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value + 0.0:.{decimals}f}".replace("-", "−")


def decimals(width: float) -> int:
    """So that ``width`` has two significant digits; 3 where it is nothing to go by."""
    if not math.isfinite(width) or width <= 0:
        return 3
    return min(6, max(0, 1 - math.floor(math.log10(width))))


def _places(estimate: Estimate) -> int:
    if estimate.low is None or not math.isfinite(estimate.value):
        return 3 if estimate.low is None else 1
    widths = (abs(end - estimate.value) for end in (estimate.low, estimate.high) if math.isfinite(end))
    return decimals(max(widths, default=0.0))


def estimate(found: Estimate | None) -> str:
    """``0.21 [0.05, 0.37]``; without an interval the value alone."""
    if found is None:
        return NOTHING
    places = _places(found)
    return number(found.value, places) + (f" {ends(found)}" if found.low is not None else "")


def ends(found: Estimate | None) -> str:
    """``[0.05, 0.37]``."""
    if found is None or found.low is None:
        return NOTHING
    return f"[{number(found.low, _places(found))}, {number(found.high, _places(found))}]"


def size(found: Estimate) -> str:
    """A difference without its sign: −0.21 [−0.37, −0.05] is ``0.21 [0.05, 0.37]``."""
    if found.value >= 0 or found.low is None:
        return estimate(found if found.value >= 0 else Estimate(-found.value))
    return estimate(Estimate(-found.value, -found.high, -found.low))


def plus_minus(value: float, half: float | None) -> str:
    """``3.90 ± 0.18``."""
    return number(value) if half is None else f"{number(value, decimals(half))} ± {number(half, decimals(half))}"


def p_value(p: float | None) -> str:
    """``0.037``, ``< 0.001``."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.{3 if p < 0.1 else 2}f}"


def p_equation(p: float) -> str:
    """``p = 0.037``, ``p < 0.001``."""
    return f"p {p_value(p)}" if p < 0.001 else f"p = {p_value(p)}"


def seeds(n: int, kind: str = "") -> str:
    """``10 paired seeds``."""
    return f"{n} {kind}{' ' if kind else ''}seed{'' if n == 1 else 's'}"
