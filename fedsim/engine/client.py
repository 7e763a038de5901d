"""One client's local round: what it is told, how it steps, and what it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.optimizer import Optimizer, clip
from fedsim.engine.task import Block, Job, Task
from fedsim.layout import Params
from fedsim.local import Schedule
from fedsim.metrics.classification import segment_sums


class Row:
    """What a row leaves beside its update."""

    square_norm: Tensor
    buffers: Tensor

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.counts: list[int] = []
        self.extras: Mapping[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}
        self.weight: Any = None  # None: the client's samples


class Plan(NamedTuple):
    """One phase of a job: who moves, and the samples of every row on the device."""

    number: int
    moving: tuple[str, ...]
    schedule: Schedule
    positions: Tensor  # (M,)
    x: Tensor | None  # (M, …), where they are few
    y: Tensor  # (M,)


class Start:
    """What rows that start from the same version share."""

    def __init__(self, task: Task, params: Params, job: Job, version: int, plans: list[Plan]) -> None:
        self.flat = job.models[version]  # (D,)
        self.params = task.shared.split(self.flat)
        self.broadcast = job.broadcasts.get(version, {})
        self.updates = [Update(task, plan, [params[n] for n in plan.moving], self, job.lr) for plan in plans]


class Update:
    """From a gradient to a step: proximal pull, clipping, optimiser."""

    def __init__(self, task: Task, plan: Plan, params: list[Tensor], start: Start, lr: float) -> None:
        self.optimizer = Optimizer(task.training, params, lr)
        self.clip_norm = task.training.clip_norm
        self.mu = float(start.broadcast.get("proximal_mu", getattr(task.objective, "proximal_mu", 0.0)))
        self.pulled = [k for k, name in enumerate(plan.moving) if name in start.params] if self.mu else []
        self.anchors = [start.params[plan.moving[k]] for k in self.pulled]
        self.free = not self.pulled and self.clip_norm is None  # nothing to do before the optimiser

    def constrain(self, grads: list[Tensor]) -> None:
        """Add the proximal pull and clip, in place."""
        if self.pulled:
            pulled = [grads[k] for k in self.pulled]
            torch._foreach_add_(pulled, [self.optimizer.params[k] for k in self.pulled], alpha=self.mu)
            torch._foreach_add_(pulled, self.anchors, alpha=-self.mu)
        if self.clip_norm is not None:
            clip(grads, self.clip_norm)

    def __call__(self, grads: list[Tensor]) -> None:
        """Take one step."""
        self.constrain(grads)
        self.optimizer.step(grads)


def gather(task: Task, job: Job, plans: list[Plan], rows: list[Row]) -> Block:
    """Stack what the rows of a job left."""
    sizes = task.partition.sizes[job.clients]
    weights = [float(sizes[k]) if row.weight is None else row.weight for k, row in enumerate(rows)]
    extras = {name: torch.stack([row.extras[name] for row in rows]) for name in rows[0].extras}
    return Block(
        square_norms=torch.stack([row.square_norm for row in rows]),
        weights=_column(weights, task.device),
        num_steps=torch.from_numpy(np.sum([plan.schedule.num_steps for plan in plans], axis=0)),
        extras={"train_loss": _mean_losses(rows, task), **extras},
        buffers=torch.stack([row.buffers for row in rows]),
        state={name: torch.stack([row.state[name] for row in rows]) for name in job.state},
    )


def _column(values: list[Any], device: torch.device) -> Tensor:
    """Return numbers and 0-d tensors as (K,) float64."""
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    return torch.tensor(values, dtype=torch.float64, device=device)


def _mean_losses(rows: list[Row], task: Task) -> Tensor:
    """Return each row's mean training loss over the samples of its steps (K,)."""
    steps = [len(row.losses) for row in rows]
    if not sum(steps):
        return torch.zeros(len(rows), dtype=task.dtype, device=task.device)
    losses = torch.stack([loss for row in rows for loss in row.losses]).double()  # (S,)
    counts = torch.tensor([count for row in rows for count in row.counts], dtype=torch.float64, device=task.device)
    offsets = torch.tensor(np.concatenate([[0], np.cumsum(steps)]), device=task.device)  # (K+1,)
    # Segment by segment, not as differences of one running sum: there one row's NaN would reach all rows after it.
    means = segment_sums(losses * counts, offsets) / segment_sums(counts, offsets).clamp(min=1)  # (K,)
    return means.to(task.dtype)
