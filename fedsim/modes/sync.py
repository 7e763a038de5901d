"""Synchronous rounds: the server waits for its whole cohort. McMahan et al., AISTATS 2017, Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsim.modes.mode import NOBODY, Arrivals, Flight, Server, nobody_there


@dataclass(frozen=True, kw_only=True)
class Sync:
    """A round takes as long as its slowest client; who drops out is waited for until it does."""

    stale: ClassVar[bool] = False

    def check(self, server: Server) -> None:
        """Work with anything."""

    def num_participants(self, cohort_size: int) -> int:
        """Return the cohort."""
        return cohort_size

    def __call__(self, round: int, flight: Flight, server: Server) -> tuple[Arrivals, Flight]:
        """Return the cohort without those that dropped out; nothing stays in flight."""
        cohort = server.sample(round, server.cohort_size, NOBODY, flight.now)
        if not len(cohort):
            return nobody_there(round, flight, server)
        jobs = Flight.of(flight.now, server.clock.jobs(cohort, round), round - 1)
        arrived = jobs.take(~jobs.lost)
        arrivals = Arrivals.of(arrived, num_sent=len(cohort), num_lost=int(jobs.lost.sum()))
        return arrivals, Flight.empty(float(jobs.due.max()))
