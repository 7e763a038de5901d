"""The table at the top of a page of results: every claim of every experiment on it, with what came of it."""

from __future__ import annotations

import re
from collections.abc import Iterator

NAME = "overview"
_SECTION = re.compile(r"<!-- (?P<name>[\w-]+) -->\n(?P<text>.*?)<!-- /(?P=name) -->", flags=re.DOTALL)
_WRITTEN = "**Not the experiment as written"


def with_overview(page: str) -> str:
    """Return a page with the table of its sections in front of them, in the place of the one that it had."""
    begin, end = f"<!-- {NAME} -->", f"<!-- /{NAME} -->"
    bare = re.sub(f"{begin}.*?{end}\\n*", "", page, flags=re.DOTALL)
    sections = list(_SECTION.finditer(bare))
    rows = [row for found in sections for row in _rows(found["name"], found["text"])]
    if not rows:
        return page
    lines = ["| experiment | claim | verdict | its controls |", "|---|---|---|---|", *rows]
    at = sections[0].start()
    return f"{bare[:at]}{begin}\n" + "\n".join(lines) + f"\n{end}\n\n{bare[at:]}"


def _rows(name: str, text: str) -> Iterator[str]:
    """Yield a row for each claim of an experiment; the first one says if its controls came out as they must."""
    verdicts: dict[str, str] = {}
    for cells in _lines(text, "claim"):
        verdicts[cells[0]] = cells[-1].strip("*")  # the last row of a claim in several cells is of all of them
    wrong = [cells[-1].endswith("**wrong**") for cells in _lines(text, "control of the experiment")]
    controls = f"**wrong in {sum(wrong)} of {len(wrong)}**" if any(wrong) else "right" if wrong else "none"
    controls += ", not as written" if _WRITTEN in text else ""
    first = f"[`{name}`](#{name})"
    for claim, verdict in verdicts.items():
        yield f"| {first} | {claim} | {verdict} | {controls} |"
        first = controls = ""


def _lines(text: str, first: str) -> Iterator[list[str]]:
    """Yield the cells of each line of the table whose first column is called so."""
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif cells[0] == first:
            inside = True
        elif inside and set(line) - set("|-"):
            yield cells
