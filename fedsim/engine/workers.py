"""An engine whose workers each run another one: a job's rows in fixed blocks, whoever trains them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.blocks import merge, moved
from fedsim.engine.pool import Event, Place, Pool
from fedsim.engine.task import Block, Job, Task

ATTEMPTS = 3  # workers that a block may end before it is held to be the block's fault
AHEAD = 2  # blocks of a stream that are held beside those in training


class _Order:
    """A block that somebody trains, or will."""

    def __init__(self, part: Job, place: Place, shares: Tensor | None = None) -> None:
        self.part, self.place, self.shares = part, place, shares
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
        self._ended: dict[tuple[int, int, int], RuntimeError] = {}  # of one client that ends workers, by `_one`

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

    @property
    def train_sum(self) -> Callable[[Job, Tensor, Tensor], Block] | None:
        """What adds Σ c_k Δ_k of a job's finite rows to a total (D,); None where clients send more than updates.

        For then their weights, or whether a row is good, are known only from what comes back.
        """
        task = self.task
        simple = not (task.stateful or task.buffers.size or hasattr(task.objective, "finish"))
        return self._train_sum if simple else None

    def _train_sum(self, job: Job, coefficients: Tensor, total: Tensor) -> Block:
        size = self.chunk or self.plan["block"]
        lows = range(0, len(job), size)
        parts = [job.part(low, min(low + size, len(job))) for low in lows]
        blocks: dict[int, Block] = {}
        with contextlib.closing(self.stream(parts, [coefficients[low : low + size] for low in lows])) as sums:
            for number, finish in sums:
                blocks[number], row = finish()
                total += row[0]
        return merge([blocks[number] for number in range(len(parts))])

    def stream(
        self, parts: Sequence[Job], shares: Sequence[Tensor] | None = None
    ) -> Generator[tuple[int, Callable[[], tuple[Block, Tensor]]], None, None]:
        """Train blocks side by side; yield (number, what waits for its block and rows), the longest first.

        The order depends on the blocks alone. Rows (k, D) are there until the next number is asked for; at most
        workers + 2 blocks are held.

        Args:
            parts: the blocks.
            shares: coefficients (k,) of each block; then its rows are one, their sum.

        """
        order, size = deque(self._longest_first(parts)), 1 if shares else max(map(len, parts), default=1)
        free = deque(f"slot {k}" for k in range(self.workers + AHEAD))
        pending: deque[tuple[int, _Order]] = deque()
        try:
            while order or pending:
                while order and free:
                    number, name = order.popleft(), free.popleft()
                    self.pool.rooms.ask(name, size)
                    share = shares[number] if shares else None
                    pending.append((number, self._submit(parts[number], Place(name, 0), share)))
                number, task = pending.popleft()
                yield number, partial(self._rows, task)
                free.append(task.place.room)
        finally:
            self._drop([task for _, task in pending])

    def _rows(self, order: _Order) -> tuple[Block, Tensor]:
        block = self._result(order)
        count = len(order.part) if order.shares is None else 1
        rows = self.pool.rooms[order.place.room][:count]
        return moved(merge([block]), self.task.device), rows.to(self.task.device)

    def _longest_first(self, parts: Sequence[Job]) -> list[int]:
        """Return the order in which blocks start: so that none is begun when all others are nearly done."""
        work = np.array([_work(self.task, part) for part in parts])
        return [int(k) for k in np.argsort(-work, kind="stable")]

    def _submit(self, part: Job, place: Place, share: Tensor | None = None) -> _Order:
        shared = (part.models, part.broadcasts, part.buffers)
        if len(self._shared) != 3 or any(a is not b for a, b in zip(shared, self._shared, strict=True)):
            while self._busy:
                self._hear()
            self.pool.publish(part)
            self._shared = shared
        order = _Order(part, place, share)
        order.outcome = self._ended.get(_one(part)) if len(part) == 1 else None
        if order.outcome is not None:  # it would end as many again
            return order
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
            self.pool.give(worker, order.part, order.place, order.shares)

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
                order.outcome = error = RuntimeError(
                    f"{ATTEMPTS} workers ended on clients {clients}, the last: {event.content}"
                )
                if len(order.part) == 1:
                    kept = {one: why for one, why in self._ended.items() if one[0] == _one(order.part)[0]}
                    self._ended = {**kept, _one(order.part): error}
            else:
                self._waiting.appendleft(order)
            if order.deaths > 1:  # said once a block
                return
        self.warnings.append(f"worker {event.worker} is gone ({event.content}) and replaced{again}")


def _one(part: Job) -> tuple[int, int, int]:
    """Return what the row of one client hangs on in a run: the draw, the client, the version that it got."""
    return int(np.ravel(part.key)[0]), int(part.clients[0]), int(part.received[0])


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
