"""Writes docs/catalogue.md: every choice of every config group, with its paper and its file.

python docs/catalogue.py
"""

from __future__ import annotations

import re
from pathlib import Path

from fedsim import catalogue

ROOT = Path(__file__).resolve().parent.parent
TARGET = re.compile(r"^_target_: *fedsim\.([\w.]+)\.\w+", re.MULTILINE)
PARTS = ("strategies", "clients")  # beside fedsim/ on disk, in it once installed
HEAD = """# What can be chosen

Written by `python docs/catalogue.py` from the first lines of the YAML files; `fedsim list GROUP` prints the same.
A choice is taken with `GROUP=CHOICE`, its settings are set with `GROUP.name=value`, and `fedsim config GROUP=CHOICE`
shows them. In bold: the default.
"""


def source(text: str) -> str:
    """Return the path, from the repository's root, of the file that a YAML's `_target_` is in; "" if it has none."""
    found = TARGET.search(text)
    if not found:
        return ""
    parts = found[1].split(".")
    return "/".join(parts if parts[0] in PARTS else ["fedsim", *parts]) + ".py"


def rows(group: str) -> dict[str, str]:
    """Return choice → its line of Markdown."""
    files = catalogue.options(group, [ROOT / "configs"])
    default = catalogue.defaults().get(group)
    table = {}
    for name, file in files.items():
        text = file.read_text(encoding="utf-8")
        summary, paper = catalogue.describe(text)
        path = source(text)
        link = f"[{path}](../{path})" if path else ""
        shown = f"**`{name}`**" if name == default else f"`{name}`"
        table[name] = f"| {' | '.join(cell.replace('|', '¦') for cell in (shown, summary, paper, link))} |"
    return table


def page() -> str:
    """Return the whole page."""
    sections = []
    for group in catalogue.groups([ROOT / "configs"]):
        lines = "\n".join(rows(group).values())
        sections.append(f"\n## `{group}`\n\n| Choice | What it is | Paper | File |\n|---|---|---|---|\n{lines}\n")
    return HEAD + "".join(sections)


if __name__ == "__main__":
    (ROOT / "docs" / "catalogue.md").write_text(page(), encoding="utf-8")
