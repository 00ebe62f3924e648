"""Pages: one self-contained file each, nothing from elsewhere, light and dark, one column on a phone.

Templates stand beside their users: ``render("report/templates/table.html", …)``. Every value is escaped and made
visible (``token_colours.visible``) unless it is Markup, which only templates and the functions here make. Every
template may use ``table(…)``, ``tokens.completion(sample)``, a sample's tokens on backgrounds of their credit, and
``tokens.legend(signed)``, what these mean.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from abc_plugin.report.token_colours import COLD, HOT, SWATCHES, intensity, shown_tokens, visible


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


environment = Environment(
    loader=PackageLoader("abc_plugin", ""),
    autoescape=select_autoescape(["html"]),
    finalize=_shown,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.filters |= {"picture": lambda png: Markup(f"data:image/png;base64,{base64.b64encode(png).decode()}")}


def render(template: str, **values: Any) -> Markup:
    """A template, by its path in the package, with these values."""
    return Markup(environment.get_template(template).render(values))


def document(title: str, heading: str, body: Markup, command: str) -> str:
    """A whole page; ``command`` is what made it, for its footer."""
    return render("report/templates/document.html", title=title, heading=heading, body=body, command=command)


def table(
    rows: pd.DataFrame | Iterable[Sequence[Any]], header: Sequence[str] = (), *, numbers: int = 1, kind: str = ""
) -> Markup:
    """A table; its columns from index ``numbers`` on are right-aligned numbers. A frame's header is its columns."""
    if isinstance(rows, pd.DataFrame):
        header, rows = list(rows.columns), rows.itertuples(index=False)
    return render("report/templates/table.html", header=header, rows=rows, numbers=numbers, kind=kind)


environment.globals |= {"hot": HOT, "cold": COLD, "swatches": SWATCHES, "intensity": intensity}
environment.globals |= {"shown_tokens": shown_tokens, "table": table}
environment.globals["tokens"] = tokens = environment.get_template("report/templates/tokens.html").module
