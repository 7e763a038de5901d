"""When clients can be reached: coins, a daily wave, and links that come and go.

Time is cut into slots: rounds, or stretches of `slot_seconds` of simulated time. Whether client k is there in slot s
is a pure function of (devices.seed, k, s), so that it depends on nothing that ran before. A model has
    chance(seed, clients (n,), now) -> (n,)               the probability that each is there
    present(seed, clients (n,), round, now) -> (n,) bool  who is
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedsim.devices.fleet import Bools, Floats, Int64
from fedsim.rng import keyed_uniform

_LONGEST = 100_000  # slots that `Markov` looks back; a renewal this old has probability below any that matters


def _check_slot(slot_seconds: float | None) -> None:
    if slot_seconds is not None and not 0 < slot_seconds < math.inf:
        raise ValueError(f"slot_seconds must be > 0 or null for a round, got {slot_seconds}")


def slot_of(slot_seconds: float | None, round: int, now: float) -> int:
    """Return the number of the slot at a time: the round, or how many stretches have passed."""
    return round if slot_seconds is None else math.floor(now / slot_seconds)


@dataclass(frozen=True, kw_only=True)
class Bernoulli:
    """Each client is there in each slot with a probability of its own, independently.

    Args:
        probability: mean over clients, in (0, 1].
        spread: clients' probabilities are uniform in probability ± spread, cut at [0, 1]; ≥ 0.
        slot_seconds: length > 0 of a slot; None: a round.

    """

    probability: float = 0.8
    spread: float = 0.0
    slot_seconds: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability must be in (0, 1], got {self.probability}")
        if not 0 <= self.spread <= 1:
            raise ValueError(f"spread must be in [0, 1], got {self.spread}")
        _check_slot(self.slot_seconds)

    def chance(self, seed: int, clients: Int64, now: float) -> Floats:
        """Return the probability (n,) that each client is there."""
        own = 2 * keyed_uniform(seed, "availability/own", clients) - 1  # (n,) in [−1, 1)
        chances: Floats = np.clip(self.probability + self.spread * own, 0, 1)  # (n,)
        return chances

    def present(self, seed: int, clients: Int64, round: int, now: float) -> Bools:
        """Return who is there (n,)."""
        slot = slot_of(self.slot_seconds, round, now)
        there: Bools = keyed_uniform(seed, "availability", clients, slot) < self.chance(seed, clients, now)
        return there


@dataclass(frozen=True, kw_only=True)
class Daily:
    """A wave over the day, with clients in different time zones.

        p_k(t) = mean + amplitude · cos(2π (t / day − φ_k)),   φ_k uniform in time_zones · [−½, ½)

    Phones train at night, when they charge: Bonawitz et al., MLSys 2019, see a factor of 4 over a day.

    Args:
        mean: in (0, 1].
        amplitude: ≥ 0, with mean ± amplitude in [0, 1].
        day_seconds: period > 0 in simulated seconds.
        time_zones: share of the day over which clients' peaks are spread, in [0, 1].
        slot_seconds: length > 0 of a slot; None: a round.

    """

    mean: float = 0.5
    amplitude: float = 0.3
    day_seconds: float = 86400.0
    time_zones: float = 0.0
    slot_seconds: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mean <= 1:
            raise ValueError(f"mean must be in (0, 1], got {self.mean}")
        if not (self.amplitude >= 0 and self.mean - self.amplitude >= 0 and self.mean + self.amplitude <= 1):
            raise ValueError(f"amplitude must keep mean ± amplitude in [0, 1], got {self.amplitude} at {self.mean}")
        if not 0 < self.day_seconds < math.inf:
            raise ValueError(f"day_seconds must be > 0, got {self.day_seconds}")
        if not 0 <= self.time_zones <= 1:
            raise ValueError(f"time_zones must be in [0, 1], got {self.time_zones}")
        _check_slot(self.slot_seconds)

    def chance(self, seed: int, clients: Int64, now: float) -> Floats:
        """Return the probability (n,) that each client is there."""
        phase = self.time_zones * (keyed_uniform(seed, "availability/zone", clients) - 0.5)  # (n,)
        wave: Floats = self.mean + self.amplitude * np.cos(2 * np.pi * (now / self.day_seconds - phase))  # (n,)
        return wave

    def present(self, seed: int, clients: Int64, round: int, now: float) -> Bools:
        """Return who is there (n,)."""
        slot = slot_of(self.slot_seconds, round, now)
        there: Bools = keyed_uniform(seed, "availability", clients, slot) < self.chance(seed, clients, now)
        return there


@dataclass(frozen=True, kw_only=True)
class Markov:
    """A link that comes and goes: each client is on for a while, then off for a while.

    The chain leaves "on" with probability a = 1 / mean_on a slot and "off" with b = 1 / mean_off. It is run as a
    renewal process: with probability a + b a slot is a renewal, which draws the state afresh, on with probability
    b / (a + b); else the state stays. That is the same chain (a renewal out of "on" ends "off" with probability
    (a + b) · a / (a + b) = a), starts stationary, and is a function of the slot alone: the state is what the last
    renewal drew.

    Args:
        mean_on: slots ≥ 1 that a client stays on, on average.
        mean_off: slots ≥ 1 that it stays off. 1 / mean_on + 1 / mean_off ≤ 1.
        slot_seconds: length > 0 of a slot; None: a round.

    """

    mean_on: float = 20.0
    mean_off: float = 5.0
    slot_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("mean_on", "mean_off"):
            if not 1 <= getattr(self, name) <= 1000:
                raise ValueError(f"{name} must be in [1, 1000] slots, got {getattr(self, name)}")
        if 1 / self.mean_on + 1 / self.mean_off > 1 + 1e-12:
            raise ValueError(
                f"mean_off must be >= {1 / (1 - 1 / self.mean_on) if self.mean_on > 1 else math.inf:.3g} with "
                f"mean_on={self.mean_on}, got {self.mean_off}: states of one slot would alternate, not persist"
            )
        _check_slot(self.slot_seconds)

    def chance(self, seed: int, clients: Int64, now: float) -> Floats:
        """Return the share of time (n,) that each client is there."""
        return np.full(len(clients), self.mean_on / (self.mean_on + self.mean_off))

    def present(self, seed: int, clients: Int64, round: int, now: float) -> Bools:
        """Return who is there (n,)."""
        slot = slot_of(self.slot_seconds, round, now)
        rate = 1 / self.mean_on + 1 / self.mean_off
        last = np.full(len(clients), -1)  # (n,) slot of each client's last renewal; −1: the state before slot 0
        open_ = np.arange(len(clients))
        for s in range(slot, max(-1, slot - _LONGEST), -1):
            renewed = keyed_uniform(seed, "availability/renewal", clients[open_], s) < rate
            last[open_[renewed]] = s
            open_ = open_[~renewed]
            if not len(open_):
                break
        drawn = keyed_uniform(seed, "availability/state", clients, last + 1)  # (n,)
        there: Bools = drawn < self.chance(seed, clients, now)
        return there
