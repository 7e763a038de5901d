"""Virtual time: how long a job takes on its client's machine, whether it ends, and who can be reached.

A job is one client's local round from one version of the model:
    seconds = model bytes / down bandwidth + FLOPs · samples · work / speed + reply bytes / up bandwidth
None of it depends on training, so arrival times are known before anybody trains. What is random is keyed by
(devices.seed, "job/…", client, round of the dispatch). Real elapsed time has no influence on anything here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedsim.contracts import Partition, Phase
from fedsim.devices.fleet import Bools, Fleet, Floats
from fedsim.local import Int64, LocalTraining
from fedsim.rng import keyed_uniform

UNIT_SECONDS = 1.0  # of a job, and of a round in which nobody is there, where there is no device model


class Jobs(NamedTuple):
    """What is known of jobs when they begin."""

    clients: Int64  # (J,)
    download: Floats  # (J,) seconds until the model is there
    compute: Floats  # (J,) seconds of training
    upload: Floats  # (J,) seconds until the reply is with the server
    work: Floats  # (J,) share of the local steps that are done, in (0, 1]
    lost: Bools  # (J,) drops out on the way
    lost_after: Floats  # (J,) share of the time after which it does, in [0, 1)

    @property
    def seconds(self) -> Floats:
        """(J,) from dispatch to reply; of a lost job, to its loss."""
        whole = self.download + self.compute + self.upload  # (J,)
        seconds: Floats = np.where(self.lost, self.lost_after * whole, whole)
        return seconds


@dataclass(frozen=True, kw_only=True, eq=False)
class Clock:
    """Times and chances of all clients.

    Args:
        fleet: their machines; None: every job takes one second.
        flops: floating-point operations > 0 of a forward and a backward pass of one sample.
        samples: (P,) samples that a whole local round passes.
        down_bytes: of what the server sends a client.
        up_bytes: of what a client sends back.
        dropout: probability in [0, 1) that a job is lost.
        partial_work: least share of the local steps, in (0, 1].
        availability: a model of `fedsim.devices.availability`; None: everybody is always there.
        seed: of all that is drawn.

    """

    fleet: Fleet | None
    flops: float
    samples: Floats
    down_bytes: float
    up_bytes: float
    dropout: float = 0.0
    partial_work: float = 1.0
    availability: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 < self.partial_work <= 1:
            raise ValueError(f"partial_work must be in (0, 1], got {self.partial_work}")

    def jobs(self, clients: Int64, round: int) -> Jobs:
        """Return the jobs of clients (J,) that begin in a round."""
        num = len(clients)
        work = np.ones(num)  # (J,)
        if self.partial_work < 1:
            drawn = keyed_uniform(self.seed, "job/work", clients, round)  # (J,)
            work = 1 - (1 - self.partial_work) * drawn  # (J,) in (partial_work, 1]
        lost, after = np.zeros(num, dtype=bool), np.zeros(num)  # (J,)
        if self.dropout:
            lost = keyed_uniform(self.seed, "job/lost", clients, round) < self.dropout  # (J,)
            after = keyed_uniform(self.seed, "job/lost_after", clients, round)  # (J,)
        return Jobs(clients, *self.spent(clients, work), work, lost, after)

    def spent(self, clients: Int64, work: Floats) -> tuple[Floats, Floats, Floats]:
        """Return the seconds (J,) of download, training and upload of jobs that do a share (J,) of the local steps."""
        fleet = self.fleet
        if fleet is None:
            none = np.zeros(len(clients))
            return none, np.full(len(clients), UNIT_SECONDS), none
        compute = self.flops * self.samples[clients] * work / fleet.speed[clients]  # (J,)
        return self.down_bytes / fleet.down[clients], compute, self.up_bytes / fleet.up[clients]

    def present(self, clients: Int64, round: int, now: float) -> Int64:
        """Return those of clients (n,) that can be reached."""
        if self.availability is None:
            return clients
        there: Bools = self.availability.present(self.seed, clients, round, now)
        return clients[there]

    def chances(self, clients: Int64, now: float) -> Floats:
        """Return the probability (n,) that each client can be reached."""
        if self.availability is None:
            return np.ones(len(clients))
        chances: Floats = self.availability.chance(self.seed, clients, now)
        return chances

    @property
    def idle_seconds(self) -> float:
        """How long the server waits when nobody is there."""
        return float(getattr(self.availability, "slot_seconds", None) or UNIT_SECONDS)

    @property
    def plain(self) -> bool:
        """Whether every job takes one second, is whole and arrives, and everybody is there."""
        return self.fleet is None and not self.dropout and self.partial_work == 1 and self.availability is None


UNIT = Clock(fleet=None, flops=1.0, samples=np.zeros(0), down_bytes=0.0, up_bytes=0.0)
"""Every job takes one second."""


def samples_passed(training: LocalTraining, partition: Partition, phase: Phase | None = None) -> Floats:
    """Return the samples (P,) that a whole local round of each client passes forward and backward."""
    sizes = partition.sizes  # (P,)
    steps = training.num_steps(sizes, phase)  # (P,)
    batch = np.maximum(np.minimum(sizes, training.batch_size or sizes.max(initial=1)), 1)  # (P,)
    passes, rest = np.divmod(steps, np.maximum(-(-sizes // batch), 1))  # (P,) whole passes, steps of a begun one
    passed: Floats = (passes * sizes + np.minimum(rest * batch, sizes)).astype(np.float64)  # (P,)
    return passed
