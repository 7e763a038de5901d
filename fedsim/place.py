"""A (K, D) matrix that its device has no room for: it lies in the host's memory and is computed on by column blocks.

Only the helpers of `fedsim.linalg` know: inside `blockwise` they bring one block after another to the device and leave
their results, (K, K) or (D,), there. Outside of it the matrix is where it is computed on, and a block is a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

_COPIES = 4  # of a block at once: itself, in float64 (twice), and what a product or a sort writes


class Place(NamedTuple):
    """Where updates are computed on while they lie elsewhere."""

    device: torch.device
    bytes: int  # that one step of a computation may take there

    def width(self, updates: Tensor) -> int:
        """Return the columns of a block of updates (K, D), ≥ 1."""
        return max(1, self.bytes // max(1, _COPIES * len(updates) * updates.itemsize))


_place: ContextVar[Place | None] = ContextVar("place", default=None)


@contextmanager
def blockwise(place: Place | None) -> Iterator[None]:
    """Compute on updates block by block on a device; None: where they are, whole."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def elsewhere() -> bool:
    """Say whether updates lie elsewhere than they are computed on."""
    return _place.get() is not None


def beside(updates: Tensor) -> Tensor:
    """Return an empty tensor (0,) of the updates' dtype, on the device where what is computed of them is left."""
    place = _place.get()
    return updates.new_empty(0, device=updates.device if place is None else place.device)


def blocks(updates: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, block (K, d) on the device) of updates (K, D), blocks at most `width` wide."""
    place = _place.get()
    if place is not None:
        width = min(width, place.width(updates))
    for first in range(0, updates.shape[1], width):
        columns = slice(first, min(first + width, updates.shape[1]))
        block = updates[:, columns]
        yield columns, block if place is None else block.to(place.device)
