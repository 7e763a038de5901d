"""Where data files are looked for: one rule for every source that reads them."""

from __future__ import annotations

import os
from pathlib import Path

from fedsim.errors import UserError


def roots(root: str | None) -> list[Path]:
    """Return the folders that hold data sets, in the order they are searched.

    Args:
        root: `data.root`. Given, it is the only one; null: the environment variable FEDSIM_DATA if it is set,
            then the folder `data` where the command runs.

    """
    if root is not None:
        return [Path(root).expanduser()]
    named = os.environ.get("FEDSIM_DATA")
    return [*([Path(named).expanduser()] if named else []), Path("data")]


def find_file(path: str | None, root: str | None) -> Path:
    """Return the file that `data.path` names.

    Args:
        path: absolute; or relative to `root` if that is given, else to the current folder, FEDSIM_DATA or `data`,
            the first that has it.
        root: `data.root`.

    Raises:
        UserError: no path is given, or no such file is found; the message says where it looked.

    """
    if not path:
        raise UserError("data.path is needed: the file to read, e.g. data.path=my/file")
    given = Path(path).expanduser()
    folders = [Path()] if given.is_absolute() else [*([Path()] if root is None else []), *roots(root)]
    tried = [folder / given for folder in folders]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    looked = ", ".join(str(candidate.absolute()) for candidate in tried)
    raise UserError(f"data.path: no file {path!r}; looked at {looked}. Set data.path, data.root or FEDSIM_DATA")
