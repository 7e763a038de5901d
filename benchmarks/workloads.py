"""The workloads of docs/benchmarks.md as data, a model and a federation, without any engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Partition
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Job, Task
from fedsim.layout import Layout
from fedsim.local import Int64, LocalTraining, Schedule, schedule
from fedsim.models.cnn import cnn
from fedsim.models.lenet import lenet
from fedsim.models.logreg import logreg
from fedsim.models.mlp import mlp
from fedsim.models.parameters import initialise
from fedsim.models.resnet import resnet8, resnet18


@dataclass(frozen=True, eq=False)
class Workload:
    """One cohort's round: who trains what on which samples."""

    name: str
    module: nn.Module
    x: Tensor  # (N, …)
    y: Tensor  # (N,)
    partition: Partition
    training: LocalTraining
    cohort: int

    def task(self) -> Task:
        """Return a fresh task: engines take the module's tensors for themselves."""
        module = copy.deepcopy(self.module)
        return Task(
            module=module, shared=Layout.of(dict(module.named_parameters())), local=Layout((), ()),
            buffers=Layout((), ()), objective=CrossEntropy(), training=self.training, x=self.x, y=self.y,
            partition=self.partition, store=ClientStore(self.partition.num_clients, {}),
        )  # fmt: skip

    @property
    def start(self) -> Tensor:
        """The weights every client starts from (D,)."""
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])

    def clients(self, number: int) -> Int64:
        """Return a round's cohort, ascending: everybody, or a draw of its own where more clients are registered."""
        registered = self.partition.num_clients
        if registered == self.cohort:
            return np.arange(registered)
        return np.sort(np.random.default_rng(number).choice(registered, self.cohort, replace=False))

    def job(self, number: int) -> Job:
        """Return the job of a round from 1; all rounds start from the same weights."""
        clients = self.clients(number)
        return Job(
            clients=clients, received=np.zeros(self.cohort, dtype=np.int64), models={0: self.start}, broadcasts={},
            buffers=torch.empty(0), state={}, round=number, key=number, lr=self.training.lr,
        )  # fmt: skip

    def weights(self, number: int) -> Tensor:
        """Return the share of each client of a round's cohort in the mean update (K,): its part of the samples."""
        sizes = torch.from_numpy(self.partition.sizes[self.clients(number)]).double()
        return sizes / sizes.sum()

    def samples(self, number: int) -> Tensor:
        """Return the positions of all of a cohort's samples, client by client."""
        given, offsets = self.partition.indices, self.partition.offsets
        parts = [given[offsets[k] : offsets[k + 1]] for k in self.clients(number)]
        return torch.from_numpy(np.concatenate(parts))

    def schedule(self, number: int) -> Schedule:
        """Return the order of a round's samples, as the engines lay it out."""
        return schedule(self.training, self.partition, self.clients(number), seed=0, round=number)

    def batches(self, number: int) -> list[list[Tensor]]:
        """Return the positions of every step of every client, in the order that the engines use."""
        order = self.schedule(number)
        return [
            [
                torch.from_numpy(order.positions[order.starts[k] + a : order.starts[k] + b])
                for a, b in (order.bounds(k, s) for s in range(int(order.num_steps[k])))
            ]
            for k in range(self.cohort)
        ]


def _equal(clients: int, samples: int) -> Partition:
    return Partition(np.arange(clients * samples), np.arange(clients + 1) * samples)


def _noise(count: int, shape: tuple[int, ...], classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *shape, generator=generator)
    return x, torch.randint(0, classes, (count,), generator=generator)


def b1() -> Workload:
    """Return B1 pfl-cifar10-iid: cohort 50 of 50 samples 3×32×32, batch 10, 5 steps, the 1.63 M parameter CNN."""
    x, y = _noise(2500, (3, 32, 32), 10)
    module = initialise(lambda: cnn((3, 32, 32), 10), 0)
    return Workload("B1", module, x, y, _equal(50, 50), LocalTraining(lr=0.1, batch_size=10, local_steps=5), 50)


def b2(clients: int = 10) -> Workload:
    """Return B2 lr-mnist: cohort 10 of 60 samples, batch 10, logistic regression 784→10."""
    x, y = _noise(60 * clients, (1, 28, 28), 10)
    module = initialise(lambda: logreg((1, 28, 28), 10), 0)
    return Workload("B2", module, x, y, _equal(clients, 60), LocalTraining(lr=0.03, batch_size=10), 10)


def b3(clients: int = 3400, cohort: int = 100) -> Workload:
    """Return B3 many-clients: 3400 clients of 16–400 log-normal samples 1×28×28 of 62 classes, cohort 100, batch 20.

    Clients own random positions of a pool of 20,000 images, so that the data fits a small machine: samples are never
    looked at, only gathered. Each round draws its own cohort.
    """
    rng = np.random.default_rng(0)
    sizes = np.clip(np.round(rng.lognormal(math.log(60), 0.9, clients)), 16, 400).astype(np.int64)  # (clients,)
    x, y = _noise(20_000, (1, 28, 28), 62)
    indices = rng.integers(0, len(x), int(sizes.sum()))
    module = initialise(lambda: cnn((1, 28, 28), 62, channels=(16, 32)), 0)
    partition = Partition(indices, np.concatenate([[0], np.cumsum(sizes)]))
    return Workload("B3", module, x, y, partition, LocalTraining(lr=0.1, batch_size=20), cohort)


def b4(samples: int = 50, cohort: int = 100) -> Workload:
    """Return B4 mlp-cross-device: cohort 100 of 50 samples, batch 10, MLP 784-200-10."""
    x, y = _noise(cohort * samples, (784,), 10)
    module = initialise(lambda: mlp((784,), 10, hidden=(200,)), 0)
    training = LocalTraining(lr=0.1, batch_size=10)
    return Workload("B4", module, x, y, _equal(cohort, samples), training, cohort)


def b8(model: str) -> Workload:
    """Return B8 crossover: cohort 10 of 20 images 3×32×32, batch 10, with a model of `MODELS`."""
    x, y = _noise(200, (3, 32, 32), 10)
    factory = MODELS[model]
    module = initialise(lambda: factory((3, 32, 32), 10), 0)
    return Workload(f"B8 {model}", module, x, y, _equal(10, 20), LocalTraining(lr=0.01, batch_size=10), 10)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "logreg": logreg, "mlp": mlp, "lenet": lenet, "cnn": cnn, "resnet8": resnet8, "resnet18": resnet18,
}  # fmt: skip
"""Ascending in compute per client."""


def overhead() -> Workload:
    """Return cohort 1000 of logistic regression on 8×8 images, 2 samples each: nearly all overhead."""
    x, y = _noise(2000, (1, 8, 8), 10)
    module = initialise(lambda: logreg((1, 8, 8), 10), 0)
    return Workload("overhead", module, x, y, _equal(1000, 2), LocalTraining(lr=0.1, batch_size=20), 1000)
