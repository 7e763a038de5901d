"""What a round's row says: of the new model where it is evaluated, of the cohort, of the bytes that travelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsim.backend import EngineBackend
from fedsim.contracts import Cohort, Metrics, State
from fedsim.dispatch import Dispatcher
from fedsim.evaluation import ClientFigures, Evaluator
from fedsim.experiment import Experiment
from fedsim.metrics.communication import traffic
from fedsim.metrics.drift import drift_of_rows, drift_of_sums


class Figures:
    """Measures rounds and remembers what was last known.

    An evaluation out of its turn, that of a run's last round, is in that round's row and in the summary, and nowhere
    else: rows of a longer run are those of one that never stopped there.

    Args:
        experiment: what the run is made of.
        evaluator: measures models.
        backend: holds the buffers, and the trainer that says who was dropped.
        dispatcher: knows who was sent what.
        broadcast: what the rule sends with the newest version.

    """

    def __init__(
        self, experiment: Experiment, evaluator: Evaluator, backend: EngineBackend, dispatcher: Dispatcher,
        broadcast: Callable[[], Mapping[str, Any]],
    ) -> None:  # fmt: skip
        self.experiment, self.evaluator, self.backend = experiment, evaluator, backend
        self.dispatcher, self.broadcast = dispatcher, broadcast
        self.uplink = experiment.uplink
        self.regular: dict[str, float] = {}  # last known from evaluations in their turn
        self.known: dict[str, float] = {}  # the same, with those of the last round done
        self.previous: Tensor | None = None  # the last aggregate (D,)

    def measure(
        self, round: int, weights: Tensor, delta: Tensor, cohort: Cohort | None
    ) -> tuple[Metrics, ClientFigures | None]:
        """Return a round's row, and what an evaluation of the clients says where one was due.

        Args:
            round: from 1.
            weights: (D,) after it.
            delta: (D,) what it added.
            cohort: of it; None where nobody arrived, or where clients are not fedsim's.

        """
        evaluator, buffers, evaluation = self.evaluator, self.backend.buffers, self.experiment.evaluation
        due, in_turn = evaluation.due(round, self.experiment.settings.num_rounds), evaluation.due(round, 0)
        server = evaluator.global_figures(weights, buffers, round) if due.server else {}
        clients = evaluator.client_figures(weights, buffers, round) if due.clients else None
        local = {} if clients is None else clients.figures
        new = {name: float(value) for name, value in {**server, **local}.items()}
        self.known = self.regular | new
        turn = {**(server if in_turn.server else {}), **(local if in_turn.clients else {})}
        self.regular |= {name: new[name] for name in turn}
        row: Metrics = {
            "accuracy": self.known.get("accuracy"), "loss": self.known.get("loss"), "evaluated": due.server,
        }  # fmt: skip
        row |= new | self.dispatcher.row()
        if self.backend.task.shift is not None:
            row["replaced_share"] = self.backend.task.shift.share(self.backend.task.partition.indices, round)
        if cohort is None and self.experiment.foreign is None:
            row["num_participants"] = 0
        if cohort is not None:
            row |= self._cohort(round, cohort, delta) | self.dispatcher.columns(cohort)[0]
            if due.decomposition:
                row |= evaluator.decomposition(weights, buffers, cohort, round, self._older(round))
        return row, clients

    def _cohort(self, round: int, cohort: Cohort, delta: Tensor) -> Metrics:
        task, trainer = self.backend.task, self.backend.trainer
        row: Metrics = {
            "num_participants": len(cohort),
            "num_dropped": trainer.dropped + len(trainer.failures),
            "lr": task.training.rate(round),
        }
        losses = cohort.extras.get("train_loss")
        if losses is not None:
            share = cohort.weights / cohort.weights.sum()
            row["train_loss"] = (share.double() * losses.double()).sum()
        row |= self._traffic(cohort)
        if self.experiment.evaluation.drift and task.shared.size:
            row |= {**self._drift(cohort), "step_norm": torch.linalg.vector_norm(delta)}
        if self.uplink is not None and self.uplink.adversary is not None:
            row |= self.uplink.adversary.figures(cohort, delta)
        return row

    def _older(self, round: int) -> Mapping[int, Tensor]:
        """Return the buffers of the versions that a round's stale clients were sent."""
        held = self.dispatcher.versions.buffers
        return {version: buffers for version, buffers in held.items() if version != round - 1}

    def _traffic(self, cohort: Cohort) -> dict[str, int]:
        task, arrivals = self.backend.task, self.dispatcher.arrivals
        buffers = task.buffers.size if self.experiment.settings.buffers == "average" else 0
        return traffic(
            cohort, self.broadcast(), num_sent=len(cohort) if arrivals is None else arrivals.num_sent,
            num_received=len(cohort) + self.backend.trainer.dropped, buffers=buffers * task.dtype.itemsize,
            update=None if self.uplink is None else self.uplink.num_bytes(task.dtype.itemsize),
        )  # fmt: skip

    def _drift(self, cohort: Cohort) -> Metrics:
        if cohort.streamed is not None:
            return drift_of_sums(cohort.streamed, self.previous)
        return drift_of_rows(cohort, self.previous, cosines=self.experiment.evaluation.cosines)

    def state(self) -> State:
        """Return what a checkpoint must hold."""
        return {"regular": self.regular, "known": self.known, "previous": self.previous}

    def load(self, state: State, device: torch.device) -> None:
        """Take back what `state` returned."""
        self.regular, self.known = state["regular"], state["known"]
        self.previous = None if state["previous"] is None else state["previous"].to(device)
