"""Colours, and the frame of a page: no fonts, scripts or images from elsewhere; light and dark; one column on a phone.

Credit is orange, negative credit blue: told apart by colour-blind readers, and each gets darker with its size.
"""

from __future__ import annotations

from html import escape

HOT, COLD, STRENGTH = (240, 120, 0), (90, 155, 255), 1.0


def tint(intensity: float, *, negative: bool = False) -> str:
    """A token's background on white, as #rrggbb; ``intensity`` in [0, 1] as ``tokens.intensity`` gives it."""
    share = intensity * STRENGTH
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in (COLD if negative else HOT))


_LIGHT = f"--hot:{' '.join(map(str, HOT))}; --cold:{' '.join(map(str, COLD))}; --strength:{STRENGTH};"

CSS = """
:root { color-scheme: light dark; --page:#fff; --card:#f6f7f9; --ink:#1c1e21; --muted:#5c6370; --line:#d9dce1;
  LIGHT }
@media (prefers-color-scheme: dark) { :root { --page:#16181c; --card:#1f2228; --ink:#e8e8e8; --muted:#a2a8b3;
  --line:#3a3d44; --hot:190 80 0; --cold:40 110 225; --strength:.85; } }
* { box-sizing:border-box; }
body { margin:0 auto; max-width:68rem; padding:1rem; background:var(--page); color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif; }
h1 { font-size:1.5rem; line-height:1.3; margin:.5rem 0; text-wrap:balance; }
h2 { font-size:1.15rem; margin:2.2rem 0 .6rem; padding-top:.8rem; border-top:1px solid var(--line); }
h3 { font-size:.85rem; font-weight:600; color:var(--muted); margin:0 0 .3rem; }
.muted, .legend, figcaption, footer { color:var(--muted); font-size:.88rem; }
.wide { overflow-x:auto; }
table { border-collapse:collapse; font-size:.9rem; font-variant-numeric:tabular-nums; }
th, td { text-align:left; padding:.3rem .9rem .3rem 0; border-bottom:1px solid var(--line); vertical-align:top; }
td.number, th.number { text-align:right; }
td.number { white-space:nowrap; }
table.pairs td + td { overflow-wrap:anywhere; }
th { font-weight:600; }
figure { margin:0; } img { display:block; width:100%; height:auto; }
article { margin:0 0 1.6rem; }
.prompt { white-space:pre-wrap; overflow-wrap:anywhere; max-height:12em; overflow:auto; margin:.1rem 0 .5rem;
  padding-left:.7rem; border-left:3px solid var(--line); }
.sides { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(19rem,100%),1fr)); gap:.8rem; }
.card { position:relative; background:var(--card); border:1px solid var(--line); border-radius:.5rem;
  padding:.6rem .8rem .8rem; min-width:0; }
.text { white-space:pre-wrap; overflow-wrap:anywhere; line-height:1.9; }
.t { background:rgb(var(--hot) / calc(var(--c) * var(--strength))); border-radius:.2em; padding:.12em 0; outline:none;
  box-decoration-break:clone; -webkit-box-decoration-break:clone; box-shadow:inset -1px 0 var(--card); }
.t.neg { background:rgb(var(--cold) / calc(var(--c) * var(--strength))); }
.t.special { border:1px dashed var(--muted); font-family:ui-monospace,monospace; font-size:.85em; padding:.05em .2em; }
.text .t:hover, .text .t:focus { box-shadow:0 0 0 2px var(--ink); }
.text .t:hover::after, .text .t:focus::after { content:attr(data-tip); position:absolute; z-index:1; left:.8rem;
  top:calc(100% - .4rem); max-width:calc(100% - 1.6rem); padding:.25rem .6rem; border-radius:.3rem;
  font:.82rem/1.4 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif; white-space:normal;
  color:var(--page); background:var(--ink); }
.text:has(.t:hover) .t:focus:not(:hover)::after { content:none; }
.legend p { margin:.4rem 0; } .swatches { display:flex; color:var(--ink); }
.swatches .t { padding:.1em .6em; border-radius:0; }
.t.given { background:none; color:var(--muted); }
details { margin:0 0 .6rem; } summary { cursor:pointer; font-weight:600; padding:.3rem 0; }
.chart { margin:.6rem 0 0; } .chart svg { display:block; height:3.2rem; }
.chart .pos { fill:rgb(var(--hot)); } .chart .neg { fill:rgb(var(--cold)); } .chart line { stroke:var(--muted); }
code { font-family:ui-monospace,monospace; font-size:.92em; overflow-wrap:anywhere; }
footer { margin:2.5rem 0 1rem; padding-top:.8rem; border-top:1px solid var(--line); }
""".replace("LIGHT", _LIGHT)

# No script, and nothing from anywhere but this file: the browser enforces what the page promises.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, sentence: str, body: str, command: str) -> str:
    """A whole page: ``body`` is HTML, the rest text."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>\n"
        f"<main><h1>{escape(sentence)}</h1>\n{body}</main>\n"
        f"<footer>Made by <code>{escape(command)}</code></footer></body></html>\n"
    )
