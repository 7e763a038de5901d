"""An engine whose workers each run another one: a job's rows in fixed blocks, whoever trains them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.blocks import merge, moved
from fedsim.engine.task import Block, Job, Task

ATTEMPTS = 3  # workers that a block may end before it is held to be the block's fault
AHEAD = 2  # blocks of a stream that are held beside those in training


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

    def give(self, worker: int, part: Job, place: Place) -> None:
        """Let a worker train a block; it may be dead."""
        ...

    def wait(self) -> list[Event]:
        """Wait until something happens. The first call starts the workers."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


class _Order:
    """A block that somebody trains, or will."""

    def __init__(self, part: Job, place: Place) -> None:
        self.part, self.place = part, place
        self.deaths = 0
        self.outcome: Block | BaseException | None = None


class Distributed:
    """Trains fixed blocks of a job's rows, by position in the cohort, wherever a worker is free.

    What a block's rows become depends on the block alone: neither on how many workers there are, nor on who trains
    it, nor on what was trained before or again after a worker's death.

    Args:
        task: what all rounds share.
        pool: the workers.
        plan: what decides the bits of a block: its rows, "block", and the "inner" engine among them.
        workers: how many there are.

    """

    def __init__(self, task: Task, pool: Pool, *, plan: Mapping[str, Any], workers: int) -> None:
        self.task, self.pool, self.plan, self.workers = task, pool, plan, workers
        self.block_rows: int | None = plan["block"]
        # Rows of a block where fewer would take less memory, as in `Vectorized`: halved where it runs out.
        self.chunk: int | None = plan["block"] if "chunk" in plan["inner_arguments"] else None
        self.warnings: list[str] = []  # since somebody took them
        self._waiting: deque[_Order] = deque()
        self._idle: list[int] = []
        self._busy: dict[int, _Order] = {}
        self._shared: tuple[Any, ...] = ()

    def close(self) -> None:
        """End the workers."""
        self._waiting.clear()
        self._busy.clear()
        self._idle.clear()
        self._shared = ()
        self.pool.close()

    def room(self, count: int) -> Tensor:
        """Return rows (count, D) that workers write into without a copy where there can be such."""
        if self.task.device.type == "cpu":
            return self.pool.rooms.ask("held", count)[:count]
        return torch.empty(count, self.task.shared.size, dtype=self.task.dtype, device=self.task.device)

    def train(self, job: Job, out: Tensor) -> Block:
        """Train the rows of a job and write their updates w_k − w_received into out (K, D)."""
        place = self.pool.rooms.place(out)
        rows = out if place is not None else self.pool.rooms.ask("own", len(job))[: len(job)]
        base = place or Place("own", 0)
        size = self.chunk or self.plan["block"]
        lows = range(0, len(job), size)
        parts = [job.part(low, min(low + size, len(job))) for low in lows]
        orders = {k: self._submit(parts[k], Place(base.room, base.low + lows[k])) for k in self._longest_first(parts)}
        try:
            blocks = [self._result(orders[k]) for k in range(len(parts))]
        finally:
            self._drop(list(orders.values()))  # nobody may still write when rows are trained again
        if place is None:
            out.copy_(rows)
        return moved(merge(blocks), self.task.device)

    def stream(self, parts: Sequence[Job]) -> Iterator[tuple[int, Callable[[], tuple[Block, Tensor]]]]:
        """Train blocks side by side; yield (number, what waits for its block and rows), the longest first.

        The order depends on the blocks alone. Rows (k, D) are there until the next number is asked for; at most
        workers + 2 blocks are held.
        """
        order, size = deque(self._longest_first(parts)), max(map(len, parts))
        free = deque(f"slot {k}" for k in range(self.workers + AHEAD))
        pending: deque[tuple[int, _Order]] = deque()
        try:
            while order or pending:
                while order and free:
                    number, name = order.popleft(), free.popleft()
                    self.pool.rooms.ask(name, size)
                    pending.append((number, self._submit(parts[number], Place(name, 0))))
                number, task = pending.popleft()
                yield number, partial(self._rows, task)
                free.append(task.place.room)
        finally:
            self._drop([task for _, task in pending])

    def _rows(self, order: _Order) -> tuple[Block, Tensor]:
        block = self._result(order)
        rows = self.pool.rooms.ask(order.place.room, len(order.part))[: len(order.part)]
        return moved(merge([block]), self.task.device), rows.to(self.task.device)

    def _longest_first(self, parts: Sequence[Job]) -> list[int]:
        """Return the order in which blocks start: so that none is begun when all others are nearly done."""
        work = np.array([_work(self.task, part) for part in parts])
        return [int(k) for k in np.argsort(-work, kind="stable")]

    def _submit(self, part: Job, place: Place) -> _Order:
        shared = (part.models, part.broadcasts, part.buffers)
        if len(self._shared) != 3 or any(a is not b for a, b in zip(shared, self._shared, strict=True)):
            while self._busy:
                self._hear()
            self.pool.publish(part)
            self._shared = shared
        order = _Order(part, place)
        self._waiting.append(order)
        self._hand_out()
        return order

    def _result(self, order: _Order) -> Block:
        while order.outcome is None:
            self._hear()
        if isinstance(order.outcome, BaseException):
            raise order.outcome
        return order.outcome

    def _drop(self, orders: list[_Order]) -> None:
        """Forget blocks that nobody waits for; those in training are waited for, for they still write."""
        self._waiting = deque(order for order in self._waiting if order not in orders)
        while any(order in self._busy.values() for order in orders):
            self._hear()
        self._waiting = deque(order for order in self._waiting if order not in orders)

    def _hand_out(self) -> None:
        while self._waiting and self._idle:
            worker, order = self._idle.pop(), self._waiting.popleft()
            self._busy[worker] = order
            self.pool.give(worker, order.part, order.place)

    def _hear(self) -> None:
        """Wait for something to happen."""
        for event in self.pool.wait():
            order = self._busy.pop(event.worker, None)
            if event.kind == "broken":
                self.close()
                raise event.content
            if event.kind == "lost":
                self._lost(event, order)
                continue
            if order is not None:
                order.outcome = event.content
            self._idle.append(event.worker)
        self._hand_out()

    def _lost(self, event: Event, order: _Order | None) -> None:
        if event.worker in self._idle:
            self._idle.remove(event.worker)
        again = ""
        if order is not None:
            order.deaths += 1
            clients = _few(order.part.clients.tolist())
            again = f"; clients {clients} train again"
            if order.deaths == ATTEMPTS:
                order.outcome = RuntimeError(
                    f"{ATTEMPTS} workers ended on clients {clients}, the last: {event.content}"
                )
            else:
                self._waiting.appendleft(order)
        self.warnings.append(f"worker {event.worker} is gone ({event.content}) and replaced{again}")


def _few(clients: list[int]) -> str:
    return ", ".join(map(str, clients[:5])) + (f" and {len(clients) - 5} more" if len(clients) > 5 else "")


def _work(task: Task, part: Job) -> float:
    """Return the samples that the rows of a block pass forward and backward."""
    total = 0.0
    for phase in task.phases:
        sizes = task.samples_of(phase).sizes[part.clients]  # (k,)
        batch = np.minimum(sizes, task.training.batch_size or sizes)  # (k,)
        steps = task.training.num_steps(sizes, phase)  # (k,)
        total += float((steps * batch * (1.0 if part.work is None else part.work)).sum())
    return total
