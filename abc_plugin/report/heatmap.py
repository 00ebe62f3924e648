"""A completion as a PNG: its tokens on a grid of characters, on backgrounds that show their credit."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.cells import cell_len, chop_cells

from abc_plugin.report.samples import Sample
from abc_plugin.report.style import tint
from abc_plugin.report.tokens import SWATCHES, intensity, token_text, visible

COLUMNS = 96
CELL = (0.0905, 0.30)  # inches; DejaVu Sans Mono at SIZE is that wide, and a number stands under each token
SIZE, SMALL = 10.5, 6.5  # points
MARGIN = 2  # cells
PROMPT_ROWS = 6  # of a long prompt the end is shown
INK, GREY = "#1c1e21", "#6b7280"
MONO, SANS = "DejaVu Sans Mono", "DejaVu Sans"  # matplotlib brings both
TOKENS = 1000  # of a completion; drawing takes a millisecond a token


@dataclass(frozen=True)
class Cell:
    """Part of a token on one row of the grid."""

    token: int
    row: int
    column: int
    text: str
    last: bool  # of its token: the number stands under it


def lay_out(texts: list[str], columns: int = COLUMNS) -> tuple[list[Cell], int]:
    """Where each token stands, and the number of rows: wrapped like text, but no token is split that fits a row.

    A newline ends its row; wide characters (CJK) take two columns.
    """
    cells: list[Cell] = []
    row = column = 0
    for token, text in enumerate(texts):
        lines = text.split("\n")
        for at, line in enumerate(lines):
            if at:
                row, column = row + 1, 0
            if column and column + cell_len(line) > columns:
                row, column = row + 1, 0
            for part, chunk in enumerate(chop_cells(line, columns) if line else []):
                if part:
                    row, column = row + 1, 0
                cells.append(Cell(token, row, column, chunk, False))
                column += cell_len(chunk)
    last = {cell.token: index for index, cell in enumerate(cells)}
    return [Cell(c.token, c.row, c.column, c.text, last[c.token] == i) for i, c in enumerate(cells)], row + 1


def draw(samples: list[Sample], tokens: int = TOKENS) -> bytes:
    """A PNG of the samples, ``tokens`` of each at most, under their captions, with one legend.

    No tofu: what cannot be drawn is shown as its code point, with a note (``drawable``).
    """
    missing: set[str] = set()
    blocks = [_Block(sample, tokens, missing) for sample in samples]
    note = _missing_note(missing)
    rows = sum(block.rows for block in blocks) + 3.2 + bool(note)
    width = COLUMNS + 2 * MARGIN
    figure = Figure(figsize=(width * CELL[0], rows * CELL[1]), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-MARGIN, COLUMNS + MARGIN), ylim=(rows, 0))
    axes.set_axis_off()
    families = [MONO, SANS, *sorted({name for block in blocks for name in block.families})]
    row = 0
    for block in blocks:
        block.draw(axes, row, families)
        row += block.rows
    _legend(axes, row + 0.5, signed=any(sample.signed for sample in samples))
    if note:
        _write(axes, 0, rows - 0.5, note, families, size=SMALL + 1.5, color=GREY)
    png = io.BytesIO()
    figure.savefig(png, format="png", facecolor="white")
    return png.getvalue()


class _Block:
    """One completion: caption, grey prompt, tokens."""

    def __init__(self, sample: Sample, tokens: int, missing: set[str]) -> None:
        self.sample, self.families = sample, set()
        shown = min(len(sample.tokens), tokens)
        cut = f" · the first {shown} are shown" if shown < len(sample.tokens) else ""
        self.caption = textwrap.wrap(self._drawable(visible(sample.caption + cut), missing), COLUMNS + 4)
        self.prompt = self._prompt(re.split("(?<= )", self._drawable(visible(sample.prompt), missing)))
        texts = [self._drawable(token_text(token), missing) for token in sample.tokens[:shown]]
        self.cells, count = lay_out(texts)
        self.above = 0.45 + len(self.caption) * 0.75
        self.top = self.above + len(self.prompt) * 0.75
        self.rows = self.top + count + 0.9

    def _drawable(self, text: str, missing: set[str]) -> str:
        text, families, lost = drawable(text)
        self.families |= families
        missing |= lost
        return text

    @staticmethod
    def _prompt(texts: list[str]) -> list[str]:
        cells, count = lay_out(texts)
        lines = ["".join(cell.text for cell in cells if cell.row == row) for row in range(count)]
        return lines if count <= PROMPT_ROWS else ["…", *lines[-PROMPT_ROWS + 1 :]]

    def draw(self, axes: Axes, row: float, families: list[str]) -> None:
        for at, line in enumerate(self.caption):
            _write(axes, 0, row + 0.7 + 0.75 * at, line, families, size=SIZE - 1, weight="bold")
        for at, line in enumerate(self.prompt):
            _write(axes, 0, row + self.above + 0.3 + 0.75 * at, line, families, size=SIZE, color=GREY)
        boxes, colours = [], []
        for cell in self.cells:
            share, y = self.sample.credit[cell.token], row + self.top + cell.row
            boxes.append(Rectangle((cell.column + 0.04, y + 0.02), cell_len(cell.text) - 0.08, 0.64))
            colours.append(tint(intensity(share or 0.0, self.sample.actions), negative=(share or 0.0) < 0))
            ink = GREY if share is None else INK
            style = "italic" if self.sample.special(cell.token) else "normal"
            _write(axes, cell.column, y + 0.5, cell.text, families, size=SIZE, color=ink, style=style)
            if cell.last and share is not None:
                _number(axes, cell, y + 0.9, share)
        axes.add_collection(PatchCollection(boxes, facecolor=colours, edgecolor="#e5e7eb", linewidth=0.4, zorder=0))


def _number(axes: Axes, cell: Cell, y: float, share: float) -> None:
    """The share in percent under the token, where there is room for it."""
    text = f"{100 * share:z.0f}"
    if text != "0" and len(text) * SMALL <= (cell_len(cell.text) + 0.4) * SIZE:
        _write(axes, cell.column + cell_len(cell.text) / 2, y, text, [MONO], size=SMALL, color=GREY, ha="center")


def _legend(axes: Axes, row: float, *, signed: bool) -> None:
    ratios = [*(-ratio for ratio in SWATCHES[:0:-1]), *SWATCHES] if signed else [*SWATCHES]
    for at, ratio in enumerate(ratios):
        colour = tint(intensity(ratio, 1), negative=ratio < 0)
        axes.add_patch(Rectangle((5 * at, row), 5, 0.7, facecolor=colour, edgecolor="#e5e7eb", linewidth=0.4))
        _write(axes, 5 * at + 2.5, row + 0.5, f"{ratio:g}×", [MONO], size=SIZE - 2, ha="center")
    _write(axes, 5 * len(ratios) + 1, row + 0.5, "× uniform share (1/n of n tokens)", [SANS], size=SIZE - 2)
    direction = "Orange raised the reward, blue lowered it. " if signed else ""
    marks = "Grey: prompt, tokens not chosen by the policy. Italic: special. ↵ newline, · space, ∅ no text of its own."
    text = f"{direction}Small numbers: share of the credit in percent. Score: the reward model's units. {marks}"
    for at, line in enumerate(textwrap.wrap(text, 130)):
        _write(axes, 0, row + 1.4 + 0.7 * at, line, [SANS], size=SIZE - 2, color=GREY)


def _write(axes: Axes, x: float, y: float, text: str, families: list[str], **style: object) -> None:
    style = {"color": INK} | style
    axes.text(x, y, text, family=families, va="baseline", parse_math=False, **style)


def drawable(text: str) -> tuple[str, set[str], set[str]]:
    """(text, families, missing): what can be drawn here, with which fonts beside DejaVu, and what cannot.

    A character that no installed font has a glyph for is replaced by its code point, as in ``\\u4f60``.
    """
    families, missing, out = set(), set(), []
    for char in text:
        family = None if char in "\n " or ord(char) < 127 else _family(char)
        if family == "":
            missing.add(char)
            char = f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
        elif family:
            families.add(family)
        out.append(char)
    return "".join(out), families, missing


@cache
def _family(char: str) -> str | None:
    """The family of a font with the character: None if it is one of matplotlib's own, empty if there is none."""
    for family, font in _fonts():
        if font.get_char_index(ord(char)):
            return None if family in (MONO, SANS) else family
    return ""


@cache
def _fonts() -> list[tuple[str, font_manager.FT2Font]]:
    """Upright outline fonts by family, matplotlib's own first. Bitmap fonts (colour emoji) cannot be drawn."""
    return list(_readable_fonts())


def _readable_fonts() -> Iterator[tuple[str, font_manager.FT2Font]]:
    seen = set()
    entries = sorted(font_manager.fontManager.ttflist, key=lambda e: (e.name != MONO, e.name != SANS, e.name))
    for entry in entries:
        if entry.name in seen or entry.style != "normal" or entry.name.startswith("Last Resort"):
            continue
        try:
            font = font_manager.get_font(entry.fname)
        except (OSError, RuntimeError):
            continue
        if font.scalable:
            seen.add(entry.name)
            yield entry.name, font


def _missing_note(missing: set[str]) -> str:
    if not missing:
        return ""
    return (
        f"{len(missing)} character{'s' * (len(missing) > 1)} without a glyph in the fonts of this machine, shown as "
        r"code points such as \u4f60: install a font for them, e.g. Noto Sans CJK."
    )
