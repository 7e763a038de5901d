"""A run folder belongs to one writer at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsim.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock; there the lock is the file's exclusive creation alone
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder; the system lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process holds it.

    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("a+") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise UserError(f"{folder} is being written by another run (process {owner})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def storage(folder: Path) -> Iterator[None]:
    """Turn the two ways in which a folder cannot be written into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RuntimeError(
                f"no space left on the device of {folder}; the rounds up to the last checkpoint are kept: make room, "
                f"then `fedsim run resume={folder}`"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST) and error.filename:
            raise UserError(f"hydra.run.dir={folder} cannot be written: {error.strerror} ({error.filename})") from error
        raise
