"""Errors that the parts share: what a person caused and can mend (exit code 2), and a client that failed (1)."""

from __future__ import annotations

import difflib
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something wrong in what the user gave: grammar, names, types, values, files, an impossible partition."""


class ClientError(RuntimeError):
    """A client raised while it trained; the cause or the notes carry its traceback."""


@contextmanager
def blamed(part: str) -> Iterator[None]:
    """Turn what a part refuses, e.g. a group's choice, into the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{part}: {error}") from error


def place_of(error: BaseException, ours: Iterable[str] = ()) -> str:
    """Return the last line of somebody's own code on the way to an error, as "FILE:NUMBER, `LINE`"; or nothing.

    Args:
        error: with its traceback.
        ours: beginnings of files that are not theirs; fedsim and what is installed if empty.

    """
    known = tuple(ours) or (str(Path(__file__).parent), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), "<")
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(known)]
    return f"{own[-1].filename}:{own[-1].lineno}, `{own[-1].line}`" if own else ""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return '; did you mean X?' for the nearest option, or the options themselves if none is near."""
    options = sorted(options)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(options)}" if options else ""


def some_of(clients: list[int], most: int = 10) -> str:
    """List clients, the first ones of many."""
    return ", ".join(map(str, clients[:most])) + (f" and {len(clients) - most} more" if len(clients) > most else "")
