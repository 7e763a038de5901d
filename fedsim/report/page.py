"""The page around a report's sections: one file, no script, nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fedsim import __version__

# Colours after Okabe and Ito (2008), told apart by the colour-blind; dashes tell lines apart in print as well.
_LIGHT = ("#0072b2", "#d55e00", "#00855f", "#b6478b", "#3a9bd9", "#b97900", "#6f4fb0", "#222222")
_DARK = ("#5eb0ef", "#ff8a4c", "#35cfa4", "#e79ccb", "#a8dcfa", "#f3c14b", "#b9a2ea", "#eeeeee")
_DASHES = ("none", "8 3", "2 3", "9 3 2 3", "14 3", "5 2", "1 2", "9 2 2 2 2 2")

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f7f8fa; --ink: #1b1f24; --dim: #5b6570; --rule: #d9dee4;
  --accent: #0b5cad; %(light)s }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2127; --ink: #e6e9ed; --dim: #9aa5b1;
  --rule: #343c46; --accent: #7fbcff; %(dark)s } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1360px; padding: 1.2rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
h1 { font-size: 1.6rem; margin: .3rem 0 .2rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem }
p { margin: .3rem 0 .8rem; max-width: 62rem } .dim, figcaption { color: var(--dim) }
.note { border-left: 3px solid #b97900; padding-left: .7rem }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .6rem 0 } nav a { color: var(--accent) }
.legend { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: .5rem 0;
  background: var(--paper); border-bottom: 1px solid var(--rule) }
.legend span { display: inline-flex; align-items: center; gap: .4rem; white-space: nowrap } .legend svg { width: 34px }
.grid-of { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(390px, 100%%), 1fr)); gap: 14px }
.row { grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%%), 430px)); margin-bottom: 14px }
@media (min-width: 1000px) {
  .by2 { grid-template-columns: repeat(2, minmax(0, 1fr)); max-width: 900px }
  .by4 { grid-template-columns: repeat(4, minmax(0, 1fr)) } }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(560px, 100%%), 1fr)) }
figure { margin: 0; padding: 8px 10px; background: var(--card); border: 1px solid var(--rule); border-radius: 6px }
figure svg { display: block; width: 100%%; max-width: 620px; height: auto }
.picture { background: #ffffff } .picture figcaption { color: #444 }
.picture img { display: block; max-width: 100%%; margin: auto }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .28rem .8rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th { font-weight: 600 } th:first-child, td:first-child, .left th, .left td { text-align: left }
thead th { border-bottom: 2px solid var(--dim) } td small { display: block; color: var(--dim) }
td.best { font-weight: 700 } td.best small { font-weight: 400 }
details { margin: .5rem 0 } summary { cursor: pointer; color: var(--accent) }
.bar { display: inline-flex; align-items: center; gap: .4rem; color: var(--dim); margin-bottom: .4rem }
.bar img { width: 160px; height: 10px }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: var(--dim) }
svg .title { font-size: 12.5px; font-weight: 600; fill: var(--ink) } svg .tick { font-variant-numeric: tabular-nums }
svg .cell { fill: #ffffff } svg .on-light { fill: #10202c }
svg .grid { stroke: var(--rule); fill: none } svg .axis { stroke: var(--dim); fill: none }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round } svg .band { stroke: none; opacity: .16 }
svg .fill { stroke: none } svg .f0 { fill: var(--c0) } svg .f1 { fill: var(--c5) } svg .held { fill: var(--dim) }
svg .idle { fill: var(--rule); opacity: .45 } svg .late { fill: var(--c1); stroke: var(--card); stroke-width: .8 }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .2rem 0 .6rem; color: var(--dim) }
.keys span { display: inline-flex; align-items: center; gap: .4rem } .keys svg { width: 34px }
.full { grid-template-columns: 1fr }
.one { grid-template-columns: 1fr; max-width: 1120px } .one figure svg { max-width: none }
.grid-of + .grid-of { margin-top: 14px } .grid-of + p { margin-top: 1.2rem }
svg .more { stroke: var(--dim); stroke-width: .7; opacity: .5 }
%(styles)s
@media print { .legend { position: static } figure { break-inside: avoid } }
"""


def page(title: str, body: str) -> str:
    """Return a whole HTML document; its policy forbids every request."""
    styles = "\n".join(
        f"svg .line.s{i} {{ stroke: var(--c{i}); stroke-dasharray: {dash} }} "
        f"svg .band.s{i}, svg .dot.s{i} {{ fill: var(--c{i}) }}"
        for i, dash in enumerate(_DASHES)
    )
    style = _STYLE % {"light": _colours(_LIGHT), "dark": _colours(_DARK), "styles": styles}
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="generator" content="fedsim {__version__}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _colours(colours: Sequence[str]) -> str:
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))


def section(name: str, title: str, *parts: str) -> str:
    """Return a section that the navigation can point to."""
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"


def paragraph(text: str, kind: str = "dim") -> str:
    """Return a paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>'


def columns_for(count: int) -> str:
    """Return the kind of grid in which no drawing is left alone in the last row, where the screen has room for it.

    >>> [columns_for(count) for count in (1, 3, 4, 5, 7)]
    ['', '', 'by2', '', 'by4']
    """
    if count < 4 or count % 3 != 1:
        return ""
    return "by2" if count % 2 == 0 else "by4" if count % 4 != 1 else ""


def figures(drawings: Sequence[str], kind: str = "") -> str:
    """Return drawings side by side."""
    inside = "\n".join(f"<figure>{drawing}</figure>" for drawing in drawings)
    return f'<div class="grid-of {kind}">\n{inside}\n</div>'


def html_table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table, its first row the head; cells are HTML, a leading `<td` keeps a cell's own tag."""
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    lines = ["<tr>" + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row) + "</tr>" for row in rows[1:]]
    inside = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"
    return f'<div class="scroll"><table class="{kind}">{inside}</table></div>'
