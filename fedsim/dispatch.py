"""Who is sent the model and whose replies arrive: the mode's decisions, and the versions that are still under way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.contracts import Cohort, State
from fedsim.devices.fleet import Floats
from fedsim.experiment import Experiment
from fedsim.local import Int64
from fedsim.modes.mode import Arrivals, Flight, Mode, Server
from fedsim.rng import generator
from fedsim.samplers import Pool

SPENT = ("download_seconds", "compute_seconds", "upload_seconds")  # of a job, in clients.parquet


class Versions:
    """The models that somebody has been sent and not yet answered; a version is freed when nobody needs it."""

    def __init__(self) -> None:
        self.models: dict[int, Tensor] = {}  # version → (D,)
        self.broadcasts: dict[int, Mapping[str, Any]] = {}  # version → what the rule sent with it
        self.buffers: dict[int, Tensor] = {}  # version → its running statistics, where the model has any

    def add(self, version: int, weights: Tensor, broadcast: Mapping[str, Any], buffers: Tensor) -> None:
        """Hold a version; the tensors are the caller's and are not written to by anybody."""
        self.models[version], self.broadcasts[version] = weights, broadcast
        if buffers.numel():
            self.buffers[version] = buffers

    def keep(self, needed: set[int]) -> None:
        """Free all versions but these."""
        for version in self.models.keys() - needed:
            del self.models[version], self.broadcasts[version]
            self.buffers.pop(version, None)

    def state(self) -> State:
        """Return what a checkpoint holds."""
        return {
            str(version): {"model": model, "broadcast": dict(self.broadcasts[version]),
                           "buffers": self.buffers.get(version)}
            for version, model in self.models.items()
        }  # fmt: skip

    def load(self, state: State, place: Callable[[Any], Any]) -> None:
        """Go back to a state; `place` brings tensors to the run's device."""
        self.models = {int(version): place(held["model"]) for version, held in state.items()}
        self.broadcasts = {int(version): place(held["broadcast"]) for version, held in state.items()}
        known = {int(version): held.get("buffers") for version, held in state.items()}
        self.buffers = {version: place(buffers) for version, buffers in known.items() if buffers is not None}


def server_of(experiment: Experiment, sample: Callable[[int, int, Int64, float], Int64]) -> Server:
    """Return what the mode may ask of a run."""
    return Server(
        clock=experiment.clock,
        cohort_size=experiment.cohort_size,
        num_clients=len(experiment.participants),
        seed=experiment.sampler_seed,
        sample=sample,
    )


class Dispatcher:
    """Draws cohorts among the clients that can be reached, and asks the mode who arrives.

    Args:
        experiment: with sampler, mode and clock.
        losses: ids (n,) → (n,) mean training loss of the current model, for samplers that read it.

    """

    def __init__(self, experiment: Experiment, losses: Callable[[Int64], Floats]) -> None:
        self.experiment, self.clock, self.losses = experiment, experiment.clock, losses
        self.server = server_of(experiment, self.sample)
        self.flight = Flight.empty()
        self.versions = Versions()
        self.arrivals: Arrivals | None = None  # of the round that is being done

    def sample(self, round: int, num: int, busy: Int64, now: float) -> Int64:
        """Draw the clients of a round: a function of (sampler seed, round, busy clients) and what the sampler reads."""
        experiment = self.experiment
        clients = self.clock.present(experiment.participants, round, now)
        if len(busy):
            free = np.ones(experiment.task.partition.num_clients, dtype=bool)
            free[busy] = False
            clients = clients[free[clients]]
        if not len(clients):
            return clients
        pool = Pool(clients, experiment.task.partition.sizes[clients], self.clock.chances(clients, now), self.losses)
        rng = generator(experiment.sampler_seed, "cohort", round)
        chosen: Int64 = np.asarray(experiment.sampler(pool, min(num, len(clients)), rng, round), dtype=np.int64)
        return chosen

    def next(
        self, round: int, weights: Tensor, broadcast: Callable[[], Mapping[str, Any]], buffers: Tensor
    ) -> Arrivals:
        """Return whose replies arrive in a round.

        Args:
            round: from 1.
            weights: (D,) version round − 1.
            broadcast: what the rule sends with it; asked where somebody may answer it in a later round.
            buffers: its running statistics, (0,) where there are none.

        """
        mode: Mode = self.experiment.mode
        arrivals, self.flight = mode(round, self.flight, self.server)
        if mode.stale:
            self.versions.add(round - 1, weights, broadcast(), buffers)
            self.versions.keep({*self.flight.versions.tolist(), *arrivals.received.tolist()})
        self.arrivals = arrivals
        return arrivals

    def row(self) -> dict[str, Any]:
        """Return the round's figures of time."""
        row: dict[str, Any] = {"simulated_seconds": self.flight.now}
        if self.arrivals is None or not self._timed:
            return row
        return row | {"num_lost": self.arrivals.num_lost, "num_outstanding": len(self.flight.clients)}

    def columns(self, cohort: Cohort) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the figures of a cohort's staleness, for the round's row and for its clients' rows."""
        if self.arrivals is None or not self._timed:
            return {}, {}
        staleness = cohort.staleness.double()  # (K,)
        rows = np.searchsorted(self.arrivals.clients, cohort.clients.cpu().numpy())
        spent = self.clock.spent(self.arrivals.clients[rows], self.arrivals.work[rows])  # each (K,)
        return (
            {"staleness_mean": staleness.mean(), "staleness_max": staleness.max()},
            {
                "staleness": cohort.staleness,
                "started": torch.from_numpy(self.arrivals.started[rows]),
                "arrived": torch.from_numpy(self.arrivals.due[rows]),
                **{name: torch.from_numpy(part) for name, part in zip(SPENT, spent, strict=True)},
            },
        )

    @property
    def _timed(self) -> bool:
        return self.experiment.mode.stale or not self.clock.plain

    def state(self) -> State:
        """Return everything that the next round depends on."""
        return {"flight": self.flight.state(), "versions": self.versions.state()}

    def load(self, state: State, place: Callable[[Any], Any]) -> None:
        """Go back to a state."""
        self.flight = Flight.load(state["flight"])
        self.versions.load(state["versions"], place)
