"""The slow clients' replies are always the same number of rounds late.

The setting of Huang et al., "Tackling Intertwined Data and Device Heterogeneities in Federated Learning with Unlimited
Staleness" (AAAI 2025; arXiv:2309.13536). Departs from the authors' script, in which slow clients train fresh until
round τ and are τ − 1 rounds stale after it: here nothing of theirs arrives before round τ + 1, and what arrives in
round t was sent version t − 1 − τ exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedsim.modes.mode import NOBODY, Arrivals, Flight, Server


@dataclass(frozen=True, kw_only=True)
class FixedDelay:
    """Fast clients answer in their round, slow ones `delay` rounds later.

    Who is slow is said by the device model; a slow client may have several jobs under way. A round takes as long as
    its slowest fast client.

    Args:
        delay: τ ≥ 0 rounds; 0 is `Sync` but for the time.

    Raises:
        ValueError: a delay below 0.

    """

    delay: int = 40

    stale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise ValueError(f"delay must be >= 0 rounds, got {self.delay}")

    def check(self, server: Server) -> None:
        """Refuse devices that name no slow clients."""
        fleet = server.clock.fleet
        if fleet is None:
            raise ValueError("mode=fixed_delay needs devices that say who is slow: devices=intertwined, tiers or trace")
        if not fleet.slow.any():
            raise ValueError(
                f"mode=fixed_delay delays slow clients, and these devices make none of the {len(fleet.slow)} slow: "
                "take more clients, another seed, or devices=intertwined, tiers or trace with more of them"
            )

    def num_participants(self, cohort_size: int) -> int:
        """Return the cohort."""
        return cohort_size

    def __call__(self, round: int, flight: Flight, server: Server) -> tuple[Arrivals, Flight]:
        """Return the round's fast clients, and the slow ones of `delay` rounds ago."""
        assert server.clock.fleet is not None  # as `check` saw
        cohort = server.sample(round, server.cohort_size, NOBODY, flight.now)
        jobs = Flight.of(flight.now, server.clock.jobs(cohort, round), round - 1)
        fast = ~server.clock.fleet.slow[cohort]  # (n,)
        lost = int(jobs.lost.sum())
        end = float(jobs.due[fast].max()) if fast.any() else flight.now + server.clock.idle_seconds
        jobs, fast = jobs.take(~jobs.lost), fast[~jobs.lost]
        if self.delay:
            due = flight.join(jobs.take(~fast))
            here = due.versions == round - 1 - self.delay  # (J,)
            late = due.take(here)
            arrived, later = jobs.take(fast).join(late._replace(due=np.full(len(late.clients), end))), due.take(~here)
        else:
            arrived, later = jobs, Flight.empty()
        return Arrivals.of(arrived, num_sent=len(cohort), num_lost=lost), later.at(end)
