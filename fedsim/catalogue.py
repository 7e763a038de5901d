"""What can be chosen: the config groups, their choices, and the line that describes each.

Reads the YAML files as text, so that listing needs neither Hydra nor torch.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

from fedsim import plugins
from fedsim.errors import UserError, did_you_mean


class Entry(NamedTuple):
    """One choice of a group, as its YAML's first line describes it."""

    name: str  # as it is written on the command line, e.g. "flower/krum"
    summary: str
    paper: str  # "" where there is none
    origin: str = ""  # of a plug-in's choice: package and version


def roots(config_dir: Path | None = None) -> list[Traversable]:
    """Return the folders of config groups: fedsim's own, the user's, the plug-ins'; the first that has a file counts.

    Raises:
        UserError: `config_dir` is not a folder.

    """
    if config_dir is not None and not config_dir.is_dir():
        raise UserError(f"--config-dir {config_dir}: no such folder")
    own: list[Traversable] = [files("fedsim.configs")]
    return [*own, *([config_dir] if config_dir else []), *(plugin.folder for plugin in plugins.installed()[0])]


def groups(folders: Sequence[Traversable]) -> list[str]:
    """Return the names of all groups, in the order of the primary config's defaults, then the others."""
    found = {child.name for folder in folders for child in folder.iterdir() if _is_group(child)}
    order = [name for name in defaults() if name in found]
    return order + sorted(found - set(order))


def defaults() -> dict[str, str]:
    """Return group → choice of the primary config's defaults list, in its order."""
    text = files("fedsim.configs").joinpath("config.yaml").read_text(encoding="utf-8")
    listed = text.split("defaults:", 1)[1].split("\n\n", 1)[0]
    return dict(re.findall(r"^ *- (\w+): *([\w/]+)", listed, flags=re.MULTILINE))


def options(group: str, folders: Sequence[Traversable]) -> dict[str, Traversable]:
    """Return choice → YAML file of a group, sorted; files and folders that begin with "_" are parts of others."""
    found: dict[str, Traversable] = {}
    for folder in reversed(folders):  # the first folder's file is the one that Hydra takes
        found.update(_walk(folder.joinpath(group), ""))
    return dict(sorted(found.items(), key=lambda item: (item[0].count("/"), item[0])))


def entries(group: str, config_dir: Path | None = None) -> list[Entry]:
    """Return all choices of a group.

    Raises:
        UserError: there is no such group.

    """
    folders = roots(config_dir)
    known = groups(folders)
    if group not in known:
        raise UserError(f"no group {group!r}{did_you_mean(group.lower(), known)}")
    return [
        Entry(name, *describe(file.read_text(encoding="utf-8")), plugins.origin_of(file))
        for name, file in options(group, folders).items()
    ]


def describe(text: str) -> tuple[str, str]:
    """Split a YAML's first comment line into what it is and the paper it comes from.

    >>> describe("# Median of each coordinate. Byzantine-robust learning (Yin et al., ICML 2018), alg. 1.")
    ('Median of each coordinate.', 'Byzantine-robust learning (Yin et al., ICML 2018), alg. 1.')
    >>> describe("# Plain averaging (the mean of 3 numbers).")
    ('Plain averaging (the mean of 3 numbers).', '')
    >>> describe("# LeNet-5 with ReLU. LeCun et al., Proc. IEEE 1998, fig. 2.")
    ('LeNet-5 with ReLU.', 'LeCun et al., Proc. IEEE 1998, fig. 2.')
    """
    first = text.lstrip("\ufeff\n ").split("\n", 1)[0]
    if not first.startswith("#"):
        return "", ""
    sentences = _SENTENCE_END.split(first.lstrip("# ").strip())
    dated = (i for i, sentence in enumerate(sentences) if i and _YEAR.search(sentence))
    start = next(dated, len(sentences))
    return " ".join(sentences[:start]), " ".join(sentences[start:])


_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bal\.)(?<!\bProc\.)(?<!\bInt\.)(?<!\bConf\.)(?<!\b[A-Z]\.)\s+(?=[A-Z\d])")
_YEAR = re.compile(r"\b(?:19|20)\d\d[a-z]?\b")


def _is_group(child: Traversable) -> bool:
    return child.is_dir() and child.name[0] not in "_." and next(_walk(child, ""), None) is not None


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    if not folder.is_dir():
        return
    for child in folder.iterdir():
        if child.name[0] in "_.":
            continue
        if child.is_dir():
            yield from _walk(child, f"{prefix}{child.name}/")
        elif child.name.endswith(".yaml"):
            yield prefix + child.name.removesuffix(".yaml"), child


def group_table(config_dir: Path | None = None, *, width: int | None = None, style: bool = False) -> str:
    """Return a text table of group, default choice and the other choices.

    Args:
        config_dir: folder with further choices.
        width: columns; None: the terminal's, at most 100.
        style: bold and dim, for a terminal.

    """
    folders, chosen = roots(config_dir), defaults()
    rows = [("group", "default", "also")]
    for group in groups(folders):
        names = [name for name in options(group, folders) if name != chosen.get(group)]
        inside = Counter(name.split("/")[0] for name in names if "/" in name)
        also = [name for name in names if "/" not in name] + [f"{f}/… ({n} more)" for f, n in inside.items()]
        rows.append((group, chosen.get(group, "-"), ", ".join(also)))
    first, second = (max(len(row[i]) for row in rows) + 2 for i in (0, 1))
    lines = []
    for i, (group, default, also_text) in enumerate(rows):
        text = _hang(f"{group:<{first}}{default:<{second}}", also_text, first + second, width)
        lines += [_styled(line, "1", on=style and i == 0) for line in text]
    return "\n".join(lines)


def choice_table(group: str, config_dir: Path | None = None, *, width: int | None = None, style: bool = False) -> str:
    """Return the choices of one group as text: name, what it is and, below that, its paper.

    Args:
        group: e.g. "strategy".
        config_dir: folder with further choices.
        width: columns; None: the terminal's, at most 100.
        style: bold and dim, for a terminal.

    Raises:
        UserError: there is no such group.

    """
    found = entries(group, config_dir)
    indent = min(max(len(entry.name) for entry in found), _NAME_WIDTH) + 2
    lines = []
    for name, summary, paper, origin in found:
        text = _hang(f"{name:<{indent}}", summary, indent, width)
        lines += [_styled(text[0][: len(name)], "1", on=style) + text[0][len(name) :], *text[1:]]
        lines += [_styled(line, "2", on=style) for line in (_hang(" " * indent, paper, indent, width) if paper else [])]
        lines += [_styled(" " * indent + f"plug-in {origin}", "2", on=style)] if origin else []
    return "\n".join(lines)


_NAME_WIDTH = 22  # a longer name has a line of its own


def _hang(head: str, text: str, indent: int, width: int | None) -> list[str]:
    """Wrap text in a column behind its head; a head that is too long gets its own line."""
    width = width or min(shutil.get_terminal_size((80, 24)).columns, 100)
    own = [] if len(head) <= indent else [head.rstrip()]
    room = max(width - indent, 20)
    wrapped = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
    lines = [((" " * indent if own or i else head) + line).rstrip() for i, line in enumerate(wrapped)]
    return [*own, *lines]


def _styled(line: str, code: str, *, on: bool) -> str:
    return f"\033[{code}m{line}\033[0m" if on and line else line
