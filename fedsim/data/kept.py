"""A data set that is kept from one run of a process to the next: the trials of a sweep differ in other things."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fedsim.contracts import Dataset

_kept: ContextVar[dict[str, Dataset] | None] = ContextVar("kept", default=None)
_placed: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("placed", default=None)


@contextmanager
def keeping(store: dict[str, Dataset]) -> Iterator[None]:
    """Within it, the last data set that was loaded is kept in a dict, and not loaded again for equal settings."""
    token, placed_token = _kept.set(store), _placed.set([])
    try:
        yield
    finally:
        _kept.reset(token)
        _placed.reset(placed_token)


def is_keeping() -> bool:
    """Say whether data sets are kept just now."""
    return _kept.get() is not None


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


def placed(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor of a data set where a run wants it: the one that another run of `keeping` has there already."""
    held = _placed.get()
    if held is None:
        return x.to(device, dtype)
    found = next((pair for pair in held if pair[0] is x and pair[1].dtype == dtype and pair[1].device == device), None)
    held[:] = [pair for pair in held if pair is not found][-1:]  # inputs and labels of one data set
    held.append(found or (x, x.to(device, dtype)))
    return held[-1][1]
