"""The engine behind the grid: what a cohort's messages ask for, trained as one job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.contracts import Cohort, Partition
from fedsim.dispatch import Dispatcher
from fedsim.engine.evaluate import own_parts, predict
from fedsim.engine.rounds import Trainer
from fedsim.engine.task import BUFFER, LOCAL, Job, placed
from fedsim.layout import Layout
from fedsim.local import Int64
from fedsim.metrics.classification import segment_means
from fedsim.uplink import Uplink


class EngineBackend:
    """Trains and evaluates virtual clients on an engine; `fedsim.flower.grid.Backend`.

    Args:
        trainer: the engine with its bad-row policy.
        buffers: of the model before round 1.
        average_buffers: whether the clients' buffers replace the server's.
        test: each client's own test samples.
        coefficients: of a cohort without updates, where the rule lets rows be summed as they come; None holds them.
        reduced_extras: second uploads of which such a rule wants only the mean.

    """

    def __init__(
        self, trainer: Trainer, *, buffers: Tensor, average_buffers: bool, test: Partition,
        coefficients: Callable[[Cohort], Tensor] | None = None, reduced_extras: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.trainer, self.task = trainer, trainer.task
        self.buffers, self.average_buffers = buffers, average_buffers
        self.test = test
        self.coefficients, self.reduced_extras = coefficients, reduced_extras
        self.uplink: Uplink | None = None  # compression and attacks on rows that are held; the run loop sets it
        self.cohort: Cohort | None = None  # of the last round, good rows only
        self.dispatcher: Dispatcher | None = None  # who arrives, and from which version
        self.sent: Callable[[Tensor, Mapping[str, Any], int], Tensor] | None = None  # the rule's, see `Rule`

    @property
    def layout(self) -> Layout:
        """Of the parameters that travel."""
        return self.task.shared

    def train(
        self, round: int, clients: Int64, models: Tensor, broadcast: Mapping[str, Any], config: Mapping[str, Any]
    ) -> Cohort:
        """Train a cohort from models (D,) or, one row a client, (K, D).

        A Flower strategy's "proximal-mu" reaches the objective as `broadcast["proximal_mu"]`, every other number
        under its own name.
        """
        models = models.to(self.task.device, self.task.dtype)
        same = models.dim() == 1
        # Rows of their own versions get negative ids: no version of the server's has one.
        received = np.full(len(clients), round - 1) if same else -1 - np.arange(len(clients))
        sent = {name.replace("-", "_"): value for name, value in config.items() if isinstance(value, int | float)}
        sent.update(placed(self.task, broadcast))
        versions = {int(v): models if same else models[k] for k, v in enumerate(received.tolist())}
        job = Job(
            clients=clients,
            received=received,
            models=versions,
            broadcasts=dict.fromkeys(versions, sent),
            buffers=self.buffers,
            state=self.task.store.get(clients, self.task.device),
            round=round,
            key=round,
            lr=self._rate(round, sent),
        )
        if same and self.dispatcher is not None:
            job = self._dispatched(job, self.dispatcher)
        if self.coefficients is not None:
            cohort, buffers = self.trainer.stream(job, self.coefficients, self.reduced_extras)
        else:
            cohort, buffers = self.trainer.collect(job)
            if self.uplink is not None:
                cohort = self.trainer.screen(self.uplink(cohort))
        if not same:
            cohort = replace(cohort, staleness=torch.zeros_like(cohort.staleness))
        if self.average_buffers:
            self.buffers = buffers
        self.cohort = cohort
        return cohort

    def _rate(self, round: int, sent: Mapping[str, Any]) -> float:
        return self.task.training.rate(round) * float(sent.get("lr_scale", 1.0))

    def _dispatched(self, job: Job, dispatcher: Dispatcher) -> Job:
        """Return the job with each row from the version that its client was sent, keyed by that version."""
        arrivals, newest = dispatcher.arrivals, job.round - 1
        if arrivals is None or not np.array_equal(arrivals.clients, job.clients):
            return job
        if not arrivals.whole:
            job = replace(job, work=arrivals.work)
        held = dispatcher.versions
        if newest in held.models:  # whoever answers it later trains with all that was sent, not the rule's part alone
            held.add(newest, job.models[newest], job.broadcasts[newest], job.buffers)
        old = sorted(set(arrivals.received.tolist()) - {newest})
        if not old:
            return job
        sent = {v: placed(self.task, held.broadcasts[v]) for v in old}
        rates = {newest: job.lr, **{v: self._rate(v + 1, sent[v]) for v in old}}
        starts = {v: self.sent(held.models[v], sent[v], newest - v) if self.sent else held.models[v] for v in old}
        return replace(
            job,
            received=arrivals.received,
            models={**job.models, **starts},
            broadcasts={**job.broadcasts, **sent},
            key=arrivals.received + 1,
            rates=rates if len(set(rates.values())) > 1 else None,
            older={v: held.buffers[v] for v in old if v in held.buffers} or None,
        )

    def evaluate(self, round: int, clients: Int64, models: Tensor) -> Mapping[str, np.ndarray[Any, np.dtype[Any]]]:
        """Return what Flower's strategies average: samples, loss and accuracy on each client's test samples."""
        models = models.to(self.task.device, self.task.dtype)
        sizes = self.test.sizes[clients]  # (K,)
        personal = any(name.startswith((LOCAL, BUFFER)) for name in self.task.store.first)
        if models.dim() == 1 and not personal:
            tested = np.concatenate([self._tested(int(k), round) for k in clients])
            result = predict(self.task, models, torch.from_numpy(tested).to(self.task.device), buffers=self.buffers)
            loss, correct = result.loss, result.correct
        else:
            rows = []
            for k, w in zip(clients.tolist(), models.expand(len(clients), -1), strict=True):
                local, buffers = own_parts(self.task, k, w, self.buffers)
                positions = torch.from_numpy(self._tested(k, round)).to(self.task.device)
                rows.append(predict(self.task, w, positions, buffers=buffers, local=local))
            loss, correct = torch.cat([r.loss for r in rows]), torch.cat([r.correct for r in rows])
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)])).to(loss.device)
        return {
            "num-examples": sizes,
            "eval_loss": segment_means(loss, offsets).nan_to_num().cpu().numpy(),
            "eval_acc": segment_means(correct, offsets).nan_to_num().cpu().numpy(),
        }

    def _tested(self, client: int, round: int) -> Int64:
        """Return where a client's test samples (n,) lie in a round."""
        mine = self.test.of(client)
        return mine if self.task.shift is None else self.task.shift(mine, round)
