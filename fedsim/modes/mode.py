"""What a mode is: a pure function from a round and what is in flight to who arrives in it, and when.

A mode is a frozen dataclass called as `mode(round, flight, server) -> (arrivals, flight)`. It decides who is sent the
model, whose reply is waited for and what the simulated time is; it never sees an update. What is in flight is
(client, version, due, work), never an update: arrival times do not depend on training, so a client trains when its
reply is due, from the version it was sent, and the replies of one round train as one job.

(client, version) names a job: nobody is sent the same version twice. The randomness of a reply that was sent version
v is that of round v + 1, in every mode, which is why modes that let the same replies arrive give the same bits.

A round in which nobody arrives leaves the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from fedsim.clock import Clock, Jobs
from fedsim.devices.fleet import Bools, Floats
from fedsim.local import Int64

_COLUMNS = ("clients", "versions", "started", "due", "work", "lost")


class Flight(NamedTuple):
    """The jobs under way after a round, one row each, and the time."""

    now: float  # simulated seconds
    clients: Int64  # (J,)
    versions: Int64  # (J,) of the model that was sent
    started: Floats  # (J,) simulated seconds
    due: Floats  # (J,) when the reply arrives, or the job is lost
    work: Floats  # (J,) share of the local steps
    lost: Bools  # (J,) no reply will come

    @classmethod
    def empty(cls, now: float = 0.0) -> Self:
        """Return a flight without jobs."""
        none, ids = np.zeros(0), np.zeros(0, dtype=np.int64)
        return cls(now, ids, ids, none, none, none, np.zeros(0, dtype=bool))

    @classmethod
    def of(cls, now: float, jobs: Jobs, version: int) -> Self:
        """Return jobs that begin at a time from a version."""
        num = len(jobs.clients)
        started = np.full(num, now)  # (J,)
        return cls(now, jobs.clients, np.full(num, version), started, now + jobs.seconds, jobs.work, jobs.lost)

    def take(self, rows: Any) -> Self:
        """Return some of the jobs: an index array or a mask (J,)."""
        return self._replace(**{name: getattr(self, name)[rows] for name in _COLUMNS})

    def join(self, other: Flight) -> Self:
        """Return the jobs of both, at this one's time."""
        joined: dict[str, Any] = {n: np.concatenate([getattr(self, n), getattr(other, n)]) for n in _COLUMNS}
        return self._replace(**joined)

    def at(self, now: float) -> Self:
        """Return the same jobs at another time."""
        return self._replace(now=now)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return self._asdict()

    @classmethod
    def load(cls, state: dict[str, Any]) -> Self:
        """Return what `state` gave."""
        arrays = {name: np.asarray(value) for name, value in state.items() if name != "now"}
        return cls(now=float(state["now"]), **arrays)


class Arrivals(NamedTuple):
    """Whose replies the server aggregates in a round, in ascending order of clients."""

    clients: Int64  # (K,)
    received: Int64  # (K,) version that each was sent
    started: Floats  # (K,) simulated seconds when it was
    due: Floats  # (K,) when the reply arrived
    work: Floats  # (K,) share of the local steps
    num_sent: int  # clients that were sent the model in this round
    num_lost: int  # jobs that ended in this round without a reply, or whose reply was not waited for

    @classmethod
    def of(cls, jobs: Flight, *, num_sent: int, num_lost: int = 0) -> Self:
        """Return jobs in order of their clients."""
        jobs = jobs.take(np.argsort(jobs.clients, kind="stable"))
        return cls(jobs.clients, jobs.versions, jobs.started, jobs.due, jobs.work, num_sent, num_lost)

    @property
    def whole(self) -> bool:
        """Whether every reply did all its steps."""
        return bool((self.work == 1).all())


@dataclass(frozen=True, kw_only=True, eq=False)
class Server:
    """What a mode may ask."""

    clock: Clock
    cohort_size: int  # clients that a synchronous round samples
    num_clients: int  # that can be sampled
    seed: int
    sample: Callable[[int, int, Int64, float], Int64]
    """(round, num, busy clients (B,), now) -> ids (n ≤ num,) ascending, of those that are there and not busy."""


class Mode(Protocol):
    """When the server waits for whom. `stale` says whether replies may be of older versions."""

    stale: bool

    def check(self, server: Server) -> None:
        """Raise ValueError where it cannot work with these devices or this cohort."""
        ...

    def num_participants(self, cohort_size: int) -> int:
        """Return how many replies a round aggregates when none is lost."""
        ...

    def __call__(self, round: int, flight: Flight, server: Server) -> tuple[Arrivals, Flight]:
        """Return who arrives in a round (from 1; the newest version is round − 1) and what stays in flight."""
        ...


def nobody_there(round: int, flight: Flight, server: Server) -> tuple[Arrivals, Flight]:
    """Return a round in which the server waits in vain."""
    none = Flight.empty(flight.now)
    return Arrivals.of(none, num_sent=0), flight.at(flight.now + server.clock.idle_seconds)


NOBODY: Int64 = np.zeros(0, dtype=np.int64)
