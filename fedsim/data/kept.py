"""A data set that is kept from one run of a process to the next: the trials of a sweep differ in other things."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fedsim.contracts import Dataset

_kept: ContextVar[dict[str, Dataset] | None] = ContextVar("kept", default=None)


@contextmanager
def keeping(store: dict[str, Dataset]) -> Iterator[None]:
    """Within it, the last data set that was loaded is kept in a dict, and not loaded again for equal settings."""
    token = _kept.set(store)
    try:
        yield
    finally:
        _kept.reset(token)


def kept(settings: Mapping[str, Any], load: Callable[[], Dataset]) -> Dataset:
    """Return what `load` returns, or the data set that is kept for equal settings.

    Nobody writes into a data set: what changes labels or features returns a new one.
    """
    store = _kept.get()
    if store is None:
        return load()
    key = json.dumps(settings, sort_keys=True)
    if key not in store:
        store.clear()  # one at a time: each is as large as the memory it was given
        store[key] = load()
    return store[key]
