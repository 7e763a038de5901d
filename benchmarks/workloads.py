"""The workloads of docs/benchmarks.md as data, a model and a federation, without any engine."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Partition
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Job, Task
from fedsim.layout import Layout
from fedsim.local import LocalTraining, schedule
from fedsim.models.cnn import cnn
from fedsim.models.logreg import logreg
from fedsim.models.mlp import mlp
from fedsim.models.parameters import initialise


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

    def job(self, number: int) -> Job:
        """Return the job of a round from 1; all rounds start from the same weights."""
        clients = np.arange(self.cohort)
        return Job(
            clients=clients, received=np.zeros(self.cohort, dtype=np.int64), models={0: self.start}, broadcasts={},
            buffers=torch.empty(0), state={}, round=number, key=number, lr=self.training.lr,
        )  # fmt: skip

    def batches(self, number: int) -> list[list[Tensor]]:
        """Return the positions of every step of every client, in the order that the engines use."""
        order = schedule(self.training, self.partition, np.arange(self.cohort), seed=0, round=number)
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


def b2() -> Workload:
    """Return B2 lr-mnist: cohort 10 of 60 samples, batch 10, logistic regression 784→10."""
    x, y = _noise(600, (1, 28, 28), 10)
    module = initialise(lambda: logreg((1, 28, 28), 10), 0)
    return Workload("B2", module, x, y, _equal(10, 60), LocalTraining(lr=0.03, batch_size=10), 10)


def b4() -> Workload:
    """Return B4 mlp-cross-device: cohort 100 of 50 samples, batch 10, MLP 784-200-10."""
    x, y = _noise(5000, (784,), 10)
    module = initialise(lambda: mlp((784,), 10, hidden=(200,)), 0)
    return Workload("B4", module, x, y, _equal(100, 50), LocalTraining(lr=0.1, batch_size=10), 100)


def overhead() -> Workload:
    """Return cohort 1000 of logistic regression on 8×8 images, 2 samples each: nearly all overhead."""
    x, y = _noise(2000, (1, 8, 8), 10)
    module = initialise(lambda: logreg((1, 8, 8), 10), 0)
    return Workload("overhead", module, x, y, _equal(1000, 2), LocalTraining(lr=0.1, batch_size=20), 1000)
