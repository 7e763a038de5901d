"""Whole rounds of a run: sampling, grid, engine, rule and records, with evaluation and checkpoints apart."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workloads import Workload
from fedsim.build import build
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.contracts import Dataset
from fedsim.loop import Loop

NEVER = 10**6
# Evaluation, clients' metrics, drift and checkpoints cost a round of their own, not this one.
QUIET = (
    f"metrics.every={NEVER}", f"metrics.clients_every={NEVER}", "metrics.per_client=false", "metrics.drift=false",
    f"num_rounds={NEVER}", "data.validation=0", "partition.local_test=0",
)  # fmt: skip
LOCAL = ("lr", "batch_size", "local_epochs", "local_steps")


class WholeRound:
    """A run that does its next round when called: what a person gets, not an engine alone.

    It takes the threads that a run takes: those of the cores that the benchmark is pinned to.

    Args:
        work: data, clients, model and local training; its clients are the registered ones.
        overrides: as on the command line, e.g. "strategy=scaffold".
        cohort: clients a round.

    """

    def __init__(self, work: Workload, *overrides: str, cohort: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        registered = work.partition.num_clients
        settings = [
            *QUIET, "partition=natural", f"fraction={cohort / registered}",
            *(f"client.{name}={_text(getattr(work.training, name))}" for name in LOCAL),
        ]  # fmt: skip
        chosen = {override.split("=")[0] for override in overrides}
        kept = [setting for setting in settings if setting.split("=")[0] not in chosen]
        config = compose([*kept, *overrides])
        self.experiment = build(config, {"data": dataset(work), "model": work.module})
        plan = self.experiment.plan
        self.plan: dict[str, Any] = {**plan.get("engine_arguments", {}), **plan}
        self.loop = Loop(self.experiment, Path(self._folder.name), Observer())

    def __call__(self, number: int) -> None:
        """Do the next round."""
        self.loop.step(self.loop.round + 1)

    def close(self) -> None:
        """End it."""
        self.loop.rounds.close()
        self.loop.times.close()
        self.experiment.engine.close()
        self._folder.cleanup()


def dataset(work: Workload) -> Dataset:
    """Return a workload's samples as a data set whose natural clients are the workload's.

    Its test split is a copy of the first sample of each class: a run wants one.
    """
    sizes, classes = work.partition.sizes, int(work.y.max()) + 1
    first = torch.stack([torch.nonzero(work.y == c)[0, 0] for c in range(classes)])  # (C,)
    owner = np.full(len(work.x) + classes, -1, dtype=np.int64)  # (N + C,)
    owner[work.partition.indices] = np.repeat(np.arange(len(sizes)), sizes)
    positions = np.arange(len(owner))
    return Dataset(
        x=torch.cat([work.x, work.x[first]]), y=torch.cat([work.y, work.y[first]]),
        splits={"train": positions[: len(work.x)], "test": positions[len(work.x) :]}, num_classes=classes, client=owner,
    )  # fmt: skip


def _text(value: float | None) -> str:
    return "null" if value is None else str(value)
