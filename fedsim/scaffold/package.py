"""`fedsim new`: a complete pip package for a strategy, a client or a partition of one's own."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fedsim import __version__, catalogue
from fedsim.errors import UserError, did_you_mean
from fedsim.scaffold import client, partition, strategy
from fedsim.scaffold.common import PYPROJECT, README


class Made(NamedTuple):
    """What was made."""

    folder: Path
    files: tuple[str, ...]  # relative to the folder
    choice: str  # as it is written on the command line


KINDS: Mapping[str, Mapping[str, str]] = {
    "strategy": strategy.FILES,
    "client": client.FILES,
    "partition": partition.FILES,
}


def new(kind: str, name: str, parent: Path) -> Made:
    """Write a package into a new folder `fedsim-NAME`.

    Args:
        kind: strategy, client or partition.
        name: of the choice, as in `strategy=NAME`: small letters, digits and "_".
        parent: where the folder is made. It may hold folders of any name: the package has a name of its own.

    Raises:
        UserError: no such kind, a name that cannot be one or is taken, or the folder exists.

    """
    if kind not in KINDS:
        raise UserError(f"fedsim new {kind}: no such kind{did_you_mean(kind, KINDS)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        plain = re.sub(r"\W+", "_", name.lower()).strip("_0123456789") or "mine"
        raise UserError(f"{name!r} cannot be a choice's name: small letters, digits and _ only, for example {plain}")
    if name in catalogue.options(kind, catalogue.roots()):
        raise UserError(f"{kind}={name} exists already; choose another name")
    package = f"fedsim_{name}"
    folder = parent / package.replace("_", "-")
    if folder.exists():
        raise UserError(f"{folder} exists already")
    values = {
        "name": name,
        "kind": kind,
        "package": package,
        "project": folder.name,
        "class": "".join(part.capitalize() for part in name.split("_")),
        "version": __version__,
    }
    common = {"pyproject.toml": PYPROJECT, "README.md": README, "src/<package>/__init__.py": '"""<class>."""\n'}
    files = {filled(path, values): filled(text, values) for path, text in {**common, **KINDS[kind]}.items()}
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return Made(folder, tuple(files), f"{kind}={name}")


def filled(text: str, values: Mapping[str, str]) -> str:
    """Return a text with each `<name>` replaced by its value; other angles stay."""
    return re.sub(r"<(\w+)>", lambda match: values.get(match[1], match[0]), text)
