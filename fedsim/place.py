"""A (K, D) matrix that its device has no room for: it lies in the host's memory and is computed on by column blocks.

Only the helpers of `fedsim.linalg` and `fedsim.order` know: inside `blockwise` they bring one block after another to
the device and leave their results, (K, K) or (D,), there. Outside of it the matrix is where it is computed on, and a
block is a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.threads import take_threads

T = TypeVar("T")
R = TypeVar("R")

_COPIES = 4  # of a block at once: itself, in float64 (twice), and what a product or a sort writes

_ALIGNED = 64  # bytes


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


def empty(count: int, updates: Tensor) -> Tensor:
    """Return an uninitialised matrix (count, D) of updates' (K, D) kind, where they are.

    On a CPU NumPy asks for its memory, and for large pages of it: first writes to small ones take as long as six reads.
    """
    if updates.device.type != "cpu":
        return updates.new_empty(count, updates.shape[1])
    size = count * updates.shape[1] * updates.itemsize
    memory = np.empty(size + _ALIGNED, np.uint8)
    first = -memory.ctypes.data % _ALIGNED  # as torch's memory: no sum may hang on where it begins
    return torch.from_numpy(memory[first : first + size]).view(updates.dtype).view(count, updates.shape[1])


def blocks(updates: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, block (K, d) on the device) of updates (K, D), blocks at most `width` wide."""
    place = _place.get()
    if place is not None:
        width = min(width, place.width(updates))
    for first in range(0, updates.shape[1], width):
        columns = slice(first, min(first + width, updates.shape[1]))
        block = updates[:, columns]
        yield columns, block if place is None else block.to(place.device)


def map_columns(updates: Tensor, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Return the matrix (M, D) that a function makes of updates (K, D), column by column.

    Args:
        updates: (K, D).
        function: from a block (K, d) and its columns to (M, d).

    Returns:
        (M, D), where the updates are.

    """
    if not elsewhere():
        return function(updates, slice(0, updates.shape[1]))  # (M, D)
    result = updates.new_empty(0)
    for columns, block in blocks(updates, max(1, updates.shape[1])):
        part = function(block, columns)  # (M, d)
        if not len(result):
            result = torch.empty(
                len(part), updates.shape[1], dtype=part.dtype, device=updates.device, pin_memory=updates.is_pinned()
            )  # (M, D)
        result[:, columns] = part
    return result


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Do float32 matrix products in float32: TF32 keeps 10 bits, and a Gram matrix squares the loss."""
    before = torch.get_float32_matmul_precision() if device.type == "cuda" else "highest"
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def threads_for(device: torch.device) -> int:
    """Return how many threads may work on blocks at once: torch's on a CPU, else one."""
    return torch.get_num_threads() if device.type == "cpu" and not elsewhere() else 1


def each(work: Callable[[T], R], parts: Sequence[T], threads: int) -> list[R]:
    """Return what each part of some work gives, in order, done by at most so many threads of one core each."""
    threads = min(len(parts), threads)
    if threads < 2:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(threads, initializer=take_threads, initargs=(1,)) as pool:
        return list(pool.map(work, parts))  # the list raises what a thread has raised
