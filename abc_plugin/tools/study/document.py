"""A report as data, and its two texts: Markdown, and a page that holds its pictures."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from html import escape

from abc_plugin.report.page import table as html_table
from abc_plugin.report.style import document
from abc_plugin.report.tokens import visible


@dataclass(frozen=True)
class Grid:
    """A table; columns from ``numbers`` on are numbers."""

    header: tuple[str, ...]
    rows: list[list[str]]
    numbers: int = 1
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a report, in the order of its fields."""

    title: str
    words: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    pictures: list[tuple[str, str]] = field(default_factory=list)  # file name, caption


def as_markdown(mark: str, headline: str, sections: list[Section], command: str) -> str:
    """The whole text; ``mark`` is an invisible first line."""
    parts = [f"<!-- {mark} -->", f"# {_plain(headline)}"]
    for section in sections:
        parts.append(f"## {_plain(section.title)}")
        parts += [_plain(paragraph) for paragraph in section.words]
        if section.items:
            parts.append("\n".join(f"- {_plain(item)}" for item in section.items))
        parts += [_grid(grid) for grid in section.grids]
        parts += [f"![{_plain(caption)}]({name})" for name, caption in section.pictures]
    as_code = re.sub(r"[`\n]", " ", visible(command))
    parts.append(f"Made by `{as_code}`.")
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that came from data, without any meaning in Markdown."""
    text = re.sub(r"([\\`*_|#~])", r"\\\1", visible(text).replace("\n", " "))
    return text.replace("<", "&lt;").replace("](", "]\\(")


def _grid(grid: Grid) -> str:
    rule = ["---" if place < grid.numbers else "---:" for place in range(len(grid.header))]
    lines = [[_plain(cell) for cell in grid.header], rule, *([_plain(cell) for cell in row] for row in grid.rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{_plain(grid.title)}**\n\n{table}" if grid.title else table


def as_html(mark: str, headline: str, sections: list[Section], pictures: dict[str, bytes], command: str) -> str:
    """The page, self-contained."""
    body = "".join(_html(section, pictures) for section in sections)
    return document(mark, visible(headline), body, visible(command))


def _html(section: Section, pictures: dict[str, bytes]) -> str:
    words = "".join(f"<p>{escape(visible(paragraph))}</p>" for paragraph in section.words)
    items = "".join(f"<li>{escape(visible(item))}</li>" for item in section.items)
    listed = f"<ul>{items}</ul>" if items else ""
    grids = "".join(_titled(grid) for grid in section.grids)
    shown = "".join(_figure(pictures[name], caption) for name, caption in section.pictures)
    return f"<h2>{escape(visible(section.title))}</h2>\n{words}{listed}{grids}{shown}\n"


def _titled(grid: Grid) -> str:
    title = f"<h3>{escape(visible(grid.title))}</h3>" if grid.title else ""
    return f"{title}{html_table(grid.header, grid.rows, grid.numbers)}"


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = escape(visible(caption))
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
