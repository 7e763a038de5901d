"""Rounds that end at a deadline, with more clients asked than are waited for.

Bonawitz et al., MLSys 2019: the server asks for 130 % of the clients it wants, closes the round when enough have
answered or the time is up, and drops the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fedsim.modes.mode import Arrivals, Flight, Server, nobody_there


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """A round ends when the wanted number of replies is there, when nobody is left to wait for, or at the deadline.

    All replies that are there by then count, ties included. Without a deadline, over-selection and drop-outs it is
    `Sync`, to the bit.

    Args:
        deadline: simulated seconds > 0 from the round's begin; None: no limit.
        late: what becomes of replies after the end: "drop", or "deliver" in the round in which they arrive, stale;
            until then their clients are not asked again.
        over_selection: factor ≥ 1 on the cohort; 1.3 asks 13 clients where 10 replies are wanted.

    Raises:
        ValueError: an argument out of its range.

    """

    deadline: float | None = None
    late: Literal["drop", "deliver"] = "drop"
    over_selection: float = 1.0

    kinds: ClassVar[tuple[str, ...]] = ("drop", "deliver")

    def __post_init__(self) -> None:
        if self.deadline is not None and not self.deadline > 0:
            raise ValueError(f"deadline must be > 0 simulated seconds or null, got {self.deadline}")
        if self.late not in self.kinds:
            raise ValueError(f"late must be drop or deliver, got {self.late!r}")
        if not 1 <= self.over_selection < math.inf:
            raise ValueError(f"over_selection must be >= 1, got {self.over_selection}; 1 asks as many as are wanted")

    @property
    def stale(self) -> bool:
        """Whether replies may be of older versions."""
        return self.late == "deliver"

    def check(self, server: Server) -> None:
        """Work with anything."""

    def num_participants(self, cohort_size: int) -> int:
        """Return the replies that are wanted."""
        return cohort_size

    def __call__(self, round: int, flight: Flight, server: Server) -> tuple[Arrivals, Flight]:
        """Return whose replies are there at the round's end."""
        now, wanted = flight.now, server.cohort_size
        asked = math.ceil(wanted * self.over_selection - 1e-9)
        cohort = server.sample(round, asked, flight.clients, now)
        if not len(cohort) and not len(flight.clients):
            return nobody_there(round, flight, server)
        jobs = Flight.of(now, server.clock.jobs(cohort, round), round - 1)
        end = self._end(jobs if len(cohort) else flight, now, wanted)
        every = flight.join(jobs)
        over = every.due <= end  # (J,)
        arrived, later = every.take(over & ~every.lost), every.take(~over)
        num_lost = int((over & every.lost).sum())
        if not self.stale:
            num_lost, later = num_lost + len(later.clients), Flight.empty()
        return Arrivals.of(arrived, num_sent=len(cohort), num_lost=num_lost), later.at(end)

    def _end(self, jobs: Flight, now: float, wanted: int) -> float:
        """Return when the round of some jobs ends."""
        replies = np.sort(jobs.due[~jobs.lost])  # (R,)
        enough = float(replies[wanted - 1]) if len(replies) >= wanted else float(jobs.due.max())
        return enough if self.deadline is None else min(enough, now + self.deadline)
