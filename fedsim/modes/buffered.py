"""Asynchronous rounds: the server aggregates as soon as its buffer is full, and never waits for the slow.

Nguyen et al., AISTATS 2022 (FedBuff), Algorithm 1; with a buffer of one, Xie et al., 2019 (FedAsync). How staleness
weighs is the strategy's affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import ClassVar

import numpy as np

from fedsim.modes.mode import Arrivals, Flight, Server, nobody_there
from fedsim.rng import keyed_bits


@dataclass(frozen=True, kw_only=True)
class Async:
    """`concurrency` clients train at any time; each reply frees a slot, and each `buffer` replies make a new version.

    A freed slot is taken at once by the next client, which is sent the newest version. Departs from FedBuff in one
    point: a client whose reply waits in the buffer is not sent the same version again, so that a buffer holds a
    client once. Replies that arrive at the same time are taken in keyed random order. With all clients in flight
    and in the buffer it is `Sync` over all clients, to the bit.

    Args:
        buffer: M ≥ 1 replies that make a new version; 1 is fully asynchronous.
        concurrency: clients ≥ 1 that train at any time; more than there are means all of them.

    Raises:
        ValueError: an argument out of its range.

    """

    buffer: int = 10
    concurrency: int = 20

    stale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("buffer", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    def check(self, server: Server) -> None:
        """Refuse a buffer that could never fill."""
        if self.buffer > server.num_clients:
            raise ValueError(
                f"buffer must be <= {server.num_clients}, the clients there are, got {self.buffer}: it would never fill"
            )

    def num_participants(self, cohort_size: int) -> int:
        """Return the buffer."""
        return self.buffer

    def __call__(self, round: int, flight: Flight, server: Server) -> tuple[Arrivals, Flight]:
        """Return the replies that fill the buffer, or all that are left to come if they are fewer."""
        num_old = len(flight.clients)
        # Slots that are free now, and those that replies will free before the buffer is full.
        wanted = max(0, self.concurrency - num_old) + self.buffer
        queue = server.sample(round, wanted, flight.clients, flight.now)
        order = np.argsort(keyed_bits(server.seed, "async/queue", queue, round), kind="stable")
        new = server.clock.jobs(queue[order], round)
        jobs = flight.join(Flight.of(flight.now, new, round - 1))
        if not len(jobs.clients):
            return nobody_there(round, flight, server)
        seconds = np.concatenate([np.zeros(num_old), new.seconds])  # (J,) not read of jobs under way
        arrived, waiting, lost, started, end = self._events(jobs, num_old, seconds.tolist(), server.seed)
        rows = np.fromiter(started, dtype=np.int64, count=len(started))
        begun = np.fromiter(started.values(), dtype=np.float64, count=len(started))
        jobs.started[rows], jobs.due[rows] = begun, begun + seconds[rows]  # `join` made them anew
        return Arrivals.of(jobs.take(arrived), num_sent=len(started), num_lost=lost), jobs.take(waiting).at(end)

    def _events(
        self, jobs: Flight, num_old: int, seconds: list[float], seed: int
    ) -> tuple[list[int], list[int], int, dict[int, float], float]:
        """Run the events until the buffer is full.

        Returns:
            Rows that arrived; rows in flight after; jobs lost; row → begin of those that began; the time.

        """
        ties = keyed_bits(seed, "async/tie", jobs.clients, jobs.versions).tolist()
        due, gone = jobs.due.tolist(), jobs.lost.tolist()
        now = jobs.now
        heap = [(due[row], ties[row], row) for row in range(num_old)]
        heapify(heap)
        started: dict[int, float] = {}
        following, last = num_old, len(due)
        while len(heap) < self.concurrency and following < last:
            heappush(heap, (now + seconds[following], ties[following], following))
            started[following] = now
            following += 1
        arrived: list[int] = []
        lost = 0
        while heap and len(arrived) < self.buffer:
            now, _, row = heappop(heap)
            if gone[row]:
                lost += 1
            else:
                arrived.append(row)
            if following < last and len(arrived) < self.buffer:
                heappush(heap, (now + seconds[following], ties[following], following))
                started[following] = now
                following += 1
        return arrived, [row for _, _, row in sorted(heap, key=lambda event: event[2])], lost, started, now
