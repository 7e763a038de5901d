"""Workers as an engine sees them: what it asks of them, and where their rows go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fedsim.engine.task import Job


class WorkersLost(RuntimeError):
    """There is nobody left to train: workers cannot be started."""


def refused(error: BaseException) -> WorkersLost:
    """Say that a worker cannot be set up, and what mends it where that is known."""
    missing = isinstance(error, ImportError | AttributeError)
    hint = "; its classes must stand in modules that a worker can import" if missing else ""
    return WorkersLost(f"a worker cannot take the task ({type(error).__name__}: {error}){hint}")


class Place(NamedTuple):
    """Where the rows of a block go."""

    room: str
    low: int  # first row


class Event(NamedTuple):
    """What a pool tells of a worker.

    "ready"; "done" with a block; "failed" with an exception that training raised; "lost" with why it is gone, where
    another takes its place; "broken" with an exception where nobody can.
    """

    kind: str
    worker: int
    content: Any = None


class Rooms:
    """Named rows that blocks are written into, used again in every round.

    Args:
        make: returns rows (count, D) on the CPU for (name, count).

    """

    def __init__(self, make: Callable[[str, int], Tensor]) -> None:
        self._make = make
        self._rooms: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._rooms[name]

    def ask(self, name: str, count: int) -> Tensor:
        """Return rows (≥ count, D), the same ones until more are asked for."""
        if name not in self._rooms or len(self._rooms[name]) < count:
            self._rooms[name] = self._make(name, count)
        return self._rooms[name]

    def place(self, out: Tensor) -> Place | None:
        """Say which rows of a room these are; None where they are of none."""
        for name, rows in self._rooms.items():
            if rows.numel() and out.is_contiguous() and out.dtype == rows.dtype and out.device == rows.device:
                offset = (out.data_ptr() - rows.data_ptr()) // rows.element_size()
                if 0 <= offset < rows.numel():
                    return Place(name, offset // rows.shape[1])
        return None


class Pool(Protocol):
    """Workers and how to reach them. Each trains one block at a time."""

    rooms: Rooms

    def publish(self, job: Job) -> None:
        """Tell all workers, late ones too, what the blocks to come share: models, broadcasts, buffers."""
        ...

    def give(self, worker: int, part: Job, place: Place, shares: Tensor | None) -> None:
        """Let a worker train a block; it may be dead. With shares c (k,) the place is one row, for Σ c_k Δ_k."""
        ...

    def wait(self) -> list[Event]:
        """Wait until something happens. The first call starts the workers."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...
